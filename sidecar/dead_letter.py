"""Dead letters: when a record may become one, and what operators do with those that did.

A dead letter is (record, store, class, redacted reason, attempts, first and last time, phase) with its own copy of
the body, in the spool's database. Two guards stand before the table (semantics, section 5):

* the **brake**: when most of a store's recent records would be dead-lettered, the store is at fault, not the records;
  the store is ``blocked`` and nothing is dead-lettered;
* the **bound**: at its share of the spool's cap nothing is overwritten; the store is ``blocked`` until room is made.
"""

import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, TypeVar

from sidecar.clock import Clock
from sidecar.errors import ConfigError, RetryClass
from sidecar.phase import STORES
from sidecar.spool import Counters, DeadLetter, view

_WINDOW: Final = 200  # outcomes looked at
_ENOUGH: Final = 50  # fewer decide nothing
_PAGE: Final = 32  # letters of one page, bodies included: at most 11 MiB
_KEYS: Final = 500  # of one change
_T = TypeVar("_T")

_HOLDERS: Final = (*STORES, "door")
_CLASSES: Final = (*(each.value for each in RetryClass), "refused")


def check_names(store: str | None, retry_class: str | None) -> None:
    """Raises ConfigError for a store or class that no dead letter can have: a typing error must not look like none."""
    for name, seen, allowed in (("store", store, _HOLDERS), ("reason", retry_class, _CLASSES)):
        if seen is not None and seen not in allowed:
            raise ConfigError(
                f"dead-letter {name}", seen=seen[:64], allowed=", ".join(allowed), hint="correct it, or leave it out"
            )


class Brake:
    """Decides from the recent outcomes of one store whether one more dead letter is believable."""

    def __init__(self) -> None:
        self._outcomes: deque[tuple[int, bool]] = deque()
        self._total = 0
        self._dead = 0
        self.engaged = False

    def _note(self, n: int, *, dead: bool) -> None:
        self._outcomes.append((n, dead))
        self._total += n
        self._dead += n if dead else 0
        while self._total - self._outcomes[0][0] >= _WINDOW:
            count, was_dead = self._outcomes.popleft()
            self._total -= count
            self._dead -= count if was_dead else 0

    def delivered(self, n: int) -> None:
        """``n`` records were taken by the store; releases the brake."""
        self.engaged = False
        self._note(min(n, _WINDOW), dead=False)

    def allows(self) -> bool:
        """Whether one more record may be dead-lettered; counts it. False engages the brake."""
        if self.engaged:
            return False
        self._note(1, dead=True)
        if self._total >= _ENOUGH and self._dead * 2 > self._total:
            self.engaged = True
            self._outcomes.clear()
            self._total = self._dead = 0
        return not self.engaged


class _Letters(Protocol):
    """What this part needs of the spool."""

    def counters(self, store: str) -> Counters: ...

    def flush_now(self) -> None: ...

    async def read(self, run: Callable[[sqlite3.Connection], _T]) -> _T: ...

    async def dead_letters(
        self, *, store: str | None, retry_class: str | None, after: int, limit: int
    ) -> Sequence[DeadLetter]: ...

    async def redrive(
        self,
        keys: Sequence[int] | None = None,
        *,
        store: str | None = None,
        retry_class: str | None = None,
        who: str = "",
        reason: str = "",
    ) -> int: ...

    async def discard(
        self,
        keys: Sequence[int] | None = None,
        *,
        store: str | None = None,
        retry_class: str | None = None,
        who: str,
        reason: str,
    ) -> int: ...


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters: every condition that is given must hold. All of them only where ``everything`` says so."""

    log_ids: tuple[str, ...] = ()  # canonical texts
    store: str | None = None
    retry_class: str | None = None
    everything: bool = False

    def check(self) -> None:
        """Raises ConfigError where nothing was selected, or a name is unknown, or ids come with a class: a guess."""
        check_names(self.store, self.retry_class)
        if not (self.log_ids or self.store or self.retry_class or self.everything):
            raise ConfigError(
                "dead-letter selection",
                seen="nothing",
                allowed="an id, a store, a reason, or all",
                hint="name what is meant, or say all",
            )
        if self.log_ids and self.retry_class:
            raise ConfigError(
                "dead-letter selection", seen="ids and a reason", allowed="ids, or a reason", hint="leave one out"
            )


class DeadLetters:
    """The operators' view of the table: list, redrive, discard, export."""

    def __init__(self, spool: _Letters, *, max_bytes: int, clock: Clock) -> None:
        self._spool = spool
        self._max_bytes = max_bytes
        self._clock = clock

    def full(self, store: str) -> bool:
        """True at the bound: then the store is blocked instead of one more record being kept."""
        return self._spool.counters(store).dead_letter_bytes >= self._max_bytes

    async def page(
        self, *, store: str | None = None, retry_class: str | None = None, after: int = 0, limit: int = 100
    ) -> Sequence[DeadLetter]:
        """Up to ``limit`` letters with a key above ``after``, oldest first."""
        return await self._spool.dead_letters(store=store, retry_class=retry_class, after=after, limit=limit)

    async def every(self, *, store: str | None = None, retry_class: str | None = None) -> AsyncIterator[DeadLetter]:
        """All matching letters, page by page: for an export of any size in bounded memory."""
        after = 0
        while page := await self.page(store=store, retry_class=retry_class, after=after, limit=_PAGE):
            for letter in page:
                yield letter
            after = page[-1].key

    async def redrive(self, chosen: Selection, *, who: str, reason: str) -> int:
        """Try matching letters again, now; each keeps its attempts and first error. Returns how many.

        Those refused at the door have no store to go to and stay. Audited with ``who`` and ``reason``.

        Raises:
            ConfigError: nothing was selected.
        """
        return await self._change(self._spool.redrive, chosen, who, reason)

    async def discard(self, chosen: Selection, *, who: str, reason: str) -> int:
        """Give matching letters up for good; audited with ``who`` and ``reason``. Returns how many.

        Raises:
            ConfigError: nothing was selected, or no reason given.
        """
        if not reason.strip():
            raise ConfigError("reason", seen=reason, allowed="a text", hint="say why these records may be given up")
        return await self._change(self._spool.discard, chosen, who, reason)

    async def _change(self, change: Callable[..., Awaitable[int]], chosen: Selection, who: str, reason: str) -> int:
        chosen.check()
        if not chosen.log_ids:
            return await change(store=chosen.store, retry_class=chosen.retry_class, who=who, reason=reason)
        find = partial(view.letter_keys, log_ids=chosen.log_ids, store=chosen.store)
        self._spool.flush_now()  # a record that died a moment ago is found too
        keys = await self._spool.read(find)
        total = 0
        for start in range(0, len(keys), _KEYS):
            total += await change(keys[start : start + _KEYS], who=who, reason=reason)
        return total

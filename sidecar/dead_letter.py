"""Dead letters: when a record may become one, and what operators do with those that did.

A dead letter is (record, store, class, redacted reason, attempts, first and last time, phase) with its own copy of
the body, in the spool's database. Two guards stand before the table (semantics, section 5):

* the **brake**: when most of a store's recent records would be dead-lettered, the store is at fault, not the records;
  the store is ``blocked`` and nothing is dead-lettered;
* the **bound**: at its share of the spool's cap nothing is overwritten; the store is ``blocked`` until room is made.
"""

from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Final, Protocol

from sidecar.clock import Clock
from sidecar.errors import ConfigError
from sidecar.spool import Counters, DeadLetter

_WINDOW: Final = 200  # outcomes looked at
_ENOUGH: Final = 50  # fewer decide nothing
_PAGE: Final = 500


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

    async def dead_letters(
        self, *, store: str | None, retry_class: str | None, after: int, limit: int
    ) -> Sequence[DeadLetter]: ...

    async def redrive(self, keys: Sequence[int]) -> int: ...

    async def discard(self, keys: Sequence[int], *, who: str, reason: str) -> int: ...


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

    async def _keys(
        self, log_id: str | None, store: str | None, retry_class: str | None, *, everything: bool
    ) -> list[int]:
        if log_id is None and store is None and retry_class is None and not everything:
            raise ConfigError(
                "dead-letter selection",
                seen="nothing",
                allowed="an id, a store, a reason, or all",
                hint="name what is meant, or say all",
            )
        return [
            letter.key
            async for letter in self.every(store=store, retry_class=retry_class)
            if (log_id is None or letter.log_id == log_id) and (letter.record is not None or store == "door")
        ]

    async def redrive(
        self,
        *,
        log_id: str | None = None,
        store: str | None = None,
        retry_class: str | None = None,
        everything: bool = False,
    ) -> int:
        """Try matching letters again, now; each keeps its attempts and first error. Returns how many.

        Raises:
            ConfigError: nothing was selected.
        """
        keys = await self._keys(log_id, store, retry_class, everything=everything)
        return await self._spool.redrive(keys) if keys else 0

    async def discard(
        self,
        *,
        who: str,
        reason: str,
        log_id: str | None = None,
        store: str | None = None,
        retry_class: str | None = None,
        everything: bool = False,
    ) -> int:
        """Give matching letters up for good; audited with ``who`` and ``reason``. Returns how many.

        Raises:
            ConfigError: nothing was selected, or no reason given.
        """
        if not reason.strip():
            raise ConfigError("reason", seen=reason, allowed="a text", hint="say why these records may be given up")
        keys = await self._keys(log_id, store, retry_class, everything=everything)
        return await self._spool.discard(keys, who=who, reason=reason) if keys else 0

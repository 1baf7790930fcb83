"""What became of refused records, mirrored from this spool into the fleet's tables: other sidecars explain by it.

A dead letter lies in one pod's spool. Whoever compares the stores elsewhere, or after that pod has forgotten a
discarded record, has to know of it, or it would call the record missing. So every dead letter and every discard is
written as a line (``sidecar.fleet_tables.FateLine``): id, store, state and class, never a payload or a reason's text.

The spool's counters say cheaply that something may have changed; then the leftovers are listed without bodies, in
steps, and what is new or other than last time is written. One that is listed no more was tried again: ``redriven``. A
line is written within seconds; a crash writes all of them again. While the tables cannot be written nothing is lost:
the list is made again.
"""

import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, Protocol, TypeVar

from sidecar.clock import Clock
from sidecar.errors import StoreError
from sidecar.fleet_tables import FateLine, FateState
from sidecar.phase import STORES, StoreName
from sidecar.spool import Counters, view

log = logging.getLogger(__name__)

EVERY: Final = 2.0  # seconds between two looks at the counters
_LINES: Final = 100  # in one call
_T = TypeVar("_T")
_Key = tuple[str, StoreName]


class SpoolPort(Protocol):
    """What is asked of the spool (``sidecar.spool.Spool``)."""

    def flush_now(self) -> None:
        """Let whatever is read next know what is settled."""
        ...

    async def read(self, run: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run a query in the database thread."""
        ...

    def counters(self, store: str) -> Counters:
        """The account."""
        ...


class FatesPort(Protocol):
    """Where lines go (``sidecar.fleet_tables.FleetStore``)."""

    async def put_fates(self, lines: Sequence[FateLine]) -> None:
        """Keep them. Raises StoreError."""
        ...


class Mirror:
    """``run`` until cancelled; ``due`` says whether the tables are to be written in this phase."""

    def __init__(
        self, spool: SpoolPort, tables: FatesPort, *, due: Callable[[], bool], instance: str, clock: Clock
    ) -> None:
        self._spool = spool
        self._tables = tables
        self._due = due
        self._instance = instance
        self._clock = clock
        self._written: dict[_Key, tuple[FateState, str]] = {}
        self._seen: Mapping[StoreName, tuple[int, ...]] | None = None
        self._revision = 0

    async def run(self) -> None:
        """Look, and write what changed."""
        trouble = False
        while True:
            if self._due():
                try:
                    await self.step()
                    trouble = False
                except StoreError as error:
                    if not trouble:
                        log.warning("fates of refused records are not mirrored yet", extra={"reason": error.reason})
                    trouble = True
            await self._clock.sleep(EVERY)

    async def step(self) -> int:
        """One look; how many lines were written. Raises StoreError: what was not written is written the next time."""
        seen = {s: _changing(self._spool.counters(s)) for s in STORES}
        if seen == self._seen:
            return 0
        found: dict[_Key, tuple[FateState, str]] = {}
        self._spool.flush_now()
        after: int | None = 0
        while after is not None:
            rows, after = await self._spool.read(partial(view.refused, after=after))
            for row in rows:
                if row.store in STORES:
                    state: FateState = "discarded" if row.fate == "discarded" else "dead_lettered"
                    found[row.log_id, row.store] = state, row.retry_class
        changed = {key: what for key, what in found.items() if self._written.get(key) != what}
        gone: dict[_Key, tuple[FateState, str]] = {
            key: ("redriven", kind) for key, (_, kind) in self._written.items() if key not in found
        }
        await self._write({**changed, **gone})
        self._seen = seen
        return len(changed) + len(gone)

    async def _write(self, lines: Mapping[_Key, tuple[FateState, str]]) -> None:
        now = self._clock.now_us()
        self._revision = max(now, self._revision + 1)
        items = list(lines.items())
        for start in range(0, len(items), _LINES):
            part = items[start : start + _LINES]
            await self._tables.put_fates(
                [
                    FateLine(
                        log_id=log_id,
                        store=store,
                        state=state,
                        retry_class=kind,
                        by=self._instance,
                        at_us=now,
                        revision=self._revision,
                    )
                    for (log_id, store), (state, kind) in part
                ]
            )
            for key, (state, kind) in part:
                if state == "redriven":
                    self._written.pop(key, None)
                else:
                    self._written[key] = state, kind


def _changing(account: Counters) -> tuple[int, ...]:
    """Numbers that cannot all stay the same where a dead letter came, went or was given up."""
    return account.dead_lettered, account.discarded, account.dead_letter_bytes, account.delivered, account.pending

"""Who is asked what became of a record that a store lacks: this process's spool, the fleet's tables, or nobody.

A sidecar's own spool knows every record that it still owes, and every dead letter, exactly. Of the other sidecars the
fleet's tables know: each writes with its heartbeat since when its oldest record is pending for each store, and mirrors
its dead letters. One that counts and is silent makes the answer unknown, never "settled". Without a fleet (one
instance, ``fleet.enabled: false``) only the own spool is asked, and ``knows_all`` stays false: time has to tell.
"""

import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final, Protocol, TypeVar

from sidecar.clock import Clock
from sidecar.consistency.explain import Known, Whereabouts
from sidecar.consistency.types import Settled
from sidecar.fleet_tables import FateLine, Heartbeat
from sidecar.phase import STORES, StoreName
from sidecar.spool import Counters, view

_AT_ONCE: Final = 500  # ids in one question to the tables
_COUNTED_OUT: Final = 1.3  # of ``fence_after``: after that a process that says nothing no longer counts
_POLL: Final = 0.1  # seconds between two looks at the own spool
_T = TypeVar("_T")


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


class Nobody:
    """No sidecar can be asked: a job beside none. Only time and the ledgers explain."""

    def __init__(
        self, warning: str = "no sidecar was asked what it still owes: only the age of a record tells"
    ) -> None:
        self._warning = warning

    async def settle(self, patience: float) -> Settled:  # noqa: ARG002  (the port's signature)
        """Nothing to wait for."""
        return Settled(warnings=(self._warning,))

    async def fates(self, log_ids: Sequence[str]) -> Mapping[str, Mapping[StoreName, Known]]:  # noqa: ARG002  (as above)
        """Nothing is known."""
        return {}


class OwnSpool:
    """This process's spool."""

    def __init__(self, spool: SpoolPort, instance: str, clock: Clock) -> None:
        self._spool = spool
        self._instance = instance
        self._clock = clock

    async def settle(self, patience: float) -> Settled:
        """Wait until nothing is pending that was accepted by now, or for as long as was said."""
        by = self._clock.now_us()
        end = self._clock.monotonic() + patience
        while self._pending(by) and self._clock.monotonic() < end:
            await self._clock.sleep(_POLL)
        return Settled(asked=(self._instance,))

    def _pending(self, by_us: int) -> bool:
        oldest = (self._spool.counters(store).oldest_pending_us for store in STORES)
        return any(us is not None and us <= by_us for us in oldest)

    async def fates(self, log_ids: Sequence[str]) -> Mapping[str, Mapping[StoreName, Known]]:
        """From frames that are still owed, and leftovers."""
        return await fates_of_spool(self._spool, log_ids)


async def fates_of_spool(spool: SpoolPort, log_ids: Sequence[str]) -> dict[str, dict[StoreName, Known]]:
    """What a spool knows of these records, in steps between its commits."""
    by_bytes = {bytes.fromhex(log_id.replace("-", "")): log_id for log_id in log_ids}
    wanted = frozenset(by_bytes)
    found: dict[str, dict[StoreName, Known]] = {}
    spool.flush_now()
    at: view.Position | None = view.START if any(spool.counters(s).pending for s in STORES) else view.Position(1, 0)
    while at is not None:
        part, at = await spool.read(partial(view.sought, at=at, log_ids=wanted))
        for each in part:
            if each.store in STORES:
                found.setdefault(by_bytes[each.log_id], {})[each.store] = Known(each.fate, each.retry_class)
    return found


Fates = Callable[[Sequence[str]], Awaitable[Iterable[FateLine]]]
"""The mirrored lines of these records. Raises StoreError."""


class Mirrored:
    """Lines that sidecars wrote of records that a store refused (``sidecar.consistency.mirror``).

    ``in_motion`` says of a line of a redriven record whether its sidecar may still be at it; else such a line says
    nothing: the record is there, or dead again under a line of its own, or missing.
    """

    def __init__(self, fates: Fates, in_motion: Callable[[FateLine], bool] = lambda _: False) -> None:
        self._fates = fates
        self._in_motion = in_motion

    async def settle(self, patience: float) -> Settled:  # noqa: ARG002  (the port's signature)
        """Nothing to wait for."""
        return Settled()

    async def fates(self, log_ids: Sequence[str]) -> Mapping[str, Mapping[StoreName, Known]]:
        """Dead letters and discards, and what is given to the store again right now."""
        found: dict[str, dict[StoreName, Known]] = {}
        for start in range(0, len(log_ids), _AT_ONCE):
            for line in await self._fates(log_ids[start : start + _AT_ONCE]):
                if line.state != "redriven":
                    found.setdefault(line.log_id, {})[line.store] = Known(line.state, line.retry_class)
                elif self._in_motion(line):
                    found.setdefault(line.log_id, {}).setdefault(line.store, Known("pending", line.retry_class))
        return found


class Fleet:
    """The other sidecars, by the fleet's tables.

    Args:
        heartbeats: the newest heartbeat of every process that counts, and who of them is silent. Raises StoreError.
        fates: the mirrored lines of these records. Raises StoreError.
        clock: time.
        poll: seconds between two looks at the heartbeats.
        newcomer: whether this observer has just begun to look: then a process that says nothing is waited for until it
            would be counted out, because only time tells whether its row is what a killed one left.
    """

    def __init__(
        self,
        heartbeats: Callable[[], Awaitable[tuple[Sequence[Heartbeat], Sequence[str]]]],
        fates: Fates,
        *,
        clock: Clock,
        poll: float = 1.0,
        newcomer: bool = False,
    ) -> None:
        self._newcomer = newcomer
        self._heartbeats = heartbeats
        self._mirrored = Mirrored(fates, self._in_motion)
        self._heard: Mapping[str, int] = {}  # instance -> time of the last heartbeat that ``settle`` saw
        self._clock = clock
        self._poll = poll

    async def settle(self, patience: float) -> Settled:
        """Wait until each process says that nothing is pending of what it had accepted by now, on its own clock.

        The second heartbeat that is seen to be new was written after this call began: its time, by that process's own
        clock, is the bound, so that clocks need not agree. At least three heartbeats are waited for.
        """
        first: dict[tuple[str, str], int] = {}
        bound: dict[tuple[str, str], int] = {}
        seqs: dict[tuple[str, str], int] = {}
        fresh: dict[tuple[str, str], int] = {}
        rows, silent = await self._heartbeats()
        longest = max((row.interval_s for row in rows), default=0.0)
        waits = [patience, 4 * longest]
        if self._newcomer:
            waits += [_COUNTED_OUT * row.fence_after_s + 2 * row.interval_s for row in rows]
        began = self._clock.monotonic()
        end, least = began + max(waits), began + max(waits[:2])
        while True:
            for row in rows:
                if seqs.get(row.key) == row.seq:
                    continue
                if row.key in seqs:
                    fresh[row.key] = fresh.get(row.key, 0) + 1
                    if fresh[row.key] == 2:  # noqa: PLR2004  (see above)
                        bound[row.key] = row.at_us
                first.setdefault(row.key, row.seq)
                seqs[row.key] = row.seq
            undecided = {row.key for row in rows if row.key not in bound and row.state == "running"}
            behind = {
                store
                for row in rows
                for store, us in row.oldest_pending_us.items()
                if row.key in bound and us <= bound[row.key]
            }
            now = self._clock.monotonic()
            if (not undecided and (not behind or now >= least)) or now >= end:
                unheard = {row.instance for row in rows if row.key in undecided}
                # Of two under one name, whichever said less lately: a line does not say which of them wrote it.
                self._heard = {row.instance: row.at_us for row in sorted(rows, key=lambda row: -row.at_us)}
                return Settled(
                    asked=tuple(sorted({row.instance for row in rows})),
                    silent=tuple(sorted(unheard | set(silent))),
                    behind=frozenset(behind),
                    knows_all=True,
                )
            await self._clock.sleep(self._poll)
            rows, silent = await self._heartbeats()

    async def fates(self, log_ids: Sequence[str]) -> Mapping[str, Mapping[StoreName, Known]]:
        """See Mirrored."""
        return await self._mirrored.fates(log_ids)

    def _in_motion(self, line: FateLine) -> bool:
        """Whether a record was redriven after the last that its sidecar said of itself, both by that one's clock.

        What was redriven before is part of what it said: settled, or ``behind``.
        """
        heard_us = self._heard.get(line.by)
        return heard_us is not None and line.at_us > heard_us


class Together:
    """Several that are asked: who comes later knows better."""

    def __init__(self, *asked: Whereabouts) -> None:
        self._asked = asked

    async def settle(self, patience: float) -> Settled:
        """One after the other; all that any of them says."""
        said = [await each.settle(patience) for each in self._asked]
        return Settled(
            asked=tuple(sorted({name for s in said for name in s.asked})),
            silent=tuple(sorted({name for s in said for name in s.silent})),
            behind=frozenset(store for s in said for store in s.behind),
            knows_all=any(s.knows_all for s in said),
            warnings=tuple(w for s in said for w in s.warnings),
        )

    async def fates(self, log_ids: Sequence[str]) -> Mapping[str, Mapping[StoreName, Known]]:
        """What the last one that knows something of a record and store says."""
        found: dict[str, dict[StoreName, Known]] = {}
        for each in self._asked:
            for log_id, stores in (await each.fates(log_ids)).items():
                found.setdefault(log_id, {}).update(stores)
        return found

"""What happens when the backlog of a best-effort store fills the spool: it is released, after the ledger knows.

A best-effort store may lag as long as there is room; it never pushes an application back (semantics, section 2). So
between the watermarks of the spool's cap, before the door would close, the oldest backlog that every required store has
confirmed is released, until the spool is below the low watermark. A request that meets a full spool all the same (one
large body is enough) waits for the next release instead of being refused (:meth:`Overflow.make_room`).

ONE RELEASE, and what a crash or a failure at each stage leaves:

1. ``spool.release_candidates``: a plan with its records by UTC hour of log_timestamp, reserved in memory, so that the
   store is not handed them meanwhile. Nothing has changed on disk.
2. The **intent** is made durable in the spool: the absolute counts that the ledger will show after this release, by
   hour, what they were before it, and the store's counter of released records. A crash after it: the next run compares
   that counter with the durable one; equal means that 4 did not happen, and the counts before are the base again.
3. The lines are committed in the gap ledger of a required store, as absolute counts under one source (below). It
   merges by the larger count, so doing it again, by this run or the next, counts nothing twice. A failure: nothing is
   released, the door closes at the high watermark (that is the required store's push-back), and it is tried again.
4. ``spool.release``: the frames are settled and the counter grows, in one commit.

INVARIANT: for each hour the ledger shows at least as many as were released. It shows more only where the process ended
(or the backlog became required) between 3 and 4 and the records went to the store after all; backfill then finds
nothing missing and closes it.

The **source** of a line is ``instance/spool/first``: the spool's random name, because a new volume starts counting at
nothing, and the first frame of a **campaign**. A campaign ends after 2,000 hours with a count, so that the intent stays
small whatever log_timestamps clients send.
"""

import asyncio
import logging
import math
import secrets
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from sidecar import settings
from sidecar.clock import Clock
from sidecar.errors import Busy, StoreError
from sidecar.gaps import GapKind, GapLedger, GapLine, summed
from sidecar.phase import STORES, Policy, StoreName
from sidecar.spool import Counters, ReleasePlan, SpoolState

log = logging.getLogger(__name__)

_POLL: Final = 0.05  # seconds between two looks at the spool
_PLAN_BYTES: Final = 2 * settings.MIB  # released at once
_PATIENCE: Final = 5.0  # seconds that a request waits for one release
_PAUSE: Final = 1.0  # seconds after the ledger could not be written
_CAMPAIGN_HOURS: Final = 2_000
_REFRESH: Final = 300.0  # seconds between two looks at the ledgers; each opens a connection that soon closes again
_AT_MOST: Final = 100  # looks take one part of so many of the time: a ledger of many lines is read less often
_TICK: Final = 1.0  # seconds between two questions whether it is time
_FRESH: Final = 1.0  # seconds after a look in which a gap that is not known is taken not to be there
_HOUR_US: Final = 3_600_000_000


class SpoolPort(Protocol):
    """What this part needs of the spool (``sidecar.spool.Spool``)."""

    def state(self) -> SpoolState:
        """How full it is."""
        ...

    def counters(self, store: str) -> Counters:
        """The durable account."""
        ...

    def meta(self, key: str) -> str | None:
        """A small durable value."""
        ...

    async def set_meta(self, key: str, value: str) -> None:
        """Make it durable."""
        ...

    async def release_candidates(self, store: str, max_bytes: int) -> ReleasePlan | None:
        """The oldest backlog that may go."""
        ...

    def reserve(self, plan: ReleasePlan) -> bool:
        """Keep it from being handed out meanwhile; False where some of it was."""
        ...

    def unreserve(self, plan: ReleasePlan) -> None:
        """Hand out again what was not released."""
        ...

    async def release(self, plan: ReleasePlan) -> int:
        """Let it go; how many records went."""
        ...


class Fleet(Protocol):
    """Which of several sidecars looks at the ledgers for all of them (``sidecar.app.phases.InForce``)."""

    @property
    def looks_every(self) -> float:
        """Seconds between two looks of this one; inf where another one looks."""
        ...

    @property
    def told_gaps(self) -> Mapping[tuple[StoreName, GapKind], int] | None:
        """Open gaps as the one that looks tells; None: this is the one, or none is known."""
        ...


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request that waits for room, and how full the spool was when it began to."""

    made: asyncio.Future[bool]
    used: int


class Intent(msgspec.Struct, frozen=True):
    """The release that was begun last, as the spool keeps it (JSON; fields are only ever added)."""

    source: str
    before: dict[int, int]  # UTC hour -> records released under this source
    after: dict[int, int]
    released: int  # the store's durable counter when this was written

    def base(self, released: int) -> dict[int, int]:
        """The counts that hold, now that the durable counter says ``released``."""
        return self.before if released == self.released else self.after


class Overflow:
    """Watches the spool and releases; ``run`` until cancelled. One per sidecar, used from the event loop."""

    def __init__(
        self,
        spool: SpoolPort,
        *,
        ledgers: Mapping[StoreName, GapLedger],
        policy: Callable[[], Policy],
        delivering: Callable[[StoreName], bool],
        options: settings.Spool,
        instance: str,
        clock: Clock,
        releasable: Callable[[], Container[StoreName]] = lambda: STORES,
        fleet: Fleet | None = None,
    ) -> None:
        """Join the parts.

        ``releasable`` says whose backlog may go at this instant; asked before the ledger is written and again before
        the release. ``policy`` is the phase in force, ``delivering`` whether a store takes records now, ``options``
        give cap and watermarks, ``instance`` is this one's name. ``fleet``: who looks at the ledgers
        for all, and what it tells; None: nobody does, and they are read every five minutes.
        """
        self._spool = spool
        self._ledgers = ledgers
        self._policy = policy
        self._releasable = releasable
        self._fleet = fleet
        self._delivering = delivering
        self._instance = instance
        self._clock = clock
        cap = options.cap_bytes
        self._stop = int(cap * options.low_watermark)
        self._start = int(cap * (options.low_watermark + options.high_watermark) / 2)
        self._plan_bytes = min(_PLAN_BYTES, cap // 16)
        self._asked = asyncio.Event()
        self._waiting: list[_Waiting] = []
        self._paused_until = 0.0
        self._trouble = ""
        self._known: dict[StoreName, Sequence[GapLine]] = {}
        self._looked_at = -math.inf

    # --- releasing -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Release whenever the spool asks for it. Raises SpoolFailed."""
        while True:
            try:
                async with asyncio.timeout(_POLL):
                    await self._asked.wait()
            except TimeoutError:
                pass
            self._asked.clear()
            if self._waiting or (self._pressed and not self._paused):
                await self._relieve()
                self._answer_rest()

    async def make_room(self, busy: Busy) -> bool:
        """Whether an append that met ``busy`` should be tried again: there is more room than before.

        Waits for one release, at most five seconds; also while what could be released is still on its way to the
        required stores. False at once where none of this can help: then it is a required store that takes nothing, or
        the disk, that pushes the application back.
        """
        if busy.reason != "spool_full" or self._paused:
            return False
        waiting = _Waiting(asyncio.get_running_loop().create_future(), self._spool.state().bytes_used)
        self._waiting.append(waiting)
        self._asked.set()
        try:
            async with asyncio.timeout(_PATIENCE):
                return await waiting.made
        except TimeoutError:
            return False

    @property
    def _paused(self) -> bool:
        return self._clock.monotonic() < self._paused_until

    @property
    def _pressed(self) -> bool:
        """Nearly full; or the door is closed, which it stays down to the low watermark, where nobody asks."""
        state = self._spool.state()
        return state.bytes_used >= self._start or state.busy_reason == "spool_full"

    async def _relieve(self) -> None:
        """Release plan after plan until the spool is below the low watermark or nothing may go."""
        try:
            while await self._release_one():
                self._answer(made=True)
                if self._spool.state().bytes_used < self._stop:
                    return
        except StoreError as error:
            self._paused_until = self._clock.monotonic() + _PAUSE
            self._report(f"{error.store}: {error.reason}")

    def _answer(self, *, made: bool) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if not each.made.done():
                each.made.set_result(made)

    def _answer_rest(self) -> None:
        """Nothing may go now. Those whose room came by itself try again; the others wait only where that can help."""
        if self._paused or not self._may_come():
            self._answer(made=False)
            return
        state = self._spool.state()
        self._waiting = [each for each in self._waiting if not each.made.done()]
        for each in self._waiting:
            if state.accepting and state.bytes_used < each.used:
                each.made.set_result(True)

    def _may_come(self) -> bool:
        """A best-effort backlog is there, and every required store is taking what it has to confirm first."""
        required = self._policy().required
        behind = any(self._spool.counters(store).pending for store in STORES if store not in required)
        return behind and all(self._delivering(store) for store in required)

    async def _release_one(self) -> int:
        """One plan of any store; records released. Raises StoreError: the ledger did not take it, nothing went."""
        for store in STORES:
            keeper = min(self._policy().required - {store}, default=None)
            if keeper is None or store not in self._releasable():
                continue
            plan = await self._spool.release_candidates(store, self._plan_bytes)
            if plan is not None and self._spool.reserve(plan):  # else the store has just taken some of it
                try:
                    return await self._release(store, plan, keeper)
                finally:
                    self._spool.unreserve(plan)
        return 0

    async def _release(self, store: StoreName, plan: ReleasePlan, keeper: StoreName) -> int:
        """Stages 2 to 4; ``keeper`` is the required store whose ledger is written."""
        intent = self._intend(store, plan)
        await self._spool.set_meta(_key(store), msgspec.json.encode(intent).decode())
        lines = [
            GapLine(store=store, kind="released", hour=hour, source=intent.source, opened=intent.after[hour])
            for hour in sorted(plan.hours)
        ]
        await self._ledgers[keeper].put_gaps(lines)
        self._report("")
        self._known[keeper] = summed([*self._known.get(keeper, ()), *lines])
        if store not in self._releasable():  # a fleet prepares a step, or this instance lost touch with it
            return 0
        released = await self._spool.release(plan)
        log.warning(
            "backlog released",
            extra={"store": store, "records": released, "bytes": plan.size, "hours": len(plan.hours)},
        )
        return released

    def _intend(self, store: StoreName, plan: ReleasePlan) -> Intent:
        released = self._spool.counters(store).released
        value = self._spool.meta(_key(store))
        last = None if value is None else msgspec.json.decode(value, type=Intent)
        before = {} if last is None else last.base(released)
        if last is not None and len(before) < _CAMPAIGN_HOURS:
            source = last.source
        else:
            name = secrets.token_hex(4) if last is None else last.source.rsplit("/", 2)[1]
            source, before = f"{self._instance}/{name}/{plan.seqs[0]}", {}
        return Intent(source, before, dict(Counter(before) + Counter(plan.hours)), released)

    def _report(self, trouble: str) -> None:
        """One line per change."""
        if trouble and not self._trouble:
            log.error("backlog cannot be released: the gap ledger cannot be written", extra={"reason": trouble})
        elif self._trouble and not trouble:
            log.info("the gap ledger can be written again")
        self._trouble = trouble

    # --- looking ---------------------------------------------------------------------------------------------------

    def open_gaps(self) -> dict[tuple[StoreName, GapKind], int]:
        """(store, kind) -> records of open gaps of the whole fleet, as the ledgers were read last."""
        told = None if self._fleet is None else self._fleet.told_gaps
        if told is not None:
            return dict(told)
        found: Counter[tuple[StoreName, GapKind]] = Counter()
        for line in summed([line for lines in self._known.values() for line in lines]):
            found[line.store, line.kind] += line.open
        return dict(found)

    async def lacks(self, store: StoreName, first_us: int, last_us: int) -> bool:
        """Whether an open gap of ``store`` has an hour between these times of log_timestamp, both inclusive.

        Where none is known and the last look is old the ledgers are read again: another sidecar may have released.
        """
        if self._covered(store, first_us, last_us):
            return True
        if self._clock.monotonic() - self._looked_at < _FRESH:
            return False
        await self._look()
        return self._covered(store, first_us, last_us)

    def _covered(self, store: StoreName, first_us: int, last_us: int) -> bool:
        first, last = first_us // _HOUR_US, last_us // _HOUR_US
        lines = (line for lines in self._known.values() for line in lines if line.store == store)
        return any(line.open and first <= line.hour <= last for line in lines)

    async def _look(self) -> None:
        """Read the ledgers of the phase's stores; what cannot be read keeps its last figures."""
        self._looked_at = self._clock.monotonic()
        for store in sorted(self._policy().owed):
            try:
                self._known[store] = await self._ledgers[store].gaps()
            except StoreError as error:
                log.info("gap ledger not read", extra={"store": store, "reason": error.reason})

    async def watch(self) -> None:
        """Read the ledgers: who looks for all of them at each heartbeat, or less often where that is costly."""
        took = 0.0
        while True:
            every = _REFRESH if self._fleet is None else self._fleet.looks_every
            now = self._clock.monotonic()
            if now - self._looked_at >= min(max(every, took * _AT_MOST), _REFRESH):
                await self._look()
                took = self._clock.monotonic() - now
            await self._clock.sleep(min(_TICK, every))


def _key(store: StoreName) -> str:
    return f"release:{store}"

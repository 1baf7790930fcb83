"""What a store is not owed is in the gap ledger before any other store has it (gap kind ``not_owed``).

In phases 0 and 3 records are owed to one store alone. For each such record the ledger says, by UTC hour of
log_timestamp, that the other store misses it, *before* it is shipped: so whoever finds no open gap and compares the
stores has not overlooked a record that lay in a pod's spool. It is written between spool and shipper:
:class:`Accounted` stands before the spool, hands on what is owed to every store, and lets the rest wait for its line.

ONE LINE is (store that misses, ``not_owed``, hour, source): an absolute count that only grows, merged by the larger, so
writing it again changes nothing. The **source** is ``instance/spool/campaign``: the spool's random name, because a new
volume starts counting at nothing, and the number of a **campaign** that ends after 2,000 hours, so that what is kept
stays small whatever log_timestamps clients send.

STAGES of a take, and what a crash or a failure at each leaves: 1. the counts are made durable in the spool (meta
``not_owed:<store>``); 2. the lines are committed in the ledger of the store that is being shipped to (it has to be
reached anyway), and of the store that decides in this phase, whose ledger the gates ask; 3. the frames are handed to
the shipper. A crash after 1: the counts are too high, never too low. A failure of 2: nothing is shipped, it is tried
again, ``trouble`` says why. After a restart frames that were not settled are counted once more.

WHILE THEY WAIT the shipper is handed nothing, and its pace knows of no trouble: ``waits`` has why and since when, for
who shows the store's state or acts on it.

THE COUNT RUNS AHEAD by a tenth while the phase in force is the one that the records were stamped in, so that a busy
hour costs a hundred lines and not one for each batch; an hour with fewer than ten records is exact. The head start ends
with the phase: a line may be closed once the phase owes the store its records, and what is shipped later must open it
again.

IN A FLEET (``sidecar.fleet``, duty 3) such frames are shipped inside a use of the policy, from before the line to after
they are settled; a fenced instance ships none. Where the use has become invalid meanwhile, somebody may have closed the
line before the record arrived: the records are owed once more, undecided, before the frame is settled.
"""

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from sidecar.clock import Clock
from sidecar.errors import Busy, StoreError
from sidecar.fleet.protocol import AUTHORITY
from sidecar.gaps import GapLedger, GapLine
from sidecar.phase import STORES, TABLE, Phase, Policy, StoreName
from sidecar.record import LogRecord
from sidecar.spool import Cursor, Deferred, Frame, Leftover

log = logging.getLogger(__name__)

_PAUSE: Final = 1.0  # seconds after the ledger could not be written
_FENCED: Final = 0.2  # seconds between two looks at the fence
_CAMPAIGN_HOURS: Final = 2_000
_AHEAD: Final = 10  # the count runs ahead by one in so many
_HOUR_US: Final = 3_600_000_000
_BEHIND_THE_FENCE: Final = "records owed to it alone wait until this instance has joined the fleet"


class Use(Protocol):
    """A hold on the policy in force (``sidecar.fleet.Use``)."""

    @property
    def policy(self) -> Policy | None:
        """None: this instance is fenced."""
        ...

    @property
    def valid(self) -> bool:
        """Whether the policy held all the time since this began."""
        ...


Uses = Callable[[], AbstractContextManager[Use]]
"""Begins a use at each call."""


class SpoolPort(Protocol):
    """What shippers use of the spool, and what is kept in it."""

    def cursor(self, store: str) -> Cursor:
        """The store's way through the frames."""
        ...

    def take_back(self, store: str) -> None:
        """Hand out again what was taken and neither settled nor finished."""
        ...

    def next_due_us(self, store: str) -> int | None:
        """When the next deferred record is due."""
        ...

    async def due(self, store: str, now_us: int, limit: int, max_bytes: int) -> Sequence[Deferred]:
        """Deferred records due."""
        ...

    def awaited(self, store: str) -> asyncio.Event:
        """Set while somebody waits until the store has certain records."""
        ...

    async def finish_deferred(self, item: Deferred, outcome: Leftover | None) -> None:
        """What became of one."""
        ...

    def meta(self, key: str) -> str | None:
        """A small durable value."""
        ...

    async def set_meta(self, key: str, value: str) -> None:
        """Make it durable."""
        ...


class Kept(msgspec.Struct):
    """The counts of one campaign, as the spool keeps them (JSON; fields are only ever added)."""

    name: str
    campaign: int
    opened: dict[int, int]  # UTC hour -> what the ledger says
    instance: str = ""  # that began to count: part of the source, whoever goes on with this spool


@dataclass(frozen=True, slots=True)
class Wait:
    """Why records for a store are not handed to its shipper, and since when (monotonic seconds)."""

    reason: str
    since: float


@dataclass(slots=True)
class _Count:
    """What one store is not given."""

    kept: Kept
    used: Counter[int]
    policy: Policy | None = None  # under which the head start was taken
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class NotOwed:
    """Writes the lines; one per sidecar, used from the event loop."""

    def __init__(
        self,
        spool: SpoolPort,
        *,
        ledgers: Mapping[StoreName, GapLedger],
        uses: Uses,
        undecided: Callable[[Sequence[LogRecord], Policy], Awaitable[object]],
        instance: str,
        clock: Clock,
        deciding: Callable[[Policy], Iterable[StoreName]] = lambda policy: (AUTHORITY[policy.phase],),
    ) -> None:
        """``undecided`` owes records once more (``Obligations.undecided``).

        ``deciding`` are the stores whose ledgers a phase's gates ask, besides the one that is shipped to.
        """
        self.spool = spool
        self.uses = uses
        self.undecided = undecided
        self.clock = clock
        self.trouble: dict[StoreName, str] = {}  # by store that is shipped to: why no line can be written
        self.waits: dict[StoreName, Wait] = {}  # likewise: why its records wait, for a line or behind the fence
        self._ledgers = ledgers
        self._instance = instance
        self._deciding = deciding
        self._counts: dict[StoreName, _Count] = {}

    async def open(self, shipping_to: StoreName, frames: Sequence[Frame], policy: Policy) -> None:
        """Return when the ledger has every record of the frames that some store is not owed. Raises SpoolFailed."""
        for missing, wanted in _missing(frames).items():
            while True:
                try:
                    await self._open(missing, wanted, shipping_to, policy)
                    break
                except StoreError as error:
                    self._report(shipping_to, str(error))
                    self.wait(shipping_to, f"its records wait for a line in the gap ledger: {error}")
                    await self.clock.sleep(_PAUSE)
        self._report(shipping_to, "")
        self.waits.pop(shipping_to, None)

    def wait(self, shipping_to: StoreName, reason: str) -> None:
        """Note why the store's records wait now; since when, where they have waited already, stays."""
        before = self.waits.get(shipping_to)
        self.waits[shipping_to] = Wait(reason, self.clock.monotonic() if before is None else before.since)

    async def republish(self, policy: Policy) -> None:
        """Copy this instance's lines to the ledger that the phase's gates ask. Raises StoreError."""
        for missing in STORES:
            if self.spool.meta(_key(missing)) is None:
                continue
            kept = self._count(missing).kept
            await self._ledgers[AUTHORITY[policy.phase]].put_gaps(self._lines(missing, kept, kept.opened))

    async def _open(self, missing: StoreName, wanted: Counter[int], shipping_to: StoreName, policy: Policy) -> None:
        count = self._count(missing)
        async with count.turn:
            closing = missing in policy.owed  # then somebody may close what is open
            if closing or count.policy is not policy:
                count.used = Counter(count.kept.opened)
                count.policy = policy
            short = [hour for hour, n in wanted.items() if count.used[hour] + n > count.kept.opened.get(hour, 0)]
            if short:
                if len(count.kept.opened) + len(short) > _CAMPAIGN_HOURS:
                    count.kept = Kept(count.kept.name, count.kept.campaign + 1, {}, self._instance)
                    count.used = Counter()
                    short = list(wanted)
                opened = dict(count.kept.opened)
                for hour in short:
                    needed = count.used[hour] + wanted[hour]
                    opened[hour] = needed if closing else needed + needed // _AHEAD
                kept = Kept(count.kept.name, count.kept.campaign, opened, count.kept.instance)
                await self.spool.set_meta(_key(missing), msgspec.json.encode(kept).decode())
                for keeper in sorted({shipping_to, *self._deciding(policy)}):
                    await self._ledgers[keeper].put_gaps(self._lines(missing, kept, short))
                count.kept = kept
            count.used += wanted

    def _lines(self, missing: StoreName, kept: Kept, hours: Sequence[int] | dict[int, int]) -> list[GapLine]:
        source = f"{kept.instance}/{kept.name}/{kept.campaign}"
        return [
            GapLine(store=missing, kind="not_owed", hour=hour, source=source, opened=kept.opened[hour])
            for hour in sorted(hours)
        ]

    def _count(self, missing: StoreName) -> _Count:
        count = self._counts.get(missing)
        if count is None:
            value = self.spool.meta(_key(missing))
            kept = (
                Kept(secrets.token_hex(4), 0, {}, self._instance)
                if value is None
                else msgspec.json.decode(value, type=Kept)
            )
            count = self._counts[missing] = _Count(kept, Counter(kept.opened))
        return count

    def _report(self, store: StoreName, trouble: str) -> None:
        """One line per change."""
        before = self.trouble.pop(store, "")
        if trouble:
            self.trouble[store] = trouble
        if trouble and not before:
            log.error("records wait: the gap ledger cannot be written", extra={"store": store, "reason": trouble})
        elif before and not trouble:
            log.info("the gap ledger can be written again", extra={"store": store})


class Accounted:
    """The spool as shippers see it: a frame that some store is not owed comes when its line is written."""

    def __init__(self, not_owed: NotOwed) -> None:
        self._not_owed = not_owed
        self._spool = not_owed.spool
        self._cursors: dict[str, _Cursor] = {}
        self.next_due_us = self._spool.next_due_us
        self.due = self._spool.due
        self.finish_deferred = self._spool.finish_deferred
        self.awaited = self._spool.awaited

    def cursor(self, store: str) -> Cursor:
        """See SpoolPort."""
        found = self._cursors.get(store)
        if found is None:
            name = next(each for each in STORES if each == store)
            found = self._cursors[store] = _Cursor(self._spool.cursor(store), name, self._not_owed)
        return found

    def take_back(self, store: str) -> None:
        """See SpoolPort."""
        if store in self._cursors:
            self._cursors[store].forget()
        self._spool.take_back(store)


class _Held:
    """A use that ends with the last of its frames."""

    __slots__ = ("_manager", "left", "policy", "use")

    def __init__(self, manager: AbstractContextManager[Use], left: int) -> None:
        self._manager = manager
        self.use = manager.__enter__()
        self.policy = self.use.policy
        self.left = left

    def release(self, n: int = 1) -> None:
        self.left -= n
        if not self.left:
            self._manager.__exit__(None, None, None)


class _Cursor:
    """See Accounted."""

    def __init__(self, inner: Cursor, store: StoreName, not_owed: NotOwed) -> None:
        self._inner = inner
        self._store = store
        self._not_owed = not_owed
        self._held: dict[int, _Held] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def take(self, max_records: int, max_bytes: int) -> Sequence[Frame]:
        """See ``spool.Cursor``."""
        frames = await self._inner.take(max_records, max_bytes)
        partial = [frame for frame in frames if _not_owed(frame)]
        if partial:
            await self._account(partial)
        return frames

    async def _account(self, frames: Sequence[Frame]) -> None:
        while True:
            held = _Held(self._not_owed.uses(), len(frames))
            try:
                if held.policy is not None:
                    await self._not_owed.open(self._store, frames, held.policy)
                    if held.use.valid:
                        self._held.update((frame.seq, held) for frame in frames)
                        return
            except BaseException:
                held.release(held.left)
                raise
            held.release(held.left)
            self._not_owed.wait(self._store, _BEHIND_THE_FENCE)
            await self._not_owed.clock.sleep(_FENCED)

    def settle(self, frame: Frame, leftovers: Sequence[Leftover] = ()) -> None:
        """See ``spool.Cursor``."""
        held = self._held.pop(frame.seq, None)
        if held is None:
            self._inner.settle(frame, leftovers)
        elif held.use.valid:
            self._inner.settle(frame, leftovers)
            held.release()
        else:
            task = asyncio.get_running_loop().create_task(self._anew(frame, leftovers, held))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _anew(self, frame: Frame, leftovers: Sequence[Leftover], held: _Held) -> None:
        """Owe the records once more, then settle; not settled, they are handed out again after a restart."""
        try:
            policy = held.policy or TABLE[Phase(frame.phase)]
            while True:
                try:
                    await self._not_owed.undecided(frame.records, policy)
                    break
                except Busy:
                    await self._not_owed.clock.sleep(_PAUSE)
            self._inner.settle(frame, leftovers)
        finally:
            held.release()

    def forget(self) -> None:
        """The consumer is gone, whatever it held."""
        for task in self._tasks:
            task.cancel()
        for held in self._held.values():
            held.release()
        self._held.clear()


def _not_owed(frame: Frame) -> Sequence[StoreName]:
    """Stores that the records of a frame are not owed to, here or in a copy."""
    owed = TABLE[Phase(frame.phase)].owed
    return [store for store in STORES if store not in owed]


def _missing(frames: Sequence[Frame]) -> dict[StoreName, Counter[int]]:
    """Records by store that misses them and by UTC hour."""
    found: dict[StoreName, Counter[int]] = {}
    for frame in frames:
        hours = _by_hour([record.log_timestamp for record in frame.records])
        for store in _not_owed(frame):
            found.setdefault(store, Counter()).update(hours)
    return found


def _by_hour(times: Sequence[int]) -> Counter[int]:
    """Most frames lie within one hour: then nothing is counted record by record."""
    if not times:
        return Counter()
    first, last = min(times) // _HOUR_US, max(times) // _HOUR_US
    return Counter({first: len(times)}) if first == last else Counter(time // _HOUR_US for time in times)


def _key(store: StoreName) -> str:
    return f"not_owed:{store}"

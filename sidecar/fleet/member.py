"""One instance's place in the fleet: it announces itself, applies the record, and fences itself when it must.

STATES. *Fenced*: what it accepts is stamped ``unresolved``, reads are refused with ``phase_unknown``. *Unfenced*: it
works under the record that it has applied. It is unfenced until ``fence_after`` after the *start* of its last heartbeat
that a store of its phase took. The deadline is looked at whenever somebody asks, never kept by a timer: a process that
was stopped finds itself fenced at its first look. A lapse is final until it has joined anew: announce, read, apply.

WHAT IS UNDER WAY. A request works inside ``use()``. The heartbeat claims an epoch only when every request that began
under an earlier one has ended and ``on_applied`` has returned, so that the fleet never runs two epochs ahead of a
request. A request that was stopped for longer than the fence finds its ``Use`` no longer valid: what it stamped must be
made ``unresolved`` before it is acknowledged, and what it read must not be answered.

FAILURE. A store that fails costs its round only; rounds of the two stores are independent, so that one that hangs does
not hold up the other. A crash forgets everything: the next incarnation joins anew.
"""

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Self

from sidecar.clock import Clock
from sidecar.errors import Busy, SidecarError, SpoolFailed, StoreError
from sidecar.fleet import protocol
from sidecar.fleet_tables import NO_EPOCH, FleetRecord, FleetStore, Heartbeat, Hold
from sidecar.gaps import GapKind
from sidecar.phase import Phase, Policy, StoreName

SOON: Final = 1.0  # seconds until the next round while a change is being applied
REJOIN: Final = 0.25  # of the interval, between two tries to join
RETRY_AFTER: Final = 5  # seconds, for a reader that met the fence


@dataclass(frozen=True, slots=True)
class Wish:
    """What an instance's configuration asks for."""

    phase: Phase
    phase_epoch: int | None = None
    force: str | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """What an instance reports of its spool; per store."""

    pending: dict[StoreName, int] = field(default_factory=dict)
    oldest_pending_us: dict[StoreName, int] = field(default_factory=dict)  # wall clock at accept
    dead_letters: dict[StoreName, int] = field(default_factory=dict)
    open_gaps: dict[StoreName, int] = field(default_factory=dict)
    shadow: dict[str, int] = field(default_factory=dict)  # reads compared, and unexplained, since the start
    gaps: tuple[tuple[StoreName, GapKind, int], ...] = ()  # from who leads: of the whole fleet


@dataclass(frozen=True, slots=True)
class Identity:
    """Which process this is. ``incarnation`` is drawn at start, so that no two processes ever share both."""

    instance: str
    incarnation: str
    version: str = ""
    spool: str = ""  # the name that its spool keeps


class Use:
    """One request's hold on the policy that it began with; a context manager, entered at once."""

    __slots__ = ("_member", "epoch", "lapses", "policy")

    def __init__(self, member: "FleetMember", policy: Policy | None, epoch: int, lapses: int) -> None:
        self.policy = policy  # None: fenced; stamp ``unresolved``
        self.epoch = epoch
        self.lapses = lapses  # of the member, when this began
        self._member = member

    def __enter__(self) -> Self:
        self._member.begin(self)
        return self

    def __exit__(self, *_exception: object) -> None:
        self._member.end(self)

    @property
    def valid(self) -> bool:
        """True if the instance was unfenced all the time since this began, or this began fenced anyway.

        Look after the commit and before the acknowledgement. If False, the records that were stamped with ``policy``
        must be made ``unresolved`` first.
        """
        return self.policy is None or (not self._member.fenced and self.lapses == self._member.lapses)

    def confirm(self) -> Policy:
        """For reads: the policy, if the answer may be given now.

        Raises:
            Busy: ``phase_unknown``; the instance is fenced, or was while this went on.
        """
        if self.policy is None or not self.valid:
            raise Busy(
                "phase_unknown",
                "this instance has lost touch with the fleet and cannot tell which store to read from",
                RETRY_AFTER,
            )
        return self.policy


async def _nothing(_record: FleetRecord) -> None:
    """For an instance that has nothing to do when a record is applied."""


class FleetMember:
    """See the module's docstring. Used from one event loop."""

    def __init__(
        self,
        identity: Identity,
        stores: Mapping[StoreName, FleetStore],
        clock: Clock,
        *,
        wish: Callable[[], Wish],
        load: Callable[[], Load] = Load,
        on_applied: Callable[[FleetRecord], Awaitable[None]] = _nothing,
        holds: Callable[[], tuple[Hold, ...] | None] = lambda: None,
        interval_s: float = 10.0,
        fence_after_s: float = 120.0,
        rng: random.Random | None = None,
    ) -> None:
        """``on_applied`` is called with the record in force after each change of epoch and each end of a fence.

        It makes good what the record demands of the spool (strengthen, resolve), is idempotent, and may raise Busy or
        StoreError: then it is called again, and the epoch is not claimed before it returned. ``holds``: what stops the
        fleet, from an instance that leads; None from any other.
        """
        self.identity = identity
        self.applied: FleetRecord | None = None
        self.lapses = 0
        self.trouble: dict[StoreName, str] = {}  # why the last round with a store failed; empty when all is well
        self._stores = stores
        self._clock = clock
        self._wish = wish
        self._load = load
        self._on_applied = on_applied
        self._holds = holds
        self._interval = interval_s
        self._fence_after = fence_after_s
        self._rng = rng or random.Random()  # noqa: S311  (spreads rounds over time; no secret)
        self._until = -math.inf
        self._joined = False
        self._left = False
        self._claimed = NO_EPOCH
        self._due = False  # on_applied has to be called
        self._busy = False  # on_applied is being called
        self._seq = 0
        self._uses: dict[tuple[int, int], int] = {}  # by (epoch, lapses) at the beginning
        self._published: dict[StoreName, int] = {}  # the epoch that the last heartbeat there claimed

    @property
    def fenced(self) -> bool:
        """True while this instance may neither stamp records with a phase nor answer reads. Looking makes it final."""
        if self._joined and self._clock.monotonic() >= self._until:
            self._joined = False
            self.lapses += 1
        return not self._joined

    @property
    def claimed(self) -> int:
        """The highest epoch that this process has wholly applied (0: none)."""
        return self._claimed

    @property
    def policy(self) -> Policy | None:
        """What to do now; None while fenced."""
        return None if self.fenced or self.applied is None else protocol.policy_of(self.applied)

    @property
    def releasable(self) -> frozenset[StoreName]:
        """Stores whose backlog may be released now: none while fenced, none that is being prepared."""
        return frozenset() if self.fenced or self.applied is None else protocol.releasable(self.applied)

    def use(self) -> Use:
        """Hold the policy in force: from the stamp to the commit, from the question to the answer."""
        policy = self.policy
        return Use(
            self, policy, NO_EPOCH if policy is None or self.applied is None else self.applied.epoch, self.lapses
        )

    def begin(self, use: Use) -> None:
        """Count a use; called by the use itself."""
        key = use.epoch, use.lapses
        self._uses[key] = self._uses.get(key, 0) + 1

    def end(self, use: Use) -> None:
        """Count it out; called by the use itself."""
        key = use.epoch, use.lapses
        left = self._uses[key] - 1
        if left:
            self._uses[key] = left
        else:
            del self._uses[key]
        if not use.valid:
            self._due = True  # it may have left unresolved records behind

    async def round(self, store: StoreName) -> None:
        """One exchange with one store: heartbeat, then record. Never raises StoreError; see ``trouble``.

        Raises:
            SpoolFailed: from ``on_applied``; the process must stop.
        """
        if self._left or not (self.fenced or self._writes(store)):
            return
        started = self._clock.monotonic()
        try:
            row = self.heartbeat()
            await self._stores[store].put_heartbeat(row)
            self._published[store] = row.epoch
            if not self.fenced:
                self._until = max(self._until, started + self._fence_after)
            seen = await self._stores[store].read_record()
        except StoreError as error:
            self.trouble[store] = str(error)
            return
        self.trouble.pop(store, None)
        self._apply(seen)
        if self.fenced and self._writes(store) and not self._left:
            self._join(started)
        await self.settle_in()

    async def settle_in(self) -> None:
        """Finish applying: call ``on_applied`` and claim the epoch, as soon as nothing older is under way."""
        record = self.applied
        if self._busy or not self._due or record is None or self.fenced:
            return
        if any(epoch < record.epoch for epoch, _ in self._uses):
            return
        self._busy, self._due = True, False
        try:
            with self.use() as use:
                await self._on_applied(record)
                if use.valid:
                    self._claimed = max(self._claimed, record.epoch)
        except SpoolFailed:
            raise
        except SidecarError as error:  # no room, or a store is down: again at the next round
            self._due = True
            self.trouble.setdefault(protocol.AUTHORITY[record.phase], str(error))
        finally:
            self._busy = False

    async def run(self) -> None:
        """Exchange with all stores, each at its own pace, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for store in self._stores:
                group.create_task(self._rounds(store))

    async def leave(self) -> None:
        """Say that this process stopped for good. Call it when nothing is accepted and nothing is read any more."""
        self._left, self._joined = True, False
        row = self.heartbeat()
        for store in self._stores.values():
            try:
                await store.put_heartbeat(row)
            except StoreError as error:  # then observers find it gone, later
                self.trouble[store.name] = str(error)

    def heartbeat(self) -> Heartbeat:
        """What this process says of itself now."""
        self._seq += 1
        wish, load = self._wish(), self._load()
        return Heartbeat(
            instance=self.identity.instance,
            incarnation=self.identity.incarnation,
            spool=self.identity.spool,
            seq=self._seq,
            state="drained" if self._left else "running",
            epoch=self._claimed,
            phase=None if self.applied is None else self.applied.phase,
            fenced=self.fenced,
            fence_after_s=self._fence_after,
            interval_s=self._interval,
            version=self.identity.version,
            desired=wish.phase,
            phase_epoch=wish.phase_epoch,
            force=wish.force,
            pending=load.pending,
            oldest_pending_us=load.oldest_pending_us,
            dead_letters=load.dead_letters,
            open_gaps=load.open_gaps,
            shadow=load.shadow,
            holds=None if self._left else self._holds(),
            gaps=load.gaps,
            at_us=self._clock.now_us(),
        )

    def _writes(self, store: StoreName) -> bool:
        return self.applied is not None and store in protocol.policy_of(self.applied).owed

    def _apply(self, seen: FleetRecord | None) -> None:
        record = protocol.adopt(self.applied, (seen,))
        if record is None:
            return
        if self.applied is None or record.epoch != self.applied.epoch:
            self._due = True
        self.applied = record

    def _join(self, started: float) -> None:
        if self._clock.monotonic() < started + self._fence_after:
            self._until = started + self._fence_after
            self._joined = self._due = True

    async def _rounds(self, store: StoreName) -> None:
        while True:
            await self.round(store)
            if store not in self.trouble and self._published.get(store, self._claimed) < self._claimed:
                await self.round(store)  # the others wait for this claim
            pause = min(SOON, self._interval) if self._due else self._interval * (REJOIN if self.fenced else 1)
            await self._clock.sleep(pause * self._rng.uniform(0.9, 1.0))

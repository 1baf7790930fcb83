"""One simulated sidecar: the product's member and controller, and a small spool that survives the process.

The spool here is the protocol's client: it shows what a caller has to do with ``FleetMember.use`` and ``on_applied``.

* It stamps at the commit, inside a use, and takes the stamp back before the acknowledgement if the use is not valid.
* It ships inside a use, puts the gap line of a store that is not owed into the ledger first, and settles what it has
  shipped only if the use is still valid.
* ``on_applied`` gives pending frames the stores of the phase in force as well, and resolves unresolved ones.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sidecar.errors import Busy, RetryClass, StoreError
from sidecar.fleet import Controller, FleetMember, FleetRecord, GapLine, Identity, Load, Use, Wish, protocol
from sidecar.migration import GateResult
from sidecar.phase import DYNAMODB, POSTGRES, STORES, Phase, StoreName
from tests.fleet.virtual import Link, Machine

if TYPE_CHECKING:
    from tests.fleet.simulation import World

INTERVAL, FENCE = 10.0, 40.0  # seconds


class UnsafeError(AssertionError):
    """An invariant does not hold; says which, when, and what happened before."""


@dataclass
class Frame:
    """One record in a spool."""

    record: int
    hour: int
    owed: set[StoreName] | None  # None: unresolved
    best_effort: set[StoreName] = field(default_factory=set)
    delivered: set[StoreName] = field(default_factory=set)
    released: set[StoreName] = field(default_factory=set)
    acknowledged: bool = False

    @property
    def pending(self) -> set[StoreName]:
        return set() if self.owed is None else self.owed - self.delivered - self.released


class NoOpenGap:
    """The real rule on the simulated ledger: every line of both stores' ledgers is closed."""

    def __init__(self, store: StoreName, step: tuple[Phase, Phase], links: dict[StoreName, Link]) -> None:
        self.name = "no_open_gap"
        self.steps = frozenset({step})
        self._store = store
        self._links = links

    async def evaluate(self) -> GateResult:
        lines = [line for link in self._links.values() for line in await link.gaps()]
        missing = sum(line.open for line in lines if line.store == self._store)
        return GateResult(self.name, missing == 0, f"{missing} records missing in {self._store}", "none")


class Sidecar:
    """A machine with a spool that survives, and processes that do not."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        self.machine = Machine(world.loop, world.rng)
        self.links = {s: Link(world.fleet[s], name, self.machine, world.network) for s in STORES}
        self.frames: list[Frame] = []
        self.opened: Counter[tuple[StoreName, str, int]] = Counter()
        self.config = Wish(world.first)
        self.member: FleetMember | None = None
        self.controller: Controller | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._incarnation = 0

    # -- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._incarnation += 1
        member = FleetMember(
            Identity(self.name, str(self._incarnation)),
            self.links,
            self.machine,
            wish=lambda: self.config,
            load=self._load,
            on_applied=lambda record: self._on_applied(member, record),
            interval_s=INTERVAL,
            fence_after_s=FENCE,
            rng=self.world.rng,
        )
        controller = Controller(
            member,
            self.links,
            self.machine,
            wish=lambda: self.config,
            gates=(
                NoOpenGap(DYNAMODB, (Phase.DUAL_WRITE, Phase.DUAL_WRITE_READ_DYNAMO), self.links),
                NoOpenGap(POSTGRES, (Phase.DUAL_WRITE_READ_DYNAMO, Phase.DUAL_WRITE), self.links),
            ),
            new_id=lambda: f"{self.name}-{self._incarnation}-{self.world.number()}",
        )
        self.member, self.controller = member, controller
        parts: tuple[Callable[[], Coroutine[None, None, None]], ...] = (
            member.run,
            lambda: controller.run(INTERVAL),
            lambda: self._accept(member),
            lambda: self._ship(member),
            lambda: self._read(member),
        )
        self._tasks = [self.world.loop.create_task(self.world.guarded(part)) for part in parts]

    async def kill(self) -> None:
        tasks, self._tasks, self.member, self.controller = self._tasks, [], None, None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _load(self) -> Load:
        return Load(pending={s: sum(s in f.pending for f in self.frames) for s in STORES})

    # -- what a sidecar does ----------------------------------------------------------------------------------------

    async def _on_applied(self, member: FleetMember, record: FleetRecord) -> None:
        policy = protocol.policy_of(record)
        with member.use() as use:
            changed = [(f, f.owed) for f in self.frames if f.owed is None or f.pending]
            for frame, _ in changed:
                frame.owed = (frame.owed or set()) | set(policy.owed)
                frame.best_effort -= policy.required
            await self.machine.sleep(self.world.rng.uniform(0, 0.1))
            if not use.valid:
                for frame, before in changed:
                    if before is None and not frame.delivered:
                        frame.owed = None

    async def _accept(self, member: FleetMember) -> None:
        rng = self.world.rng
        while True:
            await self.machine.sleep(rng.uniform(0.5, 12.0))
            with member.use() as use:
                policy = use.policy
                await self.machine.sleep(rng.uniform(0, 30.0 if rng.random() < 0.1 else 0.05))  # some clients are slow
                owed = None if policy is None else set(policy.owed)
                frame = Frame(self.world.number(), int(self.world.loop.now // 300), owed)
                if policy is not None:
                    frame.best_effort = set(policy.owed - policy.required)
                self.frames.append(frame)
                await self.machine.sleep(rng.uniform(0, 0.05))
                if not use.valid:
                    frame.owed = None
                if frame.owed is not None:
                    self.world.works(self, "stamps")
                frame.acknowledged = True
                self.world.acknowledged.append(frame)

    async def _ship(self, member: FleetMember) -> None:
        rng = self.world.rng
        while True:
            await self.machine.sleep(rng.uniform(0.5, 6.0))
            self.frames = [f for f in self.frames if f.owed is None or f.pending or not f.acknowledged]
            if member.fenced or member.claimed == 0:
                continue
            for frame in [f for f in self.frames if f.pending]:
                if member.fenced:
                    break
                with member.use() as use:
                    for store in sorted(frame.pending, key=STORES.index):
                        try:
                            await self._deliver(frame, store, use.valid)
                        except StoreError:
                            continue
                        if use.valid:
                            frame.delivered.add(store)
                    if DYNAMODB in member.releasable and DYNAMODB in frame.best_effort and use.valid:
                        await self._release(member, frame, use)
                if rng.random() < 0.3:
                    break

    async def _deliver(self, frame: Frame, store: StoreName, valid: bool) -> None:
        if not valid:
            raise StoreError(store, RetryClass.TRANSIENT, "fenced")
        assert frame.owed is not None
        for other in STORES:
            if other not in frame.owed:
                await self._open(other, "not_owed", frame.hour, ledger=store)
        data = self.world.data[store]

        async def put() -> None:
            data[frame.record] = frame.hour

        await self.world.network.call(self.name, self.machine, store, put)

    async def _release(self, member: FleetMember, frame: Frame, use: Use) -> None:
        backlog = sum(DYNAMODB in f.pending for f in self.frames)
        if backlog < 4 or frame.pending != {DYNAMODB}:
            return
        try:
            await self._open(DYNAMODB, "released", frame.hour, ledger=POSTGRES)
        except StoreError:
            return
        if use.valid and DYNAMODB in member.releasable and DYNAMODB in frame.best_effort:
            frame.released.add(DYNAMODB)
            self.world.seen["released"] += 1

    async def _open(self, store: StoreName, kind: str, hour: int, *, ledger: StoreName) -> None:
        self.opened[store, kind, hour] += 1
        line = GapLine(store=store, kind=kind, hour=hour, source=self.name, opened=self.opened[store, kind, hour])
        await self.links[ledger].put_gaps([line])

    async def _read(self, member: FleetMember) -> None:
        rng = self.world.rng
        while True:
            await self.machine.sleep(rng.uniform(1.0, 12.0))
            try:
                with member.use() as use:
                    store = use.confirm().reads_from
                    expected = self.world.must_be_found(store)
                    data = self.world.data[store]

                    async def get(data: dict[int, int] = data) -> set[int]:
                        return set(data)

                    found = await self.world.network.call(self.name, self.machine, store, get)
                    use.confirm()
            except (Busy, StoreError):
                self.world.seen["reads refused"] += 1
                continue
            self.world.works(self, "reads")
            self.world.seen["reads answered"] += 1
            if missed := expected - found:
                raise UnsafeError(
                    f"{self.name} reads {store}: {sorted(missed)[:5]} were delivered before and are not there"
                )

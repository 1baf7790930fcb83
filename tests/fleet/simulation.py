"""K sidecars with the product's own member and controller, a small spool, two stores, and everything that goes wrong.

One seed is one history: configuration changes that arrive in any order, crashes and restarts, stores down, links cut,
machines stopped for longer than the fence, wall clocks set, requests that land after their sender gave up. The oracle
knows everything and is asked after every step of the event loop; it stops the run with ``UnsafeError``.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine

from sidecar.fleet import FleetRecord, GapLine, MemoryFleetStore, Wish, protocol
from sidecar.phase import DYNAMODB, POSTGRES, STORES, Phase, StoreName
from tests.fleet.simulated import FENCE, Frame, Sidecar, UnsafeError
from tests.fleet.virtual import Network, TrueClock, VirtualLoop

HISTORY = 5  # records in PostgreSQL before the sidecars came


class World:
    """Everything, and the oracle."""

    def __init__(self, loop: VirtualLoop, seed: int, sidecars: int = 3, *, fences: bool = True) -> None:
        self.loop = loop
        self.rng = random.Random(seed)
        self.first = self.rng.choice(list(Phase))
        self.numbered = self.rng.random() < 0.5  # configurations carry phase_epoch
        self.network = Network(self.rng)
        self.fleet = {s: MemoryFleetStore(s, TrueClock(loop)) for s in STORES}
        self.data: dict[StoreName, dict[int, int]] = {s: {} for s in STORES}
        self.acknowledged: list[Frame] = []
        self.seen: Counter[str] = Counter()
        self.log: list[str] = []
        self.failure: BaseException | None = None
        self.healed = False
        self.fences = fences
        self._numbers = 0
        self._epochs: dict[int, FleetRecord] = {}
        self._copies: tuple[FleetRecord | None, FleetRecord | None] = (None, None)
        self.sidecars = [Sidecar(self, f"pod-{n}") for n in range(sidecars)]
        self._config_epoch = 0

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    def say(self, text: str) -> None:
        self.log.append(f"{self.loop.now:8.1f} {text}")

    async def guarded(self, part: Callable[[], Coroutine[None, None, None]]) -> None:
        """A failure in any task ends the run."""
        try:
            await part()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.failure = self.failure or error

    # -- the oracle -------------------------------------------------------------------------------------------------

    def unfenced(self, sidecar: Sidecar) -> bool:
        """Computed without asking the member, so that looking changes nothing."""
        member = sidecar.member
        return (
            member is not None and member._joined and (sidecar.machine.monotonic() < member._until or not self.fences)
        )

    def works(self, sidecar: Sidecar, what: str) -> None:
        if not self.unfenced(sidecar):
            raise UnsafeError(f"{sidecar.name} is fenced and {what}")

    def must_be_found(self, store: StoreName) -> set[int]:
        """What an earlier phase acknowledged and delivered, and no open line of the ledger says is missing here."""
        missing = {
            line.hour for s in STORES for line in self.fleet[s]._gaps.values() if line.open and line.store == store
        }
        found = {
            f.record
            for f in self.acknowledged
            if f.owed is not None and not f.pending and (store in f.delivered or f.hour not in missing)
        }
        return found if -1 in missing else found | set(range(-HISTORY, 0))

    def check(self) -> None:
        """S1, S2, S3, S5 on everything that works now."""
        here, there = (self.fleet[s]._record for s in STORES)
        if (here, there) != self._copies:
            self._copies = (here, there)
            for record in self._copies:
                if record is None:
                    continue
                known = self._epochs.setdefault(record.epoch, record)
                if (known.phase, known.preparing) != (record.phase, record.preparing):
                    raise UnsafeError(
                        f"two records of epoch {record.epoch}: {known.phase.label} and {record.phase.label}"
                    )
            if here and there and abs(here.epoch - there.epoch) > 1:
                raise UnsafeError(f"the copies are at epochs {here.epoch} and {there.epoch}")
        working: set[int] = set()
        for sidecar in self.sidecars:
            member = sidecar.member
            if member is not None and self.unfenced(sidecar):
                working.add(member.applied.epoch)
                working.update(e for e, lapses in member._uses if lapses == member.lapses)
        working.discard(0)
        if len(working) > 1:
            self.seen["two epochs at work"] += 1
            for a in working:
                for b in working:
                    if a < b and not self._together(self._epochs[a], self._epochs[b]):
                        early, late = self._epochs[a].phase.label, self._epochs[b].phase.label
                        raise UnsafeError(f"epoch {a} ({early}) and epoch {b} ({late}) at work together")

    @staticmethod
    def _together(early: FleetRecord, late: FleetRecord) -> bool:
        a, b = protocol.policy_of(early), protocol.policy_of(late)
        released = late.phase > early.phase and b.reads_from in protocol.releasable(early)
        return late.epoch - early.epoch == 1 and protocol.compatible(a, b) and not released

    def step(self) -> None:
        """After every step of the loop."""
        if self.failure is None:
            try:
                self.check()
            except UnsafeError as error:
                self.failure = error

    # -- what happens to them ---------------------------------------------------------------------------------------

    def wish(self, phase: Phase) -> None:
        """A new configuration, that reaches each machine some seconds later."""
        self._config_epoch += 1
        wish = Wish(phase, self._config_epoch if self.numbered else None)
        self.say(f"configuration: {wish.phase.label} {wish.phase_epoch}")
        for sidecar in self.sidecars:
            self.loop.call_later(self.rng.uniform(0, 90), self._deliver_config, sidecar, wish)

    def _deliver_config(self, sidecar: Sidecar, wish: Wish) -> None:
        if not self.healed:
            sidecar.config = wish  # may overtake a newer one: an old ReplicaSet's ConfigMap does

    async def chaos(self, seconds: float) -> None:
        """Something happens every few seconds."""
        end = self.loop.now + seconds
        while self.loop.now < end and self.failure is None:
            await asyncio.sleep(self.rng.uniform(2, 40))
            sidecar = self.rng.choice(self.sidecars)
            store = self.rng.choice(STORES)
            match self.rng.choices(
                ("wish", "crash", "cut", "down", "freeze", "clock", "calm"), weights=(6, 2, 4, 1, 4, 1, 2)
            )[0]:
                case "wish":
                    self.wish(self.rng.choice(list(Phase)))
                case "crash" if sidecar.member is not None:
                    self.say(f"{sidecar.name} crashes")
                    sidecar.machine.thaw()
                    await sidecar.kill()
                    self.loop.call_later(self.rng.uniform(1, 120), self._restart, sidecar)
                case "cut":
                    self.say(f"{sidecar.name} loses {store}")
                    self.network.cut.add((sidecar.name, store))
                    self.loop.call_later(self.rng.uniform(5, 200), self.network.cut.discard, (sidecar.name, store))
                case "down":
                    self.say(f"{store} down")
                    self.network.down.add(store)
                    self.loop.call_later(self.rng.uniform(5, 120), self.network.down.discard, store)
                case "freeze":
                    seconds_frozen = self.rng.choice((3.0, 30.0, FENCE * 1.1, FENCE * 2, FENCE * 5))
                    self.say(f"{sidecar.name} stopped for {seconds_frozen:.0f} s")
                    sidecar.machine.freeze()
                    self.loop.call_later(seconds_frozen, sidecar.machine.thaw)
                case "clock":
                    sidecar.machine.wall_offset_us += self.rng.choice((-172_800, 315_360_000, 3600)) * 1_000_000

    def _restart(self, sidecar: Sidecar) -> None:
        if sidecar.member is None:
            sidecar.start()

    async def backfill(self) -> None:
        """Copies the hours of open gaps; closes what it saw only if the epoch was settled and is the same after."""
        while True:
            await asyncio.sleep(15)
            if self.network.down:
                continue
            copies = {s: await self.fleet[s].read_record() for s in STORES}
            record = protocol.authoritative(copies)
            if record is None or not record.settled or protocol.policy_of(record).owed != set(STORES):
                continue
            lines = [(s, line) for s in STORES for line in await self.fleet[s].gaps()]
            await asyncio.sleep(self.rng.uniform(0, 5))
            for _, line in lines:
                source = self.data[protocol.OTHER[line.store]]
                self.data[line.store].update({r: h for r, h in source.items() if h == line.hour})
            now = protocol.authoritative({s: await self.fleet[s].read_record() for s in STORES})
            if now is None or now.epoch != record.epoch:
                continue
            for ledger, line in lines:
                closed = GapLine(
                    store=line.store,
                    kind=line.kind,
                    hour=line.hour,
                    source=line.source,
                    opened=line.opened,
                    closed=line.opened,
                )
                await self.fleet[ledger].put_gaps([closed])
                self.seen["gaps closed"] += 1

    async def heal(self) -> None:
        """All is well again; the fleet is asked for phase 2, where both stores must hold everything."""
        self.say("healed")
        self.healed = True
        self.network.down.clear()
        self.network.cut.clear()
        self.network.lossy = False
        for sidecar in self.sidecars:
            sidecar.machine.thaw()
            self._restart(sidecar)
        self._config_epoch += 1
        for sidecar in self.sidecars:
            sidecar.config = Wish(Phase.DUAL_WRITE_READ_DYNAMO, self._config_epoch if self.numbered else None)

    def quiet(self) -> str | None:
        """What is still missing after the healing; None when all is as it must be."""
        for sidecar in self.sidecars:
            member = sidecar.member
            if member is None or member.applied is None or member.fenced:
                return f"{sidecar.name} is fenced"
            if member.applied.phase is not Phase.DUAL_WRITE_READ_DYNAMO:
                return f"{sidecar.name} is in {member.applied.phase.label}"
            if any(f.owed is None or f.pending for f in sidecar.frames):
                return f"{sidecar.name} has frames that are pending or unresolved"
        if any(line.open for s in STORES for line in self.fleet[s]._gaps.values()):
            return "a gap is open"
        return None

    async def run(self, chaos_s: float) -> None:
        """One history. Raises UnsafeError."""
        history = {-n: -1 for n in range(1, HISTORY + 1)}
        self.data[POSTGRES].update(history)
        self.data[DYNAMODB].update(history if self.first >= Phase.DUAL_WRITE_READ_DYNAMO else {})
        if self.first < Phase.DUAL_WRITE_READ_DYNAMO:
            await self.fleet[POSTGRES].put_gaps(
                [GapLine(store=DYNAMODB, kind="history", hour=-1, source="fleet", opened=HISTORY)]
            )
        self.say(f"born in {self.first.label}, {'with' if self.numbered else 'without'} phase_epoch")
        for sidecar in self.sidecars:
            self.loop.call_later(self.rng.uniform(0, 30), self._restart, sidecar)
        tasks = [self.loop.create_task(self.guarded(self.backfill))]
        self.loop.on_step = self.step
        try:
            await self.chaos(chaos_s)
            await self.heal()
            await self._settled()
            if self.failure is not None:
                raise self.failure
            self._account()
        finally:
            self.loop.on_step = lambda: None
            for sidecar in self.sidecars:
                sidecar.machine.thaw()
                await sidecar.kill()
            for task in [*tasks, *self.network.late]:
                task.cancel()
            await asyncio.gather(*tasks, *self.network.late, return_exceptions=True)

    async def _settled(self) -> None:
        deadline = self.loop.now + 3600
        while self.failure is None and (missing := self.quiet()) is not None:
            if self.loop.now > deadline:
                raise UnsafeError(
                    f"an hour after the healing: {missing}; {[s.controller.outlook.holds for s in self.sidecars]}"
                )
            await asyncio.sleep(20)

    def _account(self) -> None:
        everything = {f.record for f in self.acknowledged} | {-n for n in range(1, HISTORY + 1)}
        for store in STORES:
            if lost := everything - self.data[store].keys():
                raise UnsafeError(
                    f"{store} lacks {len(lost)} acknowledged records and no gap accounts for them: {sorted(lost)[:5]}"
                )


def simulate(seed: int, chaos_s: float = 900.0, sidecars: int = 3, *, fences: bool = True) -> World:
    """Run one history; the world as it is at its end. Raises UnsafeError with the log of what happened.

    ``fences=False`` tells the oracle that members were changed to have no fence: then who has joined is at work.
    """
    loop = VirtualLoop()
    try:
        world = World(loop, seed, sidecars, fences=fences)
        try:
            loop.run_until_complete(world.run(chaos_s))
        except UnsafeError as error:
            story = "\n".join(world.log[-25:])
            raise UnsafeError(f"seed {seed}, {loop.now:.1f} s: {error}\n{story}") from None
        return world
    finally:
        loop.close()

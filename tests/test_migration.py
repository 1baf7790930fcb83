"""The local phase switch: adjacent steps, epochs, force, crashes at every stage, concurrent wishes."""

import asyncio
import itertools

import pytest

from sidecar.errors import Busy, RetryClass, SpoolFailed, SpoolRefused, StoreError
from sidecar.migration import Desired, GateResult, Hold, PhaseSwitch, Transition
from sidecar.phase import TABLE, Phase, adjacent

SQL, DUAL, READ, DYNAMO = Phase


class Clock:
    """Counts up, so that every reading differs."""

    def __init__(self) -> None:
        self._count = itertools.count(1)
        self.slept: list[float] = []

    def now_us(self) -> int:
        return next(self._count)

    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)


class Crash(BaseException):
    """The process is gone."""


class Disk:
    """The spool as the switch sees it: what is durable, in which order things happened, and where it fails."""

    def __init__(self) -> None:
        self.value: bytes | None = None
        self.log: list[str] = []
        self.fail: dict[str, BaseException] = {}  # the n-th call of a kind, e.g. {"set 1": Busy(...)}
        self.calls: dict[str, int] = {}
        self.gate: asyncio.Event | None = None  # where set, ``set`` waits for it

    def _call(self, kind: str, entry: str) -> None:
        self.calls[kind] = self.calls.get(kind, 0) + 1
        failure = self.fail.pop(f"{kind} {self.calls[kind]}", None)
        if failure is not None:
            raise failure
        self.log.append(entry)

    async def get(self) -> bytes | None:
        return self.value

    async def set(self, value: bytes) -> None:
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        self._call("set", "set")
        self.value = value
        after = self.fail.pop(f"after set {self.calls['set']}", None)
        if after is not None:
            raise after

    async def strengthen(self, store: str) -> None:
        await asyncio.sleep(0)
        self._call("strengthen", f"strengthen {store}")

    async def open(
        self, phase: Phase = SQL, epoch: int | None = None, force: str | None = None, **parts
    ) -> PhaseSwitch:
        parts.setdefault("clock", Clock())
        return await PhaseSwitch.open(self, Desired(phase, epoch, force, "test"), strengthen=self.strengthen, **parts)


class StubGate:
    """A gate whose answer the test sets."""

    def __init__(self, name: str, *steps: tuple[Phase, Phase], ok: bool = False) -> None:
        self.name = name
        self.steps = frozenset(steps)
        self.ok = ok
        self.error: StoreError | None = None
        self.looks = 0

    async def evaluate(self) -> GateResult:
        self.looks += 1
        if self.error is not None:
            raise self.error
        return GateResult(self.name, self.ok, "7 open", "0 open")


@pytest.fixture
def disk():
    """An empty spool."""
    return Disk()


# --- start


@pytest.mark.parametrize("phase", Phase)
async def test_first_start_applies_the_configured_phase(disk, phase):
    """Without a memory the configured phase is applied as it is, and remembered."""
    switch = await disk.open(phase, epoch=4)
    assert (switch.policy, switch.applied.epoch, switch.hold) == (TABLE[phase], 4, None)
    assert (await disk.open(phase, epoch=4)).applied == switch.applied
    assert [(t.source, t.target, t.why) for t in switch.applied.history] == [(None, phase, "first start")]


@pytest.mark.parametrize("remembered", Phase)
@pytest.mark.parametrize("configured", Phase)
async def test_restart_goes_from_the_applied_phase_to_the_desired_one(disk, remembered, configured):
    """At a restart the memory wins; the file's wish is one step away, or held."""
    await disk.open(remembered)
    switch = await disk.open(configured)
    near = abs(remembered - configured) <= 1
    assert switch.policy is TABLE[configured if near else remembered]
    assert switch.desired.phase is configured
    assert (switch.hold is None) is near


async def test_restart_strengthens_what_the_applied_phase_requires(disk):
    """A crash after publishing cannot leave a weak obligation to a required store."""
    await disk.open(READ)
    disk.log.clear()
    await disk.open(READ)
    assert disk.log == ["strengthen dynamodb", "strengthen postgres"]


@pytest.mark.parametrize("value", [b"", b"\0", b"{}", b'{"phase":9,"epoch":null,"history":[]}', b"[1]"])
async def test_unreadable_memory_is_refused_in_one_line(disk, value):
    """A phase that this version cannot read is never replaced by a guess."""
    disk.value = value
    with pytest.raises(SpoolRefused, match="applied phase"):
        await disk.open()
    assert disk.value == value


# --- steps


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(Phase, 2)))
async def test_only_adjacent_wishes_apply_without_force(disk, source, target):
    """A neighbour is applied at once; any other phase is held with what is needed instead."""
    switch = await disk.open(source)
    hold = await switch.desire(target)
    if adjacent(source, target):
        assert (hold, switch.policy) == (None, TABLE[target])
    else:
        assert hold is not None
        assert (hold.gate, switch.policy, switch.desired.phase) == ("adjacent_step", TABLE[source], target)
        assert source.label in hold.observed
        assert target.label in hold.observed


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(Phase, 2)))
async def test_force_walks_every_step_between(disk, source, target):
    """A reason walks from one phase to any other through each phase between, each one remembered and told."""
    told: list[Transition] = []
    switch = await disk.open(source, on_transition=[told.append])
    told.clear()
    assert await switch.desire(target, force="approved", by="someone") is None
    direction = 1 if target > source else -1
    path = [Phase(value) for value in range(source, target + direction, direction)]
    assert [(t.source, t.target) for t in told] == list(itertools.pairwise(path))
    assert all(t.forced is (len(path) > 2) for t in told)
    assert {(t.by, t.why) for t in told} == {("someone", "approved")}
    assert tuple(told) == switch.applied.history[1:]
    assert (await disk.open(target)).applied == switch.applied


async def test_step_strengthens_remembers_publishes_and_strengthens_again(disk):
    """The order of a step: no weak obligation before the phase counts, none that slipped in after."""
    switch = await disk.open(DUAL)
    disk.log.clear()
    seen: list[tuple[str, Phase]] = []
    strengthen, remember = disk.strengthen, disk.set

    async def watched_strengthen(store: str) -> None:
        seen.append((store, switch.policy.phase))
        await strengthen(store)

    async def watched_set(value: bytes) -> None:
        seen.append(("set", switch.policy.phase))
        await remember(value)

    switch._strengthen, disk.set = watched_strengthen, watched_set
    await switch.desire(READ)
    assert seen == [
        ("dynamodb", DUAL),
        ("postgres", DUAL),
        ("set", DUAL),
        ("dynamodb", READ),
        ("postgres", READ),
    ]


async def test_wish_for_the_applied_phase_does_nothing(disk):
    """The same wish again neither steps nor writes."""
    switch = await disk.open(DUAL)
    disk.log.clear()
    assert await switch.desire(DUAL) is None
    assert disk.log == []


# --- epochs


@pytest.mark.parametrize("stale", [None, 0, 4, 5])
@pytest.mark.parametrize("force", [None, "because"])
async def test_epoch_not_above_the_applied_one_moves_nothing(disk, stale, force):
    """A stale file, or one without an epoch, cannot change the phase, force or not."""
    switch = await disk.open(DUAL, epoch=5)
    hold = await switch.desire(SQL, epoch=stale, force=force)
    assert hold is not None
    assert (hold.gate, switch.policy.phase) == ("epoch_conflict", DUAL)
    assert "5" in hold.required


async def test_higher_epoch_moves_and_is_remembered(disk):
    """An epoch above the applied one is taken with the phase, or alone, and survives a restart."""
    switch = await disk.open(DUAL, epoch=5)
    assert await switch.desire(SQL, epoch=6) is None
    assert await switch.desire(SQL, epoch=9) is None
    assert await switch.desire(SQL, epoch=3) is None  # nothing to change, nothing to refuse
    again = await disk.open(SQL, epoch=3)
    assert (again.applied.phase, again.applied.epoch, len(again.applied.history)) == (SQL, 9, 2)


async def test_interrupted_walk_goes_on_with_the_same_epoch(disk):
    """Only the last step takes the new epoch, so a crash in the middle does not make the wish stale."""
    await disk.open(SQL, epoch=1)
    switch = await disk.open(SQL, epoch=1)
    disk.fail["set 3"] = Crash()
    with pytest.raises(Crash):
        await switch.desire(DYNAMO, epoch=2, force="go")
    again = await disk.open(DYNAMO, epoch=2, force="go")
    assert (again.applied.phase, again.applied.epoch) == (DYNAMO, 2)
    assert [t.target for t in again.applied.history] == [SQL, DUAL, READ, DYNAMO]


# --- gates


async def test_red_gate_holds_and_green_gate_lets_pass(disk):
    """A gate of this step holds it with what it saw; when it is green the held wish goes through."""
    gate = StubGate("no_open_gap", (DUAL, READ))
    holds: list[Hold | None] = []
    switch = await disk.open(DUAL, gates=[gate], on_hold=[holds.append])
    hold = await switch.desire(READ)
    assert hold == Hold("no_open_gap", "7 open", "0 open", hold.since_us if hold else 0)
    assert await switch.reconsider() == hold  # since stays
    gate.ok = True
    assert await switch.reconsider() is None
    assert switch.policy.phase is READ
    assert holds == [hold, None]  # one line per change of reason


async def test_gates_of_other_steps_are_not_asked(disk):
    """A gate guards only the steps that it names: 2 to 1 is free of the gate of 1 to 2."""
    gate = StubGate("no_open_gap", (DUAL, READ))
    switch = await disk.open(READ, gates=[gate])
    assert await switch.desire(DUAL) is None
    assert gate.looks == 0


async def test_gate_that_cannot_answer_is_red(disk):
    """An unreachable store is a red gate with its reason, not a failure of the switch."""
    gate = StubGate("canary", (SQL, DUAL))
    gate.error = StoreError("dynamodb", RetryClass.TRANSIENT, "connection refused")
    switch = await disk.open(SQL, gates=[gate])
    hold = await switch.desire(DUAL)
    assert hold is not None
    assert (hold.gate, hold.observed) == ("canary", "dynamodb: connection refused")


async def test_force_overrides_red_gates_and_names_them(disk):
    """A forced step says which gates were red; with green gates the same wish is not called forced."""
    red, green = StubGate("red", (SQL, DUAL)), StubGate("green", (SQL, DUAL), (DUAL, READ), ok=True)
    switch = await disk.open(SQL, gates=[red, green])
    await switch.desire(DUAL, force="incident 7")
    await switch.desire(READ, force="incident 7")
    assert [(t.forced, t.overridden, t.why) for t in switch.applied.history[1:]] == [
        (True, ("red",), "incident 7"),
        (False, (), "incident 7"),
    ]


async def test_gates_are_looked_at_before_each_step_of_a_walk(disk):
    """A walk evaluates the gates of every step that it makes."""
    gates = [StubGate("a", (SQL, DUAL)), StubGate("b", (DUAL, READ)), StubGate("c", (READ, DYNAMO))]
    switch = await disk.open(SQL, gates=gates)
    await switch.desire(DYNAMO, force="go")
    assert [t.overridden for t in switch.applied.history[1:]] == [("a",), ("b",), ("c",)]


async def test_hold_goes_when_the_wish_goes_back(disk):
    """Asking for the applied phase again ends the hold."""
    switch = await disk.open(SQL)
    await switch.desire(DYNAMO)
    assert switch.hold is not None
    assert await switch.desire(SQL) is None
    assert (switch.hold, switch.desired.phase) == (None, SQL)


async def test_run_reconsiders_a_held_wish(disk):
    """The loop lets a held wish through once its gate is green, without anybody asking."""
    gate = StubGate("lag", (SQL, DUAL))
    clock = Clock()
    switch = await disk.open(SQL, gates=[gate], clock=clock)
    await switch.desire(DUAL)
    task = asyncio.create_task(switch.run(2.0))
    gate.ok = True
    async with asyncio.timeout(30):
        while switch.hold is not None:
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert switch.policy.phase is DUAL
    assert set(clock.slept) == {2.0}


# --- failures


STAGES = {
    "before strengthening": ("strengthen 2", DUAL),
    "between strengthening and remembering": ("set 2", DUAL),
    "after remembering": ("after set 2", READ),
    "strengthening again": ("strengthen 4", READ),
}  # opening in DUAL takes strengthen 1 and set 1; the step to READ strengthens two stores before and two after


@pytest.mark.parametrize("stage", STAGES)
async def test_crash_at_each_stage_leaves_one_whole_phase(disk, stage):
    """After a crash the memory holds the phase before or after, and a restart arrives at the wish."""
    switch = await disk.open(DUAL)
    failure, remembered = STAGES[stage]
    disk.fail[failure] = Crash()
    with pytest.raises(Crash):
        await switch.desire(READ)
    disk.log.clear()
    again = await disk.open(READ)
    assert again.policy.phase is READ
    assert [t.target for t in again.applied.history] == [DUAL, READ]
    assert disk.log.count("set") == (1 if remembered is DUAL else 0)
    assert disk.log[-2:] == ["strengthen dynamodb", "strengthen postgres"]


@pytest.mark.parametrize("failure", ["strengthen 2", "strengthen 3", "set 2", "strengthen 4", "strengthen 5"])
async def test_full_spool_holds_the_step_and_a_later_try_ends_it(disk, failure):
    """No room at any stage is a hold; when there is room the step is made, told once, and strengthened last."""
    told: list[Transition] = []
    switch = await disk.open(DUAL, on_transition=[told.append])
    told.clear()
    disk.fail[failure] = Busy("disk_full", "no space left", 5)
    hold = await switch.desire(READ)
    assert hold is not None
    assert (hold.gate, hold.observed) == ("spool_room", "no space left")
    assert told == []
    assert await switch.reconsider() is None
    assert switch.policy.phase is READ
    assert [t.target for t in told] == [READ]
    assert disk.log[-2:] == ["strengthen dynamodb", "strengthen postgres"]


async def test_failed_disk_is_raised_and_publishes_nothing(disk):
    """A failed fsync is nobody's to retry: the caller gets it and the old policy stays."""
    switch = await disk.open(SQL)
    disk.fail["set 2"] = SpoolFailed("fsync")
    with pytest.raises(SpoolFailed):
        await switch.desire(DUAL)
    assert switch.policy.phase is SQL


async def test_no_room_for_the_first_phase_is_raised(disk):
    """Without a durable first phase nothing starts."""
    disk.fail["set 1"] = Busy("disk_full", "no space left", 5)
    with pytest.raises(Busy):
        await disk.open(SQL)


# --- concurrency


async def test_concurrent_wishes_are_serialised(disk):
    """Wishes that arrive together are applied one after the other, in their order, each step adjacent."""
    switch = await disk.open(SQL)
    await asyncio.gather(*(switch.desire(phase) for phase in (DUAL, READ, DUAL, SQL, DUAL, READ, DYNAMO)))
    steps = [(t.source, t.target) for t in switch.applied.history[1:]]
    assert [target for _, target in steps] == [DUAL, READ, DUAL, SQL, DUAL, READ, DYNAMO]
    assert all(adjacent(source, target) for source, target in steps)
    assert switch.policy.phase is DYNAMO


async def test_caller_who_goes_away_does_not_break_a_step(disk):
    """A cancelled wish that has begun is finished: memory and policy agree."""
    switch = await disk.open(SQL)
    disk.gate = asyncio.Event()
    task = asyncio.create_task(switch.desire(DUAL))
    async with asyncio.timeout(30):
        while disk.calls.get("strengthen", 0) < 2:
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    disk.gate.set()
    async with asyncio.timeout(30):
        while switch.policy.phase is not DUAL:
            await asyncio.sleep(0)
    assert (await disk.open(DUAL)).applied.phase is DUAL


async def test_recorder_gets_every_transition_after_it_counts(disk):
    """The recorder sees the first start and each step, with the new policy already in force."""
    recorded: list[tuple[Phase, Phase | None]] = []
    box: list[PhaseSwitch] = []

    async def record(transition: Transition) -> None:
        recorded.append((transition.target, box[0].policy.phase if box else None))

    box.append(await disk.open(SQL, recorder=record))
    await box[0].desire(DYNAMO, force="go")
    assert recorded == [(SQL, None), (DUAL, DUAL), (READ, READ), (DYNAMO, DYNAMO)]


async def test_history_is_bounded(disk):
    """The memory keeps the last hundred transitions."""
    switch = await disk.open(SQL)
    for number in range(150):
        await switch.desire(DUAL if number % 2 == 0 else SQL)
    assert len(switch.applied.history) == 100
    assert switch.applied.history[-1].target is SQL
    assert disk.value is not None
    assert len(disk.value) < 32_768


async def test_policy_is_a_plain_attribute(disk):
    """What the hot path reads is no property and no call."""
    switch = await disk.open(SQL)
    assert "policy" in vars(switch)
    assert not hasattr(PhaseSwitch, "policy")

"""The controller on real members and stores in memory: what it does, writes down, and says when it may not."""

from dataclasses import dataclass, field

import pytest

from sidecar.errors import RetryClass, StoreError
from sidecar.fleet import Controller, FleetMember, Outlook, Wish
from sidecar.migration import GateResult
from sidecar.phase import DYNAMODB, POSTGRES, STORES, Phase
from tests.fleet.fakes import Fleet

SQL, DUAL, BOTH, DYNAMO = Phase


@dataclass
class Gate:
    """Green or red as told."""

    steps: frozenset[tuple[Phase, Phase]]
    name: str = "no_open_gap"
    ok: bool = True
    error: StoreError | None = None
    asked: int = 0

    async def evaluate(self) -> GateResult:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return GateResult(self.name, self.ok, "3 open" if not self.ok else "0 open", "0 open")


@dataclass
class Crew:
    """Members with a controller each."""

    fleet: Fleet
    gates: list[Gate] = field(default_factory=list)
    authority: str = "file"
    changes: list[Outlook] = field(default_factory=list)
    pairs: list[tuple[FleetMember, Controller]] = field(default_factory=list)

    def add(self, name: str) -> tuple[FleetMember, Controller]:
        member = self.fleet.member(name, holds=lambda: controller.outlook.holds if controller.outlook.leads else None)
        controller = Controller(
            member,
            self.fleet.stores,
            self.fleet.clock,
            wish=lambda: self.fleet.wish,
            gates=self.gates,
            authority=self.authority,
            on_change=self.changes.append,
        )
        self.pairs.append((member, controller))
        return member, controller

    async def live(self, seconds: float = 60.0) -> Outlook:
        """Everybody works for a while; what the leader says at the end."""
        end = self.fleet.clock.time + seconds
        while self.fleet.clock.time < end:
            for member, controller in self.pairs:
                await self.fleet.rounds(member)
                await controller.tick()
            self.fleet.clock.time += 10
        return self.leader[1].outlook

    @property
    def leader(self) -> tuple[FleetMember, Controller]:
        """The pair that leads."""
        (leader,) = [pair for pair in self.pairs if pair[1].outlook.leads]
        return leader

    @property
    def follower(self) -> tuple[FleetMember, Controller]:
        """A pair that does not."""
        return next(pair for pair in self.pairs if not pair[1].outlook.leads)

    def phases(self) -> set[Phase | None]:
        return {None if m.applied is None else m.applied.phase for m, _ in self.pairs}


@pytest.fixture
async def crew(fleet: Fleet) -> Crew:
    """Two sidecars, settled in phase 0."""
    crew = Crew(fleet)
    crew.add("a")
    crew.add("b")
    await crew.live()
    assert crew.phases() == {SQL}
    return crew


async def test_the_first_instance_creates_the_record_from_its_configuration(fleet: Fleet) -> None:
    """And the next one follows the record, whatever its own configuration says."""
    crew = Crew(fleet)
    fleet.wish = Wish(DUAL)
    crew.add("a")
    await crew.live()
    fleet.wish = Wish(BOTH, None)
    late = fleet.member("late")
    await fleet.rounds(late)
    assert late.applied is not None
    assert late.applied.phase is DUAL
    for store in STORES:
        copy = await fleet.servers[store].read_record()
        assert copy is not None
        assert (copy.epoch, copy.phase, copy.settled) == (1, DUAL, True)


async def test_a_jump_from_0_to_3_is_walked_step_by_step(crew: Crew) -> None:
    """Every step is applied by all before the next one is made."""
    crew.fleet.wish = Wish(DYNAMO)
    walked: list[set[Phase | None]] = []
    for _ in range(40):
        await crew.live(10)
        if crew.phases() not in walked:
            walked.append(crew.phases())
    assert crew.phases() == {DYNAMO}
    settled = [p for p in walked if len(p) == 1]
    assert settled == [{SQL}, {DUAL}, {BOTH}, {DYNAMO}]
    assert all(max(p) - min(p) <= 1 for p in walked)


async def test_one_instance_leads_and_the_other_takes_over(crew: Crew) -> None:
    """The lease decides; when the leader is gone the other one moves the fleet on."""
    first, leader = crew.leader
    crew.pairs = [crew.follower]
    await first.leave()
    await leader.resign()
    crew.fleet.wish = Wish(DUAL)
    await crew.live()
    assert crew.pairs == [crew.leader]
    assert crew.phases() == {DUAL}


async def test_a_dead_instance_holds_the_fleet_until_it_is_counted_out(crew: Crew) -> None:
    """Killed without a word: nothing moves against its last word for 150 s, and then everything does."""
    crew.pairs = [crew.leader]
    crew.fleet.wish = Wish(BOTH)
    outlook = await crew.live(120)
    assert crew.phases() <= {SQL, DUAL}
    assert [h.gate for h in outlook.holds] == ["configurations_agree"]  # the dead one's last word still counts
    await crew.live(300)
    assert crew.phases() == {BOTH}


@pytest.mark.parametrize("red", ["red", "error"])
async def test_a_red_gate_holds_with_its_evidence_and_the_fleet_moves_when_it_turns_green(
    fleet: Fleet, red: str
) -> None:
    """Observed, required and since are said; nothing else has to be done."""
    gate = Gate(frozenset({(SQL, DUAL)}))
    crew = Crew(fleet, [gate])
    crew.add("a")
    await crew.live()
    fleet.wish = Wish(DUAL)
    if red == "red":
        gate.ok = False
    else:
        gate.error = StoreError(POSTGRES, RetryClass.TRANSIENT, "cannot be reached")
    outlook = await crew.live(120)
    (hold,) = outlook.holds
    assert hold.gate == "no_open_gap"
    assert hold.observed == ("3 open" if red == "red" else "postgres: cannot be reached")
    assert hold.since_us < fleet.clock.now_us() - 60_000_000
    assert crew.phases() == {SQL}
    gate.ok, gate.error = True, None
    outlook = await crew.live()
    assert outlook.holds == ()
    assert crew.phases() == {DUAL}


async def test_a_change_of_reason_is_told_once(fleet: Fleet) -> None:
    """One call for the reason that came, one for its end; none for every tick."""
    gate = Gate(frozenset({(SQL, DUAL)}), ok=False)
    crew = Crew(fleet, [gate])
    crew.add("a")
    await crew.live()
    crew.changes.clear()
    fleet.wish = Wish(DUAL)
    await crew.live(300)
    assert [[h.gate for h in o.holds] for o in crew.changes] == [["no_open_gap"]]


async def test_gates_are_asked_again_after_the_preparation(fleet: Fleet) -> None:
    """A gap that opened meanwhile stops the step, and after a minute the preparation is given up."""
    gate = Gate(frozenset({(DUAL, BOTH)}))
    crew = Crew(fleet, [gate])
    fleet.wish = Wish(DUAL)
    member, controller = crew.add("a")
    await crew.live()
    fleet.wish = Wish(BOTH)
    await fleet.rounds(member)
    await controller.tick()
    await fleet.rounds(member)
    assert member.applied is not None
    assert member.applied.preparing is BOTH
    assert member.releasable == frozenset()
    gate.ok = False
    await crew.live(50)
    assert member.applied.preparing is BOTH
    await crew.live(60)
    assert (member.applied.phase, member.applied.preparing) == (DUAL, None)
    assert member.releasable == {DYNAMODB}
    gate.ok = True
    await crew.live(60)
    assert crew.phases() == {BOTH}


async def test_a_force_overrides_a_red_gate_loudly_and_skips_no_step(fleet: Fleet) -> None:
    """The trail has the reason and the red evidence for the forced steps only."""
    gate = Gate(frozenset({(DUAL, BOTH)}), ok=False)
    crew = Crew(fleet, [gate])
    crew.add("a")
    await crew.live()
    fleet.wish = Wish(DYNAMO, None, "ticket 7: accepted by operations")
    await crew.live(200)
    assert crew.phases() == {DYNAMO}
    trail = [e for s in STORES for e in await fleet.servers[s].audits(100) if e.outcome == "intended"]
    steps = {(e.action, e.from_phase, e.to_phase): e for e in trail if e.action in ("step", "prepare")}
    assert [key[1:] for key in sorted(steps, key=lambda k: steps[k].epoch)] == [
        (SQL, DUAL),
        (DUAL, BOTH),
        (DUAL, BOTH),
        (BOTH, DYNAMO),
    ]
    forced = steps["step", DUAL, BOTH]
    assert forced.forced
    assert forced.why == "ticket 7: accepted by operations"
    assert forced.evidence[0]["observed"] == "3 open"
    assert not steps["step", SQL, DUAL].forced


async def test_every_change_is_in_the_trail_before_and_after(crew: Crew) -> None:
    """Created, wished, stepped: who, why, when, which epoch; each intended and done."""
    crew.fleet.wish = Wish(DUAL)
    await crew.live()
    trail = list(await crew.fleet.servers[POSTGRES].audits(100))[::-1]
    assert [(e.action, e.outcome, e.epoch) for e in trail] == [
        ("create", "intended", 1),
        ("create", "done", 1),
        ("wish", "intended", 1),
        ("wish", "done", 1),
        ("step", "intended", 2),
        ("step", "done", 2),
    ]
    assert all(e.by and e.why and e.at_us for e in trail)


@pytest.mark.parametrize("start", [DUAL, BOTH])
async def test_rollback_works_with_dynamodb_down(fleet: Fleet, start: Phase) -> None:
    """1->0 and 2->1: one step down at once; the next waits until the other copy can have this one."""
    crew = Crew(fleet)
    fleet.wish = Wish(start)
    crew.add("a")
    crew.add("b")
    await crew.live()
    fleet.stores[DYNAMODB].down = True
    fleet.wish = Wish(SQL)
    outlook = await crew.live(300)
    assert crew.phases() == {Phase(start - 1)}
    if start is BOTH:
        assert [h.gate for h in outlook.holds] == ["both_copies"]
        assert "dynamodb" in outlook.holds[0].observed
    fleet.stores[DYNAMODB].down = False
    await crew.live()
    assert crew.phases() == {SQL}


async def test_0_to_1_is_held_with_dynamodb_down(crew: Crew) -> None:
    """The gate that looks at DynamoDB says so, and the settled record alone does not let it pass."""
    gate = Gate(frozenset({(SQL, DUAL)}), "dynamodb_ready", ok=False)
    crew.gates.append(gate)
    crew.fleet.stores[DYNAMODB].down = True
    crew.fleet.wish = Wish(DUAL)
    outlook = await crew.live(100)
    assert crew.phases() == {SQL}
    assert "dynamodb_ready" in [h.gate for h in outlook.holds]


async def test_an_examination_by_anyone_shows_evidence_and_changes_nothing(fleet: Fleet) -> None:
    """A follower's dry run sees what the leader would see."""
    gate = Gate(frozenset({(SQL, DUAL)}), ok=False)
    crew = Crew(fleet, [gate])
    crew.add("a")
    crew.add("b")
    fleet.wish = Wish(SQL)
    await crew.live()
    fleet.wish = Wish(DUAL)
    await crew.live(30)
    before = {s: await fleet.servers[s].read_record() for s in STORES}
    outlook = await crew.follower[1].examine()
    assert [(f.gate, f.ok) for f in outlook.findings] == [("no_open_gap", False)]
    assert {m.heartbeat.instance for m in outlook.members} == {"a", "b"}
    assert {s: await fleet.servers[s].read_record() for s in STORES} == before


async def test_a_wish_through_the_api_is_kept_in_the_record_and_followed(fleet: Fleet) -> None:
    """Any instance takes it; the configuration is not asked; the trail names the token."""
    crew = Crew(fleet, authority="api")
    crew.add("a")
    crew.add("b")
    await crew.live()
    record = await crew.follower[1].request(DUAL, by="ops-token", why="start of the migration")
    assert record.desired is DUAL
    await crew.live()
    assert crew.phases() == {DUAL}
    wishes = [e for e in await fleet.servers[POSTGRES].audits(100) if e.action == "wish" and e.outcome == "done"]
    assert [(e.by, e.why, e.to_phase) for e in wishes] == [("ops-token", "start of the migration", DUAL)]


async def test_a_wish_through_the_api_says_which_store_it_could_not_reach(crew: Crew) -> None:
    """The store that decides is down: an error, and nothing is half done."""
    crew.fleet.stores[POSTGRES].down = True
    with pytest.raises(StoreError, match="postgres: cannot be reached"):
        await crew.pairs[0][1].request(DUAL, by="t", why="w")


async def test_a_store_that_fails_in_the_middle_is_a_hold_and_the_next_tick_goes_on(crew: Crew) -> None:
    """A tick never raises for a store."""
    controller = crew.leader[1]
    crew.fleet.stores[POSTGRES].down = True
    outlook = await controller.tick()
    assert [h.gate for h in outlook.holds] == ["authority_reachable"]
    crew.fleet.stores[POSTGRES].down = False
    crew.fleet.wish = Wish(DUAL)
    await crew.live()
    assert crew.phases() == {DUAL}


async def test_a_follower_reads_the_lease_and_what_its_holder_tells(crew: Crew) -> None:
    """A thousand followers cost two small reads each per tick."""
    for store in crew.fleet.stores.values():
        store.calls.clear()
    await crew.follower[1].tick()
    assert crew.fleet.stores[POSTGRES].calls == ["acquire_lease", "leader"]
    assert crew.fleet.stores[DYNAMODB].calls == []


async def test_a_follower_tells_who_leads_and_what_holds_the_step_there(crew: Crew) -> None:
    """The same reasons as the leader's, until they are gone; nothing of one that has resigned."""
    crew.gates.append(Gate(frozenset({(Phase.SQL_ONLY, DUAL)}), ok=False))
    crew.fleet.wish = Wish(DUAL)
    found = await crew.live()
    member, _ = crew.leader
    _, follower = crew.follower
    assert [hold.gate for hold in found.holds] == ["no_open_gap"]
    assert follower.outlook.holds == ()
    assert follower.outlook.told == found.holds
    assert follower.outlook.leader is not None
    assert follower.outlook.leader.instance == member.identity.instance
    crew.gates.clear()
    await crew.live()
    assert (crew.phases(), follower.outlook.told) == ({DUAL}, ())
    _, leader = crew.leader
    await leader.resign()
    assert await crew.fleet.stores[POSTGRES].leader("phase-controller") is None


async def test_a_numbered_wish_moves_on_past_a_dead_instance_with_the_old_configuration(crew: Crew) -> None:
    """With phase_epoch the dead one has no vote: the first step is made, the second waits until it is gone."""
    crew.pairs = [crew.leader]
    crew.fleet.wish = Wish(BOTH, 7)
    outlook = await crew.live(100)
    assert crew.phases() == {DUAL}
    assert {h.gate for h in outlook.holds} == {"all_applied", "epoch_conflict"}
    await crew.live(200)
    assert crew.phases() == {BOTH}

"""Behind the routes: an instance of a fleet and one that is alone, on a real spool; what intake does with a lapse."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from sidecar.app.fleet import FleetPhase
from sidecar.app.phase_control import AloneControl, FleetControl, patch_command
from sidecar.app.phases import Alone
from sidecar.clock import SystemClock
from sidecar.errors import Busy, RetryClass, StoreError
from sidecar.fleet import MemoryFleetStore
from sidecar.intake import Firm, Standing
from sidecar.metrics import Metrics
from sidecar.migration import GateResult
from sidecar.obligations import Obligations, obligation_of
from sidecar.phase import DYNAMODB, POSTGRES, STORES, TABLE, Phase
from sidecar.plan import Wanted
from sidecar.screening import Form
from sidecar.settings import Fleet, Settings
from sidecar.spool import Spool
from tests.api.door import open_door
from tests.parts.reads import ReadsStand
from tests.spool.harness import spool_at
from tests.stores.records import BASE, record
from tests.test_reads_shadow import APPLICATION, batch, compared, running

SQL, DUAL, READ, DYNAMO = Phase
FLEET = Fleet(enabled=True, heartbeat=0.05, fence_after=0.5)


class Gate:
    """Answers as the test says."""

    def __init__(self, *step: Phase) -> None:
        self.name = "lag"
        self.steps = frozenset({(step[0], step[1])})
        self.ok = False

    async def evaluate(self) -> GateResult:
        return GateResult(self.name, self.ok, "9 s", "0 s")


class Store(MemoryFleetStore):
    """Fails on demand."""

    down = False

    def __getattribute__(self, name: str):
        if name in {"put_heartbeat", "read_record", "heartbeats", "acquire_lease"} and self.down:
            return self._fail
        return super().__getattribute__(name)

    async def _fail(self, *_arguments: object) -> None:
        raise StoreError(self.name, RetryClass.TRANSIENT, "cannot be reached")


@dataclass
class Stand:
    """An instance and what it needs."""

    spool: Spool
    settings: Settings = field(default_factory=lambda: Settings(fleet=FLEET))
    gate: Gate = field(default_factory=lambda: Gate(SQL, DUAL))
    stores: dict[str, Store] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    metrics: Metrics = field(default_factory=lambda: Metrics(CollectorRegistry()))

    def __post_init__(self) -> None:
        self.stores = {store: Store(store, SystemClock()) for store in STORES}

    async def canary(self) -> list[object]:
        return []

    async def fleet(self, **changes: object) -> tuple[FleetPhase, FleetControl]:
        """An instance of a fleet that runs."""
        self.settings = msgspec.structs.replace(self.settings, **changes)
        phase = await FleetPhase.open(
            self.spool,
            self.stores,
            lambda: self.settings,
            obligations=Obligations(self.spool),
            instance="a",
            gates=lambda *_: [self.gate],
            metrics=self.metrics,
        )
        await phase.start()
        self.tasks = [asyncio.create_task(run()) for _, run in phase.tasks()]
        control = FleetControl(
            phase, spool=self.spool, canary=self.canary, settings=lambda: self.settings, clock=SystemClock()
        )
        return phase, control

    async def alone(self, **changes: object) -> tuple[Alone, AloneControl]:
        """An instance that decides alone."""
        self.settings = msgspec.structs.replace(Settings(), **changes)
        clock = SystemClock()
        phase = await Alone.open(self.spool, lambda: self.settings, clock=clock, metrics=self.metrics)
        control = AloneControl(
            phase,
            [self.gate],
            instance="a",
            spool=self.spool,
            canary=self.canary,
            settings=lambda: self.settings,
            clock=clock,
        )
        return phase, control

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"sidecar_{name}", labels)

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Stand]:
    """On an empty spool."""
    async with spool_at(tmp_path) as spool:
        made = Stand(spool)
        yield made
        await made.stop()


async def until(condition) -> None:
    """Await it."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


# --- a fleet ---------------------------------------------------------------------------------------------------------


async def test_an_instance_whose_stores_answer_begins_joined(stand):
    """From its first request on; the first record comes from its configuration."""
    phase, control = await stand.fleet(phase=DUAL)
    assert not phase.standing().fenced
    assert phase.policy is TABLE[DUAL]
    assert control.state()["applied"] == "dual_write"
    assert stand.sample("phase", phase="dual_write") == 1
    await until(lambda: stand.sample("fleet_instances", phase="dual_write", state="live") == 1)
    fleet = await control.fleet()
    assert [(i["instance"], i["state"], i["epoch"]) for i in fleet["instances"]] == [("a", "live", 1)]


async def test_an_instance_whose_stores_are_down_begins_fenced_and_joins_when_they_are_back(stand):
    """It stamps undecided, refuses reads with phase_unknown, and makes both good by itself."""
    for store in stand.stores.values():
        store.down = True
    phase, _ = await stand.fleet(phase=DUAL)
    assert phase.standing().obligation.unresolved
    assert stand.sample("fleet_fenced") == 1
    with phase.hold() as hold, phase.use() as use:
        assert (hold.standing.fenced, hold.valid) == (True, True)
        with pytest.raises(Busy) as refused:
            use.confirm()
    assert refused.value.reason == "phase_unknown"
    assert POSTGRES not in phase.releasable
    for store in stand.stores.values():
        store.down = False
    await until(lambda: not phase.standing().fenced)
    assert phase.standing().obligation == obligation_of(TABLE[DUAL])


async def test_a_red_gate_holds_the_step_and_says_so_everywhere(stand):
    """State, metric and plan name it; green, the step comes by itself and is in the trail with its evidence."""
    phase, control = await stand.fleet(phase=SQL)
    stand.settings = msgspec.structs.replace(stand.settings, phase=DUAL)
    await phase.configured()
    await until(lambda: stand.sample("phase_held", gate="lag") == 1)
    state = control.state()
    assert (state["applied"], state["desired"]) == ("sql_only", "dual_write")
    assert [(h["gate"], h["observed"], h["required"]) for h in state["holds"]] == [("lag", "9 s", "0 s")]
    plan = await control.plan(DUAL)
    assert [(f.gate, f.ok) for f in plan.failed] == [("lag", False)]
    assert [(s.source, s.target) for s in plan.steps] == [(SQL, DUAL)]
    stand.gate.ok = True
    await until(lambda: phase.policy is TABLE[DUAL])
    await until(
        lambda: stand.sample("phase_transitions_total", **{"from": "sql_only", "to": "dual_write", "forced": "false"})
    )
    history = await control.history(50)
    step = next(e for e in history if (e["action"], e["outcome"]) == ("step", "intended"))
    assert [(g["gate"], g["ok"]) for g in step["evidence"]] == [("lag", "true")]
    lines = [line.what for line in await stand.spool.audit_trail()]
    assert "phase sql_only -> dual_write" in lines


async def test_a_request_sets_the_wish_of_the_fleet(stand):
    """phase_authority api: the file's phase no longer counts; who asked and the evidence are in the trail."""
    stand.gate.ok = True
    phase, control = await stand.fleet(phase=SQL, phase_authority="api")
    wanted = Wanted(DUAL, "token t from x", "change 7", None, "e1")
    asked = await control.request(wanted, await control.plan(DUAL))
    assert asked.applied
    assert phase.policy is TABLE[DUAL]
    (wish,) = [e for e in await control.history(50) if (e["action"], e["outcome"]) == ("wish", "done")]
    assert (wish["id"], wish["by"], wish["why"], wish["to"]) == ("e1", "token t from x", "change 7", "dual_write")
    await until(lambda: control.state()["fleet"]["record"]["settled"])
    assert control.state()["desired"] == "dual_write"


async def test_a_forced_request_is_loud_and_recorded(stand):
    """The gate stays red; state shows the reason, the step in the trail is marked forced."""
    phase, control = await stand.fleet(phase=SQL, phase_authority="api")
    plan = await control.plan(DUAL)
    await control.request(Wanted(DUAL, "t", "because", "because", "e2"), plan)
    await until(lambda: phase.policy is TABLE[DUAL])
    assert control.state()["forced"] == "because"
    steps = [e for e in await control.history(50) if e["action"] == "step"]
    assert [(e["forced"], e["why"]) for e in steps] == [(True, "because")] * len(steps)
    await until(
        lambda: stand.sample("phase_transitions_total", **{"from": "sql_only", "to": "dual_write", "forced": "true"})
    )


async def test_a_refusal_is_in_both_trails(stand):
    """The fleet's, with its evidence, and this instance's own."""
    _, control = await stand.fleet(phase=SQL)
    plan = await control.plan(DUAL)
    await control.refused(Wanted(DUAL, "t", "w", None, "e3"), plan)
    (entry,) = [e for e in await control.history(50) if e["outcome"] == "refused"]
    assert (entry["id"], entry["evidence"][0]["gate"]) == ("e3", "lag")
    (line,) = [line for line in await stand.spool.audit_trail() if line.what.startswith("phase refused")]
    assert (line.what, line.evidence) == ("phase refused: sql_only -> dual_write", "lag: 9 s")


async def test_who_leaves_is_called_drained_and_not_waited_for(stand):
    """A graceful stop needs no fence time."""
    phase, control = await stand.fleet(phase=SQL)
    await stand.stop()
    await phase.leave()
    assert [(i["state"], i["counts"]) for i in (await control.fleet())["instances"]] == [("drained", False)]


async def test_a_restart_remembers_what_was_applied(stand):
    """Until the record is read again: what was last known, fenced."""
    stand.gate.ok = True
    phase, control = await stand.fleet(phase=SQL, phase_authority="api")
    await control.request(Wanted(DUAL, "t", "w", None, "e"), await control.plan(DUAL))
    await until(lambda: phase.switch.applied.phase is DUAL)
    await stand.stop()
    for store in stand.stores.values():
        store.down = True
    again, _ = await stand.fleet()
    assert again.standing() == Standing(TABLE[DUAL], fenced=True)


# --- alone -----------------------------------------------------------------------------------------------------------


async def test_alone_the_file_steps_at_once_and_a_request_looks_at_gates(stand):
    """One instance, development: the file's adjacent step is made; the API shows the red gate all the same."""
    phase, control = await stand.alone(phase=SQL)
    assert [(f.gate, f.ok) for f in (await control.plan(DUAL)).failed] == [("lag", False)]
    stand.settings = msgspec.structs.replace(stand.settings, phase=DUAL)
    await phase.configured()
    assert phase.policy is TABLE[DUAL]


async def test_alone_with_the_api_in_charge_the_file_moves_nothing(stand):
    """The request is the step; a restart keeps it."""
    phase, control = await stand.alone(phase=SQL, phase_authority="api")
    asked = await control.request(Wanted(DUAL, "t", "w"), await control.plan(DUAL))
    assert (asked.applied, phase.policy) == (True, TABLE[DUAL])
    await phase.configured()
    assert phase.policy is TABLE[DUAL]
    again, _ = await stand.alone(phase=DYNAMO, phase_authority="api")
    assert again.policy is TABLE[DUAL]
    assert [e["to"] for e in await control.history(10)] == ["dual_write", "sql_only"]


async def test_alone_a_forced_step_is_recorded_as_forced_with_its_reason_and_evidence(stand):
    """The gates are looked at by who was asked, so it is known what was overridden; and nobody loses the reason."""
    _, control = await stand.alone(phase=SQL, phase_authority="api")
    plan = await control.plan(DUAL)
    assert [finding.gate for finding in plan.failed] == ["lag"]
    await control.request(Wanted(DUAL, "t", "night shift", "incident 7", "e1"), plan)
    (step, _) = await control.history(10)
    assert (step["forced"], step["overridden"], step["why"], step["id"]) == (True, ("lag",), "incident 7", "e1")
    assert "RED lag" in step["evidence"]
    assert control.state()["forced"] == "incident 7"


async def test_alone_the_way_back_is_walked_step_by_step_as_far_as_gates_are_green(stand):
    """Two steps are asked for: both are made and recorded, or, where a gate of the second is red, the first."""
    phase, control = await stand.alone(phase=READ, phase_authority="api")
    asked = await control.request(Wanted(SQL, "t", "back", None, "e2"), await control.plan(SQL))
    assert (asked.applied, phase.policy) == (True, TABLE[SQL])
    assert [(e["to"], e["why"], e["id"]) for e in (await control.history(10))[:2]] == [
        ("sql_only", "back", "e2"),
        ("dual_write", "back", "e2"),
    ]
    stand.gate.steps = frozenset({(DUAL, READ)})
    asked = await control.request(Wanted(READ, "t", "on", None, "e3"), await control.plan(READ))
    assert (asked.applied, asked.desired, phase.policy) == (False, DUAL, TABLE[DUAL])


async def test_alone_where_the_file_decides_a_request_changes_nothing(stand):
    """The answer is the command; a phase that is there already is applied."""
    _, control = await stand.alone(phase=SQL)
    fleet = await control.fleet()
    assert (fleet["enabled"], [(i["instance"], i["phase"]) for i in fleet["instances"]]) == (False, [("a", "sql_only")])
    asked = await control.request(Wanted(DUAL, "t", "w"), await control.plan(DUAL))
    assert (asked.applied, asked.patch is not None) == (False, True)
    asked = await control.request(Wanted(SQL, "t", "w"), await control.plan(SQL))
    assert (asked.applied, asked.patch) == (True, None)
    await control.refused(Wanted(DUAL, "t", "no"), await control.plan(DUAL))
    assert [(e["outcome"], e["why"]) for e in await control.history(10)] == [("refused", "no"), ("done", "first start")]


def test_the_command_changes_the_phase_and_raises_the_epoch():
    """Where the file numbers its wishes, the next number goes with the phase; the whole line is replaced."""
    wanted = Wanted(DUAL, "t", "w")
    assert patch_command(wanted, Settings()) == (
        'kubectl patch configmap sidecar-config --type merge -p "$(kubectl get configmap sidecar-config -o json'
        """ | jq '{data: {"config.yaml": (.data["config.yaml"] | sub("(?m)^phase:.*"; "phase: dual_write"))}}')\""""
    )
    assert """ | sub("(?m)^phase_epoch:.*"; "phase_epoch: 4")""" in patch_command(wanted, Settings(phase_epoch=3))


# --- the door --------------------------------------------------------------------------------------------------------


class Lapsing:
    """A hold that is no longer valid when the commit is over."""

    standing = Standing(TABLE[SQL])
    valid = False


async def test_records_stamped_before_a_lapse_are_owed_once_more_before_the_answer(tmp_path):
    """They are owed to whom the stamp says, and to whom the fleet will say; a valid hold appends once."""
    async with open_door(tmp_path) as door:
        body = b'{"service_name": "s"}'
        door.intake._hold = lambda: nullcontext(Lapsing())
        outcome = await door.intake.accept(body, Form.JSON)
        assert door.spool.counters(POSTGRES).owed == 1
        assert await door.spool.resolve(obligation_of(TABLE[READ])) == 1
        assert (door.spool.counters(POSTGRES).owed, door.spool.counters(DYNAMODB).owed) == (2, 1)
        assert outcome.log_ids[0] is not None
        door.intake._hold = lambda: nullcontext(Firm(Standing(TABLE[SQL])))
        await door.intake.accept(body, Form.JSON)
        assert await door.spool.resolve(obligation_of(TABLE[READ])) == 0


# --- shadow reads ----------------------------------------------------------------------------------------------------


async def test_gates_are_told_what_was_compared_and_what_nothing_explains():
    """A match counts as compared, a missing record as unexplained too; what was not compared counts as neither."""
    async with running(ReadsStand()) as reads:
        await reads.write(batch())
        await reads.reads.page(APPLICATION)
        await compared(reads)
        assert reads.shadow.totals() == {"compared": 1, "unexplained": 0}
        await reads.write([record(9, log_timestamp=BASE)], POSTGRES)
        await reads.reads.page(APPLICATION)
        await compared(reads, 2)
        assert reads.shadow.totals() == {"compared": 2, "unexplained": 1}

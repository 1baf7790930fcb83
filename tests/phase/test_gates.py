"""Every gate of every step: green where all is well, and each has a case in which it alone is red."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from sidecar.canary import CanaryOutcome
from sidecar.errors import RetryClass, StoreError
from sidecar.evidence import DAY_US, CopyBack, DayVerdicts, Evidence, Feasibility, OldWriters, TailVerdict
from sidecar.gaps import GapLine
from sidecar.gates import NAMES, STEPS, KeptCanary, Report, Sources, build_gates
from sidecar.phase import DYNAMODB, POSTGRES, Phase, adjacent
from sidecar.settings import Phases
from sidecar.stores.base import Check

SQL, DUAL, READ, DYNAMO = Phase
NOW = 20_000 * DAY_US + 12 * 3_600_000_000
DOWN = StoreError(DYNAMODB, RetryClass.TRANSIENT, "cannot be reached")


class Clock:
    """Stands still."""

    def now_us(self) -> int:
        return NOW

    def monotonic(self) -> float:
        return 5.0

    async def sleep(self, seconds: float) -> None:
        raise AssertionError("a gate does not wait")


class Store:
    """Answers check and ping as the test says."""

    def __init__(self, *checks: Check) -> None:
        self.checks = list(checks)
        self.error: StoreError | None = None

    async def check(self):
        if self.error is not None:
            raise self.error
        return self.checks

    async def ping(self) -> None:
        if self.error is not None:
            raise self.error


class Ledger:
    """Holds lines."""

    def __init__(self) -> None:
        self.lines: list[GapLine] = []
        self.error: StoreError | None = None

    async def put_gaps(self, lines):
        raise AssertionError("a gate writes nothing")

    async def gaps(self):
        if self.error is not None:
            raise self.error
        return [line for line in self.lines if line.open]


class Found:
    """What validator, backfill and watch have found."""

    def __init__(self) -> None:
        self.tail_: TailVerdict | None = TailVerdict(
            NOW - 2 * DAY_US - 60_000_000, NOW - 60_000_000, NOW - 1_000_000, 9, 0
        )
        self.days_: DayVerdicts | None = DayVerdicts(7)
        self.feasible: Feasibility | None = Feasibility(NOW, 9)
        self.writers: OldWriters | None = None
        self.copied: CopyBack | None = None

    async def tail(self):
        return self.tail_

    async def days(self):
        return self.days_

    async def copy(self, store):
        return self.copied

    async def feasibility(self):
        return self.feasible

    async def old_writers(self):
        return self.writers


class World:
    """All is well until the test changes something."""

    def __init__(self, phase: Phase = SQL) -> None:
        self.phase = phase
        self.found = Found()
        self.stores = {
            POSTGRES: Store(Check("postgres.key", True, "unique", "a unique index on log_id alone")),
            DYNAMODB: Store(
                Check("table logs", True, "ACTIVE", "ACTIVE"), Check("warning: point", True, "ENABLED", "")
            ),
        }
        self.ledgers = {POSTGRES: Ledger(), DYNAMODB: Ledger()}
        self.reports = [Report("a", True, phase, {POSTGRES: 3, DYNAMODB: 3}, {POSTGRES: 0.2, DYNAMODB: 0.1}, {})]
        self.canary = [CanaryOutcome(POSTGRES), CanaryOutcome(DYNAMODB)]
        self.since: int | None = NOW - DAY_US
        self.settings = Phases()

    async def _canary(self):
        return self.canary

    async def red(self, source: Phase, target: Phase) -> dict[str, tuple[str, str]]:
        """The gates of a step that are red, with observed and required."""
        sources = Sources(
            stores=self.stores,
            ledgers=self.ledgers,
            reports=lambda: self.reports,
            phase=lambda: self.phase,
            in_force_since_us=lambda: self.since,
            canary=self._canary,
            settings=lambda: self.settings,
            clock=Clock(),
            evidence=Evidence(self.found, self.found, self.found),
        )
        results = [await gate.evaluate() for gate in build_gates(sources) if (source, target) in gate.steps]
        assert [result.gate for result in results] == [rule.name for rule in STEPS[source, target]]
        assert all(result.observed and result.required for result in results)
        return {result.gate: (result.observed, result.required) for result in results if not result.ok}


def line(store: str, kind: str, opened: int, closed: int = 0, hour: int = 480_000) -> GapLine:
    """A line of the ledger."""
    return GapLine(store=store, kind=kind, hour=hour, source="t", opened=opened, closed=closed)


def gone(world: World, phase: Phase = DYNAMO, **pending: int) -> None:
    """An instance that is no more, and what its spool holds."""
    world.reports.append(Report("lost", False, phase, pending, dict.fromkeys(pending, 1.0), {}))


CASES: list[tuple[str, Phase, Phase, Callable[[World], object]]] = [
    (
        "dynamodb_ready",
        SQL,
        DUAL,
        lambda w: w.stores[DYNAMODB].checks.append(Check("index x", False, "missing", "ACTIVE")),
    ),
    ("log_id_unique", SQL, DUAL, lambda w: w.stores[POSTGRES].checks.clear()),
    (
        "log_id_unique",
        SQL,
        DUAL,
        lambda w: w.stores[POSTGRES].checks.insert(0, Check("postgres.key", False, "not unique", "")),
    ),
    ("canary", SQL, DUAL, lambda w: w.canary.append(CanaryOutcome(DYNAMODB, "read back with another user_id"))),
    ("no_open_gap", DUAL, READ, lambda w: w.ledgers[POSTGRES].lines.append(line(DYNAMODB, "not_owed", 5, 4))),
    ("no_open_gap", DUAL, READ, lambda w: w.ledgers[DYNAMODB].lines.append(line(DYNAMODB, "history", 5))),
    ("days_validated", DUAL, READ, lambda w: setattr(w.found, "days_", None)),
    ("days_validated", DUAL, READ, lambda w: setattr(w.found, "days_", DayVerdicts(7, unclean=(19_999,)))),
    ("days_validated", DUAL, READ, lambda w: setattr(w.found, "days_", DayVerdicts(7, stale=(19_999,)))),
    ("tail_validated", DUAL, READ, lambda w: setattr(w.found, "tail_", None)),
    ("tail_validated", DUAL, READ, lambda w: setattr(w.found, "tail_", replace(w.found.tail_, unexpected=1))),
    (
        "tail_validated",
        DUAL,
        READ,
        lambda w: setattr(w.found, "tail_", replace(w.found.tail_, finished_us=NOW - 7 * 3_600_000_000)),
    ),
    ("tail_validated", DUAL, READ, lambda w: setattr(w.found, "tail_", replace(w.found.tail_, start_us=NOW - DAY_US))),
    ("lag", DUAL, READ, lambda w: w.reports.append(Report("b", True, DUAL, {DYNAMODB: 1}, {DYNAMODB: 61.0}, {}))),
    ("no_dead_letters", DUAL, READ, lambda w: w.reports.append(Report("b", True, DUAL, {}, {}, {DYNAMODB: 1}))),
    ("no_dead_letters", DUAL, READ, lambda w: w.reports.append(Report("b", False, DUAL, {}, {}, {DYNAMODB: 1}))),
    ("shadow_reads", DUAL, READ, lambda w: w.reports.append(Report("b", True, DUAL, {}, {}, {}, 10, 1))),
    ("shadow_reads", DUAL, READ, lambda w: setattr(w, "settings", Phases(min_shadow_reads=1))),
    ("old_writers_quiet", DUAL, READ, lambda w: setattr(w.found, "writers", OldWriters(NOW - DAY_US, NOW - 1_000_000))),
    ("old_writers_quiet", DUAL, READ, lambda w: setattr(w.found, "writers", OldWriters(NOW - 1_000_000, None))),
    ("soaked", READ, DYNAMO, lambda w: setattr(w, "since", NOW - DAY_US + 1_000_000)),
    ("soaked", READ, DYNAMO, lambda w: setattr(w, "since", None)),
    (
        "nothing_pending",
        READ,
        DYNAMO,
        lambda w: w.reports.append(Report("b", True, READ, {POSTGRES: 1}, {POSTGRES: 61.0}, {})),
    ),
    ("nothing_pending", READ, DYNAMO, lambda w: gone(w, READ, postgres=1)),
    ("no_dead_letters", READ, DYNAMO, lambda w: w.reports.append(Report("b", True, READ, {}, {}, {POSTGRES: 1}))),
    ("days_validated", READ, DYNAMO, lambda w: setattr(w.found, "days_", DayVerdicts(7, stale=(19_999,)))),
    ("tail_validated", READ, DYNAMO, lambda w: setattr(w.found, "tail_", replace(w.found.tail_, unexpected=1))),
    ("reverse_feasible", READ, DYNAMO, lambda w: setattr(w.found, "feasible", None)),
    ("reverse_feasible", READ, DYNAMO, lambda w: setattr(w.found, "feasible", Feasibility(NOW, 9, {"ck_type": 2}))),
    ("postgres_reachable", DYNAMO, READ, lambda w: setattr(w.stores[POSTGRES], "error", DOWN)),
    ("no_open_gap", READ, DUAL, lambda w: w.ledgers[POSTGRES].lines.append(line(POSTGRES, "not_owed", 5))),
    ("no_open_gap", READ, DUAL, lambda w: w.ledgers[DYNAMODB].lines.append(line(POSTGRES, "not_owed", 5))),
    ("nobody_stranded", READ, DUAL, lambda w: gone(w, DYNAMO, dynamodb=2)),
    ("nobody_stranded", DUAL, READ, lambda w: gone(w, SQL, postgres=2)),
]


@pytest.mark.parametrize(("name", "source", "target", "break_it"), CASES)
async def test_each_gate_alone_can_be_red(name, source, target, break_it):
    """One thing is wrong: that gate is red, and no other of the step."""
    world = World(source)
    break_it(world)
    assert set(await world.red(source, target)) == {name}


@pytest.mark.parametrize(("source", "target"), STEPS)
async def test_where_all_is_well_every_step_is_open(source, target):
    """No gate is red by itself."""
    assert await World(source).red(source, target) == {}


def test_every_gate_that_can_be_red_has_a_case():
    """The cases above miss no gate but the one that only warns."""
    assert {(name, source, target) for name, source, target, _ in CASES} == {
        (rule.name, *step) for step, rules in STEPS.items() for rule in rules if rule.name != "point_in_time_recovery"
    }


def test_every_step_has_its_row():
    """All adjacent pairs, both ways, and no other."""
    assert set(STEPS) == {step for pair in pairwise(Phase) for step in (pair, pair[::-1])}
    assert all(adjacent(*step) for step in STEPS)
    assert set(NAMES) == {rule.name for rules in STEPS.values() for rule in rules}


async def test_the_way_back_to_the_baseline_needs_nobody():
    """1 to 0 is open with DynamoDB down, and with everything else red."""
    world = World(DUAL)
    world.stores[DYNAMODB].error = world.ledgers[DYNAMODB].error = world.ledgers[POSTGRES].error = DOWN
    world.found.tail_ = world.found.days_ = None
    assert await world.red(DUAL, SQL) == {}


async def test_2_to_1_is_open_while_dynamodb_is_down():
    """Its ledger is not asked where PostgreSQL's answers; the other way round the gate is red with the error."""
    world = World(READ)
    world.ledgers[DYNAMODB].error = world.stores[DYNAMODB].error = DOWN
    assert await world.red(READ, DUAL) == {}
    world.ledgers[POSTGRES].error = DOWN
    assert (await world.red(READ, DUAL))["no_open_gap"] == ("dynamodb: cannot be reached", "an answer")


async def test_what_was_never_validated_says_which_command_validates():
    """Red gates of the validator name it; the dry run and the gap name theirs."""
    world = World(DUAL)
    world.found.tail_ = world.found.days_ = world.found.feasible = None
    world.ledgers[POSTGRES].lines = [line(DYNAMODB, "history", 5), line(DYNAMODB, "not_owed", 2, hour=1)]
    red = await world.red(DUAL, READ)
    assert red["days_validated"][0] == red["tail_validated"][0] == "validator has not run: run `sidecar validate`"
    assert red["no_open_gap"][0] == "5 history, 2 not_owed records in 2 hours; nothing was ever copied there"
    assert "sidecar backfill" in red["no_open_gap"][1]
    world.found.copied = CopyBack(DYNAMODB, NOW, None, 4, 1, {"too_large": 1})
    assert "4 copied, 1 left, refused: too_large 1" in (await world.red(DUAL, READ))["no_open_gap"][0]


async def test_a_store_that_cannot_be_asked_is_red_with_its_error():
    """A gate never takes silence for consent."""
    world = World(SQL)
    world.stores[DYNAMODB].error = DOWN
    red = await world.red(SQL, DUAL)
    assert red == {
        "dynamodb_ready": ("dynamodb: cannot be reached", "an answer"),
        "point_in_time_recovery": ("dynamodb: cannot be reached", "an answer"),
    }


async def test_what_a_live_instance_has_just_accepted_holds_nobody_up():
    """Under traffic something is always pending: only what is old, or lies where nobody works, is red."""
    world = World(READ)
    world.reports = [Report(str(n), True, READ, {POSTGRES: 99}, {POSTGRES: 59.0}, {}) for n in range(5)]
    assert await world.red(READ, DYNAMO) == {}


async def test_a_canary_is_not_run_at_every_look():
    """Its outcome counts for a few seconds, red or green."""
    runs, time = [], [0.0]

    class Moving(Clock):
        def monotonic(self) -> float:
            return time[0]

    async def run():
        runs.append(1)
        return [CanaryOutcome(POSTGRES, "no")]

    kept = KeptCanary(run, Moving())
    for time[0] in (0.0, 1.0, 14.9, 15.0):
        assert (await kept())[0].problem == "no"
    assert len(runs) == 2

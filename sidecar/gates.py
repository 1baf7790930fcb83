"""The gates of a phase change: what must be seen before a step is made (semantics, section 9). One table: ``STEPS``.

A gate is a question with an answer {observed, required}, asked anew each time and kept by nobody: level-triggered. It
says what it saw in words that name figures and the next thing to do. What was never looked at is red, with the command
that looks. A store that does not answer makes the gate red with the store's error.

WHO IS ASKED. Of every instance: what it reports in its heartbeat (:class:`Report`), those that are gone included while
their row is kept, because a pod that died with records on its volume still has them. Of the stores: tables, keys and a
canary. Of validator, backfill and table watch: ``sidecar.evidence``. Of the gap ledgers: both, and the one of the store
that decides must answer.

AGES of pending records are measured by the clock of the instance that reports them plus the observer's monotonic time
since. The soak and the age of a validation are measured by wall clocks of two machines, and are hours by default.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Final, Protocol

from sidecar.canary import CanaryOutcome
from sidecar.clock import Clock
from sidecar.errors import SidecarError, StoreError
from sidecar.evidence import DAY_US, DayVerdicts, Evidence
from sidecar.fleet.protocol import AUTHORITY
from sidecar.gaps import GapLedger, GapLine, summed
from sidecar.migration import GateResult
from sidecar.phase import DYNAMODB, POSTGRES, STORES, TABLE, Phase, StoreName
from sidecar.record import timestamp_text
from sidecar.settings import Phases
from sidecar.stores.base import Check

Step = tuple[Phase, Phase]

_NAMED: Final = 3  # instances, checks or days that are named; the rest is counted
_TAIL_US: Final = 2 * DAY_US  # how far back the newest records must have been validated
_CANARY_KEPT: Final = 15.0  # seconds that a canary's outcome is used again: gates are looked at every second
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Report:
    """What one instance said of itself last."""

    instance: str
    works: bool  # False: gone or drained
    phase: Phase | None
    pending: Mapping[StoreName, int]
    oldest_s: Mapping[StoreName, float]  # age of the oldest pending record, seconds
    dead_letters: Mapping[StoreName, int]
    compared: int = 0  # shadow reads since it started
    unexplained: int = 0  # of these, mismatches that neither lag nor a gap explains


class Store(Protocol):
    """What is asked of a store."""

    async def check(self) -> Sequence[Check]:
        """Compare what is there with what is needed."""
        ...

    async def ping(self) -> None:
        """Prove that a write could succeed."""
        ...


TryCanary = Callable[[], Awaitable[Sequence[CanaryOutcome]]]


@dataclass(frozen=True, slots=True)
class Sources:
    """Who answers the gates."""

    stores: Mapping[StoreName, Store]
    ledgers: Mapping[StoreName, GapLedger]
    reports: Callable[[], Sequence[Report]]
    phase: Callable[[], Phase]  # in force in the fleet
    in_force_since_us: Callable[[], int | None]  # wall clock; None: not known
    canary: TryCanary
    settings: Callable[[], Phases]
    clock: Clock
    evidence: Evidence = field(default_factory=Evidence)


Answer = tuple[bool, str, str]  # ok, observed, required
Look = Callable[[Sources], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A gate by name, and how to look."""

    name: str
    look: Look


# --- the stores ------------------------------------------------------------------------------------------------------


def _ready(store: StoreName, wanted: Callable[[Check], bool], required: str) -> Look:
    async def look(sources: Sources) -> Answer:
        checks = [check for check in await sources.stores[store].check() if wanted(check)]
        red = [f"{check.name}: {check.observed} (required: {check.required})" for check in checks if not check.ok]
        if not checks:
            return False, "not looked at: the table is missing; run `sidecar init-stores`", required
        return not red, _some(red) if red else f"{len(checks)} checks passed", required

    return look


async def _reachable(sources: Sources) -> Answer:
    await sources.stores[POSTGRES].ping()
    return True, "a write could succeed", "PostgreSQL takes writes"


async def _point_in_time(sources: Sources) -> Answer:
    """A warning: it is shown with the evidence and stops nothing."""
    found = [c for c in await sources.stores[DYNAMODB].check() if c.name.startswith("warning:")]
    said = [f"{check.name.removeprefix('warning: ')}: {check.observed}" for check in found]
    return True, "; ".join(said) or "not known", "advised: point-in-time recovery and deletion protection"


async def _canary(sources: Sources) -> Answer:
    outcomes = await sources.canary()
    red = [f"{outcome.store}: {outcome.problem}" for outcome in outcomes if outcome.problem]
    seen = "; ".join(red) if red else f"written, read back equal and taken back in {len(outcomes)} stores"
    return not red, seen, "a record written, read back with all fields equal, and taken back, in both stores"


class KeptCanary:
    """The canary's last outcome for a few seconds, because a held step is looked at again and again."""

    def __init__(self, run: TryCanary, clock: Clock) -> None:
        self._run = run
        self._clock = clock
        self._last: tuple[float, Sequence[CanaryOutcome]] | None = None

    async def __call__(self) -> Sequence[CanaryOutcome]:
        """The kept outcome, or a new one."""
        now = self._clock.monotonic()
        if self._last is None or now - self._last[0] >= _CANARY_KEPT:
            self._last = (now, await self._run())
        return self._last[1]


# --- the ledgers -----------------------------------------------------------------------------------------------------


def _no_gap(store: StoreName) -> Look:
    async def look(sources: Sources) -> Answer:
        lines, unread = await _gaps(sources)
        open_lines = [line for line in lines if line.store == store and line.open]
        kinds: Counter[str] = Counter()
        for line in open_lines:
            kinds[line.kind] += line.open
        seen = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        hours = len({line.hour for line in open_lines})
        observed = f"{seen} records in {hours} hours" if seen else "no open gap"
        if open_lines:
            observed += await _copied(sources, store)
        if unread:
            observed += f"; not read: {unread}"
        return not open_lines, observed, f"no gap of {store}: close it with `sidecar backfill`"

    return look


async def _gaps(sources: Sources) -> tuple[Sequence[GapLine], str]:
    """All lines. The ledger of the store that decides must answer; why the other did not is said."""
    deciding = AUTHORITY[sources.phase()]
    lines: list[GapLine] = list(await sources.ledgers[deciding].gaps())
    unread = ""
    for store in STORES:
        if store == deciding:
            continue
        try:
            lines += await sources.ledgers[store].gaps()
        except StoreError as error:
            unread = str(error)  # in the dual phases PostgreSQL has every line (``sidecar.not_owed``)
    return summed(lines), unread


async def _copied(sources: Sources, store: StoreName) -> str:
    copy = await sources.evidence.copies.copy(store)
    if copy is None:
        return "; nothing was ever copied there"
    state = "under way or interrupted" if copy.finished_us is None else f"finished {timestamp_text(copy.finished_us)}"
    left = "" if copy.left is None else f", {copy.left} left"
    refused = f", refused: {_counted(copy.refused)}" if copy.refused else ""
    return f"; the last copy {state}: {copy.copied} copied{left}{refused}"


# --- what instances report -------------------------------------------------------------------------------------------


async def _lag(sources: Sources) -> Answer:
    bound = sources.settings().max_lag
    late = [
        f"{report.instance}: {store} {age:.0f} s"
        for report in sources.reports()
        for store, age in sorted(report.oldest_s.items())
        if report.works and age > bound
    ]
    return not late, _some(late) or "no older record is pending", f"no record pending for more than {bound:g} s"


def _nothing_pending(store: StoreName) -> Look:
    async def look(sources: Sources) -> Answer:
        bound = sources.settings().max_lag
        left = []
        for report in sources.reports():
            pending, age = report.pending.get(store, 0), report.oldest_s.get(store, 0.0)
            if pending and (not report.works or age > bound):
                left.append(f"{report.instance}{'' if report.works else ' (gone)'}: {pending} pending for {age:.0f} s")
        required = f"nothing pending for {store} but what was accepted in the last {bound:g} s"
        return not left, _some(left) or "nothing older is pending", required

    return look


def _nobody_stranded(store: StoreName) -> Look:
    """Records that the store is not owed, on the volume of an instance that is gone: no ledger has them yet."""

    async def look(sources: Sources) -> Answer:
        left = [
            f"{report.instance}: {sum(report.pending.values())} pending"
            for report in sources.reports()
            if not report.works and any(report.pending.values()) and report.phase is not None
            if store not in TABLE[report.phase].owed
        ]
        required = f"no instance gone with records that {store} is not owed: start it again, or `sidecar drain`"
        return not left, _some(left) or "none", required

    return look


def _no_dead_letters(store: StoreName) -> Look:
    async def look(sources: Sources) -> Answer:
        dead = [f"{report.instance}: {n}" for report in sources.reports() if (n := report.dead_letters.get(store, 0))]
        required = f"no dead letters for {store}: `sidecar dead-letter ls`, then redrive or discard with a reason"
        return not dead, _some(dead) or "none", required

    return look


async def _shadow(sources: Sources) -> Answer:
    wanted = sources.settings().min_shadow_reads
    reports = sources.reports()
    compared = sum(report.compared for report in reports)
    unexplained = sum(report.unexplained for report in reports)
    return (
        unexplained == 0 and compared >= wanted,
        f"{compared} compared, {unexplained} unexplained mismatches",
        f"at least {wanted} compared since the instances started, 0 unexplained: see shadow_reads in /status",
    )


# --- what was validated ----------------------------------------------------------------------------------------------

_VALIDATE: Final = "validator has not run: run `sidecar validate`"


async def _days(sources: Sources) -> Answer:
    verdicts = await sources.evidence.validations.days()
    required = "every UTC day validated clean since its last late write"
    if verdicts is None:
        return False, _VALIDATE, required
    return not (verdicts.unclean or verdicts.stale), _days_seen(verdicts), required


def _days_seen(verdicts: DayVerdicts) -> str:
    parts = [f"{verdicts.days} days"]
    for name, days in (("with differences", verdicts.unclean), ("not validated since the last write", verdicts.stale)):
        if days:
            parts.append(f"{len(days)} {name} ({_some([_day(day) for day in days])})")
    return ", ".join(parts) if len(parts) > 1 else f"{parts[0]}, all clean"


async def _tail(sources: Sources) -> Answer:
    tail = await sources.evidence.validations.tail()
    most = sources.settings().max_validation_age
    required = f"the last 48 h validated clean, at most {most:g} s ago"
    if tail is None:
        return False, _VALIDATE, required
    age = (sources.clock.now_us() - tail.finished_us) / 1e6
    reach = (tail.end_us - tail.start_us) / 3.6e9
    observed = f"{tail.unexpected} unexplained differences in {reach:.0f} h, {max(0.0, age):.0f} s ago"
    reaches = tail.end_us - tail.start_us >= _TAIL_US and sources.clock.now_us() - tail.end_us <= most * 1e6 + _TAIL_US
    return tail.clean and age <= most and reaches, observed, required


async def _feasible(sources: Sources) -> Answer:
    found = await sources.evidence.copies.feasibility()
    required = "a dry run of the way back in which PostgreSQL would refuse no record"
    if found is None:
        return False, "no dry run yet: run `sidecar backfill --from dynamodb --dry-run`", required
    refused = _counted(found.refused)
    return not refused, f"{found.looked_at} looked at, refused: {refused or 'none'}", required


async def _quiet(sources: Sources) -> Answer:
    wanted = sources.settings().min_quiet
    required = f"no writer but this fleet for {wanted:g} s on an adopted table"
    writers = await sources.evidence.writers.old_writers()
    if writers is None:
        return True, "the table is the sidecar's own", required
    since = max(writers.watched_since_us, writers.last_seen_us or 0)
    quiet = (sources.clock.now_us() - since) / 1e6
    seen = "none seen" if writers.last_seen_us is None else f"last seen {timestamp_text(writers.last_seen_us)}"
    return quiet >= wanted, f"{seen}, watched since {timestamp_text(writers.watched_since_us)}", required


async def _soaked(sources: Sources) -> Answer:
    wanted = sources.settings().min_soak
    since = sources.in_force_since_us()
    required = f"{timedelta(seconds=wanted)} in {sources.phase().label}"
    if since is None:
        return False, "it is not known since when", required
    passed = max(0, sources.clock.now_us() - since) / 1e6
    return passed >= wanted, f"{timedelta(seconds=int(passed))} since {timestamp_text(since)}", required


# --- the table -------------------------------------------------------------------------------------------------------


def _is_key(check: Check) -> bool:
    return check.name == "postgres.key"


def _all(_check: Check) -> bool:
    return True


STEPS: Final[Mapping[Step, tuple[Rule, ...]]] = MappingProxyType(
    {
        (Phase.SQL_ONLY, Phase.DUAL_WRITE): (
            Rule("dynamodb_ready", _ready(DYNAMODB, _all, "table and indexes ACTIVE with the expected keys")),
            Rule("log_id_unique", _ready(POSTGRES, _is_key, "log_id unique in PostgreSQL")),
            Rule("canary", _canary),
            Rule("point_in_time_recovery", _point_in_time),
        ),
        (Phase.DUAL_WRITE, Phase.DUAL_WRITE_READ_DYNAMO): (
            Rule("no_open_gap", _no_gap(DYNAMODB)),
            Rule("nobody_stranded", _nobody_stranded(DYNAMODB)),
            Rule("days_validated", _days),
            Rule("tail_validated", _tail),
            Rule("lag", _lag),
            Rule("no_dead_letters", _no_dead_letters(DYNAMODB)),
            Rule("shadow_reads", _shadow),
            Rule("old_writers_quiet", _quiet),
        ),
        (Phase.DUAL_WRITE_READ_DYNAMO, Phase.DYNAMO_ONLY): (
            Rule("soaked", _soaked),
            Rule("nothing_pending", _nothing_pending(POSTGRES)),
            Rule("no_dead_letters", _no_dead_letters(POSTGRES)),
            Rule("days_validated", _days),
            Rule("tail_validated", _tail),
            Rule("reverse_feasible", _feasible),
        ),
        (Phase.DYNAMO_ONLY, Phase.DUAL_WRITE_READ_DYNAMO): (Rule("postgres_reachable", _reachable),),
        (Phase.DUAL_WRITE_READ_DYNAMO, Phase.DUAL_WRITE): (
            Rule("no_open_gap", _no_gap(POSTGRES)),
            Rule("nobody_stranded", _nobody_stranded(POSTGRES)),
        ),
        (Phase.DUAL_WRITE, Phase.SQL_ONLY): (),
    }
)
"""Every step, and what is looked at before it. 1->0 is always open: it opens a gap, and needs nobody."""

NAMES: Final = tuple(dict.fromkeys(rule.name for rules in STEPS.values() for rule in rules))
"""Every gate's name, for labels."""


@dataclass(frozen=True, slots=True)
class Gate:
    """One rule of one step with its sources: ``sidecar.migration.Gate`` and ``sidecar.fleet.StepGate``."""

    rule: Rule
    step: Step
    sources: Sources

    @property
    def name(self) -> str:
        """As it is reported."""
        return self.rule.name

    @property
    def steps(self) -> frozenset[Step]:
        """The one step."""
        return frozenset({self.step})

    async def evaluate(self) -> GateResult:
        """Look now; what cannot be looked at is red."""
        try:
            ok, observed, required = await self.rule.look(self.sources)
        except SidecarError as error:
            return GateResult(self.name, ok=False, observed=str(error), required="an answer")
        return GateResult(self.name, ok, observed, required)


def build_gates(sources: Sources) -> Sequence[Gate]:
    """All gates of all steps."""
    return [Gate(rule, step, sources) for step, rules in STEPS.items() for rule in rules]


def _some(items: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = len(items) - _NAMED
    return "; ".join(items[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items()) if n)


def _day(day: int) -> str:
    return (_EPOCH + timedelta(days=day)).date().isoformat()

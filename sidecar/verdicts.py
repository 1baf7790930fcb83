"""What validations leave behind: a verdict for each UTC day, a line for each run, and which days were written to since.

Kept in one store, DynamoDB's fleet table (``sidecar.stores.dynamodb_verdicts``): a validation needs both stores anyway,
phase 3 no longer writes PostgreSQL, and one home cannot contradict itself. Below the stores in the layers, as the gap
ledger is.

MEANING. "Everything is clean" is the sum of the days: each has a verdict of the whole day that began after the last
write to that day. So a write to a day that is over (a late record, a repair, a backfill) is noted here with its time,
and a verdict that began before it is stale. Times are wall-clock microseconds; where two machines' clocks are compared
``CLOCKS`` is allowed for, to the disadvantage of the verdict.

FORMAT. Values are JSON; a field that a newer version added is skipped when it is read.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, Protocol

import msgspec

from sidecar.clock import Clock

DAY_US: Final = 86_400_000_000
CLOCKS: Final = 60_000_000  # microseconds that the wall clocks of two machines may differ by
_FRESH: Final = 10.0  # seconds for which what was noted of a day is true enough: a sixth of CLOCKS
EXAMPLES: Final = (
    100  # differences kept with a run and shown by default; a limit of what is shown, never of what is compared
)

Outcome = Literal["running", "clean", "divergent", "undecided", "stopped", "failed"]


class DayVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """How the last validation of one UTC day ended."""

    day: int  # days since the epoch
    started_us: int  # when the run that compared it began to read
    finished_us: int
    until_us: int  # what was compared of the day ends here: its end, or earlier for a day that was not over
    sql_records: int
    dynamo_records: int
    reasons: dict[str, int] = {}
    deep: bool = False
    run: str = ""

    @property
    def whole(self) -> bool:
        """Whether the day was over when it was compared."""
        return self.until_us >= (self.day + 1) * DAY_US


class Example(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One difference as it is shown: identity, reason, names of fields; values only where they were asked for."""

    log_id: str
    log_timestamp: str
    reason: str
    present_in: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    detail: str = ""
    values: dict[str, dict[str, object]] | None = None


class RunLine(msgspec.Struct, frozen=True, kw_only=True):
    """One run: what it was asked, how far it came, what it found. Enough to go on where it stopped."""

    id: str
    start_us: int
    end_us: int  # exclusive
    everything: bool = False  # asked without a window: it found out which days there are
    deep: bool = False
    by: str = ""
    started_us: int = 0
    updated_us: int = 0
    finished_us: int | None = None
    outcome: Outcome = "running"
    error: str = ""
    next_us: int = 0  # everything before it has been compared
    sql_records: int = 0
    dynamo_records: int = 0
    matched: int = 0
    reasons: dict[str, int] = {}
    today: dict[str, int] = {}  # counts of the day that ``next_us`` is in, so far
    today_reasons: dict[str, int] = {}
    gaps_used: dict[str, int] = {}  # store/hour -> records that its open gap explained, of the hour of ``next_us``
    examples: tuple[Example, ...] = ()
    warnings: tuple[str, ...] = ()


class ValidationLedger(Protocol):
    """Where verdicts are kept. Every method raises ``StoreError`` and nothing else, within the store's timeouts.

    Reads see every write that was answered before they began. A write that failed may have been done: repeat it.
    """

    async def put_days(self, verdicts: Sequence[DayVerdict]) -> None:
        """Keep each, unless the day has one that began later."""
        ...

    async def days(self) -> Sequence[DayVerdict]:
        """All of them, by day."""
        ...

    async def put_run(self, line: RunLine) -> None:
        """Keep or replace the line of this run."""
        ...

    async def runs(self, limit: int) -> Sequence[RunLine]:
        """The last ones, newest first."""
        ...

    async def baseline(self) -> RunLine | None:
        """The last finished run over everything: it found out which days there are."""
        ...

    async def note_writes(self, days: Mapping[int, int]) -> None:
        """Day -> when a record of it was last written; a later time that is known already stays."""
        ...

    async def writes(self) -> Mapping[int, int]:
        """What was noted."""
        ...


class WrittenDays:
    """Notes the days that a backfill or a repair writes to, before it writes: whatever ends it then, they are stale.

    A day is noted anew while it is written to, every ``_FRESH`` seconds: the time that is known of it is never more
    than that, and the length of one call, behind the last write. So a verdict that began before that write does not
    stand, by a margin of which three quarters are left for clocks.
    """

    def __init__(self, ledger: "ValidationLedger", clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock
        self._noted: dict[int, float] = {}  # day -> monotonic seconds

    async def before(self, times: Iterable[int]) -> None:
        """Call it before records of these log_timestamps are written. Raises StoreError: then they must not be."""
        asked, now_us = self._clock.monotonic(), self._clock.now_us()
        never = asked - 2 * _FRESH
        due = {day: now_us for day in {us // DAY_US for us in times} if asked - self._noted.get(day, never) > _FRESH}
        if due:
            await self._ledger.note_writes(due)
            self._noted.update(dict.fromkeys(due, asked))


class KeepsVerdicts(Protocol):
    """A store that keeps verdicts beside its records."""

    @property
    def verdicts(self) -> ValidationLedger:
        """The ledger; the store's ``create`` makes what it needs."""
        ...


class MemoryLedger:
    """The port in memory: the reference that the contract test compares the store with. Not durable."""

    def __init__(self) -> None:
        self._days: dict[int, DayVerdict] = {}
        self._runs: dict[str, RunLine] = {}
        self._writes: dict[int, int] = {}
        self._baseline: RunLine | None = None

    async def put_days(self, verdicts: Sequence[DayVerdict]) -> None:
        """The one that began last stays."""
        for verdict in verdicts:
            known = self._days.get(verdict.day)
            if known is None or known.started_us <= verdict.started_us:
                self._days[verdict.day] = verdict

    async def days(self) -> Sequence[DayVerdict]:
        """By day."""
        return [self._days[day] for day in sorted(self._days)]

    async def put_run(self, line: RunLine) -> None:
        """By id."""
        self._runs[line.id] = line
        if line.everything and line.finished_us is not None:
            self._baseline = line

    async def runs(self, limit: int) -> Sequence[RunLine]:
        """Newest first."""
        return sorted(self._runs.values(), key=lambda line: (line.started_us, line.id), reverse=True)[:limit]

    async def baseline(self) -> RunLine | None:
        """The one that was put last."""
        return self._baseline

    async def note_writes(self, days: Mapping[int, int]) -> None:
        """The latest time stays."""
        for day, at_us in days.items():
            self._writes[day] = max(at_us, self._writes.get(day, 0))

    async def writes(self) -> Mapping[int, int]:
        """A copy."""
        return dict(self._writes)

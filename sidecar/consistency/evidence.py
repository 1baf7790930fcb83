"""What the verdicts add up to, for the gates of a phase change (``sidecar.evidence.Validations``).

Nothing is kept here: every answer is read from the ledger, so that any instance gives the same. A verdict that a write
may have overtaken, or that left records undecided, is stale: the answer never says more than was established.
"""

from collections.abc import Mapping
from typing import Final

from sidecar.clock import Clock
from sidecar.consistency.types import Reason
from sidecar.evidence import DayVerdicts, TailVerdict
from sidecar.verdicts import CLOCKS, DAY_US, DayVerdict, RunLine, ValidationLedger

_RUNS: Final = 50  # lines looked through for the last one of the newest records
_NEWEST: Final = 3_600_000_000  # microseconds: how far before its start a run may end and be of the newest records
REACH: Final = 2 * DAY_US  # how far back it has to reach
_HAS_A_GATE: Final = frozenset(
    {Reason.IN_FLIGHT, Reason.DEAD_LETTER, Reason.EXPECTED_GAP, Reason.EXPIRED, Reason.ACKNOWLEDGED}
)
"""Explained, or looked at by a gate of its own."""

_OPEN: Final = (Reason.IN_FLIGHT, Reason.IN_FLIGHT_UNKNOWN, Reason.EXPECTED_GAP)
"""A day with one of these has to be compared again."""


def unexplained(reasons: Mapping[str, int]) -> int:
    """Differences that nothing explains."""
    return sum(number for name, number in reasons.items() if Reason(name) not in _HAS_A_GATE)


def stands(verdict: DayVerdict, written_us: int | None) -> bool:
    """Whether a day's verdict still says something: of the whole day, all decided, and nothing written since.

    What lay in an open gap was not decided either: once the gap is filled, the day has to be compared again.
    """
    decided = not any(verdict.reasons.get(reason.value) for reason in _OPEN)
    return verdict.whole and decided and (written_us is None or written_us < verdict.started_us - CLOCKS)


class Validations:
    """See ``sidecar.evidence.Validations``. Every method raises StoreError."""

    def __init__(self, ledger: ValidationLedger, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock

    async def tail(self) -> TailVerdict | None:
        """The newest finished run whose window ended when it began and reached at least 48 h back."""
        line = next((each for each in await self._ledger.runs(_RUNS) if _of_the_newest(each)), None)
        if line is None or line.finished_us is None:
            return None
        return TailVerdict(
            start_us=line.start_us,
            end_us=line.end_us,
            finished_us=line.finished_us,
            compared=line.sql_records + line.dynamo_records - line.matched,
            unexpected=unexplained(line.reasons),
            run=line.id,
        )

    async def days(self) -> DayVerdicts | None:
        """Every day that is over and holds a record, or was written to; None before a first run over everything."""
        baseline = await self._ledger.baseline()
        if baseline is None:
            return None
        verdicts = {verdict.day: verdict for verdict in await self._ledger.days()}
        writes = await self._ledger.writes()
        today = self._clock.now_us() // DAY_US
        since = range(baseline.end_us // DAY_US, today)
        stale, unclean, counted = [], [], []
        for day in sorted(verdicts.keys() | writes.keys() | set(since)):
            verdict = verdicts.get(day)
            if day >= today:
                continue
            if verdict is None or not stands(verdict, writes.get(day)):
                stale.append(day)
            elif unexplained(verdict.reasons):
                unclean.append(day)
            if verdict is not None and (verdict.sql_records or verdict.dynamo_records):
                counted.append(verdict)
        holds = {verdict.day for verdict in counted} | set(stale)
        oldest = min((verdict.finished_us for verdict in counted if verdict.day not in stale), default=None)
        return DayVerdicts(days=len(holds), unclean=tuple(unclean), stale=tuple(stale), oldest_us=oldest)


def _of_the_newest(line: RunLine) -> bool:
    return (
        line.finished_us is not None
        and line.end_us - line.start_us >= REACH
        and line.end_us >= line.started_us - _NEWEST
    )

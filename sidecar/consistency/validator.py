"""One validation: scan both stores, look at what they disagree on, say what is left, by UTC day.

STAGES, repeated over stretches of the window: both scans side by side (``merge``) until there are enough candidates,
enough time has passed, or the end; then the candidates are decided (``explain``), and a checkpoint is kept in the
ledger: everything before ``next_us`` is compared, its counts and verdicts are there. A crash or a stop at any point
loses what came after the last checkpoint; ``resume`` goes on from there and comes to the same result.

INVARIANTS
* Every id of the window that either scan gives is compared; the limit of examples limits what is shown alone.
* A verdict of a day is written only when the whole stretch of that day that lies in the window was compared, and the
  window covers the day from its first instant.
* Clean is said only at the end, and only of a run in which nothing failed: a StoreError ends the run as ``failed``.

BOUNDS: memory by ``_CANDIDATES`` (some 300 bytes each) and ``explain.PART`` (two records each); the stores' load by
``rate`` (records of either store a second).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final, cast

import msgspec

from sidecar.clock import Clock
from sidecar.consistency import report
from sidecar.consistency.explain import HOUR_US, Explainer, Gaps, Rules, Whereabouts
from sidecar.consistency.merge import Merge, Tally
from sidecar.consistency.patience import PASSING, TRIES, patiently, pause
from sidecar.consistency.types import Candidate, Difference, Window, outcome_of
from sidecar.errors import SidecarError, StoreError
from sidecar.gaps import GapLine
from sidecar.phase import DYNAMODB, POSTGRES, StoreName
from sidecar.stores.base import ScanEntry, Store
from sidecar.verdicts import DAY_US, EXAMPLES, DayVerdict, Outcome, RunLine, ValidationLedger

_STEP: Final = 128  # entries compared without a pause: half a millisecond, and a live sidecar's answers wait for it
_BEHIND: Final = 0.1  # seconds of its rate that a run which was held up may catch up at once
_CANDIDATES: Final = 32_768  # kept in memory before they are decided
_EMPTY_DAYS: Final = 62  # the widest window, in days, in which days without a record get a verdict too
_TRIES_OF_A_LONG_ONE: Final = 10  # of a run that has come somewhere: four minutes
_LAST_WORDS: Final = 2.0  # seconds for the line of a run that was stopped or failed
_STRETCH: Final = 60.0  # seconds after which candidates are decided and a checkpoint is kept


@dataclass(frozen=True, slots=True)
class Options:
    """What a run is asked for."""

    deep: bool = False  # read the records themselves and hash them; else DynamoDB's stored digests are believed
    rate: float = 0.0  # records of either store a second; 0: as fast as they come
    examples: int = EXAMPLES  # differences shown
    reveal: bool = False  # show the values that differ: only where that was audited
    by: str = ""  # who asked
    trust_gaps: bool = True  # False: a record in an open gap is missing all the same (before a gap is closed)
    keep: bool = True  # keep verdicts and checkpoints in the ledger


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    at_us: int  # time of the records compared now
    compared: int  # entries of either store, in this process
    differences: int


class Validator:
    """Validates windows; holds no state between runs.

    Args:
        stores: by name.
        whereabouts: what the sidecars know of records.
        gaps: the open lines of every ledger.
        ledger: where verdicts are kept.
        rules: patience and retention, asked at each run.
        clock: time.
        new_id: names of runs.
    """

    def __init__(
        self,
        stores: Mapping[StoreName, Store],
        whereabouts: Whereabouts,
        gaps: Gaps,
        ledger: ValidationLedger,
        *,
        rules: Callable[[], Rules],
        clock: Clock,
        new_id: Callable[[], str],
    ) -> None:
        self._stores = stores
        self._whereabouts = whereabouts
        self._gaps = gaps
        self._ledger = ledger
        self._rules = rules
        self._clock = clock
        self._new_id = new_id

    async def resumable(self, window: Window | None = None) -> RunLine | None:
        """The newest run that did not finish, of this window where one is given. Raises StoreError."""
        for line in await self._ledger.runs(50):
            if line.finished_us is None and (
                window is None
                or (line.everything and window.everything)
                or (line.start_us, line.end_us) == (window.start_us, window.end_us)
            ):
                return line
        return None

    async def run(
        self,
        window: Window,
        options: Options,
        *,
        resume: RunLine | None = None,
        progress: Callable[[Progress], None] = lambda _: None,
        found: Callable[[Sequence[Difference]], Awaitable[None]] | None = None,
    ) -> RunLine:
        """Compare; the finished line. ``found`` is given every difference, shown or not.

        Raises:
            StoreError: a store did not answer; the line is kept as ``failed`` where the ledger can be written.
        """
        now = self._clock.now_us()
        if resume is None:
            line = RunLine(
                id=self._new_id(),
                start_us=window.start_us,
                end_us=window.end_us,
                everything=window.everything,
                deep=options.deep,
                by=options.by,
                started_us=now,
                updated_us=now,
                next_us=window.start_us,
            )
        else:
            window = Window(resume.start_us, resume.end_us, resume.everything)
            options = replace(options, deep=resume.deep)
            line = msgspec.structs.replace(resume, outcome="running", error="", updated_us=now)
        run = _Run(self._stores, self._ledger, line, options, self._clock)
        gaps = self._gaps if options.trust_gaps else _no_gaps
        explainer = Explainer(
            self._stores, self._whereabouts, gaps, window=window, rules=self._rules(), clock=self._clock
        )
        await run.keep()
        try:
            await run.compare(explainer, progress, found)
        except BaseException as error:
            # Whatever ended it, also a cancellation: the line says how far it came; clean it is not.
            outcome: Outcome = "failed" if isinstance(error, SidecarError) else "stopped"
            run.line = msgspec.structs.replace(
                run.line,
                outcome=outcome,
                error=str(error) if isinstance(error, SidecarError) else "",
                finished_us=None,
            )
            with contextlib.suppress(SidecarError, TimeoutError):
                async with asyncio.timeout(_LAST_WORDS):  # a sidecar that stops must not wait for a store that is down
                    await run.keep()
            raise
        return run.line


async def _no_gaps() -> Sequence[GapLine]:
    return ()


class _Run:
    """One run under way."""

    def __init__(
        self,
        stores: Mapping[StoreName, Store],
        ledger: ValidationLedger,
        line: RunLine,
        options: Options,
        clock: Clock,
    ) -> None:
        self._stores = stores
        self._ledger = ledger
        self._options = options
        self._clock = clock
        self.line = line
        self._safe = line  # as of the last checkpoint
        self._tallies: dict[int, Tally] = {}
        self._next_day = 0

    def _load(self, explainer: Explainer) -> None:
        """Go on from what the line says."""
        line = self.line
        self._tallies = {}
        if line.today:
            counts = Tally(line.today["sql"], line.today["dynamo"], line.today["matched"])
            counts.reasons.update(line.today_reasons)
            self._tallies[line.next_us // DAY_US] = counts
        self._next_day = max(-(-line.start_us // DAY_US), line.next_us // DAY_US)
        explainer.used.clear()
        for name, number in line.gaps_used.items():
            store, _, hour = name.partition("/")
            explainer.used[cast("StoreName", store), int(hour)] = number

    async def keep(self) -> None:
        """Keep the line."""
        if self._options.keep:
            self.line = msgspec.structs.replace(self.line, updated_us=self._clock.now_us())
            await patiently(lambda: self._ledger.put_run(self.line), self._clock)

    async def compare(
        self,
        explainer: Explainer,
        progress: Callable[[Progress], None],
        found: Callable[[Sequence[Difference]], Awaitable[None]] | None,
    ) -> None:
        """Stretch by stretch to the end of the window; from the last checkpoint again after a passing failure."""
        attempt, began = 0, self.line.next_us
        while True:
            before = self.line
            self._load(explainer)
            try:
                await self._pass(explainer, progress, found)
                break
            except StoreError as error:
                attempt = 0 if self._safe.next_us > before.next_us else attempt + 1
                self.line = self._safe
                tries = _TRIES_OF_A_LONG_ONE if self._safe.next_us > began else TRIES
                if error.retry_class not in PASSING or attempt == tries:
                    raise
            await self._clock.sleep(pause(attempt))
        reasons = self.line.reasons
        self.line = msgspec.structs.replace(
            self.line, outcome=outcome_of(reasons), finished_us=self._clock.now_us(), today={}, today_reasons={}
        )
        await self.keep()

    async def _pass(
        self,
        explainer: Explainer,
        progress: Callable[[Progress], None],
        found: Callable[[Sequence[Difference]], Awaitable[None]] | None,
    ) -> None:
        start, end = self.line.next_us, self.line.end_us
        self._safe = self.line
        scans = [self._scan(self._stores[name], start, end) for name in (POSTGRES, DYNAMODB)]
        merge = Merge(scans[0], scans[1], self._tallies)
        pace = _Pace(self._options.rate, self._clock)
        total = sum(self.line.reasons.values())
        try:
            more = True
            while more:
                candidates: list[Candidate] = []
                until = self._clock.monotonic() + _STRETCH
                stretch = True
                while stretch:
                    before = merge.compared
                    candidates += await merge.advance(_STEP)
                    more = not merge.done
                    stretch = more and len(candidates) < _CANDIDATES and self._clock.monotonic() < until
                    progress(Progress(merge.position_us or end, merge.compared, total))
                    await pace.took(merge.compared - before)
                async with aclosing(explainer.differences(candidates, self._clock.monotonic())) as parts:
                    async for differences in parts:
                        if found is not None:
                            await found(differences)
                        total += len(differences)
                        self._count(differences, explainer)
                await self._checkpoint(merge.position_us, explainer)
                self._safe = self.line
        finally:
            await merge.close()

    def _scan(self, store: Store, start: int, end: int) -> AsyncIterator[ScanEntry]:
        return store.deep_scan(start, end) if self._options.deep else store.scan(start, end)

    def _count(self, differences: Sequence[Difference], explainer: Explainer) -> None:
        reasons = report.counted(self.line.reasons)
        examples = list(self.line.examples)
        for each in differences:
            reasons[each.reason.value] += 1
            self._tallies.setdefault(each.log_timestamp // DAY_US, Tally()).reasons[each.reason.value] += 1
            if len(examples) < self._options.examples:
                examples.append(report.example(each, reveal=self._options.reveal))
        warnings = dict.fromkeys((*self.line.warnings, *explainer.settled.warnings))
        self.line = msgspec.structs.replace(
            self.line, reasons=dict(reasons), examples=tuple(examples), warnings=tuple(warnings)
        )

    async def _checkpoint(self, position_us: int | None, explainer: Explainer) -> None:
        """Verdicts of the days that are over, the counts of the one that is not, where to go on."""
        line, end = self.line, self.line.end_us
        next_us = end if position_us is None else position_us
        day = next_us // DAY_US if position_us is not None else -(-end // DAY_US)
        over = self._days_over(day)
        if self._options.keep:
            verdicts = [self._verdict(d, end) for d in over]
            await patiently(lambda: self._ledger.put_days(verdicts), self._clock)
        counts = Tally()
        for d in [d for d in self._tallies if d < day]:
            tally = self._tallies.pop(d)
            counts.sql, counts.dynamo = counts.sql + tally.sql, counts.dynamo + tally.dynamo
            counts.matched += tally.matched
        self._next_day = max(self._next_day, day)
        today = self._tallies.get(day, Tally())
        self.line = msgspec.structs.replace(
            line,
            next_us=next_us,
            sql_records=line.sql_records + counts.sql,
            dynamo_records=line.dynamo_records + counts.dynamo,
            matched=line.matched + counts.matched,
            today={"sql": today.sql, "dynamo": today.dynamo, "matched": today.matched},
            today_reasons=dict(today.reasons),
            gaps_used={f"{s}/{h}": n for (s, h), n in explainer.used.items() if h >= next_us // HOUR_US},
        )
        await self.keep()

    def _days_over(self, day: int) -> Sequence[int]:
        """Days before ``day`` that the window covers from their first instant and that have no verdict of this run.

        Of a run over everything, or over years, only those with a record: before the first one is no end of days.
        """
        if self.line.end_us - self.line.start_us > _EMPTY_DAYS * DAY_US:
            return sorted(d for d in self._tallies if self._next_day <= d < day)
        return range(self._next_day, day)

    def _verdict(self, day: int, end: int) -> DayVerdict:
        tally = self._tallies.get(day, Tally())
        return DayVerdict(
            day=day,
            started_us=self.line.started_us,
            finished_us=self._clock.now_us(),
            until_us=min(end, (day + 1) * DAY_US),
            sql_records=tally.sql,
            dynamo_records=tally.dynamo,
            reasons=dict(tally.reasons),
            deep=self.line.deep,
            run=self.line.id,
        )


class _Pace:
    """So many records a second, evenly: what was not used up is not saved for a burst."""

    def __init__(self, rate: float, clock: Clock) -> None:
        self._rate = rate
        self._clock = clock
        self._due = clock.monotonic()

    async def took(self, records: int) -> None:
        """Wait for as long as these were too early; whoever else has something to do in this process comes first."""
        if not self._rate:
            await self._clock.sleep(0)
            return
        now = self._clock.monotonic()
        self._due = max(self._due, now - _BEHIND) + records / self._rate
        await self._clock.sleep(max(0.0, self._due - now))

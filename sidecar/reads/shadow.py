"""Shadow reads: a share of the reads is repeated on the store that did not serve, compared, classified and counted.

OFF THE REQUEST'S PATH. ``offer`` puts a served answer into a small queue and returns. Where the queue is full or holds
too many bytes, or the other store is in trouble, the read is skipped and counted as such; so is a count over all
services, which may read a whole index. One comparison is under way at a time and each is followed by a pause of its own
length, so shadowing has at most half of one task's time.

BACKING OFF. ``trouble`` (given by the wiring) says why the other store should be left alone: delivery to it lags,
is throttled, down or blocked. An error, a throttle or a slow answer halves the share (``Pace``).

PROOF OF A MISMATCH. A difference is looked at again after ``RECHECK`` seconds, on both stores; gone, it was
``in_flight``. What remains is split by record: one that this sidecar still owes, or one younger than
``phases.max_lag``, may still be on its way; one that the store which lacks it keeps no longer has ``expired``; one in
an open gap of that store is known to be missing there (``expected_gap``); any other is a mismatch. Ids and field names
of the last mismatches are kept for ``/status``; values never are.

THE PROBE. An application that only writes gives nothing to repeat. So where no comparison was made for
``reads.shadow_probe`` seconds, a record is taken from the serving store, and a question that it answers to is put to
both; the patterns take turns.
"""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from sidecar.clock import Clock
from sidecar.errors import StoreError
from sidecar.metrics import Metrics
from sidecar.phase import DYNAMODB, Policy, StoreName
from sidecar.reads.compare import MISMATCHES, Differences, Outcome, compare
from sidecar.reads.pace import Pace
from sidecar.reads.questions import ById, CountOf, PageOf, Question, Result, ask_within
from sidecar.record import LogRecord, timestamp_text
from sidecar.screening.identity import version7_time
from sidecar.settings import Settings
from sidecar.stores.base import ByApplication, ByCorrelation, ByService, ErrorsOn, Query, Store

RECHECK: Final = 1.0  # seconds before a difference is looked at again
_QUEUED: Final = 8  # answers that wait to be compared
_QUEUED_BYTES: Final = 8 * 1024 * 1024
_SLOW_FACTOR: Final = 4
_SLOW_AT_LEAST: Final = 0.5  # seconds; faster is never called slow
_COMPARED: Final = frozenset({Outcome.MATCH, Outcome.IN_FLIGHT, Outcome.EXPIRED, Outcome.EXPECTED_GAP}) | MISMATCHES
_KEPT: Final = 20  # mismatches shown in /status
_NAMED: Final = 10  # ids of one mismatch shown
_DAY_US: Final = 86_400_000_000
_HOUR_US: Final = 3_600_000_000
_PROBE_LIMIT: Final = 20


@dataclass(frozen=True, slots=True)
class Served:
    """A read that was answered. ``seconds`` is what the store took."""

    question: Question
    result: Result
    served_by: StoreName
    policy: Policy
    seconds: float


@dataclass(frozen=True, slots=True)
class Mismatch:
    """What ``/status`` shows of a comparison; no value of a record."""

    at: str
    pattern: str
    result: str
    served_by: str
    compared_with: str
    missing: tuple[str, ...] = ()  # log_ids, or groups of a count with how many
    extra: tuple[str, ...] = ()
    changed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    reason: str = ""  # of an error; names no value


class Shadow:
    """See the module. ``offer`` and ``status`` never wait; ``run`` until cancelled.

    Args:
        stores: by name.
        settings: asked for each time.
        trouble: why a store should not be read from for comparison now, in one word of a fixed few, or None.
        owed: whether (log_id, log_timestamp) is known to be on its way to a store: pending here.
        gap: whether a store has an open gap between two times of log_timestamp, both inclusive, microseconds.
        clock: time. metrics: where the classes are counted. rng: the sampling.
    """

    def __init__(
        self,
        stores: Mapping[StoreName, Store],
        settings: Callable[[], Settings],
        policy: Callable[[], Policy | None],
        *,
        trouble: Callable[[StoreName], str | None],
        owed: Callable[[str, int, StoreName], Awaitable[bool]],
        gap: Callable[[StoreName, int, int], Awaitable[bool]],
        clock: Clock,
        metrics: Metrics,
        rng: random.Random,
    ) -> None:
        self._stores = stores
        self._settings = settings
        self._policy = policy
        self._trouble = trouble
        self._owed = owed
        self._gap = gap
        self._clock = clock
        self._metrics = metrics
        self._rng = rng
        self._pace = Pace()
        self._queue: deque[Served] = deque()
        self._bytes = 0
        self._wake = asyncio.Event()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._skipped: Counter[str] = Counter()
        self._mismatches: deque[Mismatch] = deque(maxlen=_KEPT)
        self._turn = 0
        metrics.observe("shadow_sample_share", lambda: [((), self.share)])

    @property
    def share(self) -> float:
        """Share of reads that is repeated now."""
        return self._settings().reads.shadow_sample * self._pace.share

    def counts(self) -> Mapping[tuple[str, str], int]:
        """(pattern, result) -> comparisons of this process, for the gate of ``phases.min_shadow_reads``."""
        return dict(self._counts)

    def status(self) -> Mapping[str, object]:
        """The part of ``/status`` about shadow reads."""
        totals: Counter[str] = Counter()
        for (_, result), n in self._counts.items():
            totals[result] += n
        return {
            "sample_share": self.share,
            "results": dict(totals),
            "skipped": dict(self._skipped),
            "last_mismatches": list(self._mismatches),
        }

    def totals(self) -> Mapping[str, int]:
        """Reads ``compared`` since the start, and of these the mismatches that nothing explains."""
        compared = unexplained = 0
        for (_, result), n in self._counts.items():
            compared += n if result in _COMPARED else 0
            unexplained += n if result in MISMATCHES else 0
        return {"compared": compared, "unexplained": unexplained}

    def offer(self, served: Served) -> None:
        """Take a served read, or leave it; costs next to nothing where it is not sampled."""
        if not _others(served.policy) or self._rng.random() >= self.share:
            return
        if isinstance(served.question, CountOf) and served.question.query.service_name is None:
            self._skip("costly")
            return
        if len(self._queue) >= _QUEUED or self._bytes + served.result.weight > _QUEUED_BYTES:
            self._skip("queue")
            return
        self._put(served)

    async def run(self) -> None:
        """Compare what is offered; probe where nothing is."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._work())
            tasks.create_task(self._probing())

    # -- the worker ------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            while not self._queue:
                self._wake.clear()
                await self._wake.wait()
            served = self._queue.popleft()
            self._bytes -= served.result.weight
            started = self._clock.monotonic()
            for name in _others(served.policy):
                await self.compare_with(name, served)
            await self._clock.sleep(self._clock.monotonic() - started)

    async def compare_with(self, name: StoreName, served: Served) -> Outcome | None:
        """Put the question to another store and count what comes of it; None where that was left out."""
        trouble = self._trouble(name)
        if trouble is not None:
            self._skip(trouble)
            return None
        now = self._clock.monotonic
        started = now()
        differences = Differences()
        reason = ""
        try:
            other = await self._ask(name, served.question)
            took = now() - started
            differences = compare(served.result, other)
            if differences:
                outcome, differences = await self._explain(name, served, differences)
            elif took > max(_SLOW_AT_LEAST, _SLOW_FACTOR * served.seconds):
                outcome = Outcome.SLOW
            else:
                outcome = Outcome.MATCH
        except TimeoutError:
            outcome = Outcome.SLOW
        except StoreError as error:
            outcome, reason = Outcome.ERROR, str(error)
        if outcome in (Outcome.SLOW, Outcome.ERROR):
            self._pace.trouble(now())
        else:
            self._pace.calm(now())
        self._note(name, served, outcome, differences, reason)
        return outcome

    async def _ask(self, name: StoreName, question: Question) -> Result:
        return await ask_within(question, self._stores[name], self._settings().reads.timeout)

    async def _explain(self, name: StoreName, served: Served, first: Differences) -> tuple[Outcome, Differences]:
        """Whether a difference stays, and whether something on its way explains it."""
        await self._clock.sleep(RECHECK)
        again = compare(await self._ask(served.served_by, served.question), await self._ask(name, served.question))
        if not again:
            return Outcome.IN_FLIGHT, first
        if again.changed or (again.disordered and not again.missing and not again.extra):
            return again.outcome, again
        if served.question.pattern == "count":
            return await self._explained_count(name, served, again), again
        missing = {i: t for i, t in again.missing.items() if not await self._on_its_way(i, t, name)}
        extra = {i: t for i, t in again.extra.items() if not await self._on_its_way(i, t, served.served_by)}
        explained = Outcome.IN_FLIGHT
        if missing or extra:
            explained = Outcome.EXPIRED
            missing = {i: t for i, t in missing.items() if not self._expired(name, t)}
            extra = {i: t for i, t in extra.items() if not self._expired(served.served_by, t)}
        if missing or extra:
            explained = Outcome.EXPECTED_GAP
            missing = {i: t for i, t in missing.items() if not await self._gap(name, t, t)}
            extra = {i: t for i, t in extra.items() if not await self._gap(served.served_by, t, t)}
        changed = await self._moved(missing | extra, served.served_by, name)
        rest = Differences(
            {i: t for i, t in missing.items() if i not in changed},
            {i: t for i, t in extra.items() if i not in changed},
            changed,
        )
        return (rest.outcome, rest) if rest else (explained, again)

    async def _moved(
        self, suspects: Mapping[str, int], served_by: StoreName, name: StoreName
    ) -> dict[str, Mapping[str, str]]:
        """Records that both stores have by id and that differ there: a changed time or key moves a record elsewhere."""
        changed: dict[str, Mapping[str, str]] = {}
        for log_id in list(suspects)[:_NAMED]:
            question = ById(log_id)
            pair = compare(await self._ask(served_by, question), await self._ask(name, question))
            changed |= pair.changed
        return changed

    async def _on_its_way(self, log_id: str, log_timestamp: int, lacking: StoreName) -> bool:
        born = max(log_timestamp, version7_time(log_id) or log_timestamp)
        young = self._clock.now_us() - born < self._settings().phases.max_lag * 1e6
        return young or await self._owed(log_id, log_timestamp, lacking)

    def _expired(self, lacking: StoreName, log_timestamp: int) -> bool:
        """Whether a store keeps records of that time no longer."""
        settings = self._settings()
        days = settings.dynamodb.ttl_days if lacking == DYNAMODB else settings.validation.postgres_retention_days
        return days is not None and log_timestamp <= self._clock.now_us() - days * _DAY_US

    async def _explained_count(self, name: StoreName, served: Served, seen: Differences) -> Outcome:
        """What explains a count: a range that reaches into the last moments or past what is kept, or an open gap."""
        if (seen.missing and seen.extra) or not isinstance(served.question, CountOf):
            return seen.outcome
        asked = served.question.query
        lag = self._settings().phases.max_lag * 1e6
        if self._clock.now_us() - asked.end < lag or self._trouble(name) is not None:
            return Outcome.IN_FLIGHT
        lacking = name if seen.missing else served.served_by
        if self._expired(lacking, asked.start):
            return Outcome.EXPIRED
        return Outcome.EXPECTED_GAP if await self._gap(lacking, asked.start, asked.end) else seen.outcome

    # -- the probe -------------------------------------------------------------------------------------------------

    async def _probing(self) -> None:
        seen = -1
        while True:
            seconds = self._settings().reads.shadow_probe
            await self._clock.sleep(seconds or 1.0)
            compared = sum(self._counts.values())
            if seconds and compared == seen:
                await self.probe()
                compared = sum(self._counts.values())
            seen = compared

    async def probe(self) -> bool:
        """Put one question of the probe's own to both stores; False where there is nothing to ask or no use in it."""
        policy = self._policy()
        if policy is None or not _others(policy) or not self._settings().reads.shadow_sample:
            return False
        store = self._stores[policy.reads_from]
        settings = self._settings()
        before = self._clock.now_us() - int(settings.phases.max_lag * 1e6)
        try:
            async with asyncio.timeout(settings.reads.timeout):
                found = await store.sample(before=before, limit=_PROBE_LIMIT)
                if not found:
                    return False
                question = self._question(found[self._rng.randrange(len(found))])
                started = self._clock.monotonic()
                result = await question.ask(store)
        except (StoreError, TimeoutError):
            self._skip("probe")  # the serving store is in trouble: its own reads say so
            return False
        self._put(Served(question, result, policy.reads_from, policy, self._clock.monotonic() - started))
        return True

    def _question(self, record: LogRecord) -> Question:
        """A question that ``record`` answers to; each pattern in its turn, the id where the record has no such key."""
        self._turn += 1
        at = record.log_timestamp
        query: Query | None = None
        match self._turn % 5:
            case 0:
                query = ByService(record.service_name, at - _HOUR_US, at)
            case 1 if record.application_id is not None:
                query = ByApplication(record.application_id)
            case 2 if record.correlation_id is not None:
                query = ByCorrelation(record.correlation_id)
            case 3:
                query = ErrorsOn(at // _DAY_US)
        if query is None:
            return ById(record.log_id)
        return PageOf(query, None, _PROBE_LIMIT, self._settings().reads.max_page_bytes)

    # -- the books -------------------------------------------------------------------------------------------------

    def _put(self, served: Served) -> None:
        self._queue.append(served)
        self._bytes += served.result.weight
        self._wake.set()

    def _skip(self, why: str) -> None:
        self._skipped[why] += 1
        self._metrics.shadow_skipped.labels(why).inc()

    def _note(self, name: StoreName, served: Served, outcome: Outcome, seen: Differences, reason: str) -> None:
        pattern = served.question.pattern
        self._counts[pattern, outcome.value] += 1
        self._metrics.shadow_reads.labels(pattern, outcome.value).inc()
        if outcome not in MISMATCHES and outcome is not Outcome.ERROR:
            return
        count = pattern == "count"
        self._mismatches.append(
            Mismatch(
                at=timestamp_text(self._clock.now_us()),
                pattern=pattern,
                result=outcome.value,
                served_by=served.served_by,
                compared_with=name,
                missing=_named(seen.missing, count=count),
                extra=_named(seen.extra, count=count),
                changed=dict(list(seen.changed.items())[:_NAMED]),
                reason=reason,
            )
        )


def _named(found: Mapping[str, int], *, count: bool) -> tuple[str, ...]:
    """Ids; of a count only how many, because a group may be a service's name."""
    if count:
        return (str(sum(found.values())),) if found else ()
    return tuple(list(found)[:_NAMED])


def _others(policy: Policy) -> list[StoreName]:
    """The stores that hold what the serving one holds: those that the phase writes besides."""
    return [name for name in policy.writes if name != policy.reads_from]

"""Queries through the indexes: which partitions, merged newest first, then the bodies.

==================  ===========  ==============================================================================
query               index        partitions
==================  ===========  ==============================================================================
ByApplication       application  one
ByCorrelation       correlation  one
ErrorsOn            errors       the shards of that day
ByService           service      the shards of every UTC day of the range, newest day first, and no further than needed
==================  ===========  ==============================================================================

Each partition is ordered by (time, id), so the answer is a k-way merge that stops at ``limit``. Days are opened in
groups of 1, 2, 4 .. ``GROUP_DAYS``: a busy service reads its newest day only, a quiet one is not read day by day. A
range of more than ``WIDE_DAYS`` days first asks a scan of the index which days there are.

A hit whose body is not there: the body is read again, strongly consistent (the index can be ahead of a replica of the
table). Still missing, it has expired meanwhile, and is dropped; or it was deleted, and nobody deletes a log row but
operators and the canary, which the index follows within moments: the query fails as TRANSIENT rather than hide it.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from sidecar.errors import RetryClass
from sidecar.record import LogRecord
from sidecar.stores import dynamodb_errors as errors
from sidecar.stores import dynamodb_schema as schema
from sidecar.stores.base import ByApplication, ByCorrelation, ByService, ErrorsOn, Position, Query, Summary
from sidecar.stores.dynamodb_items import (
    DAY,
    application_key,
    correlation_key,
    day_number,
    day_text,
    errors_key,
    service_key,
    sort_key,
    split_service_key,
    split_sort_key,
    time_key,
)
from sidecar.stores.dynamodb_pages import FIRST_US, LAST_US, MAX_KEYS, Key, Pages, Partition, Span, span
from sidecar.stores.dynamodb_parallel import all_or_first_error
from sidecar.stores.dynamodb_shards import Schedule, ShardSchedule

GROUP_DAYS: Final = 8
WIDE_DAYS: Final = 400
_SPARE: Final = 8  # asked of each partition of several beyond its share: shards are not exactly even


@dataclass(frozen=True, slots=True)
class DaySpan:
    """The stretch of one UTC day (days since the epoch) that a range covers."""

    day: int
    span: Span


def day_spans(days: Iterable[int], start: int, end: int) -> list[DaySpan]:
    """What start..end (inclusive, microseconds) covers of each day, in the order of ``days``."""
    found = []
    for day in days:
        covered = span(max(start, day * DAY), min(end, (day + 1) * DAY - 1))
        if covered is not None:
            found.append(DaySpan(day, covered))
    return found


def service_partitions(schedule: Schedule, service_name: str, at: DaySpan) -> list[Partition]:
    """The shards of one day of one service."""
    date = day_text(at.day)
    return [
        Partition(schema.SERVICE, service_key(service_name, date, shard), at.span)
        for shard in range(schedule.fan_out(at.day))
    ]


def error_partitions(schedule: Schedule, at: DaySpan) -> list[Partition]:
    """The shards of one day of failures."""
    date = day_text(at.day)
    return [Partition(schema.ERRORS, errors_key(date, shard), at.span) for shard in range(schedule.fan_out(at.day))]


class Queries:
    """R1, R2, R3 and R5 of the specification. Every method raises StoreError."""

    def __init__(self, pages: Pages, shards: ShardSchedule) -> None:
        self._pages = pages
        self._shards = shards

    async def query(self, query: Query, *, before: Position | None, limit: int) -> Sequence[LogRecord]:
        """Up to ``limit`` records strictly after ``before``, newest first."""
        return await self.bodies(await self._hits(query, before, limit, None))

    async def summaries(self, query: Query, *, before: Position | None, limit: int) -> Sequence[Summary]:
        """The same from the index alone."""
        found: dict[str, Summary] = {}
        return [found[key] for key in await self._hits(query, before, limit, found)]

    async def sample(self, before: int, limit: int) -> Sequence[LogRecord]:
        """Some records with log_timestamp < before."""
        stretch = span(self._pages.visible_from(), before - 1)
        if stretch is None:
            return ()
        return await self.bodies(await self._pages.some(stretch, min(limit, MAX_KEYS)))

    async def _hits(
        self, query: Query, before: Position | None, limit: int, summaries: dict[str, Summary] | None
    ) -> list[str]:
        oldest = self._pages.visible_from()
        newest = LAST_US if before is None else before.log_timestamp
        past = None if before is None else sort_key(*before)
        match query:
            case ByApplication(application_id):
                groups = _one(schema.APPLICATION, application_key(application_id), span(oldest, newest))
            case ByCorrelation(correlation_id):
                groups = _one(schema.CORRELATION, correlation_key(correlation_id), span(oldest, newest))
            case ErrorsOn(day):
                schedule = await self._shards.current()
                groups = iter([error_partitions(schedule, at) for at in day_spans([day], oldest, newest)])
            case ByService(service_name, start, end):
                schedule = await self._shards.current()
                days = await self.service_days(service_name, max(start, oldest), min(end, newest))
                groups = _groups(schedule, service_name, days)
        return await self._merge(groups, past, limit, summaries)

    async def service_days(self, service_name: str, start: int, end: int) -> list[DaySpan]:
        """The days of start..end (inclusive, microseconds) in which a service may have records, newest first."""
        start, end = max(start, FIRST_US), min(end, LAST_US)
        days: Sequence[int] = range(end // DAY, start // DAY - 1, -1)
        stretch = span(start, end)
        if stretch is not None and len(days) > WIDE_DAYS:
            days = await self._days_present(service_name, stretch)
        return day_spans(days, start, end)

    async def _days_present(self, service_name: str, stretch: Span) -> Sequence[int]:
        """From a scan of the whole index, in parallel segments: days of this service, newest first."""
        scans = [
            self._pages.scan_hash_keys(stretch, segment, prefix=f"S#{service_name}#")
            for segment in range(self._pages.segments)
        ]
        keys = set[str]().union(*await all_or_first_error(scans))
        days = (day_number(date) for name, date in map(split_service_key, keys) if name == service_name)
        return sorted({day for day in days if day is not None}, reverse=True)

    async def _merge(
        self,
        groups: Iterator[list[Partition]],
        past: str | None,
        limit: int,
        summaries: dict[str, Summary] | None,
    ) -> list[str]:
        """The first ``limit`` sort keys of all groups; every key of a group is newer than those of the next."""
        found: list[str] = []
        for group in groups:
            runs = [_Run(self._pages, partition, past, summaries) for partition in _up_to(group, past)]
            share = limit if len(runs) == 1 else limit // max(len(runs), 1) + _SPARE
            while len(found) < limit:
                page = min(limit - len(found), share) + 1  # one more: the position itself is passed over
                await all_or_first_error([run.fill(page) for run in runs if not run.keys])
                runs = [run for run in runs if run.keys]
                if not runs:
                    break
                _drain(runs, found, limit)
            if len(found) == limit:
                break
        return found

    async def bodies(self, keys: Sequence[str]) -> list[LogRecord]:
        """The records of sort keys, in their order; see the module for a body that is not there."""
        ids = list(dict.fromkeys(split_sort_key(key)[1] for key in keys))
        found: dict[str, LogRecord] = {}
        chunks = [ids[i : i + MAX_KEYS] for i in range(0, len(ids), MAX_KEYS)]
        for part in await all_or_first_error([self._pages.bodies(chunk) for chunk in chunks]):
            found |= part
        missing = [log_id for log_id in ids if log_id not in found]
        if missing:
            found |= await self._read_again(missing, {log_id: time for time, log_id in map(split_sort_key, keys)})
        return [found[log_id] for log_id in ids if log_id in found]

    async def _read_again(self, missing: Sequence[str], times: dict[str, str]) -> dict[str, LogRecord]:
        """The bodies of hits that an eventually consistent read did not find; ``times`` by id."""
        found: dict[str, LogRecord] = {}
        for start in range(0, len(missing), MAX_KEYS):
            found |= await self._pages.bodies(missing[start : start + MAX_KEYS], consistent=True)
        visible = time_key(self._pages.visible_from())
        gone = sum(1 for log_id in missing if log_id not in found and times[log_id] >= visible)
        if gone:
            raise errors.error(
                RetryClass.TRANSIENT, f"the index names {gone} records that the table has not", "IndexAhead"
            )
        return found


class _Run:
    """One partition, read page by page, newest first."""

    def __init__(
        self, pages: Pages, partition: Partition, past: str | None, summaries: dict[str, Summary] | None
    ) -> None:
        self.keys: deque[str] = deque()
        self.exhausted = False
        self._pages = pages
        self._partition = partition
        self._past = past
        self._summaries = summaries
        self._after: Key | None = None

    async def fill(self, limit: int) -> None:
        """Read on until there is at least one key, or no more."""
        while not self.keys and not self.exhausted:
            found, self._after = await self._pages.newest(self._partition, limit, self._after, self._summaries)
            self.keys.extend(key for key in found if key != self._past)
            self.exhausted = self._after is None


def _up_to(group: Sequence[Partition], past: str | None) -> list[Partition]:
    """The group without what is newer than ``past``; the key conditions of the service know no "less than and"."""
    if past is None:
        return list(group)
    return [Partition(p.index, p.value, Span(p.span.low, min(p.span.high, past))) for p in group if p.span.low <= past]


def _drain(runs: Sequence[_Run], found: list[str], limit: int) -> None:
    """Move the newest keys over, until ``limit`` or until a run that has more to read is empty."""
    live = list(runs)
    while live and len(found) < limit:
        newest = max(live, key=_head)
        found.append(newest.keys.popleft())
        if not newest.keys:
            if not newest.exhausted:
                return
            live.remove(newest)


def _head(run: _Run) -> str:
    return run.keys[0]


def _one(index: schema.Index, value: str, stretch: Span | None) -> Iterator[list[Partition]]:
    return iter([] if stretch is None else [[Partition(index, value, stretch)]])


def _groups(schedule: Schedule, service_name: str, days: Sequence[DaySpan]) -> Iterator[list[Partition]]:
    size, start = 1, 0
    while start < len(days):
        group = days[start : start + size]
        yield [partition for at in group for partition in service_partitions(schedule, service_name, at)]
        start += size
        size = min(size * 2, GROUP_DAYS)

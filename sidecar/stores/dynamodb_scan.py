"""Enumeration of records by time, whatever their service: counts, and the ordered scan of a validation.

There is no registry of services: the ``service`` index holds every record, so a parallel Scan of it, filtered by the
sort key, finds all. What that costs: the *whole* index is read whatever the range, about 0.2 KB and so 0.03 read units
per record in the table (a million records: 220 MB, 27,000 units, some seconds).

``scan`` answers ascending by (time, id), but a Scan has no order: the entries of the range are sorted here. MEMORY is
bounded: runs of them are sorted and written to temporary files (``external_sort``), and the answer is read from a
merge; a short range touches no file. Nothing is yielded before the whole index has been read, so a failure of the Scan
can never look like the end of the range.

DISK is bounded too (``dynamodb.scan_disk_bytes``): a pod whose temporary volume is over its limit is evicted, and its
spool with it. Where the entries of a range would take more, the largest keys are dropped again, the rest is answered,
and the index is read once more for what comes after. ``rate`` bounds the entries of the index that are read a second.

``stream`` is the same with the bodies: entries that are not wanted (of another shard's hours, or behind the position
where an earlier stream was left) are dropped before they are sorted, so a body is read only for what is answered. A
body costs 0.5 read units per 4 KB, eventually consistent; the index beside it a twentieth of that.

DECISION: no registry of services by day. It would let a short range be read partition by partition, but each writer
would have to write it before its first record of a service and day (or lose sight of records), and a record that
somebody else put into the table, which validation must find, would not be in it. Who wants many ranges reads once and
says which ``hours`` are wanted.

ENTRY to be sorted: the sort key ``gt`` in UTF-8, a zero byte, then for ``scan`` and ``deep_scan`` the
8 bytes of the service (``base.service_tag``), and the digest. Order of bytes is order of (time, id), because ``gt`` is,
and neither part of it contains a zero byte.

WHAT AN INDEX SAYS IS NOT BELIEVED by ``scan`` and ``deep_scan``, which serve validation: a hash key or a sort key that
somebody altered shows a record where it is not looked for, or hides it. So they read the table's own key and the hash
key with each entry. The id is the table's. A hash key of another day, or of no shard that readers look into, or a sort
key that is not of this id, makes the entry one that is shown ``NOWHERE``; one without a time that can be read stands at
the beginning of the range. ``deep_scan`` reads the items besides, and checks all keys against the fields.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from itertools import islice
from typing import Final

from sidecar.clock import Clock
from sidecar.errors import RetryClass
from sidecar.record import LogRecord, digest
from sidecar.stores import dynamodb_errors as errors
from sidecar.stores.base import (
    HOUR_US,
    NOWHERE,
    CountGroup,
    CountQuery,
    Estimate,
    HourFilter,
    Position,
    ScanEntry,
    service_tag,
)
from sidecar.stores.dynamodb_items import (
    DAY,
    MAX_ITEM_BYTES,
    IndexEntry,
    KeyedItem,
    day_number,
    day_text,
    parse_time_key,
    service_key,
    shard_number,
    sort_key,
    split_service_key,
    split_sort_key,
    time_key,
)
from sidecar.stores.dynamodb_pages import FIRST_US, LAST_US, MAX_KEYS, Key, Pages, Partition, Span, span
from sidecar.stores.dynamodb_parallel import all_or_first_error
from sidecar.stores.dynamodb_queries import WIDE_DAYS, Queries, day_spans, error_partitions, service_partitions
from sidecar.stores.dynamodb_shards import Schedule, ShardSchedule
from sidecar.stores.external_sort import CHUNK_ENTRIES, Sorter

STREAM_BYTES: Final = 4 * 1024 * 1024  # of the bodies of one page of a stream, about
_PACED_PAGE: Final = 500  # entries asked for at once where the rate is bounded: small and often, and quickly decoded
_BEHIND: Final = 0.1  # seconds of its rate that a reading which was held up may catch up at once
_SAMPLED_DAYS: Final = 32
_MOST_SERVICES: Final = 65_536  # hash keys whose parts are remembered


class Enumeration:
    """R4 (counts) and the ordered scan. Every method raises StoreError."""

    def __init__(self, pages: Pages, queries: Queries, shards: ShardSchedule, *, disk_bytes: int, clock: Clock) -> None:
        self._clock = clock
        self._pages = pages
        self._queries = queries
        self._shards = shards
        self._disk = disk_bytes
        self._due = 0.0
        self.rate = 0.0
        """Index entries read a second by ``scan`` and ``stream``, wanted or not; 0: as fast as they come."""

    async def count(self, query: CountQuery) -> int:
        """Exact number as the index has it.

        One service, or failures of any: the partitions of the range. Otherwise a scan of the whole index.
        """
        start, end = max(query.start, self._pages.visible_from(), FIRST_US), min(query.end, LAST_US)
        stretch = span(start, end)
        if stretch is None:
            return 0
        by_day = await self._partitions_by_day(query, start, end)
        if by_day is not None:
            return await self._count_all([p for partitions in by_day.values() for p in partitions], query)
        segments = range(self._pages.segments)
        return sum(await all_or_first_error([self._pages.scan_count(stretch, s, query.is_success) for s in segments]))

    async def count_by(self, query: CountQuery, group: CountGroup) -> Mapping[str, int]:
        """As ``count``, by group; groups without a record are left out.

        One service by date, and failures by date: the partitions of each day. Otherwise one scan of the whole index,
        whose hash keys name service and day.
        """
        start, end = max(query.start, self._pages.visible_from(), FIRST_US), min(query.end, LAST_US)
        stretch = span(start, end)
        if stretch is None:
            return {}
        by_day = await self._partitions_by_day(query, start, end)
        if by_day is None or (query.service_name is None and group == "service"):
            scans = [
                self._pages.scan_hash_keys(stretch, segment, is_success=query.is_success)
                for segment in range(self._pages.segments)
            ]
            found: Counter[str] = Counter()
            for tally in await all_or_first_error(scans):
                for key, number in tally.items():
                    name, day = split_service_key(key)
                    if query.service_name in (None, name):
                        found[day if group == "date" else name] += number
            return found
        if group == "service":
            total = await self.count(query)
            return {query.service_name: total} if query.service_name is not None and total else {}
        calls = [self._count_all(partitions, query) for partitions in by_day.values()]
        return {day_text(d): n for d, n in zip(by_day, await all_or_first_error(calls), strict=True) if n}

    async def estimate(self, query: CountQuery) -> Estimate:
        """One shard of each day (of at most 32 days, evenly spread), scaled; shards are even, because ids are hashed.

        Over all services there are no shards to choose from: the first segment of the index, scaled.
        """
        start, end = max(query.start, self._pages.visible_from(), FIRST_US), min(query.end, LAST_US)
        stretch = span(start, end)
        if stretch is None:
            return Estimate(0, "nothing that old or new is kept")
        by_day = await self._partitions_by_day(query, start, end)
        if by_day is None:
            segments = self._pages.segments
            found = await self._pages.scan_count(stretch, 0, query.is_success)
            return Estimate(found * segments, f"one of {segments} segments of the index counted, times {segments}")
        if not by_day:
            return Estimate(0, "the index names no day with records of this service")
        days = list(by_day.values())[:: -(-len(by_day) // _SAMPLED_DAYS)]
        outcome = None if query.service_name is None else query.is_success
        numbers = await all_or_first_error([self._pages.count(shards[0], outcome) for shards in days])
        scaled = sum(n * len(shards) for n, shards in zip(numbers, days, strict=True))
        method = f"one shard of each of {len(days)} of {len(by_day)} days counted, times the shards and days left out"
        return Estimate(round(scaled * len(by_day) / len(days)), method)

    async def _partitions_by_day(self, query: CountQuery, start: int, end: int) -> dict[int, list[Partition]] | None:
        """Which partitions hold what is counted, by day; None: only a scan of the whole index finds it."""
        days = range(end // DAY, start // DAY - 1, -1)
        if query.service_name is not None:
            name, schedule = query.service_name, await self._shards.current()
            found = await self._queries.service_days(name, start, end)
            return {at.day: service_partitions(schedule, name, at) for at in found}
        if query.is_success is False and len(days) <= WIDE_DAYS:
            schedule = await self._shards.current()
            return {at.day: error_partitions(schedule, at) for at in day_spans(days, start, end)}
        return None

    async def _count_all(self, partitions: Sequence[Partition], query: CountQuery) -> int:
        outcome = None if query.service_name is None else query.is_success  # the errors index holds failures alone
        return sum(await all_or_first_error([self._pages.count(p, outcome) for p in partitions]))

    async def scan(self, start: int, end: int, hours: HourFilter | None = None) -> AsyncIterator[ScanEntry]:
        """All records with start <= time < end, ascending by (time, id)."""
        schedule = await self._shards.current()
        async with aclosing(self._ordered(start, end, _Whole(schedule, start, hours))) as chunks:
            async for chunk in chunks:
                for entry in chunk:
                    yield _parse(entry)

    async def deep_scan(self, start: int, end: int) -> AsyncIterator[ScanEntry]:
        """The same from the items, where the index shows them: every key and the digest are checked.

        What the index names and the table has not, is not there. An item that is no record has no digest.
        """
        schedule = await self._shards.current()
        room = MAX_KEYS
        async with aclosing(self._ordered(start, end, _Whole(schedule, start))) as chunks:
            async for chunk in chunks:
                entries = [_parse(entry) for entry in chunk]
                at = 0
                while at < len(entries):
                    part = entries[at : at + room]
                    at += room
                    items = await self._keyed([entry.log_id for entry in part])
                    size = 0
                    for entry in part:
                        if entry.log_id not in items:
                            continue
                        deep, weight = _deep(entry, items[entry.log_id], schedule)
                        size += weight
                        yield deep
                    room = max(1, min(MAX_KEYS * self._pages.segments, STREAM_BYTES * len(part) // max(1, size)))

    async def _keyed(self, ids: Sequence[str]) -> dict[str, KeyedItem | None]:
        found: dict[str, KeyedItem | None] = {}
        chunks = [ids[i : i + MAX_KEYS] for i in range(0, len(ids), MAX_KEYS)]
        for part in await all_or_first_error([self._pages.keyed(chunk) for chunk in chunks]):
            found |= part
        missing = [log_id for log_id in ids if log_id not in found]  # the index can be ahead of a replica of the table
        for start in range(0, len(missing), MAX_KEYS):
            found |= await self._pages.keyed(missing[start : start + MAX_KEYS], consistent=True)
        return found

    async def stream(
        self, start: int, end: int, after: Position | None, hours: HourFilter | None
    ) -> AsyncIterator[Sequence[LogRecord]]:
        """The same order with the bodies, of what is wanted; as many at once as fit about ``STREAM_BYTES``."""
        room = MAX_KEYS
        low = start if after is None else max(start, after.log_timestamp)
        async with aclosing(self._ordered(low, end, _Choice(after, hours))) as chunks:
            async for chunk in chunks:
                keys = [entry.partition(b"\0")[0].decode() for entry in chunk]
                at = 0
                while at < len(keys):
                    page = await self._queries.bodies(keys[at : at + room])
                    at += room
                    if page:
                        yield page
                        mean = max(1, sum(map(_payload, page)) // len(page))
                        room = max(1, min(MAX_KEYS * self._pages.segments, STREAM_BYTES // mean))

    async def _ordered(self, start: int, end: int, choice: "_Choice") -> AsyncGenerator[list[bytes], None]:
        """Entries in chunks, ascending."""
        stretch = span(max(start, self._pages.visible_from()), end - 1)
        ceiling: bytes | None = b""
        while stretch is not None and ceiling is not None:
            low = stretch.low if not ceiling else ceiling.partition(b"\0")[0].decode()
            sorter = Sorter(self._disk, floor=ceiling)
            async with aclosing(self._pass(sorter, Span(low, stretch.high), choice)) as chunks:
                async for chunk in chunks:
                    yield chunk
            ceiling = sorter.ceiling

    async def _pass(self, sorter: Sorter, stretch: Span, choice: "_Choice") -> AsyncGenerator[list[bytes], None]:
        """One reading of the index: all that is left, or as much from the low end as the disk holds."""
        try:
            segments = range(self._pages.segments)
            await all_or_first_error([self._read_segment(sorter, stretch, segment, choice) for segment in segments])
            entries = await asyncio.to_thread(sorter.merged)
            while chunk := await asyncio.to_thread(list, islice(entries, CHUNK_ENTRIES)):
                yield chunk
        except OSError as exc:  # the temporary directory: full, read-only or not there
            raise errors.error(
                RetryClass.TRANSIENT,
                "the scan's temporary files cannot be kept: check the space in TMPDIR",
                type(exc).__name__,
            ) from None
        finally:
            sorter.close()

    async def _read_segment(self, sorter: Sorter, stretch: Span, segment: int, choice: "_Choice") -> None:
        after: Key | None = None
        while True:
            limit = _PACED_PAGE if self.rate > 0 else None
            entries, after, scanned = await self._pages.scan(stretch, segment, after, whole=choice.whole, limit=limit)
            await sorter.add(choice.packed(entries))
            await self._wait(scanned)
            if after is None:
                return

    async def _wait(self, scanned: int) -> None:
        """For as long as this page came too early."""
        if self.rate > 0:
            now = self._clock.monotonic()
            self._due = max(self._due, now - _BEHIND) + scanned / self.rate
            if self._due > now:
                await self._clock.sleep(self._due - now)


class _Choice:
    """Which entries of a page are wanted, by what the index says; without digests."""

    whole = False  # whether hash key and table's key are asked for

    def __init__(self, after: Position | None, hours: HourFilter | None) -> None:
        self._after = None if after is None else sort_key(*after)
        self._hours = hours
        self._known: dict[str, bool] = {}  # by the text of the hour: it is parsed once

    def packed(self, entries: Sequence[IndexEntry]) -> list[bytes]:
        """Those behind the position and of a wanted hour."""
        after, hours = self._after, self._hours
        if after is not None:
            entries = [entry for entry in entries if after < entry.gt.S]
        if hours is not None:
            entries = [entry for entry in entries if self._wanted(entry.gt.S[:13], hours)]
        return [b"%b\0" % e.gt.S.encode() for e in entries]

    def _wanted(self, text: str, hours: HourFilter) -> bool:
        known = self._known.get(text)
        if known is None:
            try:
                known = hours(parse_time_key(f"{text}:00:00.000000Z") // HOUR_US)
            except ValueError:
                raise errors.unreadable("Scan") from None
            self._known[text] = known
        return known


class _Whole(_Choice):
    """Every entry of the wanted hours as it is to be compared; see the module."""

    whole = True

    def __init__(self, schedule: Schedule, start: int, hours: HourFilter | None = None) -> None:
        super().__init__(None, hours)
        self._start = time_key(max(start, FIRST_US))
        self._schedule = schedule
        self._services: dict[str, tuple[str, bytes]] = {}  # hash key -> day, tag

    def packed(self, entries: Sequence[IndexEntry]) -> list[bytes]:
        """Under the table's own id, with the service that shows it."""
        hours = self._hours
        found = []
        for entry in entries:
            key, tag = self._placed(entry)
            if hours is None or self._wanted(key[:13], hours):
                found.append(b"%b\0%b%b" % (key.encode(), tag, b"" if entry.h is None else entry.h.B))
        return found

    def _placed(self, entry: IndexEntry) -> tuple[str, bytes]:
        """Sort key and service."""
        gt, gs, log_id = entry.gt.S, entry.gs, entry.log_id
        if gs is None or log_id is None:
            raise errors.unreadable("Scan")
        day, tag = self._services.get(gs.S) or self._service(gs.S)
        try:
            parse_time_key(gt[:27])
        except ValueError:
            return f"{self._start}#{log_id.S}", NOWHERE
        if gt[27:] != f"#{log_id.S}":
            return f"{gt[:27]}#{log_id.S}", NOWHERE
        return gt, tag if day == gt[:10] else NOWHERE

    def _service(self, key: str) -> tuple[str, bytes]:
        """Day and tag of a hash key; ``NOWHERE`` where no reader asks for it."""
        name, day_name = split_service_key(key)
        day, shard = day_number(day_name), shard_number(key.rpartition("#")[2])
        sound = day is not None and key == service_key(name, day_name, shard)
        if day is None or not sound or shard not in range(self._schedule.fan_out(day)):
            found = day_name, NOWHERE
        else:
            found = day_name, service_tag(name)
        if len(self._services) < _MOST_SERVICES:
            self._services[key] = found
        return found


def _deep(entry: ScanEntry, item: KeyedItem | None, schedule: Schedule) -> tuple[ScanEntry, int]:
    """What an entry comes to once its item is read, and how much memory that took."""
    try:
        record = None if item is None else item.record()
    except ValueError:
        record = None
    if item is None or record is None:
        return entry._replace(digest=b"", shown_under=NOWHERE), MAX_ITEM_BYTES
    content = digest(record)
    wrong = item.wrong(record, content, schedule.fan_out(record.log_timestamp // DAY))
    under = NOWHERE if wrong else service_tag(record.service_name)
    return entry._replace(digest=content, shown_under=under), _payload(record)


def _payload(record: LogRecord) -> int:
    """About how much memory a record takes, bytes."""
    texts = (record.request_data, record.response_data, record.error_message)
    return 500 + sum(len(text) for text in texts if text is not None)


def _parse(entry: bytes) -> ScanEntry:
    key, _, rest = entry.partition(b"\0")
    time, log_id = split_sort_key(key.decode())
    try:
        return ScanEntry(parse_time_key(time), log_id, rest[8:], rest[:8])
    except ValueError:
        raise errors.unreadable("Scan") from None

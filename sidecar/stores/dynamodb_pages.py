"""The three read calls that everything else is made of: a page of a partition, a page of a scan, up to 100 bodies.

``read_in_flight`` bounds how many are under way at once. Index pages are eventually consistent; a page is at most 1 MB
before filters, so a page may be empty and yet not the last.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import msgspec

from sidecar import settings
from sidecar.clock import Clock
from sidecar.errors import RetryClass
from sidecar.record import LogRecord
from sidecar.stores import dynamodb_errors as errors
from sidecar.stores import dynamodb_schema as schema
from sidecar.stores.base import Summary
from sidecar.stores.dynamodb_items import DAY, SECOND, IndexEntry, Item, KeyedItem, LooseEntry, SummaryEntry, time_key
from sidecar.stores.dynamodb_wire import Wire

MAX_KEYS: Final = 100  # of one BatchGetItem
STALLED_ROUNDS: Final = 6  # of BatchGetItem in a row that brought nothing, before it counts as throttled
STALL_SECONDS: Final = 0.05  # before the first of them; doubles
FIRST_US: Final = -62_135_596_800 * SECOND  # 0001-01-01T00:00:00Z
LAST_US: Final = 253_402_300_800 * SECOND - 1  # the end of year 9999
_AFTER_ID: Final = "$"  # the character after "#": an upper bound of all sort keys of one instant

Key = dict[str, Any]
T = TypeVar("T")
_json = msgspec.json.encode
_SUMMARY: Final = ", ".join(SummaryEntry.__struct_fields__)
_SAMPLE_SEGMENTS: Final = 64


class _Page(msgspec.Struct):
    count: int = msgspec.field(name="Count")
    scanned: int = msgspec.field(name="ScannedCount", default=0)
    items: list[IndexEntry] = msgspec.field(name="Items", default_factory=list)
    next_key: Key | None = msgspec.field(name="LastEvaluatedKey", default=None)


class _LoosePage(msgspec.Struct):
    count: int = msgspec.field(name="Count")
    scanned: int = msgspec.field(name="ScannedCount", default=0)
    items: list[LooseEntry] = msgspec.field(name="Items", default_factory=list)
    next_key: Key | None = msgspec.field(name="LastEvaluatedKey", default=None)


class _SummaryPage(msgspec.Struct):
    items: list[SummaryEntry] = msgspec.field(name="Items", default_factory=list)
    next_key: Key | None = msgspec.field(name="LastEvaluatedKey", default=None)


class _HashKey(msgspec.Struct):
    S: str


class _ServiceKey(msgspec.Struct):
    gs: _HashKey


class _KeyPage(msgspec.Struct):
    items: list[_ServiceKey] = msgspec.field(name="Items", default_factory=list)
    next_key: Key | None = msgspec.field(name="LastEvaluatedKey", default=None)


class _Bodies(msgspec.Struct, Generic[T]):
    responses: dict[str, list[T]] = msgspec.field(name="Responses", default_factory=dict)
    unprocessed: dict[str, msgspec.Raw] = msgspec.field(name="UnprocessedKeys", default_factory=dict)


class _OnlyId(msgspec.Struct):
    log_id: _HashKey


class _Keys(msgspec.Struct):
    keys: list[Key] = msgspec.field(name="Keys")


_page = msgspec.json.Decoder(_Page)
_summary_page = msgspec.json.Decoder(_SummaryPage)
_key_page = msgspec.json.Decoder(_KeyPage)
_bodies = msgspec.json.Decoder(_Bodies[Item])
_raw_bodies = msgspec.json.Decoder(_Bodies[msgspec.Raw])
_keyed_item = msgspec.json.Decoder(KeyedItem)
_only_id = msgspec.json.Decoder(_OnlyId)
_loose_page = msgspec.json.Decoder(_LoosePage)
_keys = msgspec.json.Decoder(_Keys)


def _any_page(answer: bytes) -> _Page:
    """A page of whole entries, of any writer: one whose digest is no binary value has none. Raises DecodeError."""
    try:
        return _page.decode(answer)
    except msgspec.ValidationError:
        page = _loose_page.decode(answer)
        return _Page(page.count, page.scanned, [entry.strict() for entry in page.items], page.next_key)


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of sort keys, both ends inclusive."""

    low: str
    high: str


@dataclass(frozen=True, slots=True)
class Partition:
    """A stretch of one hash key of one index."""

    index: schema.Index
    value: str
    span: Span


def span(start: int, end: int) -> Span | None:
    """Sort keys of start <= time <= end (microseconds); None where there can be none."""
    low, high = max(start, FIRST_US), min(end, LAST_US)
    return Span(time_key(low), time_key(high) + _AFTER_ID) if low <= high else None


class Pages:
    """Reads pages of the table's indexes and bodies of the table. Every method raises StoreError."""

    def __init__(self, wire: Wire, options: settings.DynamoDB, *, clock: Clock) -> None:
        self._wire = wire
        self._table = options.table
        self._clock = clock
        self._ttl_days = options.ttl_days
        self._in_flight = asyncio.Semaphore(options.read_in_flight)
        self.segments = options.read_in_flight
        self._sampled = 0

    def visible_from(self) -> int:
        """The log_timestamp, microseconds, below which a record has expired and is hidden."""
        return FIRST_US if self._ttl_days is None else self._clock.now_us() - self._ttl_days * DAY + 1

    async def newest(
        self, partition: Partition, limit: int, after: Key | None, summaries: dict[str, Summary] | None = None
    ) -> tuple[list[str], Key | None]:
        """Sort keys of one page, newest first, and where the next page begins (None: this was the last).

        With ``summaries`` the rest of each entry is read too, and put there under its sort key.
        """
        body = self._query(partition, after)
        body |= {"ScanIndexForward": False, "Limit": limit, "ProjectionExpression": schema.SORT}
        if summaries is None:
            page = await self._read("Query", body, _page.decode)
            return [entry.gt.S for entry in page.items], page.next_key
        body["ProjectionExpression"] = _SUMMARY
        whole = await self._read("Query", body, _summary_page.decode)
        try:
            summaries.update({item.gt.S: item.summary() for item in whole.items})
        except ValueError:
            raise errors.unreadable("Query") from None
        return [item.gt.S for item in whole.items], whole.next_key

    async def count(self, partition: Partition, is_success: bool | None) -> int:
        """How many entries a partition has in its span."""
        body = self._query(partition, None)
        body["Select"] = "COUNT"
        if is_success is not None:
            body["FilterExpression"] = "is_success = :s"
            body["ExpressionAttributeValues"][":s"] = {"BOOL": is_success}
        return await self._count("Query", body)

    async def scan_count(self, stretch: Span, segment: int, is_success: bool | None) -> int:
        """How many entries one segment of the service index has in a stretch of time."""
        body = self._scan(stretch, segment)
        body["Select"] = "COUNT"
        if is_success is not None:
            body["FilterExpression"] += " AND is_success = :s"
            body["ExpressionAttributeValues"][":s"] = {"BOOL": is_success}
        return await self._count("Scan", body)

    async def scan(
        self, stretch: Span, segment: int, after: Key | None, *, whole: bool = False, limit: int | None = None
    ) -> tuple[list[IndexEntry], Key | None, int]:
        """One page of one segment of the service index: times, ids and digests; how many entries were looked at.

        ``whole``: with hash key and the table's key, and an entry of any writer. It costs no more units. ``limit``: how
        many entries are looked at; else 1 MB of them.
        """
        body = self._scan(stretch, segment)
        if limit is not None:
            body["Limit"] = limit
        body["ProjectionExpression"] = "gt, h, gs, log_id" if whole else "gt, h"
        if after is not None:
            body["ExclusiveStartKey"] = after
        page = await self._read("Scan", body, _any_page if whole else _page.decode)
        return page.items, page.next_key, page.scanned

    async def scan_hash_keys(
        self, stretch: Span, segment: int, *, prefix: str | None = None, is_success: bool | None = None
    ) -> Counter[str]:
        """How many entries each hash key of the service index has, of one segment.

        Only those that begin with ``prefix``, and of that outcome, where given.
        """
        body = self._scan(stretch, segment)
        body["ProjectionExpression"] = schema.SERVICE.hash_key
        if prefix is not None:
            body["FilterExpression"] += " AND begins_with(gs, :g)"
            body["ExpressionAttributeValues"][":g"] = {"S": prefix}
        if is_success is not None:
            body["FilterExpression"] += " AND is_success = :s"
            body["ExpressionAttributeValues"][":s"] = {"BOOL": is_success}
        found: Counter[str] = Counter()
        while True:
            page = await self._read("Scan", body, _key_page.decode)
            found.update(item.gs.S for item in page.items)
            if page.next_key is None:
                return found
            body["ExclusiveStartKey"] = page.next_key

    async def some(self, stretch: Span, limit: int) -> list[str]:
        """Sort keys of the first ``limit`` entries of a part of the service index, those in the stretch.

        Each call looks into the next of 64 parts; some of them may be empty.
        """
        self._sampled = (self._sampled + 1) % _SAMPLE_SEGMENTS
        body: dict[str, Any] = {
            "Segment": self._sampled,
            "TotalSegments": _SAMPLE_SEGMENTS,
            "TableName": self._table,
            "IndexName": schema.SERVICE.name,
            "Limit": limit,
            "ProjectionExpression": schema.SORT,
        }
        page = await self._read("Scan", body, _page.decode)
        return [entry.gt.S for entry in page.items if stretch.low <= entry.gt.S <= stretch.high]

    async def bodies(self, ids: Sequence[str], *, consistent: bool = False) -> dict[str, LogRecord]:
        """The records of up to MAX_KEYS distinct ids; ids that the table does not have are left out.

        A request over 16 MB is answered in part: asked again as long as that brings something. THROTTLE where it does
        not any more.
        """
        found: dict[str, LogRecord] = {}
        async for items in self._batches(ids, _bodies, consistent=consistent):
            try:
                found |= {item.log_id.S: item.record() for item in items}
            except ValueError:
                raise errors.unreadable("BatchGetItem") from None
        return found

    async def keyed(self, ids: Sequence[str], *, consistent: bool = False) -> dict[str, KeyedItem | None]:
        """As ``bodies``, with what is kept beside the fields; None where an item is none that a sidecar writes."""
        found: dict[str, KeyedItem | None] = {}
        async for items in self._batches(ids, _raw_bodies, consistent=consistent):
            for raw in items:
                try:
                    item = _keyed_item.decode(raw)
                    found[item.log_id.S] = item
                except msgspec.DecodeError:
                    try:
                        found[_only_id.decode(raw).log_id.S] = None
                    except msgspec.DecodeError:
                        raise errors.unreadable("BatchGetItem") from None
        return found

    async def _batches(
        self, ids: Sequence[str], decoder: "msgspec.json.Decoder[_Bodies[T]]", *, consistent: bool
    ) -> AsyncIterator[Sequence[T]]:
        """The items of each answer until none is left to ask for."""
        keys: list[Key] = [{"log_id": {"S": log_id}} for log_id in ids]
        stalled = 0
        while keys:
            body = {"RequestItems": {self._table: {"Keys": keys, "ConsistentRead": consistent}}}
            answer = await self._read("BatchGetItem", body, decoder.decode)
            items = answer.responses.get(self._table, [])
            try:
                rest = answer.unprocessed.get(self._table)
                keys = [] if rest is None else _keys.decode(rest).keys
            except msgspec.DecodeError:
                raise errors.unreadable("BatchGetItem") from None
            yield items
            stalled = 0 if items else stalled + 1
            if keys and stalled:
                if stalled == STALLED_ROUNDS:
                    raise errors.error(
                        RetryClass.THROTTLE, "BatchGetItem: not processed: the table throttles", "UnprocessedKeys"
                    )
                await self._clock.sleep(STALL_SECONDS * 2 ** (stalled - 1))

    async def _count(self, operation: str, body: dict[str, Any]) -> int:
        total = 0
        while True:
            page = await self._read(operation, body, _page.decode)
            total += page.count
            if page.next_key is None:
                return total
            body["ExclusiveStartKey"] = page.next_key

    def _query(self, partition: Partition, after: Key | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "TableName": self._table,
            "IndexName": partition.index.name,
            "KeyConditionExpression": f"{partition.index.hash_key} = :p AND gt BETWEEN :l AND :h",
            "ExpressionAttributeValues": {
                ":p": {"S": partition.value},
                ":l": {"S": partition.span.low},
                ":h": {"S": partition.span.high},
            },
        }
        if after is not None:
            body["ExclusiveStartKey"] = after
        return body

    def _scan(self, stretch: Span, segment: int) -> dict[str, Any]:
        return {
            "TableName": self._table,
            "IndexName": schema.SERVICE.name,
            "Segment": segment,
            "TotalSegments": self.segments,
            "FilterExpression": "gt BETWEEN :l AND :h",
            "ExpressionAttributeValues": {":l": {"S": stretch.low}, ":h": {"S": stretch.high}},
        }

    async def _read(self, operation: str, body: dict[str, Any], decode: Callable[[bytes], T]) -> T:
        async with self._in_flight:
            answer = await self._wire.call(operation, _json(body))
        try:
            return decode(answer)
        except msgspec.DecodeError:
            raise errors.unreadable(operation) from None

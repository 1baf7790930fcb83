"""DynamoDB as a store of records.

Layout: ``dynamodb_items``. Tables and indexes: ``dynamodb_schema``. Transport: ``dynamodb_wire``. Refusals:
``dynamodb_errors``. Index reads: ``dynamodb_queries``. Enumeration: ``dynamodb_scan``.

What DynamoDB gives and what it does not:

* A put replaces: writing the same record again has no second effect, and other content under the same id is *not*
  seen here (validation finds it by the digest). ``put_if_absent`` never replaces.
* An answer that was lost may stand for a write that happened: TRANSIENT, and the repetition has no second effect.
* ``get`` is strongly consistent. Everything that goes through an index is eventually consistent.
* With ``ttl_days`` a record is hidden from every read as soon as its time has come, whether or not the service has
  deleted it yet (it takes up to some days).
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import compress
from typing import Final

import msgspec

from sidecar import settings
from sidecar.clock import Clock
from sidecar.errors import RetryClass, StoreError
from sidecar.phase import DYNAMODB, StoreName
from sidecar.record import LogRecord, digest
from sidecar.stores import dynamodb_canary as canary
from sidecar.stores import dynamodb_errors as errors
from sidecar.stores import dynamodb_limits as limits
from sidecar.stores import dynamodb_schema as schema
from sidecar.stores.base import (
    Check,
    Consistency,
    CountGroup,
    CountQuery,
    Estimate,
    Examined,
    Failure,
    FillResult,
    HourFilter,
    Position,
    Query,
    ScanEntry,
    Summary,
    WriteLimits,
    WriteResult,
)
from sidecar.stores.dynamodb_fleet import DynamoDBFleet
from sidecar.stores.dynamodb_gaps import DynamoDBGaps
from sidecar.stores.dynamodb_items import DAY, MAX_ITEM_BYTES, Item, KeyedItem, encode_item, fits
from sidecar.stores.dynamodb_pages import Pages
from sidecar.stores.dynamodb_parallel import all_or_first_error
from sidecar.stores.dynamodb_queries import Queries
from sidecar.stores.dynamodb_scan import Enumeration
from sidecar.stores.dynamodb_shards import ShardSchedule
from sidecar.stores.dynamodb_verdicts import DynamoDBVerdicts
from sidecar.stores.dynamodb_wire import Wire

MAX_BATCH_ITEMS: Final = 25
MAX_REQUEST_BYTES: Final = 16 * 1024 * 1024
MAX_BATCH_BYTES: Final = 2 * 1024 * 1024  # of stored sizes: JSON escapes at most six-fold, so a request always fits
PING_ID: Final = "sidecar-ping"

_json = msgspec.json.encode
_TOO_LARGE: Final = f"the item is over DynamoDB's {MAX_ITEM_BYTES} bytes"


class _Text(msgspec.Struct):
    S: str


class _KeyOnly(msgspec.Struct):
    log_id: _Text


class _Put(msgspec.Struct):
    item: _KeyOnly = msgspec.field(name="Item")


class _Unprocessed(msgspec.Struct):
    put: _Put = msgspec.field(name="PutRequest")


class _Units(msgspec.Struct):
    units: float = msgspec.field(name="CapacityUnits", default=0.0)


class _Capacity(msgspec.Struct):
    units: float = msgspec.field(name="CapacityUnits", default=0.0)
    table: _Units | None = msgspec.field(name="Table", default=None)
    indexes: dict[str, _Units] = msgspec.field(name="GlobalSecondaryIndexes", default_factory=dict)


class _BatchAnswer(msgspec.Struct):
    unprocessed: dict[str, list[_Unprocessed]] = msgspec.field(name="UnprocessedItems", default_factory=dict)
    consumed: list[_Capacity] = msgspec.field(name="ConsumedCapacity", default_factory=list)


class _PutAnswer(msgspec.Struct):
    consumed: _Capacity | None = msgspec.field(name="ConsumedCapacity", default=None)


class _KeyedAnswer(msgspec.Struct):
    item: KeyedItem | None = msgspec.field(name="Item", default=None)


class _GetAnswer(msgspec.Struct):
    item: Item | None = msgspec.field(name="Item", default=None)


_batch_answer = msgspec.json.Decoder(_BatchAnswer)
_NOT_TOLD: Final = _Capacity()
_OF_ONE_RECORD: Final = frozenset({RetryClass.THROTTLE, RetryClass.PERMANENT, RetryClass.UNKNOWN})
_keyed_answer = msgspec.json.Decoder(_KeyedAnswer)
_put_answer = msgspec.json.Decoder(_PutAnswer)
_get_answer = msgspec.json.Decoder(_GetAnswer)


class DynamoDBStore:
    """The Store of one table (``sidecar.stores.base.Store`` states the promise of every method)."""

    def __init__(self, options: settings.DynamoDB, *, clock: Clock) -> None:
        self._options = options
        self._clock = clock
        self.wire = Wire(options, clock=clock)
        self.gap_ledger = DynamoDBGaps(self.wire, options)
        self.verdicts = DynamoDBVerdicts(self.wire, options)
        self.fleet = DynamoDBFleet(self.wire, self.gap_ledger, options, clock=clock)
        self._shards = ShardSchedule(self.wire, options, clock=clock)
        self._pages = Pages(self.wire, options, clock=clock)
        self._queries = Queries(self._pages, self._shards)
        self._enumeration = Enumeration(
            self._pages, self._queries, self._shards, disk_bytes=options.scan_disk_bytes, clock=clock
        )
        self._putting = asyncio.Semaphore(options.max_in_flight)
        self._batch_head = b'{"ReturnConsumedCapacity":"INDEXES","RequestItems":{%b:[{"PutRequest":{"Item":' % _json(
            options.table
        )

    @property
    def name(self) -> StoreName:
        """``dynamodb``."""
        return DYNAMODB

    @property
    def consistency(self) -> Consistency:
        """``eventual``: queries and counts go through indexes."""
        return "eventual"

    @property
    def limits(self) -> WriteLimits:
        """25 records, 2 MiB, ``max_in_flight`` calls."""
        return WriteLimits(MAX_BATCH_ITEMS, MAX_BATCH_BYTES, self._options.max_in_flight)

    async def write(self, batch: Sequence[LogRecord]) -> WriteResult:
        """One BatchWriteItem; what it did not process is a THROTTLE failure, an item over 400 KB a PERMANENT one."""
        _check_batch(batch)
        items = await self._encode(batch)
        failures: list[Failure] = []
        if items and len(max(items, key=len)) > MAX_ITEM_BYTES:  # rare: the JSON is longer than what is counted
            fitting = [fits(item) for item in items]
            failures = [
                Failure(index, RetryClass.PERMANENT, _TOO_LARGE, "ItemTooLarge")
                for index, fine in enumerate(fitting)
                if not fine
            ]
            items = list(compress(items, fitting))
        if not items:
            return WriteResult(failures)
        body = self._batch_head + b'}},{"PutRequest":{"Item":'.join(items) + b"}}]}}"
        if len(body) > MAX_REQUEST_BYTES:
            raise errors.error(
                RetryClass.PERMANENT, f"the request is over DynamoDB's {MAX_REQUEST_BYTES} bytes", "RequestTooLarge"
            )
        answer = await self.wire.call("BatchWriteItem", body)
        try:
            result = _batch_answer.decode(answer)
        except msgspec.DecodeError:
            raise errors.unreadable("BatchWriteItem") from None
        left = result.unprocessed.get(self._options.table)
        if left:
            failures += _throttled(batch, [request.put.item.log_id.S for request in left])
        return WriteResult(failures, _consumed(result.consumed))

    async def put_if_absent(self, batch: Sequence[LogRecord]) -> Sequence[bool]:
        """Conditional puts, up to ``max_in_flight`` at once. After a StoreError some of them may be stored."""
        items = await self._encode(batch)
        for item in items:
            if not fits(item):
                raise errors.error(RetryClass.PERMANENT, _TOO_LARGE, "ItemTooLarge")
        return [capacity is not None for capacity in await all_or_first_error([self._put(item) for item in items])]

    async def fill(self, batch: Sequence[LogRecord]) -> FillResult:
        """Conditional puts, up to ``max_in_flight`` at once; what is throttled or refused as data is a failure."""
        items = await self._encode(batch)
        done = await all_or_first_error([self._fill(index, item) for index, item in enumerate(items)])
        failures = [each for each in done if isinstance(each, Failure)]
        consumed = Counter[str]()
        for item, each in zip(items, done, strict=True):
            if each is None:
                consumed["table"] += -(-len(item) // 1024)
            elif isinstance(each, _Capacity):
                consumed.update(dict(_consumed([each])))
        return FillResult([isinstance(each, _Capacity) for each in done], failures, tuple(consumed.items()))

    async def rehearse(self, batch: Sequence[LogRecord]) -> Sequence[Failure]:
        """By the service's known limits: the size of an item and of its index keys, and the years of four digits."""
        schedule = self._shards.peek() or await self._shards.current()
        ttl = self._options.ttl_days
        failures = []
        for index, record in enumerate(batch):
            why = limits.refusal(record, schedule.shards(record.log_timestamp // DAY), ttl)
            if why is not None:
                failures.append(Failure(index, RetryClass.PERMANENT, why.reason, why.code))
        return failures

    def pace(self, rate: float) -> None:
        """From now on ``scan`` and ``stream`` read so many index entries a second, wanted or not; 0: no bound."""
        self._enumeration.rate = rate

    async def replace(self, record: LogRecord, seen: LogRecord) -> bool:
        """Put ``record`` if the item under its id is still ``seen``; whether it was. For repair, where asked for.

        The condition is the digest that the item had when it was read and compared just now: whatever any sidecar
        writes meanwhile changes it. Raises StoreError.
        """
        body = {"TableName": self._options.table, "Key": {"log_id": {"S": record.log_id}}, "ConsistentRead": True}
        found = await self.wire.call("GetItem", _json(body))
        try:
            item = _get_answer.decode(found).item
            same = item is not None and item.record() == seen
            held = msgspec.json.decode(found)["Item"].get("h") if same else None
        except (msgspec.DecodeError, ValueError, AttributeError):
            raise errors.unreadable("GetItem") from None
        if not same:
            return False
        (new,) = await self._encode([record])
        if not fits(new):
            raise errors.error(RetryClass.PERMANENT, _TOO_LARGE, "ItemTooLarge")
        condition = b'"attribute_exists(log_id) AND attribute_not_exists(h)"'
        if held is not None:
            condition = b'"h = :h","ExpressionAttributeValues":{":h":%b}' % _json(held)
        put = b'{"TableName":%b,"ConditionExpression":%b,"Item":%b}' % (_json(self._options.table), condition, new)
        try:
            await self.wire.call("PutItem", put)
        except StoreError as failure:
            if failure.code == errors.CONDITION_FAILED:
                return False
            raise
        return True

    async def get(self, log_id: str) -> LogRecord | None:
        """Strongly consistent; an expired record is None."""
        body = {"TableName": self._options.table, "Key": {"log_id": {"S": log_id}}, "ConsistentRead": True}
        answer = await self.wire.call("GetItem", _json(body))
        try:
            item = _get_answer.decode(answer).item
            record = None if item is None else item.record()
        except (msgspec.DecodeError, ValueError):
            raise errors.unreadable("GetItem") from None
        if record is None or record.log_timestamp < self._pages.visible_from():
            return None
        return record

    async def examine(self, log_id: str) -> Examined | None:
        """Strongly consistent, all of it: by the item's attributes, not by what an index shows at the moment."""
        schedule = await self._shards.current()
        body = {"TableName": self._options.table, "Key": {"log_id": {"S": log_id}}, "ConsistentRead": True}
        answer = await self.wire.call("GetItem", _json(body))
        try:
            item = _keyed_answer.decode(answer).item
            record = None if item is None else item.record()
        except (msgspec.DecodeError, ValueError):
            raise errors.unreadable("GetItem") from None
        if item is None or record is None or record.log_timestamp < self._pages.visible_from():
            return None
        return Examined(record, item.wrong(record, digest(record), schedule.fan_out(record.log_timestamp // DAY)))

    async def query(self, query: Query, *, before: Position | None, limit: int) -> Sequence[LogRecord]:
        """Through an index, eventually consistent; the bodies by id."""
        return await self._queries.query(query, before=before, limit=limit)

    async def summaries(self, query: Query, *, before: Position | None, limit: int) -> Sequence[Summary]:
        """From an index alone, eventually consistent."""
        return await self._queries.summaries(query, before=before, limit=limit)

    async def count_by(self, query: CountQuery, group: CountGroup) -> Mapping[str, int]:
        """From the indexes alone, like ``count``."""
        return await self._enumeration.count_by(query, group)

    async def estimate(self, query: CountQuery) -> Estimate:
        """From a share of the indexes."""
        return await self._enumeration.estimate(query)

    async def sample(self, *, before: int, limit: int) -> Sequence[LogRecord]:
        """A few entries of the service index, from another part of it each time."""
        return await self._queries.sample(before, limit)

    async def count(self, query: CountQuery) -> int:
        """From the indexes alone; over all services by a scan of the whole service index."""
        return await self._enumeration.count(query)

    def scan(self, start: int, end: int, *, hours: HourFilter | None = None) -> AsyncIterator[ScanEntry]:
        """From a scan of the whole service index, sorted outside memory."""
        return self._enumeration.scan(start, end, hours)

    def deep_scan(self, start: int, end: int) -> AsyncIterator[ScanEntry]:
        """The scan, and each item that it names."""
        return self._enumeration.deep_scan(start, end)

    def stream(
        self, start: int, end: int, *, after: Position | None = None, hours: HourFilter | None = None
    ) -> AsyncIterator[Sequence[LogRecord]]:
        """One scan of the whole service index, sorted outside memory; then only the bodies that are wanted."""
        return self._enumeration.stream(start, end, after, hours)

    async def ping(self) -> None:
        """A conditional put that can never apply: proves table, permission, key and quota; stores nothing."""
        await self._shards.current()
        body = {
            "TableName": self._options.table,
            "Item": {"log_id": {"S": PING_ID}},
            "ConditionExpression": "log_id = :never",
            "ExpressionAttributeValues": {":never": {"S": ""}},
        }
        try:
            await self.wire.call("PutItem", _json(body))
        except StoreError as failure:
            if failure.code == errors.CONDITION_FAILED:
                return
            if failure.retry_class is RetryClass.PERMANENT:  # this item is right: the table is not ours
                raise errors.error(
                    RetryClass.BLOCKED, "PutItem: the table has another key: check dynamodb.table", failure.code
                ) from None
            raise

    async def canary(self, record: LogRecord) -> LogRecord | None:
        """Put, get and delete under the canary's prefix (``sidecar.canary``)."""
        return await canary.tried(self.wire, self._options.table, record)

    async def create(self) -> Sequence[str]:
        """Both tables, missing indexes, TTL, point-in-time recovery, and the shard schedule."""
        done = list(await schema.create(self.wire, self._options, clock=self._clock))
        shards = await self._shards.establish(self._options.shards)
        return [*done, shards] if shards else done

    async def check(self) -> Sequence[Check]:
        """Keys, states and projections; lines named ``warning: ...`` are always ok."""
        found = list(await schema.check(self.wire, self._options))
        found.append(await self._shards.check())
        return found

    async def close(self) -> None:
        """Release the connections; the next call opens them again."""
        await self.wire.close()

    async def _encode(self, batch: Sequence[LogRecord]) -> list[bytes]:
        if not batch:
            return []
        schedule = self._shards.peek() or await self._shards.current()
        ttl = self._options.ttl_days
        shards = {day: schedule.shards(day) for day in {record.log_timestamp // DAY for record in batch}}
        return [encode_item(record, shards[record.log_timestamp // DAY], ttl) for record in batch]

    async def _put(self, item: bytes) -> _Capacity | None:
        """Put an item under an id that is not there, and what it cost; None where the id was there."""
        body = (
            b'{"TableName":%b,"ConditionExpression":"attribute_not_exists(log_id)",'
            b'"ReturnConsumedCapacity":"INDEXES","Item":%b}' % (_json(self._options.table), item)
        )
        async with self._putting:
            try:
                answer = await self.wire.call("PutItem", body)
            except StoreError as failure:
                if failure.code == errors.CONDITION_FAILED:
                    return None
                raise
        try:
            return _put_answer.decode(answer).consumed or _NOT_TOLD
        except msgspec.DecodeError:
            raise errors.unreadable("PutItem") from None

    async def _fill(self, index: int, item: bytes) -> _Capacity | Failure | None:
        if not fits(item):
            return Failure(index, RetryClass.PERMANENT, _TOO_LARGE, "ItemTooLarge")
        try:
            return await self._put(item)
        except StoreError as failure:
            if failure.retry_class not in _OF_ONE_RECORD:
                raise
            return Failure(index, failure.retry_class, failure.reason, failure.code)


def _check_batch(batch: Sequence[LogRecord]) -> None:
    """The service refuses what is checked here; emulators do not."""
    if len(batch) > MAX_BATCH_ITEMS:
        raise errors.error(
            RetryClass.PERMANENT, f"{len(batch)} records in one batch, allowed: {MAX_BATCH_ITEMS}", "BatchTooLarge"
        )
    if len({record.log_id for record in batch}) != len(batch):
        raise errors.error(RetryClass.PERMANENT, "one log_id twice in a batch", "DuplicateKey")


def _throttled(batch: Sequence[LogRecord], left: Sequence[str]) -> list[Failure]:
    """A failure for each id that the service did not process."""
    positions = {record.log_id: index for index, record in enumerate(batch)}
    if not positions.keys() >= set(left):
        raise errors.unreadable("BatchWriteItem")
    reason = "not processed: table or index throttles"
    return [Failure(positions[log_id], RetryClass.THROTTLE, reason, errors.UNPROCESSED) for log_id in left]


def _consumed(reported: Sequence[_Capacity]) -> tuple[tuple[str, float], ...]:
    found: list[tuple[str, float]] = []
    for capacity in reported:
        if capacity.table is not None:
            found.append(("table", capacity.table.units))
        elif capacity.units and not capacity.indexes:
            found.append(("table", capacity.units))
        found.extend((name, index.units) for name, index in capacity.indexes.items())
    return tuple(found)

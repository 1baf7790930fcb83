"""The fleet's tables in DynamoDB: items of the fleet table, beside the schedule of shards and the gap ledger.

    pk            sk                                  what conditions look at       the value
    fleet         record                              epoch N, revision N           document S (JSON)
    heartbeats    ["instance","incarnation"]          seq N                         document S
    leases        the lease's name                    holder S, seq N               lasts N, seconds
    audit         <epoch>#<id>#<outcome>              -                             document S
    fates#<id>    ["store","by"]                      revision N                    state, retry_class S, at_us N

Every write is one conditional call on one item: it applies wholly or not at all, and a condition that does not hold is
an answer, no error. Every read is strongly consistent, but for what people read (``leader``). ``put_fates`` and
``put_gaps`` are one such call for each line.

* Nothing is deleted but a heartbeat, and that only as it was last seen: the role needs DeleteItem on
  ``pk = heartbeats`` alone. A lease that is given back has no holder; its ``seq`` goes on growing, so that no two
  leases are ever alike.
* The service has no clock to ask: a lease is taken over by who has watched it for its whole time (``stores.lease``).
* The trail is read from its newest epoch back, and within an epoch in the order in which people's clocks say it went;
  the key has no time in it, so that a repeated line is the same item.
* All heartbeats lie in one partition, which takes 1,000 writes a second: at the default interval, 10,000 instances.
"""

import asyncio
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Final, TypeVar

import msgspec

from sidecar import settings
from sidecar.clock import Clock
from sidecar.errors import RetryClass, StoreError
from sidecar.fleet_tables import AuditEntry, FateLine, FleetRecord, Heartbeat
from sidecar.gaps import GapLine
from sidecar.phase import DYNAMODB, StoreName
from sidecar.stores import dynamodb_errors as errors
from sidecar.stores.dynamodb_gaps import DynamoDBGaps
from sidecar.stores.dynamodb_parallel import all_or_first_error
from sidecar.stores.dynamodb_wire import Wire
from sidecar.stores.lease import Lease, LeaseWatch

_T = TypeVar("_T")
_Values = Mapping[str, Mapping[str, str]]
_Item = Mapping[str, Any]
_json: Final = msgspec.json.encode
_MISSING: Final = "ResourceNotFoundException"
_AT_ONCE: Final = 8  # calls under way for the lines of one call
_STAGES: Final = ("intended", "refused", "lost", "done")  # equal times: what comes first
_NOBODY: Final = ""


class _Found(msgspec.Struct):
    item: dict[str, dict[str, Any]] | None = msgspec.field(name="Item", default=None)


class _Page(msgspec.Struct):
    items: list[dict[str, dict[str, Any]]] = msgspec.field(name="Items")
    following: dict[str, Any] | None = msgspec.field(name="LastEvaluatedKey", default=None)


class DynamoDBFleet:
    """``sidecar.fleet_tables.FleetStore`` in the fleet table.

    Args:
        wire: to the service.
        gaps: the store's gap ledger, which is the fleet's.
        options: for the table's name.
        clock: for leases.
    """

    def __init__(self, wire: Wire, gaps: DynamoDBGaps, options: settings.DynamoDB, *, clock: Clock) -> None:
        self._wire = wire
        self._gaps = gaps
        self._table = options.fleet_table
        self._clock = clock
        self._watch = LeaseWatch()
        self._calls = asyncio.Semaphore(_AT_ONCE)

    @property
    def name(self) -> StoreName:
        """Return ``dynamodb``."""
        return DYNAMODB

    async def read_record(self) -> FleetRecord | None:
        """The one item; None, too, where there is no fleet table."""
        try:
            item = await self._get("fleet", "record")
        except StoreError as error:
            if error.code == _MISSING:
                return None
            raise
        return None if item is None else _decoded(item, FleetRecord)

    async def cas_record(self, expected: FleetRecord | None, new: FleetRecord) -> bool:
        """One conditional put. An answer that was lost reads False when repeated, though the item is this writer's."""
        values = {"epoch": _n(new.epoch), "revision": _n(new.revision), "document": _document(new)}
        if expected is None:
            return await self._put("fleet", "record", values, "attribute_not_exists(pk)")
        return await self._put(
            "fleet",
            "record",
            values,
            "epoch = :epoch AND revision = :revision",
            {":epoch": _n(expected.epoch), ":revision": _n(expected.revision)},
        )

    async def put_heartbeat(self, heartbeat: Heartbeat) -> None:
        """One conditional put."""
        seq = _n(heartbeat.seq)
        values = {"seq": seq, "document": _document(heartbeat)}
        await self._put("heartbeats", _key(heartbeat.key), values, _NEWER.format("seq"), {":new": seq})

    async def heartbeats(self) -> Sequence[Heartbeat]:
        """All pages of the partition; half a kilobyte each, so 2,000 to a page."""
        return [_decoded(item, Heartbeat) for item in await self._query("heartbeats")]

    async def drop_heartbeat(self, key: tuple[str, str], seq: int) -> None:
        """One conditional delete; that of a row that is not there changes nothing."""
        body = {
            "TableName": self._table,
            "Key": {"pk": {"S": "heartbeats"}, "sk": {"S": _key(key)}},
            "ConditionExpression": "seq = :seen",
            "ExpressionAttributeValues": {":seen": _n(seq)},
        }
        await self._applies("DeleteItem", body)

    async def acquire_lease(self, name: str, holder: str, ttl_s: float) -> bool:
        """A read, and a compare-and-set on the (holder, seq) that it showed."""
        lease = await self._lease(name)
        held = None if lease is None or lease.holder == _NOBODY else lease
        if not self._watch.may_take(name, held, holder, self._clock.monotonic()):
            return False
        return await self._put_lease(name, lease, holder, ttl_s)

    async def release_lease(self, name: str, holder: str) -> None:
        """A read, and the same compare-and-set to nobody."""
        lease = await self._lease(name)
        if lease is not None and lease.holder == holder:
            await self._put_lease(name, lease, _NOBODY, 0.0)

    async def leader(self, lease: str) -> Heartbeat | None:
        """Two reads of one item each, eventually consistent: half a read unit each. A lease that ran out still counts.

        Whose lease ran out is known to who watched it alone; the next holder replaces it.
        """
        item = await self._get("leases", lease, consistent=False)
        holder = "" if item is None else _lease_of(item).holder
        instance, _, incarnation = holder.rpartition("/")
        beat = await self._get("heartbeats", _key((instance, incarnation)), consistent=False) if instance else None
        return None if beat is None else _decoded(beat, Heartbeat)

    async def append_audit(self, entry: AuditEntry) -> None:
        """One conditional put."""
        key = f"{entry.epoch:016d}#{entry.id}#{entry.outcome}"
        await self._put("audit", key, {"document": _document(entry)}, "attribute_not_exists(pk)")

    async def audits(self, limit: int) -> Sequence[AuditEntry]:
        """From the newest epoch back, whole epochs, until there are enough."""
        found: list[AuditEntry] = []
        start: Any = None
        while True:
            page = await self._page("audit", start, backwards=True)
            found += [_decoded(item, AuditEntry) for item in page.items]
            start = page.following
            if start is None or (len(found) > limit and found[limit - 1].epoch > found[-1].epoch):
                break
        found.sort(key=lambda entry: (entry.epoch, entry.at_us, _STAGES.index(entry.outcome)), reverse=True)
        return found[:limit]

    async def put_gaps(self, lines: Sequence[GapLine]) -> None:
        """The store's gap ledger: there is one."""
        await self._gaps.put_gaps(lines)

    async def gaps(self) -> Sequence[GapLine]:
        """The store's gap ledger."""
        return await self._gaps.gaps()

    async def put_fates(self, lines: Sequence[FateLine]) -> None:
        """Each line by itself; after a StoreError some of them are written: repeat the call."""
        await all_or_first_error([self._put_fate(line) for line in lines])

    async def fates(self, log_ids: Sequence[str]) -> Sequence[FateLine]:
        """One query for each id, some at once."""
        ids = list(dict.fromkeys(log_ids))
        return list(chain.from_iterable(await all_or_first_error([self._fates(log_id) for log_id in ids])))

    async def _put_fate(self, line: FateLine) -> None:
        revision = _n(line.revision)
        values: _Values = {
            "state": {"S": line.state},
            "retry_class": {"S": line.retry_class},
            "at_us": _n(line.at_us),
            "revision": revision,
        }
        key = _key((line.store, line.by))
        async with self._calls:
            await self._put(f"fates#{line.log_id}", key, values, _NEWER.format("revision"), {":new": revision})

    async def _fates(self, log_id: str) -> Sequence[FateLine]:
        async with self._calls:
            return [_fate(log_id, item) for item in await self._query(f"fates#{log_id}")]

    async def _lease(self, name: str) -> Lease | None:
        item = await self._get("leases", name)
        return None if item is None else _lease_of(item)

    async def _put_lease(self, name: str, seen: Lease | None, holder: str, lasts: float) -> bool:
        values = {"holder": {"S": holder}, "lasts": {"N": str(float(lasts))}}
        if seen is None:
            return await self._put("leases", name, {**values, "seq": _n(1)}, "attribute_not_exists(pk)")
        return await self._put(
            "leases",
            name,
            {**values, "seq": _n(seen.seq + 1)},
            "holder = :holder AND seq = :seq",
            {":holder": {"S": seen.holder}, ":seq": _n(seen.seq)},
        )

    async def _put(self, pk: str, sk: str, values: _Values, condition: str, arguments: _Values | None = None) -> bool:
        """A put under a condition; whether it applied."""
        body = {
            "TableName": self._table,
            "Item": {"pk": {"S": pk}, "sk": {"S": sk}, **values},
            "ConditionExpression": condition,
        }
        if arguments is not None:
            body["ExpressionAttributeValues"] = arguments
        return await self._applies("PutItem", body)

    async def _applies(self, operation: str, body: Mapping[str, Any]) -> bool:
        try:
            await self._wire.call(operation, _json(body))
        except StoreError as failure:
            if failure.code == errors.CONDITION_FAILED:
                return False
            raise
        return True

    async def _get(self, pk: str, sk: str, *, consistent: bool = True) -> _Item | None:
        body = {"TableName": self._table, "Key": {"pk": {"S": pk}, "sk": {"S": sk}}, "ConsistentRead": consistent}
        return _answer(await self._wire.call("GetItem", _json(body)), _Found).item

    async def _query(self, pk: str) -> Sequence[_Item]:
        found: list[_Item] = []
        start: Any = None
        while True:
            page = await self._page(pk, start)
            found += page.items
            start = page.following
            if start is None:
                return found

    async def _page(self, pk: str, start: Any, *, backwards: bool = False) -> _Page:
        body: dict[str, Any] = {
            "TableName": self._table,
            "KeyConditionExpression": "pk = :pk",
            "ExpressionAttributeValues": {":pk": {"S": pk}},
            "ConsistentRead": True,
            "ScanIndexForward": not backwards,
        }
        if start is not None:
            body["ExclusiveStartKey"] = start
        return _answer(await self._wire.call("Query", _json(body)), _Page)


_NEWER: Final = "attribute_not_exists(pk) OR {} < :new"


def _n(number: int) -> dict[str, str]:
    return {"N": str(number)}


def _document(value: msgspec.Struct) -> dict[str, str]:
    return {"S": _json(value).decode()}


def _key(parts: tuple[str, ...]) -> str:
    """Texts as one that no other texts give, whatever is in them."""
    return _json(parts).decode()


def _decoded(item: _Item, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(item["document"]["S"], type=kind)
    except (msgspec.DecodeError, KeyError, TypeError):
        raise _unreadable() from None


def _lease_of(item: _Item) -> Lease:
    try:
        return Lease(item["holder"]["S"], int(item["seq"]["N"]), float(item["lasts"]["N"]))
    except (KeyError, TypeError, ValueError):
        raise _unreadable() from None


def _fate(log_id: str, item: _Item) -> FateLine:
    try:
        store, by = msgspec.json.decode(item["sk"]["S"], type=tuple[str, str])
        return msgspec.convert(
            {
                "log_id": log_id,
                "store": store,
                "by": by,
                "state": item["state"]["S"],
                "retry_class": item["retry_class"]["S"],
                "at_us": int(item["at_us"]["N"]),
                "revision": int(item["revision"]["N"]),
            },
            FateLine,
        )
    except (msgspec.DecodeError, KeyError, TypeError, ValueError):
        raise _unreadable() from None


def _answer(body: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError:
        raise errors.unreadable("fleet table") from None


def _unreadable() -> StoreError:
    return errors.error(RetryClass.BLOCKED, "an item of the fleet table cannot be read: restore it", "FleetTable")

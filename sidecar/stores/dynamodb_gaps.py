"""The gap ledger in DynamoDB: items of the fleet table under ``pk = "gaps"``.

THE ITEM: ``sk`` = ``<store>#<kind>#<hour>#<source>``, ``opened`` N, ``closed`` N; the source is the rest of the key, so
it may hold any character. One line a call, conditional, because the service has no maximum:

* ``opened`` is set where it is missing or smaller; ``closed`` starts at 0;
* then, for a line that closes something, ``closed`` likewise.

A call that does not apply says that the ledger knows as much already. Each of the two counts is replaced atomically and
only grows, so two writers of one line end with the larger of each, whatever their order; a reader in between sees the
line open, never closed too early.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Final, cast

import msgspec

from sidecar import settings
from sidecar.errors import RetryClass, StoreError
from sidecar.gaps import GapKind, GapLine, summed
from sidecar.phase import STORES, StoreName
from sidecar.stores import dynamodb_errors as errors
from sidecar.stores.dynamodb_parallel import all_or_first_error
from sidecar.stores.dynamodb_wire import Wire

_PARTITION: Final = "gaps"
_AT_ONCE: Final = 8  # calls under way
_KINDS: Final = frozenset({"history", "not_owed", "released"})
_json = msgspec.json.encode


class DynamoDBGaps:
    """``sidecar.gaps.GapLedger`` in the fleet table."""

    def __init__(self, wire: Wire, options: settings.DynamoDB) -> None:
        self._wire = wire
        self._table = options.fleet_table
        self._calls = asyncio.Semaphore(_AT_ONCE)

    async def put_gaps(self, lines: Sequence[GapLine]) -> None:
        """Each line by itself; after a StoreError some of them are written: repeat the call."""
        await all_or_first_error([self._put(line) for line in summed(lines)])

    async def _put(self, line: GapLine) -> None:
        await self._raise("opened", line.opened, line, ", closed = if_not_exists(closed, :zero)", {":zero": {"N": "0"}})
        if line.closed:
            await self._raise("closed", line.closed, line, "", {})

    async def _raise(self, count: str, value: int, line: GapLine, also: str, values: dict[str, Any]) -> None:
        body = {
            "TableName": self._table,
            "Key": {"pk": {"S": _PARTITION}, "sk": {"S": "#".join(map(str, line.key))}},
            "UpdateExpression": f"SET {count} = :n{also}",
            "ConditionExpression": f"attribute_not_exists({count}) OR {count} < :n",
            "ExpressionAttributeValues": {":n": {"N": str(value)}, **values},
        }
        async with self._calls:
            try:
                await self._wire.call("UpdateItem", _json(body))
            except StoreError as failure:
                if failure.code != errors.CONDITION_FAILED:
                    raise

    async def gaps(self) -> Sequence[GapLine]:
        """Strongly consistent; all pages of the partition."""
        found: list[GapLine] = []
        start: Any = None
        while True:
            body: dict[str, Any] = {
                "TableName": self._table,
                "KeyConditionExpression": "pk = :pk",
                "FilterExpression": "opened > closed",
                "ExpressionAttributeValues": {":pk": {"S": _PARTITION}},
                "ConsistentRead": True,
            }
            if start is not None:
                body["ExclusiveStartKey"] = start
            try:
                answer = msgspec.json.decode(await self._wire.call("Query", _json(body)))
                found += [_line(item) for item in answer["Items"]]
                start = answer.get("LastEvaluatedKey")
            except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError):
                raise errors.error(
                    RetryClass.BLOCKED, "the gap ledger in the fleet table is unreadable: restore it", "GapLedger"
                ) from None
            if start is None:
                return found


def _line(item: Any) -> GapLine:
    store, kind, hour, source = item["sk"]["S"].split("#", 3)
    if store not in STORES or kind not in _KINDS:
        raise ValueError
    return GapLine(
        store=cast("StoreName", store),
        kind=cast("GapKind", kind),
        hour=int(hour),
        source=source,
        opened=int(item["opened"]["N"]),
        closed=int(item["closed"]["N"]),
    )

"""What long jobs remember: documents of the fleet table under ``pk = "backfill"``, replaced by compare-and-set.

THE ITEM: ``sk`` = the document's key, ``version`` N, counted from 1, ``document`` S. A write is one conditional put: it
applies wholly or not at all. Nothing is ever deleted: a job's last document says how it ended.
"""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from sidecar import settings
from sidecar.errors import RetryClass, StoreError
from sidecar.stores import dynamodb_errors as errors
from sidecar.stores.dynamodb_wire import Wire

_PARTITION: Final = "backfill"
_json = msgspec.json.encode


class DynamoDBJobs:
    """``sidecar.backfill.checkpoint.JobStore`` in the fleet table. Every method raises StoreError."""

    def __init__(self, wire: Wire, options: settings.DynamoDB) -> None:
        self._wire = wire
        self._table = options.fleet_table

    async def read(self, key: str) -> tuple[bytes, int] | None:
        """Strongly consistent."""
        body = {"TableName": self._table, "Key": _key(key), "ConsistentRead": True}
        answer = _parsed(await self._wire.call("GetItem", _json(body)))
        item = answer.get("Item")
        return None if item is None else _value(item)

    async def write(self, key: str, value: bytes, expected: int) -> bool:
        """One conditional put."""
        body: dict[str, Any] = {
            "TableName": self._table,
            "Item": {**_key(key), "version": {"N": str(expected + 1)}, "document": {"S": value.decode()}},
            "ConditionExpression": "attribute_not_exists(pk)",
        }
        if expected:
            body["ConditionExpression"] = "version = :v"
            body["ExpressionAttributeValues"] = {":v": {"N": str(expected)}}
        try:
            await self._wire.call("PutItem", _json(body))
        except StoreError as failure:
            if failure.code == errors.CONDITION_FAILED:
                return False
            raise
        return True

    async def all(self, prefix: str) -> Sequence[tuple[str, bytes]]:
        """All pages, strongly consistent."""
        found: list[tuple[str, bytes]] = []
        body: dict[str, Any] = {
            "TableName": self._table,
            "KeyConditionExpression": "pk = :p AND begins_with(sk, :s)",
            "ExpressionAttributeValues": {":p": {"S": _PARTITION}, ":s": {"S": prefix}},
            "ConsistentRead": True,
        }
        while True:
            page = _parsed(await self._wire.call("Query", _json(body)))
            found += [(item["sk"]["S"], _value(item)[0]) for item in page.get("Items", ())]
            if page.get("LastEvaluatedKey") is None:
                return found
            body["ExclusiveStartKey"] = page["LastEvaluatedKey"]


def _key(key: str) -> dict[str, Any]:
    return {"pk": {"S": _PARTITION}, "sk": {"S": key}}


def _parsed(answer: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(answer, type=dict[str, Any])
    except msgspec.DecodeError:
        raise errors.unreadable("GetItem") from None


def _value(item: Any) -> tuple[bytes, int]:
    try:
        return str(item["document"]["S"]).encode(), int(item["version"]["N"])
    except (KeyError, TypeError, ValueError):
        raise errors.error(
            RetryClass.BLOCKED, "a job's document in the fleet table is unreadable: restore or delete it", "Job"
        ) from None

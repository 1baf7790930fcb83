"""Verdicts of validations in DynamoDB: items of the fleet table under ``pk = "validation"``.

====================================  ====================================================================
``sk``                                attributes
====================================  ====================================================================
``day#<days since the epoch, 8>``     ``at`` N when its run began (microseconds), ``doc`` S the verdict, JSON
``run#<start, 20>#<id>``              ``doc`` S the line, JSON
``everything``                        ``doc`` S the line of the last finished run over everything, JSON
``write#<days since the epoch, 8>``   ``at`` N when a record of that day was last written
====================================  ====================================================================

Numbers in keys are decimal, padded, with 10**7 days or 10**18 microseconds added so that years before 1970 sort too.
A verdict replaces an older one, and a time a smaller one, by a condition on ``at``: a call that does not apply says
that the ledger knows as much already. Reads are strongly consistent.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from sidecar import settings
from sidecar.errors import RetryClass, StoreError
from sidecar.stores import dynamodb_errors as errors
from sidecar.stores.dynamodb_parallel import all_or_first_error
from sidecar.stores.dynamodb_wire import Wire
from sidecar.verdicts import DayVerdict, RunLine

_PARTITION: Final = "validation"
_BASELINE: Final = "everything"
_AT_ONCE: Final = 8  # calls under way
_TASKS: Final = 256  # waiting for their turn
_DAYS: Final = 10**7
_TIMES: Final = 10**18
_json = msgspec.json.encode
_T = TypeVar("_T", bound=msgspec.Struct)


class DynamoDBVerdicts:
    """``sidecar.verdicts.ValidationLedger`` in the fleet table."""

    def __init__(self, wire: Wire, options: settings.DynamoDB) -> None:
        self._wire = wire
        self._table = options.fleet_table
        self._calls = asyncio.Semaphore(_AT_ONCE)

    async def put_days(self, verdicts: Sequence[DayVerdict]) -> None:
        """Each by itself; after a StoreError some of them are written: repeat the call."""
        for start in range(0, len(verdicts), _TASKS):
            await all_or_first_error(
                [self._raise(_day_key("day", v.day), v.started_us, v) for v in verdicts[start : start + _TASKS]]
            )

    async def days(self) -> Sequence[DayVerdict]:
        """By day."""
        return [_decoded(item, DayVerdict) async for item in self._items("day#")]

    async def put_run(self, line: RunLine) -> None:
        """One item; a line of a hundred examples is some 30 KB."""
        keys = [_run_key(line)]
        if line.everything and line.finished_us is not None:
            keys.append(_BASELINE)
        for key in keys:
            item = {"pk": {"S": _PARTITION}, "sk": {"S": key}, "doc": {"S": _json(line).decode()}}
            await self._wire.call("PutItem", _json({"TableName": self._table, "Item": item}))

    async def runs(self, limit: int) -> Sequence[RunLine]:
        """Newest first."""
        return [_decoded(item, RunLine) async for item in self._items("run#", newest=limit)]

    async def baseline(self) -> RunLine | None:
        """One item."""
        found = [_decoded(item, RunLine) async for item in self._items(_BASELINE)]
        return found[0] if found else None

    async def note_writes(self, days: Mapping[int, int]) -> None:
        """Each day by itself."""
        await all_or_first_error([self._raise(_day_key("write", day), at_us, None) for day, at_us in days.items()])

    async def writes(self) -> Mapping[int, int]:
        """All of them."""
        return {_number(item, "sk", _DAYS): _number(item, "at") async for item in self._items("write#")}

    async def _raise(self, key: str, at_us: int, document: DayVerdict | None) -> None:
        body: dict[str, Any] = {
            "TableName": self._table,
            "Key": {"pk": {"S": _PARTITION}, "sk": {"S": key}},
            "UpdateExpression": "SET #at = :at",
            "ConditionExpression": "attribute_not_exists(#at) OR #at < :at",
            "ExpressionAttributeNames": {"#at": "at"},
            "ExpressionAttributeValues": {":at": {"N": str(at_us)}},
        }
        if document is not None:
            body["UpdateExpression"] += ", doc = :doc"
            body["ConditionExpression"] = "attribute_not_exists(#at) OR #at <= :at"
            body["ExpressionAttributeValues"][":doc"] = {"S": _json(document).decode()}
        async with self._calls:
            try:
                await self._wire.call("UpdateItem", _json(body))
            except StoreError as failure:
                if failure.code != errors.CONDITION_FAILED:
                    raise

    async def _items(self, prefix: str, newest: int | None = None) -> AsyncIterator[dict[str, Any]]:
        body: dict[str, Any] = {
            "TableName": self._table,
            "KeyConditionExpression": "pk = :pk AND begins_with(sk, :sk)",
            "ExpressionAttributeValues": {":pk": {"S": _PARTITION}, ":sk": {"S": prefix}},
            "ConsistentRead": True,
        }
        if newest is not None:
            body |= {"ScanIndexForward": False, "Limit": newest}
        while True:
            answer = _read(await self._wire.call("Query", _json(body)))
            for item in answer["Items"]:
                yield item
            start = answer.get("LastEvaluatedKey")
            if start is None or newest is not None:
                return
            body["ExclusiveStartKey"] = start


def _day_key(kind: str, day: int) -> str:
    return f"{kind}#{day + _DAYS:08d}"


def _run_key(line: RunLine) -> str:
    return f"run#{line.started_us + _TIMES:020d}#{line.id}"


def _read(answer: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = msgspec.json.decode(answer)
        found["Items"]
    except (msgspec.DecodeError, KeyError, TypeError):
        raise _unreadable() from None
    return found


def _decoded(item: Mapping[str, Any], kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(item["doc"]["S"], type=kind)
    except (msgspec.DecodeError, KeyError, TypeError):
        raise _unreadable() from None


def _number(item: Mapping[str, Any], name: str, base: int = 0) -> int:
    try:
        if base:
            return int(item[name]["S"].partition("#")[2]) - base
        return int(item[name]["N"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _unreadable() from None


def _unreadable() -> StoreError:
    return errors.error(
        RetryClass.BLOCKED, "the verdicts in the fleet table are unreadable: delete pk=validation there", "Verdicts"
    )

"""A DynamoDB that keeps what it is given and answers what is asked of it, quickly: thousands of calls a second.

For tests and benchmarks that move more records than the local DynamoDB can take (some hundred calls a second). It
speaks the data plane as this product uses it, with the service's own meaning: conditions, key conditions and filters
are parsed and evaluated, pages end at 1 MB of what was read, segments of a scan partition the table, an index holds
the items that have its hash key. It knows no throttling, no eventual consistency and no size bounds: those are the
fault proxy's and the real service's. The control plane is the canned server's.

    async with TableServer() as server: ... server.url ...        or: python -m benchmarks.table_dynamodb
"""

import asyncio
import json
import re
import sys
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Self
from zlib import crc32

import msgspec
import uvloop

from benchmarks import canned_dynamodb as canned
from benchmarks.canned_dynamodb import ApiError, Json

PAGE_BYTES = 1024 * 1024
ENTRY_BYTES = 220  # of an index entry, about
_TOKEN = re.compile(
    r"\s*(attribute_not_exists|attribute_exists|begins_with|BETWEEN|AND|OR|NOT|<>|<=|>=|[=<>(),]|[:#\w]+)"
)
_decode = msgspec.json.decode
_encode = msgspec.json.encode


def plain(value: Json | None) -> Any:
    """What is compared: text, number, bytes as base64, bool; None where the attribute is absent."""
    if value is None:
        return None
    ((kind, inner),) = value.items()
    return float(inner) if kind == "N" and "." in inner else int(inner) if kind == "N" else inner


class Expression:
    """A condition of the service's grammar, as far as this product goes: NOT binds tightest, then AND, then OR."""

    def __init__(self, text: str, names: Json, values: Json) -> None:
        self._tokens = _TOKEN.findall(text)
        if "".join(self._tokens) != re.sub(r"\s+", "", text):
            raise ApiError("ValidationException", f"not understood: {text}")
        self._at = 0
        self._names = names
        self._values = values
        self.test: Callable[[Json], bool] = self._or()
        if self._at != len(self._tokens):
            raise ApiError("ValidationException", f"not understood: {text}")

    def _take(self, wanted: str | None = None) -> str:
        token: str = self._tokens[self._at]
        if wanted is not None and token != wanted:
            raise ApiError("ValidationException", f"expected {wanted}, seen {token}")
        self._at += 1
        return token

    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _or(self) -> Callable[[Json], bool]:
        parts = [self._and()]
        while self._next() == "OR":
            self._take()
            parts.append(self._and())
        return parts[0] if len(parts) == 1 else lambda item: any(part(item) for part in parts)

    def _and(self) -> Callable[[Json], bool]:
        parts = [self._one()]
        while self._next() == "AND":
            self._take()
            parts.append(self._one())
        return parts[0] if len(parts) == 1 else lambda item: all(part(item) for part in parts)

    def _one(self) -> Callable[[Json], bool]:
        token = self._take()
        if token == "NOT":
            inner = self._one()
            return lambda item: not inner(item)
        if token == "(":
            inner = self._or()
            self._take(")")
            return inner
        if token in ("attribute_not_exists", "attribute_exists"):
            self._take("(")
            name = self._name(self._take())
            self._take(")")
            wanted = token == "attribute_exists"
            return lambda item: (name in item) is wanted
        if token == "begins_with":
            self._take("(")
            left = self._operand(self._take())
            self._take(",")
            right = self._operand(self._take())
            self._take(")")
            return lambda item: left(item) is not None and left(item).startswith(right(item))
        left = self._operand(token)
        operator = self._take()
        low = self._operand(self._take())
        if operator == "BETWEEN":
            self._take("AND")
            high = self._operand(self._take())
            return lambda item: left(item) is not None and low(item) <= left(item) <= high(item)
        compare = COMPARE[operator]
        return lambda item: left(item) is not None and low(item) is not None and compare(left(item), low(item))

    def _name(self, token: str) -> str:
        return str(self._names[token]) if token.startswith("#") else token

    def _operand(self, token: str) -> Callable[[Json], Any]:
        if token.startswith(":"):
            value = plain(self._values[token])
            return lambda _: value
        name = self._name(token)
        return lambda item: plain(item.get(name))


@lru_cache(maxsize=64)
def _parsed(text: str) -> Expression:
    """A condition without names and values, which is the same for every call."""
    return Expression(text, {}, {})


COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": lambda a, b: bool(a == b),
    "<>": lambda a, b: bool(a != b),
    "<": lambda a, b: bool(a < b),
    ">": lambda a, b: bool(a > b),
    "<=": lambda a, b: bool(a <= b),
    ">=": lambda a, b: bool(a >= b),
}


class Table:
    """Items by key; for each index, sort keys in order by hash key."""

    def __init__(self, description: Json) -> None:
        self.key = [part["AttributeName"] for part in sorted(description["KeySchema"], key=lambda p: p["KeyType"])]
        self.items: dict[tuple[str, ...], bytes] = {}
        self.indexes: dict[str, tuple[str, str]] = {}
        for index in description.get("GlobalSecondaryIndexes", []):
            names = [part["AttributeName"] for part in sorted(index["KeySchema"], key=lambda p: p["KeyType"])]
            self.indexes[index["IndexName"]] = (names[0], names[1])
        self.entries: dict[str, dict[str, list[tuple[str, tuple[str, ...]]]]] = {name: {} for name in self.indexes}

    def key_of(self, item: Json) -> tuple[str, ...]:
        return tuple(item[name]["S"] for name in self.key)

    def get(self, key: tuple[str, ...]) -> Json | None:
        found = self.items.get(key)
        return None if found is None else _decode(found)

    def put(self, item: Json) -> None:
        key = self.key_of(item)
        old = self.get(key)
        if old is not None:
            self._unlist(old, key)
        self.items[key] = _encode(item)
        for name, (hashed, sorted_by) in self.indexes.items():
            if hashed in item:
                insort(self.entries[name].setdefault(item[hashed]["S"], []), (item[sorted_by]["S"], key))

    def delete(self, key: tuple[str, ...]) -> None:
        old = self.get(key)
        if old is not None:
            self._unlist(old, key)
            del self.items[key]

    def _unlist(self, item: Json, key: tuple[str, ...]) -> None:
        for name, (hashed, sorted_by) in self.indexes.items():
            if hashed in item:
                entries = self.entries[name][item[hashed]["S"]]
                del entries[bisect_left(entries, (item[sorted_by]["S"], key))]

    def walk(self, index: str | None) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Where a scan goes: (partition, key)."""
        if index is None:
            for key in self.items:
                yield key[0], key
            return
        for partition, entries in self.entries[index].items():
            for _, key in entries:
                yield partition, key


class State(canned.State):
    """The canned server's, with tables that keep."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Table] = {}
        self.walks: dict[tuple[str, str | None, int], list[tuple[str, ...]]] = {}
        self.reached: dict[tuple[str, str | None, int], int] = {}
        self.read_units = 0.0  # as the service counts: half a unit each 4 KB, eventually consistent; twice that else
        self.write_units = 0.0  # a unit each KB in the table, one in each index, one each KB where a condition fails

    def stats(self) -> Json:
        """Counts, and units of all tables together."""
        log = max(self.kept.values(), key=lambda table: len(table.items), default=None)
        return {
            **super().stats(),
            "distinct": 0 if log is None else len(log.items),
            "read_units": self.read_units,
            "write_units": self.write_units,
        }

    def has_read(self, size: int, *, consistent: bool = False) -> None:
        """Count what one answer cost."""
        self.read_units += max(1, -(-size // 4096)) * (1.0 if consistent else 0.5)

    def table(self, name: str) -> Table:
        if name not in self.kept:
            raise ApiError("ResourceNotFoundException", f"Requested resource not found: Table: {name} not found")
        return self.kept[name]


def create_table(state: State, body: bytes) -> bytes:
    answer = canned.create_table(state, body)
    name = _decode(body)["TableName"]
    state.kept[name] = Table(state.tables[name])
    return answer


def delete_table(state: State, body: bytes) -> bytes:
    name = _decode(body)["TableName"]
    state.table(name)
    del state.kept[name]
    return json.dumps({"TableDescription": state.tables.pop(name)}).encode()


def update_table(state: State, body: bytes) -> bytes:
    """Only deletion protection is ever updated."""
    name = _decode(body)["TableName"]
    state.table(name)
    return json.dumps({"TableDescription": state.tables[name]}).encode()


def _condition(request: Json, item: Json | None) -> None:
    text = request.get("ConditionExpression")
    if text is None:
        return
    names, values = request.get("ExpressionAttributeNames", {}), request.get("ExpressionAttributeValues", {})
    expression = Expression(text, names, values) if names or values else _parsed(text)
    if not expression.test(item or {}):
        raise ApiError("ConditionalCheckFailedException", "The conditional request failed")


def _units(table: Table, item: Json, size: int) -> Json:
    """One unit a KB in the table, one in each index that the item is in."""
    per_index = {name: {"CapacityUnits": 1.0} for name, (hashed, _) in table.indexes.items() if hashed in item}
    units = float(-(-size // 1024))
    return {
        "CapacityUnits": units + len(per_index),
        "Table": {"CapacityUnits": units},
        "GlobalSecondaryIndexes": per_index,
    }


def put_item(state: State, body: bytes) -> bytes:
    request = _decode(body)
    table, item = state.table(request["TableName"]), request["Item"]
    units = _units(table, item, len(body))
    state.write_units += units["Table"]["CapacityUnits"]
    _condition(request, table.get(table.key_of(item)))
    table.put(item)
    state.puts += 1
    state.write_units += len(units["GlobalSecondaryIndexes"])
    if "ReturnConsumedCapacity" not in request:
        return b"{}"
    return _encode({"ConsumedCapacity": {"TableName": request["TableName"], **units}})


def batch_write(state: State, body: bytes) -> bytes:
    request = _decode(body)
    consumed = []
    for name, writes in request["RequestItems"].items():
        table = state.table(name)
        total: dict[str, float] = {}
        for write in writes:
            item = write["PutRequest"]["Item"]
            table.put(item)
            state.puts += 1
            units = _units(table, item, 1024)
            total["table"] = total.get("table", 0.0) + units["Table"]["CapacityUnits"]
            state.write_units += units["CapacityUnits"]
            for index in units["GlobalSecondaryIndexes"]:
                total[index] = total.get(index, 0.0) + 1.0
        indexes = {index: {"CapacityUnits": units} for index, units in total.items() if index != "table"}
        consumed.append(
            {
                "TableName": name,
                "CapacityUnits": sum(total.values()),
                "Table": {"CapacityUnits": total.get("table", 0.0)},
                "GlobalSecondaryIndexes": indexes,
            }
        )
    return _encode({"UnprocessedItems": {}, "ConsumedCapacity": consumed})


def get_item(state: State, body: bytes) -> bytes:
    request = _decode(body)
    table = state.table(request["TableName"])
    found = table.items.get(table.key_of(request["Key"]))
    state.has_read(len(found or b""), consistent=bool(request.get("ConsistentRead")))
    return b"{}" if found is None else b'{"Item":%b}' % found


def batch_get(state: State, body: bytes) -> bytes:
    answers = {}
    for name, wanted in _decode(body)["RequestItems"].items():
        table = state.table(name)
        found = [item for key in wanted["Keys"] if (item := table.items.get(table.key_of(key))) is not None]
        for item in found:
            state.has_read(len(item), consistent=bool(wanted.get("ConsistentRead")))
        answers[name] = [msgspec.Raw(item) for item in found]
    return _encode({"Responses": answers, "UnprocessedKeys": {}})


def delete_item(state: State, body: bytes) -> bytes:
    request = _decode(body)
    table = state.table(request["TableName"])
    key = table.key_of(request["Key"])
    _condition(request, table.get(key))
    table.delete(key)
    return b"{}"


def update_item(state: State, body: bytes) -> bytes:
    """``SET a = :x, b = if_not_exists(b, :y)``."""
    request = _decode(body)
    table = state.table(request["TableName"])
    old = table.get(table.key_of(request["Key"]))
    _condition(request, old)
    item = {**request["Key"], **(old or {})}
    values, names = request.get("ExpressionAttributeValues", {}), request.get("ExpressionAttributeNames", {})
    text = request["UpdateExpression"].removeprefix("SET ")
    for part in re.split(r",\s*(?![^(]*\))", text):
        name, _, value = (piece.strip() for piece in part.partition("="))
        name = names.get(name, name)
        kept = re.fullmatch(r"if_not_exists\((\w+),\s*(:\w+)\)", value)
        item[name] = values[value] if kept is None else item.get(kept[1], values[kept[2]])
    table.put(item)
    return b"{}"


def _page(
    state: State, request: Json, found: Iterator[tuple[str, ...]], table: Table, size: Callable[[Json], int]
) -> bytes:
    """Read until 1 MB, the limit or the end; then filter and project."""
    names, values = request.get("ExpressionAttributeNames", {}), request.get("ExpressionAttributeValues", {})
    text = request.get("FilterExpression")
    wanted = None if text is None else Expression(text, names, values).test
    projected = [names.get(n.strip(), n.strip()) for n in request.get("ProjectionExpression", "").split(",") if n]
    read, scanned, limit = 0, 0, request.get("Limit", sys.maxsize)
    items: list[Json] = []
    last: Json | None = None
    for key in found:
        item = table.get(key)
        if item is None:
            continue
        scanned += 1
        read += size(item)
        if wanted is None or wanted(item):
            items.append({name: item[name] for name in projected if name in item} if projected else item)
        if read >= PAGE_BYTES or scanned >= limit:
            index = request.get("IndexName")
            keys = {*table.key, *(table.indexes[index] if index else ())}
            last = {name: item[name] for name in keys}
            break
    state.has_read(read, consistent=bool(request.get("ConsistentRead")))
    answer: Json = {"Count": len(items), "ScannedCount": scanned}
    if request.get("Select") != "COUNT":
        answer["Items"] = items
    if last is not None:
        answer["LastEvaluatedKey"] = last
    return _encode(answer)


def scan(state: State, body: bytes) -> bytes:
    """Segments by the hash of the partition; a walk is kept from page to page, so a page costs what it reads."""
    request = _decode(body)
    name, index = request["TableName"], request.get("IndexName")
    table = state.table(name)
    segment, segments = request.get("Segment", 0), request.get("TotalSegments", 1)
    place = (f"{name}/{segments}", index, segment)
    start = request.get("ExclusiveStartKey")
    if start is None:
        state.walks[place] = [
            key for partition, key in table.walk(index) if crc32(partition.encode()) % segments == segment
        ]
        at = 0
    else:
        walk, key, at = state.walks[place], table.key_of(start), state.reached[place]
        at = at if walk[at - 1] == key else walk.index(key) + 1
    state.reached[place] = at

    def keys() -> Iterator[tuple[str, ...]]:
        walk = state.walks[place]
        while state.reached[place] < len(walk):
            state.reached[place] += 1
            yield walk[state.reached[place] - 1]

    return _page(state, request, keys(), table, (lambda _: ENTRY_BYTES) if index else (lambda item: len(_encode(item))))


_PARTITION = re.compile(r"(\w+) = (:\w+)(?: AND (.+))?")


def query(state: State, body: bytes) -> bytes:
    request = _decode(body)
    table, index = state.table(request["TableName"]), request.get("IndexName")
    names, values = request.get("ExpressionAttributeNames", {}), request.get("ExpressionAttributeValues", {})
    match = _PARTITION.fullmatch(request["KeyConditionExpression"])
    if match is None:
        raise ApiError("ValidationException", "key condition not understood")
    partition = values[match[2]]["S"]
    if index is None:
        entries = sorted((key[1], key) for key in table.items if key[0] == partition)
        sort = table.key[1]
    else:
        entries, sort = table.entries[index].get(partition, []), table.indexes[index][1]
    if match[3] is not None:
        test = Expression(match[3], names, values).test
        entries = [entry for entry in entries if test({sort: {"S": entry[0]}})]
    if request.get("ScanIndexForward") is False:
        entries = entries[::-1]
    start = request.get("ExclusiveStartKey")
    if start is not None:
        place = (start[sort]["S"], table.key_of(start))
        backwards = request.get("ScanIndexForward") is False
        entries = [entry for entry in entries if (entry < place if backwards else entry > place)]
    return _page(state, request, iter([key for _, key in entries]), table, lambda _: ENTRY_BYTES)


OPERATIONS: dict[str, Callable[[Any, bytes], bytes]] = {
    **canned.OPERATIONS,
    "BatchWriteItem": batch_write,
    "PutItem": put_item,
    "GetItem": get_item,
    "DeleteItem": delete_item,
    "UpdateItem": update_item,
    "Query": query,
    "Scan": scan,
    "BatchGetItem": batch_get,
    "CreateTable": create_table,
    "UpdateTable": update_table,
    "DeleteTable": delete_table,
}


class TableServer(canned.Server):
    """The canned server's listeners with these operations."""

    def __init__(self, port: int = 0, control_port: int = 0) -> None:
        super().__init__("127.0.0.1", port, control_port)
        self.state: State = State()
        self.state.handlers = OPERATIONS

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.listener is not None:
            for listening in self.listener.sockets:  # else what was accepted just before is left open by asyncio
                asyncio.get_running_loop().remove_reader(listening.fileno())
            for _ in range(4):
                await asyncio.sleep(0)
            self.listener.close()
        for connection in list(self.state.connections):
            connection.transport.abort()


async def main() -> None:
    server = TableServer()
    await server.start()
    print(json.dumps({"port": server.port, "control": server.control_port}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())

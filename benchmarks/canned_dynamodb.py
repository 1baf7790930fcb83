"""A DynamoDB that answers at once and counts exactly: the far side of a benchmark, never a test of correctness.

What it keeps
    Of the log table only the *set of ids* (parsed out of every put), so that "landed" is counted, not believed. Of
    every other table (fleet, canary) the items themselves, so that the control plane of the sidecar works.
What it can be told (control listener, ``POST /control`` with a JSON object, all keys optional)
    ``mode``: ``normal``, ``stall`` (reads requests, answers nobody), ``refuse`` (closes the listener and every
    connection), ``error`` (500 to everything). ``latency``: seconds added to each answer. ``unprocessed``: share
    0..1 of BatchWriteItem calls that hand back half of their items. ``items_per_second``: a token bucket; what does
    not fit comes back as UnprocessedItems, or as ProvisionedThroughputExceededException where nothing fits.
What it tells (``GET /stats``)
    Distinct ids, puts, requests by operation, bytes received. ``POST /reset`` forgets the log table's ids.

Cost: one ``bytes.split`` and one ``set.update`` per BatchWriteItem. Signatures are not checked.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvloop

COMPACT = b'"log_id":{"S":"'
SPACED = re.compile(rb'"log_id":\s*\{\s*"S":\s*"([^"]+)"')  # botocore's json.dumps puts blanks after , and :
PUT = b'"PutRequest"'
TABLES = re.compile(rb'"(?:TableName|RequestItems)":\s*(?:\{\s*)?"([^"]+)"')
CAPACITY = re.compile(rb'"ReturnConsumedCapacity":\s*"(?:TOTAL|INDEXES)"')
CAPACITY_ANSWER = (
    b'{"UnprocessedItems":{},"ConsumedCapacity":[{"TableName":"%b","CapacityUnits":%d.0,"Table":{"CapacityUnits":%d.0},'
    b'"GlobalSecondaryIndexes":{"service":{"CapacityUnits":%d.0},"application":{"CapacityUnits":%d.0},'
    b'"correlation":{"CapacityUnits":%d.0},"errors":{"CapacityUnits":%d.0}}}]}'
)
UUID_LENGTH = 36
Json = dict[str, Any]


@dataclass
class Behaviour:
    """How the far side behaves just now."""

    mode: str = "normal"
    latency: float = 0.0
    unprocessed: float = 0.0
    items_per_second: float = 0.0


@dataclass
class State:
    """Everything that the server knows."""

    behaviour: Behaviour = field(default_factory=Behaviour)
    ids: set[bytes] = field(default_factory=set)
    puts: int = 0
    received: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    tables: dict[str, Json] = field(default_factory=dict)
    ttl: dict[str, Json] = field(default_factory=dict)
    items: dict[str, dict[str, Json]] = field(default_factory=dict)
    tokens: float = 0.0
    refilled: float = 0.0
    connections: set["Connection"] = field(default_factory=set)
    handlers: dict[str, Callable[[Any, bytes], bytes]] = field(default_factory=lambda: OPERATIONS)

    def stats(self) -> Json:
        return {
            "distinct": len(self.ids),
            "puts": self.puts,
            "received_bytes": self.received,
            "operations": dict(self.operations),
            "connections": len(self.connections),
        }


class ApiError(Exception):
    """An answer of DynamoDB's error shape."""

    def __init__(self, code: str, message: str = "", status: int = 400) -> None:
        self.status = status
        self.body = json.dumps({"__type": f"com.amazonaws.dynamodb.v20120810#{code}", "message": message}).encode()
        super().__init__(code)


# -- data plane ---------------------------------------------------------------------------------------------------


def batch_write(state: State, body: bytes) -> bytes:
    """Count the ids of a BatchWriteItem; hand back what the throttle does not let through."""
    pieces = body.split(COMPACT)
    found = [piece[:UUID_LENGTH] for piece in pieces[1:]] if len(pieces) > 1 else SPACED.findall(body)
    if body.count(PUT) != len(found):
        return batch_write_other(state, body)
    behaviour = state.behaviour
    if behaviour.unprocessed or behaviour.items_per_second:
        return batch_write_throttled(state, body)
    state.ids.update(found)
    state.puts += len(found)
    if CAPACITY.search(body, len(body) - 200) or CAPACITY.search(body, 0, 200):
        return capacity(body, len(found))
    return b'{"UnprocessedItems":{}}'


def capacity(body: bytes, count: int) -> bytes:
    """The answer with what was used: one unit an item, in the table and in each of its four indexes."""
    table = TABLES.search(body)
    name = table.group(1) if table else b""
    return CAPACITY_ANSWER % (name, 5 * count, count, count, count, count, count)


def batch_write_throttled(state: State, body: bytes) -> bytes:
    """The dear path: whole items are handed back, so the body is parsed."""
    behaviour = state.behaviour
    request: Json = json.loads(body)["RequestItems"]
    total = sum(len(puts) for puts in request.values())
    allowed = total
    if behaviour.items_per_second:
        now = time.monotonic()
        refill = (now - state.refilled) * behaviour.items_per_second
        state.tokens = min(behaviour.items_per_second, state.tokens + refill)  # one second of burst
        state.refilled = now
        allowed = min(total, int(state.tokens))
        state.tokens -= allowed
        if not allowed:
            raise ApiError("ProvisionedThroughputExceededException", "throughput exceeds the provisioned")
    if behaviour.unprocessed and random.random() < behaviour.unprocessed:
        allowed = min(allowed, total - (total + 1) // 2)
    back: Json = {}
    for table, puts in request.items():
        taken, left = puts[:allowed], puts[allowed:]
        allowed -= len(taken)
        for put in taken:
            state.ids.add(put["PutRequest"]["Item"]["log_id"]["S"].encode())
        state.puts += len(taken)
        if left:
            back[table] = left
    return json.dumps({"UnprocessedItems": back}).encode()


def batch_write_other(state: State, body: bytes) -> bytes:
    """Items of tables that are not the log table."""
    for table, requests in json.loads(body)["RequestItems"].items():
        for request in requests:
            if "PutRequest" not in request:
                raise ApiError("ValidationException", "only PutRequest is canned")
            store_item(state, table, request["PutRequest"]["Item"])
    return b'{"UnprocessedItems":{}}'


def store_item(state: State, table: str, item: Json) -> None:
    if "log_id" in item:
        state.ids.add(item["log_id"]["S"].encode())
        state.puts += 1
        return
    state.items.setdefault(table, {})[key_of(state, table, item)] = item


def key_of(state: State, table: str, item: Json) -> str:
    schema = state.tables.get(table, {}).get("KeySchema", [])
    return json.dumps([item.get(part["AttributeName"]) for part in schema])


# -- single items and control plane -------------------------------------------------------------------------------


def put_item(state: State, body: bytes) -> bytes:
    if b"ConditionExpression" not in body:
        match = SPACED.search(body)
        if match:
            state.ids.add(match.group(1))
            state.puts += 1
            return b"{}"
    request = json.loads(body)
    condition = request.get("ConditionExpression", "")
    table, item = request["TableName"], request["Item"]
    if "log_id" in item:
        there = item["log_id"]["S"].encode() in state.ids
    else:
        there = key_of(state, table, item) in state.items.get(table, {})
    # ``attribute_not_exists(key)`` is the only condition understood; ``log_id = :never`` of a ping never holds.
    if (there and "attribute_not_exists" in condition) or ":never" in condition:
        raise ApiError("ConditionalCheckFailedException", "the conditional request failed")
    store_item(state, table, item)
    return b"{}"


def get_item(state: State, body: bytes) -> bytes:
    request = json.loads(body)
    item = state.items.get(request["TableName"], {}).get(key_of(state, request["TableName"], request["Key"]))
    return json.dumps({"Item": item} if item else {}).encode()


def delete_item(state: State, body: bytes) -> bytes:
    request = json.loads(body)
    key = request["Key"]
    if "log_id" in key:
        state.ids.discard(key["log_id"]["S"].encode())
    state.items.get(request["TableName"], {}).pop(key_of(state, request["TableName"], key), None)
    return b"{}"


def update_item(state: State, body: bytes) -> bytes:
    """``SET a = :x, #b = :y`` without looking at the conditions: enough for a heartbeat."""
    request = json.loads(body)
    table, key = request["TableName"], request["Key"]
    item = state.items.setdefault(table, {}).setdefault(key_of(state, table, key), dict(key))
    names, values = request.get("ExpressionAttributeNames", {}), request.get("ExpressionAttributeValues", {})
    for name, value in re.findall(r"([#\w]+)\s*=\s*(:\w+)", request.get("UpdateExpression", "")):
        item[names.get(name, name)] = values[value]
    return json.dumps({"Attributes": item}).encode()


def listing(state: State, body: bytes) -> bytes:
    """Query and Scan: of the log table nothing is kept; of the others everything is handed out."""
    items = list(state.items.get(json.loads(body)["TableName"], {}).values())
    return json.dumps({"Items": items, "Count": len(items), "ScannedCount": len(items)}).encode()


def create_table(state: State, body: bytes) -> bytes:
    request = json.loads(body)
    name = request["TableName"]
    if name in state.tables:
        raise ApiError("ResourceInUseException", f"Table already exists: {name}")
    arn = f"arn:aws:dynamodb:us-east-1:000000000000:table/{name}"
    indexes = [
        index | {"IndexStatus": "ACTIVE", "IndexArn": f"{arn}/index/{index['IndexName']}"}
        for index in request.get("GlobalSecondaryIndexes", [])
    ]
    state.tables[name] = {
        "TableName": name,
        "TableStatus": "ACTIVE",
        "TableArn": arn,
        "KeySchema": request["KeySchema"],
        "AttributeDefinitions": request["AttributeDefinitions"],
        "GlobalSecondaryIndexes": indexes,
        "BillingModeSummary": {"BillingMode": request.get("BillingMode", "PAY_PER_REQUEST")},
        "CreationDateTime": time.time(),
        "ItemCount": 0,
        "TableSizeBytes": 0,
    }
    return json.dumps({"TableDescription": state.tables[name]}).encode()


def describe_table(state: State, body: bytes) -> bytes:
    name = json.loads(body)["TableName"]
    if name not in state.tables:
        raise ApiError("ResourceNotFoundException", f"Requested resource not found: Table: {name} not found")
    return json.dumps({"Table": state.tables[name]}).encode()


def update_ttl(state: State, body: bytes) -> bytes:
    request = json.loads(body)
    state.ttl[request["TableName"]] = request["TimeToLiveSpecification"]
    return json.dumps({"TimeToLiveSpecification": request["TimeToLiveSpecification"]}).encode()


def describe_ttl(state: State, body: bytes) -> bytes:
    wanted = state.ttl.get(json.loads(body)["TableName"], {})
    status = "ENABLED" if wanted.get("Enabled") else "DISABLED"
    return json.dumps({"TimeToLiveDescription": {"TimeToLiveStatus": status} | wanted}).encode()


def continuous_backups(_state: State, _body: bytes) -> bytes:
    recovery = {"PointInTimeRecoveryDescription": {"PointInTimeRecoveryStatus": "ENABLED"}}
    return json.dumps({"ContinuousBackupsDescription": {"ContinuousBackupsStatus": "ENABLED"} | recovery}).encode()


def list_tables(state: State, _body: bytes) -> bytes:
    return json.dumps({"TableNames": sorted(state.tables)}).encode()


def batch_get(_state: State, _body: bytes) -> bytes:
    return b'{"Responses":{},"UnprocessedKeys":{}}'


OPERATIONS: dict[str, Callable[[State, bytes], bytes]] = {
    "BatchWriteItem": batch_write,
    "PutItem": put_item,
    "GetItem": get_item,
    "DeleteItem": delete_item,
    "UpdateItem": update_item,
    "Query": listing,
    "Scan": listing,
    "BatchGetItem": batch_get,
    "CreateTable": create_table,
    "DescribeTable": describe_table,
    "ListTables": list_tables,
    "UpdateTimeToLive": update_ttl,
    "DescribeTimeToLive": describe_ttl,
    "DescribeContinuousBackups": continuous_backups,
    "UpdateContinuousBackups": continuous_backups,
}

# -- HTTP -----------------------------------------------------------------------------------------------------------

TARGET = re.compile(rb"x-amz-target:\s*dynamodb_20120810\.(\w+)")
LENGTH = re.compile(rb"content-length:\s*(\d+)")
BY_LOWER = {name.lower().encode(): name for name in (*OPERATIONS, "UpdateTable", "DeleteTable")}


def answer(status: int, body: bytes, kind: bytes = b"application/x-amz-json-1.0") -> bytes:
    reason = b"OK" if status == 200 else b"Error"
    return b"HTTP/1.1 %d %b\r\nContent-Type: %b\r\nx-amzn-RequestId: CANNED\r\nContent-Length: %d\r\n\r\n%b" % (
        status,
        reason,
        kind,
        len(body),
        body,
    )


class Connection(asyncio.Protocol):
    """HTTP/1.1 with Content-Length and keep-alive: what the AWS clients speak."""

    def __init__(self, state: State, loop: asyncio.AbstractEventLoop) -> None:
        self.state = state
        self.loop = loop
        self.buffer = bytearray()
        self.body_at = 0
        self.needed = 0
        self.operation = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport  # uvloop's is no subclass of asyncio.Transport
        self.state.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (the protocol's signature)
        self.state.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        buffer = self.buffer
        buffer += data
        while True:
            if not self.needed:
                end = buffer.find(b"\r\n\r\n")
                if end < 0:
                    return
                head = bytes(buffer[:end]).lower()
                target, length = TARGET.search(head), LENGTH.search(head)
                self.operation = BY_LOWER.get(target.group(1), "") if target else ""
                self.body_at = end + 4
                self.needed = self.body_at + (int(length.group(1)) if length else 0)
                if b"expect: 100-continue" in head:
                    self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if len(buffer) < self.needed:
                return
            body = bytes(buffer[self.body_at : self.needed])
            self.state.received += self.needed
            del buffer[: self.needed]
            self.needed = 0
            self.serve(self.operation, body)

    def serve(self, operation: str, body: bytes) -> None:
        state = self.state
        behaviour = state.behaviour
        state.operations[operation] += 1
        if behaviour.mode == "stall":
            return
        if behaviour.mode == "error":
            reply = answer(500, ApiError("InternalServerError").body)
        else:
            try:
                handler = state.handlers.get(operation)
                if handler is None:
                    raise ApiError("UnknownOperationException", operation)
                reply = answer(200, handler(state, body))
            except ApiError as error:
                reply = answer(error.status, error.body)
        if behaviour.latency:
            self.loop.call_later(behaviour.latency, self.transport.write, reply)
        else:
            self.transport.write(reply)


class Server:
    """The data listener, which may be shut, and the control listener, which may not."""

    def __init__(self, host: str, port: int, control_port: int) -> None:
        self.state = State()
        self.host = host
        self.port = port
        self.control_port = control_port
        self.listener: asyncio.Server | None = None

    async def start(self) -> None:
        await self.open()
        control = await asyncio.start_server(self.control, self.host, self.control_port)
        self.control_port = control.sockets[0].getsockname()[1]

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self.listener = await loop.create_server(
            lambda: Connection(self.state, loop), self.host, self.port, backlog=1024
        )
        self.port = self.listener.sockets[0].getsockname()[1]

    async def behave(self, wanted: Json) -> None:
        behaviour = self.state.behaviour
        before = behaviour.mode
        for key, value in wanted.items():
            if not hasattr(behaviour, key):
                raise KeyError(key)
            setattr(behaviour, key, value)
        self.state.refilled = time.monotonic()
        self.state.tokens = 0.0
        if before in ("stall", "refuse") or behaviour.mode == "refuse":
            for connection in list(self.state.connections):  # nobody gets a late answer
                connection.transport.abort()
        if behaviour.mode == "refuse" and self.listener is not None:
            self.listener.close()
            self.listener = None
        if behaviour.mode != "refuse" and self.listener is None:
            await self.open()

    async def control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path = head.split(" ", 2)[:2]
        length = LENGTH.search(head.lower().encode())
        body = await reader.readexactly(int(length.group(1))) if length else b""
        status, reply = 200, b"{}"
        try:
            if (method, path) == ("POST", "/control"):
                await self.behave(json.loads(body))
            elif (method, path) == ("POST", "/reset"):
                state = self.state
                state.ids, state.puts, state.received, state.operations = set(), 0, 0, Counter()
            elif (method, path) == ("GET", "/stats"):
                reply = json.dumps(self.state.stats()).encode()
            else:
                status = 404
        except (KeyError, ValueError) as error:
            status, reply = 400, json.dumps({"error": repr(error)}).encode()
        writer.write(answer(status, reply, b"application/json"))
        writer.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--control-port", type=int, default=0)
    arguments = parser.parse_args()
    server = Server(arguments.host, arguments.port, arguments.control_port)
    await server.start()
    print(json.dumps({"port": server.port, "control_port": server.control_port}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(main())

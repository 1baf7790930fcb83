"""How fast the measuring instruments themselves are: a result near its instrument's ceiling measures the instrument.

``generator``: the load generator against a server that parses nothing and answers 202 at once.
``dynamodb``: the canned DynamoDB fed with ready BatchWriteItem calls of 25 items over 16 connections.
Each instrument has a core to itself here; in the benchmark they share the other core with PostgreSQL.
"""

import asyncio
import json
import subprocess
import time
from pathlib import Path
from typing import Any, cast

import uvloop

from benchmarks.processes import Child, Cores, free_port, pinned, python, reachable, wait_until
from benchmarks.records import record, uuid7s

NULL_SERVER = """
import asyncio, re, sys, uvloop
LENGTH = re.compile(rb"content-length: (\\d+)", re.I)
ANSWER = b"HTTP/1.1 202 Accepted\\r\\nContent-Type: application/json\\r\\nContent-Length: 2\\r\\n\\r\\n{}"
class Null(asyncio.Protocol):
    left = 0
    def connection_made(self, transport): self.transport = transport
    def data_received(self, data):
        if not self.left:
            end = data.find(b"\\r\\n\\r\\n")
            self.left = end + 4 + int(LENGTH.search(data, 0, end).group(1))
        self.left -= len(data)
        if self.left <= 0:
            self.left = 0
            self.transport.write(ANSWER)
async def main():
    await asyncio.get_running_loop().create_server(Null, "127.0.0.1", int(sys.argv[1]))
    await asyncio.Event().wait()
uvloop.run(main())
"""


def generator(cores: Cores, scratch: Path, *, per_post: int, connections: int, ids: str) -> dict[str, Any]:
    port = free_port()
    server = Child("null", python("-c", NULL_SERVER, str(port)), cores.under_test, scratch / "null.log")
    try:
        wait_until("null server", lambda: reachable(port), 10, server)
        argv = python("-m", "benchmarks.load", "--port", str(port), "--seconds", "2", "--ids", ids)
        argv += ["--per-post", str(per_post), "--connections", str(connections)]
        with pinned(cores.others):
            done = subprocess.run(argv, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
        result: dict[str, Any] = json.loads(done.stdout)
        return result
    finally:
        server.stop()


class _Feeder(asyncio.Protocol):
    def __init__(self, supply: Any, counter: list[int]) -> None:
        self.supply, self.counter = supply, counter

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass of it
        self.transport.write(next(self.supply))

    def data_received(self, data: bytes) -> None:  # noqa: ARG002 (answers are small: one segment each)
        self.counter[0] += 1
        self.transport.write(next(self.supply))


def _batch(ids: Any) -> bytes:
    puts = []
    for n in range(25):
        item = {k: {"S": str(v)} for k, v in record(n).items() if v is not None}
        puts.append({"PutRequest": {"Item": {"log_id": {"S": next(ids)}} | item}})
    body = json.dumps({"RequestItems": {"integration_logs": puts}}, separators=(",", ":")).encode()
    head = "POST / HTTP/1.1\r\nHost: x\r\nX-Amz-Target: DynamoDB_20120810.BatchWriteItem\r\nContent-Length: %d\r\n\r\n"
    return (head % len(body)).encode() + body


def dynamodb(cores: Cores, scratch: Path, seconds: float = 2.0) -> dict[str, float]:
    server = Child(
        "canned",
        python("-m", "benchmarks.canned_dynamodb"),
        cores.under_test,
        scratch / "canned.log",
        first_line=True,
    )
    ids = uuid7s(1)
    ready = [_batch(ids) for _ in range(2000)]
    counter = [0]

    async def feed() -> float:
        loop = asyncio.get_running_loop()
        supply = iter(ready * 50)
        begun = time.monotonic()
        for _ in range(16):
            await loop.create_connection(lambda: _Feeder(supply, counter), "127.0.0.1", server.announced["port"])
        await asyncio.sleep(seconds)
        return time.monotonic() - begun

    try:
        with pinned(cores.others):
            before = server.cpu_seconds()
            span = uvloop.run(feed())
            cpu = server.cpu_seconds() - before
        return {"items_per_second": counter[0] * 25 / span, "cpu_us_per_item": cpu / (counter[0] * 25) * 1e6}
    finally:
        server.stop()


def all_ceilings(cores: Cores, scratch: Path) -> dict[str, Any]:
    table: dict[str, Any] = {"canned_dynamodb": dynamodb(cores, scratch)}
    for per_post, connections, ids in ((1, 32, "minted"), (100, 8, "minted"), (100, 8, "client")):
        result = generator(cores, scratch, per_post=per_post, connections=connections, ids=ids)
        table[f"generator x{per_post} {ids}"] = {
            "records_per_second": result["acked_per_second"],
            "p99_ms": result["latency_ms"]["p99"],
        }
    return table


if __name__ == "__main__":
    folder = Path(__file__).resolve().parent.parent / ".run" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(all_ceilings(Cores.of_this_machine(), folder), indent=2))

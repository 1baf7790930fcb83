"""``python -m benchmarks.micro``: what each dominating part costs by itself, so that a regression has a name.

Microseconds of CPU (all threads of this process) per record, the best of several rounds: the least disturbed round is
the one that measures the code. Parts that talk to a store use the real PostgreSQL and the canned DynamoDB of the
bench, both on the other core.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import uvloop
from botocore.credentials import ReadOnlyCredentials

from benchmarks.processes import REPOSITORY, Cores
from benchmarks.records import Shape, requests
from benchmarks.rig import AWS, DATABASES, TABLE, Rig
from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.record import LogRecord, decode, encode
from sidecar.screening import Form, Minter, Screener
from sidecar.spool import Cursor, Obligation, Spool, framing
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.dynamodb_items import encode_item
from sidecar.stores.dynamodb_wire import SigV4
from sidecar.stores.postgres import PostgresStore

ROUNDS = 5
BATCH = 100
DUAL = Obligation(phase=1, required=frozenset({"postgres"}), best_effort=frozenset({"dynamodb"}))


def cpu(work: Callable[[], int], rounds: int = ROUNDS) -> float:
    """Microseconds per record of the best round; ``work`` returns how many records it handled."""
    best = float("inf")
    for _ in range(rounds):
        gc.collect()
        begun = time.process_time()
        records = work()
        best = min(best, (time.process_time() - begun) / records * 1e6)
    return best


async def cpu_async(work: Callable[[], Awaitable[int]], rounds: int = ROUNDS) -> float:
    """The same for coroutines."""
    best = float("inf")
    for _ in range(rounds):
        gc.collect()
        begun = time.process_time()
        records = await work()
        best = min(best, (time.process_time() - begun) / records * 1e6)
    return best


def header_of(chunk: framing.Chunk) -> framing.Header:
    """As the committer writes it, for one chunk of its own."""
    n, size, ids = len(chunk.records), len(chunk.body), chunk.ids + chunk.lengths
    columns = (1, 1, 3, 1, 0, n, size, 0, chunk.t0, chunk.t1)
    return framing.seal(columns, ids)


def body_of(shape: Shape) -> bytes:
    return next(requests(shape, "x")).partition(b"\r\n\r\n")[2]


class Bench:
    """Fresh records by the batch, and the parts under measurement."""

    def __init__(self) -> None:
        self.clock = SystemClock()
        self.screener = Screener(self.clock, Minter(self.clock, os.urandom))
        self.ingest = settings.Ingest()
        self.body = body_of(Shape(BATCH))

    def records(self, batches: int) -> list[tuple[list[LogRecord], list[bytes]]]:
        """Batches of 100 with ids of their own."""
        made = []
        for _ in range(batches):
            screened = self.screener.screen(self.body, Form.JSON, self.ingest)
            made.append((screened.records, screened.encoded))
        return made

    # -- pure CPU

    def screening(self) -> dict[str, float]:
        shapes = {
            "screen x1": Shape(1),
            "screen x100": Shape(BATCH),
            "screen x100 client ids": Shape(BATCH, ids="client"),
            "screen x100 NDJSON": Shape(BATCH, "ndjson"),
        }
        figures = {}
        for name, shape in shapes.items():
            body = body_of(shape)
            form = Form.LINES if shape.format == "ndjson" else Form.JSON

            def work(body: bytes = body, form: Form = form, per: int = shape.per_post) -> int:
                turns = 4_000 // per
                for _ in range(turns):
                    self.screener.screen(body, form, self.ingest)
                return turns * per

            figures[name] = cpu(work)
        return figures

    def encoding(self) -> dict[str, float]:
        batches = self.records(40)
        flat = [record for records, _ in batches for record in records]
        signer = SigV4(ReadOnlyCredentials("AKID", "secret", None), "us-east-1", "dynamodb.us-east-1.amazonaws.com")
        now = datetime.now(UTC)
        bodies = [b",".join(encode_item(r, 4, None) for r in flat[n : n + 25]) for n in range(0, len(flat), 25)]
        packed = [framing.pack(records, encoded)[0] for records, encoded in batches]
        forms = [encoded for _, encodings in batches for encoded in encodings]

        headers = [header_of(chunk) for chunk in packed]

        def unpack() -> None:
            for header, chunk in zip(headers, packed, strict=True):
                assert not framing.unpack(header, chunk.body).damaged

        def each(work: Callable[[], object]) -> float:
            def counted() -> int:
                work()
                return len(flat)

            return cpu(counted)

        return {
            "record encode (msgpack)": each(lambda: [encode(record) for record in flat]),
            "record decode (msgpack)": each(lambda: [decode(form) for form in forms]),
            "frame pack": each(lambda: [framing.pack(records, encoded) for records, encoded in batches]),
            "frame unpack, checksums": each(unpack),
            "dynamodb encode": each(lambda: [encode_item(record, 4, None) for record in flat]),
            "dynamodb sign (25 a call)": each(
                lambda: [signer.headers("DynamoDB_20120810.BatchWriteItem", body, now) for body in bodies]
            ),
        }

    # -- spool

    async def spool(self, directory: Path) -> dict[str, float]:
        """Commit with fsync, and delivery without a store: from the tail cache, and from the file after a start."""
        figures: dict[str, float] = {}
        for name, per, width, records in (("x1, 32 at once", 1, 32, 8_000), ("x100, 8 at once", 100, 8, 40_000)):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(mode=0o700)
            spool = self.opened(directory)
            flat = [pair for batch in self.records(records // BATCH) for pair in zip(*batch, strict=True)]
            loads = [flat[n : n + per] for n in range(0, records, per)]

            async def lane(mine: Sequence[list[tuple[LogRecord, bytes]]], spool: Spool) -> None:
                for load in mine:
                    batch, encoded = zip(*load, strict=True)
                    await spool.append(batch, encoded, DUAL)

            begun = time.process_time()
            await asyncio.gather(*(lane(loads[n::width], spool) for n in range(width)))
            figures[f"spool append {name}"] = (time.process_time() - begun) / records * 1e6
            await spool.close()
            spool = self.opened(directory)
            for store in ("postgres", "dynamodb"):
                begun = time.process_time()
                await drain(spool.cursor(store), records)
                figures[f"spool read back, settle {name} ({store})"] = (time.process_time() - begun) / records * 1e6
            await spool.close()
        return figures

    def opened(self, directory: Path) -> Spool:
        return Spool.open(directory, settings.Spool(), settings.Dedup(), ("postgres", "dynamodb"), self.clock)

    # -- stores

    async def stores(self, rig: Rig) -> dict[str, float]:
        """The client's side of a write; the servers are on the other core."""
        postgres = PostgresStore(
            settings.Postgres(port=rig.postgres.port, database=DATABASES["sidecar"]), clock=self.clock
        )
        dynamodb = DynamoDBStore(
            settings.DynamoDB(table=TABLE, region="us-east-1", endpoint_url=rig.dynamodb.url), clock=self.clock
        )
        figures: dict[str, float] = {}
        try:
            await postgres.create()
            await dynamodb.create()
            for size in (1, 100, 1_000):
                batches = self.supply(size, ROUNDS * 10)

                async def write(batches: Iterator[list[LogRecord]] = batches, size: int = size) -> int:
                    for _ in range(10):
                        assert not (await postgres.write(next(batches))).failures
                    return 10 * size

                figures[f"postgres write x{size}"] = await cpu_async(write)
            for size, wide in ((1, 16), (25, 16)):
                batches = self.supply(size, ROUNDS * wide * 4)

                async def put(batches: Iterator[list[LogRecord]] = batches, size: int = size, wide: int = wide) -> int:
                    for _ in range(4):
                        results = await asyncio.gather(*(dynamodb.write(next(batches)) for _ in range(wide)))
                        assert not any(result.failures for result in results)
                    return 4 * wide * size

                figures[f"dynamodb write x{size}, {wide} in flight"] = await cpu_async(put)
        finally:
            await postgres.close()
            await dynamodb.close()
        return figures

    def supply(self, size: int, batches: int) -> Iterator[list[LogRecord]]:
        """So many batches of fresh records, made before anything is timed."""
        needed = -(-size * batches // BATCH)
        flat = [record for records, _ in self.records(needed) for record in records]
        return iter([flat[n : n + size] for n in range(0, len(flat), size)])


async def drain(cursor: Cursor, records: int) -> None:
    done = 0
    while done < records:
        for frame in await cursor.take(4_000, 8 * settings.MIB):
            done += len(frame.records)
            cursor.settle(frame)


def main() -> None:
    parser = argparse.ArgumentParser(description="microseconds of CPU per record, part by part")
    parser.add_argument("--only", default="", help="screening, encoding, spool or stores")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "benchmarks" / "results" / "micro.json")
    parser.add_argument("--scratch", type=Path, default=REPOSITORY / ".run" / "bench")
    given = parser.parse_args()
    os.environ.update(AWS)
    cores = Cores.of_this_machine()
    bench = Bench()
    figures: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        if given.only in ("", "stores"):
            rig = stack.enter_context(Rig(given.scratch.resolve()))
        os.sched_setaffinity(0, cores.under_test)
        if given.only in ("", "screening"):
            figures |= bench.screening()
        if given.only in ("", "encoding"):
            figures |= bench.encoding()
        if given.only in ("", "spool"):
            given.scratch.mkdir(parents=True, exist_ok=True)
            figures |= uvloop.run(bench.spool(given.scratch.resolve() / "micro-spool"))
        if given.only in ("", "stores"):
            figures |= uvloop.run(bench.stores(rig))
    for name, figure in figures.items():
        print(f"{name:<50} {figure:8.2f} us per record")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

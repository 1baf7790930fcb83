"""The load generator: a process of its own, raw HTTP/1.1 over uvloop, faster than anything under test.

Closed loop
    N connections, each sends the next POST when the last was answered: shows capacity. Its latencies say what a
    client waits at saturation, no more.
Open loop
    POSTs at a fixed rate whatever the server does, each timed from the instant at which it was *scheduled*, so a
    stall is seen by every request that it delays (no coordinated omission). A timerfd gives the instants (asyncio's
    own timers are a millisecond coarse). Where no connection is free the request waits, and its clock runs.
    ``lag`` is how late the generator itself was: the tail below it says nothing about the server.

Latencies are kept whole (no buckets) and the percentiles are exact. Every status is counted; only records of a 2xx
count as acknowledged, and a 207 counts what it accepted. Prints one JSON object.
"""

import argparse
import asyncio
import contextlib
import ctypes
import gc
import json
import math
import os
import re
import struct
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import uvloop

from benchmarks.records import Shape, requests

LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
CLOCK_MONOTONIC = 1
TFD_TIMER_ABSTIME = 1
TFD_NONBLOCK = os.O_NONBLOCK
SLICE = 0.25  # seconds per point of the time series


@dataclass
class Plan:
    """What is to be sent."""

    host: str
    port: int
    shape: Shape
    connections: int
    seconds: float
    rate: float = 0.0  # records per second; 0 = closed loop
    records: int = 0  # stop after so many records; 0 = after ``seconds``
    grace: float = 30.0  # seconds to wait for the last answers
    stream: int = 0


@dataclass
class Tally:
    """What came back."""

    statuses: Counter[int] = field(default_factory=Counter)
    acked: int = 0
    sent: int = 0
    latencies: list[tuple[float, float]] = field(default_factory=list)  # (answered at, seconds)
    lags: list[float] = field(default_factory=list)
    broken: int = 0  # connections lost while a request was under way
    example: str = ""  # of an answer that was not 2xx, or of the first
    odd: str = ""


def percentile(ordered: list[float], share: float) -> float:
    """Exact: the smallest value that at least ``share`` of all do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(self, load: "Load") -> None:
        self.load = load
        self.buffer = b""
        self.started = 0.0
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport  # uvloop's is no subclass of asyncio.Transport

    def send(self, request: bytes, started: float) -> None:
        self.started = started
        self.busy = True
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self.buffer:
            data = self.buffer + data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self.buffer = data
            return
        found = LENGTH.search(data, 0, end)
        total = end + 4 + (int(found.group(1)) if found else 0)
        if len(data) < total:
            self.buffer = data
            return
        self.buffer = b""
        self.busy = False
        self.load.answered(self, int(data[9:12]), data, end + 4)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (the protocol's signature)
        self.load.lost(self)


class Load:
    """Sends a plan and keeps the tally."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tally = Tally()
        self.supply: Iterator[bytes] = requests(plan.shape, f"{plan.host}:{plan.port}", plan.stream)
        self.idle: list[Connection] = []
        self.waiting: deque[float] = deque()
        self.under_way = 0
        self.deadline = 0.0
        self.ended = asyncio.Event()
        self.sending = True

    async def run(self) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        plan = self.plan
        next(self.supply)  # bodies are made before the clock starts
        for _ in range(plan.connections):
            _, connection = await loop.create_connection(lambda: Connection(self), plan.host, plan.port)
            self.idle.append(connection)
        gc.collect()
        gc.freeze()
        gc.disable()  # the generator's own pauses would show as the server's
        begun, began_at = time.monotonic(), time.time()
        self.deadline = begun + plan.seconds
        if plan.rate:
            await self.open_loop(begun)
        else:
            self.closed_loop()
        try:
            await asyncio.wait_for(self.ended.wait(), plan.grace + plan.seconds)
            complete = True
        except TimeoutError:
            complete = False
        finished = time.monotonic()
        return self.report(began_at, begun, finished, complete=complete)

    # -- closed loop

    def closed_loop(self) -> None:
        connections, self.idle = self.idle, []
        for connection in connections:
            self.next(connection, time.monotonic())

    def next(self, connection: Connection, now: float) -> None:
        plan, tally = self.plan, self.tally
        if now < self.deadline and not (plan.records and tally.sent >= plan.records):
            tally.sent += plan.shape.per_post
            self.under_way += 1
            connection.send(next(self.supply), now)
        else:
            self.idle.append(connection)
            if not self.under_way:
                self.ended.set()

    # -- open loop

    async def open_loop(self, begun: float) -> None:
        """Register the timer; requests leave from its callback."""
        loop = asyncio.get_running_loop()
        plan = self.plan
        interval = plan.shape.per_post / plan.rate
        total = int(plan.seconds / interval)
        start = begun + 0.05
        libc = ctypes.CDLL(None, use_errno=True)
        timer = libc.timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)
        if timer < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        seconds, nanos = divmod(round(interval * 1e9), 1_000_000_000)
        first_s, first_ns = divmod(round(start * 1e9), 1_000_000_000)
        spec = struct.pack("qqqq", seconds, nanos, first_s, first_ns)
        if libc.timerfd_settime(timer, TFD_TIMER_ABSTIME, spec, None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")
        step = round(interval * 1e9) / 1e9
        done = 0

        def due() -> None:
            nonlocal done
            try:
                (times,) = struct.unpack("Q", os.read(timer, 8))
            except BlockingIOError:
                return
            now = time.monotonic()
            for _ in range(min(times, total - done)):
                scheduled = start + done * step
                done += 1
                self.tally.lags.append(now - scheduled)
                self.tally.sent += plan.shape.per_post
                self.under_way += 1
                if self.idle:
                    self.idle.pop().send(next(self.supply), scheduled)
                else:
                    self.waiting.append(scheduled)
            if done >= total:
                loop.remove_reader(timer)
                os.close(timer)
                self.sending = False

        loop.add_reader(timer, due)

    # -- answers

    def answered(self, connection: Connection, status: int, data: bytes, body_at: int) -> None:
        now = time.monotonic()
        tally, plan = self.tally, self.plan
        self.under_way -= 1
        tally.statuses[status] += 1
        tally.latencies.append((now, now - connection.started))
        if status in (200, 201, 202):
            tally.acked += plan.shape.per_post
            if not tally.example:
                tally.example = data[body_at : body_at + 400].decode("utf-8", "replace")
        elif status == 207:
            tally.acked += plan.shape.per_post - len(json.loads(data[body_at:])["errors"])
        elif not tally.odd:
            tally.odd = data[: body_at + 400].decode("utf-8", "replace")
        if not plan.rate:
            if status == 503:  # push-back: a closed loop that came back at once would only burn both sides
                asyncio.get_running_loop().call_later(0.05, self.next, connection, now)
            else:
                self.next(connection, now)
        elif self.waiting:
            connection.send(next(self.supply), self.waiting.popleft())
        else:
            self.idle.append(connection)
            if not self.sending and not self.under_way:
                self.ended.set()

    def lost(self, connection: Connection) -> None:
        if connection.busy:
            self.tally.broken += 1
            self.under_way -= 1
        elif connection in self.idle:
            self.idle.remove(connection)
        if not self.under_way:
            self.ended.set()

    # -- report

    def report(self, began_at: float, begun: float, finished: float, *, complete: bool) -> dict[str, Any]:
        tally = self.tally
        values = sorted(seconds for _, seconds in tally.latencies)
        lags = sorted(tally.lags)
        span = max(finished - begun, 1e-9)
        slices: dict[int, list[float]] = {}
        for at, seconds in tally.latencies:
            slices.setdefault(int((at - begun) / SLICE), []).append(seconds)
        return {
            "plan": asdict(self.plan),
            "complete": complete,
            "began_at": began_at,
            "seconds": span,
            "sent": tally.sent,
            "acked": tally.acked,
            "acked_per_second": tally.acked / span,
            "statuses": {str(k): v for k, v in sorted(tally.statuses.items())},
            "broken_connections": tally.broken,
            "latency_ms": _summary(values),
            "lag_ms": _summary(lags) if lags else None,
            "slices": [
                {"at": n * SLICE, "posts": len(part), "p99_ms": percentile(sorted(part), 0.99) * 1e3}
                for n, part in sorted(slices.items())
            ],
            "example": tally.example,
            "not_2xx": tally.odd,
        }


def _summary(ordered: list[float]) -> dict[str, float]:
    names = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
    result = {name: round(percentile(ordered, share) * 1e3, 3) for name, share in names.items()}
    return result | {"max": round(ordered[-1] * 1e3, 3) if ordered else math.nan, "count": len(ordered)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="HTTP load for POST /logs; prints one JSON object")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/logs")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--records", type=int, default=0, help="stop after so many records (closed loop)")
    parser.add_argument("--rate", type=float, default=0.0, help="records per second; 0 = closed loop")
    parser.add_argument("--per-post", type=int, default=1)
    parser.add_argument("--format", choices=("json", "ndjson"), default="json")
    parser.add_argument("--ids", choices=("minted", "client"), default="minted")
    parser.add_argument(
        "--stream", type=int, default=0, help="0..4095; keeps client-supplied ids of parallel runs apart"
    )
    parser.add_argument("--realtime", action="store_true", help="SCHED_RR, so that lag stays small beside the stores")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.realtime:
        with contextlib.suppress(PermissionError):  # then ``lag_ms`` tells how much the generator was held up
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    shape = Shape(given.per_post, given.format, given.ids, given.path)
    plan = Plan(
        host=given.host,
        port=given.port,
        shape=shape,
        connections=given.connections,
        seconds=given.seconds,
        rate=given.rate,
        records=given.records,
        stream=given.stream,
    )
    print(json.dumps(uvloop.run(Load(plan).run())))


if __name__ == "__main__":
    main()

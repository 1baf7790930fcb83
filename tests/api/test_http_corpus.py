"""Hostile and broken HTTP on raw sockets: each case has its status, none a 500, and the next good request is 202."""

import asyncio
import contextlib
import gzip
import re
import struct
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from sidecar.settings import Ingest, Listen, Settings
from tests.api.door import Door, open_door

GOOD = b'{"service_name":"s"}'
GOOD_REQUEST = b"POST /logs HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD)
SHORT = Settings(listen=Listen(header_timeout=0.3, body_timeout=0.3, idle_timeout=0.6))


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    """A running door with the times of production: a busy machine is no slow client."""
    async with open_door(tmp_path / "spool") as opened:
        yield opened


@pytest.fixture
async def short_door(tmp_path: Path) -> AsyncIterator[Door]:
    """A running door with short times, for what is about them."""
    async with open_door(tmp_path / "spool", SHORT) as opened:
        yield opened


class Wire:
    """One raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, door: Door) -> "Wire":
        host, port = door.listener.url.removeprefix("http://").split(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def status(self) -> int | None:
        """The status of the next answer, read whole; None if the connection closed without one."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        match = re.search(rb"(?i)content-length: (\d+)", head)
        assert match is not None, head
        body = await self.reader.readexactly(int(match[1]))
        status = int(head.split()[1])
        assert b"Server: sidecar\r\n" in head
        assert "Python" not in head.decode("latin-1")
        if status != 202:
            assert set(msgspec.json.decode(body)) == {"error"}, body
        return status

    async def closed(self) -> bool:
        """Whether the other side closes, in time."""
        try:
            return await asyncio.wait_for(self.reader.read(1), 10) == b""
        except ConnectionError:
            return True

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


async def exchange(door: Door, data: bytes) -> int | None:
    """Send bytes, return the first status."""
    wire = await Wire.open(door)
    try:
        await wire.send(data)
        return await asyncio.wait_for(wire.status(), 10)
    except ConnectionError:
        return None
    finally:
        await wire.close()


async def still_well(door: Door) -> None:
    """The process goes on: a good request is accepted."""
    assert await exchange(door, GOOD_REQUEST) == 202


def post(body: bytes, *fields: bytes, length: bool = True) -> bytes:
    """A request's bytes."""
    head = [b"POST /logs HTTP/1.1", b"Host: localhost", *fields]
    if length:
        head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*head, b"", b""]) + body


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n", fields: tuple[bytes, ...] = ()) -> bytes:
    """A request in chunks."""
    coded = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return post(coded + end, b"Transfer-Encoding: chunked", *fields, length=False)


PACKED = gzip.compress(GOOD)
GZIP = b"Content-Encoding: gzip"
DEFLATE = b"Content-Encoding: deflate"
BOMB = gzip.compress(b" " * (64 << 20), 9)
FLIPPED_CRC = PACKED[:-8] + bytes([PACKED[-8] ^ 1]) + PACKED[-7:]
WRONG_SIZE = PACKED[:-4] + struct.pack("<I", len(GOOD) + 1)


@dataclass(frozen=True)
class Case:
    name: str
    data: bytes
    status: int | None  # None: closed without an answer, or the parser's choice of it


CASES = [
    Case("good", post(GOOD), 202),
    Case("good in chunks", chunked(GOOD[:5], GOOD[5:]), 202),
    Case("200 one-byte chunks", chunked(*(GOOD[i : i + 1] for i in range(len(GOOD)))), 202),
    Case(
        "chunk extension",
        post(b"%x;a=b\r\n%s\r\n0\r\n\r\n" % (len(GOOD), GOOD), b"Transfer-Encoding: chunked", length=False),
        202,
    ),
    Case("HTTP/1.0", post(GOOD).replace(b"HTTP/1.1", b"HTTP/1.0"), 202),
    Case("Expect: 417", post(GOOD, b"Expect: tea"), 417),
    Case("two Idempotency-Keys", post(GOOD, b"Idempotency-Key: a", b"Idempotency-Key: b"), 400),
    # framing
    Case("CL and TE", chunked(GOOD, fields=(b"Content-Length: 5",)), 400),
    Case("two lengths", post(GOOD, b"Content-Length: 5"), 400),
    Case("negative length", post(GOOD, b"Content-Length: -1", length=False), 400),
    Case("length with a sign", post(GOOD, b"Content-Length: +20", length=False), 400),
    Case("length not a number", post(GOOD, b"Content-Length: x", length=False), 400),
    Case("length of 5,000 digits", post(GOOD, b"Content-Length: " + b"9" * 5000, length=False), 400),
    Case("TE xchunked", chunked(GOOD).replace(b": chunked", b": xchunked"), 400),
    Case("TE chunked twice", chunked(GOOD).replace(b": chunked", b": chunked, chunked"), 400),
    Case("bad chunk size", post(b"zz\r\n" + GOOD, b"Transfer-Encoding: chunked", length=False), 400),
    Case("negative chunk size", post(b"-5\r\n" + GOOD, b"Transfer-Encoding: chunked", length=False), 400),
    Case(
        "chunk longer than said", post(b"2\r\n%s\r\n0\r\n\r\n" % GOOD, b"Transfer-Encoding: chunked", length=False), 400
    ),
    Case("no length, no body", post(b"", length=False), 400),
    Case("NUL in a field", post(GOOD, b"X-A: a\0b"), 400),
    Case("NUL in the path", post(GOOD).replace(b"/logs", b"/lo\0gs"), 400),
    Case("bare CR in a field", post(GOOD, b"X-A: a\rX-B: b"), 400),
    Case("folded field", post(GOOD, b"X-A: a\r\n b"), 400),
    Case("space before the colon", post(GOOD, b"X-A : a"), 400),
    Case("field without a colon", post(GOOD, b"X-A"), 400),
    Case("empty field name", post(GOOD, b": a"), 400),
    Case("two hosts", post(GOOD, b"Host: evil.example"), 400),
    Case("not HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 40, 400),
    Case("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    Case("HTTP/9.9", post(GOOD).replace(b"HTTP/1.1", b"HTTP/9.9"), 400),
    Case("HTTP/0.9 has no host", b"POST /logs\r\n\r\n", 403),
    Case("strange method", post(GOOD).replace(b"POST", b"P@ST"), 400),
    Case("unknown method", post(GOOD).replace(b"POST", b"BREW"), 400),
    # size of the head
    Case("path of 64 KiB", post(GOOD).replace(b"/logs", b"/logs?" + b"x" * 65536), 400),
    Case("field of 64 KiB", post(GOOD, b"X-A: " + b"x" * 65536), 400),
    Case("200 fields", post(GOOD, *(b"X-%d: a" % i for i in range(200))), 400),
    Case("100 fields", post(GOOD, *(b"X-%d: a" % i for i in range(100))), 202),
    # compressed bodies
    Case("gzip", post(PACKED, GZIP), 202),
    Case("gzip in chunks", chunked(*(PACKED[i : i + 1] for i in range(len(PACKED))), fields=(GZIP,)), 202),
    Case("gzip, two members", post(gzip.compress(GOOD[:7]) + gzip.compress(GOOD[7:]), GZIP), 202),
    Case("gzip, an empty member", post(gzip.compress(b"") + PACKED, GZIP), 202),
    Case("gzip of nothing", post(gzip.compress(b""), GZIP), 400),
    Case("gzip, 2,000 members", post(gzip.compress(b"") * 2000 + PACKED, GZIP), 400),
    Case("gzip cut in its trailer", post(PACKED[:-1], GZIP), 400),
    Case("gzip without its trailer", post(PACKED[:-8], GZIP), 400),
    Case("gzip cut in half", post(PACKED[: len(PACKED) // 2], GZIP), 400),
    Case("gzip cut in its header", post(PACKED[:5], GZIP), 400),
    Case("second member cut", post(PACKED + PACKED[:-3], GZIP), 400),
    Case("gzip with a wrong checksum", post(FLIPPED_CRC, GZIP), 400),
    Case("gzip with a wrong size", post(WRONG_SIZE, GZIP), 400),
    Case("gzip with garbage behind", post(PACKED + b"garbage", GZIP), 400),
    Case("gzip with zeros behind", post(PACKED + b"\0" * 8, GZIP), 400),
    Case("not gzip", post(GOOD, GZIP), 400),
    Case("empty body said to be gzip", post(b"", GZIP), 400),
    Case("deflate", post(zlib.compress(GOOD), DEFLATE), 202),
    Case("deflate byte by byte", chunked(*(bytes([b]) for b in zlib.compress(GOOD)), fields=(DEFLATE,)), 202),
    Case("deflate cut", post(zlib.compress(GOOD)[:-2], DEFLATE), 400),
    Case("deflate of one byte", post(b"x", DEFLATE), 400),
    Case("deflate with a wrong checksum", post(zlib.compress(GOOD)[:-1] + b"\0", DEFLATE), 400),
    Case("deflate with garbage behind", post(zlib.compress(GOOD) + b"x", DEFLATE), 400),
    Case("not deflate", post(b"\xff" * 50, DEFLATE), 400),
    Case("zlib with a dictionary", post(b"\x78\xbb" + b"\0" * 20, DEFLATE), 400),
    Case("bomb of 64 MiB", post(BOMB, GZIP), 413),
    Case("bomb in chunks", chunked(BOMB, fields=(GZIP,)), 413),
    Case("unknown encoding", post(GOOD, b"Content-Encoding: br"), 415),
    Case("two encodings in two fields", post(PACKED, GZIP, GZIP), 415),
    Case("announced too large", post(b"", b"Content-Length: 99999999999", length=False), 413),
    Case("too large in chunks", chunked(*[b"x" * 65536] * 200), 413),
    # who and where
    Case("no host", post(GOOD).replace(b"Host: localhost\r\n", b""), 400),
    Case("known method, not here", post(GOOD).replace(b"POST", b"PUT"), 405),
    Case("foreign host", post(GOOD).replace(b"localhost", b"evil.example"), 403),
    Case("foreign host with our name in front", post(GOOD).replace(b"localhost", b"localhost.evil.example"), 403),
    Case("our name as user", post(GOOD).replace(b"localhost", b"localhost@evil.example"), 403),
    Case("host with a port", post(GOOD).replace(b"localhost", b"LOCALHOST:8080"), 202),
    Case("IPv6 host", post(GOOD).replace(b"localhost", b"[::1]:9"), 202),
    Case("IPv4 host", post(GOOD).replace(b"localhost", b"127.0.0.1"), 202),
    Case("another loopback name", post(GOOD).replace(b"localhost", b"127.0.0.2"), 403),
    Case("absolute URI", post(GOOD).replace(b"/logs", b"http://localhost/logs"), 202),
    Case(
        "foreign absolute URI",
        post(GOOD).replace(b"/logs", b"http://evil.example/logs").replace(b"localhost\r", b"evil.example\r"),
        403,
    ),
    Case("path with dots", post(GOOD).replace(b"/logs", b"/x/../logs"), 404),
    Case("path with escapes", post(GOOD).replace(b"/logs", b"/%6c%6fgs%00"), 404),
    Case("upgrade", post(GOOD, b"Connection: Upgrade", b"Upgrade: websocket"), 202),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_every_request_has_its_status(door: Door, case: Case, caplog: pytest.LogCaptureFixture) -> None:
    """Exactly this status, no defect logged, and the next good request is accepted."""
    assert await exchange(door, case.data) == case.status
    await still_well(door)
    assert "unexpected" not in caplog.text
    accepted = door.metrics.registry.get_sample_value("sidecar_records_accepted_total", {"phase": "dual_write"})
    assert accepted == 1 + (case.status == 202)


@pytest.mark.parametrize(
    "data",
    [
        post(GOOD, b"Content-Length: 1000", length=False),
        chunked(GOOD, end=b""),
        chunked(GOOD, end=b"5\r\nab"),
        post(PACKED[:9], GZIP, b"Content-Length: 1000", length=False),
        b"POST /logs HTTP/1.1\r\nHost: local",
        b"POST /lo",
    ],
    ids=["length", "chunks", "half a chunk", "gzip", "head", "request line"],
)
async def test_a_request_cut_by_the_client_stores_nothing(
    door: Door, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Closed in the middle: no record, no defect, no line in the log."""
    caplog.set_level("DEBUG", "sidecar")
    wire = await Wire.open(door)
    await wire.send(data)
    await wire.close()
    while door.listener.connections:
        await asyncio.sleep(0.001)
    await still_well(door)
    assert door.spool.counters("postgres").owed == 1
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"POST /logs HTTP/1.1\r\nHost: localhost\r\n", 408),
        (b"P", 408),
        (post(GOOD, b"Content-Length: 1000", length=False), 408),
        (chunked(GOOD, end=b""), 408),
        (post(PACKED[:9], GZIP, b"Content-Length: 1000", length=False), 408),
        (b"", None),
    ],
    ids=["head", "one byte", "length", "chunks", "gzip", "silence"],
)
async def test_a_request_that_does_not_end_is_ended(short_door: Door, data: bytes, status: int | None) -> None:
    """Half a head, half a body, nothing at all: 408 where a request had begun, then close."""
    wire = await Wire.open(short_door)
    await wire.send(data)
    assert await asyncio.wait_for(wire.status(), 10) == status
    assert await wire.closed()
    await wire.close()
    await still_well(short_door)


async def test_a_head_dripped_byte_by_byte_is_ended(short_door: Door) -> None:
    """The head's time runs from its first byte: dripping does not renew it."""
    wire = await Wire.open(short_door)
    ended = asyncio.create_task(wire.status())
    for byte in b"POST /logs HTTP/1.1\r\nX-Very-Long-Header: " + b"x" * 1000:
        if ended.done():
            break
        wire.writer.write(bytes([byte]))
        await asyncio.sleep(0.02)
    assert await asyncio.wait_for(ended, 10) == 408
    await wire.close()


async def test_fifty_pipelined_requests_have_fifty_answers(door: Door) -> None:
    """In order, each 202."""
    wire = await Wire.open(door)
    await wire.send(GOOD_REQUEST * 50)
    assert [await asyncio.wait_for(wire.status(), 10) for _ in range(50)] == [202] * 50
    await wire.close()
    assert door.spool.counters("postgres").owed == 50


async def test_a_connection_serves_many_requests_and_idles_out(short_door: Door) -> None:
    """Errors with whole bodies keep the connection; idle_timeout after the last answer it is closed."""
    wire = await Wire.open(short_door)
    for data, status in (
        (GOOD_REQUEST, 202),
        (post(b"{"), 400),
        (post(GOOD, b"Content-Encoding: br"), 415),
        (GOOD_REQUEST, 202),
    ):
        await wire.send(data)
        assert await asyncio.wait_for(wire.status(), 10) == status
    assert await wire.closed()
    await wire.close()


@pytest.mark.parametrize(
    "head",
    [b"GET /status", b"GET /logs/x", b"GET /nowhere", b"PUT /logs", b"POST /logs", b"POST /v1/logs", b"POST /ingest/x"],
    ids=bytes.decode,
)
async def test_an_expectation_that_is_not_met_is_an_error_like_any_other(door: Door, head: bytes) -> None:
    """On every route: one shape, nothing of the request repeated, no version of the server (``Wire.status``)."""
    request = head + b" HTTP/1.1\r\nHost: localhost\r\nExpect: tea\r\nContent-Length: 0\r\n\r\n"
    assert await exchange(door, request) == 417
    await still_well(door)


@pytest.mark.parametrize("lane", [b"", b"X-General: 1"], ids=["express", "general"])
async def test_idle_time_does_not_cut_off_a_request_that_is_being_answered(tmp_path: Path, lane: bytes) -> None:
    """An answer that takes longer than idle_timeout arrives; so does a body that comes slowly."""
    slow = Settings(listen=Listen(idle_timeout=0.2, body_timeout=30), ingest=Ingest(ack="stores", max_wait=0.7))
    request = post(GOOD, lane) if lane else GOOD_REQUEST
    async with open_door(tmp_path / "spool", slow) as door:
        wire = await Wire.open(door)
        await wire.send(request)
        assert await asyncio.wait_for(wire.status(), 10) == 202
        assert await wire.closed()
        await wire.close()
        wire = await Wire.open(door)
        await wire.send(request[:-1])
        await asyncio.sleep(0.5)  # the fault is a timer that fires in this time
        await wire.send(request[-1:])
        assert await asyncio.wait_for(wire.status(), 10) == 202
        await wire.close()


async def test_a_split_head_is_no_slow_head(tmp_path: Path) -> None:
    """A head that comes in two parts, in time, is a request like any other; the timer does not outlive it."""
    async with open_door(tmp_path / "spool", Settings(listen=Listen(header_timeout=1))) as door:
        wire = await Wire.open(door)
        for _ in range(2):
            await wire.send(GOOD_REQUEST[:30])
            await asyncio.sleep(0.05)
            await wire.send(GOOD_REQUEST[30:])
            assert await asyncio.wait_for(wire.status(), 10) == 202
        await asyncio.sleep(1.2)  # longer than header_timeout, shorter than idle_timeout
        await wire.send(GOOD_REQUEST)
        assert await asyncio.wait_for(wire.status(), 10) == 202
        await wire.close()


async def test_one_connection_too_many_is_told_so(tmp_path: Path) -> None:
    """503 with Retry-After and close; the others are served on, and a place that is left is taken."""
    async with open_door(tmp_path / "spool", Settings(listen=Listen(max_connections=8))) as door:
        wires = [await Wire.open(door) for _ in range(8)]
        while door.listener.connections < 8:
            await asyncio.sleep(0.001)
        assert await exchange(door, GOOD_REQUEST) == 503
        await wires[0].send(GOOD_REQUEST)
        assert await asyncio.wait_for(wires[0].status(), 10) == 202
        for wire in wires:
            await wire.close()
        while door.listener.connections:
            await asyncio.sleep(0.001)
        await still_well(door)


async def test_expect_100_is_met(door: Door) -> None:
    """Clients send it with larger bodies: first 100, then the answer."""
    wire = await Wire.open(door)
    await wire.send(post(GOOD, b"Expect: 100-continue").removesuffix(GOOD))
    assert await asyncio.wait_for(wire.reader.readuntil(b"\r\n\r\n"), 10) == b"HTTP/1.1 100 Continue\r\n\r\n"
    await wire.send(GOOD)
    assert await asyncio.wait_for(wire.status(), 10) == 202
    await wire.close()


async def test_stopping_finishes_what_is_under_way(door: Door) -> None:
    """A request that has begun is answered; a new connection is refused by the system."""
    wire = await Wire.open(door)
    await wire.send(post(GOOD, b"Prefer: wait=5"))
    while not door.spool.counters("postgres").pending:
        await asyncio.sleep(0.001)
    stopping = asyncio.create_task(door.listener.stop(5))
    await asyncio.sleep(0)
    await door.deliver("postgres", "dynamodb")
    head = await asyncio.wait_for(wire.reader.readuntil(b"\r\n\r\n"), 10)
    assert head.startswith(b"HTTP/1.1 201 ")
    await stopping
    with pytest.raises(OSError, match="onnect"):
        await Wire.open(door)
    await wire.close()

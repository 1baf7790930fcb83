"""The express lane: the same answers as aiohttp's, whatever is sent and however it is cut."""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from sidecar.api.express import LONGEST, Lane
from sidecar.errors import Busy
from sidecar.settings import MIB, Ingest, Listen, Settings
from tests.api.door import Door, open_door
from tests.parts.sidecar import eventually

GOOD = b'{"service_name": "svc", "correlation_id": "c"}'


@pytest.fixture
async def door(tmp_path) -> AsyncIterator[Door]:
    """A running door with short times."""
    settings = Settings(listen=Listen(body_timeout=0.3), ingest=Ingest(max_body_bytes=50_000))
    async with open_door(tmp_path, settings) as made:
        yield made


@contextlib.asynccontextmanager
async def connected(door: Door):
    """A raw connection to the door."""
    host, _, port = door.listener.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def request(body: bytes, *lines: str, path: str = "/logs", method: str = "POST") -> bytes:
    """One request's bytes."""
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *lines]
    return "\r\n".join([*head, "", ""]).encode() + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], dict]:
    """Status, headers (lower case) and document of one answer."""
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).decode()
    status, *lines = head.strip().split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers["content-length"]))
    return int(status.split()[1]), headers, json.loads(body)


def lanes(door: Door) -> int:
    """How many connections are in the express lane now."""
    return sum(getattr(c, "_lane", None) is not None for c in door.listener._runner.server.connections)


BODIES = [
    (GOOD, ()),
    (b"[" + GOOD + b"," + GOOD + b"]", ()),
    (b"[" + GOOD + b',{"service_name": 5}]', ()),
    (GOOD + b"\n" + GOOD, ("Content-Type: application/x-ndjson",)),
    (GOOD, ("Content-Type: application/json; charset=utf-8",)),
    (b"{", ()),
    (b'{"service_name": ""}', ()),
    (b'{"service_name": "\\u0000"}', ()),
    (b'"text"', ()),
    (b"\xff", ()),
    (b"[]", ()),
    (b'{"service_name": "svc", "request_data": "' + b"x" * 60_000 + b'"}', ()),
    (
        b'{"service_name":"s","log_id":"00000000-0000-7000-8000-000000000001","log_timestamp":"2026-01-01T00:00:00Z"}',
        (),
    ),
    (
        b'{"service_name":"t","log_id":"00000000-0000-7000-8000-000000000001","log_timestamp":"2026-01-01T00:00:00Z"}',
        (),
    ),
]


@pytest.mark.parametrize(("body", "lines"), BODIES)
async def test_both_lanes_give_the_same_answer(door, body, lines):
    """Status, headers and document are equal, but for ids, dates and what a resend is told."""
    seen = []
    for extra in ((), ("X-Unknown: 1",)):
        async with connected(door) as (reader, writer):
            writer.write(request(body, *lines, *extra))
            status, headers, document = await answer(reader)
            assert lanes(door) == (1 if not extra else 0)
            document.pop("duplicate", None)
            document.pop("duplicates", None)
            text = re.sub(r"[0-9a-f-]{36}", "ID", json.dumps(document, sort_keys=True))
            headers.pop("date")
            seen.append((status, sorted(headers.items()) if status != 413 else (), text))
    # The length differs where the document's resend marks differ; it is compared with the text otherwise.
    strip = [(s, [h for h in hs if h[0] not in ("content-length", "connection")], t) for s, hs, t in seen]
    assert strip[0] == strip[1]


async def test_pipelined_requests_are_answered_in_order_each_once(door):
    """Fifty at once: fifty answers, in order."""
    async with connected(door) as (reader, writer):
        writer.write(
            b"".join(request(msgspec.json.encode({"service_name": "s", "correlation_id": str(i)})) for i in range(50))
        )
        for i in range(50):
            status, _, document = await answer(reader)
            assert (status, document["correlation_id"]) == (202, str(i))
        assert lanes(door) == 1


@pytest.mark.parametrize("cut", [5, 19, 40, 70, 90, 110])
async def test_a_request_cut_anywhere_is_answered(door, cut):
    """Head or body in two pieces: the same answer, from whichever lane."""
    async with connected(door) as (reader, writer):
        whole = request(GOOD)
        writer.write(whole[:cut])
        await asyncio.sleep(0.02)
        writer.write(whole[cut:])
        status, _, _ = await answer(reader)
        assert status == 202


async def test_another_request_on_the_connection_goes_to_aiohttp_and_so_does_the_rest(door):
    """POST, GET, POST on one connection, also pipelined: all answered in order."""
    async with connected(door) as (reader, writer):
        writer.write(request(GOOD) + request(b"", path="/status", method="GET") + request(GOOD))
        assert [(await answer(reader))[0] for _ in range(3)] == [202, 200, 202]
        assert lanes(door) == 0


async def test_a_body_that_does_not_come_is_408_and_closed(door):
    """listen.body_timeout holds in the express lane, and the budget is given back."""
    async with connected(door) as (reader, writer):
        writer.write(request(GOOD)[:-5])
        status, headers, document = await answer(reader)
        assert (status, document["error"]["code"]) == (408, "body_timeout")
        assert headers["connection"] == "close"
        assert await reader.read() == b""


async def sends_all_then_reads(door: Door, data: bytes, when: Callable[[], bool]) -> bytes:
    """What a client gets that reads only after its last byte; ``when`` it goes on in the middle of them."""
    host, _, port = door.listener.url.removeprefix("http://").partition(":")
    loop = asyncio.get_running_loop()
    with socket.socket() as connection:
        connection.setblocking(False)
        await loop.sock_connect(connection, (host, int(port)))
        await loop.sock_sendall(connection, data[: len(data) // 2])
        await eventually(when)
        for start in range(len(data) // 2, len(data), 1024):
            await loop.sock_sendall(connection, data[start : start + 1024])
        got = b""
        while part := await asyncio.wait_for(loop.sock_recv(connection, 65_536), 10):
            got += part
        return got


async def test_who_is_refused_before_the_body_is_there_reads_the_answer(tmp_path, monkeypatch):
    """The longest body, and no room for it: all may be sent, then the 503 is read. Control: closed at once, a reset."""
    data = request(b" " * LONGEST)
    async with open_door(tmp_path) as door:
        door.listener._express.parts.budget.take(64 * MIB)
        refused = door.metrics.requests.labels("/logs", "503")
        got = await sends_all_then_reads(door, data, lambda: refused._value.get() == 1)
        assert got.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nConnection: close\r\n" in got
        await eventually(lambda: door.listener.connections == 0)
        monkeypatch.setattr(Lane, "feed", _closed_at_once(Lane.feed))
        with pytest.raises(ConnectionError):
            await sends_all_then_reads(door, data, lambda: refused._value.get() == 2 and door.listener.connections == 0)
        door.listener._express.parts.budget.give(64 * MIB)


def _closed_at_once(feed):
    """A lane that does not linger."""

    def fed(self, data):
        rest = feed(self, data)
        if self._linger is not None:
            self._transport.close()
        return rest

    return fed


async def test_stopping_answers_what_was_taken_and_takes_nothing_that_was_pipelined_behind_it(door, monkeypatch):
    """Two requests in a packet, the first under way when the door is closed: one record, one answer, the end."""
    appends = counted_appends(door, monkeypatch)
    goes_on = asyncio.Event()
    append = door.spool.append

    async def held(*given):
        await goes_on.wait()
        return await append(*given)

    monkeypatch.setattr(door.spool, "append", held)
    async with connected(door) as (reader, writer):
        writer.write(request(GOOD) + request(GOOD))
        await eventually(lambda: any(c._lane.busy for c in door.listener._runner.server.connections if c._lane))
        stopping = asyncio.create_task(door.listener.stop(5))
        await eventually(lambda: any(c._lane._ending for c in door.listener._runner.server.connections if c._lane))
        goes_on.set()
        status, _, _ = await answer(reader)
        assert status == 202
        assert await reader.read() == b""
        await stopping
    assert appends == [1]


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (("Content-Length: 3",), 400),
        (("Transfer-Encoding: chunked",), 400),
        (("X: a\x00b",), 400),
        (("Content-Encoding: br",), 415),
        (("Content-Type: text/plain",), 415),
        (("Connection: close",), 202),
        (("Prefer: wait=0",), 202),
        (("Idempotency-Key: k",), 202),
    ],
)
async def test_what_is_not_common_is_judged_by_aiohttp(door, lines, status):
    """Smuggling, other codings, preferences: never express, always the general answer."""
    async with connected(door) as (reader, writer):
        writer.write(request(GOOD, *lines))
        assert (await answer(reader))[0] == status
        assert lanes(door) == 0


# A target at which the HTTP library's parser stumbles: an IndexError, none of its own errors.
UNREADABLE = b"OPTIONS ws://*[v1.a]@ HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "before", [b"", request(GOOD), request(GOOD, "X-Unknown: 1")], ids=["alone", "express", "aiohttp"]
)
async def test_a_request_at_which_the_parser_stumbles_is_400(door, before):
    """Alone, or pipelined behind one of either lane: that one is answered, then the connection is closed."""
    async with connected(door) as (reader, writer):
        if before:
            writer.write(before)
            assert (await answer(reader))[0] == 202
        writer.write(UNREADABLE)
        status, _, document = await answer(reader)
        assert (status, document["error"]["code"]) == (400, "malformed_request")
        assert await reader.read() == b""


async def test_a_request_at_which_the_parser_stumbles_harms_nobody_whose_record_travels_with_the_one_before(door):
    """Five connections in one turn; the first has the unreadable request behind its record: five answers."""
    async with contextlib.AsyncExitStack() as stack:
        pairs = [await stack.enter_async_context(connected(door)) for _ in range(5)]
        for i, (_, writer) in enumerate(pairs):
            writer.write(request(GOOD) + (UNREADABLE if i == 0 else b""))
        for reader, _ in pairs:
            assert (await answer(reader))[0] == 202
        assert (await answer(pairs[0][0]))[0] == 400


async def test_a_foreign_host_is_refused(door):
    """The Host check holds: 403 from the general lane."""
    async with connected(door) as (reader, writer):
        writer.write(request(GOOD).replace(b"Host: localhost", b"Host: evil.example"))
        assert (await answer(reader))[0] == 403


async def test_a_client_that_leaves_while_it_is_served_harms_nobody(door):
    """Gone after sending: the record is kept, the next request is served."""
    async with connected(door) as (_, writer):
        writer.write(request(GOOD))
        await writer.drain()
    await eventually(lambda: door.spool.counters("postgres").owed == 1)
    async with connected(door) as (reader, writer):
        writer.write(request(GOOD))
        assert (await answer(reader))[0] == 202


async def together(door: Door, bodies: list[bytes]) -> list[tuple[int, dict[str, str], dict]]:
    """Send each on a connection of its own, all in one turn of the loop; the answers."""
    async with contextlib.AsyncExitStack() as stack:
        pairs = [await stack.enter_async_context(connected(door)) for _ in bodies]
        for (_, writer), body in zip(pairs, bodies, strict=True):
            writer.write(request(body))
        return [await answer(reader) for reader, _ in pairs]


def counted_appends(door: Door, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records of each append from now on."""
    appends: list[int] = []
    append = door.spool.append

    async def counted(records, *rest):
        appends.append(len(records))
        return await append(records, *rest)

    monkeypatch.setattr(door.spool, "append", counted)
    return appends


async def test_records_that_arrive_together_are_one_append_and_each_has_its_own_answer(door, monkeypatch):
    """Twenty connections: fewer appends than records, twenty ids, each answer with its own correlation id."""
    appends = counted_appends(door, monkeypatch)
    bodies = [msgspec.json.encode({"service_name": "s", "correlation_id": str(i)}) for i in range(20)]
    answers = await together(door, bodies)
    assert [(status, document["correlation_id"]) for status, _, document in answers] == [
        (202, str(i)) for i in range(20)
    ]
    assert len({document["log_id"] for _, _, document in answers}) == 20
    assert sum(appends) == 20
    assert len(appends) < 20


def named(number: int, text: str = "s") -> bytes:
    """A record with an id of the client's own."""
    return msgspec.json.encode({"log_id": f"00000000-0000-7000-8000-{number:012x}", "service_name": text})


async def test_records_with_ids_of_their_clients_travel_together_too(door, monkeypatch):
    """Twenty ids that nobody has seen, ten without one: fewer appends than records; sent again, all are known."""
    appends = counted_appends(door, monkeypatch)
    bodies = [named(i) if i % 3 else GOOD for i in range(1, 31)]
    answers = await together(door, bodies)
    assert {status for status, _, _ in answers} == {202}
    assert not any(document["duplicate"] for _, _, document in answers)
    assert sum(appends) == 30
    assert len(appends) < 30
    again = await together(door, bodies)
    assert [document["duplicate"] for _, _, document in again] == [body != GOOD for body in bodies]
    assert sum(appends) == 40


async def test_an_id_seen_before_among_those_that_arrive_together_is_answered_as_alone(door):
    """Known with the same content, known with other content, twice in one turn: one record each, and honest answers."""
    await together(door, [named(1), named(2)])
    bodies = [named(1), named(2, "other"), named(3), named(3), named(4), named(5), named(5, "other"), GOOD]
    answers = await together(door, bodies)
    seen = [(status, document.get("duplicate")) for status, _, document in answers]
    assert seen[0] == (202, True)
    assert seen[1] == (409, None)
    assert sorted(seen[2:4]) == [(202, False), (202, True)]
    assert seen[4] == (202, False)
    assert sorted(seen[5:7], key=str) == [(202, False), (409, None)]
    assert seen[7] == (202, False)
    assert door.spool.ledger.accounts["postgres"].owed == 2 + 4


async def test_a_bad_record_among_those_that_arrive_together_is_refused_alone(door):
    """Whatever is wrong with it: the others are taken, as they would be without it."""
    bad = [b"{", b'{"service_name": 5}', b'{"service_name":"s","service_name":"t"}', b'"x"', b"\xff\xff", b"[]"]
    good = [GOOD, b"[" + GOOD + b"]", named(10)]
    bodies = [body for pair in zip(bad, good * 2, strict=True) for body in pair]
    alone = [(await together(door, [body]))[0][0] for body in bodies]
    assert [status for status, _, _ in await together(door, bodies)] == alone
    assert set(alone) >= {202, 400, 422}


@pytest.mark.parametrize(
    ("error", "status"), [(Busy("spool_full", "no room", 7), 503), (RuntimeError("planted"), 500)], ids=["busy", "bug"]
)
async def test_what_the_common_append_meets_all_are_told(door, monkeypatch, error, status):
    """Each of them, and nothing is acknowledged."""

    async def fails(*_):
        raise error

    monkeypatch.setattr(door.spool, "append", fails)
    for got, headers, document in await together(door, [GOOD] * 5):
        assert got == status
        assert "log_id" not in document
        assert headers.get("retry-after") == ("7" if status == 503 else None)


async def test_where_answers_wait_for_the_stores_nobody_travels_together(tmp_path):
    """ingest.ack = stores: each request waits for its own record."""
    async with open_door(tmp_path, Settings(ingest=Ingest(ack="stores", max_wait=0.05))) as door:
        answers = await together(door, [GOOD] * 3)
        assert [(status, document["status"]) for status, _, document in answers] == [(202, "accepted")] * 3
        assert all("preference-applied" in headers for _, headers, _ in answers)

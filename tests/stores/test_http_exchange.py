"""One POST, one answer: what the wire makes of good, odd and broken answers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest

from sidecar.stores.http_exchange import Answer, Exchange

REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nx-amz-crc32: 7\r\n\r\n{}"


class Server:
    """Answers each request with the next of ``script``: pieces of bytes, each sent by itself; None: hang up."""

    def __init__(self, *script: tuple[bytes | None, ...]) -> None:
        self.script = list(script)
        self.requests: list[int] = []  # the connection of each request
        self.ended = 0
        self._connections = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        mine = self._connections
        try:
            while True:
                await reader.readexactly(len(REQUEST))
                self.requests.append(mine)
                for piece in self.script.pop(0) if self.script else ():
                    if piece is None:
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.ended += 1
            writer.close()


@asynccontextmanager
async def served(
    server: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    *,
    total: float = 5.0,
    keepalive: float = 20.0,
) -> AsyncIterator[Exchange]:
    """An exchange with a server of its own."""
    tasks: set[asyncio.Future[None]] = set()
    listening = await asyncio.start_server(
        lambda reader, writer: tasks.add(asyncio.ensure_future(server(reader, writer))), "127.0.0.1", 0
    )
    port = listening.sockets[0].getsockname()[1]
    exchange = Exchange("127.0.0.1", port, tls=None, connect_timeout=5.0, total_timeout=total, keepalive=keepalive)
    try:
        yield exchange
    finally:
        await exchange.close()
        listening.close()
        await asyncio.gather(*tasks)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    "pieces",
    [
        (OK,),
        (OK[:9], OK[9:30], OK[30:-1], OK[-1:]),
        tuple(OK[n : n + 1] for n in range(len(OK))),
        (b"HTTP/1.1 100 Continue\r\n\r\n", OK),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Amz-Crc32: 7\r\n\r\n1\r\n{\r\n", b"1\r\n}\r\n0\r\n\r\n"),
        (b"HTTP/1.1 200 \r\ncontent-length:2\r\nX-AMZ-CRC32:  7 \r\n\r\n{}",),
    ],
    ids=["whole", "split", "bytewise", "interim", "chunked", "odd spaces"],
)
async def test_an_answer_is_read_whole_and_the_connection_used_again(pieces: tuple[bytes, ...]) -> None:
    """However it is cut and framed."""
    server = Server(pieces, (OK,))
    async with served(server) as exchange:
        assert await exchange.post(REQUEST) == Answer(200, "7", b"{}")
        assert await exchange.post(REQUEST) == Answer(200, "7", b"{}")
        assert server.requests == [1, 1]


@pytest.mark.parametrize(
    "pieces",
    [
        (b"HTTP/1.1 503 No\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}",),
        (b"HTTP/1.1 503 No\r\n\r\n{}", None),
        (b"HTTP/1.0 503 No\r\nContent-Length: 2\r\n\r\n{}",),
    ],
    ids=["says close", "no length", "HTTP/1.0"],
)
async def test_a_connection_that_the_answer_ends_is_not_used_again(pieces: tuple[bytes | None, ...]) -> None:
    """The answer counts; the next request has a connection of its own."""
    server = Server(pieces, (OK,))
    async with served(server) as exchange:
        assert await exchange.post(REQUEST) == Answer(503, None, b"{}")
        assert (await exchange.post(REQUEST)).status == 200
        assert server.requests == [1, 2]


@pytest.mark.parametrize(
    "pieces",
    [
        (None,),
        (b"HTTP/1.1 200 OK\r\nContent-Le", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{}", None),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",),
        (b"SSH-2.0-OpenSSH\r\n\r\n",),
        (OK + OK,),
    ],
    ids=["nothing", "head", "body", "chunk", "no number", "negative", "two lengths", "not HTTP", "two answers"],
)
async def test_a_broken_answer_is_an_error_and_never_believed(pieces: tuple[bytes | None, ...]) -> None:
    """The connection is closed, and the next request works."""
    server = Server(pieces, (OK,))
    async with served(server) as exchange:
        with pytest.raises((aiohttp.ClientError, OSError)):
            await exchange.post(REQUEST)
        assert (await exchange.post(REQUEST)).status == 200
        assert server.requests == [1, 2]


async def test_a_cancelled_or_late_call_closes_its_connection() -> None:
    """Its answer, should it come, can never be taken for another call's."""
    server = Server((), (), (OK,))
    async with served(server, total=0.05) as exchange:
        with pytest.raises(TimeoutError):
            await exchange.post(REQUEST)
        await until(lambda: server.ended == 1)
    async with served(server := Server((), (OK,))) as exchange:
        call = asyncio.ensure_future(exchange.post(REQUEST))
        await until(lambda: server.requests == [1])
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: server.ended == 1)
        assert (await exchange.post(REQUEST)).status == 200
        assert server.requests == [1, 2]


async def test_bytes_that_nobody_asked_for_close_an_idle_connection() -> None:
    """They are nobody's answer, so least of all the next one's."""
    more = asyncio.Event()

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(REQUEST))
        writer.write(OK)
        await more.wait()
        writer.write(OK.replace(b"{}", b"[]"))
        await reader.read()
        writer.close()
        more.clear()

    async with served(server) as exchange:
        assert (await exchange.post(REQUEST)).body == b"{}"
        more.set()
        await until(lambda: not more.is_set())
        assert exchange.connections == 0


async def test_idle_connections_are_closed_in_time_and_all_with_the_exchange() -> None:
    """Nothing is kept open for nobody; a closed exchange opens nothing."""
    server = Server((OK,), (OK,))
    async with served(server, keepalive=0.05) as exchange:
        await asyncio.gather(exchange.post(REQUEST), exchange.post(REQUEST))
        assert exchange.connections == 2
        await until(lambda: server.ended == 2)
        assert exchange.connections == 0
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await exchange.post(REQUEST)


async def test_closing_ends_a_call_that_is_under_way() -> None:
    """With an error, at once."""
    server = Server(())
    async with served(server) as exchange:
        call = asyncio.ensure_future(exchange.post(REQUEST))
        await until(lambda: server.requests == [1])
        await exchange.close()
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await call

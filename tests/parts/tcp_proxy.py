"""A TCP proxy that breaks connections on command, for any protocol; used in front of PostgreSQL.

::

    async with TcpProxy(host, port) as proxy:
        ... connect to proxy.port ...
        await proxy.refuse()             nobody listens: connecting is refused, present connections are reset
        proxy.reset_new()                connections are accepted and reset at once
        proxy.blackhole()                nothing passes in either direction, nothing is closed
        proxy.latency = 0.05             seconds added to each chunk, each way
        proxy.cut_replies(after=100)     each connection is reset after that many more bytes from the server
        proxy.lose_reply(b"COMMIT")      the next chunk to the server that contains this goes through; what the server
                                         answers is swallowed and the connection reset: an ambiguous commit
        proxy.kill_all()                 reset what there is now
        await proxy.normal()             and back; what a black hole held back goes on

``lost`` counts replies swallowed, ``accepted`` connections; ``bytes_up`` and ``bytes_down`` what was passed on.
"""

import asyncio
import socket
import struct
from types import TracebackType
from typing import Self

_CHUNK = 65536


def reset(transport: asyncio.BaseTransport | None) -> None:
    """Close with RST instead of FIN: the peer sees "connection reset"."""
    if transport is None:
        return
    peer = transport.get_extra_info("socket")
    if peer is not None and peer.fileno() != -1:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if isinstance(transport, asyncio.WriteTransport):
        transport.abort()


async def stop_listening(server: asyncio.Server) -> None:
    """Close a listener; what it had accepted until then becomes connections first.

    asyncio makes a connection a turn of the loop after accepting it; where the server was closed in between, that fails
    and leaves the socket open, for nobody to close (Python 3.11, ``Server._attach``).
    """
    loop = asyncio.get_running_loop()
    for listening in server.sockets:
        loop.remove_reader(listening.fileno())
    for _ in range(4):
        await asyncio.sleep(0)
    server.close()


class _Connection:
    """One client and its connection to the server."""

    def __init__(self, proxy: "TcpProxy", client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._reply_left = proxy.cut_after
        self._swallow = False

    async def run(self, from_client: asyncio.StreamReader, from_server: asyncio.StreamReader) -> None:
        up = asyncio.ensure_future(self._up(from_client))
        down = asyncio.ensure_future(self._down(from_server))
        try:
            await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)

    def allow(self, reply_bytes: int | None) -> None:
        self._reply_left = reply_bytes

    def reset(self) -> None:
        reset(self._client.transport)
        reset(self._server.transport)

    async def _up(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(_CHUNK):
            await self._proxy.pass_through()
            needle = self._proxy.losing
            if needle is not None and needle in data:
                self._proxy.losing = None
                self._swallow = True
            self._server.write(data)
            await self._server.drain()
            self._proxy.bytes_up += len(data)

    async def _down(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(_CHUNK):
            await self._proxy.pass_through()
            if self._swallow:
                self._proxy.lost += 1
                self.reset()
                return
            if self._reply_left is not None:
                data, self._reply_left = data[: self._reply_left], max(self._reply_left - len(data), 0)
            self._client.write(data)
            await self._client.drain()
            self._proxy.bytes_down += len(data)
            if self._reply_left == 0:
                self.reset()
                return


class TcpProxy:
    """See the module. ``port`` is its own port on 127.0.0.1, the same through ``refuse`` and ``normal``."""

    def __init__(self, host: str, port: int) -> None:
        self.port = 0
        self.latency = 0.0
        self.cut_after: int | None = None
        self.losing: bytes | None = None
        self.accepted = 0
        self.lost = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self._upstream = (host, port)
        self._server: asyncio.Server | None = None
        self._resetting = False
        self._passing = asyncio.Event()
        self._passing.set()
        self._connections: set[_Connection] = set()
        self._tasks: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def __aenter__(self) -> Self:
        await self._listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.refuse()

    async def refuse(self) -> None:
        """Stop listening and reset what there is."""
        server, self._server = self._server, None
        if server is not None:
            await stop_listening(server)
        self.kill_all()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def reset_new(self) -> None:
        """Accept and reset; connections that exist live on."""
        self._resetting = True

    def blackhole(self) -> None:
        """Hold back everything, both ways, from now on."""
        self._passing.clear()

    def cut_replies(self, after: int) -> None:
        """Reset each connection after ``after`` more bytes from the server."""
        self.cut_after = after
        for connection in self._connections:
            connection.allow(after)

    def lose_reply(self, request: bytes) -> None:
        """Pass on the next chunk that contains ``request``, swallow the answer, reset."""
        self.losing = request

    def kill_all(self) -> None:
        """Reset every connection that exists."""
        for connection in list(self._connections):
            connection.reset()

    async def normal(self) -> None:
        """Undo every fault but those that have happened."""
        self.latency, self.cut_after, self.losing, self._resetting = 0.0, None, None, False
        for connection in self._connections:
            connection.allow(None)
        self._passing.set()
        if self._server is None:
            await self._listen()

    async def pass_through(self) -> None:
        """Wait until data may pass: the latency, then the end of a black hole."""
        if self.latency:
            await asyncio.sleep(self.latency)
        await self._passing.wait()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Called by the loop in the tick of the connection: from here on there is always somebody to close it.

        A coroutine in its place may be cancelled before it first runs, and would leave the connection open.
        """
        self.accepted += 1
        if self._resetting or self._server is None:  # accepted, but refused before it came to this
            reset(writer.transport)
            return
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._tasks[task] = writer
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.pop(task).transport.abort()
        if not task.cancelled():
            task.result()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._passing.wait()
            up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        except (OSError, asyncio.CancelledError):
            reset(writer.transport)
            return
        connection = _Connection(self, writer, up_writer)
        self._connections.add(connection)
        try:
            await connection.run(reader, up_reader)
        except (OSError, asyncio.CancelledError):
            connection.reset()
        finally:
            self._connections.discard(connection)
            for side in (writer, up_writer):
                side.close()

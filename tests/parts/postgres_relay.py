"""A relay between the store and PostgreSQL that knows where messages begin: for the harm that only a network can do.

* ``backends=2`` pools transactions as pgbouncer does, in the most adverse way: after every transaction the client's
  next one goes to the other server connection. It speaks for a role that the server trusts, since it cannot log in
  twice with a client's password.
* ``swallow`` lets the server finish a command, then cuts both sides without a word of its answer: the commit happened
  and nobody knows.
* ``tls`` makes it a server with a certificate of the test's choice; the embedded server has no TLS.
* ``frozen`` forwards nothing and closes nothing: a black hole.
"""

import asyncio
import ssl
import struct
from typing import Final, Self

_CANCEL: Final = 80877102
_TLS: Final = 80877103
_ENDS: Final = (b"c", b"S")  # CopyDone, Sync: the server answers with ReadyForQuery


async def _frame(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readexactly(5)
    return head + await reader.readexactly(struct.unpack("!i", head[1:])[0] - 4)


async def _startup(reader: asyncio.StreamReader) -> bytes:
    length = await reader.readexactly(4)
    return length + await reader.readexactly(struct.unpack("!i", length)[0] - 4)


class Relay:
    """``async with Relay(port) as relay``: listens on ``relay.port``."""

    def __init__(self, target: int, backends: int = 1, tls: ssl.SSLContext | None = None) -> None:
        self._target = target
        self._backends = backends
        self._tls = tls
        self._tasks: set[asyncio.Task[None]] = set()
        self._thaw = asyncio.Event()
        self._thaw.set()
        self.swallow = False
        self.accepted = 0
        self.cancels = 0
        self.switches = 0

    @property
    def frozen(self) -> bool:
        return not self._thaw.is_set()

    @frozen.setter
    def frozen(self, value: bool) -> None:
        if value:
            self._thaw.clear()
        else:
            self._thaw.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        open_ends = [writer]
        try:
            await self._thaw.wait()
            startup = await _startup(reader)
            if struct.unpack("!i", startup[4:8])[0] == _TLS:
                if self._tls is None:
                    writer.write(b"N")
                else:
                    writer.write(b"S")
                    async with asyncio.timeout(2):  # a client that refuses leaves this waiting (Python 3.11)
                        await writer.start_tls(self._tls)
                startup = await _startup(reader)
            if struct.unpack("!i", startup[4:8])[0] == _CANCEL:
                self.cancels += 1
                _, upstream = await asyncio.open_connection("127.0.0.1", self._target)
                open_ends.append(upstream)
                upstream.write(startup)
                await upstream.drain()
                return
            self.accepted += 1
            await self._converse(startup, reader, writer, open_ends)
        except (asyncio.IncompleteReadError, OSError):
            pass  # one side went away, so the other goes too
        finally:
            for end in open_ends:
                end.transport.abort()  # nothing to wait for, least of all the end of a TLS handshake that failed

    async def _converse(
        self,
        startup: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        open_ends: list[asyncio.StreamWriter],
    ) -> None:
        servers = []
        for number in range(self._backends):
            server = await asyncio.open_connection("127.0.0.1", self._target)
            servers.append(server)
            open_ends.append(server[1])
            server[1].write(startup)
            while number > 0 and not (await _frame(server[0])).startswith(b"Z"):
                pass  # the client heard this from the first server already
        current = 0
        cutting = False

        async def down(number: int) -> None:
            nonlocal current
            while True:
                frame = await _frame(servers[number][0])
                await self._thaw.wait()
                ready = frame.startswith(b"Z")
                if cutting:
                    if ready:
                        raise ConnectionError("cut on purpose")
                    continue
                writer.write(frame)
                await writer.drain()
                if ready and frame.endswith(b"I") and self._backends > 1:
                    current = (current + 1) % self._backends
                    self.switches += 1

        async def up() -> None:
            nonlocal cutting
            while True:
                frame = await _frame(reader)
                await self._thaw.wait()
                if self.swallow and frame[:1] in _ENDS:
                    cutting, self.swallow = True, False
                servers[current][1].write(frame)
                await servers[current][1].drain()

        pumps = [asyncio.create_task(down(n)) for n in range(self._backends)] + [asyncio.create_task(up())]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

"""One POST, one answer, over kept connections: what aiohttp's client does, for the one shape of request sent here.

aiohttp's client costs 80 to 100 us a call, most of it for what is never asked of it here (cookies, redirects, tracing,
payload kinds, a timer per phase). This is its place on the one path that every record takes; aiohttp's compiled parser
still reads the answers, so that framing (lengths, chunks, ends of connections) is not ours. Through an HTTP proxy the
general client is used (``dynamodb_wire``).

INVARIANTS

* A connection carries one request at a time. It is used again only after a whole answer that allows it, with nothing
  after it; whatever else happened (error, time up, cancelled, bytes that nobody asked for) closes it.
* No request is ever sent twice: what the failure left behind is unknown, and repeating is the caller's decision.
* Every call ends: connecting within ``connect_timeout``, all of it within ``total_timeout`` (seconds).
"""

import asyncio
import ssl
from typing import Final, NamedTuple

from aiohttp import ClientPayloadError, ConnectionTimeoutError, ServerDisconnectedError
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpResponseParser, RawResponseMessage
from aiohttp.streams import StreamReader

_BUFFER: Final = 32 * 1024 * 1024  # of an answer, bytes; reading stops at twice that, far above what DynamoDB sends
_FINAL: Final = 200  # below are interim answers (RFC 9110, section 15.2)


class Answer(NamedTuple):
    """A whole answer: status code, the ``x-amz-crc32`` header where there is one, and the body."""

    status: int
    checksum: str | None
    body: bytes


class Exchange:
    """Connections to one origin; any number at once, the last used first."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        tls: ssl.SSLContext | None,
        connect_timeout: float,
        total_timeout: float,
        keepalive: float,
    ) -> None:
        """Opens nothing. ``keepalive`` is how long, in seconds, an idle connection is kept."""
        self._host = host
        self._port = port
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._total_timeout = total_timeout
        self._keepalive = keepalive
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def connections(self) -> int:
        """How many there are, idle or busy."""
        return len(self._all)

    async def post(self, request: bytes) -> Answer:
        """Send a whole request, head and body, and return the answer to it.

        Raises:
            OSError, TimeoutError: no connection, or it broke, or the time was up.
            aiohttp.ClientError: the answer is not HTTP, or broke off.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._total_timeout
        connection = self._take() or await self._connect(loop)
        answer = connection.send(request)
        timer = loop.call_at(deadline, connection.fail, TimeoutError())
        try:
            return await answer
        except asyncio.CancelledError:
            connection.drop()
            raise
        finally:
            timer.cancel()

    async def close(self) -> None:
        """Close every connection, also one that waits for its answer; idempotent."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        gone = [connection.gone for connection in self._all]
        for connection in list(self._all):
            connection.fail(ServerDisconnectedError())
        if gone:
            await asyncio.wait(gone, timeout=self._connect_timeout)

    def _take(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        return None

    async def _connect(self, loop: asyncio.AbstractEventLoop) -> "_Connection":
        self._check()
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self, loop),
                    self._host,
                    self._port,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls is not None else None,
                )
        except TimeoutError:
            raise ConnectionTimeoutError from None
        try:
            self._check()  # again: that took its time
        except ServerDisconnectedError:
            connection.drop()
            raise
        return connection

    def _check(self) -> None:
        if self._closed:
            raise ServerDisconnectedError

    def opened(self, connection: "_Connection") -> None:
        """A connection is there."""
        self._all.add(connection)

    def rest(self, connection: "_Connection", loop: asyncio.AbstractEventLoop) -> None:
        """A connection has a whole answer and may be used again."""
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if self._sweep is None and not self._closed:
            self._sweep = loop.call_later(self._keepalive, self._swept, loop)

    def lost(self, connection: "_Connection") -> None:
        """A connection is gone."""
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def _swept(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close what has been idle for long; look again while anything is idle."""
        self._sweep = None
        now = loop.time()
        kept = [connection for connection in self._idle if now - connection.idle_since < self._keepalive]
        old = [connection for connection in self._idle if connection not in kept]
        self._idle = kept
        for connection in old:
            connection.drop()
        if kept:
            self._sweep = loop.call_later(self._keepalive, self._swept, loop)


class _Connection(BaseProtocol):
    """One connection; ``send`` gives the future of its answer."""

    __slots__ = ("_answer", "_body", "_exchange", "_message", "_reader", "gone", "idle_since")

    def __init__(self, exchange: Exchange, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._exchange = exchange
        self._reader = HttpResponseParser(self, loop, _BUFFER, auto_decompress=False, read_until_eof=True)
        self._parser = self._reader
        self._answer: asyncio.Future[Answer] | None = None
        self._message: RawResponseMessage | None = None
        self._body: StreamReader | None = None
        self.gone: asyncio.Future[None] = loop.create_future()
        self.idle_since = 0.0

    @property
    def open(self) -> bool:
        """Whether it can be written to, as far as is known."""
        return self.transport is not None and not self.transport.is_closing()

    def send(self, request: bytes) -> "asyncio.Future[Answer]":
        """Send a request; the answer, or what went wrong."""
        answer = self._answer = self._loop.create_future()
        if self.transport is None:
            self.fail(ServerDisconnectedError())
        else:
            self.transport.write(request)
        return answer

    def fail(self, error: Exception) -> None:
        """The answer will not come: tell who waits for it, and close."""
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_exception(error)
        self.drop()

    def drop(self) -> None:
        """Close at once, without a word to who waits."""
        self._answer = None
        if self.transport is not None:
            self.transport.abort()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """The body's reader says this after each reading; here it is rarely news."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    # -- what the loop tells --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._exchange.opened(self)

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            if data:  # nobody asked: it cannot be told whose this is
                self.drop()
            return
        try:
            messages, _, rest = self._reader.feed_data(data)
        except (HttpProcessingError, ValueError) as exc:
            self.fail(ClientPayloadError(type(exc).__name__))
            return
        if messages and self._begin(messages):
            self.fail(ClientPayloadError("more than one answer"))
            return
        if rest:
            self.fail(ClientPayloadError("bytes after the answer"))
            return
        self._end_if_whole()

    def eof_received(self) -> None:
        """An answer without a length ends here; any other breaks off."""
        if self._answer is None:
            return
        try:
            self._reader.feed_eof()
        except (HttpProcessingError, ValueError) as exc:
            self.fail(ClientPayloadError(type(exc).__name__))
            return
        self._end_if_whole(last=True)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._answer is not None:
            self.eof_received()
        super().connection_lost(exc)
        self.fail(exc if isinstance(exc, OSError) else ServerDisconnectedError())
        self._exchange.lost(self)
        if not self.gone.done():
            self.gone.set_result(None)

    # -- reading --------------------------------------------------------------------------------------------------

    def _begin(self, messages: "list[tuple[RawResponseMessage, StreamReader]]") -> bool:
        """Note the answer's head and where its body arrives; True where there is one too many."""
        for message, body in messages:
            if message.code < _FINAL:
                continue
            if self._message is not None:
                return True
            self._message, self._body = message, body
        return False

    def _end_if_whole(self, *, last: bool = False) -> None:
        message, body, answer = self._message, self._body, self._answer
        if message is None or body is None or answer is None or not body.is_eof():
            return
        self._message = self._body = self._answer = None
        error = body.exception()
        if error is not None:
            if not answer.done():
                answer.set_exception(error)
            self.drop()
            return
        whole = Answer(message.code, message.headers.get("x-amz-crc32"), body.read_nowait(-1))
        if not answer.done():
            answer.set_result(whole)
        if message.should_close or last:
            self.drop()
        else:
            self._exchange.rest(self, self._loop)

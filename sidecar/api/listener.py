"""Listeners: connections bounded in time and number (``server`` says by what), started and stopped in order.

WHEN ALL CONNECTIONS ARE TAKEN, the application's listener tells the next one so and closes it: its peer is the pod's
own application, which is to wait. The ops listener is reached by the pod network and asked by kubelet, whose probes
open a connection each: whoever holds all of them open would have the pod taken out of service. So there the newcomer
gets in, and the oldest connection of the address that has the most is cut off: a crowd costs nobody but itself.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from typing import Any, Final, cast

import msgspec
from aiohttp import web

from sidecar.api import errors
from sidecar.api.express import EXPRESS, Express, Lane
from sidecar.config_checks import is_port
from sidecar.errors import ConfigError
from sidecar.settings import Listen

_HEAD_LINE: Final = 8190  # bytes
_HEAD_FIELDS: Final = 128
_LINGER: Final = 2.0  # seconds in which the rest of a refused body is read, so that its sender reads the answer
_READ_BUFFER: Final = 256 * 1024  # bytes of a body read ahead
_BACKLOG: Final = 1024
_SOCKET_MODE: Final = 0o660
_LAST_WORDS: Final = 1.0  # seconds that a refused connection has to read why


def _raw(status: str, code: str, message: str, *fields: str) -> bytes:
    """A whole answer as bytes, for connections that never get as far as a request."""
    body = msgspec.json.encode({"error": {"code": code, "message": message}})
    head = (
        f"HTTP/1.1 {status}",
        f"Server: {errors.SERVER}",
        f"Content-Type: {errors.JSON}",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *fields,
    )
    return "\r\n".join((*head, "", "")).encode() + body


_FULL: Final = _raw(
    "503 Service Unavailable",
    "connections",
    "all connections that listen.max_connections allows are open; reuse one, or send again shortly",
    "Retry-After: 1",
)
_MALFORMED: Final = "not a request that HTTP/1.1 allows, or its head is too long; see docs/API.md"
_UNREADABLE: Final = _raw("400 Bad Request", "malformed_request", _MALFORMED)
_SLOW_HEAD: Final = _raw(
    "408 Request Timeout", "header_timeout", "the request's head was not complete in time (listen.header_timeout)"
)


class _Refusal(asyncio.Protocol):
    """A connection over the cap: told so, then closed."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast("asyncio.Transport", transport)  # uvloop's have asyncio's methods but not its base class
        stream.write(_FULL)
        if stream.can_write_eof():
            stream.write_eof()
        asyncio.get_running_loop().call_later(_LAST_WORDS, stream.close)  # closing at once could cut the answer


class _Connection(web.RequestHandler):
    """aiohttp's connection, with an express lane and a bound on the time that a request's head may take."""

    __slots__ = ("_arrive", "_express", "_head_timeout", "_head_timer", "_lane", "_leave")

    def __init__(
        self,
        head_timeout: float,
        arrive: Callable[["_Connection", str], None],
        leave: Callable[["_Connection"], None],
        express: Express | None,
        server: web.Server,
        **options: Any,
    ) -> None:
        super().__init__(server, **options)
        self._express = express
        self._lane: Lane | None = None
        self._head_timeout = head_timeout
        self._head_timer: asyncio.TimerHandle | None = None
        self._arrive = arrive
        self._leave = leave

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self._arrive(self, peer[0] if isinstance(peer, tuple) else "")
        if self._express is not None:
            # uvloop's transports have asyncio's methods but not its base class.
            self._lane = Lane(self._express, cast("asyncio.Transport", transport), self._express_answered)

    def _express_answered(self) -> None:
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._lane is not None:
            self._general(self._lane.go_on())

    def data_received(self, data: bytes) -> None:
        if self._lane is None:
            self._general(data)
        elif not self._force_close and not self._close:
            self._general(self._lane.feed(data))

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109  (the base's signature)
        """Let the request of the express lane finish first; what is pipelined behind it is not taken any more."""
        if self._lane is not None:
            await self._lane.end(timeout)
        await super().shutdown(timeout)

    def _general(self, data: bytes | None) -> None:
        """What is not the express lane's goes to aiohttp, and then all that follows on this connection."""
        if data is None:
            return
        self._lane = None
        try:
            super().data_received(data)
        except Exception:  # noqa: BLE001  (the parser stumbled: its errors are no errors of HTTP, nor of whoever called)
            self._is_unreadable()
            return
        waiter = self._waiter
        if waiter is not None and not waiter.done():  # still waiting for a request, though bytes came: half a head
            if self._head_timer is None and data:
                self._head_timer = self._loop.call_later(self._head_timeout, self._head_is_late)
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        if self._lane is not None:
            self._lane.close()
        self._leave(self)
        super().connection_lost(exc)

    def cut_off(self) -> None:
        """Close at once, whatever is under way or not yet sent: the peer may never read it."""
        if self.transport is not None:
            self.transport.abort()

    def _process_keepalive(self) -> None:
        """Close an idle connection; aiohttp would cut off the express lane's requests, of which it knows nothing."""
        if self._lane is not None and self._lane.busy:
            self._keepalive_handle = self._loop.call_later(self._keepalive_timeout, self._process_keepalive)
        else:
            super()._process_keepalive()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer; what aiohttp refuses before the middleware (an expectation) is worded as all errors are."""
        if isinstance(resp, web.HTTPException):
            resp = errors.from_http(resp)
            resp.headers["Server"] = errors.SERVER
        return await super().finish_response(request, resp, start_time)

    def _is_unreadable(self) -> None:
        """The parser knows neither this request nor why: 400, but what was asked before is answered first."""
        waiter = self._waiter
        if self._messages or (self._request_count and (waiter is None or waiter.done())):
            self.close()
            return
        if self.transport is not None:
            self.transport.write(_UNREADABLE)
        self.force_close()

    def _head_is_late(self) -> None:
        if self.transport is not None:
            self.transport.write(_SLOW_HEAD)
        self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002  (may quote the request)
    ) -> web.StreamResponse:
        """Errors that never reach a handler: what the HTTP parser refuses. Nothing of the request is logged."""
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, no other can be given")
        if isinstance(exc, ConnectionError):
            response = web.Response(status=400)  # nobody is there to read it
        elif status == 500 and exc is not None:  # noqa: PLR2004
            response = errors.from_surprise(exc)
        else:
            response = errors.error_answer(
                status,
                "malformed_request",
                _MALFORMED,
            )
        response.headers["Server"] = errors.SERVER
        response.force_close()
        return response


class Listener:
    """One application at one address (``host:port`` or ``unix:/path``)."""

    def __init__(self, app: web.Application, address: str, limits: Listen, *, newest_gets_in: bool = False) -> None:
        """``newest_gets_in``: where all connections are taken an old one is cut off, instead of the new one refused."""
        self._newest_gets_in = newest_gets_in
        self._peers: dict[str, dict[_Connection, None]] = {}  # by address, oldest first
        self._address = address
        self._limits = limits
        self._runner = web.AppRunner(app, access_log=None)
        self._express = app.get(EXPRESS)
        self._server: asyncio.Server | None = None
        self._open = 0

    @property
    def url(self) -> str:
        """Where it really listens: ``http://host:port`` (the port that was given for 0), or ``unix:/path``."""
        if self._server is None or self._address.startswith("unix:"):
            return self._address
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def connections(self) -> int:
        """Connections open now."""
        return self._open

    async def start(self) -> None:
        """Bind and accept.

        Raises:
            ConfigError: the address cannot be bound.
        """
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        try:
            if self._address.startswith("unix:"):
                path = self._address.removeprefix("unix:")
                self._server = await loop.create_unix_server(self._connection, path, backlog=_BACKLOG)
                os.chmod(path, _SOCKET_MODE)  # noqa: PTH101  (the application's group, nobody else)
            else:
                host, port = split_address(self._address)
                self._server = await loop.create_server(self._connection, host, port, backlog=_BACKLOG)
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigError(
                "listen",
                seen=self._address,
                allowed="an address of this machine that is free",
                hint=f"{error.strerror or type(error).__name__}; stop what listens there or choose another",
            ) from None

    async def stop(self, grace: float) -> None:
        """Accept nothing more, finish requests under way within ``grace`` seconds, close. Idempotent."""
        if self._server is None:
            return
        self._server.close()
        server = self._runner.server
        if server is not None:
            server.pre_shutdown()
            await server.shutdown(grace)
        await self._runner.cleanup()
        await self._server.wait_closed()
        self._server = None
        if self._address.startswith("unix:"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._address.removeprefix("unix:"))  # noqa: PTH108  (its twin above)

    def _connection(self) -> asyncio.Protocol:
        server = self._runner.server
        if server is None or (self._open >= self._limits.max_connections and not self._make_room()):
            return _Refusal()
        self._open += 1
        return _Connection(
            self._limits.header_timeout,
            self._arrived,
            self._left,
            self._express,
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,
            keepalive_timeout=self._limits.idle_timeout,
            lingering_time=_LINGER,
            max_line_size=_HEAD_LINE,
            max_field_size=_HEAD_LINE,
            max_headers=_HEAD_FIELDS,
            read_bufsize=_READ_BUFFER,
            auto_decompress=False,
        )

    def _arrived(self, connection: _Connection, peer: str) -> None:
        self._peers.setdefault(peer, {})[connection] = None

    def _left(self, connection: _Connection) -> None:
        for peer, connections in self._peers.items():
            if connection in connections:
                del connections[connection]
                if not connections:
                    del self._peers[peer]
                self._open -= 1
                return  # else it was counted out when it was cut off

    def _make_room(self) -> bool:
        """Cut off the oldest of the address that has the most; False where that is not to be."""
        crowd = max(self._peers.values(), key=len, default=None) if self._newest_gets_in else None
        if crowd is None:  # or all came in this very moment
            return False
        oldest = next(iter(crowd))
        self._left(oldest)
        oldest.cut_off()
        return True


def split_address(address: str) -> tuple[str, int]:
    """``host:port`` -> host (brackets of IPv6 taken off), port.

    Raises:
        ConfigError: no port, or none that can be.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not is_port(port):
        raise ConfigError("listen", seen=address, allowed="host:port, or unix:/path", hint="name host and port")
    return host.strip("[]"), int(port)

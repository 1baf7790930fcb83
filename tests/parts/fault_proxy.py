"""A DynamoDB that misbehaves on command: an HTTP proxy before a real one that does not.

::

    async with FaultProxy(endpoint) as proxy:
        options = msgspec.structs.replace(dynamodb_settings, endpoint_url=proxy.url)
        proxy.on("BatchWriteItem", Refuse(400, "ThrottlingException"))              until proxy.clear()
        proxy.on("BatchWriteItem", LoseReply(), None, Reset())                      one call each; None: no fault
        proxy.on("*", Refuse(500, "InternalServerError"), times=3)                  three calls of any operation
        proxy.limit("BatchWriteItem", items_per_second=200)                         the rest is answered as unprocessed

``calls[operation]`` counts requests, ``items[operation]`` the items or keys in them, ``applied[operation]`` the items
or keys passed on; ``bodies`` keeps the last requests as ``(operation, body)``.
"""

import asyncio
import io
import json
import ssl
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self
from zlib import crc32

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler

from tests.parts.tcp_proxy import reset, stop_listening

_ERRORS = "com.amazonaws.dynamodb.v20120810#"
_KEPT = 200
_PARTS = {"BatchWriteItem": ("RequestItems", "UnprocessedItems"), "BatchGetItem": ("RequestItems", "UnprocessedKeys")}


@dataclass(frozen=True)
class Refuse:
    """An error answer; nothing is applied."""

    status: int
    code: str
    message: str = "planted by the fault proxy"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Raw:
    """Any answer at all; nothing is applied."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Delay:
    """The right answer, late."""

    seconds: float


@dataclass(frozen=True)
class Hang:
    """Nothing is applied and nothing is answered, until the client goes away."""


@dataclass(frozen=True)
class Reset:
    """Nothing is applied; the connection is reset."""


@dataclass(frozen=True)
class LoseReply:
    """Applied, and then the connection is reset instead of an answer."""


@dataclass(frozen=True)
class CutReply:
    """Applied; the answer breaks off after some bytes of its body."""

    after: int = 1


@dataclass(frozen=True)
class DamageReply:
    """Applied; one bit of the answer's body is wrong."""


@dataclass(frozen=True)
class Unprocess:
    """The first ``share`` of a batch, and at least ``least``, is applied; the rest is answered as unprocessed."""

    share: float = 0.5
    least: int = 0


Fault = Refuse | Raw | Delay | Hang | Reset | LoseReply | CutReply | DamageReply | Unprocess


class FaultProxy:
    """See the module."""

    def __init__(self, upstream: str, *, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.url = ""
        self.calls: Counter[str] = Counter()
        self.items: Counter[str] = Counter()
        self.applied: Counter[str] = Counter()
        self.bodies: deque[tuple[str, dict[str, Any]]] = deque(maxlen=_KEPT)
        self._upstream = upstream
        self._lasting: dict[str, Fault] = {}
        self._once: dict[str, deque[Fault | None]] = {}
        self._buckets: dict[str, _Bucket] = {}
        self._runner: web.AppRunner | None = None
        self._client: aiohttp.ClientSession | None = None

    def on(self, operation: str, *faults: Fault | None, times: int | None = None) -> None:
        """What happens to the next calls of ``operation`` (``"*"``: any that has nothing of its own).

        One fault without ``times``: to all calls until ``clear``. Else one a call, in order, each ``times`` times.
        """
        if len(faults) == 1 and times is None and faults[0] is not None:
            self._lasting[operation] = faults[0]
            return
        queue = self._once.setdefault(operation, deque())
        for fault in faults:
            queue.extend([fault] * (times or 1))

    def limit(self, operation: str, items_per_second: float) -> None:
        """Apply at most so many items a second of a batch operation; the rest is unprocessed."""
        self._buckets[operation] = _Bucket(items_per_second)

    def clear(self) -> None:
        """From now on as it should be; the counters stay."""
        self._lasting.clear()
        self._once.clear()
        self._buckets.clear()

    async def __aenter__(self) -> Self:
        @web.middleware
        async def everything(request: web.Request, handler: Handler) -> web.StreamResponse:
            return await self._handle(request)  # without a route: one serves as an HTTP proxy too

        application = web.Application(client_max_size=64 * 1024 * 1024, middlewares=[everything])
        self._client = aiohttp.ClientSession(auto_decompress=False)
        self._runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        scheme = "http" if self._tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._runner is not None
        assert self._client is not None
        for site in self._runner.sites:
            assert isinstance(site, web.TCPSite)
            assert isinstance(site._server, asyncio.Server)
            await stop_listening(site._server)
        await self._runner.cleanup()
        await self._client.close()

    def _next(self, operation: str) -> Fault | None:
        for name in (operation, "*"):
            queue = self._once.get(name)
            if queue:
                return queue.popleft()
            if name in self._lasting:
                return self._lasting[name]
        return None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        operation = request.headers["X-Amz-Target"].partition(".")[2]
        body = json.loads(await request.read())
        self.calls[operation] += 1
        self.items[operation] += _size(operation, body)
        self.bodies.append((operation, body))
        fault = self._next(operation)
        answer = await _instead(request, fault)
        if answer is not None:
            return answer
        left: list[Any] = []
        if operation in _PARTS:
            body, left = self._share(operation, body, fault)
        status, reply = await self._forward(request, operation, body)
        match fault:
            case LoseReply():
                return _broken(request)
            case CutReply(after):
                return await _cut(request, reply, after)
            case DamageReply():
                return _reply(status, bytes([reply[0] ^ 1]) + reply[1:], {"x-amz-crc32": str(crc32(reply))})
        return _reply(status, _with_unprocessed(operation, reply, body, left), {})

    def _share(self, operation: str, body: dict[str, Any], fault: Fault | None) -> tuple[dict[str, Any], list[Any]]:
        """The request that is passed on, and the items that are not."""
        items = _parts(operation, body)
        allowed = len(items)
        if isinstance(fault, Unprocess):
            allowed = max(int(len(items) * fault.share), fault.least)
        if operation in self._buckets:
            allowed = self._buckets[operation].take(allowed)
        return _with_parts(operation, body, items[:allowed]), items[allowed:]

    async def _forward(self, request: web.Request, operation: str, body: dict[str, Any]) -> tuple[int, bytes]:
        size = _size(operation, body)
        if operation in _PARTS and size == 0:
            return 200, b"{}"
        names = ("X-Amz-Target", "X-Amz-Date", "Authorization", "Content-Type", "X-Amz-Security-Token")
        headers = {name: request.headers[name] for name in names if name in request.headers}
        assert self._client is not None
        sent = io.BytesIO(json.dumps(body).encode())  # aiohttp warns of large bodies that are plain bytes
        async with self._client.post(self._upstream, data=sent, headers=headers) as response:
            answer = await response.read()
            if response.status == 200:
                self.applied[operation] += size
            return response.status, answer


async def _instead(request: web.Request, fault: Fault | None) -> web.Response | None:
    """The answer of a fault that lets nothing through; None where the request is to be passed on."""
    match fault:
        case Refuse(status, code, message, headers):
            answer = json.dumps({"__type": _ERRORS + code, "message": message}).encode()
            return _reply(status, answer, headers)
        case Raw(status, answer, headers):
            return web.Response(status=status, body=answer, headers=headers)
        case Hang():
            await asyncio.Event().wait()
        case Reset():
            return _broken(request)
        case Delay(seconds):
            await asyncio.sleep(seconds)
    return None


class _Bucket:
    """Tokens that come back at a steady rate, one second's worth at most."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._tokens = rate
        self._at: float | None = None

    def take(self, wanted: int) -> int:
        now = asyncio.get_running_loop().time()
        if self._at is not None:
            self._tokens = min(self._tokens + (now - self._at) * self._rate, self._rate)
        self._at = now
        granted = min(wanted, int(self._tokens))
        self._tokens -= granted
        return granted


def _parts(operation: str, body: dict[str, Any]) -> list[Any]:
    ((_, found),) = body[_PARTS[operation][0]].items()
    return list(found if operation == "BatchWriteItem" else found["Keys"])


def _with_parts(operation: str, body: dict[str, Any], parts: Sequence[Any]) -> dict[str, Any]:
    name = _PARTS[operation][0]
    ((table, found),) = body[name].items()
    return {**body, name: {table: parts if operation == "BatchWriteItem" else {**found, "Keys": parts}}}


def _with_unprocessed(operation: str, answer: bytes, body: dict[str, Any], left: Sequence[Any]) -> bytes:
    if not left:
        return answer
    request, unprocessed = _PARTS[operation]
    return json.dumps({**json.loads(answer), unprocessed: _with_parts(operation, body, left)[request]}).encode()


def _size(operation: str, body: dict[str, Any]) -> int:
    return len(_parts(operation, body)) if operation in _PARTS else 1


def _reply(status: int, answer: bytes, headers: dict[str, str]) -> web.Response:
    shown = {"Content-Type": "application/x-amz-json-1.0", "x-amz-crc32": str(crc32(answer)), **headers}
    return web.Response(status=status, body=answer, headers=shown)


def _broken(request: web.Request) -> web.Response:
    reset(request.transport)
    return web.Response()  # goes nowhere: the connection is gone


async def _cut(request: web.Request, answer: bytes, after: int) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": str(len(answer))})
    await response.prepare(request)
    await response.write(answer[:after])
    reset(request.transport)
    return response

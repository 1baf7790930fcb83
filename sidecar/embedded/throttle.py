"""A switch before the local DynamoDB, which knows no throttling: so many items a second, for ``sidecar demo``."""

import time
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
import msgspec
from aiohttp import web

_LARGEST: Final = 32 * 1024 * 1024
_DROPPED: Final = frozenset({"host", "content-length", "transfer-encoding", "connection"})
_ANSWER: Final = {
    "__type": "com.amazonaws.dynamodb.v20120810#ProvisionedThroughputExceededException",
    "message": "the demo's switch: more items per second than it lets through",
}


class ThrottleSwitch:
    """``async with ThrottleSwitch(endpoint) as switch``: listens on ``switch.url``; ``items_per_second`` may be set."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self.items_per_second: float | None = None
        self.refused = 0
        self.url = ""
        self._tokens = 0.0
        self._filled_at = 0.0
        self._runner: web.AppRunner | None = None
        self._client: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=_LARGEST)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        self._client = aiohttp.ClientSession(auto_decompress=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            await self._client.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        if request.headers.get("X-Amz-Target", "").endswith(".BatchWriteItem") and not self._lets(body):
            self.refused += 1
            kind = "application/x-amz-json-1.0"
            return web.Response(status=400, body=msgspec.json.encode(_ANSWER), content_type=kind)
        assert self._client is not None  # noqa: S101  (entered; for the type checker)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _DROPPED}
        try:
            async with self._client.request(
                request.method, self._upstream + request.path_qs, data=body, headers=headers
            ) as answer:
                passed = {name: value for name, value in answer.headers.items() if name.lower() not in _DROPPED}
                return web.Response(status=answer.status, body=await answer.read(), headers=passed)
        except aiohttp.ClientError:
            return web.Response(status=500)

    def _lets(self, body: bytes) -> bool:
        rate = self.items_per_second
        if rate is None:
            return True
        requests: dict[str, list[Any]] = msgspec.json.decode(body)["RequestItems"]
        now = time.monotonic()
        self._tokens = min(rate / 4, self._tokens + rate * (now - self._filled_at))
        self._filled_at = now
        if self._tokens <= 0:
            return False
        self._tokens -= sum(map(len, requests.values()))
        return True

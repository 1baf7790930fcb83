"""The applications and their one middleware; ``listener`` has their connections.

WHAT BOUNDS A CLIENT

* A request's head must be whole ``listen.header_timeout`` after its first byte: 408 and close. aiohttp bounds only
  idle connections, so a head sent a byte at a time would hold one for ever.
* Its body within ``listen.body_timeout`` (``body``): 408 and close.
* A connection between requests, or one that never says anything: ``listen.idle_timeout``, then close.
* At most ``listen.max_connections``: one more is answered 503 with Retry-After and closed, without a request object.
* Head lines and fields of at most 8 KiB, at most 128 fields (aiohttp's parser): 400.

The middleware is one on purpose: each costs about a microsecond and a half per request. It checks the Host (a page in
a browser that rebinds its own name to 127.0.0.1 still sends its own name), words errors, counts answers.
"""

import socket
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Final

from aiohttp import web
from prometheus_client import Counter

from sidecar.api import errors, ingest, mapped, ops, otlp, page, status
from sidecar.api.express import EXPRESS, Express
from sidecar.api.guard import GUARDED, Guard
from sidecar.api.parts import OPS_PARTS, PARTS, ApiParts, OpsParts
from sidecar.errors import Forbidden, SidecarError
from sidecar.metrics import Metrics
from sidecar.settings import Listen

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_LOCAL: Final = ("localhost", "127.0.0.1", "[::1]")
_HOSTS_REMEMBERED: Final = 64


def build_app(parts: ApiParts, routes: Iterable[web.RouteDef] = (), guard: Guard | None = None) -> web.Application:
    """The application listener's application; ``routes`` are the query and control parts' own, behind ``guard``."""
    settings = parts.settings()
    hosts = _host_names(settings.listen)
    app = web.Application(middlewares=[_Door(parts.metrics, hosts, guard).handle])
    app[PARTS] = parts
    app[mapped.COMPILED] = mapped.Compiled()
    app[EXPRESS] = Express(parts, None if settings.listen.app.startswith("unix:") else hosts)
    app.add_routes(
        [
            web.post("/logs", ingest.post_logs, expect_handler=_expect),
            web.post("/v1/logs", otlp.post_logs, expect_handler=_expect),
            web.post("/ingest/{mapping}", mapped.post_events, expect_handler=_expect),
            web.get("/logs/{log_id}/status", status.get_log_status),
            web.get("/status", status.get_status),
            *page.routes(),
            *routes,
            web.get("/logs/{log_id}", status.get_log),  # last: /logs/errors and /logs/count come before any id
        ]
    )
    return app


def build_ops(parts: OpsParts, metrics: Metrics) -> web.Application:
    """The ops listener's application; any Host, because probes and scrapes dial the pod's address."""
    app = web.Application(middlewares=[_Door(metrics, None).handle])
    app[OPS_PARTS] = parts
    app.add_routes(
        [
            web.get("/metrics", ops.get_metrics),
            web.get("/livez", ops.get_livez),
            web.get("/readyz", ops.get_readyz),
            web.get("/healthz", ops.get_healthz),
        ]
    )
    return app


def _host_names(listen: Listen) -> frozenset[str]:
    names = {*_LOCAL, *(name.lower() for name in listen.hosts)}
    if not listen.app.startswith("unix:"):
        names.add(listen.app.rpartition(":")[0].lower())
    return frozenset(names - {"0.0.0.0", "[::]", ""})  # noqa: S104  (an address to listen on is nobody's name)


class _Door:
    """The middleware's state. ``hosts`` None: any Host."""

    def __init__(self, metrics: Metrics, hosts: Collection[str] | None, guard: Guard | None = None) -> None:
        self._metrics = metrics
        self._guard = guard
        self._hosts = hosts
        self._passed: set[str] = set()  # Host values seen to be allowed: one for each name and port dialled
        self._counters: dict[tuple[web.AbstractResource | None, int], Counter] = {}

    @web.middleware
    async def handle(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check, handle, word what went wrong, count."""
        response: web.StreamResponse
        try:
            if self._hosts is not None and request.headers.get("Host") not in self._passed:
                await self._check_host(request, self._hosts)
            response = await handler(request)
        except SidecarError as error:
            response = errors.from_error(error)
        except web.HTTPException as error:
            response = errors.from_http(error)
        except ConnectionError:
            raise  # the client has gone
        except Exception as error:  # noqa: BLE001  (the last line of defence: no detail leaves, the type is logged)
            response = errors.from_surprise(error)
        response.headers["Server"] = errors.SERVER
        self._count(request.match_info.route.resource, response.status)
        return response

    async def _check_host(self, request: web.Request, hosts: Collection[str]) -> None:
        if _is_unix(request):
            return
        value = request.headers.get("Host", "")
        name, colon, port = value.lower().rpartition(":")
        if not colon or not port.isdigit():
            name = value.lower()
        if name not in hosts:
            error = Forbidden("Host: not a name of this machine; dial localhost, or add the name to listen.hosts")
            if self._guard is not None and request.path.startswith(GUARDED):
                await self._guard.refused(request, error)
            raise error
        if len(self._passed) < _HOSTS_REMEMBERED:
            self._passed.add(value)

    def _count(self, resource: web.AbstractResource | None, code: int) -> None:
        counter = self._counters.get((resource, code))
        if counter is None:
            route = "other" if resource is None else resource.canonical
            counter = self._counters[resource, code] = self._metrics.requests.labels(route, str(code))
        counter.inc()


def _is_unix(request: web.Request) -> bool:
    transport = request.transport
    sock = None if transport is None else transport.get_extra_info("socket")
    return sock is not None and sock.family == socket.AF_UNIX


async def _expect(request: web.Request) -> web.Response | None:
    """``Expect: 100-continue`` is met; any other expectation is not (417)."""
    if request.headers.get("Expect", "").lower() != "100-continue":
        response = errors.error_answer(417, "expectation_failed", "Expect: the only one met is 100-continue")
        response.headers["Server"] = errors.SERVER
        return response
    if request.version >= (1, 1) and request.content.total_bytes == 0:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    return None

"""The ops listener: /metrics /livez /readyz /healthz. No control, no payload, reachable from the pod network."""

from aiohttp import web
from prometheus_client.exposition import choose_encoder

from sidecar.api.errors import answer
from sidecar.api.parts import OPS_PARTS


async def get_metrics(request: web.Request) -> web.Response:
    """The registry, in OpenMetrics or the classic text form as the scraper accepts."""
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return web.Response(body=encode(request.app[OPS_PARTS].registry), headers={"Content-Type": content_type})


async def get_livez(_: web.Request) -> web.Response:
    """The event loop turns; nothing else is asked, so that no store's outage restarts the pod."""
    return answer(200, {"live": True})


async def get_readyz(request: web.Request) -> web.Response:
    """Started and the spool writable; neither a store's outage nor push-back is a reason (semantics, section 4)."""
    readiness = request.app[OPS_PARTS].ready()
    return answer(200 if readiness.ready else 503, {"ready": readiness.ready, "reasons": readiness.reasons})


async def get_healthz(request: web.Request) -> web.Response:
    """The state of each part, for people; always 200, see /readyz for a verdict."""
    return answer(200, request.app[OPS_PARTS].health())

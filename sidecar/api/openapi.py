"""GET /openapi.json: the description of every route that this application has.

``openapi.json`` beside this module holds the words: one operation per method and path, the schemas, the bounds. The
*router* says which of them are served, so the document can neither name a route that is not there nor leave out one
that is: a route without words appears with the summary ``UNDESCRIBED``, which a test does not let pass.
"""

import copy
from importlib import resources
from typing import Any, Final

import msgspec
from aiohttp import web

from sidecar.api.errors import JSON

UNDESCRIBED: Final = "not described yet"
_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})


def words() -> dict[str, Any]:
    """``openapi.json`` as it stands."""
    text = resources.files("sidecar.api").joinpath("openapi.json").read_bytes()
    found: dict[str, Any] = msgspec.json.decode(text)
    return found


def document(router: web.UrlDispatcher) -> dict[str, Any]:
    """The words for the routes of ``router``."""
    described = words()
    paths: dict[str, Any] = {}
    for route in router.routes():
        if route.method not in _METHODS or route.resource is None:
            continue
        path = route.resource.canonical
        written = described["paths"].get(path, {})
        operation = written.get(route.method.lower())
        item = paths.setdefault(path, {"parameters": written["parameters"]} if "parameters" in written else {})
        item[route.method.lower()] = copy.deepcopy(operation) or {
            "summary": UNDESCRIBED,
            "responses": {"default": {"description": "not described"}},
        }
    return {**described, "paths": paths}


async def get_openapi(request: web.Request) -> web.Response:
    """The document; asked for by people and generators, so made each time."""
    return web.Response(body=msgspec.json.encode(document(request.app.router)), content_type=JSON)

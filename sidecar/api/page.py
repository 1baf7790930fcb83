"""GET /: the status page, for people; its files lie in ``page/`` and are served as they are.

WHAT IT IS: one HTML page, one style sheet, a few script modules; no build step, nothing from elsewhere. The files hold
no state and no secret: all that the page shows it asks of ``GET /status``, ``GET /openapi.json`` and the migration
routes, like any other client. So the page can show nothing that those do not answer, no record's payload above all.

WHAT KEEPS IT HARMLESS

* Names and reasons come from outside (configuration, stores, callers). The scripts put them on the page by
  ``textContent`` alone; the policy says so again (``require-trusted-types-for 'script'`` with no policy allowed makes
  every way to parse markup throw), and forbids inline script and style, other origins, frames and form targets.
* The control token is typed into a field and lives in the page's memory; it goes out as an ``Authorization`` header to
  this origin, which a foreign page cannot send. The door checks the Host of every request (``server``).

CACHING: ``no-cache`` and a strong ETag over the bytes: a browser asks each time and is mostly told 304, so that a new
version of the sidecar never meets scripts of the old one.

FAILURE: a file that is missing from the installation fails the start (``routes`` reads them all), not a request.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePath
from types import MappingProxyType
from typing import Final

from aiohttp import web

from sidecar.errors import NotFound

INDEX: Final = "index.html"
TYPES: Final[Mapping[str, str]] = MappingProxyType(
    {
        ".html": "text/html; charset=utf-8",
        ".css": "text/css; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
    }
)
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",  # for what does not know frame-ancestors
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }
)


@dataclass(frozen=True, slots=True)
class Asset:
    """One file: its bytes, and the headers that all its answers have."""

    body: bytes
    etag: str  # without quotes
    headers: Mapping[str, str]

    @classmethod
    def of(cls, name: str, body: bytes) -> "Asset":
        """The file ``name`` with this content."""
        etag = hashlib.sha256(body).hexdigest()[:32]
        kind = TYPES[PurePath(name).suffix]
        return cls(body, etag, MappingProxyType({**_HEADERS, "Content-Type": kind, "ETag": f'"{etag}"'}))

    def answer(self, request: web.Request) -> web.Response:
        """200, or 304 to whoever has it already."""
        known = request.if_none_match or ()
        if any(tag.value in (self.etag, "*") for tag in known):
            return web.Response(status=304, headers={k: v for k, v in self.headers.items() if k != "Content-Type"})
        return web.Response(body=self.body, headers=self.headers)


def assets() -> Mapping[str, Asset]:
    """Every file of the page by name, read now."""
    folder = resources.files("sidecar.api").joinpath("page")
    return {
        file.name: Asset.of(file.name, file.read_bytes())
        for file in folder.iterdir()
        if PurePath(file.name).suffix in TYPES
    }


def routes() -> Sequence[web.RouteDef]:
    """``/`` and ``/page/{name}``. Raises KeyError where the page is not installed."""
    held = assets()
    index = held[INDEX]

    async def get_page(request: web.Request) -> web.Response:
        return index.answer(request)

    async def get_asset(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        asset = held.get(name) if name != INDEX else None  # the page has one address, or its relative ones break
        if asset is None:
            raise NotFound("page: no such file; the page itself is GET /")
        return asset.answer(request)

    return web.get("/", get_page), web.get("/page/{name}", get_asset)

"""A request's body as one JSON document of a known shape."""

from typing import TypeVar

import msgspec
from aiohttp import web

from sidecar.api.body import Budget, encoding_of, read_body
from sidecar.api.errors import JSON
from sidecar.errors import BadRequest, MalformedBody, UnsupportedMedia

_B = TypeVar("_B", bound=msgspec.Struct)


async def read_document(request: web.Request, kind: type[_B], *, limit: int, patience: float, budget: Budget) -> _B:
    """The body as ``kind``. Raises UnsupportedMedia, BadRequest, MalformedBody, and what ``read_body`` raises."""
    if request.content_type != JSON:
        raise UnsupportedMedia(f"Content-Type: allowed is {JSON}")
    raw = await read_body(request, encoding_of(request), limit=limit, patience=patience, budget=budget)
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise BadRequest(f"body: {error}") from None
    except msgspec.DecodeError as error:
        raise MalformedBody(f"body: not JSON ({error}); send one object") from None

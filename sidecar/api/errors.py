"""Which error becomes which status, and how an error is worded: one table, one shape.

Every error's body is ``{"error": {"code", "message", ...}}``. ``code`` is for programs and stays as it is; ``message``
is for people: the field, what was seen, what is allowed, what to do. Neither carries a value of a record.
"""

import logging
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Final

import msgspec
from aiohttp import web

from sidecar.api.body import BodyTimeout
from sidecar.errors import (
    BadRequest,
    Busy,
    ContentConflict,
    Forbidden,
    InvalidRecord,
    MalformedBody,
    NotFound,
    RetryClass,
    SidecarError,
    SpoolError,
    StoreError,
    TooLarge,
    Unauthorized,
    UnsupportedMedia,
)

_logger: Final = logging.getLogger("sidecar.api")

JSON: Final = "application/json"
SERVER: Final = "sidecar"  # no version: nobody outside needs it

TABLE: Final[Mapping[type[SidecarError], tuple[int, str]]] = MappingProxyType(
    {
        BodyTimeout: (408, "body_timeout"),
        MalformedBody: (400, "malformed_body"),
        BadRequest: (400, "bad_request"),
        Unauthorized: (401, "unauthorized"),
        Forbidden: (403, "forbidden"),
        NotFound: (404, "not_found"),
        ContentConflict: (409, "content_conflict"),
        TooLarge: (413, "too_large"),
        UnsupportedMedia: (415, "unsupported_media"),
        InvalidRecord: (422, "invalid_record"),
        Busy: (503, "busy"),
        SpoolError: (503, "spool_failed"),
        StoreError: (503, "store_unavailable"),
        SidecarError: (500, "internal"),
    }
)
"""The nearest class of an error's ancestry decides."""

_TIMEOUT_CODES: Final = frozenset({"timeout", "TimeoutError", "57014"})


def answer(status: int, payload: object, headers: Mapping[str, str] | None = None) -> web.Response:
    """A JSON answer."""
    response = web.Response(body=msgspec.json.encode(payload), status=status, content_type=JSON)
    if headers:
        response.headers.update(headers)
    return response


def error_answer(
    status: int, code: str, message: str, headers: Mapping[str, str] | None = None, **more: object
) -> web.Response:
    """An error in the one shape that errors have; ``more`` are further members beside code and message."""
    return answer(status, {"error": {"code": code, "message": message, **more}}, headers)


def from_error(error: SidecarError) -> web.Response:
    """The answer that an error becomes."""
    status, code = next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)
    message = str(error)
    if isinstance(error, BodyTimeout):
        late = error_answer(status, code, message)
        late.force_close()
        return late
    if isinstance(error, InvalidRecord):
        return error_answer(status, code, message, field=error.field, reason=error.reason)
    if isinstance(error, Busy):
        return error_answer(status, error.reason, message, {"Retry-After": str(max(1, error.retry_after))})
    if isinstance(error, Unauthorized):
        return error_answer(status, code, message, {"WWW-Authenticate": "Bearer"})
    if isinstance(error, StoreError):
        timeout = error.code in _TIMEOUT_CODES
        headers = {"Retry-After": "1"} if error.retry_class in (RetryClass.TRANSIENT, RetryClass.THROTTLE) else None
        return error_answer(
            504 if timeout else status,
            "store_timeout" if timeout else code,
            error.reason,
            headers,
            store=error.store,
            retry_class=error.retry_class.value,
        )
    return error_answer(status, code, message)


def from_http(error: web.HTTPException) -> web.Response:
    """The router's own refusals (404, 405, ...) in the one shape; headers such as Allow are kept."""
    code = HTTPStatus(error.status).name.lower()
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    message = {
        404: "no such route; the routes are listed in GET /openapi.json",
        405: f"this route allows {headers.get('Allow', 'other methods')}",
        417: "Expect: the only one met is 100-continue",
    }.get(error.status, error.reason)
    return error_answer(error.status, code, message, headers)


def from_surprise(error: BaseException) -> web.Response:
    """A defect of ours: logged by type and place, because its text might quote a record; answered without detail."""
    where = "".join(traceback.format_tb(error.__traceback__))
    _logger.error("unexpected %s while answering a request\n%s", type(error).__name__, where)
    return error_answer(500, "internal", "a defect of the sidecar; its log says where. Nothing is known of the records")

"""POST /v1/logs: OTLP/HTTP, protobuf and JSON (opentelemetry-proto 1.x), answered in the request's encoding.

=========================  ==========================================================================================
200                        durable; ``partialSuccess`` counts refused records (kept as ``refused`` dead letters), or,
                           with none rejected, warns of what was read in an unusual way
503 with Retry-After       nothing stored, send again: the specification's own retryable answer
400, 408, 413, 415         nothing stored; a ``google.rpc.Status`` says why; exporters drop the batch and log that
=========================  ==========================================================================================

The answers' messages have five fields in all, so they are written here: they need no library, and an exporter that
sends protobuf to a sidecar without the extra ``otlp`` can read why it is refused.
"""

import asyncio
from typing import Final

import msgspec
from aiohttp import web

from sidecar.api import errors
from sidecar.api.body import encoding_of, read_body
from sidecar.api.mapped import COMPILED, accept
from sidecar.api.parts import PARTS
from sidecar.errors import SidecarError, TooLarge, UnsupportedMedia
from sidecar.mapping import OTLP, Mapped, otlp_json, otlp_protobuf
from sidecar.screening import Refused
from sidecar.screening.schema import Refusal

JSON: Final = "application/json"
PROTOBUF: Final = "application/x-protobuf"
_BETWEEN_PAUSES: Final = 128  # records
_MESSAGE: Final = 1_000  # characters of what partialSuccess says
_CODES: Final = {400: 3, 408: 4, 413: 8, 415: 3, 503: 14}
"""google.rpc.Code by HTTP status: INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE."""
_INTERNAL: Final = 13
_encode: Final = msgspec.json.Encoder().encode


async def post_logs(request: web.Request) -> web.Response:
    """Accept an ExportLogsServiceRequest; 200 only after fsync."""
    media = (request.headers.get("Content-Type") or JSON).partition(";")[0].strip().lower()
    try:
        if media not in (JSON, PROTOBUF):
            raise UnsupportedMedia(f"Content-Type: allowed are {PROTOBUF} and {JSON}; name one of them")
        return await _accept(request, media)
    except SidecarError as error:
        return _refusal(errors.from_error(error), media, str(error))


async def _accept(request: web.Request, media: str) -> web.Response:
    parts = request.app[PARTS]
    parts.intake.check_open()
    if media == PROTOBUF:
        otlp_protobuf.check_installed()  # before a body is read that nobody could
    settings = parts.settings()
    body = await read_body(
        request,
        encoding_of(request),
        limit=settings.ingest.max_body_bytes,
        patience=settings.listen.body_timeout,
        budget=parts.budget,
    )
    mapping = request.app[COMPILED].get(OTLP, settings.mappings)
    warnings: list[str] = []
    read = otlp_protobuf.events if media == PROTOBUF else otlp_json.events
    mapped = Mapped()
    met: dict[bytes, int] = {}
    for index, event in enumerate(read(body, warnings.append)):
        if index >= settings.ingest.max_records:
            raise TooLarge(f"more than {settings.ingest.max_records} records in one request; send fewer at a time")
        if index % _BETWEEN_PAUSES == _BETWEEN_PAUSES - 1:
            await asyncio.sleep(0)
        mapped.total = index + 1
        if isinstance(event, tuple):
            mapped.refused.append(_refused(index, *event))
            continue
        source = _encode(event)
        try:
            mapping.add(mapped, index, event, source, met=met)
        except Refusal as why:
            mapped.refused.append(_refused(index, why, source))
    outcome = await accept(request, parts, mapped)
    said = [f"record {one.index}: {one.field}: {one.reason}" for one in outcome.refused]
    return _success(media, len(outcome.refused), "; ".join((*said, *warnings))[:_MESSAGE])


def _refused(index: int, why: Refusal, source: bytes) -> Refused:
    return Refused(index, why.field, why.rule, why.reason, source)


def _success(media: str, rejected: int, message: str) -> web.Response:
    """ExportLogsServiceResponse {partial_success = 1 {rejected_log_records = 1, error_message = 2}}."""
    if media == JSON:
        partial = {"rejectedLogRecords": str(rejected), "errorMessage": message}  # int64 is text in protobuf's JSON
        return web.Response(body=_encode({"partialSuccess": partial} if message else {}), content_type=JSON)
    inner = _number(1, rejected) + _text(2, message)
    return web.Response(body=_bytes(1, inner) if inner else b"", content_type=PROTOBUF)


def _refusal(response: web.Response, media: str, message: str) -> web.Response:
    """``response`` with a google.rpc.Status {code = 1, message = 2} in the request's encoding."""
    code = _CODES.get(response.status, _INTERNAL)
    if media == PROTOBUF:
        response.body = _number(1, code) + _text(2, message)
        response.content_type = PROTOBUF
    else:
        response.body = _encode({"code": code, "message": message})
    return response


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:  # noqa: PLR2004  (seven bits a byte)
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value) if value else b""


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode()) if value else b""

"""OTLP/protobuf -> the same events as OTLP/JSON gives. Needs the extra ``otlp`` (opentelemetry-proto), else 415.

Read attribute by attribute from the parsed messages: the library's own conversion to JSON takes ten times as long.
Times are decimal texts, ids hexadecimal, as in OTLP/JSON. A record with fields that the installed opentelemetry-proto
does not know has its whole encoding in ``unknownFields`` (base64), so that nothing of it is lost.
"""

import base64
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Final

from sidecar.errors import MalformedBody, UnsupportedMedia
from sidecar.mapping.otlp_json import DEEPEST, own
from sidecar.mapping.source import Members

_MISSING: Final = (
    "Content-Type: application/x-protobuf needs the package opentelemetry-proto, which is not installed here: "
    "pip install 'hybrid-log-sidecar[otlp]', or let the exporter send application/json"
)


@cache
def _request() -> Any:
    """The message class, or None where the extra is not installed."""
    try:
        from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (  # noqa: PLC0415  (an extra)
            ExportLogsServiceRequest,
        )
    except ImportError:
        return None
    return ExportLogsServiceRequest


def check_installed() -> None:
    """Raises UnsupportedMedia where protobuf cannot be read here, with what to install."""
    if _request() is None:
        raise UnsupportedMedia(_MISSING)


def events(body: bytes, warn: Callable[[str], None]) -> Iterator[Members]:
    """The records of a request as events, in order.

    Raises:
        UnsupportedMedia: the extra is not installed.
        MalformedBody: not an ExportLogsServiceRequest.
    """
    check_installed()
    request = _request()()
    try:
        request.ParseFromString(body)
    except Exception as error:  # noqa: BLE001  (DecodeError, whose module is part of the extra; whatever the bytes do)
        raise MalformedBody(
            f"not an ExportLogsServiceRequest in protobuf ({type(error).__name__}); nothing was stored"
        ) from None
    unknown = _keep_unknown(request)
    if unknown:
        warn("fields that the installed opentelemetry-proto does not know are kept encoded (unknownFields)")
    number = 0
    for resource_logs in request.resource_logs:
        beside = _around(resource_logs, "resource", "resourceSchemaUrl")
        for scope_logs in resource_logs.scope_logs:
            around = beside | _around(scope_logs, "scope", "schemaUrl")
            for record in scope_logs.log_records:
                event = _event(record)
                event.update(own(around))
                if number in unknown:
                    event["unknownFields"] = unknown[number]
                number += 1
                yield event


def _keep_unknown(request: Any) -> dict[int, str]:
    """Number of a record -> its whole encoding, where it or what is above it has unknown fields."""
    size = request.ByteSize()
    bare = _request()()
    bare.CopyFrom(request)
    bare.DiscardUnknownFields()
    if bare.ByteSize() == size:
        return {}
    found: dict[int, str] = {}
    number = 0
    empty = _request()()
    empty.CopyFrom(request)
    del empty.resource_logs[:]
    for resource_logs in request.resource_logs:
        for scope_logs in resource_logs.scope_logs:
            for record in scope_logs.log_records:
                one = _request()()
                one.CopyFrom(empty)
                above = one.resource_logs.add()
                above.CopyFrom(resource_logs)
                del above.scope_logs[:]
                scope = above.scope_logs.add()
                scope.CopyFrom(scope_logs)
                del scope.log_records[:]
                scope.log_records.add().CopyFrom(record)
                whole = one.SerializeToString()
                one.DiscardUnknownFields()
                if one.ByteSize() != len(whole):
                    found[number] = base64.b64encode(whole).decode()
                number += 1
    return found


def _around(message: Any, described: str, url: str) -> Members:
    """What records share: their resource or scope, and the URL of its schema."""
    shared: Members = {}
    if message.HasField(described):
        shared[described] = _described(getattr(message, described))
    if message.schema_url:
        shared[url] = message.schema_url
    return shared


def _event(record: Any) -> Members:  # noqa: C901  (one case a field)
    event: Members = {}
    if record.time_unix_nano:
        event["timeUnixNano"] = str(record.time_unix_nano)
    if record.observed_time_unix_nano:
        event["observedTimeUnixNano"] = str(record.observed_time_unix_nano)
    if record.severity_number:
        event["severityNumber"] = record.severity_number
    if record.severity_text:
        event["severityText"] = record.severity_text
    if record.HasField("body"):
        event["body"] = plain(record.body, 0)
    if record.attributes:
        event["attributes"] = _attributes(record.attributes, 0)
    if record.dropped_attributes_count:
        event["droppedAttributesCount"] = record.dropped_attributes_count
    if record.flags:
        event["flags"] = record.flags
    if record.trace_id:
        event["traceId"] = record.trace_id.hex()
    if record.span_id:
        event["spanId"] = record.span_id.hex()
    if name := getattr(record, "event_name", ""):  # since opentelemetry-proto 1.5
        event["eventName"] = name
    return event


def _described(message: Any) -> Members:
    """A resource or a scope; whatever else it has than attributes by the library's own names."""
    found: Members = {}
    for field, value in message.ListFields():
        if field.name == "attributes":
            found["attributes"] = _attributes(value, 0)
        elif isinstance(value, (str, int)):
            found[field.json_name] = value
        else:
            found[field.json_name] = [base64.b64encode(each.SerializeToString()).decode() for each in value]
    return found


def _attributes(pairs: Any, depth: int) -> object:
    """One object; OTLP's own list where a name stands twice."""
    found = {pair.key or _unnamed(pair): plain(pair.value, depth + 1) for pair in pairs}
    if len(found) == len(pairs):
        return found
    return [{"key": pair.key or _unnamed(pair), "value": plain(pair.value, depth + 1)} for pair in pairs]


def _unnamed(pair: Any) -> str:
    """A name by its place in a table of texts, which only profiles have; shown as such."""
    place = getattr(pair, "key_strindex", 0)
    return f"key_strindex:{place}" if place else ""


def plain(value: Any, depth: int) -> object:  # noqa: PLR0911  (one case a kind)
    """An AnyValue as plain JSON; what nests deeper than ``DEEPEST`` stays encoded."""
    kind = value.WhichOneof("value")
    if kind == "string_value":
        return value.string_value
    if kind is None:
        return None
    if depth > DEEPEST:
        return {"anyValue": base64.b64encode(value.SerializeToString()).decode()}
    if kind == "array_value":
        return [plain(each, depth + 1) for each in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values, depth)
    if kind == "bytes_value":
        return {"bytesValue": base64.b64encode(value.bytes_value).decode()}
    if kind == "double_value" and not math.isfinite(value.double_value):
        number = value.double_value
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    if kind in ("int_value", "bool_value", "double_value"):
        return getattr(value, kind)
    return {"anyValue": base64.b64encode(value.SerializeToString()).decode()}  # a kind that logs do not have

"""OTLP/JSON (opentelemetry-proto's JSON mapping) -> events in the shape that the mapping ``otlp`` reads.

THE EVENT: the log record's own members by their OTLP/JSON names, with ``attributes`` as one object, ``body`` and all
attribute values as plain JSON (bytes as ``{"bytesValue": base64}``), and beside them ``resource`` and ``scope`` in the
same form, ``resourceSchemaUrl``, ``schemaUrl``. Members that this version of OTLP does not know are kept as they came;
so are attributes that cannot be read as such, and attributes of which two have one name (as OTLP's own list).

A record that is no JSON object is one refused record; anything wrong above the records is a malformed body, because
nobody can tell what belongs to whom.
"""

import re
from collections.abc import Callable, Iterator
from typing import Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from sidecar.errors import MalformedBody
from sidecar.mapping.source import Members, members
from sidecar.screening import scan
from sidecar.screening.schema import Refusal

DEEPEST: Final = 64  # nesting of an attribute's value
SURROGATES: Final = "lone surrogates, which no store can hold, were replaced by U+FFFD"
_ESCAPES: Final = re.compile(
    rb"\\(?:u(?:[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|([dD][89a-fA-F][0-9a-fA-F]{2}))|.)", re.DOTALL
)
_ZERO_IS_NONE: Final = ("timeUnixNano", "observedTimeUnixNano", "severityNumber", "traceId", "spanId")
_NONE: Final = frozenset({b"0", b"", b"null"})
_INTEGER: Final = re.compile(r"-?[0-9]{1,19}", re.ASCII)


class _AnyValue(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    stringValue: str | UnsetType = UNSET  # noqa: N815  (OTLP's names)
    boolValue: bool | UnsetType = UNSET  # noqa: N815
    intValue: int | str | UnsetType = UNSET  # noqa: N815
    doubleValue: float | str | UnsetType = UNSET  # noqa: N815
    arrayValue: "_Values | UnsetType" = UNSET  # noqa: N815
    kvlistValue: "_Pairs | UnsetType" = UNSET  # noqa: N815
    bytesValue: str | UnsetType = UNSET  # noqa: N815


class _Values(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    values: list[_AnyValue] = []


class _KeyValue(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    key: str
    value: _AnyValue | None = None


class _Pairs(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    values: list[_KeyValue] = []


_decode_pairs: Final = msgspec.json.Decoder(list[_KeyValue]).decode
_decode_value: Final = msgspec.json.Decoder(_AnyValue).decode
_decode_list: Final = msgspec.json.Decoder(list[Raw]).decode
_UNREADABLE: Final = (msgspec.DecodeError, RecursionError)


def events(body: bytes, warn: Callable[[str], None]) -> Iterator[Members | tuple[Refusal, bytes]]:
    """The records of a request as events, in order; a refused one as its refusal and source.

    Raises:
        MalformedBody: not an ExportLogsServiceRequest.
    """
    text = body.strip(b" \t\n\r")
    try:
        scan.check_syntax(text)
        msgspec.json.decode(text, type=Raw)
    except msgspec.DecodeError:  # nothing but lone surrogates: check_syntax passes over them
        text = _ESCAPES.sub(lambda found: b"\\ufffd" if found[1] else found[0], text)
        warn(SURROGATES)
    except RecursionError:
        raise MalformedBody("arrays and objects nest too deep to be read; flatten them") from None
    top = _object(text, "the body")
    listed = top.pop("resourceLogs", None)
    if listed is None and top:
        raise MalformedBody("the body has no resourceLogs; send an ExportLogsServiceRequest in OTLP/JSON")
    whole: Members = {"request": top} if top else {}  # members that OTLP/JSON does not know
    for resource_logs in _objects(listed, "resourceLogs"):
        scopes = resource_logs.pop("scopeLogs", None)
        beside = whole | _around(resource_logs, "resource", "resourceSchemaUrl", "resourceLogs")
        for scope_logs in _objects(scopes, "scopeLogs"):
            records = scope_logs.pop("logRecords", None)
            around = beside | _around(scope_logs, "scope", "schemaUrl", "scopeLogs")
            for raw in _list(records, "logRecords"):
                yield _event(bytes(raw), around)


def _around(given: Members, described: str, url: str, rest: str) -> Members:
    """What records share: their resource or scope, the URL of its schema, and under ``rest`` what is not known."""
    shared: Members = {}
    if (found := given.pop(described, None)) is not None:
        shared[described] = _described(found, described)
    if "schemaUrl" in given:
        shared[url] = given.pop("schemaUrl")
    if given:
        shared[rest] = given
    return shared


def own(around: Members) -> Members:
    """A copy of what records share, deep enough that members can be taken out of one record's."""
    return {
        name: {inner: dict(part) if type(part) is dict else part for inner, part in value.items()}
        if type(value) is dict
        else value
        for name, value in around.items()
    }


def _event(text: bytes, around: Members) -> Members | tuple[Refusal, bytes]:
    try:
        event = members(text)
    except Refusal as why:
        return why, text
    if "attributes" in event:
        event["attributes"] = _attributes(event["attributes"])
    if "body" in event:
        event["body"] = _value(event["body"])
    for name in _ZERO_IS_NONE:
        if name in event and _source(event[name]).strip(b'"') in _NONE:
            del event[name]  # protobuf's way to say that nothing is known
    for name, value in own(around).items():
        event.setdefault(name, value)
    return event


def _described(raw: object, name: str) -> Members:
    """A resource or a scope with its attributes as one object."""
    found = _object(_source(raw), name)
    if "attributes" in found:
        found["attributes"] = _attributes(found["attributes"])
    return found


def _attributes(raw: object) -> object:
    try:
        pairs = _decode_pairs(_source(raw))
        found = {pair.key: plain(pair.value, 1) for pair in pairs}
    except _UNREADABLE:
        return raw
    return found if len(found) == len(pairs) else raw


def _value(raw: object) -> object:
    try:
        return plain(_decode_value(_source(raw)), 0)
    except _UNREADABLE:
        return raw


def plain(value: _AnyValue | None, depth: int) -> object:  # noqa: C901, PLR0911  (one case a kind)
    """An AnyValue as plain JSON. Raises RecursionError where it nests deeper than ``DEEPEST``."""
    if value is None:
        return None
    if depth > DEEPEST:
        raise RecursionError
    if value.stringValue is not UNSET:
        return value.stringValue
    if value.intValue is not UNSET:
        number = value.intValue
        return int(number) if isinstance(number, str) and _INTEGER.fullmatch(number) else number
    if value.boolValue is not UNSET:
        return value.boolValue
    if value.doubleValue is not UNSET:
        return value.doubleValue
    if value.arrayValue is not UNSET:
        return [plain(each, depth + 1) for each in value.arrayValue.values]
    if value.kvlistValue is not UNSET:
        pairs = value.kvlistValue.values
        found = {pair.key: plain(pair.value, depth + 1) for pair in pairs}
        if len(found) == len(pairs):
            return found
        return [{"key": pair.key, "value": plain(pair.value, depth + 1)} for pair in pairs]
    if value.bytesValue is not UNSET:
        return {"bytesValue": value.bytesValue}
    return None


def _source(value: object) -> bytes:
    """The source text of a member that nobody has opened."""
    return bytes(value) if isinstance(value, Raw) else b""


def _object(text: bytes, name: str) -> Members:
    try:
        return members(text)
    except (Refusal, RecursionError):
        raise MalformedBody(f"{name}: an object is wanted, each member once") from None


def _objects(raw: object, name: str) -> Iterator[Members]:
    for each in _list(raw, name):
        yield _object(bytes(each), name)


def _list(raw: object, name: str) -> list[Raw]:
    if raw is None or _source(raw) == b"null":
        return []
    try:
        return _decode_list(_source(raw))
    except _UNREADABLE:
        raise MalformedBody(f"{name}: an array is wanted") from None

"""The slow lane: one record's source text, member by member; the only place that words a refusal.

The text was accepted as JSON before. Work is bounded: a payload longer than a record may be ends the walk.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from sidecar.record import LogRecord
from sidecar.screening.identity import canonical, version7_time
from sidecar.screening.scan import OPEN, QUOTE, TooDeep, TooLong, members, skip_space
from sidecar.screening.schema import (
    DEFAULT_IS_SUCCESS,
    DEFAULT_LOG_TYPE,
    INT32,
    INT64,
    LOGS,
    RULES,
    SPELLINGS,
    FieldRule,
    Kind,
    Refusal,
    Rule,
)
from sidecar.screening.timestamps import Timestamps

_T = TypeVar("_T")

Given = dict[str, str | int | bool | None]
"""The fields that the client sent, read but without defaults."""

_decode_text: Final = msgspec.json.Decoder(str).decode
_integer: Final = re.compile(rb"-?(?:0|[1-9][0-9]*)")
_INT_DIGITS: Final = 20  # of the longest int64 with its sign
_NAME_SHOWN: Final = 64  # characters of an unknown member's name in a refusal
_INT_BOUND: Final[Mapping[Kind, int]] = {Kind.INT32: INT32, Kind.INT64: INT64}
_SEEN: Final[Mapping[int, str]] = {
    QUOTE: "text",
    ord("{"): "an object",
    ord("["): "an array",
    ord("t"): "a boolean",
    ord("f"): "a boolean",
    ord("n"): "null",
}


class Bounds(NamedTuple):
    """What a record is held against; one snapshot per request."""

    max_record_bytes: int
    max_depth: int  # levels of arrays and objects, the record itself counted
    now_us: int
    latest_us: int  # the latest log_timestamp accepted
    text_limits: Mapping[str, int]  # characters, by field: ours or the mapped column's, the smaller
    number_limits: Mapping[str, tuple[int, int]] = MappingProxyType({})  # by field, where a mapped column is narrower
    reserved: str = ""  # what the computed ids of an adopted table's rows begin with; empty: none are


def numbers_fit(records: Iterable[LogRecord], limits: Mapping[str, tuple[int, int]]) -> bool:
    """Whether every number fits its column; nothing is looked at where no column is narrower than the field."""
    for name, (least, greatest) in limits.items():
        numbers = [number for record in records if (number := getattr(record, name)) is not None]
        if numbers and not (least <= min(numbers) and max(numbers) <= greatest):
            return False
    return True


def read(text: bytes, bounds: Bounds, stamps: Timestamps) -> Given:
    """The members of one record's source text.

    Raises:
        Refusal: a rule is broken.
    """
    at = skip_space(text, 0)
    if text[at : at + 1] != b"{":
        seen = _seen(text[at:])
        raise Refusal("record", Rule.NOT_AN_OBJECT, f"seen {seen}, a record is an object with the fields of a log")
    given: Given = {}
    met: dict[str, str] = {}
    try:
        for quoted, start, end in members(text, bounds.max_depth - 1, bounds.max_record_bytes):
            name = _name(quoted)
            field = SPELLINGS.get(name)
            if field is None:
                raise _unknown(name)
            if field in met:
                how = "twice" if met[field] == name else "in two spellings"
                raise Refusal(field, Rule.FIELD_TWICE, f"given {how}, so its value is ambiguous; give it once")
            met[field] = name
            value = _value(field, RULES[field], text[start:end], bounds, stamps)
            if not isinstance(value, UnsetType):
                given[field] = value
    except TooDeep:
        raise too_deep(bounds.max_depth) from None
    except TooLong:
        raise too_large(bounds.max_record_bytes) from None
    for field, rule in RULES.items():
        if rule.required and field not in given:
            raise Refusal(field, Rule.MISSING, "missing; every record names it")
    return given


def complete(given: Given, fresh_id: Callable[[], str], bounds: Bounds, *, keyed: bool) -> LogRecord:
    """The record as it is stored: defaults filled in, identity and time settled.

    ``keyed``: the request carries an Idempotency-Key, so its records carry no ids of their own.

    Raises:
        Refusal: identity or time break a rule.
    """
    log_id = given.get("log_id")
    moment = given.get("log_timestamp")
    if isinstance(log_id, str):
        if bounds.reserved and log_id.startswith(bounds.reserved):
            raise Refusal(
                "log_id", Rule.LOG_ID, "the id of a row that the adopted table numbers; leave it out to get another"
            )
        if keyed:
            raise Refusal(
                "log_id", Rule.LOG_ID, "not allowed beside an Idempotency-Key, which makes the ids; send one of them"
            )
        if moment is None:
            moment = version7_time(log_id)
            if moment is None:
                raise Refusal(
                    "log_timestamp",
                    Rule.MISSING,
                    "missing; a record with its own log_id states its time, or its log_id is a UUIDv7",
                )
    if moment is None:
        moment = bounds.now_us
    elif int(moment) > bounds.latest_us:
        ahead = (bounds.latest_us - bounds.now_us) / 3_600_000_000
        raise Refusal("log_timestamp", Rule.TIMESTAMP, f"more than {ahead:g} h ahead of this machine's clock")
    filled = {"log_type": DEFAULT_LOG_TYPE, "is_success": DEFAULT_IS_SUCCESS, **given}
    filled["log_id"] = log_id if log_id is not None else fresh_id()
    filled["log_timestamp"] = moment
    return LogRecord(*(filled.get(field) for field in RULES))  # type: ignore[arg-type]  # read by RULES' kinds


def too_deep(max_depth: int) -> Refusal:
    """The refusal of a record that nests too deep."""
    return Refusal("record", Rule.DEPTH, f"arrays and objects nest deeper than {max_depth} levels; flatten the payload")


def too_large(max_bytes: int) -> Refusal:
    """The refusal of a record whose stored form is too large."""
    return Refusal("record", Rule.TOO_LARGE, f"larger than {max_bytes} bytes as stored; shorten its payloads")


def _name(quoted: bytes) -> str:
    try:
        return _decode_text(quoted)
    except msgspec.DecodeError:
        raise Refusal("record", Rule.CHARACTER, "a member's name holds a lone surrogate") from None


def _unknown(name: str) -> Refusal:
    shown = name[:_NAME_SHOWN]
    if name in LOGS:
        return Refusal(shown, Rule.UNKNOWN_FIELD, "an envelope has no member but logs, and a record has no such field")
    return Refusal(shown, Rule.UNKNOWN_FIELD, "unknown field; the thirteen fields are listed in GET /openapi.json")


def _seen(source: bytes) -> str:
    return _SEEN.get(source[0], "a number") if source else "nothing"


def _value(
    field: str, rule: FieldRule, source: bytes, bounds: Bounds, stamps: Timestamps
) -> str | int | bool | UnsetType | None:
    if source == b"null":
        return _null(field, rule)
    if rule.kind is Kind.BOOL:
        return _bool(field, source)
    if rule.kind in _INT_BOUND:
        bound = _INT_BOUND[rule.kind]
        return _int(field, source, *bounds.number_limits.get(field, (-bound, bound - 1)))
    text = source.decode() if rule.kind is Kind.PAYLOAD and source[0] != QUOTE else _text(field, source)
    if rule.kind is Kind.UUID:
        return _parsed(canonical, text, field, Rule.LOG_ID)
    if rule.kind is Kind.INSTANT:
        return _parsed(stamps.parse, text, field, Rule.TIMESTAMP)
    limit = bounds.text_limits.get(field)
    if limit is not None and not rule.min_length <= len(text) <= limit:
        allowed = f"{rule.min_length} to {limit} characters"
        raise Refusal(field, Rule.LENGTH, f"seen {len(text)} characters, allowed: {allowed}")
    return text


def _null(field: str, rule: FieldRule) -> UnsetType | None:
    if rule.made_here:
        return UNSET
    if rule.nullable:
        return None
    hint = "it is required" if rule.required else "leave it out for the default"
    raise Refusal(field, Rule.TYPE, f"null is not allowed; {hint}")


def _bool(field: str, source: bytes) -> bool:
    if source not in (b"true", b"false"):
        raise Refusal(field, Rule.TYPE, f"seen {_seen(source)}, allowed: true or false")
    return source == b"true"


def _int(field: str, source: bytes, least: int, greatest: int) -> int:
    if not _integer.fullmatch(source):
        number = source[0] not in OPEN and _seen(source) == "a number"
        seen = "a number with a fraction or an exponent" if number else _seen(source)
        raise Refusal(field, Rule.TYPE, f"seen {seen}, allowed: a whole number written as digits, or null")
    if len(source) > _INT_DIGITS or not least <= int(source) <= greatest:
        raise Refusal(field, Rule.RANGE, f"out of range, allowed: {least} to {greatest}")
    return int(source)


def _text(field: str, source: bytes) -> str:
    if source[0] != QUOTE:
        raise Refusal(field, Rule.TYPE, f"seen {_seen(source)}, allowed: text")
    try:
        text = _decode_text(source)
    except msgspec.DecodeError:
        raise Refusal(
            field, Rule.CHARACTER, "holds a lone surrogate escape (\\ud800 to \\udfff), which no store can hold"
        ) from None
    if "\0" in text:
        raise Refusal(field, Rule.CHARACTER, "holds a NUL character (\\u0000), which PostgreSQL cannot hold")
    return text


def _parsed(parse: Callable[[str], _T], text: str, field: str, rule: Rule) -> _T:
    try:
        return parse(text)
    except ValueError as error:
        raise Refusal(field, rule, str(error)) from None

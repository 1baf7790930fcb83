"""Which value of an event fits which field: a table of readers by the field's kind.

A reader takes a leaf (a source text or a built-in value) and returns the value as ``POST /logs`` takes it and whether
the field then holds exactly what the leaf held; None where it does not fit. Readers never raise.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Final

import msgspec
from msgspec import Raw

from sidecar.screening.identity import canonical
from sidecar.screening.schema import INT32, INT64, RULES, Kind

Read = tuple[object, bool]
Reader = Callable[[object], Read | None]

_decode: Final = msgspec.json.Decoder().decode
_encode: Final = msgspec.json.Encoder().encode
_STRUCTURES: Final = frozenset(b"{[")
_DIGITS: Final = 20  # of the longest int64 with its sign
_TRUTHS: Final = {"true": True, "false": False}


def scalar(leaf: object) -> object:
    """A leaf as a built-in value; None for null, objects, arrays, and what cannot be decoded."""
    if type(leaf) is not Raw:
        return None if isinstance(leaf, (dict, list)) else leaf
    source = bytes(leaf)
    if source[0] in _STRUCTURES:
        return None
    try:
        return _decode(source)
    except (msgspec.DecodeError, ValueError):  # a lone surrogate, a number beyond a double
        return None


def _text(leaf: object, shortest: int, longest: int | None) -> Read | None:
    value = scalar(leaf)
    exact = isinstance(value, str)
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, (int, float)):
        value = bytes(leaf).decode() if isinstance(leaf, Raw) else repr(value)
    if not isinstance(value, str) or not value or "\0" in value:
        return None
    if len(value) < shortest or (longest is not None and len(value) > longest):
        return None
    return value, exact


def _int(leaf: object, bound: int, *, cut: bool = False) -> Read | None:
    value = scalar(leaf)
    exact = type(value) is int
    if isinstance(value, str):
        digits = value.removeprefix("-")
        if len(value) > _DIGITS or not (digits.isascii() and digits.isdigit()):
            return None
        value = int(value)
    elif isinstance(value, float) and (cut or value.is_integer()) and abs(value) < INT64:
        value = int(value)
    if type(value) is not int or not -bound <= value < bound:
        return None
    return value, exact


def _bool(leaf: object) -> Read | None:
    value = scalar(leaf)
    if isinstance(value, bool):
        return value, True
    if isinstance(value, str) and value.lower() in _TRUTHS:
        return _TRUTHS[value.lower()], False
    return None


def _uuid(leaf: object) -> Read | None:
    value = scalar(leaf)
    if not isinstance(value, str):
        return None
    try:
        log_id = canonical(value)
    except ValueError:
        return None
    return log_id, log_id == value


def _payload(leaf: object) -> Read | None:
    if isinstance(leaf, (dict, list)):
        return Raw(_encode(leaf)), True  # as it is now: another field may still take a member out of it
    value = scalar(leaf)
    if isinstance(value, str) and "\0" in value:
        return None
    if value is None and (leaf is None or (isinstance(leaf, Raw) and bytes(leaf)[:1] not in (b"{", b"["))):
        return None
    return leaf, True


def _reader(field: str) -> Reader:
    rule = RULES[field]
    match rule.kind:
        case Kind.TEXT:
            return partial(_text, shortest=rule.min_length, longest=rule.max_length)
        case Kind.INT32:
            return partial(_int, bound=INT32)
        case Kind.INT64:
            # A duration comes with a fraction from most loggers; whole milliseconds are what the field holds.
            return partial(_int, bound=INT64, cut=field == "processing_time_ms")
        case Kind.BOOL:
            return _bool
        case Kind.UUID:
            return _uuid
        case _:
            return _payload


MAPPED: Final = tuple(field for field in RULES if field not in ("request_data", "log_timestamp"))
"""The fields that a reader fills; ``request_data`` takes what is left, ``log_timestamp`` has ``times``."""
READERS: Final[Mapping[str, Reader]] = MappingProxyType({field: _reader(field) for field in MAPPED})

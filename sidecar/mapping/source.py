"""A JSON object's members as their source texts, and JSON Pointers (RFC 6901) through objects.

``msgspec.Raw`` is a value's source text: encoded again it is the same bytes. Built-in values stand where a protobuf
decoder made the event.
"""

import re
from typing import Final

import msgspec
from msgspec import Raw

from sidecar.errors import MalformedBody
from sidecar.screening import Rule, scan
from sidecar.screening.schema import Refusal

Members = dict[str, object]
"""Name -> Raw, or a built-in value."""

_MOST_TOKENS: Final = 16
_LONGEST_POINTER: Final = 256
_DEEPEST: Final = 1_000  # nesting below an event that is looked through; the door then has its own, smaller bound
LONGEST: Final = 2 * 1024 * 1024
"""Bytes of an array or object that is looked through where the decoder cannot; far more than a record may have."""
_decode: Final = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_text: Final = msgspec.json.Decoder(str).decode
_encode: Final = msgspec.json.Encoder().encode
_quote: Final = b'"'


def pointer(text: str) -> tuple[str, ...]:
    """The tokens of a JSON Pointer.

    Raises:
        ValueError: not one, or the whole document; the message says what is allowed.
    """
    if not text.startswith("/") or len(text) > _LONGEST_POINTER or re.search(r"~(?![01])", text):
        raise ValueError(
            f"a JSON Pointer (RFC 6901) such as /Level or /Properties/UserId, at most {_LONGEST_POINTER} characters"
        )
    tokens = tuple(token.replace("~1", "/").replace("~0", "~") for token in text[1:].split("/"))
    if len(tokens) > _MOST_TOKENS:
        raise ValueError(f"a JSON Pointer of at most {_MOST_TOKENS} members")
    return tokens


def members(text: bytes, longest: int = LONGEST) -> Members:
    """The members of the JSON object ``text``, in order; values as source texts of at most ``longest`` bytes.

    Raises:
        Refusal: not an object, or a member stands twice.
        MalformedBody: not JSON.
        RecursionError: it nests too deep for the parser.
    """
    found, twice = first_members(text, longest)
    if twice:
        raise Refusal("record", Rule.FIELD_TWICE, "a member stands twice, so its value is ambiguous")
    return found


def first_members(text: bytes, longest: int = LONGEST) -> tuple[Members, bool]:
    """As ``members``; of equal names the first, and whether there were any.

    Loggers write their own members first: where an application logs a ``date`` or a ``time`` too, that one comes later.
    """
    if text[:1] != b"{":
        raise Refusal("record", Rule.NOT_AN_OBJECT, "an event is a JSON object; seen another value")
    try:
        found = _decode(text)
    except msgspec.DecodeError:
        return _exactly(text, longest)
    # Of equal names the decoder keeps the last one. Compact text without such is as long as what was kept; else the
    # quotes outside of the values are counted: two for each name, unless a name holds an escaped one.
    if len(_encode(found)) != len(text):
        inside = sum(bytes(raw).count(_quote) for raw in found.values())
        if text.count(_quote) - inside != 2 * len(found):
            return _exactly(text, longest)
    return dict(found), False


def _exactly(text: bytes, longest: int) -> tuple[Members, bool]:
    """As ``first_members``, by the scanner: lone surrogates stay in source texts, repeated names are seen."""
    scan.check_syntax(text)
    found: Members = {}
    twice = False
    try:
        for quoted, start, end in scan.members(text, _DEEPEST, longest):
            try:
                name = _decode_text(quoted)
            except msgspec.DecodeError:
                raise Refusal("record", Rule.CHARACTER, "a member's name holds a lone surrogate") from None
            if name in found:
                twice = True
            else:
                found[name] = Raw(text[start:end])
    except scan.TooDeep:
        raise Refusal("record", Rule.DEPTH, f"arrays and objects nest deeper than {_DEEPEST} levels") from None
    except scan.TooLong:
        raise Refusal("record", Rule.TOO_LARGE, f"a value is longer than {longest} bytes") from None
    return found, twice


def child(node: Members, name: str) -> Members | None:
    """The object under ``name``, opened in place so that members can be taken out of it; None if it is none."""
    value = node.get(name)
    if type(value) is dict:
        return value
    if type(value) is not Raw:
        return None
    text = bytes(value)
    if text[:1] != b"{":
        return None
    try:
        opened = members(text)
    except (Refusal, MalformedBody, RecursionError):
        return None  # it stays as it is
    node[name] = opened
    return opened

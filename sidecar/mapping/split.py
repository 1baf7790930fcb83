"""The shapes of a body of events: an array, one object, an object around an array, lines.

A body counts as a whole only where its shape cannot be told. Inside an array or among lines a broken event is one
broken event, wherever its end can be found: loggers resend a whole batch for ever, or drop it, for one bad event.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from sidecar.errors import MalformedBody, TooLarge
from sidecar.mapping.source import members
from sidecar.screening import scan, shapes
from sidecar.screening.schema import Refusal

_SPACE: Final = b" \t\n\r"
_encode: Final = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Split:
    """The events' source texts; ``envelope`` is the source of what stood beside their array, an object, or empty."""

    pieces: list[bytes]
    envelope: bytes = b""


def split(body: bytes, *, lines: bool, around: Sequence[str], most: int) -> Split:
    """Split a body; ``around`` names the members of an object that may hold the array of events.

    Raises:
        MalformedBody: not JSON of these shapes.
        TooLarge: more than ``most`` events.
    """
    if lines:
        return Split(_bounded(shapes.lines(body), most))
    text = body.strip(_SPACE)
    if text[:1] == b"[":
        return Split(_elements(text, most))
    if text[:1] != b"{":
        scan.check_syntax(text)
        raise MalformedBody("JSON, but neither an object nor an array; send an event or an array of events")
    if around:
        found = _inside(text, around, most)
        if found is not None:
            return found
    scan.check_syntax(text)
    return Split([text])


def _inside(text: bytes, around: Sequence[str], most: int) -> Split | None:
    try:
        opened = members(text, longest=len(text))
    except (Refusal, MalformedBody, RecursionError):
        return None
    for name in around:
        value = opened.get(name)
        if isinstance(value, msgspec.Raw) and bytes(value)[:1] == b"[":
            del opened[name]
            return Split(_elements(bytes(value), most), _encode(opened) if opened else b"")
    return None


def _elements(text: bytes, most: int) -> list[bytes]:
    try:
        return _bounded(scan.elements(text), most)
    except MalformedBody:
        return _bounded(scan.walk(text), most)  # by the brackets alone: each piece is then judged by itself


def _bounded(pieces: Iterator[bytes], most: int) -> list[bytes]:
    found: list[bytes] = []
    for piece in pieces:
        if len(found) >= most:
            raise TooLarge(f"more than {most} events in one request; send fewer at a time")
        found.append(piece)
    return found

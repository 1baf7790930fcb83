"""The shapes that a body may have: one record, an array, an envelope ``{"logs": [...]}``, lines."""

import re
from collections.abc import Iterator
from typing import Final

from sidecar.errors import InvalidRecord, MalformedBody
from sidecar.screening import scan
from sidecar.screening.schema import LOGS

_line: Final = re.compile(rb"[ \t\r\n]*+([^\n]++)")  # matched, never searched: one look at each byte


def inside(body: bytes, start: int) -> bytes:
    """What stands in an envelope from ``start`` to its closing brace: one array, or nobody's JSON."""
    tail = body.rstrip(b" \t\n\r")
    return tail[start:-1].rstrip(b" \t\n\r") if tail.endswith(b"}") else b""


def lines(body: bytes) -> Iterator[bytes]:
    """The lines of NDJSON that are not blank (blank ones have no index, and cost no memory, however many they are)."""
    at = 0
    while (match := _line.match(body, at)) is not None:
        yield match[1].rstrip(b" \t\r")
        at = match.end()


def documents(body: bytes) -> tuple[bool, Iterator[bytes]]:
    """Whether a JSON body is a batch, and its records' source texts."""
    text = body.strip(b" \t\n\r")
    try:
        scan.check_syntax(text)
        known_good = True
    except RecursionError:  # some record nests too deep: found below, its neighbours are kept
        known_good = False
    if text[:1] == b"[":
        return True, scan.elements(text)
    if text[:1] != b"{":
        raise InvalidRecord("body", "JSON, but neither an object nor an array; send a record or an array of records")
    start = scan.first_value(text, LOGS)
    if start is not None:
        return True, _enveloped(text, start, known_good=known_good)
    if not known_good:
        scan.check_ends(text)
    return False, iter((text,))


def _enveloped(text: bytes, start: int, *, known_good: bool) -> Iterator[bytes]:
    try:
        yield from scan.elements(inside(text, start))
    except MalformedBody:
        if not known_good:
            raise
        raise InvalidRecord("logs", "allowed: one array of records, and no other member beside it") from None

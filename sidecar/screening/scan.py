"""Where things are in a JSON text: no recursion, nothing built, bounded work.

The syntax is msgspec's to judge; these functions run on text that it accepted (or that nests too deep for it), and
only find the ends of values. One rule of msgspec is put aside on purpose: it refuses lone surrogate escapes even in
values that nobody decodes, and a payload given as JSON may hold them, because only its source text is kept. So the
syntax check runs on a twin of the text in which every surrogate escape is an ordinary one of the same length: an escape
that starts with D starts with 0 there, the others of D000 to DFFF too. No escape by escape: millions may come.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Final

import msgspec

from sidecar.errors import MalformedBody

_STRING: Final = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_text: Final = re.compile(_STRING, re.DOTALL)
_space: Final = re.compile(rb"[ \t\n\r]*+")
_key: Final = re.compile(rb"[ \t\n\r]*+(" + _STRING + rb")[ \t\n\r]*+:[ \t\n\r]*+", re.DOTALL)
_scalar: Final = re.compile(rb"[^ \t\n\r,\]}]++")
_token: Final = re.compile(_STRING + rb"|[\[\]{}]", re.DOTALL)

_raw_decoder: Final = msgspec.json.Decoder(msgspec.Raw)
_raws_decoder: Final = msgspec.json.Decoder(list[msgspec.Raw])
_decode_text: Final = msgspec.json.Decoder(str).decode
CUT_SHORT: Final = "JSON is cut short; send the whole text"
DEEPEST: Final = 5_000  # nesting up to which the end of a hopeless record is still looked for
LONGEST: Final = 2 * 1024 * 1024  # bytes within which that end must come
_MOST_COMMAS: Final = 1_000_000  # above, elements are counted before they are built

QUOTE: Final = ord('"')
OPEN: Final = frozenset(b"[{")


class TooDeep(Exception):
    """A value nests deeper than allowed."""


class TooLong(Exception):
    """A value's source text is longer than allowed."""


def skip_space(text: bytes, at: int) -> int:
    """The first place from ``at`` on that is not JSON white space."""
    match = _space.match(text, at)
    return match.end() if match else at


def check_syntax(text: bytes) -> None:
    """Check that ``text`` is one JSON value in UTF-8.

    Raises:
        MalformedBody: it is not; the message gives the place, never the text.
        RecursionError: it nests too deep for the parser.
    """
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise MalformedBody(f"not UTF-8: byte {error.start} cannot be read; send UTF-8") from None
    try:
        _raw_decoder.decode(text)
    except msgspec.DecodeError as error:
        first = error
    else:
        return
    twin = _twin(text)
    if twin != text:
        try:
            _raw_decoder.decode(twin)
        except msgspec.DecodeError as error:
            first = error
        else:
            return
    raise MalformedBody(_why_malformed(text, first))


def _twin(text: bytes) -> bytes:
    return text.replace(rb"\ud", rb"\u0").replace(rb"\uD", rb"\u0")


def _why_malformed(text: bytes, error: Exception) -> str:
    if text.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return "the text starts with a byte order mark; send UTF-8 without one"
    if not text.strip(b" \t\n\r"):
        return 'the body is empty; send a record, an array of records or {"logs": [...]}'
    return str(error) if str(error).startswith("JSON is malformed") else CUT_SHORT


def value_end(text: bytes, at: int, deepest: int, longest: int) -> int:
    """The end of the value that starts at ``at``; ``longest`` bounds the source of an array or object, in bytes.

    Raises:
        TooDeep: arrays and objects nest more than ``deepest`` levels.
        TooLong: the value is an array or object longer than ``longest``.
        MalformedBody: the text ends first.
    """
    first = text[at] if at < len(text) else 0
    if first not in OPEN:
        match = (_text if first == QUOTE else _scalar).match(text, at)
        if match is None:
            raise MalformedBody(CUT_SHORT)
        return match.end()
    depth = 0
    for match in _token.finditer(text, at):
        byte = text[match.start()]
        if byte in OPEN:
            depth += 1
            if depth > deepest:
                raise TooDeep
        elif byte != QUOTE:
            depth -= 1
            if depth == 0:
                return match.end()
        if match.end() - at > longest:
            raise TooLong
    raise MalformedBody(CUT_SHORT)


def members(text: bytes, deepest: int, longest: int) -> Iterator[tuple[bytes, int, int]]:
    """Each member of the object ``text``: its quoted name, where its value starts and where it ends.

    ``deepest`` counts the levels of nesting within a value. Raises as ``value_end``.
    """
    at = skip_space(text, 0) + 1
    while True:
        match = _key.match(text, at)
        if match is None:
            return
        start = match.end()
        end = value_end(text, start, deepest, longest)
        yield match[1], start, end
        at = skip_space(text, end)
        if text[at : at + 1] != b",":
            return
        at += 1


def first_value(text: bytes, names: Collection[str]) -> int | None:
    """Where the first member's value starts in the object ``text``, if that member has one of these names."""
    match = _key.match(text, skip_space(text, 0) + 1)
    if match is None:
        return None
    try:
        name = _decode_text(match[1])
    except msgspec.DecodeError:
        return None
    return match.end() if name in names else None


def check_ends(text: bytes) -> None:
    """Check that the brackets of a text that nests too deep for the parser close at its end; raises MalformedBody."""
    for _ in _walk(b"[" + text + b"]"):
        pass


def _walk(text: bytes) -> Iterator[bytes]:
    """The elements of an array, found by this module alone; raises MalformedBody where that fails."""
    at = skip_space(text, 1)
    if text[at : at + 1] != b"]":
        while True:
            try:
                end = value_end(text, at, DEEPEST, LONGEST)
            except (TooDeep, TooLong):
                raise MalformedBody(
                    f"a value nests deeper than {DEEPEST} levels, or too deep over {LONGEST} bytes; flatten it"
                ) from None
            yield text[at:end]
            at = skip_space(text, end)
            if text[at : at + 1] != b",":
                break
            at = skip_space(text, at + 1)
    if text[at : at + 1] != b"]" or at + 1 != len(text):
        raise MalformedBody(CUT_SHORT)


def walk(text: bytes) -> Iterator[bytes]:
    """Each element of the array ``text`` by the brackets alone, whatever is between them; raises MalformedBody.

    For callers that judge each element by itself, although the array as a whole is not JSON.
    """
    return _walk(text)


def _measured(text: bytes, lengths: Iterable[int]) -> Iterator[bytes]:
    """The elements of an array whose lengths are known."""
    at = 1
    for length in lengths:
        at = skip_space(text, at)
        yield text[at : at + length]
        at = skip_space(text, at + length) + 1


def elements(text: bytes) -> Iterator[bytes]:
    """Each element's source text of the array ``text`` (no white space around it).

    Raises:
        MalformedBody: ``text`` is not one array; perhaps only when that place is reached.
    """
    if text.count(b",") > _MOST_COMMAS:
        yield from _walk(text)
        return
    try:
        yield from map(bytes, _raws_decoder.decode(text))
    except RecursionError:
        yield from _walk(text)
    except msgspec.DecodeError:
        try:
            twin = _raws_decoder.decode(_twin(text))
        except RecursionError:
            yield from _walk(text)
        except msgspec.DecodeError as error:
            raise MalformedBody(_why_malformed(text, error)) from None
        else:
            yield from _measured(text, (len(memoryview(raw)) for raw in twin))

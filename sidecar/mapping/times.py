"""A time as some logger writes it -> microseconds since the epoch, UTC, and whether nothing of it was lost.

``iso`` is RFC 3339 with an offset; digits after the sixth (.NET writes seven, Go nine) are cut. ``epoch_s`` to
``epoch_ns`` are numbers, or texts of one; what is finer than a microsecond is cut towards the past.
"""

import re
from collections.abc import Collection
from decimal import Decimal
from typing import Final

import msgspec
from msgspec import Raw

from sidecar.screening import Rule
from sidecar.screening.schema import Refusal
from sidecar.screening.timestamps import EARLIEST, LATEST, Timestamps

FIELD: Final = "log_timestamp"
_SCALE: Final = {"epoch_s": 6, "epoch_ms": 3, "epoch_us": 0, "epoch_ns": -3}
_NUMBER: Final = re.compile(r"-?[0-9]{1,25}(?:\.[0-9]{1,25})?(?:[eE][+-]?[0-9]{1,2})?", re.ASCII)
_WHOLE: Final = re.compile(r"[0-9]{1,25}", re.ASCII)
_NO_OFFSET: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9:]{8}(?:\.[0-9]+)?", re.ASCII)
_BASES_KEPT: Final = 4_096
_EXACT: Final = len("2026-11-22T17:24:52.123456Z")
_decode_text: Final = msgspec.json.Decoder(str).decode


class TimeReader:
    """Reads the times of one mapping; ``formats`` are its time formats, ``offset`` that of texts without one."""

    __slots__ = ("_bases", "_formats", "_iso", "_offset", "_scale", "_stamps")

    def __init__(self, formats: Collection[str], offset: str | None = None) -> None:
        self._formats = ", ".join(formats)
        self._iso = "iso" in formats
        self._scale = next((_SCALE[each] for each in formats if each in _SCALE), None)
        self._offset = offset
        self._stamps = Timestamps()
        self._bases: dict[str, int] = {}  # second and offset -> microseconds: the events of a batch share few

    def read(self, leaf: object) -> tuple[int, bool] | None:
        """Microseconds, and whether the value says nothing more; None for null.

        Raises:
            Refusal: a value that is no time of these formats, or outside the years 1 to 9999.
        """
        if type(leaf) is Raw:
            source = bytes(leaf)
            if source == b"null":
                return None
            if source[:1] == b'"':
                try:
                    return self._text(_decode_text(source))
                except msgspec.DecodeError:
                    raise self._unread("a text that cannot be decoded") from None
            return self._number(source.decode("ascii", "replace"))
        if leaf is None:
            return None
        if isinstance(leaf, str):
            return self._text(leaf)
        if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
            return self._number(repr(leaf))
        raise self._unread("neither text nor number")

    def _text(self, text: str) -> tuple[int, bool]:
        if self._scale is not None and _NUMBER.fullmatch(text):
            return self._number(text)
        if not self._iso:
            raise self._unread("text")
        cut = len(text) - 1 if text[-1:] == "Z" else text.rfind("+", 19)  # where the offset begins; -1: read slowly
        digits = text[20:cut]
        base = self._bases.get(text[:19] + text[cut:]) if digits.isdigit() and digits.isascii() else None
        if base is not None and text[19] == ".":
            return base + int((digits + "00000")[:6]), text[cut] == "Z" and len(text) <= _EXACT
        moment, exact = self._slowly(text)
        if text[19:20] == "." and cut > 0 and digits:
            if len(self._bases) >= _BASES_KEPT:
                self._bases.clear()
            self._bases[text[:19] + text[cut:]] = moment - int((digits + "00000")[:6])
        return moment, exact

    def _slowly(self, text: str) -> tuple[int, bool]:
        try:
            if self._offset is not None and _NO_OFFSET.fullmatch(text):
                return self._stamps.parse(text + self._offset), False
            return self._stamps.parse(text), text[-1] == "Z" and len(text) <= _EXACT
        except ValueError as error:
            raise Refusal(FIELD, Rule.TIMESTAMP, str(error)) from None

    def _number(self, text: str) -> tuple[int, bool]:
        scale = self._scale
        if scale is None or not _NUMBER.fullmatch(text):
            raise self._unread("a number" if _NUMBER.fullmatch(text) else "neither text nor number")
        if _WHOLE.fullmatch(text):
            value = int(text)
            if scale >= 0:
                moment, exact = value * 10**scale, True
            else:
                moment, exact = value // 1000, value % 1000 == 0
        else:
            scaled = Decimal(text).scaleb(scale)
            if not EARLIEST <= scaled <= LATEST:
                raise Refusal(FIELD, Rule.TIMESTAMP, "outside the years 0001 to 9999; check the format's unit")
            moment = int(scaled // 1)
            moment -= scaled < moment
            exact = scaled == moment
        if not EARLIEST <= moment <= LATEST:
            raise Refusal(FIELD, Rule.TIMESTAMP, "outside the years 0001 to 9999; check the format's unit")
        return moment, exact

    def _unread(self, seen: str) -> Refusal:
        return Refusal(FIELD, Rule.TIMESTAMP, f"seen {seen}, the mapping's formats are {self._formats}")

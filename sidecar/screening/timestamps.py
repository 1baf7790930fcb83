"""RFC 3339 date-times -> microseconds since the epoch, UTC, exactly; every other spelling is refused with its reason.

Accepted: ``YYYY-MM-DDTHH:MM:SS[.f...](Z|+hh:mm|-hh:mm)``; ``t``, ``z`` and a space for the ``T`` are RFC 3339 too.
Fraction digits beyond the sixth are cut, not rounded (.NET writes seven). The instant must lie in the years 1 to 9999
*in UTC*: what Python's datetime, and with it the PostgreSQL driver and DynamoDB's sortable text, can hold.
"""

import re
from datetime import UTC, datetime
from typing import Final

from sidecar.record import EPOCH

_FORM: Final = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt ]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]+))?"
    r"(?:([Zz])|([+-])([0-9]{2}):([0-9]{2}))",
    re.ASCII,
)
_NO_OFFSET: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?", re.ASCII)
_DATE_ONLY: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)

MICROSECONDS: Final = 1_000_000
EARLIEST: Final = -62_135_596_800 * MICROSECONDS  # 0001-01-01T00:00:00Z
LATEST: Final = 253_402_300_800 * MICROSECONDS - 1  # 9999-12-31T23:59:59.999999Z
_SECONDS_CACHE: Final = 4096  # distinct seconds remembered before starting afresh
_EXAMPLE: Final = "write RFC 3339 with an offset, e.g. 2026-11-22T17:24:52.123456Z"


class Timestamps:
    """Parses timestamps; remembers the seconds it met, because the records of one batch share few.

    ``seconds`` maps the first 19 characters of timestamps that were read to microseconds, the offset not yet applied.
    """

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds: dict[str, int] = {}

    def parse(self, text: str) -> int:
        """Microseconds since the epoch, UTC.

        Raises:
            ValueError: anything else; the message is the reason, without the text.
        """
        base = self.seconds.get(text[:19])
        if base is not None and text[19:] == "Z":
            return base
        return self._exact(text)

    def _exact(self, text: str) -> int:
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError(_why_not(text))
        year, month, day, hour, minute, second, fraction, _, sign, off_hours, off_minutes = match.groups()
        if second == "60":
            raise ValueError("leap seconds (:60) cannot be stored; write :59 or the next minute")
        if hour == "24":
            raise ValueError("hour 24 is not RFC 3339; write 00:00:00 of the next day")
        try:
            moment = datetime(int(year), int(month), int(day), int(hour), int(minute), int(second), tzinfo=UTC)
        except ValueError:
            raise ValueError("no such date or time in the calendar") from None
        whole = moment - EPOCH
        base = (whole.days * 86_400 + whole.seconds) * MICROSECONDS
        offset = 0
        if sign is not None:
            if int(off_hours) > 23 or int(off_minutes) > 59:  # noqa: PLR2004  (RFC 3339, time-numoffset)
                raise ValueError("the offset must lie within -23:59 and +23:59")
            offset = (int(off_hours) * 3600 + int(off_minutes) * 60) * MICROSECONDS
            offset = -offset if sign == "-" else offset
        value = base - offset + (int((fraction + "00000")[:6]) if fraction else 0)
        if not EARLIEST <= value <= LATEST:
            raise ValueError("the instant in UTC lies outside the years 0001 to 9999 that both stores hold")
        if len(self.seconds) >= _SECONDS_CACHE:
            self.seconds.clear()
        if text[10] == "T":
            self.seconds[text[:19]] = base
        return value


def _why_not(text: str) -> str:
    """The reason, from what the text looks like."""
    if not text.isascii():
        return f"only ASCII digits and signs are allowed; {_EXAMPLE}"
    if _DATE_ONLY.fullmatch(text):
        return f"a date alone is not an instant; {_EXAMPLE}"
    if _NO_OFFSET.fullmatch(text):
        return f"the offset from UTC is missing, so the instant is unknown; {_EXAMPLE}"
    if text.isdigit():
        return f"epoch numbers are not accepted, their unit cannot be told; {_EXAMPLE}"
    return f"not an RFC 3339 date-time; {_EXAMPLE}"

"""Identity of records: UUIDv7 minted here, UUIDv8 derived from an Idempotency-Key, the client's own made canonical.

Minting (RFC 9562, section 6.2, method 2, monotonic random): the 74 bits after the 48-bit millisecond are drawn afresh
for each new millisecond and raised by a random step of 1..2**32 for each further id in it, so ids of one minter only
ever rise, also within a batch and when the clock steps back (then the highest millisecond so far stays in force).
"""

import hashlib
import re
import uuid
from collections.abc import Callable, Iterable
from typing import Final

from sidecar.clock import Clock
from sidecar.errors import MalformedBody

_CANONICAL: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII)
_SPELLING: Final = re.compile(
    r"(?:urn:uuid:)?(\{|\()?([0-9a-f]{8})(-?)([0-9a-f]{4})\3([0-9a-f]{4})\3([0-9a-f]{4})\3([0-9a-f]{12})(\}|\))?",
    re.ASCII | re.IGNORECASE,
)
_PAIRS: Final = frozenset({(None, None), ("{", "}"), ("(", ")")})
_NIL: Final = "00000000-0000-0000-0000-000000000000"
_HIGH_BITS: Final = 26  # rand_a and the first bits of rand_b of a version 7 UUID
_LOW_BITS: Final = 48  # the last group of the text
_MS_MAX: Final = 2**48 - 1
_POOL: Final = 16 * 1024  # random bytes drawn at a time
_KEY_FORM: Final = re.compile(r"[\x21-\x7e]{1,255}")
_DERIVED_AS: Final = b"sidecar-key-id-1"  # BLAKE2b personalisation: changing it changes every derived id


def canonical(text: str) -> str:
    """Any usual spelling of a UUID -> lower case with hyphens.

    Accepts upper case, braces, parentheses, ``urn:uuid:`` and no hyphens (.NET's formats D, N, B and P).

    Raises:
        ValueError: no UUID, or the nil UUID; the message is the reason, without the text.
    """
    if not _CANONICAL.fullmatch(text):
        match = _SPELLING.fullmatch(text)
        if match is None or (match[1], match[8]) not in _PAIRS:
            raise ValueError("not a UUID; write 8-4-4-4-12 hexadecimal digits, or leave it out to get one")
        text = "-".join((match[2], match[4], match[5], match[6], match[7])).lower()
    if text == _NIL:
        raise ValueError("the nil UUID names no record (.NET's Guid.Empty); leave it out to get one")
    return text


def version7_time(log_id: str) -> int | None:
    """Microseconds since the epoch in a canonical UUIDv7 (milliseconds' precision); None for other UUIDs."""
    if log_id[14] != "7" or log_id[19] not in "89ab":
        return None
    return int(log_id[:8] + log_id[9:13], 16) * 1000


def check_key(key: str) -> str:
    """An Idempotency-Key as it may be: 1..255 visible ASCII characters.

    Raises:
        MalformedBody: anything else.
    """
    if not _KEY_FORM.fullmatch(key):
        raise MalformedBody(
            "Idempotency-Key: allowed are 1 to 255 visible ASCII characters without spaces; shorten or encode it"
        )
    return key


def derive_ids(key: str, indexes: Iterable[int]) -> list[str]:
    """UUIDv8 for these records of a request: BLAKE2b-128 of (key, index), the same for ever."""
    prefix = hashlib.blake2b(key.encode("ascii"), digest_size=16, person=_DERIVED_AS)
    ids = []
    for index in indexes:
        one = prefix.copy()
        one.update(b"\0%d" % index)  # NUL cannot occur in a key, so (key, index) stays unambiguous
        value = int.from_bytes(one.digest(), "big")
        value = value & ~(0xF << 76) | 8 << 76
        value = value & ~(0x3 << 62) | 2 << 62
        ids.append(str(uuid.UUID(int=value)))
    return ids


class Minter:
    """UUIDv7 texts that only rise; one per instance, called from one thread.

    Randomness is drawn some thousand bytes at a time: the system call gives up the interpreter's lock, and getting it
    back from the spool's thread costs more than everything else that a request does here.
    """

    __slots__ = ("_at", "_clock", "_high", "_low", "_ms", "_pool", "_prefix", "_random")

    def __init__(self, clock: Clock, random: Callable[[int], bytes]) -> None:
        """``random(n)`` gives n unpredictable bytes, e.g. ``os.urandom``."""
        self._clock = clock
        self._random = random
        self._pool = b""
        self._at = 0
        self._ms = -1  # 48 bits of the id; then a version of 4
        self._high = 0  # 26 bits, around a variant of 2
        self._low = 0  # 48 bits: the last group
        self._prefix = ""

    def batch(self, count: int) -> list[str]:
        """``count`` new ids, rising, above all earlier ones."""
        now = min(max(self._clock.now_us() // 1000, 0), _MS_MAX)
        if now > self._ms:
            self._ms = now
            self._restart()
        steps = memoryview(self._draw(4 * count)).cast("I")
        ids: list[str] = []
        while len(ids) < count:
            prefix, low = self._prefix, self._low
            for step in steps[len(ids) :]:
                low += step + 1
                if low >> _LOW_BITS:
                    self._carry()
                    break
                self._low = low
                ids.append(prefix + low.to_bytes(6, "big").hex())  # a format specification costs twice as much
        return ids

    def _carry(self) -> None:
        """The last group has run over: into the group before, and from there, hardly ever, into the millisecond."""
        self._high += 1
        self._low = 0
        if self._high >> _HIGH_BITS:
            self._ms += 1
            self._restart()
        else:
            self._write_prefix()

    def _restart(self) -> None:
        """Start a millisecond's tail: 73 random bits, so that half the range is left to rise into."""
        drawn = int.from_bytes(self._draw(10), "big") >> 7
        self._high, self._low = divmod(drawn, 1 << _LOW_BITS)
        self._write_prefix()

    def _write_prefix(self) -> None:
        ms, high = self._ms, self._high
        self._prefix = f"{ms >> 16:08x}-{ms & 0xFFFF:04x}-7{high >> 14:03x}-{0x8000 | high & 0x3FFF:04x}-"

    def _draw(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._pool):
            self._pool = self._random(max(_POOL, size))
            self._at, end = 0, size
        drawn = self._pool[self._at : end]
        self._at = end
        return drawn

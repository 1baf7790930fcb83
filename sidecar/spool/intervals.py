"""A set of whole numbers kept as disjoint intervals: what a store has settled, compactly, whatever the order."""

import struct
from bisect import bisect_right
from collections.abc import Iterator
from typing import Self


class Intervals:
    """Disjoint closed intervals of integers >= 0, merged when they touch.

    Settled frames come nearly in order, so there are about as many intervals as frames in flight.
    """

    __slots__ = ("_hi", "_lo")

    def __init__(self, *pairs: tuple[int, int]) -> None:
        self._lo: list[int] = []
        self._hi: list[int] = []
        for lo, hi in pairs:
            self.add(lo, hi)

    def add(self, lo: int, hi: int | None = None) -> None:
        """Add lo..hi inclusive (hi defaults to lo); an empty range (hi < lo) changes nothing."""
        last = lo if hi is None else hi
        if last < lo:
            return
        los, his = self._lo, self._hi
        if his and lo == his[-1] + 1:  # the common case: in order
            his[-1] = last
            return
        first = bisect_right(los, lo) - 1
        if first >= 0 and his[first] >= lo - 1:
            lo = los[first]
        else:
            first += 1
        after = first
        while after < len(los) and los[after] <= last + 1:
            last = max(last, his[after])
            after += 1
        los[first:after] = [lo]
        his[first:after] = [last]

    def remove(self, lo: int, hi: int) -> None:
        """Take lo..hi inclusive out; an empty range changes nothing."""
        if hi < lo:
            return
        kept = [part for a, b in self for part in ((a, min(b, lo - 1)), (max(a, hi + 1), b)) if part[0] <= part[1]]
        self._lo = [a for a, _ in kept]
        self._hi = [b for _, b in kept]

    def covers(self, number: int) -> bool:
        """True where ``number`` is in the set."""
        at = bisect_right(self._lo, number) - 1
        return at >= 0 and self._hi[at] >= number

    def next_uncovered(self, number: int) -> int:
        """The smallest number >= ``number`` that is not in the set."""
        at = bisect_right(self._lo, number) - 1
        return self._hi[at] + 1 if at >= 0 and self._hi[at] >= number else number

    def next_covered(self, number: int) -> int | None:
        """The smallest number >= ``number`` that is in the set, None if there is none."""
        if self.covers(number):
            return number
        at = bisect_right(self._lo, number)
        return self._lo[at] if at < len(self._lo) else None

    @property
    def highest(self) -> int:
        """The largest member; -1 for the empty set."""
        return self._hi[-1] if self._hi else -1

    @property
    def first_end(self) -> int:
        """The end of the first interval; -1 for the empty set."""
        return self._hi[0] if self._hi else -1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._lo, self._hi, strict=True)

    def __bool__(self) -> bool:
        return bool(self._lo)

    def __len__(self) -> int:
        """How many intervals (not how many members)."""
        return len(self._lo)

    def pack(self) -> bytes:
        """Little-endian pairs of unsigned 64-bit numbers."""
        return struct.pack(f"<{2 * len(self)}Q", *(n for pair in self for n in pair))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The inverse of :meth:`pack`. Raises struct.error where the length is no multiple of 16."""
        numbers = struct.unpack(f"<{len(data) // 8}Q", data)
        return cls(*zip(numbers[::2], numbers[1::2], strict=True))

"""Which hours there is something to copy in: runs of hours, compact enough for a checkpoint.

A run says "nothing is known to be complete between these two hours", so hours without records that lie inside cost one
empty read each. It is broken by a complete hour, and by more than ``WIDE`` hours without anything: a table may hold a
row of the year 1. Beyond ``MOST`` runs the narrowest breaks are given up: complete hours are then copied again, which
changes nothing.
"""

from collections.abc import Iterator, Sequence
from typing import Final

WIDE: Final = 1_000
MOST: Final = 4_000

Run = tuple[int, int]
"""First and last hour, both inclusive."""


class Hours:
    """Hours told in ascending order, complete or not.

    Args:
        runs: what an earlier part of the same walk found.
    """

    def __init__(self, runs: Sequence[Run] = ()) -> None:
        self.runs: list[Run] = [(first, last) for first, last in runs]
        self._broken = bool(self.runs)

    def tell(self, hour: int, *, complete: bool) -> None:
        """The next occupied hour."""
        if complete:
            self._broken = True
            return
        if self.runs and not self._broken and hour - self.runs[-1][1] <= WIDE:
            self.runs[-1] = (self.runs[-1][0], hour)
        else:
            self.runs.append((hour, hour))
        self._broken = False
        if len(self.runs) > MOST:
            self._compact()

    def __iter__(self) -> Iterator[int]:
        """Every hour of every run."""
        for first, last in self.runs:
            yield from range(first, last + 1)

    def _compact(self) -> None:
        breaks = sorted(b[0] - a[1] for a, b in zip(self.runs, self.runs[1:], strict=False))
        bound = min(breaks[len(breaks) // 2], WIDE)
        joined = self.runs[:1]
        for first, last in self.runs[1:]:
            if first - joined[-1][1] <= bound:
                joined[-1] = (joined[-1][0], last)
            else:
                joined.append((first, last))
        self.runs = joined

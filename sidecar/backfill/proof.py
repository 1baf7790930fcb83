"""What a validation says of the hours of a run, and the gaps that it closes.

The figures and ``reached`` of the checkpoint move together, and only after the lines up to there are closed: a process
that takes over judges no hour twice and leaves none out.
"""

from bisect import bisect_left
from typing import Final

from sidecar.backfill.checkpoint import Checkpoint
from sidecar.backfill.comparison import Hour
from sidecar.backfill.gaps import Gaps
from sidecar.stores.base import HOUR_US

_AT_ONCE: Final = 200  # hours whose lines are closed by one call


class Proof:
    """Takes validated hours, ascending.

    Args:
        checkpoint: where the figures go.
        gaps: read before the validation began.
        open_hours: hours with an open gap that may be closed, ascending.
    """

    def __init__(self, checkpoint: Checkpoint, gaps: Gaps, open_hours: list[int]) -> None:
        self._seen = checkpoint
        self._gaps = gaps
        self._open = open_hours
        self._clean: list[int] = []
        self._told: list[Hour] = []

    async def take(self, hour: Hour) -> None:
        """The next occupied hour; hours with a gap before it have no record in the source. Raises StoreError."""
        before = bisect_left(self._open, hour.number)
        self._clean += self._open[:before]
        named = before < len(self._open) and self._open[before] == hour.number
        del self._open[: before + named]
        if named and hour.clean:
            self._clean.append(hour.number)
        self._told.append(hour)
        if not self._clean or len(self._clean) >= _AT_ONCE:
            await self._settle()

    async def finish(self) -> None:
        """The walk is at its end. Raises StoreError."""
        self._clean += self._open
        self._open = []
        await self._settle()

    async def _settle(self) -> None:
        seen, number = self._seen, 0
        while self._clean:
            number += await self._gaps.close(self._clean[:_AT_ONCE])
            del self._clean[:_AT_ONCE]
        seen.closed += number
        for hour in self._told:
            seen.left += hour.missing + hour.young
            seen.young += hour.young
            seen.differing += hour.differing
            seen.reached = (hour.number + 1) * HOUR_US
        self._told.clear()

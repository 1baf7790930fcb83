"""The pace of surveys and validations: they read much more than is copied, beside live traffic.

Entries are let through at ``READ_SHARE`` times the rate of the copy, and not at all while an operator has paused it. A
merge pulls both stores in step, so that holding back the source holds back both; a store that reads its index in one
piece (DynamoDB) is bounded by its calls in flight (``QUIET_READS``).
"""

from collections.abc import AsyncIterator
from typing import Final

from sidecar.clock import Clock
from sidecar.retry import Pace
from sidecar.stores.base import ScanEntry

READ_SHARE: Final = 20.0
QUIET_READS: Final = 2  # read calls in flight at DynamoDB, where the rate is bounded
_CHECKED: Final = 500  # entries between two looks
_PAUSED: Final = 0.2  # seconds between two looks while paused
_BEHIND: Final = 1.0  # seconds of credit that a slow reader may catch up


class Reading:
    """The pace of one process's reads, by the orders that its copy has.

    Args:
        pace: of the copy.
        clock: time.
    """

    def __init__(self, pace: Pace, clock: Clock) -> None:
        self._pace = pace
        self._clock = clock

    async def paced(self, scan: AsyncIterator[ScanEntry]) -> AsyncIterator[ScanEntry]:
        """The same entries, in their time."""
        due = self._clock.monotonic()
        seen = 0
        try:
            async for entry in scan:
                yield entry
                seen += 1
                if seen % _CHECKED == 0:
                    due = await self._wait(due)
        finally:
            end = getattr(scan, "aclose", None)  # a scan that is not read to its end gives back what it holds
            if end is not None:
                await end()

    async def _wait(self, due: float) -> float:
        """Until the next entries are due; when those after them are."""
        while self._pace.paused_by is not None:
            await self._clock.sleep(_PAUSED)
        rate = self._pace.rate.manual
        now = self._clock.monotonic()
        if rate is None:
            return now
        if due > now:
            await self._clock.sleep(due - now)
        return max(due, now - _BEHIND) + _CHECKED / (rate * READ_SHARE)

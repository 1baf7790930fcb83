"""Time as a part that is handed in: no promise of the sidecar reads the wall clock behind one's back (P11)."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Three clocks, each for its own purpose."""

    def now_us(self) -> int:
        """Wall time in microseconds since 1970-01-01 UTC; for stamps that people read, never for intervals."""
        ...

    def monotonic(self) -> float:
        """Seconds that never jump; for every interval, retry and expiry."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Suspend the calling task for ``seconds`` (0 yields once)."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now_us(self) -> int:
        """Wall time, microseconds."""
        return time.time_ns() // 1000

    def monotonic(self) -> float:
        """Seconds."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Sleep on the event loop."""
        await asyncio.sleep(seconds)

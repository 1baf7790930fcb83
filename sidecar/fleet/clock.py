"""The clock by which an instance fences itself: one that goes on while the machine is suspended.

``time.monotonic`` is CLOCK_MONOTONIC on Linux, which stands still in a suspend. A machine that was asleep for an hour
would believe that its heartbeat is fresh, while the fleet has counted it out long ago. CLOCK_BOOTTIME counts that time.
Where the kernel has none (macOS), the ordinary one is used; such machines run no fleet.
"""

import time
from typing import Final

from sidecar.clock import SystemClock

_BOOTTIME: Final[int | None] = getattr(time, "CLOCK_BOOTTIME", None)


class BootClock(SystemClock):
    """The machine's clocks, with a monotonic one that counts suspended time too."""

    def monotonic(self) -> float:
        """Seconds since the machine started, suspended ones included."""
        return time.monotonic() if _BOOTTIME is None else time.clock_gettime(_BOOTTIME)

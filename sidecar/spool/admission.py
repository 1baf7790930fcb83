"""Whether a new record is let in: watermarks of the cap, room on the disk, memory that waits for commits.

Who is pushed back is told when it is worth coming again: the bytes that must go until the door opens, over the bytes a
second that records left with during the last seconds; a minute where nothing leaves.
"""

from collections import deque
from math import ceil
from typing import Final

from sidecar.clock import Clock
from sidecar.errors import Busy
from sidecar.settings import Spool as SpoolSettings
from sidecar.spool.work import Stats

_MIB: Final = 1024 * 1024
_WAITING_BYTES: Final = 64 * _MIB  # of appends that no commit has taken
_BACK: Final = 1.25  # free space must come back by so much before the door opens again
_LONGEST: Final = 60  # seconds of Retry-After
_RATE_SECONDS: Final = 10  # over which the drain is measured


class DrainRate:
    """Bytes a second that records left the spool with, over the last ten seconds; pure, monotonic seconds passed in."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._buckets: deque[tuple[int, int]] = deque()  # whole second, bytes
        self._sum = 0

    def add(self, now: float, size: int) -> None:
        """``size`` bytes are owed to nobody any more."""
        second = int(now)
        if self._buckets and self._buckets[-1][0] == second:
            self._buckets[-1] = (second, self._buckets[-1][1] + size)
        else:
            self._forget(now)
            self._buckets.append((second, size))
        self._sum += size

    def rate(self, now: float) -> float:
        """Bytes a second; 0.0 where nothing left."""
        self._forget(now)
        return self._sum / min(max(now - self._since, 1.0), float(_RATE_SECONDS))

    def _forget(self, now: float) -> None:
        while self._buckets and self._buckets[0][0] <= now - _RATE_SECONDS:
            self._sum -= self._buckets.popleft()[1]


class Admission:
    """Closes at the high watermark, opens again below the low one."""

    def __init__(self, settings: SpoolSettings, stats: Stats, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._floor = max(settings.ballast_bytes, 4 * _MIB)
        self._drain = DrainRate(clock.monotonic())
        self.stats = stats
        self.used = stats.used  # with what was let in since the last measurement
        self.waiting = 0
        self.reason = ""
        self.measured(stats)

    def measured(self, stats: Stats) -> None:
        """New figures from the database thread."""
        self.stats = stats
        self.used = stats.used + self.waiting
        full = self._settings.cap_bytes * (
            self._settings.low_watermark if self.reason == "spool_full" else self._settings.high_watermark
        )
        floor = self._floor * (_BACK if self.reason == "disk_full" else 1)
        if stats.stuck:
            self.reason = stats.stuck
        elif stats.disk_free < floor or not stats.ballast:
            self.reason = "disk_full"
        elif self.used >= full:
            self.reason = "spool_full"
        else:
            self.reason = ""

    def enter(self, size: int) -> None:
        """Let an append of ``size`` bytes in.

        Raises:
            Busy: nothing was stored; the reason is one of SpoolState.busy_reason.
        """
        reason = self.reason
        if not reason:
            if self.used >= self._settings.cap_bytes * self._settings.high_watermark:
                reason = self.reason = "spool_full"  # closes at once: the next figures may be some commits away
            elif self.used + size > self._settings.cap_bytes:
                reason = "spool_full"
            elif self.waiting and self.waiting + size > _WAITING_BYTES:
                reason = "spool_slow"
        if reason:
            raise self.busy(reason, size)
        self.waiting += size
        self.used += size

    def leave(self, size: int) -> None:
        """The append was committed or refused."""
        self.waiting -= size

    def drained(self, size: int) -> None:
        """``size`` bytes of records are owed to nobody any more."""
        self._drain.add(self._clock.monotonic(), size)

    def busy(self, reason: str, size: int = 0) -> Busy:
        """The push-back of an append of ``size`` bytes, with the seconds until it is worth trying again (1 to 60)."""
        return Busy(reason, _TEXTS[reason], 1 if reason == "spool_slow" else self._seconds(reason, size))

    def _seconds(self, reason: str, size: int) -> int:
        if reason == "disk_full":
            missing = self._floor * _BACK - self.stats.disk_free
        else:
            cap = self._settings.cap_bytes
            missing = max(self.used - cap * self._settings.low_watermark, self.used + size - cap)
        if missing <= 0:
            return 1
        rate = self._drain.rate(self._clock.monotonic())
        return _LONGEST if rate * _LONGEST <= missing else max(1, ceil(missing / rate))


_TEXTS: Final = {
    "spool_full": "the spool is at its cap (spool.cap_bytes); it opens again when the stores have taken some of it",
    "disk_full": "the spool's disk has no room left (below spool.ballast_bytes); free some space",
    "spool_slow": "the spool's disk takes too long to commit; too much waits in memory",
}

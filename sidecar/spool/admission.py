"""Whether a new record is let in: watermarks of the cap, room on the disk, memory that waits for commits."""

from typing import Final

from sidecar.errors import Busy
from sidecar.settings import Spool as SpoolSettings
from sidecar.spool.committer import Stats

_MIB: Final = 1024 * 1024
_WAITING_BYTES: Final = 64 * _MIB  # of appends that no commit has taken
_BACK: Final = 1.25  # free space must come back by so much before the door opens again


class Admission:
    """Closes at the high watermark, opens again below the low one."""

    def __init__(self, settings: SpoolSettings, stats: Stats) -> None:
        self._settings = settings
        self._floor = max(settings.ballast_bytes, 4 * _MIB)
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
            if self.used + size > self._settings.cap_bytes:
                reason = "spool_full"
            elif self.waiting and self.waiting + size > _WAITING_BYTES:
                reason = "spool_slow"
        if reason:
            raise Busy(reason, _TEXTS[reason], 1 if reason == "spool_slow" else 5)
        self.waiting += size
        self.used += size

    def leave(self, size: int) -> None:
        """The append was committed or refused."""
        self.waiting -= size


_TEXTS: Final = {
    "spool_full": "the spool is at its cap (spool.cap_bytes); it opens again when the stores have taken some of it",
    "disk_full": "the spool's disk has no room left (below spool.ballast_bytes); free some space",
    "spool_slow": "the spool's disk takes too long to commit; too much waits in memory",
}

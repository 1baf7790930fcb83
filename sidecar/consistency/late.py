"""Writes to days that are over: noted, so that their verdicts are known to be overtaken.

A record is late where its log_timestamp lies in a UTC day before the one in which it was accepted. The day and the time
are kept in memory and written to the ledger within seconds; at a start the days of everything that is still in the
spool are noted again, so that a crash forgets at most what was accepted in the last seconds and delivered in them too.
While the ledger cannot be written nothing is lost: it is tried again, and memory holds one number a day.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Final

from sidecar.clock import Clock
from sidecar.errors import StoreError
from sidecar.record import LogRecord
from sidecar.verdicts import DAY_US, ValidationLedger

log = logging.getLogger(__name__)

_EVERY: Final = 2.0  # seconds between two writes to the ledger
_PAUSE: Final = 30.0  # seconds after it could not be written


class LateWrites:
    """``accepted`` for every frame, ``run`` until cancelled, ``flush`` at the end."""

    def __init__(self, ledger: ValidationLedger, clock: Clock) -> None:
        self._ledger = ledger
        self._clock = clock
        self._days: dict[int, int] = {}
        self._trouble = False

    def accepted(self, earliest_us: int, records: Sequence[LogRecord], now_us: int) -> None:
        """Records of one commit; ``earliest_us`` is their smallest log_timestamp: mostly nothing is looked at."""
        today = now_us // DAY_US
        if earliest_us >= today * DAY_US:
            return
        for day in {record.log_timestamp // DAY_US for record in records}:
            if day < today:
                self._days[day] = now_us

    def spans(self, found: Iterable[tuple[int, int]], now_us: int) -> None:
        """Frames found in the spool at a start, each (smallest, largest log_timestamp): all their days are noted."""
        today = now_us // DAY_US
        for first, last in found:
            for day in {first // DAY_US, *range(max(first // DAY_US, today - 366), min(last // DAY_US + 1, today))}:
                if day < today:
                    self._days[day] = now_us

    async def run(self) -> None:
        """Write them down."""
        while True:
            await self._clock.sleep(_PAUSE if not await self.flush() else _EVERY)

    async def flush(self) -> bool:
        """Write what is noted; False where the ledger did not take it."""
        if not self._days:
            return True
        taken = dict(self._days)
        try:
            await self._ledger.note_writes(taken)
        except StoreError as error:
            if not self._trouble:
                log.warning("late writes are not noted yet", extra={"days": len(taken), "reason": error.reason})
            self._trouble = True
            return False
        self._trouble = False
        self._days = {day: at for day, at in self._days.items() if at != taken.get(day)}
        return True

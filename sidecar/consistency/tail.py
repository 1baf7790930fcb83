"""Validation without end: the newest records again and again, and days whose verdict does not stand.

One instance at a time, by a lease in the fleet's tables: no safety rests on it, two at once cost twice and find the
same. Each round compares from the midnight before ``now - validation.window`` to now; then the next stretch of days
whose verdict was overtaken, or was not clean, so that a day that was mended or written to late comes clean by itself.
A failure ends the round; the next one comes in its time. A run that is under way is cancelled with the task.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from sidecar.clock import Clock
from sidecar.consistency.evidence import Validations
from sidecar.consistency.types import Window, outcome_of
from sidecar.consistency.validator import Options, Validator
from sidecar.errors import StoreError
from sidecar.settings import Validation
from sidecar.verdicts import DAY_US, RunLine

log = logging.getLogger(__name__)

LEASE_SECONDS: Final = 120.0
_RENEW: Final = 30.0  # seconds
_IDLE: Final = 1.0  # seconds between two looks at the clock
_FIRST: Final = 30.0  # seconds after a start at most, so that a restart does not begin with a scan
_DAYS_A_ROUND: Final = 31
_UNCLEAN_EVERY: Final = (
    24 * 3600.0
)  # seconds between two looks at old days with differences: they seldom go by themselves


class Tail:
    """``run`` until cancelled.

    Args:
        validator: what compares.
        evidence: which days do not stand.
        settings: asked each time.
        due: whether the phase writes both stores: there is nothing to compare in the others.
        lease: take or renew it; False while another instance has it. Raises StoreError.
        finished: told of every finished run.
        clock: time. by: this instance's name.
    """

    def __init__(
        self,
        validator: Validator,
        evidence: Validations,
        *,
        settings: Callable[[], Validation],
        due: Callable[[], bool],
        lease: Callable[[], Awaitable[bool]],
        finished: Callable[[RunLine], None],
        clock: Clock,
        by: str,
    ) -> None:
        self._validator = validator
        self._evidence = evidence
        self._settings = settings
        self._due = due
        self._lease = lease
        self._finished = finished
        self._clock = clock
        self._by = by
        self._leads = False
        self._unclean_due = 0.0
        self._after = -(10**9)  # the last day of the stretch that was compared last
        self.running = False

    @property
    def leads(self) -> bool:
        """Whether this instance has the lease."""
        return self._leads

    async def run(self) -> None:
        """Round after round."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._hold())
            tasks.create_task(self._rounds())

    async def _hold(self) -> None:
        while True:
            if self._settings().interval and self._due():
                try:
                    self._leads = await self._lease()
                except StoreError as error:
                    self._leads = False
                    log.info("validation has no lease", extra={"store": error.store, "reason": error.reason})
                await self._clock.sleep(min(_RENEW, self._settings().interval or _RENEW))
            else:
                self._leads = False
                await self._clock.sleep(_IDLE)

    async def _rounds(self) -> None:
        began = self._clock.monotonic()
        last: float | None = None
        while True:
            await self._clock.sleep(min(_IDLE, self._settings().interval or _IDLE))
            interval, now = self._settings().interval, self._clock.monotonic()
            wait = min(_FIRST, interval) if last is None else interval
            if not interval or not self._leads or not self._due() or now - (began if last is None else last) < wait:
                continue
            last = now
            await self.round()

    async def round(self) -> None:
        """The newest records, then some days that do not stand."""
        settings = self._settings()
        now = self._clock.now_us()
        start = (now - int(settings.window * 1e6)) // DAY_US * DAY_US
        options = Options(rate=settings.rate, by=self._by)
        self.running = True
        try:
            await self._one(Window(start, now), options)
            found = await self._evidence.days()
            if found is not None:
                days = set(found.stale)
                if self._clock.monotonic() >= self._unclean_due:
                    self._unclean_due = self._clock.monotonic() + _UNCLEAN_EVERY
                    days |= set(found.unclean)
                again = self._next_stretch(sorted(days), start // DAY_US)
                if again is not None:
                    await self._one(again, options)
        except StoreError as error:
            log.warning(
                "validation failed", extra={"store": error.store, "reason": error.reason, "class": error.retry_class}
            )
        finally:
            self.running = False

    def _next_stretch(self, days: Sequence[int], before: int) -> Window | None:
        """Neighbouring days, at most a month; the next ones after the last stretch, so that none waits for ever.

        Days that stay as they are (of an open gap, say) would otherwise be the oldest each time.
        """
        due = [day for day in days if day < before]
        if not due:
            return None
        due = [day for day in due if day > self._after] or due
        last = due[0]
        for day in due[:_DAYS_A_ROUND]:
            if day > last + 1:
                break
            last = day
        self._after = last
        return Window(due[0] * DAY_US, (last + 1) * DAY_US)

    async def _one(self, window: Window, options: Options) -> None:
        line = await self._validator.run(window, options)
        told = {reason: number for reason, number in line.reasons.items() if number}
        log.log(
            logging.INFO if outcome_of(line.reasons) == "clean" else logging.WARNING,
            "validated",
            extra={"outcome": line.outcome, "run": line.id, "sql": line.sql_records, "dynamo": line.dynamo_records}
            | {f"found_{reason}": number for reason, number in told.items()},
        )
        self._finished(line)

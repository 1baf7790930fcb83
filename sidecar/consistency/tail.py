"""Validation without end: the newest records again and again, and days whose verdict does not stand.

One instance at a time, by a lease in the fleet's tables: no safety rests on it, two at once cost twice and find the
same. An instance leads by its own monotonic clock, from before it asked for as long as it asked for: one that was
stopped for longer begins nothing when it wakes up, and once it hears that another has the lease it ends the round under
way, which is then no verdict. Each round compares from the midnight before ``now - validation.window`` to now; then the
next stretch of days whose verdict was overtaken, or was not clean, so that a day that was mended or written to late
comes clean by itself.
A failure ends the round; the next one comes in its time. A run that is under way is cancelled with the task.
"""

import asyncio
import logging
import math
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

_RENEW: Final = 30.0  # seconds, at most, between two renewals of the lease
_RENEWALS: Final = 4  # of them fit into it: 120 s
_SHORTEST: Final = 10.0  # seconds of a lease at least: a few answers that are late do not lose it
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
        lease: take or renew it for so many seconds; False while another instance has it. Raises StoreError.
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
        lease: Callable[[float], Awaitable[bool]],
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
        self._leads_until = -math.inf
        self._round: asyncio.Task[None] | None = None
        self._unclean_due = 0.0
        self._after = -(10**9)  # the last day of the stretch that was compared last
        self.running = False

    @property
    def leads(self) -> bool:
        """Whether this instance has the lease, by its own clock."""
        return self._clock.monotonic() < self._leads_until

    async def run(self) -> None:
        """Round after round."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._hold())
            tasks.create_task(self._rounds())

    async def _hold(self) -> None:
        while True:
            interval = self._settings().interval
            if interval and self._due():
                pause = min(_RENEW, interval)
                await self._renew(max(_SHORTEST, _RENEWALS * pause))
                await self._clock.sleep(pause)
            else:
                self._leads_until = -math.inf
                await self._clock.sleep(_IDLE)

    async def _renew(self, seconds: float) -> None:
        """Ask for the lease; where it is lost, the round under way ends. An error leaves what is held to run out."""
        asked = self._clock.monotonic()
        try:
            held = await self._lease(seconds)
            self._leads_until = asked + seconds if held else -math.inf
        except StoreError as error:
            log.info("validation has no lease", extra={"store": error.store, "reason": error.reason})
        if not self.leads and self._round is not None:
            self._round.cancel()

    async def _rounds(self) -> None:
        began = self._clock.monotonic()
        last: float | None = None
        while True:
            await self._clock.sleep(min(_IDLE, self._settings().interval or _IDLE))
            interval, now = self._settings().interval, self._clock.monotonic()
            wait = min(_FIRST, interval) if last is None else interval
            if not interval or not self.leads or not self._due() or now - (began if last is None else last) < wait:
                continue
            last = now
            await self._led()

    async def _led(self) -> None:
        """One round, for as long as this instance leads."""
        task = self._round = asyncio.create_task(self.round(), name="validation round")
        try:
            await asyncio.wait([task])
        finally:
            self._round = None
            task.cancel()  # where it has not ended, this one was cancelled
            await asyncio.gather(task, return_exceptions=True)
        if task.cancelled():
            log.info("a validation was left: the lease is lost", extra={"instance": self._by})
        else:
            task.result()

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

"""Puts records into a store at the pace that it bears, and not a record more than was allowed.

Three brakes, whichever is tightest: ``retry.Pace`` (fewer at once and a learnt rate when the store throttles, back-off
while it is away, a slow start afterwards), a rate in records per second, and a capacity in DynamoDB's units per second
as the service reports them. A throttled record is tried again and counts as nothing; one that is refused as data is
halved down to, counted and left; the rest goes on.

FAILURE: while the store is away or blocked everything waits, probing; ``GaveUp`` after ``patience`` seconds in which
nothing was taken, so that a Job ends with an error that somebody sees, and at once where the first call is blocked.
``Halted`` when told to stop: what was taken until then is counted, and the caller's position has not moved.
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final

from sidecar import settings
from sidecar.clock import Clock
from sidecar.errors import RetryClass, StoreError
from sidecar.record import LogRecord
from sidecar.retry import Pace, State, Ticket
from sidecar.stores.base import Failure, FillResult, Store

_ATTEMPTS: Final = 3  # of a record that is refused for reasons unknown, alone
_LOOK: Final = 0.2  # seconds at most between two looks at orders and stop
_BURST: Final = 1.0  # seconds of capacity that may be used at once
_DATA: Final = frozenset({RetryClass.PERMANENT, RetryClass.UNKNOWN, RetryClass.CONFLICT})


Before = Callable[[Sequence[LogRecord]], Awaitable[None]]


class GaveUp(Exception):
    """A store took or gave nothing for too long; ``cause`` is what it said last."""

    def __init__(self, cause: StoreError) -> None:
        self.cause = cause
        super().__init__(str(cause))


class Halted(Exception):
    """Told to stop."""


class Capacity:
    """Units per second, spent after the fact: what a call cost is known when it is answered."""

    def __init__(self, units: float | None) -> None:
        self._units = units
        self._tokens = 0.0 if units is None else units * _BURST
        self._at: float | None = None
        self.consumed: dict[str, float] = {}

    def spend(self, consumed: Sequence[tuple[str, float]]) -> None:
        """Count what a call cost; the dearest of table and indexes is what is bounded."""
        for target, units in consumed:
            self.consumed[target] = self.consumed.get(target, 0.0) + units
        if self._units is not None:
            self._tokens -= max((units for _, units in consumed), default=0.0)

    def delay(self, now: float) -> float:
        """Seconds until the next call may go."""
        if self._units is None:
            return 0.0
        if self._at is not None:
            self._tokens = min(self._units * _BURST, self._tokens + (now - self._at) * self._units)
        self._at = now
        return 0.0 if self._tokens > 0 else (0.001 - self._tokens) / self._units


class Filler:
    """One per process and destination; safe for several workers of one event loop.

    Args:
        store: the destination.
        retry: back-off and probes.
        clock: time.
        rng: jitter.
        rate: records per second, None: no bound.
        units: capacity units per second, None: no bound.
        patience: seconds without anything taken until it gives up.
        before: awaited before each call that puts records, again where it raised StoreError: nothing is put until it
            has passed. Here it is noted that the records' days are written to.
    """

    def __init__(
        self,
        store: Store,
        retry: settings.Retry,
        *,
        before: Before,
        clock: Clock,
        rng: random.Random,
        rate: float | None,
        units: float | None,
        patience: float,
    ) -> None:
        self._store = store
        self._before = before
        self._clock = clock
        self._patience = patience
        self._batch = store.limits.max_records
        self.pace = Pace(retry, max(1, store.limits.max_in_flight), rng, clock.monotonic())
        self.pace.rate.manual = rate
        self.capacity = Capacity(units)
        self.copied = 0  # in this process; the checkpoint has the run's figures
        self._halt = asyncio.Event()
        self._changed = asyncio.Event()
        self._trouble: StoreError | None = None  # what the store said last, while it takes nothing
        self._trouble_since = 0.0
        self._answers = False  # it took something once
        self._not_before = 0.0  # when the rate allows a share that is worth a call

    def halt(self) -> None:
        """Let what is under way finish, begin nothing more."""
        self._halt.set()
        self._changed.set()

    @property
    def halted(self) -> bool:
        """Told to stop."""
        return self._halt.is_set()

    def order(self, *, paused_by: str | None, reason: str, rate: float | None) -> None:
        """An operator's orders as they are now."""
        pace = self.pace
        if paused_by != pace.paused_by:
            now = self._clock.monotonic()
            if paused_by is None:
                pace.resume(now)
            else:
                pace.pause(paused_by, reason, now)
        pace.rate.manual = rate
        self._changed.set()

    def parts(self, page: Sequence[LogRecord]) -> Iterator[Sequence[LogRecord]]:
        """A page in pieces that one call of the store takes."""
        return (page[at : at + self._batch] for at in range(0, len(page), self._batch))

    async def fill(self, records: Sequence[LogRecord], taken: Callable[[int, int], None]) -> list[tuple[str, Failure]]:
        """Put every record of a part that is not there; ``taken(stored, present)`` is told as it happens.

        Returns the refused ones by log_id. Raises Halted, GaveUp.
        """
        refused: list[tuple[str, Failure]] = []
        work = [list(records)]
        attempts: dict[str, int] = {}
        while work:
            part = work.pop()
            ticket = await self._permit(len(part))
            if ticket.records < len(part):
                work.append(part[ticket.records :])
                part = part[: ticket.records]
            told = False
            try:
                await self._before(part)
                told = True
                result = await self._store.fill(part)
            except StoreError as error:
                if told and error.retry_class in _DATA:
                    self._answered(ticket, 0)
                    self._divide(part, error, work, refused, attempts)
                else:
                    self._failed(ticket, error)
                    if error.retry_class is RetryClass.BLOCKED and not self._answers:
                        raise GaveUp(error) from None  # from the first call on: a wrong name, a missing right
                    work.append(part)
                continue
            except BaseException:
                self.pace.cancel(ticket)
                raise
            again = self._count(ticket, part, result, refused, taken)
            if again:
                work.append(again)
        return refused

    def _divide(
        self,
        part: list[LogRecord],
        error: StoreError,
        work: list[list[LogRecord]],
        refused: list[tuple[str, Failure]],
        attempts: dict[str, int],
    ) -> None:
        """A batch was refused whole: its halves next; a single record is refused for good, or tried again."""
        if len(part) > 1:
            half = len(part) // 2
            work += [part[half:], part[:half]]
            return
        log_id = part[0].log_id
        attempts[log_id] = attempts.get(log_id, 0) + 1
        if error.retry_class is RetryClass.UNKNOWN and attempts[log_id] < _ATTEMPTS:
            work.append(part)
        else:
            refused.append((log_id, Failure(0, error.retry_class, error.reason, error.code)))

    def _count(
        self,
        ticket: Ticket,
        part: list[LogRecord],
        result: FillResult,
        refused: list[tuple[str, Failure]],
        taken: Callable[[int, int], None],
    ) -> list[LogRecord]:
        """Tell pace, capacity and caller; what is to be tried again."""
        self.capacity.spend(result.consumed)
        stored = sum(result.stored)
        present = len(part) - stored - len(result.failures)
        throttled = [failure for failure in result.failures if failure.retry_class is RetryClass.THROTTLE]
        refused += [(part[f.index].log_id, f) for f in result.failures if f.retry_class is not RetryClass.THROTTLE]
        self.copied += stored
        taken(stored, present)
        if throttled:
            self.pace.throttled(ticket, stored + present, throttled[0].reason, self._clock.monotonic())
            if stored + present:
                self._trouble = None
            else:
                self._note(StoreError(self._store.name, RetryClass.THROTTLE, throttled[0].reason))
            self._changed.set()
        else:
            self._answered(ticket, stored + present)
        return [part[failure.index] for failure in throttled]

    def _answered(self, ticket: Ticket, taken: int) -> None:
        self._trouble = None
        self._answers = True
        self.pace.succeeded(ticket, taken, self._clock.monotonic())
        self._changed.set()

    def _failed(self, ticket: Ticket, error: StoreError) -> None:
        now = self._clock.monotonic()
        self._note(error)
        if error.retry_class is RetryClass.THROTTLE:
            self.pace.throttled(ticket, 0, error.reason, now)
        elif error.retry_class is RetryClass.BLOCKED:
            self.pace.failed(ticket, State.BLOCKED, str(error), now)
        else:
            self.pace.failed(ticket, State.DOWN, str(error), now)
        self._changed.set()

    def _note(self, trouble: StoreError) -> None:
        if self._trouble is None:
            self._trouble_since = self._clock.monotonic()
        self._trouble = trouble

    async def _permit(self, wanted: int) -> Ticket:
        while True:
            if self.halted:
                raise Halted
            now = self._clock.monotonic()
            if self._trouble is not None and now - self._trouble_since > self._patience:
                raise GaveUp(self._trouble)
            wait: float | None = max(self.capacity.delay(now), self._not_before - now)
            if wait is not None and wait <= 0:
                ticket = self.pace.permit(wanted, now)
                if ticket is not None:
                    if ticket.records < wanted:
                        self._not_before = now + (self.pace.delay(wanted, now) or 0.0)
                    return ticket
                wait = self.pace.delay(wanted, now)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK if wait is None else min(wait, _LOOK)):
                    await self._changed.wait()

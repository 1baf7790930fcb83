"""One shipper per store: takes frames from the spool, writes them in bounded parallel batches, settles them.

Shippers share nothing but the spool: an outage of one store changes nothing for the other. No order is promised.

The way of a record::

    cursor.take -> backlog -> chunk (<= limits) -> store.write -> stored: settled
                      ^                              |- throttle, transient, blocked: back to the backlog
                      |                              |- refused as a batch: halves, down to one record
                      '------------------------------'- refused alone: deferred or dead letter, then settled

Invariants
----------
1. A frame is settled exactly when each of its records was stored, deferred or dead-lettered; nothing else ends it.
2. Only a record that the store refused *alone* and *as data* becomes a dead letter.
3. What is held in memory is bounded by the window, whatever the backlog and however many records are deferred.
4. A store in trouble sees one call at a time (``retry.Pace``).

Failure at each stage: a crash anywhere loses only memory; unsettled frames are handed out again and the stores'
inserts are idempotent. A call whose answer was lost is repeated. A bug ends ``run`` with its exception: the owner
logs it, counts it and starts a new run, which begins again from what is settled on disk.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from sidecar import settings
from sidecar.backlog import Backlog, Chunk, Load, Piece, count, records_of, singles
from sidecar.clock import Clock
from sidecar.dead_letter import Brake
from sidecar.errors import RetryClass, StoreError
from sidecar.metrics import Metrics
from sidecar.retry import Pace, State, Ticket
from sidecar.spool import Cursor, Deferred, Leftover
from sidecar.stores.base import Failure, Store, WriteResult

log = logging.getLogger(__name__)

_LINGER: Final = 0.01  # seconds that a part-filled chunk waits for company while other calls are under way
_GATHER: Final = 0.025  # seconds between two looks into the spool that find less than a chunk
_BEGIN: Final = 4  # calls in a turn of the loop
_DEFERRED_POLL: Final = 0.2  # seconds
_UNKNOWN_IN_A_ROW: Final = 5  # singles of unknown meaning, nothing delivered between: the store is at fault
_GRACE_CODES: Final = frozenset({"23503"})  # the parent row may still come
_GRACE_TRIES: Final = 15  # spread over fk_grace: counted, not timed, so that no clock jump shortens it
WINDOW_BYTES: Final = 8 * settings.MIB
_BRAKE: Final = "most recent records were refused as data: the store's schema or rules are to blame, not the records"
_FULL: Final = "dead letters are at their bound: redrive or discard them"

_TROUBLE: Final[Mapping[RetryClass, State]] = {RetryClass.TRANSIENT: State.DOWN, RetryClass.BLOCKED: State.BLOCKED}
_LEVEL: Final[Mapping[State, int]] = {State.BLOCKED: logging.ERROR, State.DOWN: logging.WARNING}


class SpoolPort(Protocol):
    """What a shipper needs of the spool (see ``sidecar.spool``)."""

    def cursor(self, store: str) -> Cursor:
        """The store's way through the frames."""
        ...

    def take_back(self, store: str) -> None:
        """Hand out again what was taken and neither settled nor finished."""
        ...

    def awaited(self, store: str) -> asyncio.Event:
        """Set while somebody waits until the store has certain records."""
        ...

    def next_due_us(self, store: str) -> int | None:
        """When the next deferred record is due; None: there is none."""
        ...

    async def due(self, store: str, now_us: int, limit: int, max_bytes: int) -> Sequence[Deferred]:
        """Deferred records due at ``now_us``, within the bounds."""
        ...

    async def finish_deferred(self, item: Deferred, outcome: Leftover | None) -> None:
        """Delivered (None), deferred again, or a dead letter."""
        ...


@dataclass(frozen=True, slots=True)
class ShipperStatus:
    """What ``/status`` shows of one store's delivery."""

    state: State
    reason: str
    since_seconds: float
    in_flight: int
    in_flight_limit: int
    rate_limit: float  # records/s, inf where nothing limits
    delivered_per_second: float
    down_seconds: float
    paused_by: str | None


class Shipper:
    """Delivers one store's records. ``run`` until cancelled; one run at a time."""

    def __init__(
        self,
        store: Store,
        spool: SpoolPort,
        *,
        retry: Callable[[], settings.Retry],
        dead_letters_full: Callable[[], bool],
        clock: Clock,
        metrics: Metrics,
        rng: random.Random,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        """Join the parts.

        ``dead_letters_full`` looks at what is in the table. Letters of frames under way come on top, because a frame
        must be decided whole to be settled: so the bound is kept but for one window. ``window_bytes`` is that window:
        what is held. It cannot be released either, so keep it small beside the spool's cap.
        """
        self.name = store.name
        self.store = store
        self.spool = spool
        self.retry = retry
        self.dead_letters_full = dead_letters_full
        self.clock = clock
        self.metrics = metrics
        self.pace = Pace(retry(), store.limits.max_in_flight, rng, clock.monotonic())
        self.brake = Brake()
        self.window_bytes = window_bytes
        self._steady_us = clock.now_us() - int(clock.monotonic() * 1e6)
        self._run: _Run | None = None

    def steady_us(self) -> int:
        """Wall clock of this process's start plus what has passed since: no jump changes a retry (P11)."""
        return self._steady_us + int(self.clock.monotonic() * 1e6)

    def status(self) -> ShipperStatus:
        """A snapshot for people and metrics."""
        now = self.clock.monotonic()
        return ShipperStatus(
            state=self.pace.state(now),
            reason=self.pace.reason,
            since_seconds=now - self.pace.since,
            in_flight=self.pace.in_flight,
            in_flight_limit=self.pace.limit,
            rate_limit=self.pace.rate.current,
            delivered_per_second=self.pace.throughput.rate(now),
            down_seconds=self.pace.down_for(now),
            paused_by=self.pace.paused_by,
        )

    def wake(self) -> None:
        """Look again now: an operator changed the pace."""
        if self._run is not None:
            self._run.wake.set()

    async def run(self) -> None:
        """Deliver until cancelled. Raises SpoolFailed, or what a bug raises (as an ExceptionGroup)."""
        self.pace.restart()
        try:
            async with asyncio.TaskGroup() as group:
                self._run = _Run(self, self.spool.cursor(self.name), group)
                self._run.start()
        finally:
            self._run = None
            self.spool.take_back(self.name)


class _Run:
    """One run: the backlog in memory and the calls under way."""

    def __init__(self, owner: Shipper, cursor: Cursor, group: asyncio.TaskGroup) -> None:
        self._owner = owner
        self._store = owner.store
        self._pace = owner.pace
        self._clock = owner.clock
        self._cursor = cursor
        self._awaited = owner.spool.awaited(owner.name)
        self._group = group
        limits = owner.store.limits
        self._window = max(2 * limits.max_records * limits.max_in_flight, 1000)
        self._backlog = Backlog(limits, max_records=self._window, max_bytes=owner.window_bytes)
        self._seconds = owner.metrics.store_write_seconds.labels(owner.name)
        self._unknown = 0
        self._deferred_out = 0
        self._logged = State.UP
        self.wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def start(self) -> None:
        for part in (self._feed, self._feed_deferred, self._dispatch):
            self._group.create_task(part())

    # -- in ------------------------------------------------------------------------------------------------------

    async def _feed(self) -> None:
        while True:
            await self._room.wait()
            taken = 0
            for frame in await self._cursor.take(*self._backlog.room):
                if frame.records:
                    taken += len(frame.records)
                    self._take_in(Load(frame.records, frame.sizes, len(frame.records), frame=frame))
                else:  # all of it was quarantined
                    self._cursor.settle(frame)
            if taken < self._store.limits.max_records:
                await self._gather()

    async def _gather(self) -> None:
        """Let records gather: a call costs the same for one record and for twenty. Not while somebody waits for them.

        What comes after a quiet time is taken at once, so a lone record is never held back.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GATHER):
                await self._awaited.wait()

    async def _feed_deferred(self) -> None:
        first = True
        while True:
            due_us = self._owner.spool.next_due_us(self._owner.name)
            until = _DEFERRED_POLL if due_us is None or first else (due_us - self._owner.steady_us()) / 1e6
            await self._clock.sleep(min(max(until, _DEFERRED_POLL / 20), _DEFERRED_POLL))
            due_us = self._owner.spool.next_due_us(self._owner.name)
            # At the first look everything is due: stamps of an earlier run's clock decide nothing (P11).
            now_us = 2**62 if first else self._owner.steady_us()
            first = False
            if due_us is None or due_us > now_us or self._deferred_out:
                continue
            owner = self._owner
            for item in await owner.spool.due(owner.name, now_us, self._window, owner.window_bytes):
                self._deferred_out += 1
                self._take_in(Load([item.record], [item.size], 1, deferred=item))

    def _take_in(self, load: Load) -> None:
        self._backlog.add(load, self._clock.monotonic())
        if not self._backlog.has_room:
            self._room.clear()
        self.wake.set()

    # -- out -----------------------------------------------------------------------------------------------------

    async def _dispatch(self) -> None:
        """Begin calls, a few in a turn of the loop: many would hold up who waits for an answer, one falls behind."""
        loop = asyncio.get_running_loop()
        while True:
            self.wake.clear()
            for _ in range(_BEGIN):
                if (delay := self._start_call()) != 0.0:
                    break
            timer = None if delay is None else loop.call_later(delay, self.wake.set)
            await self.wake.wait()
            if timer is not None:
                timer.cancel()

    def _start_call(self) -> float | None:
        """Begin a call if one may; returns seconds until the next may: 0.0 after a call, None: an event decides."""
        if not (wanted := self._backlog.ready):
            return None
        self._pace.configure(self._owner.retry())
        now = self._clock.monotonic()
        if self._pace.in_flight and not self._backlog.full_chunk and not self._awaited.is_set():
            linger = self._backlog.oldest + _LINGER - now
            if linger > 0:
                return linger
        ticket = self._pace.permit(wanted, now)
        if ticket is None:
            return self._pace.delay(wanted, now)
        chunk = self._backlog.next_chunk(ticket.records, now)
        self._group.create_task(self._call(self._pace.narrowed(ticket, count(chunk)), chunk))
        return 0.0

    async def _call(self, ticket: Ticket, chunk: Chunk) -> None:
        started = self._clock.monotonic()
        try:
            result = await self._store.write(records_of(chunk))
        except StoreError as error:
            self._refused(ticket, chunk, error)
        else:
            self._answered(ticket, chunk, result)
        self._seconds.observe(self._clock.monotonic() - started)
        self._report()
        self.wake.set()

    # -- answers -------------------------------------------------------------------------------------------------

    def _answered(self, ticket: Ticket, chunk: Chunk, result: WriteResult) -> None:
        for target, units in result.consumed:
            self._owner.metrics.consumed_capacity.labels(target).inc(units)
        delivered = count(chunk) - len(result.failures)
        if delivered:
            self._unknown = 0
            self._owner.brake.delivered(delivered)
            if log.isEnabledFor(logging.DEBUG):
                self._name_delivered(chunk, result.failures)
        if result.failures:
            self._partly(ticket, chunk, result.failures, delivered)
            return
        self._pace.succeeded(ticket, delivered, self._clock.monotonic())
        for piece in chunk:
            self._decided(piece.load, len(piece))

    def _name_delivered(self, chunk: Chunk, failures: Sequence[Failure]) -> None:
        """A line of debugging for each record that the store has now (specification L105)."""
        failed = {failure.index for failure in failures}
        for index, record in enumerate(records_of(chunk)):
            if index not in failed:
                log.debug("delivered", extra={"store": self._owner.name, "log_id": record.log_id})

    def _partly(self, ticket: Ticket, chunk: Chunk, failures: Sequence[Failure], delivered: int) -> None:
        """The store named records that it did not take."""
        failed = {f.index: f for f in failures}
        blame = ""
        for index, single in enumerate(singles(chunk)):
            failure = failed.get(index)
            if failure is None:
                self._decided(single.load, 1)
            elif failure.retry_class in _TROUBLE or failure.retry_class is RetryClass.THROTTLE:
                self._again([single], failure.retry_class)
            else:
                blame = self._condemn(single, failure) or blame
        now = self._clock.monotonic()
        trouble = next((f for f in failures if f.retry_class in _TROUBLE), None)
        slow = next((f for f in failures if f.retry_class is RetryClass.THROTTLE), None)
        if blame:
            self._pace.blame(ticket, blame, now)
        elif trouble is not None:
            self._pace.failed(ticket, _TROUBLE[trouble.retry_class], _text(trouble), now)
        elif slow is not None:
            self._pace.throttled(ticket, delivered, _text(slow), now)
        else:
            self._pace.succeeded(ticket, delivered, now)

    def _refused(self, ticket: Ticket, chunk: Chunk, error: StoreError) -> None:
        """The whole call failed."""
        now = self._clock.monotonic()
        kind = error.retry_class
        if kind in _TROUBLE:
            self._pace.failed(ticket, _TROUBLE[kind], _text(error), now)
            self._again(chunk, kind)
        elif kind is RetryClass.THROTTLE:
            self._pace.throttled(ticket, 0, _text(error), now)
            self._again(chunk, kind)
        elif count(chunk) > 1:
            self._pace.succeeded(ticket, 0, now)  # it answered; which record it means, the halves will tell
            self._owner.metrics.store_retries.labels(self._owner.name, kind.value).inc()
            self._backlog.bisect(chunk)
        else:
            blame = self._condemn(chunk[0], Failure(0, kind, error.reason, error.code))
            if blame:
                self._pace.blame(ticket, blame, now)
            else:
                self._pace.succeeded(ticket, 0, now)

    def _condemn(self, single: Piece, failure: Failure) -> str:
        """One record, refused alone: later again, or a dead letter.

        Returns why the store is to blame instead (brake, bound, one unknown after the other), or ``""``; then the
        record goes behind all others, so that the next probe takes another one.
        """
        attempts = (single.load.deferred.attempts if single.load.deferred is not None else 0) + 1
        self._unknown += failure.retry_class is RetryClass.UNKNOWN
        wait = self._wait_before_next(failure, attempts)
        blame = ""
        if self._unknown >= _UNKNOWN_IN_A_ROW:
            blame = f"answers of unknown meaning in a row: {_text(failure)}"
        elif wait is None and self._owner.dead_letters_full():
            blame = _FULL
        elif wait is None and not self._owner.brake.allows():
            blame = _BRAKE
        if blame:
            self._backlog.give_back([single], self._clock.monotonic(), front=False)
            return blame
        self._leave_over(single, failure, attempts, wait)
        return ""

    def _wait_before_next(self, failure: Failure, attempts: int) -> float | None:
        """Seconds until this record is tried again alone; None: it is a dead letter."""
        config = self._owner.retry()
        if failure.retry_class is RetryClass.UNKNOWN and attempts < config.attempts:
            return config.delay * 2.0 ** (attempts - 1)
        if failure.code in _GRACE_CODES and attempts <= _GRACE_TRIES:
            return config.fk_grace / _GRACE_TRIES
        return None

    def _leave_over(self, single: Piece, failure: Failure, attempts: int, wait: float | None) -> None:
        kind: Literal["deferred", "dead_letter"] = "dead_letter" if wait is None else "deferred"
        self._owner.metrics.store_retries.labels(self._owner.name, failure.retry_class.value).inc()
        log.warning(
            "record not taken",
            extra={
                "store": self._owner.name,
                "log_id": single.records[0].log_id,
                "class": failure.retry_class.value,
                "reason": failure.reason,
                "code": failure.code,
                "attempts": attempts,
                "then": kind,
            },
        )
        single.load.leftovers.append(
            Leftover(
                position=single.start,
                kind=kind,
                retry_class=failure.retry_class.value,
                reason=failure.reason,
                code=failure.code,
                attempts=attempts,
                due_us=self._owner.steady_us() + int((wait or 0) * 1e6),
            )
        )
        self._decided(single.load, 1)

    def _again(self, chunk: Chunk, kind: RetryClass) -> None:
        self._owner.metrics.store_retries.labels(self._owner.name, kind.value).inc(count(chunk))
        self._backlog.give_back(chunk, self._clock.monotonic(), front=True)

    def _decided(self, load: Load, n: int) -> None:
        if not self._backlog.decided(load, n):
            return
        if self._backlog.has_room:
            self._room.set()
        if load.frame is not None:
            self._cursor.settle(load.frame, load.leftovers)
        elif load.deferred is not None:
            self._group.create_task(self._finish(load.deferred, load.leftovers[0] if load.leftovers else None))

    async def _finish(self, item: Deferred, outcome: Leftover | None) -> None:
        await self._owner.spool.finish_deferred(item, outcome)
        self._deferred_out -= 1

    def _report(self) -> None:
        """One line per change of state."""
        state = self._pace.state(self._clock.monotonic())
        if state is self._logged:
            return
        self._logged = state
        log.log(
            _LEVEL.get(state, logging.INFO),
            "store state",
            extra={"store": self._owner.name, "state": state.value, "reason": self._pace.reason},
        )


def _text(failure: Failure | StoreError) -> str:
    return f"{failure.reason} [{failure.code}]" if failure.code else failure.reason

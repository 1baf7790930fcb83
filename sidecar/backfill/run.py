"""One run: survey, copy, verify, close the gaps. It may be killed at any point and goes on from its checkpoint.

1. **Survey**: both stores side by side, hour by hour. Hours that are complete in the destination are left out; the
   rest is counted, so that progress has a total. Into DynamoDB every record of the source is *rehearsed* on the way:
   what it would refuse is known before anything is copied, and unless ``skip_refused`` says otherwise nothing is.
   A dry run ends here; into PostgreSQL it rehearses too, which is the question "could we go back?".
2. **Copy**: conditional puts only, so live traffic always wins and a repetition changes nothing.
   *Into DynamoDB* several hours at once, in an order without neighbours, each with a stream of its own: the partitions
   of its index are by day, and live traffic writes to today's. *Into PostgreSQL* one stream, ascending: its source
   reads its whole index for each stream, and rows that arrive in the order of time touch the fewest pages.
3. **Verify**: the open gap lines are read, then the hours are validated; where an hour is clean its lines are closed.

INVARIANTS

* The checkpoint says less than was done, never more (``checkpoint``).
* An hour's gap is closed only if the hour lies wholly in the job, was validated after its lines were read, and nothing
  in it is missing, different, or too young to say. An hour without records in the source has nothing to miss.
* Memory: two pages of each stream under way, the survey's runs, the suspects of one hour.

FAILURE of a store: reads and puts are tried again, with back-off, as long as something moves within ``patience``; then
``GaveUp``. A checkpoint that another process took over ends the run at once.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar.backfill.checkpoint import SAVE_SECONDS, Checkpoint, Keeper, Refusal, Stage
from sidecar.backfill.comparison import Validator, close, merged
from sidecar.backfill.filler import Filler, GaveUp, Halted
from sidecar.backfill.gaps import Gaps
from sidecar.backfill.hours import Hours
from sidecar.backfill.job import ORDER_END, Job, order
from sidecar.backfill.proof import Proof
from sidecar.backfill.reading import Reading
from sidecar.clock import Clock
from sidecar.errors import RetryClass, StoreError
from sidecar.phase import DYNAMODB
from sidecar.record import LogRecord
from sidecar.retry import Backoff
from sidecar.stores.base import HOUR_US, Failure, ScanEntry, Store, entry_of, position_of

WORKERS: Final = 8  # hours under way at once
_GRACE: Final = 2.0  # seconds that calls under way have when told to stop
_PASSES: Final = frozenset({RetryClass.TRANSIENT, RetryClass.THROTTLE, RetryClass.BLOCKED})
_Found = tuple[int, str, Failure]
"""Hour and log_id of a record that the rehearsal refused."""


@dataclass(slots=True)
class Parts:
    """What a run is made of; handed in by the wiring."""

    source: Store
    destination: Store
    filler: Filler
    reading: Reading
    keeper: Keeper
    gaps: Gaps
    validator: Validator
    clock: Clock
    backoff: Backoff
    visible_from: Callable[[], int]  # log_timestamp below which nothing is kept by one of the stores, microseconds
    patience: float  # seconds without any progress until it gives up
    skip_refused: bool = False
    stop: asyncio.Event = field(default_factory=asyncio.Event)


class Backfill:
    """One job's share of the work. ``run`` once."""

    def __init__(self, job: Job, parts: Parts, checkpoint: Checkpoint) -> None:
        """``checkpoint`` as ``Keeper.take`` gave it."""
        self.job = job
        self.parts = parts
        self.checkpoint = checkpoint
        self._moved_at = parts.clock.monotonic()
        self._only: frozenset[int] | None = None
        self._fallen: StoreError | None = None
        self._moves = False  # something was read or put by this process
        self.trouble = ""  # why reads are tried again now

    async def run(self) -> bool:
        """Everything that is left; True where all of it is in the destination, proved, and nothing was refused.

        False also where it was told to stop (``checkpoint.stage`` is then not ``done``). The checkpoint is saved.

        Raises:
            GaveUp: a store took or gave nothing for too long.
            StoreError: a store refuses to be asked at all, or (CONFLICT) another process took the checkpoint over.
        """
        saving = asyncio.create_task(self._save_often(), name="backfill-checkpoint")
        try:
            with contextlib.suppress(Halted):
                await self._stages()
        finally:
            saving.cancel()
            await asyncio.gather(saving, return_exceptions=True)
            await self._leave()
        if self._fallen is not None:
            raise self._fallen
        return self.checkpoint.good

    @property
    def left(self) -> int:
        """Records that the survey found missing and the copy has not come to yet."""
        seen = self.checkpoint
        return max(0, seen.missing - seen.copied) if seen.stage in ("survey", "copy") else 0

    def stop(self) -> None:
        """Let what is under way finish, save, and return from ``run``."""
        self.parts.stop.set()
        self.parts.filler.halt()

    async def _stages(self) -> None:
        if self.job.gaps_only:
            await self._persist(self.parts.gaps.read)
            self._only = frozenset(hour for hour in self.parts.gaps.hours if self.job.shard.holds(hour))
        seen = self.checkpoint
        if seen.stage == "survey":
            await self._persist(self._survey)
            refused = bool(seen.refused) and not self.parts.skip_refused
            await self._enter("done" if self.job.dry or refused else "copy")
        if seen.stage == "copy":
            if self.job.destination == DYNAMODB:
                await self._copy_by_hours()
            else:
                await self._persist(self._copy_in_order)
            await self._enter("verify")
        if seen.stage == "verify":
            await self._persist(self._verify)
            await self._enter("done")

    # --- survey ----------------------------------------------------------------------------------------------------

    async def _survey(self) -> None:
        seen, parts = self.checkpoint, self.parts
        start, end = self._range(seen.reached)
        if start >= end:
            return
        hours = Hours(seen.runs)
        found: list[_Found] = []
        rehearses = self.job.dry or self.job.destination == DYNAMODB
        scan = self._rehearsed(start, end, found) if rehearses else parts.source.scan(start, end, hours=self._wanted)
        hourly = merged(parts.reading.paced(scan), parts.destination.scan(start, end, hours=self._wanted))
        try:
            async for hour in hourly:
                hours.tell(hour.number, complete=hour.complete)
                seen.runs = hours.runs
                seen.looked_at += hour.records
                seen.missing += hour.missing
                self._refuse([each for each in found if each[0] <= hour.number])
                found[:] = [each for each in found if each[0] > hour.number]  # a page may reach into the next hours
                seen.reached = (hour.number + 1) * HOUR_US
                self._moved()
        finally:
            await close(hourly)

    async def _rehearsed(self, start: int, end: int, found: list[_Found]) -> AsyncIterator[ScanEntry]:
        """The source's entries; what the destination would refuse goes to ``found``."""
        async with aclosing(ahead(self.parts.source.stream(start, end, hours=self._wanted))) as pages:
            async for page in pages:
                for failure in await self.parts.destination.rehearse(page):
                    record = page[failure.index]
                    found.append((record.log_timestamp // HOUR_US, record.log_id, failure))
                for record in page:
                    yield entry_of(record)

    # --- copy ------------------------------------------------------------------------------------------------------

    async def _copy_by_hours(self) -> None:
        """Several hours at once, lowest order first; ``below`` follows the lowest that is not done."""
        seen = self.checkpoint
        done = set(seen.done_hours)
        rest = sorted({h for h in Hours(seen.runs) if self._wanted(h) and order(h) >= seen.below}, key=order)
        queue = iter([hour for hour in rest if hour not in done])
        lowest = 0

        async def work() -> None:
            nonlocal lowest
            for hour in queue:
                await self._persist(lambda hour=hour: self._copy_hour(hour))  # type: ignore[misc]  # bound at once
                seen.open_hours.pop(hour)
                done.add(hour)
                while lowest < len(rest) and rest[lowest] in done:
                    done.discard(rest[lowest])
                    lowest += 1
                seen.below = order(rest[lowest]) if lowest < len(rest) else ORDER_END
                seen.done_hours = sorted(done)

        await together([work() for _ in range(WORKERS)], failed=self.parts.filler.halt)

    async def _copy_hour(self, hour: int) -> None:
        seen = self.checkpoint
        start, end = self._range(None)
        start, end = max(hour * HOUR_US, start), min((hour + 1) * HOUR_US, end)
        after = seen.open_hours.setdefault(hour, None)
        async with aclosing(ahead(self.parts.source.stream(start, end, after=after))) as pages:
            async for page in pages:
                for part in self.parts.filler.parts(page):
                    await self._put(part)
                    seen.open_hours[hour] = position_of(part[-1])

    async def _copy_in_order(self) -> None:
        """One stream over all hours that have something to copy."""
        seen = self.checkpoint
        runs = Hours(seen.runs)
        wanted = frozenset(hour for hour in runs if self._wanted(hour))
        if not wanted:
            return
        start, end = self._range(None)
        start, end = max(start, min(wanted) * HOUR_US), min(end, (max(wanted) + 1) * HOUR_US)
        stream = self.parts.source.stream(start, end, after=seen.position, hours=wanted.__contains__)
        async with aclosing(ahead(stream)) as pages:
            async for page in pages:
                for part in self.parts.filler.parts(page):
                    await self._put(part)
                    seen.position = position_of(part[-1])

    async def _put(self, part: Sequence[LogRecord]) -> None:
        def taken(stored: int, present: int) -> None:
            self.checkpoint.copied += stored
            self.checkpoint.present += present
            if stored or present:
                self._moved()

        refused = await self.parts.filler.fill(part, taken)
        self._refuse([(0, log_id, failure) for log_id, failure in refused])

    # --- verify ----------------------------------------------------------------------------------------------------

    async def _verify(self) -> None:
        seen, parts = self.checkpoint, self.parts
        await parts.gaps.read()
        proof = Proof(self.checkpoint, parts.gaps, self._open_hours(seen.reached))
        start, end = self._range(seen.reached)
        if start < end:
            hourly = parts.validator(start, end, self._wanted)
            try:
                async for hour in hourly:
                    await proof.take(hour)
                    self._moved()
            finally:
                await close(hourly)
        await proof.finish()

    def _open_hours(self, reached: int | None) -> list[int]:
        """Hours with an open gap that this run can speak for, and has not yet."""
        first = (self.job.start if reached is None else reached) // HOUR_US
        return sorted(h for h in self.parts.gaps.hours if h >= first and self.job.covers(h) and self._wanted(h))

    # --- what all stages need --------------------------------------------------------------------------------------

    def _wanted(self, hour: int) -> bool:
        return self.job.shard.holds(hour) if self._only is None else hour in self._only

    def _range(self, reached: int | None) -> tuple[int, int]:
        """The time that is left of the job: from where an earlier process came to."""
        start, end = max(self.job.start, self.parts.visible_from()), self.job.end
        if self._only is not None:
            if not self._only:
                return start, start
            start, end = max(start, min(self._only) * HOUR_US), min(end, (max(self._only) + 1) * HOUR_US)
        return (start if reached is None else max(start, reached)), end

    def _refuse(self, found: Sequence[_Found]) -> None:
        for _, log_id, failure in found:
            self.checkpoint.refuse(Refusal(log_id, failure.reason), failure.code or failure.reason)

    def _moved(self) -> None:
        self._moved_at = self.parts.clock.monotonic()
        self._moves = True
        self.trouble = ""

    async def _enter(self, stage: Stage) -> None:
        seen = self.checkpoint
        seen.reached = None
        if stage == "done" and seen.stage == "survey":
            seen.left = seen.missing
        if stage == "copy":
            seen.refused, seen.refusals = {}, []  # the copy meets them again
        if stage == "done":
            seen.finished_us = self.parts.clock.now_us()
        seen.stage = stage
        await self._persist(lambda: self.parts.keeper.save(seen))

    async def _leave(self) -> None:
        """The last save; where it cannot be done, the one before holds, and says less."""
        if self._fallen is None:
            with contextlib.suppress(StoreError):
                await self.parts.keeper.save(self.checkpoint, leave=True)

    async def _persist(self, part: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do ``part``, again where a store is away; each part goes on from the checkpoint. Raises GaveUp, Halted."""
        parts = self.parts
        while True:
            try:
                await unless(part(), parts.stop)
            except StoreError as error:
                first = error.retry_class is RetryClass.BLOCKED and not self._moves  # a wrong name, a missing right
                if error.retry_class not in _PASSES or first:
                    raise
                self.trouble = str(error)
                if parts.clock.monotonic() - self._moved_at > parts.patience:
                    raise GaveUp(error) from None
                if parts.stop.is_set():  # what fails at once would else be tried for as long as the pauses are short
                    raise Halted from None
            else:
                parts.backoff.reset()
                return
            await unless(parts.clock.sleep(parts.backoff.next()), parts.stop)

    async def _save_often(self) -> None:
        """Keep the checkpoint near the truth, and obey orders; a store that is away is told by the work itself."""
        parts = self.parts
        own_rate = parts.filler.pace.rate.manual
        while True:
            try:
                orders = await parts.keeper.orders()
                rate = own_rate if orders.rate is None else orders.rate
                parts.filler.order(paused_by=orders.paused_by, reason=orders.reason, rate=rate)
                if orders.paused_by is not None:
                    self._moved_at = parts.clock.monotonic()
                await parts.keeper.save(self.checkpoint)
            except StoreError as error:
                if error.retry_class not in _PASSES:
                    self._fallen = error
                    self.stop()
                    return
            await parts.clock.sleep(SAVE_SECONDS)


async def ahead(pages: AsyncIterator[Sequence[LogRecord]]) -> AsyncGenerator[Sequence[LogRecord], None]:
    """The same pages; the next one is read while this one is worked on."""

    async def following() -> Sequence[LogRecord] | None:
        return await anext(pages, None)

    reading = asyncio.create_task(following())
    try:
        while page := await reading:
            reading = asyncio.create_task(following())
            yield page
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await close(pages)


async def unless(part: Awaitable[None], stop: asyncio.Event) -> None:
    """Await ``part``; when told to stop, only for a moment more. Raises Halted, or what it raised."""
    task = asyncio.ensure_future(part)
    told = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, told}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            await asyncio.wait({task}, timeout=_GRACE)
        if not task.done():
            raise Halted
        await task
    finally:
        for each in (task, told):
            each.cancel()
        await asyncio.gather(task, told, return_exceptions=True)


async def together(work: Sequence[Coroutine[Any, Any, None]], *, failed: Callable[[], None]) -> None:
    """Await all; at the first failure ``failed`` is called, and the others end by themselves. Raises that failure."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if any(task.done() and task.exception() for task in tasks):
            failed()
        errors = [e for e in await asyncio.gather(*tasks, return_exceptions=True) if e is not None]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if errors:
        raise next((error for error in errors if not isinstance(error, Halted)), errors[0])

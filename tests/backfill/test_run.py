"""Facts of a whole run on stores in memory: stopped anywhere, with stores that fail, it ends with everything there."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar import settings as configuration
from sidecar.backfill.checkpoint import Checkpoint, Keeper
from sidecar.backfill.comparison import Comparison
from sidecar.backfill.evidence import Copies
from sidecar.backfill.filler import Filler, GaveUp
from sidecar.backfill.gaps import Gaps
from sidecar.backfill.job import FIRST_US, Job, Shard
from sidecar.backfill.reading import Reading
from sidecar.backfill.run import Backfill, Parts
from sidecar.errors import RetryClass, StoreError
from sidecar.phase import DYNAMODB, POSTGRES, StoreName
from sidecar.record import LogRecord
from sidecar.retry import Backoff
from sidecar.stores.base import HOUR_US, FillResult, HourFilter, Position
from sidecar.stores.memory import MemoryStore
from sidecar.verdicts import CLOCKS, DAY_US, MemoryLedger, WrittenDays
from tests.backfill.fakes import Jobs, Picky, Time
from tests.backfill.test_parts import Ledger, line
from tests.stores.records import BASE, record

HOUR = BASE // HOUR_US


class Flaky(MemoryStore):
    """A source whose stream breaks off now and then."""

    def __init__(self, name: StoreName, rng: random.Random, breaks: int) -> None:
        super().__init__(name)
        self.rng = rng
        self.breaks = breaks

    async def stream(
        self, start: int, end: int, *, after: Position | None = None, hours: HourFilter | None = None
    ) -> AsyncIterator[Sequence[LogRecord]]:
        async for page in super().stream(start, end, after=after, hours=hours):
            for at in range(0, len(page), 7):
                if self.breaks and self.rng.random() < 0.2:
                    self.breaks -= 1
                    raise StoreError(self.name, RetryClass.TRANSIENT, "the connection failed")
                yield page[at : at + 7]


class Stand:
    """Two stores, a ledger, a place for checkpoints; ``run`` starts one process's worth of a job."""

    def __init__(self, job: Job, rng: random.Random, breaks: int = 0) -> None:
        self.rng = rng
        self.source = Flaky(job.source, rng, breaks)
        self.destination = Picky(job.destination, batch=10)
        self.ledger = Ledger()
        self.days = MemoryLedger()  # which days were written to, as the verdicts' ledger knows it
        self.jobs = Jobs()
        self.time = Time(BASE + 10_000 * HOUR_US)

    async def run(self, job: Job, *, stop_after: int | None = None, **changed: object) -> Checkpoint:
        """To its end, or stopped after so many steps of the event loop."""
        time = self.time
        keeper = Keeper(self.jobs, job.key, time)
        checkpoint = await keeper.take("run", dry=job.dry)
        retry = configuration.Retry(delay=0.001, max_delay=0.002)
        days = WrittenDays(self.days, time)
        filler = Filler(
            self.destination,
            retry,
            before=lambda part: days.before(r.log_timestamp for r in part),
            clock=time,
            rng=self.rng,
            rate=None,
            units=None,
            patience=10_000_000.0,
        )
        parts = Parts(
            source=self.source,
            destination=self.destination,
            filler=filler,
            reading=Reading(filler.pace, time),
            keeper=keeper,
            gaps=Gaps({POSTGRES: self.ledger}, job.destination),
            validator=Comparison(self.source, self.destination, settle_us=1, now_us=time.now_us),
            clock=time,
            backoff=Backoff(0.001, 0.002, self.rng),
            visible_from=lambda: FIRST_US,
            patience=10_000_000.0,
        )
        for name, value in changed.items():
            setattr(parts, name, value)
        run = Backfill(job, parts, checkpoint)
        task = asyncio.ensure_future(run.run())
        if stop_after is not None:
            for _ in range(stop_after):
                await asyncio.sleep(0)
            run.stop()
        await task
        return checkpoint


def history(rng: random.Random, number: int) -> list[LogRecord]:
    """Records of many hours, some with many and most with none."""
    hours = [rng.randrange(0, 3_000) for _ in range(12)]
    return [record(i, log_timestamp=BASE + rng.choice(hours) * HOUR_US + rng.randrange(HOUR_US)) for i in range(number)]


@pytest.mark.parametrize("ends", [(POSTGRES, DYNAMODB), (DYNAMODB, POSTGRES)], ids=["there", "back"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1 << 32), shards=st.integers(1, 3))
async def test_stopped_anywhere_with_stores_that_fail_it_ends_with_everything_there(
    ends: tuple[StoreName, StoreName], seed: int, shards: int
) -> None:
    """Each record is stored once, every gap closes, and the gates are told so; another run puts nothing."""
    rng = random.Random(seed)
    jobs = [Job(*ends, shard=Shard(index, shards)) for index in range(shards)]
    stand = Stand(jobs[0], rng, breaks=20)
    batch = history(rng, 150)
    await stand.source.write(batch)
    already = batch[: rng.randrange(80)]
    await stand.destination.put_if_absent(already)
    hours = {r.log_timestamp // HOUR_US for r in batch}
    await stand.ledger.put_gaps([line(hour, store=ends[1]) for hour in hours | {HOUR + 5_000}])
    stand.destination.plan = [rng.choice([None, "throttle", "half", "down"]) for _ in range(30)]
    for job in jobs:
        while (await stand.run(job, stop_after=rng.randrange(1, 400))).stage != "done":
            copied = await Copies(stand.jobs).copy(ends[1])
            assert copied is not None
            assert (copied.finished_us, copied.left) == (None, None)
    assert {r.log_id: r for r in await all_of(stand.destination)} == {r.log_id: r for r in batch}
    assert list(await stand.ledger.gaps()) == []
    copied = await Copies(stand.jobs).copy(ends[1])
    assert copied is not None
    assert (copied.left, dict(copied.refused), copied.finished_us is None) == (0, {}, False)
    assert copied.copied <= len(batch) - len(already)
    before = len(stand.destination.filled)
    for job in jobs:
        assert (await stand.run(job)).good
    assert len(stand.destination.filled) == before


class Killed(BaseException):
    """The end of the process, in the middle of a call."""


class Deadly(Picky):
    """Ends the process at some call, before or after it has stored; looks at what is noted whenever it stores."""

    def __init__(self, name: StoreName, stand: Stand, rng: random.Random) -> None:
        super().__init__(name, batch=10)
        self.stand, self.rng = stand, rng
        self.lives = 3

    async def fill(self, batch: Sequence[LogRecord]) -> FillResult:
        noted, now = await self.stand.days.writes(), self.stand.time.now_us()
        late = {r.log_timestamp // DAY_US for r in batch if noted.get(r.log_timestamp // DAY_US, 0) < now - CLOCKS // 4}
        assert not late
        dies = self.lives > 0 and self.rng.random() < 0.2
        self.lives -= dies
        if dies and self.rng.random() < 0.5:
            raise Killed
        self.stand.time.us += self.rng.choice((0, 3, 12)) * 1_000_000
        self.stand.time.seconds = self.stand.time.us / 1e6
        result = await super().fill(batch)
        if dies:
            raise Killed
        return result


@pytest.mark.parametrize("ends", [(POSTGRES, DYNAMODB), (DYNAMODB, POSTGRES)], ids=["there", "back"])
@pytest.mark.parametrize("seed", range(10))
async def test_a_day_is_noted_before_each_write_to_it_whatever_ends_the_process_then(
    ends: tuple[StoreName, StoreName], seed: int
) -> None:
    """A verdict that began before a write never stands: not after a kill between the note and the write, nor later."""
    rng = random.Random(seed)
    job = Job(*ends)
    stand = Stand(job, rng)
    await stand.source.write(history(rng, 150))
    stand.destination = Deadly(job.destination, stand, rng)
    for _ in range(4):
        with contextlib.suppress(Killed):
            assert (await stand.run(job)).good
    noted = await stand.days.writes()
    assert noted.keys() >= {r.log_timestamp // DAY_US for r in await all_of(stand.destination)}
    assert len(await all_of(stand.destination)) == 150
    assert (await stand.run(job)).good
    assert await stand.days.writes() == noted  # what is there already is not put, and nothing is overtaken


async def test_refused_records_stop_it_before_anything_is_copied_and_keep_their_gap() -> None:
    """The survey finds them; left out on demand, the others are copied and their hour's gap stays open."""
    job = Job(POSTGRES, DYNAMODB)
    stand = Stand(job, random.Random(1))
    batch = [record(i, log_timestamp=BASE + i * HOUR_US // 4) for i in range(40)]
    await stand.source.write(batch)
    await stand.ledger.put_gaps([line(HOUR), line(HOUR + 1)])
    stand.destination.refused = {batch[2].log_id}
    seen = await stand.run(job)
    assert (seen.good, seen.refused, seen.copied, stand.destination.filled) == (False, {"Refused": 1}, 0, [])
    assert seen.left == 40  # known to be missing
    seen = await stand.run(job, skip_refused=True)
    assert (seen.good, sum(seen.refused.values()), seen.copied, seen.left) == (False, 1, 39, 1)
    assert [each.hour for each in await stand.ledger.gaps()] == [HOUR]


async def test_a_verification_that_goes_on_closes_no_gap_of_the_hours_behind_it() -> None:
    """The process before judged them: an hour that was not clean stays open though it is not looked at again."""
    job = Job(POSTGRES, DYNAMODB)
    stand = Stand(job, random.Random(1))
    await stand.source.write([record(i, log_timestamp=BASE + i * HOUR_US) for i in range(3)])
    await stand.destination.write([record(i, log_timestamp=BASE + i * HOUR_US) for i in (1, 2)])
    await stand.ledger.put_gaps([line(HOUR), line(HOUR + 1), line(HOUR + 2)])
    before = Checkpoint(run="run", stage="verify", reached=(HOUR + 1) * HOUR_US, left=1)
    stand.jobs.kept[job.key] = (msgspec.json.encode(before), 3)
    seen = await stand.run(job)
    assert (seen.stage, seen.good, seen.left) == ("done", False, 1)
    assert [each.hour for each in await stand.ledger.gaps()] == [HOUR]


async def test_only_hours_with_a_gap_are_copied_back() -> None:
    """What the ledger does not name is not read, and not copied."""
    job = Job(DYNAMODB, POSTGRES, gaps_only=True)
    stand = Stand(job, random.Random(1))
    batch = [record(i, log_timestamp=BASE + i * HOUR_US // 4) for i in range(40)]
    await stand.source.write(batch)
    await stand.ledger.put_gaps([line(HOUR + 3, store=POSTGRES), line(HOUR + 7, store=POSTGRES), line(HOUR)])
    seen = await stand.run(job)
    assert (seen.good, seen.looked_at) == (True, 8)
    assert set(stand.destination.filled) == {r.log_id for r in batch if r.log_timestamp // HOUR_US - HOUR in (3, 7)}
    assert [(each.store, each.hour) for each in await stand.ledger.gaps()] == [(DYNAMODB, HOUR)]


async def test_a_dry_run_copies_nothing_and_answers_the_question_of_the_way_back() -> None:
    """Every record of the source is rehearsed; the gates read how many of them would be refused, and why."""
    job = Job(DYNAMODB, POSTGRES, dry=True)
    stand = Stand(job, random.Random(1))
    batch = [record(i, log_timestamp=BASE + i * HOUR_US // 4) for i in range(40)]
    await stand.source.write(batch)
    stand.destination.refused = {batch[2].log_id, batch[30].log_id}
    assert await Copies(stand.jobs).feasibility() is None
    seen = await stand.run(job)
    assert (seen.good, stand.destination.filled, [r.log_id for r in seen.refusals]) == (
        False,
        [],
        [batch[2].log_id, batch[30].log_id],
    )
    found = await Copies(stand.jobs).feasibility()
    assert found is not None
    assert (found.looked_at, dict(found.refused)) == (40, {"Refused": 2})
    assert await Copies(stand.jobs).copy(POSTGRES) is None  # a dry run is no copy
    stand.destination.refused = set()
    assert (await stand.run(job)).good


async def test_a_shard_that_has_not_ended_keeps_the_whole_copy_unfinished() -> None:
    """Two of three pods are done: the gates hear of no end, and not of what is left."""
    stand = Stand(Job(POSTGRES, DYNAMODB), random.Random(1))
    await stand.source.write([record(i, log_timestamp=BASE + i * HOUR_US) for i in range(30)])
    for index in (0, 2):
        await stand.run(Job(POSTGRES, DYNAMODB, shard=Shard(index, 3)))
    found = await Copies(stand.jobs).copy(DYNAMODB)
    assert found is not None
    assert (found.finished_us, found.left) == (None, None)
    assert 0 < found.copied < 30


async def test_it_gives_up_on_a_source_that_cannot_be_read() -> None:
    """With what the source said, and its checkpoint kept."""
    job = Job(POSTGRES, DYNAMODB)
    stand = Stand(job, random.Random(1), breaks=1 << 30)
    await stand.source.write([record(i, log_timestamp=BASE + i) for i in range(500)])
    with pytest.raises(GaveUp, match="the connection failed"):
        await stand.run(job, patience=1.0)
    assert (await Keeper(stand.jobs, job.key, stand.time).take("next")).run == "run"


async def test_a_stop_ends_it_although_every_read_fails_at_once() -> None:
    """Between two tries too, however short the pauses are; the test would not end without."""
    job = Job(POSTGRES, DYNAMODB)
    stand = Stand(job, random.Random(1))

    class Away(MemoryStore):
        async def stream(self, start, end, *, after=None, hours=None):
            raise StoreError(POSTGRES, RetryClass.TRANSIENT, "the connection failed")
            yield []  # a generator

    stand.source = Away(POSTGRES)  # type: ignore[assignment]  # what is asked of it
    seen = await asyncio.wait_for(stand.run(job, stop_after=100), 20)
    assert (seen.stage, seen.holder) == ("survey", "")


async def test_a_source_that_cannot_be_asked_at_all_is_told_at_once() -> None:
    """A wrong table or a missing right is not waited for; a store that is away for a moment is."""
    job = Job(POSTGRES, DYNAMODB)
    stand = Stand(job, random.Random(1))

    class Closed(MemoryStore):
        async def stream(self, start, end, *, after=None, hours=None):
            raise StoreError(POSTGRES, RetryClass.BLOCKED, "permission missing")
            yield []  # a generator

    stand.source = Closed(POSTGRES)  # type: ignore[assignment]  # what is asked of it
    with pytest.raises(StoreError, match="permission missing"):
        await stand.run(job)


async def all_of(store: MemoryStore) -> list[LogRecord]:
    """Everything."""
    return [r async for page in MemoryStore.stream(store, FIRST_US, 1 << 62) for r in page]

"""Facts of the backfill's parts: shards, runs of hours, checkpoints, the filler's brakes, comparison, proof."""

import asyncio
import random
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar import settings as configuration
from sidecar.backfill.checkpoint import Checkpoint, Keeper, Refusal, give_orders, read_orders
from sidecar.backfill.comparison import Comparison, Hour
from sidecar.backfill.filler import Before, Capacity, Filler, GaveUp, Halted
from sidecar.backfill.gaps import Gaps
from sidecar.backfill.hours import MOST, Hours
from sidecar.backfill.job import Job, Shard, order
from sidecar.backfill.proof import Proof
from sidecar.backfill.reading import READ_SHARE, Reading
from sidecar.errors import ConfigError, RetryClass, StoreError
from sidecar.gaps import GapLine
from sidecar.phase import DYNAMODB, POSTGRES
from sidecar.record import LogRecord
from sidecar.stores.base import HOUR_US, ScanEntry
from sidecar.stores.memory import MemoryStore
from tests.backfill.fakes import Jobs, Picky, Time
from tests.stores.records import BASE, record, records

HOUR = BASE // HOUR_US


class TestShards:
    """Which hours are whose."""

    @given(of=st.integers(1, 50), hours=st.lists(st.integers(-20_000_000, 80_000_000), max_size=50))
    def test_every_hour_is_of_exactly_one_shard(self, of: int, hours: list[int]) -> None:
        """Whatever the number of shards, and for hours of all years."""
        shards = [Shard(index, of) for index in range(of)]
        assert all(sum(shard.holds(hour) for shard in shards) == 1 for hour in hours)

    def test_shards_are_about_even_and_have_day_and_night(self) -> None:
        """A year of hours among 24 shards: within a quarter of even, and none has one hour of the day alone."""
        for index in range(24):
            mine = [hour for hour in range(HOUR, HOUR + 8760) if Shard(index, 24).holds(hour)]
            assert 0.75 < len(mine) / 365 < 1.25
            assert len({hour % 24 for hour in mine}) == 24

    def test_neighbouring_hours_are_far_apart_in_the_order(self) -> None:
        """Eight hours under way at once are of several days: today's partition is not all that is written to."""
        hours = sorted(range(HOUR, HOUR + 720), key=order)
        together = [{hour // 24 for hour in hours[at : at + 8]} for at in range(0, 720, 8)]
        assert sum(map(len, together)) / len(together) > 6

    @pytest.mark.parametrize("text", ["8/8", "1", "a/2", "-1/3", "1/0", "0/0", " 1/2", "1/2/3"])
    def test_a_shard_that_is_none_is_refused(self, text: str) -> None:
        """With what is allowed."""
        with pytest.raises(ConfigError, match="0/8 to 7/8"):
            Shard.parse(text)

    def test_an_hour_that_is_cut_by_the_range_is_not_covered(self) -> None:
        """Its gap cannot be closed: nobody looked at the rest of it."""
        job = Job(POSTGRES, DYNAMODB, start=BASE + 1, end=BASE + 3 * HOUR_US)
        assert [job.covers(HOUR + i) for i in range(4)] == [False, True, True, False]


class TestHours:
    """Runs of hours with something to copy."""

    @settings(max_examples=60)
    @given(st.dictionaries(st.integers(0, 3_000), st.booleans(), max_size=60))
    def test_every_incomplete_hour_is_inside_and_no_complete_one(self, told: dict[int, bool]) -> None:
        """Also when the walk is cut anywhere and goes on from the runs."""
        hours = Hours()
        for number, (hour, complete) in enumerate(sorted(told.items())):
            if number == len(told) // 2:
                hours = Hours(msgspec.json.decode(msgspec.json.encode(hours.runs), type=list[tuple[int, int]]))
            hours.tell(hour, complete=complete)
        inside = set(hours)
        assert {hour for hour, complete in told.items() if not complete} <= inside
        assert not {hour for hour, complete in told.items() if complete} & inside

    def test_a_row_of_the_year_one_does_not_make_a_run_of_millions(self) -> None:
        """Wide gaps break a run."""
        hours = Hours()
        hours.tell(-17_000_000, complete=False)
        hours.tell(HOUR, complete=False)
        assert list(hours) == [-17_000_000, HOUR]

    def test_runs_stay_few_and_lose_no_hour(self) -> None:
        """Every other hour of a year and more complete: runs are joined, what is incomplete stays inside."""
        hours = Hours()
        for hour in range(4 * MOST):
            hours.tell(hour, complete=hour % 2 == 0)
        assert len(hours.runs) <= MOST
        assert set(range(1, 4 * MOST, 2)) <= set(hours)


class TestCheckpoint:
    """Durable, ours alone, and never ahead."""

    async def test_an_unfinished_run_is_taken_over_and_a_finished_one_begins_anew(self) -> None:
        """What was kept comes back; after ``done`` the figures begin at nothing."""
        jobs, time = Jobs(), Time()
        first = Keeper(jobs, "k", time)
        seen = await first.take("one")
        seen.stage, seen.copied, seen.open_hours, seen.refusals = "copy", 7, {5: None}, [Refusal("i", "r")]
        await first.save(seen, leave=True)
        again = await Keeper(jobs, "k", time).take("two")
        assert (again.run, again.copied, again.open_hours, again.refusals) == ("one", 7, {5: None}, [Refusal("i", "r")])
        again.stage = "done"
        keeper = Keeper(jobs, "k", time)
        seen = await keeper.take("three")
        seen.stage = "done"
        await keeper.save(seen, leave=True)
        assert (await Keeper(jobs, "k", time).take("four")).run == "four"

    async def test_who_is_taken_over_fails_at_its_next_write(self) -> None:
        """Two processes with one shard: the later one goes on."""
        jobs, time = Jobs(), Time()
        first, second = Keeper(jobs, "k", time), Keeper(jobs, "k", time)
        seen = await first.take("one")
        await second.take("two")  # the same process id: a container that was started again
        with pytest.raises(StoreError) as caught:
            await first.save(seen)
        assert caught.value.retry_class is RetryClass.CONFLICT

    async def test_a_holder_that_goes_on_writing_is_not_taken_over(self) -> None:
        """The newcomer watches for a while and gives up; one that is silent loses it."""
        jobs, time = Jobs(), Time()
        value = msgspec.json.encode(Checkpoint(run="one", holder="elsewhere:1", stage="copy", copied=3))
        jobs.kept["k"] = (value, 4)
        assert (await Keeper(jobs, "k", time).take("two")).copied == 3
        jobs.kept["k"] = (value, 9)

        class Busy(Time):
            async def sleep(self, seconds: float) -> None:
                await super().sleep(seconds)
                jobs.kept["k"] = (value, 10)

        with pytest.raises(StoreError, match="elsewhere:1 is at work"):
            await Keeper(jobs, "k", Busy()).take("two")

    async def test_a_write_whose_answer_was_lost_is_ours(self) -> None:
        """It was done; the next one builds on it."""
        jobs, time = Jobs(), Time()
        keeper = Keeper(jobs, "k", time)
        seen = await keeper.take("one")

        def lose(when: str) -> None:
            if when == "after":
                jobs.fail = lambda _: None
                raise StoreError(DYNAMODB, RetryClass.TRANSIENT, "lost")

        jobs.fail = lose
        with pytest.raises(StoreError):
            await keeper.save(seen)
        seen.copied = 5
        await keeper.save(seen)
        assert msgspec.json.decode(jobs.kept["k"][0], type=Checkpoint).copied == 5

    async def test_a_checkpoint_that_is_none_blocks_and_a_restart_passes_over_it(self) -> None:
        """Named, with what to do; nothing is guessed of how far a run came."""
        jobs, time = Jobs(), Time()
        jobs.kept["k"] = (b'{"run": 7', 3)
        with pytest.raises(StoreError, match="--restart") as caught:
            await Keeper(jobs, "k", time).take("one")
        assert caught.value.retry_class is RetryClass.BLOCKED
        assert (await Keeper(jobs, "k", time).take("one", restart=True)).run == "one"

    async def test_orders_change_one_by_one(self) -> None:
        """A rate stays while a pause comes and goes."""
        jobs = Jobs()
        await give_orders(jobs, rate=5.0)
        await give_orders(jobs, paused_by="me", reason="lunch")
        await give_orders(jobs, paused_by=None, reason="")
        orders = await read_orders(jobs)
        assert (orders.rate, orders.paused_by) == (5.0, None)


async def unnoted(_records: Sequence[LogRecord]) -> None:
    """Nobody asks which days are written to."""


def filler(store: Picky, time: Time, *, before: Before = unnoted, **given: float | None) -> Filler:
    """Impatient enough for a test."""
    options: dict[str, float | None] = {"rate": None, "units": None, "patience": 60.0, **given}
    retry = configuration.Retry(delay=0.1, max_delay=1.0)
    rng = random.Random(1)
    return Filler(store, retry, before=before, clock=time, rng=rng, **options)  # type: ignore[arg-type]  # by name


class TestFiller:
    """Takes what it is given to the store, whatever that does."""

    @settings(max_examples=40, deadline=None)
    @given(plan=st.lists(st.sampled_from(["throttle", "half", "down", None]), max_size=6), number=st.integers(0, 60))
    async def test_everything_gets_in_and_is_counted_once(self, plan: list[str | None], number: int) -> None:
        """Throttled whole, throttled in part, away for a while: each record is stored, and told exactly once."""
        store = Picky()
        store.plan = list(plan)
        batch = records(number)
        told: list[tuple[int, int]] = []
        subject = filler(store, Time())
        for part in subject.parts(batch):
            task = asyncio.ensure_future(subject.fill(part, lambda s, p: told.append((s, p))))
            assert await drive(task, subject) == []
        assert [await store.get(r.log_id) for r in batch] == batch
        assert (sum(s for s, _ in told), sum(p for _, p in told)) == (number, 0)

    async def test_one_bad_record_is_refused_and_its_neighbours_are_stored(self) -> None:
        """The batch is halved down to it."""
        store = Picky()
        batch = records(25)
        store.refused = {batch[13].log_id}
        refused = await filler(store, Time()).fill(batch, lambda _s, _p: None)
        assert [(log_id, failure.code) for log_id, failure in refused] == [(batch[13].log_id, "23514")]
        assert len(store.filled) == 24

    async def test_what_was_there_is_present_and_stays(self) -> None:
        """Told apart from what this call stored."""
        store = Picky()
        live = record(3, user_id="live")
        await store.write([live])
        told: list[tuple[int, int]] = []
        await filler(store, Time()).fill(records(5), lambda s, p: told.append((s, p)))
        assert (told, await store.get(live.log_id)) == ([(4, 1)], live)

    async def test_it_gives_up_on_a_store_that_takes_nothing_for_too_long(self) -> None:
        """With what the store said."""
        store = Picky()
        store.plan = ["down"] * 10_000
        subject = filler(store, Time(), patience=5.0)
        with pytest.raises(GaveUp, match="the connection failed"):
            await drive(asyncio.ensure_future(subject.fill(records(3), lambda _s, _p: None)), subject)

    async def test_a_store_that_is_blocked_from_the_first_call_on_ends_it_at_once(self) -> None:
        """A missing right is told to whoever started it; one that is lost on the way is waited for."""
        store = Picky()
        store.plan = ["blocked"]
        with pytest.raises(GaveUp, match="permission missing"):
            await filler(store, Time()).fill(records(3), lambda _s, _p: None)
        store.plan = [None, "blocked", "blocked"]
        subject = filler(store, Time(), patience=600.0)
        for part in (records(30)[:25], records(30)[25:]):
            await drive(asyncio.ensure_future(subject.fill(part, lambda _s, _p: None)), subject)
        assert len(store.filled) == 30

    @pytest.mark.parametrize("retry_class", [RetryClass.TRANSIENT, RetryClass.THROTTLE, RetryClass.PERMANENT])
    async def test_nothing_is_put_before_its_day_is_noted_whatever_the_ledger_says(
        self, retry_class: RetryClass
    ) -> None:
        """The ledger's failure is never the record's: it is asked again, and the record is not refused."""
        store = Picky()
        failures = 3

        noted: list[str] = []

        async def before(part: Sequence[LogRecord]) -> None:
            nonlocal failures
            assert set(store.filled) <= set(noted)
            if failures:
                failures -= 1
                raise StoreError(DYNAMODB, retry_class, "planted")
            noted.extend(each.log_id for each in part)

        subject = filler(store, Time(), before=before)
        task = asyncio.ensure_future(subject.fill(records(5), lambda _s, _p: None))
        assert await drive(task, subject) == []
        assert (failures, len(store.filled)) == (0, 5)
        failures = 1 << 30
        store.filled.clear()
        impatient = filler(store, Time(), before=before, patience=5.0)
        with pytest.raises(GaveUp, match="planted"):
            await drive(asyncio.ensure_future(impatient.fill(records(3), lambda _s, _p: None)), impatient)
        assert store.filled == []

    async def test_a_halt_ends_it_between_two_calls(self) -> None:
        """Also while it is paused."""
        store = Picky()
        subject = filler(store, Time())
        subject.order(paused_by="me", reason="lunch", rate=None)
        task = asyncio.ensure_future(subject.fill(records(3), lambda _s, _p: None))
        await asyncio.sleep(0)
        subject.halt()
        with pytest.raises(Halted):
            await task
        assert store.filled == []

    def test_capacity_is_spent_after_the_fact_and_comes_back_with_time(self) -> None:
        """A second's worth at once; then a wait that fits what was used, of the dearest target."""
        capacity = Capacity(100.0)
        assert capacity.delay(0.0) == 0.0
        capacity.spend([("table", 250.0), ("service", 100.0)])
        assert capacity.delay(0.0) == pytest.approx(1.5, abs=0.01)
        assert capacity.delay(1.0) == pytest.approx(0.5, abs=0.01)
        assert capacity.delay(1.6) == 0.0
        assert capacity.consumed == {"table": 250.0, "service": 100.0}

    async def test_the_rate_is_kept(self) -> None:
        """Never more records than the rate allows for the time that went by, and a burst of a tenth of a second."""
        store, time = Picky(), Time()
        subject = filler(store, time, rate=100.0)
        for part in subject.parts(records(200)):
            await drive(asyncio.ensure_future(subject.fill(part, lambda _s, _p: None)), subject, time)
            assert len(store.filled) <= 100.0 * time.seconds + 11


class TestReading:
    """Surveys beside live traffic."""

    async def test_entries_come_at_a_multiple_of_the_rate_and_not_while_it_is_paused(self) -> None:
        """Never more than READ_SHARE times the rate for the time that went by, and a second's credit."""
        time = Time()
        subject = filler(Picky(), time, rate=100.0)
        store = MemoryStore()
        for at in range(0, 10_000, 1_000):
            await store.write([record(i, log_timestamp=BASE + i) for i in range(at, at + 1_000)])
        scan = Reading(subject.pace, time).paced(store.scan(BASE, BASE + 20_000))
        seen = 0
        async for _ in scan:
            seen += 1
            assert seen <= 100.0 * READ_SHARE * (time.seconds + 1.0) + 500
            if seen == 6_000:
                break
        assert time.seconds > 1.5
        subject.order(paused_by="me", reason="lunch", rate=100.0)
        held = asyncio.ensure_future(collect(scan))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not held.done()
        subject.order(paused_by=None, reason="", rate=None)
        assert await held == 4_000


async def collect(scan) -> int:
    """How many are left."""
    return len([entry async for entry in scan])


async def drive(task: "asyncio.Future[list[tuple[str, object]]]", subject: Filler, time: Time | None = None) -> object:
    """Let a fill go on while its clock is moved: nothing waits for real time."""
    clock = time or subject._clock
    assert isinstance(clock, Time)
    while not task.done():
        clock.seconds += 0.01
        subject._changed.set()
        await asyncio.sleep(0)
    return task.result()


class TestComparison:
    """What one store holds and the other lacks."""

    @settings(max_examples=40)
    @given(st.lists(st.sampled_from(["both", "left", "right", "differs", "young", "lagging"]), max_size=40))
    async def test_every_record_is_told_as_what_it_is(self, kinds: list[str]) -> None:
        """Missing, different, too young, or behind in the index alone; what only the destination has is not asked."""
        now = BASE + 100 * HOUR_US
        source, destination = MemoryStore(POSTGRES), Lagging()
        expected = {"missing": 0, "differing": 0, "young": 0, "records": 0}
        for i, kind in enumerate(kinds):
            at = now - 1 if kind == "young" else BASE + i * HOUR_US // 3
            each = record(i, log_timestamp=at)
            expected["records"] += kind != "right"
            expected["missing"] += kind == "left"
            expected["differing"] += kind == "differs"
            expected["young"] += kind == "young"
            if kind != "right":
                await source.write([each])
            if kind in ("both", "right", "lagging", "differs"):
                await destination.write([record(i, log_timestamp=at, user_id="x") if kind == "differs" else each])
            if kind == "lagging":
                destination.behind.add(each.log_id)
        compare = Comparison(source, destination, settle_us=60_000_000, now_us=lambda: now)
        hours = [hour async for hour in compare(BASE, now, lambda _: True)]
        assert {name: sum(getattr(hour, name) for hour in hours) for name in expected} == expected
        assert [hour.number for hour in hours] == sorted({hour.number for hour in hours})


class Lagging(MemoryStore):
    """Its scan does not see some records yet, as an index."""

    def __init__(self) -> None:
        super().__init__(DYNAMODB)
        self.behind: set[str] = set()

    async def scan(self, start, end, *, hours=None):
        async for entry in super().scan(start, end, hours=hours):
            if entry.log_id not in self.behind:
                yield entry


class Ledger:
    """A gap ledger in a dictionary."""

    def __init__(self, lines: Sequence[GapLine] = ()) -> None:
        self.lines = {line.key: line for line in lines}

    async def put_gaps(self, lines: Sequence[GapLine]) -> None:
        for line in lines:
            known = self.lines.get(line.key)
            self.lines[line.key] = line if known is None else known.merge(line)

    async def gaps(self) -> Sequence[GapLine]:
        return [line for line in self.lines.values() if line.open]


def line(hour: int, opened: int = 2, *, store=DYNAMODB, source: str = "a") -> GapLine:
    """An open one."""
    return GapLine(store=store, kind="history", hour=hour, source=source, opened=opened)


class TestProof:
    """Gaps close where an hour is clean, and nowhere else."""

    async def test_clean_and_empty_hours_close_and_unclean_ones_stay(self) -> None:
        """An hour without records has nothing to miss; another store's gaps are left alone."""
        ledger = Ledger([line(h) for h in (10, 11, 12, 13, 20)] + [line(11, store=POSTGRES)])
        gaps = Gaps({POSTGRES: ledger}, DYNAMODB)
        await gaps.read()
        seen = Checkpoint(run="r")
        proof = Proof(seen, gaps, [10, 11, 12, 13, 20])
        suspect = ScanEntry(0, "id", b"", b"")
        for hour in (
            Hour(10, records=3),
            Hour(11, records=3, missing=1, suspects=[suspect]),
            Hour(13, records=3, differing=1, suspects=[suspect]),
            Hour(14, records=3),
        ):
            await proof.take(hour)
        await proof.finish()
        assert {(each.store, each.hour) for each in await ledger.gaps()} == {
            (DYNAMODB, 11),
            (DYNAMODB, 13),
            (POSTGRES, 11),
        }
        assert (seen.left, seen.differing, seen.closed) == (1, 1, 6)

    async def test_what_is_opened_meanwhile_stays_open(self) -> None:
        """A line is closed up to what was seen of it; both ledgers that showed it are told."""
        first, second = Ledger([line(10)]), Ledger([line(10), line(10, source="b")])
        gaps = Gaps({POSTGRES: first, DYNAMODB: second}, DYNAMODB)
        await gaps.read()
        assert gaps.records(10) == 4
        await second.put_gaps([line(10, 5, source="b")])
        await gaps.close([10])
        assert [each.open for each in await first.gaps()] == []
        assert [(each.source, each.open) for each in await second.gaps()] == [("b", 3)]

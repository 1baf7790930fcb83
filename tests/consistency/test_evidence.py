"""What verdicts add up to, which writes overtake them, and the validation that never ends."""

import asyncio

import pytest

from sidecar.consistency import Options, Window
from sidecar.consistency.evidence import Validations
from sidecar.consistency.late import LateWrites
from sidecar.consistency.tail import Tail
from sidecar.errors import RetryClass, StoreError
from sidecar.gaps import GapLine
from sidecar.settings import Validation
from sidecar.verdicts import CLOCKS, DAY_US, DayVerdict, MemoryLedger, RunLine
from tests.consistency.stand import ConsistencyStand, Told, harm_memory
from tests.parts.sidecar import eventually
from tests.stores.records import record


class At:
    """A wall clock that stands where the test puts it; sleeping moves it."""

    def __init__(self, now_us):
        self.now = now_us

    def now_us(self):
        return self.now

    def monotonic(self):
        return self.now / 1e6

    async def sleep(self, seconds):
        self.now += int(seconds * 1e6)
        await asyncio.sleep(0)


NOW = 20_000 * DAY_US + DAY_US // 2
TODAY = NOW // DAY_US


def verdict(day, started=None, **changed):
    """Of a whole day, soon after it was over."""
    started = (day + 1) * DAY_US + 2 * CLOCKS if started is None else started
    values = {"finished_us": started + 5, "until_us": (day + 1) * DAY_US, "sql_records": 5, "dynamo_records": 5}
    return DayVerdict(day=day, started_us=started, **(values | changed))


async def known(*verdicts, everything_until=None):
    """A ledger after a run over everything."""
    ledger = MemoryLedger()
    end = (TODAY - 1) * DAY_US if everything_until is None else everything_until
    await ledger.put_run(
        RunLine(id="all", start_us=0, end_us=end, everything=True, started_us=end, finished_us=end + 1)
    )
    await ledger.put_days(verdicts)
    return ledger, Validations(ledger, At(NOW))


async def test_before_a_run_over_everything_nobody_knows_which_days_there_are():
    """Whatever single days say."""
    ledger = MemoryLedger()
    await ledger.put_days([verdict(TODAY - 1)])
    assert await Validations(ledger, At(NOW)).days() is None
    assert await Validations(ledger, At(NOW)).tail() is None


async def test_clean_is_the_sum_of_the_days_and_today_is_the_tails():
    """All days that are over are clean; the one that is not over is not among them."""
    _, evidence = await known(verdict(TODAY - 40), verdict(TODAY - 1), verdict(TODAY, until_us=NOW))
    found = await evidence.days()
    assert (found.days, found.unclean, found.stale) == (2, (), ())
    assert found.oldest_us == verdict(TODAY - 40).finished_us


@pytest.mark.parametrize(
    ("changed", "unclean", "stale"),
    [
        ({"reasons": {"missing_in_sql": 1}}, True, False),
        ({"reasons": {"in_flight_unknown": 1}}, False, True),
        ({"reasons": {"in_flight": 1}}, False, True),
        ({"reasons": {"expected_gap": 1}}, False, True),
        ({"reasons": {"dead_letter": 3, "acknowledged": 2, "expired": 9}}, False, False),
        ({"until_us": (TODAY - 1) * DAY_US + 5}, False, True),
    ],
)
async def test_a_days_verdict_is_clean_unclean_or_does_not_stand(changed, unclean, stale):
    """Differences, records that nobody could decide about, a day that was not over."""
    _, evidence = await known(verdict(TODAY - 1, **changed))
    found = await evidence.days()
    assert ((TODAY - 1) in found.unclean, (TODAY - 1) in found.stale) == (unclean, stale)


@pytest.mark.parametrize("after", [0, -CLOCKS + 1, 1])
async def test_a_write_to_the_day_overtakes_its_verdict_and_an_earlier_one_does_not(after):
    """Also one that another machine's clock puts a little before it."""
    ledger, evidence = await known(verdict(TODAY - 1))
    started = verdict(TODAY - 1).started_us
    await ledger.note_writes({TODAY - 1: started - CLOCKS - 1})
    assert (await evidence.days()).stale == ()
    await ledger.note_writes({TODAY - 1: started + after})
    assert (await evidence.days()).stale == (TODAY - 1,)
    await ledger.put_days([verdict(TODAY - 1, started + after + 2 * CLOCKS)])
    assert (await evidence.days()).stale == ()


async def test_a_day_without_a_verdict_since_the_run_over_everything_is_stale_and_so_is_one_only_written_to():
    """The first day after it, and a day of ten years ago that got its first record yesterday."""
    ledger, evidence = await known(verdict(TODAY - 1), everything_until=(TODAY - 3) * DAY_US + 7)
    await ledger.note_writes({TODAY - 3650: NOW - 1})
    assert (await evidence.days()).stale == (TODAY - 3650, TODAY - 3, TODAY - 2)


async def test_the_tail_is_the_newest_finished_run_that_reached_now_and_two_days_back():
    """One over an old window, a short one and one that failed are none."""
    ledger, evidence = await known(everything_until=5)
    line = {"start_us": NOW - 3 * DAY_US, "end_us": NOW, "started_us": NOW, "finished_us": NOW + 9}
    good = RunLine(
        id="good", **line, sql_records=7, dynamo_records=6, matched=5, reasons={"dead_letter": 1, "old_writer": 2}
    )
    await ledger.put_run(good)
    await ledger.put_run(RunLine(id="short", **{**line, "start_us": NOW - DAY_US, "started_us": NOW + 1}))
    await ledger.put_run(RunLine(id="old", **{**line, "end_us": NOW - DAY_US, "started_us": NOW + 2}))
    await ledger.put_run(RunLine(id="failed", **{**line, "finished_us": None, "started_us": NOW + 3}))
    tail = await evidence.tail()
    assert (tail.run, tail.compared, tail.unexpected, tail.clean) == ("good", 8, 2, False)


# --- late writes -----------------------------------------------------------------------------------------------------


async def test_records_of_days_that_are_over_are_noted_by_day_and_those_of_today_cost_nothing():
    """Exactly the days of the records, not those between."""
    ledger = MemoryLedger()
    late = LateWrites(ledger, At(NOW))
    today = [record(1, log_timestamp=TODAY * DAY_US)]
    late.accepted(TODAY * DAY_US, today, NOW)
    assert await late.flush()
    assert await ledger.writes() == {}
    old = [record(2, log_timestamp=5 * DAY_US), record(3, log_timestamp=9 * DAY_US + 1), *today]
    late.accepted(5 * DAY_US, old, NOW)
    assert await late.flush()
    assert await ledger.writes() == {5: NOW, 9: NOW}


async def test_what_the_ledger_does_not_take_is_kept_and_what_comes_meanwhile_too():
    """Nothing is forgotten while DynamoDB is away."""
    ledger = MemoryLedger()
    late = LateWrites(ledger, At(NOW))
    note = ledger.note_writes

    async def fail(days):
        late.accepted(5 * DAY_US, [record(2, log_timestamp=5 * DAY_US)], NOW + 1)
        raise StoreError("dynamodb", RetryClass.TRANSIENT, "away")

    late.accepted(4 * DAY_US, [record(1, log_timestamp=4 * DAY_US)], NOW)
    ledger.note_writes = fail
    assert not await late.flush()
    ledger.note_writes = note
    assert await late.flush()
    assert await ledger.writes() == {4: NOW, 5: NOW + 1}


async def test_a_start_notes_the_days_of_what_an_earlier_run_left():
    """A frame's first and last time, and the days of the last year between."""
    ledger = MemoryLedger()
    late = LateWrites(ledger, At(NOW))
    late.spans([(3 * DAY_US, 3 * DAY_US), ((TODAY - 2) * DAY_US, NOW)], NOW)
    await late.flush()
    assert set(await ledger.writes()) == {3, TODAY - 2, TODAY - 1}


# --- without end -----------------------------------------------------------------------------------------------------


class TailStand:
    """A tail over stores in memory."""

    def __init__(self, **settings):
        self.clock = At(NOW)
        self.stand = ConsistencyStand(clock=self.clock, whereabouts=Told())
        self.settings = Validation(**({"rate": 0.0} | settings))
        self.leads = True
        self.due = True
        self.finished = []
        self.tail = Tail(
            self.stand.validator,
            Validations(self.stand.ledger, self.clock),
            settings=lambda: self.settings,
            due=lambda: self.due,
            lease=self.lease,
            finished=self.finished.append,
            clock=self.clock,
            by="pod-1",
        )

    async def lease(self, _seconds):
        return self.leads


async def test_a_round_compares_from_a_midnight_two_days_back_to_now():
    """So that whole days get their verdicts; a record lost behind the sidecar is found."""
    found = TailStand()
    stand = found.stand
    batch = [record(n, log_timestamp=NOW - n * DAY_US // 4) for n in range(12)]
    await stand.write(batch)
    harm_memory(stand.stores["dynamodb"], [("delete", batch[3])])
    await found.tail.round()
    (line,) = found.finished
    assert (line.start_us, line.reasons, line.by) == ((TODAY - 2) * DAY_US, {"missing_in_dynamo": 1}, "pod-1")
    assert [d.day for d in await stand.ledger.days()] == [TODAY - 2, TODAY - 1, TODAY]


async def test_a_round_goes_on_with_the_oldest_days_that_do_not_stand():
    """A late write to an old day makes it stale; the next round makes it stand again, by itself."""
    found = TailStand()
    stand = found.stand
    await stand.write([record(n, log_timestamp=(TODAY - n) * DAY_US) for n in range(1, 40)])
    await stand.validator.run(Window.all_until(NOW), Options())
    await stand.ledger.note_writes({TODAY - 30: NOW, TODAY - 29: NOW, TODAY - 10: NOW})
    evidence = Validations(stand.ledger, found.clock)
    found.clock.now += 2 * CLOCKS
    assert (await evidence.days()).stale == (TODAY - 30, TODAY - 29, TODAY - 10)
    await found.tail.round()
    assert (await evidence.days()).stale == (TODAY - 10,)
    await found.tail.round()
    assert (await evidence.days()).stale == ()


async def test_days_that_stay_as_they_are_do_not_keep_others_from_their_turn():
    """A gap stays open over the oldest days; those after it are compared all the same, then the first ones again."""
    found = TailStand()
    stand = found.stand
    await stand.write([record(n, log_timestamp=(TODAY - n) * DAY_US) for n in range(1, 60)], "postgres")
    hour = [(TODAY - n) * 24 for n in range(1, 60)]
    stand.lines = [GapLine(store="dynamodb", kind="history", hour=h, source="fleet", opened=1) for h in hour]
    await stand.validator.run(Window.all_until(NOW), Options())
    starts = []
    for _ in range(3):
        found.finished.clear()
        await found.tail.round()
        starts.append(TODAY - found.finished[1].start_us // DAY_US)
    assert starts == [59, 28, 59]


@pytest.mark.parametrize("idle", ["no lease", "not due", "off"])
async def test_nothing_is_compared_without_the_lease_or_where_the_phase_has_one_store_or_switched_off(idle):
    """And as soon as it may, it is."""
    found = TailStand(interval=10.0)
    found.leads, found.due = idle != "no lease", idle != "not due"
    if idle == "off":
        found.settings = Validation(interval=0.0)
    task = asyncio.create_task(found.tail.run())
    try:
        for _ in range(3000):
            await asyncio.sleep(0)
        assert found.finished == []
        found.leads = found.due = True
        found.settings = Validation(interval=10.0)
        await eventually(lambda: len(found.finished) > 1)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def held_up(found):
    """Its next scan waits until ``go`` is set; ``begun`` says that it is there."""
    scan, begun, go = found.stand.stores["dynamodb"].scan, asyncio.Event(), asyncio.Event()

    async def waiting(*arguments, **options):
        begun.set()
        await go.wait()
        async for entry in scan(*arguments, **options):
            yield entry

    found.stand.stores["dynamodb"].scan = waiting
    return begun, go


async def test_a_lease_that_another_instance_has_taken_ends_the_round_under_way():
    """It leaves a line that it was stopped, no verdict, and leads no more; what it has to say comes from the other."""
    found = TailStand(interval=10.0)
    begun, _ = held_up(found)
    task = asyncio.create_task(found.tail.run())
    try:
        await asyncio.wait_for(begun.wait(), 5)
        assert found.tail.leads
        found.leads = False
        await eventually(lambda: not found.tail.running, what="the round ended")
        assert not found.tail.leads
        (line,) = await found.stand.ledger.runs(9)
        assert (line.outcome, line.finished_us, found.finished) == ("stopped", None, [])
        assert await found.stand.ledger.days() == []
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_an_instance_that_slept_beyond_its_lease_does_not_lead_until_it_has_asked():
    """By its own clock: it was stopped as a whole, and nobody told it. An error of the store does not end the lease."""
    found = TailStand(interval=10.0)
    await found.tail._renew(40.0)
    assert found.tail.leads

    async def away(_seconds):
        raise StoreError("dynamodb", RetryClass.TRANSIENT, "away")

    found.tail._lease = away
    await found.tail._renew(40.0)
    assert found.tail.leads
    found.clock.now += 41_000_000
    assert not found.tail.leads
    found.tail._lease = found.lease
    await found.tail._renew(40.0)
    assert found.tail.leads


async def test_a_store_that_fails_ends_the_round_and_not_the_validation():
    """The next round comes in its time."""
    found = TailStand(interval=10.0)
    get = found.stand.stores["dynamodb"].scan

    async def scan(*_args):
        raise StoreError("dynamodb", RetryClass.BLOCKED, "no permission")
        yield

    found.stand.stores["dynamodb"].scan = scan
    await found.tail.round()
    assert (found.finished, found.tail.running) == ([], False)
    found.stand.stores["dynamodb"].scan = get
    await found.tail.round()
    assert len(found.finished) == 1

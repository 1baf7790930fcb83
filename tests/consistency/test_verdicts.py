"""The ledger of verdicts: one contract for the reference in memory and for DynamoDB."""

import msgspec
import pytest

from sidecar.errors import RetryClass, StoreError
from sidecar.verdicts import DAY_US, DayVerdict, Example, MemoryLedger, RunLine, WrittenDays
from tests.backfill.fakes import Time


@pytest.fixture(params=["memory", "dynamodb"])
def ledger(request):
    """Each in turn, empty."""
    if request.param == "memory":
        return MemoryLedger()
    return request.getfixturevalue("dynamodb_store").verdicts


def verdict(day, started=1, **changed):
    """Of a whole day."""
    values = {"finished_us": started + 1, "until_us": (day + 1) * DAY_US, "sql_records": 5, "dynamo_records": 4}
    return DayVerdict(day=day, started_us=started, **(values | changed))


async def test_a_day_has_the_verdict_of_the_run_that_began_last(ledger):
    """Whatever the order of writing; days before 1970 sort before those after."""
    await ledger.put_days([verdict(3), verdict(20_000, 7, reasons={"missing_in_sql": 2}), verdict(-400)])
    await ledger.put_days([verdict(20_000, 6), verdict(3, 1, sql_records=9)])
    days = await ledger.days()
    assert [(d.day, d.started_us, d.sql_records) for d in days] == [(-400, 1, 5), (3, 1, 9), (20_000, 7, 5)]
    assert days[2].reasons == {"missing_in_sql": 2}


async def test_many_days_come_back(ledger):
    """More than are written at a time."""
    await ledger.put_days([verdict(day) for day in range(300)])
    assert [d.day for d in await ledger.days()] == list(range(300))


async def test_runs_are_read_newest_first_and_a_line_replaces_itself(ledger):
    """With everything that a resume needs."""
    example = Example(
        log_id="x", log_timestamp="t", reason="field_mismatch", fields=("a",), values={"postgres": {"a": 1}}
    )
    lines = [
        RunLine(id=f"r{n}", start_us=-5, end_us=9, started_us=n, today={"sql": 1}, examples=(example,))
        for n in range(5)
    ]
    for line in lines:
        await ledger.put_run(line)
    done = msgspec.structs.replace(lines[4], outcome="clean", finished_us=99)
    await ledger.put_run(done)
    assert await ledger.runs(3) == [done, lines[3], lines[2]]


async def test_the_last_finished_run_over_everything_is_kept_apart_from_the_others(ledger):
    """However many runs follow; one that did not finish, or had a window, is none."""
    assert await ledger.baseline() is None
    done = RunLine(id="all", start_us=0, end_us=9, everything=True, started_us=1, finished_us=2, outcome="clean")
    await ledger.put_run(done)
    await ledger.put_run(RunLine(id="half", start_us=0, end_us=9, everything=True, started_us=3))
    await ledger.put_run(RunLine(id="window", start_us=0, end_us=9, started_us=4, finished_us=5))
    assert await ledger.baseline() == done


async def test_the_latest_write_of_a_day_stays(ledger):
    """A smaller time that comes late changes nothing."""
    await ledger.note_writes({5: 100, -7: 1})
    await ledger.note_writes({5: 90, 6: 2})
    await ledger.note_writes({5: 101})
    assert await ledger.writes() == {-7: 1, 5: 101, 6: 2}


async def test_days_are_noted_before_a_write_and_again_while_it_goes_on(ledger):
    """Not for each batch: every ten seconds; a note that failed is not taken for one."""
    time = Time()
    days = WrittenDays(ledger, time)
    began = time.now_us()
    await days.before([3 * DAY_US, 3 * DAY_US + 5, -1])
    assert await ledger.writes() == {-1: began, 3: began}
    await time.sleep(9)
    await days.before([3 * DAY_US, 4 * DAY_US])
    assert await ledger.writes() == {-1: began, 3: began, 4: time.now_us()}
    await time.sleep(2)
    note = ledger.note_writes

    async def fail(_days):
        raise StoreError("dynamodb", RetryClass.TRANSIENT, "planted")

    ledger.note_writes = fail
    with pytest.raises(StoreError):
        await days.before([3 * DAY_US])
    ledger.note_writes = note
    await days.before([3 * DAY_US, 4 * DAY_US])
    assert await ledger.writes() == {-1: began, 3: time.now_us(), 4: began + 9_000_000}


async def test_a_damaged_item_is_an_error_and_not_an_empty_answer(dynamodb_store, dynamodb_settings):
    """Somebody wrote into the partition by hand."""
    async with dynamodb_store.wire.control() as client:
        item = {"pk": {"S": "validation"}, "sk": {"S": "day#10000001"}, "doc": {"S": "{"}}
        await client.put_item(TableName=dynamodb_settings.fleet_table, Item=item)
    with pytest.raises(StoreError, match="verdicts"):
        await dynamodb_store.verdicts.days()

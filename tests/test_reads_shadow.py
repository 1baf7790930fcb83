"""Shadow reads: each class counted, nothing leaked, off the path, backing off, and the probe."""

import asyncio
import contextlib
import json

import msgspec
import pytest

from sidecar.errors import RetryClass
from sidecar.phase import Phase
from sidecar.reads.pace import Pace
from sidecar.stores.base import ByApplication, ByCorrelation, ByService, CountQuery, ErrorsOn
from tests.parts.reads import ReadsStand
from tests.parts.sidecar import eventually
from tests.stores.records import BASE, DAY, log_id, record

APPLICATION = ByApplication(7)
ASKS = {
    "id": lambda r: r.get(log_id(3)),
    "application": lambda r: r.page(APPLICATION),
    "correlation": lambda r: r.page(ByCorrelation("corr-1")),
    "service": lambda r: r.page(ByService("orders", BASE, BASE + DAY)),
    "errors": lambda r: r.page(ErrorsOn(BASE // DAY)),
    "count": lambda r: r.count(CountQuery(BASE, BASE + DAY, "orders")),
}


@contextlib.asynccontextmanager
async def running(stand):
    """With the worker at work (and no probe)."""
    stand.configure(shadow_sample=1.0, shadow_probe=0.0)
    task = asyncio.create_task(stand.shadow.run())
    try:
        yield stand
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def compared(stand, number=1):
    """Wait for so many comparisons; what they were."""
    await eventually(lambda: sum(stand.shadowed().values()) == number, seconds=10)
    return stand.shadowed()


def batch():
    """Five failures with every key, long settled."""
    return [record(i, log_timestamp=BASE + i * 1_000_000, is_success=False) for i in range(5)]


@pytest.mark.parametrize("pattern", ASKS)
@pytest.mark.parametrize("phase", [Phase.DUAL_WRITE, Phase.DUAL_WRITE_READ_DYNAMO])
async def test_equal_stores_match_on_every_pattern(pattern, phase):
    """Both directions: the store that did not serve is asked and agrees."""
    async with running(ReadsStand(phase=phase)) as stand:
        await stand.write(batch())
        await ASKS[pattern](stand.reads)
        assert await compared(stand) == {(pattern, "match"): 1}
        assert stand.shadow.status()["last_mismatches"] == []


@pytest.mark.parametrize("pattern", ASKS)
async def test_a_record_that_the_other_store_lacks_is_missing(pattern):
    """Served and not there: counted as missing, named by id and not by value."""
    async with running(ReadsStand()) as stand:
        await stand.write(batch(), "postgres")
        await stand.write([r for r in batch() if r.log_id != log_id(3)], "dynamodb")
        await ASKS[pattern](stand.reads)
        assert await compared(stand) == {(pattern, "missing"): 1}
        (seen,) = stand.shadow.status()["last_mismatches"]
        assert seen.missing == (("1",) if pattern == "count" else (log_id(3),))
        assert (seen.served_by, seen.compared_with) == ("postgres", "dynamodb")


@pytest.mark.parametrize("pattern", ASKS)
async def test_a_record_that_only_the_other_store_has_is_extra(pattern):
    """The reverse."""
    async with running(ReadsStand()) as stand:
        await stand.write(batch(), "dynamodb")
        await stand.write([r for r in batch() if r.log_id != log_id(3)], "postgres")
        await ASKS[pattern](stand.reads)
        assert await compared(stand) == {(pattern, "extra"): 1}


@pytest.mark.parametrize("pattern", [p for p in ASKS if p != "count"])
async def test_other_content_is_field_and_no_value_is_shown(pattern):
    """The field is named, its values are not, anywhere in what /status shows."""
    async with running(ReadsStand()) as stand:
        await stand.write(batch(), "postgres")
        other = [msgspec.structs.replace(r, user_id="CANARY-1") if r.log_id == log_id(3) else r for r in batch()]
        await stand.write(other, "dynamodb")
        await ASKS[pattern](stand.reads)
        assert await compared(stand) == {(pattern, "field"): 1}
        shown = msgspec.json.encode(stand.shadow.status()).decode()
        assert "user_id" in shown
        assert "CANARY" not in shown
        assert "orders" not in shown


async def test_a_changed_time_is_field_though_the_record_moved_out_of_the_page():
    """A record that stands elsewhere with another timestamp is looked up by id: changed, neither missing nor extra."""
    async with running(ReadsStand()) as stand:
        await stand.write(batch(), "postgres")
        moved = [msgspec.structs.replace(r, log_timestamp=BASE - DAY) if r.log_id == log_id(4) else r for r in batch()]
        await stand.write(moved, "dynamodb")
        await stand.reads.page(ByService("orders", BASE, BASE + DAY))
        assert await compared(stand) == {("service", "field"): 1}
        (seen,) = stand.shadow.status()["last_mismatches"]
        assert list(seen.changed) == [log_id(4)]
        assert list(seen.changed[log_id(4)]) == ["log_timestamp"]


async def test_the_same_records_in_another_order_are_order():
    """The other store sorts wrongly."""
    async with running(ReadsStand()) as stand:
        await stand.write(batch())
        stand.stores["dynamodb"].twist = lambda name, answer: answer[::-1] if name == "query" else answer
        await stand.reads.page(APPLICATION)
        assert await compared(stand) == {("application", "order"): 1}


async def test_a_store_that_fails_is_error_with_its_reason():
    """Counted, shown with the reason, and the share of reads that is repeated halves."""
    async with running(ReadsStand()) as stand:
        stand.stores["dynamodb"].down(RetryClass.THROTTLE, "ThrottlingException")
        await stand.reads.page(APPLICATION)
        assert await compared(stand) == {("application", "error"): 1}
        assert stand.shadow.share == 0.5
        (seen,) = stand.shadow.status()["last_mismatches"]
        assert "planted by the test" in seen.reason


async def test_a_store_that_answers_late_or_never_is_slow():
    """Right but far later than the served answer, or not in time at all."""
    async with running(ReadsStand()) as stand:
        await stand.write(batch())

        def dawdle(_name, answer):
            stand.clock.slept += 3
            return answer

        stand.stores["dynamodb"].twist = dawdle
        await stand.reads.page(APPLICATION)
        assert await compared(stand) == {("application", "slow"): 1}
        stand.stores["dynamodb"].twist = None
        stand.stores["dynamodb"].gate.clear()
        stand.shadow._pace = Pace()
        stand.configure(timeout=0.05)
        await stand.reads.page(APPLICATION)
        assert await compared(stand, 2) == {("application", "slow"): 2}


async def test_a_difference_that_goes_by_itself_was_in_flight():
    """Not there at the first look, there at the second."""
    async with running(ReadsStand()) as stand:
        await stand.write(batch(), "postgres")
        looks = []

        def arrive(_name, answer):
            looks.append(answer)
            return answer if len(looks) > 1 else []

        await stand.write(batch(), "dynamodb")
        stand.stores["dynamodb"].twist = arrive
        await stand.reads.page(APPLICATION)
        assert await compared(stand) == {("application", "in_flight"): 1}
        assert stand.shadow.status()["last_mismatches"] == []


@pytest.mark.parametrize("why", ["pending", "young"])
async def test_a_record_that_may_be_on_its_way_is_in_flight_and_not_missing(why):
    """Owed by this sidecar, or younger than max_lag; one that is neither is a mismatch all the same."""
    async with running(ReadsStand()) as stand:
        at = stand.clock.now_us() if why == "young" else BASE
        await stand.write([record(1, log_timestamp=at)], "postgres")
        if why == "pending":
            stand.owed.add((log_id(1), "dynamodb"))
        await stand.reads.page(APPLICATION)
        assert await compared(stand) == {("application", "in_flight"): 1}
        await stand.write([record(2, log_timestamp=BASE)], "postgres")
        await stand.reads.page(APPLICATION)
        await compared(stand, 2)
        assert stand.shadowed()["application", "missing"] == 1
        assert stand.shadow.status()["last_mismatches"][0].missing == (log_id(2),)


@pytest.mark.parametrize("pattern", ASKS)
@pytest.mark.parametrize("lacking", ["dynamodb", "postgres"])
async def test_a_record_in_an_open_gap_of_the_store_that_lacks_it_is_no_mismatch(pattern, lacking):
    """The ledger's hour explains it, in both directions; a gap of the other store, or of another hour, does not."""
    hour = BASE // 3_600_000_000
    for gap, result in (
        ((lacking, hour), "expected_gap"),
        ((lacking, hour + 30), "missing" if lacking == "dynamodb" else "extra"),
        (("postgres" if lacking == "dynamodb" else "dynamodb", hour), "missing" if lacking == "dynamodb" else "extra"),
    ):
        async with running(ReadsStand()) as stand:
            stand.gaps.add(gap)
            await stand.write(batch(), "postgres" if lacking == "dynamodb" else "dynamodb")
            await stand.write([r for r in batch() if r.log_id != log_id(3)], lacking)
            await ASKS[pattern](stand.reads)
            assert await compared(stand) == {(pattern, result): 1}
            assert bool(stand.shadow.status()["last_mismatches"]) == (result != "expected_gap")


@pytest.mark.parametrize("pattern", ASKS)
@pytest.mark.parametrize("lacking", ["dynamodb", "postgres"])
async def test_a_record_that_the_store_which_lacks_it_keeps_no_longer_has_expired(pattern, lacking):
    """Time to live and retention explain it, each for its own store and only beyond its days."""
    mismatch = "missing" if lacking == "dynamodb" else "extra"
    for days, of, result in ((1, lacking, "expired"), (36_500, lacking, mismatch), (1, None, mismatch)):
        async with running(ReadsStand()) as stand:
            whose = of or ("postgres" if lacking == "dynamodb" else "dynamodb")
            stand.keep(whose, days)
            await stand.write(batch(), "postgres" if lacking == "dynamodb" else "dynamodb")
            await stand.write([r for r in batch() if r.log_id != log_id(3)], lacking)
            await ASKS[pattern](stand.reads)
            assert await compared(stand) == {(pattern, result): 1}
            assert bool(stand.shadow.status()["last_mismatches"]) == (result == mismatch)
            assert stand.shadow.totals() == {"compared": 1, "unexplained": int(result == mismatch)}


@pytest.mark.parametrize("phase", [Phase.SQL_ONLY, Phase.DYNAMO_ONLY])
async def test_no_other_store_is_read_where_the_phase_has_none(phase):
    """Phases 0 and 3 repeat nothing."""
    async with running(ReadsStand(phase=phase)) as stand:
        await stand.write(batch())
        for ask in ASKS.values():
            await ask(stand.reads)
        assert not await stand.shadow.probe()
        assert not stand.shadow._queue


async def test_the_served_answer_does_not_wait_for_the_other_store():
    """The other store hangs; every read is answered, and what cannot be queued is skipped and counted."""
    async with running(ReadsStand()) as stand:
        await stand.write(batch())
        stand.stores["dynamodb"].gate.clear()
        for _ in range(30):
            assert len((await stand.reads.page(APPLICATION)).value.entries) == 5
        assert stand.shadow.status()["skipped"]["queue"] in (21, 22)  # 8 queued, one perhaps under way
        stand.stores["dynamodb"].gate.set()


@pytest.mark.parametrize("why", ["lag", "throttled", "down", "blocked"])
async def test_a_store_in_trouble_is_left_alone(why):
    """No call reaches it; the skip is counted by its reason."""
    async with running(ReadsStand()) as stand:
        await stand.write(batch())
        stand.stores["dynamodb"].calls.clear()
        stand.trouble["dynamodb"] = why
        await stand.reads.page(APPLICATION)
        await eventually(lambda: stand.shadow.status()["skipped"] == {why: 1})
        assert stand.stores["dynamodb"].calls == []
        value = stand.metrics.registry.get_sample_value("sidecar_shadow_skipped_total", {"reason": why})
        assert value == 1


async def test_a_count_over_all_services_is_not_repeated():
    """It may read a whole index: counted as skipped, with its reason."""
    stand = ReadsStand()
    stand.configure(shadow_sample=1.0)
    await stand.reads.count(CountQuery(BASE, BASE + DAY))
    assert not stand.shadow._queue
    assert stand.shadow.status()["skipped"] == {"costly": 1}


async def test_a_share_of_nothing_repeats_nothing_and_a_share_of_some_repeats_about_so_many():
    """reads.shadow_sample is a share of the reads, and live."""
    stand = ReadsStand()
    stand.configure(shadow_sample=0.0)
    for _ in range(50):
        await stand.reads.get(log_id(1))
    assert not stand.shadow._queue
    stand.configure(shadow_sample=0.2)
    offered = 0
    for _ in range(500):
        await stand.reads.get(log_id(1))
        offered += len(stand.shadow._queue)
        stand.shadow._queue.clear()
    assert 60 < offered < 150


def test_the_share_halves_on_trouble_and_doubles_after_calm():
    """Down to a floor, and back up to all, not before half a minute of calm each."""
    pace = Pace()
    for _ in range(30):
        pace.trouble(0.0)
    assert pace.share == 1 / 1024
    pace.calm(29.0)
    assert pace.share == 1 / 1024
    for minute in range(1, 11):
        pace.calm(minute * 60.0)
    assert pace.share == 1.0


async def test_the_probe_reads_by_itself_where_nobody_reads_and_rotates_the_patterns():
    """An application that only writes: every pattern is compared, and a record lost behind the sidecar is found."""
    stand = ReadsStand()
    stand.configure(shadow_sample=0.01, shadow_probe=60.0)
    await stand.write(batch())
    task = asyncio.create_task(stand.shadow.run())
    try:
        wanted = {"id", "service", "application", "correlation", "errors"}
        await eventually(lambda: {p for p, r in stand.shadowed() if r == "match"} == wanted)
        assert set(stand.shadowed().values()) != {0}
        assert {r for _, r in stand.shadowed()} == {"match"}
        del stand.stores["dynamodb"]._store._records[log_id(2)]
        await eventually(lambda: any(r == "missing" for _, r in stand.shadowed()))
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_probe_does_nothing_without_records_or_with_the_serving_store_down():
    """No record, no question; a failure is a skip, not an end of the task."""
    stand = ReadsStand()
    stand.configure(shadow_sample=1.0)
    assert not await stand.shadow.probe()
    await stand.write(batch())
    stand.stores["postgres"].down()
    assert not await stand.shadow.probe()
    assert stand.shadow.status()["skipped"] == {"probe": 1}


async def test_large_answers_are_not_hoarded():
    """The queue holds at most 8 MiB of records, however few they are."""
    stand = ReadsStand()
    stand.configure(shadow_sample=1.0)
    await stand.write([record(i, request_data="x" * 300_000) for i in range(13)], "postgres")
    for _ in range(5):
        await stand.reads.page(APPLICATION)
    assert stand.shadow._bytes <= 8 * 1024 * 1024
    assert stand.shadow.status()["skipped"]["queue"] == 3


async def test_the_status_is_json():
    """What /status shows can be encoded."""
    async with running(ReadsStand()) as stand:
        await stand.write(batch(), "postgres")
        await stand.reads.page(APPLICATION)
        await compared(stand)
        assert json.loads(msgspec.json.encode(stand.shadow.status()))["results"] == {"missing": 1}

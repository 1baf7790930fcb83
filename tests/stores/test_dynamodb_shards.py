"""The shard schedule: agreed on by compare-and-set, changed ahead of time, never hiding a record."""

import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar import settings
from sidecar.errors import RetryClass, StoreError
from sidecar.stores.base import ByService
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.dynamodb_items import shard_of
from sidecar.stores.dynamodb_shards import FIRST_DAY, FORESIGHT_DAYS, MAX_AGE_SECONDS, REFRESH_SECONDS, Schedule
from tests.parts.dynamodb import DAY_US, NOON_US, newest_first, record, store_all
from tests.parts.fault_proxy import FaultProxy, Refuse

TODAY = NOON_US // DAY_US


class SteppedClock:
    """Time that moves when told."""

    def __init__(self, now_us: int) -> None:
        self.now = now_us
        self.seconds = 1000.0

    def now_us(self) -> int:
        """Where it stands."""
        return self.now

    def monotonic(self) -> float:
        """Where it stands."""
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        """Not here."""
        await asyncio.sleep(0)


def with_shards(options: settings.DynamoDB, shards: int) -> settings.DynamoDB:
    """The same tables, another number."""
    return msgspec.structs.replace(options, shards=shards)


async def test_the_first_schedule_holds_for_all_days(dynamodb_settings: settings.DynamoDB) -> None:
    """create() writes it from the settings; a second create() changes nothing."""
    store = DynamoDBStore(with_shards(dynamodb_settings, 7), clock=SteppedClock(NOON_US))
    assert "shard schedule: 7 a day" in await store.create()
    assert await store.create() == []
    check = {c.name: c for c in await store.check()}["shard schedule"]
    assert (check.ok, check.observed) == (True, "7 from 0001-01-01")
    await store.close()


@pytest.mark.parametrize("into_day", [0, DAY_US - 1])
async def test_a_change_begins_the_day_after_tomorrow(dynamodb_settings: settings.DynamoDB, into_day: int) -> None:
    """From the first to the last microsecond of a day; days before keep their number."""
    clock = SteppedClock(TODAY * DAY_US + into_day)
    for shards in (4, 9):
        store = DynamoDBStore(with_shards(dynamodb_settings, shards), clock=clock)
        done = await store.create()
        await store.close()
    assert done == ["shard schedule: 4 -> 9 a day from 2024-10-06 on"]


async def test_a_change_of_a_change_follows_it_by_a_day(dynamodb_settings: settings.DynamoDB) -> None:
    """No entry is ever taken back: a writer may have used it for a record stamped ahead."""
    clock = SteppedClock(NOON_US)
    for shards in (4, 9, 6):
        store = DynamoDBStore(with_shards(dynamodb_settings, shards), clock=clock)
        await store.create()
        observed = {c.name: c.observed for c in await store.check()}["shard schedule"]
        await store.close()
    assert observed == "4 from 0001-01-01, 9 from 2024-10-06, 6 from 2024-10-07"


async def test_of_rivals_who_change_it_none_is_lost_half_way(dynamodb_settings: settings.DynamoDB) -> None:
    """Compare-and-set: the schedule is one of theirs, whole, and everybody reads the same."""
    stores = [DynamoDBStore(with_shards(dynamodb_settings, n), clock=SteppedClock(NOON_US)) for n in range(1, 7)]
    await stores[0].create()
    outcomes = await asyncio.gather(*(store.create() for store in stores[1:]), return_exceptions=True)
    assert all(isinstance(o, list) or (isinstance(o, StoreError) and o.code == "ShardSchedule") for o in outcomes)
    (seen,) = {c.observed for store in stores for c in await store.check() if c.name == "shard schedule"}
    entries = [entry.partition(" from ") for entry in seen.split(", ")]
    assert len(entries) == 1 + sum(isinstance(outcome, list) for outcome in outcomes)
    assert {int(count) for count, _, _ in entries[1:]} == {
        n for n, outcome in enumerate(outcomes, 2) if isinstance(outcome, list)
    }
    for store in stores:
        await store.close()


@pytest.mark.parametrize(("before", "after"), [(2, 8), (8, 2)])
async def test_no_record_is_hidden_by_a_change(dynamodb_settings: settings.DynamoDB, before: int, after: int) -> None:
    """Nor one written by the old number for a day of the new one: stamped ahead, or with a stale copy."""
    clock = SteppedClock(NOON_US)
    old = DynamoDBStore(with_shards(dynamodb_settings, before), clock=clock)
    await old.create()
    batch = [record(log_timestamp=NOON_US + day * DAY_US) for day in range(5) for _ in range(12)]
    await store_all(old, batch[:30])
    new = DynamoDBStore(with_shards(dynamodb_settings, after), clock=clock)
    await new.create()
    await store_all(old, batch[30:45])
    await store_all(new, batch[45:])
    query = ByService("orders", NOON_US, NOON_US + 5 * DAY_US)
    assert await new.query(query, before=None, limit=100) == newest_first(batch)
    await old.close()
    await new.close()


async def test_a_copy_is_read_again_after_a_while_and_serves_while_the_table_is_away(
    dynamodb_store: DynamoDBStore, dynamodb_proxy: FaultProxy, dynamodb_settings: settings.DynamoDB
) -> None:
    """One read for many writes; an unreachable fleet table stops writes only when the copy is too old."""
    clock = SteppedClock(NOON_US)
    options = msgspec.structs.replace(dynamodb_settings, endpoint_url=dynamodb_proxy.url)
    store = DynamoDBStore(options, clock=clock)
    for _ in range(3):
        await store.write([record()])
    assert dynamodb_proxy.calls["GetItem"] == 1
    clock.seconds += REFRESH_SECONDS
    await store.write([record()])
    assert dynamodb_proxy.calls["GetItem"] == 2
    dynamodb_proxy.on("GetItem", Refuse(500, "InternalServerError"))
    clock.seconds += MAX_AGE_SECONDS - 1
    await store.write([record()])
    clock.seconds += 1
    with pytest.raises(StoreError) as caught:
        await store.write([record()])
    assert caught.value.retry_class is RetryClass.TRANSIENT
    await store.close()


async def test_a_missing_schedule_blocks_and_is_not_invented(
    dynamodb_store: DynamoDBStore, dynamodb_settings: settings.DynamoDB
) -> None:
    """Its loss is said; what an earlier one had spread must be found again."""
    key = {"pk": {"S": "shards"}, "sk": {"S": "schedule"}}
    async with dynamodb_store.wire.control() as client:
        await client.delete_item(TableName=dynamodb_settings.fleet_table, Key=key)
    for call in (
        dynamodb_store.write([record()]),
        dynamodb_store.query(ByService("orders", 0, 1), before=None, limit=1),
        dynamodb_store.ping(),
    ):
        with pytest.raises(StoreError, match="no shard schedule") as caught:
            await call
        assert caught.value.retry_class is RetryClass.BLOCKED
    assert not {c.name: c.ok for c in await dynamodb_store.check()}["shard schedule"]


@pytest.mark.parametrize(
    "entries",
    [{}, {"2024-01-01": {"N": "4"}}, {"0001-01-01": {"N": "0"}}, {"0001-01-01": {"N": "x"}}, {"soon": {"N": "4"}}],
    ids=str,
)
async def test_an_unreadable_schedule_blocks(
    dynamodb_store: DynamoDBStore, dynamodb_settings: settings.DynamoDB, entries: dict[str, dict[str, str]]
) -> None:
    """Never read as some number of shards."""
    item = {"pk": {"S": "shards"}, "sk": {"S": "schedule"}, "v": {"N": "2"}, "entries": {"M": entries}}
    if "x" in str(entries):
        item["entries"] = {"M": {"0001-01-01": {"S": "4"}}}
    async with dynamodb_store.wire.control() as client:
        await client.put_item(TableName=dynamodb_settings.fleet_table, Item=item)
    with pytest.raises(StoreError, match="unreadable") as caught:
        await dynamodb_store.ping()
    assert caught.value.retry_class is RetryClass.BLOCKED


_counts = st.integers(1, 64)
_days = st.integers(FIRST_DAY + 1, TODAY + 100)


@given(_counts, st.lists(st.tuples(_days, _counts), max_size=5), st.integers(FIRST_DAY, TODAY + 200), st.uuids())
def test_readers_look_where_writers_wrote(first: int, changes: list[tuple[int, int]], day: int, log_id: object) -> None:
    """Whichever version a writer had when a change lay at most FORESIGHT_DAYS behind the record's day."""
    versions = [Schedule(1, (FIRST_DAY,), (first,))]
    for at, count in sorted(changes):
        versions.append(versions[-1].changed(at, count))
    latest = versions[-1]
    assert latest.shards(day) <= latest.fan_out(day)
    for version in versions:
        if version is latest or day - versions[version.version].days[-1] < FORESIGHT_DAYS:
            assert shard_of(str(log_id), version.shards(day)) < latest.fan_out(day)

"""Writing: what one call takes, what it reports, and what has no second effect."""

import asyncio

import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.errors import RetryClass, StoreError
from sidecar.stores import dynamodb_items as items
from sidecar.stores.dynamodb import MAX_BATCH_BYTES, MAX_REQUEST_BYTES, DynamoDBStore
from tests.parts.dynamodb import record
from tests.parts.fault_proxy import FaultProxy, LoseReply, Raw, Refuse, Unprocess


async def test_a_batch_is_one_call_and_every_record_is_there(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """25 records, one BatchWriteItem."""
    batch = [record() for _ in range(25)]
    result = await dynamodb_behind_proxy.write(batch)
    assert not result.failures
    assert (dynamodb_proxy.calls["BatchWriteItem"], dynamodb_proxy.applied["BatchWriteItem"]) == (1, 25)
    assert [await dynamodb_behind_proxy.get(r.log_id) for r in batch] == batch


async def test_an_empty_batch_needs_no_call(dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy) -> None:
    """Nothing to do, nothing sent."""
    assert not (await dynamodb_behind_proxy.write([])).failures
    assert await dynamodb_behind_proxy.put_if_absent([]) == []
    assert dynamodb_proxy.calls["BatchWriteItem"] == 0


async def test_unprocessed_items_are_throttled_failures_of_their_records(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """Exactly the records that were not applied, by their index; the rest is stored."""
    dynamodb_proxy.on("BatchWriteItem", Unprocess(share=0.4))
    batch = [record() for _ in range(10)]
    result = await dynamodb_behind_proxy.write(batch)
    assert sorted(f.index for f in result.failures) == list(range(4, 10))
    assert {(f.retry_class, f.code) for f in result.failures} == {(RetryClass.THROTTLE, "UnprocessedItems")}
    stored = [await dynamodb_behind_proxy.get(r.log_id) for r in batch]
    assert stored == batch[:4] + [None] * 6


async def test_a_table_that_takes_r_items_a_second_gets_no_more(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """What the rate does not allow comes back as unprocessed, and is there after enough repetitions."""
    dynamodb_proxy.limit("BatchWriteItem", items_per_second=40)
    left = [record() for _ in range(25)] + [record() for _ in range(25)]
    calls = 0
    while left:
        batch = left[:25]
        failures = (await dynamodb_behind_proxy.write(batch)).failures
        left = [batch[f.index] for f in failures] + left[25:]
        calls += 1
    assert dynamodb_proxy.applied["BatchWriteItem"] == 50
    assert dynamodb_proxy.items["BatchWriteItem"] > 50
    assert calls > 2


@pytest.mark.parametrize(("count", "allowed"), [(25, True), (26, False)])
async def test_more_than_25_records_are_refused_before_sending(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy, count: int, allowed: bool
) -> None:
    """PERMANENT: the shipper halves the batch."""
    batch = [record() for _ in range(count)]
    if allowed:
        await dynamodb_behind_proxy.write(batch)
    else:
        with pytest.raises(StoreError, match="allowed: 25") as caught:
            await dynamodb_behind_proxy.write(batch)
        assert caught.value.retry_class is RetryClass.PERMANENT
    assert dynamodb_proxy.calls["BatchWriteItem"] == int(allowed)


async def test_one_id_twice_in_a_batch_is_refused_before_sending(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """The service refuses it as invalid; emulators do not."""
    value = record()
    with pytest.raises(StoreError) as caught:
        await dynamodb_behind_proxy.write([value, msgspec.structs.replace(value, user_id="other")])
    assert caught.value.retry_class is RetryClass.PERMANENT
    assert dynamodb_proxy.calls["BatchWriteItem"] == 0


async def test_an_item_over_400_kb_fails_alone(dynamodb_store: DynamoDBStore) -> None:
    """Its neighbours are stored by the same call."""
    batch = [record(), record(request_data="x" * items.MAX_ITEM_BYTES), record()]
    result = await dynamodb_store.write(batch)
    assert [(f.index, f.retry_class) for f in result.failures] == [(1, RetryClass.PERMANENT)]
    assert [await dynamodb_store.get(r.log_id) for r in batch] == [batch[0], None, batch[2]]
    assert [f.index for f in (await dynamodb_store.write(batch[1:2])).failures] == [0]


def test_a_batch_within_the_limits_is_never_over_16_mb() -> None:
    """However many characters need escapes: six bytes for one is the worst."""
    worst = record(request_data="\x01" * 80_000)
    body = items.encode_item(worst, 64, 36_500)
    assert len(body) > 6 * 80_000
    assert (MAX_BATCH_BYTES // 80_000) * len(body) < MAX_REQUEST_BYTES


async def test_a_request_over_16_mb_is_refused_before_sending(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """Whoever ignores ``limits`` is told so, and halves."""
    with pytest.raises(StoreError) as caught:
        await dynamodb_behind_proxy.write([record(request_data="\x01" * 200_000) for _ in range(25)])
    assert (caught.value.retry_class, caught.value.code) == (RetryClass.PERMANENT, "RequestTooLarge")
    assert dynamodb_proxy.calls["BatchWriteItem"] == 0


async def test_a_lost_reply_and_a_repetition_leave_one_item(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """At-least-once delivery, exactly one effect."""
    value = record()
    dynamodb_proxy.on("BatchWriteItem", LoseReply(), None)
    with pytest.raises(StoreError):
        await dynamodb_behind_proxy.write([value])
    assert await dynamodb_behind_proxy.get(value.log_id) == value
    assert not (await dynamodb_behind_proxy.write([value])).failures
    entries = [entry async for entry in dynamodb_behind_proxy.scan(value.log_timestamp, value.log_timestamp + 1)]
    assert len(entries) == 1


async def test_put_if_absent_never_replaces_and_says_what_it_stored(dynamodb_store: DynamoDBStore) -> None:
    """The record that was there stays, byte for byte."""
    first = record(request_data="first")
    await dynamodb_store.write([first])
    other = record()
    answer = await dynamodb_store.put_if_absent([msgspec.structs.replace(first, request_data="second"), other])
    assert answer == [False, True]
    assert await dynamodb_store.get(first.log_id) == first
    assert await dynamodb_store.get(other.log_id) == other


async def test_of_many_who_put_one_id_one_stores_it(dynamodb_store: DynamoDBStore) -> None:
    """The condition is the service's, not a read before a write."""
    value = record()
    rivals = [msgspec.structs.replace(value, user_id=str(n)) for n in range(12)]
    answers = await asyncio.gather(*(dynamodb_store.put_if_absent([rival]) for rival in rivals))
    assert [stored for answer in answers for stored in answer].count(True) == 1
    assert await dynamodb_store.get(value.log_id) == rivals[answers.index([True])]


async def test_a_failed_put_of_several_is_an_error_and_not_false(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """Not stored by this call: said of ids that are there, never of a failure."""
    dynamodb_proxy.on("PutItem", None, Refuse(400, "ThrottlingException"), None)
    with pytest.raises(StoreError) as caught:
        await dynamodb_behind_proxy.put_if_absent([record() for _ in range(3)])
    assert caught.value.retry_class is RetryClass.THROTTLE


async def test_consumed_capacity_is_reported_by_table_and_index(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """As the service answers it for INDEXES."""
    answer = {
        "UnprocessedItems": {},
        "ConsumedCapacity": [
            {
                "TableName": "t",
                "CapacityUnits": 6.0,
                "Table": {"CapacityUnits": 3.0},
                "GlobalSecondaryIndexes": {"service": {"CapacityUnits": 2.0}, "errors": {"CapacityUnits": 1.0}},
            }
        ],
    }
    dynamodb_proxy.on("BatchWriteItem", Raw(200, msgspec.json.encode(answer)))
    result = await dynamodb_behind_proxy.write([record()])
    assert dict(result.consumed) == {"table": 3.0, "service": 2.0, "errors": 1.0}


async def test_ping_stores_nothing_and_proves_the_permission_to_write(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """A denied put is seen, though nothing is ever put."""
    await dynamodb_behind_proxy.ping()
    assert await dynamodb_behind_proxy.get("sidecar-ping") is None
    dynamodb_proxy.on("PutItem", Refuse(400, "AccessDeniedException"))
    with pytest.raises(StoreError) as caught:
        await dynamodb_behind_proxy.ping()
    assert caught.value.retry_class is RetryClass.BLOCKED


async def test_ping_of_a_table_with_another_key_is_blocked(
    dynamodb_store: DynamoDBStore, dynamodb_settings: settings.DynamoDB
) -> None:
    """The service calls it a bad item; the item is right, so the table is not, and no record may be blamed."""
    async with dynamodb_store.wire.control() as client:
        await client.create_table(
            TableName=f"{dynamodb_settings.table}-other",
            BillingMode="PAY_PER_REQUEST",
            KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
        )
    options = msgspec.structs.replace(dynamodb_settings, table=f"{dynamodb_settings.table}-other")
    store = DynamoDBStore(options, clock=SystemClock())
    with pytest.raises(StoreError, match="another key") as caught:
        await store.ping()
    assert caught.value.retry_class is RetryClass.BLOCKED
    await store.close()


async def test_before_create_everything_is_blocked(dynamodb_settings: settings.DynamoDB) -> None:
    """A missing table holds the records back; none is dead-lettered."""
    store = DynamoDBStore(dynamodb_settings, clock=SystemClock())
    for call in (store.ping(), store.write([record()]), store.get("x"), store.put_if_absent([record()])):
        with pytest.raises(StoreError) as caught:
            await call
        assert caught.value.retry_class is RetryClass.BLOCKED
    await store.close()

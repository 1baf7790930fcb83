"""What create() makes, what check() finds."""

from collections.abc import Sequence

import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.errors import RetryClass, StoreError
from sidecar.stores import dynamodb_schema as schema
from sidecar.stores.base import ByCorrelation, Check
from sidecar.stores.dynamodb import DynamoDBStore
from tests.parts.dynamodb import record


async def test_create_makes_everything_once(dynamodb_settings: settings.DynamoDB) -> None:
    """Table, indexes, fleet table, schedule; a second time there is nothing to do, and check() agrees."""
    store = DynamoDBStore(dynamodb_settings, clock=SystemClock())
    assert not all(line.ok for line in await checked_before(store))
    done = await store.create()
    assert any(dynamodb_settings.table in line for line in done)
    assert any(dynamodb_settings.fleet_table in line for line in done)
    assert await store.create() == []
    assert all(line.ok for line in await store.check())
    await store.close()


async def checked_before(store: DynamoDBStore) -> Sequence[Check]:
    """The schema's part alone: without a fleet table there is no schedule to look at."""
    return await schema.check(store.wire, store._options)


async def test_missing_indexes_are_added_to_a_table_that_is_there(dynamodb_settings: settings.DynamoDB) -> None:
    """A table made by other means gets what it lacks, and keeps its items."""
    store = DynamoDBStore(dynamodb_settings, clock=SystemClock())
    async with store.wire.control() as client:
        await client.create_table(
            TableName=dynamodb_settings.table,
            BillingMode="PAY_PER_REQUEST",
            KeySchema=[{"AttributeName": "log_id", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "log_id", "AttributeType": "S"}],
        )
    lines = {line.name: line for line in await checked_before(store)}
    assert [lines[f"index {index.name}"].observed for index in schema.INDEXES] == ["missing"] * 4
    done = await store.create()
    assert [f"index {index.name}" for index in schema.INDEXES] == [line for line in done if line.startswith("index")]
    assert [line for line in await store.check() if not line.ok] == []
    value = record()
    await store.write([value])
    assert await store.query(ByCorrelation("c-1"), before=None, limit=5) == [value]
    await store.close()


@pytest.mark.parametrize("name", ["table", "index service"])
async def test_another_key_or_projection_is_reported_and_not_repaired(
    dynamodb_settings: settings.DynamoDB, name: str
) -> None:
    """With what is there and what is required."""
    store = DynamoDBStore(dynamodb_settings, clock=SystemClock())
    key = "log_id" if name != "table" else "id"
    async with store.wire.control() as client:
        await client.create_table(
            TableName=dynamodb_settings.table,
            BillingMode="PAY_PER_REQUEST",
            KeySchema=[{"AttributeName": key, "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": n, "AttributeType": "S"} for n in (key, "gs", "gt")],
            GlobalSecondaryIndexes=[
                {
                    "IndexName": "service",
                    "KeySchema": [
                        {"AttributeName": "gs", "KeyType": "HASH"},
                        {"AttributeName": "gt", "KeyType": "RANGE"},
                    ],
                    "Projection": {"ProjectionType": "KEYS_ONLY"},
                }
            ],
        )
    full = f"table {dynamodb_settings.table}" if name == "table" else name
    line = {line.name: line for line in await checked_before(store)}[full]
    assert not line.ok
    assert line.observed != line.required
    assert ("id HASH" if name == "table" else "keys only") in line.observed
    await store.close()


async def test_warnings_are_shown_and_never_fail(dynamodb_store: DynamoDBStore) -> None:
    """Point-in-time recovery and deletion protection: advised, not required."""
    lines = {line.name: line for line in await dynamodb_store.check() if line.name.startswith("warning: ")}
    assert {name: line.ok for name, line in lines.items()} == {
        "warning: point-in-time recovery": True,
        "warning: deletion protection": True,
    }


async def test_a_created_table_is_protected_from_deletion(
    dynamodb_store: DynamoDBStore, dynamodb_settings: settings.DynamoDB
) -> None:
    """In dynamo_only a DeleteTable would be the loss of everything."""
    with pytest.raises(StoreError) as caught:
        async with dynamodb_store.wire.control() as client:
            await client.delete_table(TableName=dynamodb_settings.table)
    assert caught.value.retry_class is RetryClass.PERMANENT
    assert await dynamodb_store.check()


async def test_the_control_plane_is_translated_by_the_same_table(
    dynamodb_settings: settings.DynamoDB, unused_tcp_port: int
) -> None:
    """Nothing but StoreError leaves create() and check()."""
    options = msgspec.structs.replace(dynamodb_settings, endpoint_url=f"http://127.0.0.1:{unused_tcp_port}")
    store = DynamoDBStore(options, clock=SystemClock())
    for call in (store.create, store.check):
        with pytest.raises(StoreError) as caught:
            await call()
        assert caught.value.retry_class is RetryClass.TRANSIENT
    await store.close()

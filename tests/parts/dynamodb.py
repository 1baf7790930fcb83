"""A local DynamoDB for tests: one server a session, tables of its own for each test.

``DYNAMODB_TEST_ENDPOINT`` runs the same tests against another one (DynamoDB Local, or AWS with real credentials in the
environment); tables made there are deleted after each test.
"""

import asyncio
import os
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.embedded.dynamodb import REGION, EmbeddedDynamoDB
from sidecar.record import LogRecord
from sidecar.stores.dynamodb import DynamoDBStore
from tests.parts.fault_proxy import FaultProxy

ENDPOINT = "DYNAMODB_TEST_ENDPOINT"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
DAY_US = 86_400_000_000
NOON_US = 20_000 * DAY_US + DAY_US // 2  # 2024-10-04T12:00:00Z


def record(**changes: Any) -> LogRecord:
    """A record with every field set; ``changes`` by name."""
    fields: dict[str, Any] = {
        "log_id": str(uuid.uuid4()),
        "application_id": 7,
        "log_type": "INFO",
        "service_name": "orders",
        "request_data": '{"b": 1, "a": 1.10}',
        "response_data": "",
        "status_code": 200,
        "is_success": True,
        "error_message": None,
        "processing_time_ms": 12,
        "log_timestamp": NOON_US,
        "correlation_id": "c-1",
        "user_id": "u-1",
    }
    return LogRecord(**{**fields, **changes})


def newest_first(records: Iterable[LogRecord]) -> list[LogRecord]:
    """The order of every answer."""
    return sorted(records, key=lambda r: (r.log_timestamp, r.log_id), reverse=True)


async def store_all(store: DynamoDBStore, records: Sequence[LogRecord]) -> None:
    """Write any number of records."""
    for start in range(0, len(records), 25):
        result = await store.write(records[start : start + 25])
        assert not result.failures


@pytest.fixture(scope="session")
def dynamodb_server() -> Iterator[str]:
    """The endpoint of a DynamoDB that lives as long as the session."""
    given = os.environ.get(ENDPOINT)
    if given:
        yield given
        return
    server = EmbeddedDynamoDB()
    with asyncio.Runner() as runner:
        runner.run(server.start())
    try:
        yield server.endpoint_url
    finally:
        server.kill()


@pytest.fixture
def dynamodb_settings(dynamodb_server: str, monkeypatch: pytest.MonkeyPatch) -> settings.DynamoDB:
    """Settings with names that no other test uses; fake credentials, unless the server was given."""
    if ENDPOINT not in os.environ:
        for name, value in CREDENTIALS.items():
            monkeypatch.setenv(name, value)
    suffix = uuid.uuid4().hex[:12]
    return settings.DynamoDB(
        table=f"logs-{suffix}",
        fleet_table=f"fleet-{suffix}",
        region=os.environ.get("AWS_REGION", REGION),
        endpoint_url=dynamodb_server,
    )


@pytest.fixture
async def dynamodb_store(dynamodb_settings: settings.DynamoDB) -> AsyncIterator[DynamoDBStore]:
    """An empty store whose tables exist."""
    store = DynamoDBStore(dynamodb_settings, clock=SystemClock())
    try:
        await store.create()
        yield store
    finally:
        if ENDPOINT in os.environ:
            await _delete(store, dynamodb_settings)
        await store.close()


@pytest.fixture
async def dynamodb_proxy(dynamodb_store: DynamoDBStore, dynamodb_server: str) -> AsyncIterator[FaultProxy]:
    """A fault proxy before the server; the tables of ``dynamodb_store`` are there."""
    async with FaultProxy(dynamodb_server) as proxy:
        yield proxy


@pytest.fixture
async def dynamodb_behind_proxy(
    dynamodb_proxy: FaultProxy, dynamodb_settings: settings.DynamoDB
) -> AsyncIterator[DynamoDBStore]:
    """The store of ``dynamodb_store`` seen through ``dynamodb_proxy``, impatient; the shard schedule has been read."""
    options = msgspec.structs.replace(
        dynamodb_settings, endpoint_url=dynamodb_proxy.url, read_timeout=0.7, connect_timeout=0.3
    )
    store = DynamoDBStore(options, clock=SystemClock())
    try:
        await store.ping()
        yield store
    finally:
        await store.close()


async def _delete(store: DynamoDBStore, options: settings.DynamoDB) -> None:
    async with store.wire.control() as client:
        await client.update_table(TableName=options.table, DeletionProtectionEnabled=False)
        for name in (options.table, options.fleet_table):
            await client.delete_table(TableName=name)

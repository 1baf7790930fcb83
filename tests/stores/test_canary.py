"""The canary on both real stores: all thirteen fields come back, nothing is left, and what goes wrong is said."""

import msgspec
import pytest

from sidecar.canary import Canary
from sidecar.clock import SystemClock
from sidecar.phase import DYNAMODB, POSTGRES
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.postgres import PostgresStore
from tests.parts import oracle
from tests.parts.adopted import SPECIFICATION, SPECIFIED, adopt, old_rows
from tests.parts.fault_proxy import Refuse
from tests.parts.postgres import connect
from tests.stores.records import BASE


@pytest.fixture
async def stores(postgres_store: PostgresStore, dynamodb_store: DynamoDBStore):
    """Both, created."""
    return {POSTGRES: postgres_store, DYNAMODB: dynamodb_store}


async def test_it_proves_both_stores_and_leaves_nothing(stores, postgres, dynamodb_settings):
    """Run twice; then both stores are read by plain drivers and hold no record."""
    for _ in range(2):
        outcomes = await Canary(stores, SystemClock())()
        assert [(outcome.store, outcome.problem) for outcome in outcomes] == [(POSTGRES, ""), (DYNAMODB, "")]
    assert await oracle.read_postgres(postgres) == {}
    assert await oracle.read_dynamodb(dynamodb_settings, dynamodb_settings.endpoint_url) == {}


async def test_a_rule_of_the_table_that_refuses_it_is_named(stores, postgres):
    """The specification's own canary broke a CHECK constraint unseen; this one says so, of that store alone."""
    connection = await connect(postgres)
    try:
        table = f'"{postgres.schema}"."{postgres.table}"'
        await connection.execute(
            f"ALTER TABLE {table} ADD CONSTRAINT ck_type CHECK (service_name <> 'hybrid-log-sidecar.canary')"
        )
        outcomes = {outcome.store: outcome.problem for outcome in await Canary(stores, SystemClock())()}
        await connection.execute(f"ALTER TABLE {table} DROP CONSTRAINT ck_type")
    finally:
        await connection.close(timeout=5)
    assert "ck_type" in outcomes[POSTGRES] or "23514" in outcomes[POSTGRES]
    assert outcomes[DYNAMODB] == ""
    assert await oracle.read_postgres(postgres) == {}


@pytest.mark.parametrize("operation", ["PutItem", "GetItem", "DeleteItem"])
async def test_what_dynamodb_refuses_is_its_problem_alone(stores, dynamodb_settings, operation, dynamodb_proxy):
    """A missing permission at any of the three calls is said; the other store's outcome stands."""
    options = msgspec.structs.replace(dynamodb_settings, endpoint_url=dynamodb_proxy.url)
    dynamodb_proxy.on(operation, Refuse(400, "AccessDeniedException"), times=1)
    other = DynamoDBStore(options, clock=SystemClock())
    try:
        outcomes = await Canary({**stores, DYNAMODB: other}, SystemClock())()
    finally:
        await other.close()
    assert [bool(outcome.problem) for outcome in outcomes] == [False, True]
    assert "AccessDenied" in outcomes[1].problem


async def test_the_specifications_own_table_lets_it_pass(postgres_empty, dynamodb_store):
    """Its CHECK lists the types, its key is an identity, its times have no zone: a type in use is taken."""
    options = await adopt(postgres_empty, SPECIFICATION, SPECIFIED)
    connection = await connect(options)
    try:
        await old_rows(connection, BASE, 3)
        store = PostgresStore(options, clock=SystemClock())
        try:
            outcomes = await Canary({POSTGRES: store, DYNAMODB: dynamodb_store}, SystemClock())()
        finally:
            await store.close()
        assert [outcome.problem for outcome in outcomes] == ["", ""]
        assert await connection.fetchval('SELECT count(*) FROM "IntegrationLogs"') == 3
    finally:
        await connection.close(timeout=5)

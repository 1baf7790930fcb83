"""Facts of a rehearsal: what a store would refuse is found, all of it, and nothing is stored."""

import asyncpg

from sidecar.errors import RetryClass
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.postgres import PostgresStore
from tests.parts import dynamodb
from tests.stores.records import record, records


async def test_postgresql_names_the_constraint_of_every_row_that_it_would_refuse(
    postgres_store: PostgresStore, postgres_admin: "asyncpg.Connection"
) -> None:
    """Check, deferred foreign key, trigger, and a unique index that two rows of one batch break together."""
    await postgres_admin.execute(
        """
        ALTER TABLE integration_logs ADD CONSTRAINT sane_status CHECK (status_code < 600);
        CREATE TABLE applications (id bigint PRIMARY KEY);
        INSERT INTO applications VALUES (7);
        ALTER TABLE integration_logs ADD CONSTRAINT known_application
            FOREIGN KEY (application_id) REFERENCES applications DEFERRABLE INITIALLY DEFERRED;
        CREATE UNIQUE INDEX one_user ON integration_logs (user_id);
        CREATE FUNCTION no_billing() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN IF NEW.service_name = 'billing' THEN RAISE EXCEPTION 'not here'; END IF; RETURN NEW; END $$;
        CREATE TRIGGER no_billing BEFORE INSERT ON integration_logs FOR EACH ROW EXECUTE FUNCTION no_billing();
        """
    )
    bad = {
        3: record(3, status_code=999),
        17: record(17, application_id=8),
        18: record(18, user_id="u"),
        40: record(40, user_id="u"),
        63: record(63, service_name="billing"),
    }
    batch = [bad.get(i, each) for i, each in enumerate(records(64))]
    failures = {failure.index: failure for failure in await postgres_store.rehearse(batch)}
    assert sorted(failures) == [3, 17, 40, 63]  # one of the two with the same user passes
    assert "constraint sane_status" in failures[3].reason
    assert "constraint known_application" in failures[17].reason
    assert "constraint one_user" in failures[40].reason
    assert failures[63].code == "P0001"
    assert {failure.retry_class for failure in failures.values()} == {RetryClass.PERMANENT}
    assert await postgres_admin.fetchval("SELECT count(*) FROM integration_logs") == 0


async def test_dynamodb_knows_its_limits(dynamodb_store: DynamoDBStore) -> None:
    """Items over 400 KB with their size, keys too long for an index, times that have no sort key; nothing is stored."""
    batch = [
        dynamodb.record(),
        dynamodb.record(request_data="x" * 410_000),
        dynamodb.record(service_name="s" * 2_040),
        dynamodb.record(correlation_id="\u00e9" * 1_020),
        dynamodb.record(log_timestamp=253_402_300_800_000_000),
        dynamodb.record(request_data="\x01" * 390_000),  # long as JSON, within the bound as it is counted
    ]
    failures = {failure.index: failure for failure in await dynamodb_store.rehearse(batch)}
    assert {index: failure.code for index, failure in failures.items()} == {
        1: "ItemTooLarge",
        2: "KeyTooLarge",
        3: "KeyTooLarge",
        4: "TimeOutOfRange",
    }
    assert "410" in failures[1].reason
    assert await dynamodb_store.get(batch[0].log_id) is None


async def test_a_fill_tells_the_capacity_that_it_consumed(dynamodb_store: DynamoDBStore) -> None:
    """What was stored as the service reports it; an id that was there costs what its item would."""
    batch = [dynamodb.record(), dynamodb.record(request_data="x" * 3_000)]
    first = dict((await dynamodb_store.fill(batch)).consumed)
    assert first["table"] >= 2
    again = await dynamodb_store.fill(batch)
    assert (list(again.stored), dict(again.consumed)) == ([False, False], {"table": 1 + 4})

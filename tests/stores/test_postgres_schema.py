"""The table: made once, by one, without stopping anybody, and checked line by line."""

import asyncio

import asyncpg
import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.record import FIELDS
from sidecar.stores import postgres_fleet, postgres_schema
from sidecar.stores.base import Check
from sidecar.stores.postgres import PostgresStore
from tests.parts.postgres import connect
from tests.stores.records import record, records

TABLE = "integration_logs"


async def failed(store: PostgresStore) -> dict[str, Check]:
    """The lines of the check that are not as required, by name."""
    return {check.name: check for check in await store.check() if not check.ok}


async def test_many_sidecars_that_create_at_once_all_succeed(postgres_empty: settings.Postgres) -> None:
    """Eight at the same moment: one makes both tables and the five indexes, each thing once; nobody fails."""
    stores = [PostgresStore(postgres_empty, clock=SystemClock()) for _ in range(8)]
    done = await asyncio.gather(*(store.create() for store in stores))
    made = [line for lines in done for line in lines]
    assert sorted(made) == sorted(
        [
            f"table public.{TABLE}",
            *(f"table public.{TABLE}{end}" for end in ("_gaps", *(each.suffix for each in postgres_fleet.TABLES))),
            *(f"index {TABLE}{index.suffix}" for index in postgres_schema.INDEXES),
        ]
    )
    assert await failed(stores[0]) == {}
    for store in stores:
        await store.close()


async def test_missing_indexes_are_added_while_writes_go_on(
    postgres_store: PostgresStore, postgres_admin: asyncpg.Connection
) -> None:
    """An older table without two of them: both are made concurrently, although rows are being written."""
    await postgres_admin.execute(f"DROP INDEX {TABLE}_time_idx, {TABLE}_failures_idx")
    await postgres_store.write(records(500))
    done, *_ = await asyncio.gather(
        postgres_store.create(), *(postgres_store.write([record(1000 + i)]) for i in range(20))
    )
    assert list(done) == [f"index {TABLE}_failures_idx", f"index {TABLE}_time_idx"]
    assert await failed(postgres_store) == {}


async def test_adding_an_index_does_not_block_a_writer(
    postgres: settings.Postgres, postgres_store: PostgresStore, postgres_admin: asyncpg.Connection
) -> None:
    """While the index waits for an older transaction to end, a write passes: the lock is the concurrent kind."""
    await postgres_admin.execute(f"DROP INDEX {TABLE}_time_idx")
    old = await connect(postgres)
    transaction = old.transaction()
    await transaction.start()
    await old.execute(f"LOCK TABLE {TABLE} IN ROW EXCLUSIVE MODE")
    creating = asyncio.create_task(postgres_store.create())
    async with asyncio.timeout(10):
        while not await postgres_admin.fetchval(
            "SELECT count(*) FROM pg_stat_progress_create_index WHERE phase LIKE 'waiting%'"
        ):
            await asyncio.sleep(0.01)
        await postgres_store.write([record(1)])
    assert not creating.done()
    await transaction.rollback()
    assert list(await creating) == [f"index {TABLE}_time_idx"]
    await old.close()


async def test_many_that_add_the_same_indexes_all_succeed(
    postgres: settings.Postgres, postgres_admin: asyncpg.Connection
) -> None:
    """They take turns, where two builds at once would end in a deadlock: made once, valid, and nobody failed."""
    await postgres_admin.execute(f"DROP INDEX {TABLE}_time_idx, {TABLE}_service_idx")
    stores = [PostgresStore(postgres, clock=SystemClock()) for _ in range(4)]
    done = await asyncio.gather(*(store.create() for store in stores))
    assert sorted(line for lines in done for line in lines) == [
        f"index {TABLE}_service_idx",
        f"index {TABLE}_time_idx",
    ]
    assert await failed(stores[0]) == {}
    for store in stores:
        await store.close()


async def test_an_index_whose_build_was_interrupted_is_made_anew(
    postgres_store: PostgresStore, postgres_admin: asyncpg.Connection
) -> None:
    """An invalid index serves no query and yet costs every write: ``create`` replaces it."""
    await postgres_admin.execute(
        f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{TABLE}_time_idx'::regclass"
    )
    assert list(await postgres_store.create()) == [f"index {TABLE}_time_idx"]
    assert await failed(postgres_store) == {}


async def test_a_name_of_full_length_gets_distinct_indexes(postgres: settings.Postgres) -> None:
    """63 characters: the indexes' names are cut by us, not by PostgreSQL, and creating again does nothing."""
    store = PostgresStore(msgspec.structs.replace(postgres, table="t" * 63), clock=SystemClock())
    assert len(await store.create()) == 2 + len(postgres_schema.INDEXES) + len(postgres_fleet.TABLES)
    assert list(await store.create()) == []
    assert await failed(store) == {}
    await store.close()


async def test_a_create_without_the_right_leaves_nothing_behind(
    postgres_empty: settings.Postgres, postgres_server: object
) -> None:
    """One transaction: a table is never left without its indexes."""
    admin = await connect(postgres_empty)
    await admin.execute(
        "CREATE FUNCTION no_index() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;"
        "CREATE EVENT TRIGGER no_index ON ddl_command_end WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION no_index()"
    )
    store = PostgresStore(postgres_empty, clock=SystemClock())
    with pytest.raises(Exception, match="P0001"):
        await store.create()
    assert await admin.fetchval(f"SELECT to_regclass('{TABLE}')") is None
    await store.close()
    await admin.close()


async def test_columns_are_the_records_fields_in_their_order(
    postgres_store: PostgresStore, postgres_admin: asyncpg.Connection
) -> None:
    """Thirteen, and payloads are text, which keeps what jsonb would rewrite."""
    rows = await postgres_admin.fetch(
        "SELECT column_name, data_type FROM information_schema.columns WHERE table_name = $1 ORDER BY ordinal_position",
        TABLE,
    )
    assert tuple(row["column_name"] for row in rows) == FIELDS
    assert {row["data_type"] for row in rows if row["column_name"].endswith("_data")} == {"text"}


@pytest.mark.parametrize(
    ("harm", "line", "observed"),
    [
        (f"ALTER TABLE {TABLE} DROP user_id", "column.user_id", "missing"),
        (f"ALTER TABLE {TABLE} ALTER request_data TYPE jsonb USING NULL", "column.request_data", "jsonb"),
        (f"ALTER TABLE {TABLE} ALTER log_timestamp TYPE timestamp", "column.log_timestamp", "timestamp without"),
        (f"ALTER TABLE {TABLE} ALTER error_message SET NOT NULL", "column.error_message", "text NOT NULL"),
        (f"ALTER TABLE {TABLE} ADD tenant text NOT NULL", "column.tenant", "NOT NULL"),
        (f"ALTER TABLE {TABLE} DROP CONSTRAINT {TABLE}_pkey", "key", "not unique"),
        (f"DROP INDEX {TABLE}_service_idx", f"index.{TABLE}_service_idx", "missing"),
        (
            f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{TABLE}_time_idx'::regclass",
            f"index.{TABLE}_time_idx",
            "invalid",
        ),
        (f"DROP TABLE {TABLE}", "table", "missing"),
        (f"DROP TABLE {TABLE}; CREATE VIEW {TABLE} AS SELECT 1 AS one", "table", "view"),
        ('ALTER DATABASE "{database}" SET synchronous_commit = off', "synchronous_commit", "off"),
    ],
)
async def test_check_names_what_is_wrong_and_nothing_else(
    postgres: settings.Postgres, postgres_admin: asyncpg.Connection, harm: str, line: str, observed: str
) -> None:
    """Each harm alone turns its own line red; the rest stays green."""
    await postgres_admin.execute(harm.replace("{database}", postgres.database))
    store = PostgresStore(postgres, clock=SystemClock())
    red = await failed(store)
    await store.close()
    # A column's end takes the indexes and the key on it along.
    assert set(red) == {f"postgres.{line}"}
    assert observed in red[f"postgres.{line}"].observed


async def test_check_tells_a_missing_right(postgres: settings.Postgres, postgres_admin: asyncpg.Connection) -> None:
    """INSERT and SELECT apart, those of the gap ledger, and those of each of the fleet's tables."""
    await postgres_admin.execute("DROP ROLE IF EXISTS reading; CREATE ROLE reading LOGIN PASSWORD 'pw'")
    await postgres_admin.execute(f"GRANT SELECT ON {TABLE} TO reading")
    options = msgspec.structs.replace(postgres, user="reading", password=settings.Secret("pw"))
    store = PostgresStore(options, clock=SystemClock())
    fleet = {f"postgres.fleet{end}" for end in ("", "_heartbeats", "_leases", "_audit", "_fates")}
    assert set(await failed(store)) == {"postgres.grant.insert", "postgres.gaps", *fleet}
    await postgres_admin.execute(f"GRANT SELECT, INSERT ON {TABLE}_audit, {TABLE}_fleet TO reading")
    assert set(await failed(store)) == {"postgres.grant.insert", "postgres.gaps", *fleet - {"postgres.fleet_audit"}}
    await store.close()
    await postgres_admin.execute("DROP OWNED BY reading; DROP ROLE reading")


async def test_wider_columns_pass_the_check_and_hold_records(
    postgres_store: PostgresStore, postgres_admin: asyncpg.Connection
) -> None:
    """``text`` for varchar, ``bigint`` for integer: an adopted table need not be ours to the letter."""
    for change in ("status_code TYPE bigint", "service_name TYPE text", "log_type TYPE text", "user_id TYPE text"):
        await postgres_admin.execute(f"ALTER TABLE {TABLE} ALTER {change}")
    assert await failed(postgres_store) == {}
    await postgres_store.write([record(1)])
    await postgres_store.write([record(1), record(2)])
    assert await postgres_store.get(record(2).log_id) == record(2)

"""A table that others made: the specification's own, with old rows, an old writer beside the sidecar, its limits."""

import asyncio
from collections.abc import Callable
from typing import Any

import asyncpg
import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.errors import ConfigError, RetryClass, StoreError
from sidecar.record import LogRecord
from sidecar.settings import Adopted, AdoptedColumns
from sidecar.stores.base import (
    ByApplication,
    ByCorrelation,
    ByService,
    Check,
    CountQuery,
    ErrorsOn,
    Position,
    Query,
    entry_of,
    position_of,
    summary_of,
)
from sidecar.stores.memory import MemoryStore
from sidecar.stores.postgres import PostgresStore
from sidecar.stores.postgres_adoption import ColumnLimits
from sidecar.stores.postgres_mapping import table_mapping
from sidecar.stores.postgres_statements import Statements
from tests.parts.adopted import (
    IDS,
    PARTITIONED,
    PLAIN,
    RELATION,
    SPECIFICATION,
    SPECIFIED,
    TABLE,
    adopt,
    old_rows,
    options,
    run,
)
from tests.parts.postgres import connect
from tests.stores.records import BASE, DAY, log_id, record, records

CHECKED = {"log_type": "External API", "application_id": 7}
"""What a record of the specification's table must be."""


async def filled(store: MemoryStore, batch: list[LogRecord]) -> MemoryStore:
    """The model with these records."""
    for start in range(0, len(batch), 100):
        await store.write(batch[start : start + 100])
    return store


async def paged(store: Any, query: Query, limit: int) -> list[LogRecord]:
    """All pages of a query."""
    found: list[LogRecord] = []
    before: Position | None = None
    while page := await store.query(query, before=before, limit=limit):
        found += page
        before = position_of(page[-1])
    return found


async def red(store: PostgresStore) -> dict[str, Check]:
    """The lines of the check that are not as required."""
    return {check.name: check for check in await store.check() if not check.ok}


class TestTheSpecificationsTable:
    """Old rows and new ones are one set of records."""

    async def test_every_answer_is_the_models(
        self, specified_store: PostgresStore, application: asyncpg.Connection
    ) -> None:
        """5,000 old rows, an old writer and the sidecar at once: ids, pages, counts, scans equal the model's."""
        old = await old_rows(application, BASE, 5_000)

        async def old_writer() -> list[LogRecord]:
            found: list[LogRecord] = []
            for i in range(10):
                found += await old_rows(application, BASE + 200_000_000 + i * 1_000_000, 10)
            return found

        new = [
            record(
                i, log_timestamp=BASE + i * 500_000, log_type="External API", application_id=i % 50 + 1, status_code=i
            )
            for i in range(1_000)
        ]

        async def sidecar() -> None:
            for start in range(0, len(new), 100):
                assert not (await specified_store.write(new[start : start + 100])).failures

        late, _ = await asyncio.gather(old_writer(), sidecar())
        model = await filled(MemoryStore(), [*old, *late, *new])
        for one in (old[0], old[4_999], late[50], new[7]):
            assert await specified_store.get(one.log_id) == one
        assert await specified_store.get(IDS.of(10**6)) is None
        queries: list[Query] = [
            ByApplication(8),
            ByService("s3", BASE, BASE + 300_000_000),
            ByCorrelation("c7"),
            ErrorsOn(BASE // DAY),
        ]
        for query in queries:
            for limit in (7, 1_000):
                assert await paged(specified_store, query, limit) == await paged(model, query, 1_000)
            summaries = await specified_store.summaries(query, before=None, limit=50)
            assert summaries == [summary_of(r) for r in await model.query(query, before=None, limit=50)]
        for query in (CountQuery(BASE, BASE + DAY), CountQuery(BASE + 1, BASE + 100_000_000, "s3", False)):
            assert await specified_store.count(query) == await model.count(query)
            for group in ("date", "service"):
                assert await specified_store.count_by(query, group) == await model.count_by(query, group)
        expected = [entry async for entry in model.scan(BASE, BASE + DAY)]
        assert [entry async for entry in specified_store.scan(BASE, BASE + DAY)] == expected
        streamed = [r async for page in specified_store.stream(BASE, BASE + DAY) for r in page]
        assert [entry_of(r) for r in streamed] == expected
        assert len(await specified_store.sample(before=BASE + DAY, limit=20)) == 20

    async def test_no_row_is_ever_updated(
        self, specified_store: PostgresStore, application: asyncpg.Connection
    ) -> None:
        """Old rows stay as they were written: no id is put into them, no version of them is made."""
        old = await old_rows(application, BASE, 50)
        before = await application.fetch(f"SELECT xmin::text, * FROM {RELATION}")
        await specified_store.write(old)
        await specified_store.put_if_absent(old)
        assert [r async for page in specified_store.stream(BASE, BASE + DAY) for r in page] == old
        assert await application.fetch(f"SELECT xmin::text, * FROM {RELATION}") == before

    async def test_an_old_row_that_comes_back_is_recognised(
        self, specified_store: PostgresStore, application: asyncpg.Connection
    ) -> None:
        """Written again it is a duplicate, with other content a conflict, and a copy never doubles it."""
        old = await old_rows(application, BASE, 3)
        other = msgspec.structs.replace(old[1], user_id="somebody else")
        assert not (await specified_store.write([*old, record(1, **CHECKED)])).failures
        failures = (await specified_store.write([old[0], other])).failures
        assert [(f.index, f.retry_class) for f in failures] == [(1, RetryClass.CONFLICT)]
        assert list(await specified_store.put_if_absent([*old, record(2, **CHECKED)])) == [False, False, False, True]
        assert await specified_store.count(CountQuery(BASE, BASE + DAY)) == 5
        assert list(await specified_store.rehearse(old)) == []

    async def test_a_copy_of_a_row_that_is_gone_comes_back_and_one_that_never_was_does_not(
        self, specified_store: PostgresStore, application: asyncpg.Connection
    ) -> None:
        """Under its computed id, found by it; the id of a row that is yet to be numbered is refused, not stored."""
        old = await old_rows(application, BASE, 3)
        await application.execute(f'DELETE FROM {RELATION} WHERE "LogId" = {IDS.key(old[1].log_id)}')
        assert list(await specified_store.put_if_absent(old)) == [False, True, False]
        assert await specified_store.get(old[1].log_id) == old[1]
        assert not (await specified_store.write(old)).failures
        future = msgspec.structs.replace(old[0], log_id=IDS.of(10**6))
        (failure,) = (await specified_store.write([future, record(1, **CHECKED)])).failures
        assert (failure.index, failure.retry_class) == (0, RetryClass.PERMANENT)
        assert list(await specified_store.put_if_absent([future])) == [False]

    async def test_new_rows_are_copied_in_one_statement(
        self, specified: settings.Postgres, application: asyncpg.Connection
    ) -> None:
        """COPY serves an adopted table too, constraints and foreign key included; ids of old rows go another way."""
        old = await old_rows(application, BASE, 2)
        store = PostgresStore(specified, clock=SystemClock())
        await store.ping()  # looked at before the trigger is there
        await application.execute(
            "CREATE TABLE noted (what text);"
            "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "INSERT INTO public.noted VALUES (split_part(current_query(), ' ', 1)); RETURN NULL; END $$;"
            f"CREATE TRIGGER note AFTER INSERT ON {RELATION} FOR EACH STATEMENT EXECUTE FUNCTION note()"
        )
        await store.write([record(1, **CHECKED), record(2, **CHECKED)])
        await store.write(old)
        await store.close()
        assert [row["what"] for row in await application.fetch("SELECT what FROM noted")] == ["COPY", "INSERT"]

    @pytest.mark.parametrize(
        ("changed", "code"),
        [
            ({"log_type": "TEST"}, "23514"),
            ({"application_id": 51}, "23503"),
            ({"correlation_id": "c" * 51}, "22001"),
            ({"error_message": "e" * 1001}, "22001"),
            ({"processing_time_ms": 2**31}, None),
        ],
    )
    async def test_what_its_constraints_refuse_is_that_records_fault(
        self, specified_store: PostgresStore, changed: dict[str, object], code: str | None
    ) -> None:
        """CHECK, FOREIGN KEY, lengths, ranges: PERMANENT for the batch, found by bisection, dead-lettered alone."""
        with pytest.raises(StoreError) as caught:
            await specified_store.write([record(1, **CHECKED), record(2, **(CHECKED | changed))])
        assert caught.value.retry_class is RetryClass.PERMANENT
        assert code in (None, caught.value.code)
        assert not (await specified_store.write([record(1, **CHECKED)])).failures

    async def test_the_columns_bounds_are_known_once_a_connection_is_open(self, specified_store: PostgresStore) -> None:
        """Only what is narrower than the record's own; whoever waits for them is told."""
        told: list[ColumnLimits] = []
        specified_store.on_columns = told.append
        await specified_store.ping()
        texts = {"log_type": 50, "service_name": 100, "error_message": 1000, "correlation_id": 50, "user_id": 100}
        int32 = (-(2**31), 2**31 - 1)
        numbers = {"application_id": int32, "processing_time_ms": int32, "status_code": (-999_999_999, 2**31 - 1)}
        assert told == [ColumnLimits(texts, numbers)]

    async def test_everything_works_in_transactions_of_a_pooler(
        self, specified: settings.Postgres, application: asyncpg.Connection
    ) -> None:
        """``pgbouncer: true`` and a server whose transactions keep their first snapshot: writes, reads, the tail."""
        await application.execute(
            f"""ALTER DATABASE "{specified.database}" SET default_transaction_isolation = 'repeatable read'"""
        )
        store = PostgresStore(msgspec.structs.replace(specified, pgbouncer=True), clock=SystemClock())
        rows = store.old_rows
        assert rows is not None
        bound = await rows.begin(patience=5)
        old = await old_rows(application, BASE, 5)
        new = record(1, **CHECKED)
        for _ in range(2):
            assert not (await store.write([new, old[0]])).failures
        assert await store.get(old[4].log_id) == old[4]
        upto = await rows.advance(bound)
        assert [r async for page in rows.rows(bound, upto) for r in page] == old
        await rows.keep_copied(upto)
        assert await rows.copied() == upto
        assert await rows.old_writers() == await rows.old_writers()
        assert await red(store) == {}
        await store.close()

    async def test_a_status_that_is_no_number_is_read_as_null(
        self, specified_store: PostgresStore, application: asyncpg.Connection
    ) -> None:
        """Whole numbers of an int32 in their plain spelling are read as such; the row stays as it is."""
        texts = {
            "200": 200,
            "-5": -5,
            "0": 0,
            "OK": None,
            "": None,
            "007": None,
            "2.5": None,
            "9999999999": None,
            " 1": None,
        }
        for text in texts:
            await application.execute(
                f"""INSERT INTO {RELATION} ("LogType", "ServiceName", "IsSuccess", "StatusCode", "UserId")
                VALUES ('External API', 'status', true, $1, $1)""",
                text,
            )
        now = await application.fetchval("SELECT (extract(epoch FROM now()) * 1000000)::int8")
        found = await specified_store.query(ByService("status", now - DAY, now + DAY), before=None, limit=100)
        assert {r.user_id: r.status_code for r in found} == texts


class TestPlans:
    """Reads walk along the indexes that the table has."""

    async def test_pages_use_the_tables_own_indexes(self, specified: settings.Postgres) -> None:
        """Of an application, a service, a correlation id, a day's failures, a scan: an index, no sort of the whole."""
        admin = await connect(specified)
        await old_rows(admin, BASE, 20_000)
        await admin.execute(
            f"""UPDATE {RELATION} SET "ServiceName" = 'rare' WHERE "LogId" % 1000 = 0; ANALYZE {RELATION}"""
        )
        sql = Statements(table_mapping(specified))
        await admin.execute("SET plan_cache_mode = force_custom_plan")
        day = ("'2026-01-15'", "'2026-01-16'")
        cases = [
            (
                sql.pages[ByApplication],
                ("20", day[1], f"'{log_id(0)}'", "7"),
                "IX_IntegrationLogs_ApplicationId_Timestamp",
            ),
            (
                sql.pages[ByService],
                ("20", day[1], f"'{log_id(0)}'", "'rare'", *day),
                "IntegrationLogs_sidecar_service_idx",
            ),
            (sql.pages[ByCorrelation], ("20", day[1], f"'{log_id(0)}'", "'c9'"), "IX_IntegrationLogs_CorrelationId"),
            (sql.pages[ErrorsOn], ("20", day[1], f"'{log_id(0)}'", *day), "IntegrationLogs_sidecar_failures_idx"),
            (sql.scan, (*day, f"'{log_id(0)}'"), "IX_IntegrationLogs_Timestamp"),
        ]
        for statement, arguments, index in cases:
            await admin.execute(f"DEALLOCATE ALL; PREPARE asked AS {statement}")
            plan = "\n".join(r[0] for r in await admin.fetch(f"EXPLAIN EXECUTE asked({', '.join(arguments)})"))
            assert index in plan, plan
            assert "Seq Scan" not in plan
        await admin.close()

    async def test_an_id_is_looked_up_by_an_index_either_way(self, specified: settings.Postgres) -> None:
        """The uuid by its partial unique index, the computed one by the primary key."""
        admin = await connect(specified)
        await old_rows(admin, BASE, 20_000)
        await admin.execute(f"ANALYZE {RELATION}; PREPARE asked AS {Statements(table_mapping(specified)).stored}")
        rows = await admin.fetch(f"EXPLAIN EXECUTE asked(ARRAY['{log_id(1)}']::uuid[], ARRAY[42]::int8[])")
        plan = "\n".join(row[0] for row in rows)
        assert "IntegrationLogs_sidecar_key" in plan
        assert "IntegrationLogs_pkey" in plan
        assert "Seq Scan" not in plan
        await admin.close()


class TestPartitions:
    """A table that is partitioned by month."""

    async def test_a_repetition_meets_the_first_in_its_partition(self, partitioned_store: PostgresStore) -> None:
        """Three months: each record once, whatever comes again; other content is a conflict, at another time too."""
        batch = [record(i, log_timestamp=BASE + i * 15 * DAY) for i in range(6)]
        for _ in range(2):
            assert not (await partitioned_store.write(batch)).failures
        elsewhere = msgspec.structs.replace(batch[0], log_timestamp=batch[5].log_timestamp)
        (failure,) = (await partitioned_store.write([elsewhere])).failures
        assert failure.retry_class is RetryClass.CONFLICT
        assert list(await partitioned_store.put_if_absent([elsewhere])) == [False]
        assert [e.log_id async for e in partitioned_store.scan(BASE, BASE + 100 * DAY)] == [r.log_id for r in batch]

    async def test_a_partition_made_later_is_guarded_too(
        self, partitioned: settings.Postgres, partitioned_store: PostgresStore
    ) -> None:
        """The parent's index is there before the partition is, so its own comes with it."""
        await run(
            partitioned,
            f"CREATE TABLE later PARTITION OF {RELATION} FOR VALUES FROM ('2026-05-01') TO ('2026-06-01')",
        )
        one = record(1, log_timestamp=BASE + 110 * DAY)
        first, second = await asyncio.gather(
            partitioned_store.put_if_absent([one]), partitioned_store.put_if_absent([one])
        )
        assert sorted([*first, *second]) == [False, True]
        assert await red(partitioned_store) == {}

    async def test_times_without_a_zone_are_at_the_assumed_offset(
        self, partitioned: settings.Postgres, partitioned_store: PostgresStore
    ) -> None:
        """+02:00: the row says two hours more than UTC, both ways, and counts go by UTC's day."""
        at_midnight = record(1, log_timestamp=BASE)
        await partitioned_store.write([at_midnight])
        admin = await connect(partitioned)
        assert await admin.fetchval(f"""SELECT "LogTimestamp"::text FROM {RELATION}""") == "2026-01-15 02:00:00"
        await admin.execute(
            f"""INSERT INTO {RELATION} ("LogType", "ServiceName", "IsSuccess", "LogTimestamp")
            VALUES ('x', 'orders', true, '2026-01-16 01:59:59.999999')"""
        )
        await admin.close()
        last = BASE + DAY - 1
        assert [e.log_timestamp async for e in partitioned_store.scan(BASE, BASE + DAY)] == [BASE, last]
        assert await partitioned_store.count_by(CountQuery(BASE, last), "date") == {"2026-01-15": 2}


class TestPlanAndApply:
    """DDL that only adds, planned and done."""

    async def test_the_plan_is_the_way_and_then_it_is_empty(self, postgres_empty: settings.Postgres) -> None:
        """What --plan prints, run by somebody else's hand, leaves nothing to do; --apply then does nothing."""
        for number, ddl in enumerate((SPECIFICATION, PARTITIONED)):
            adopted = SPECIFIED if number == 0 else msgspec.structs.replace(SPECIFIED, assume_zone="+02:00")
            await run(postgres_empty, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
            await run(postgres_empty, ddl)
            store = PostgresStore(options(postgres_empty, adopted), clock=SystemClock())
            plan = await store.adoption()
            assert plan.problems == []
            assert plan.partitions == (0, 3)[number]
            admin = await connect(postgres_empty)
            for step in plan.steps:
                await admin.execute(step.sql)
            await admin.close()
            assert (await store.adoption()).steps == ()
            assert [step async for step in store.adopt()] == []
            await store.create()
            assert await red(store) == {}
            await store.close()

    async def test_partitions_of_partitions_and_awkward_names_are_adopted_too(
        self, postgres_empty: settings.Postgres
    ) -> None:
        """Each level is attached to the one above; long names stay apart, quotes are quoted; no step comes twice."""
        long, quoted = "p" * 62, '"it\'s ""quoted"""'
        keyed = PARTITIONED.replace('("LogTimestamp", "LogId")', '("LogTimestamp", "IsSuccess", "LogId")')
        await run(
            postgres_empty,
            keyed
            + f"""
            CREATE TABLE later PARTITION OF {RELATION} FOR VALUES FROM ('2026-03-01') TO ('2026-04-01')
                PARTITION BY LIST ("IsSuccess");
            CREATE TABLE "{long}1" PARTITION OF later FOR VALUES IN (true);
            CREATE SCHEMA "Other";
            CREATE TABLE "Other"."{long}2" PARTITION OF later FOR VALUES IN (false);
            CREATE TABLE {quoted} PARTITION OF {RELATION} FOR VALUES FROM ('2026-04-01') TO ('2026-05-01')""",
        )
        adopted = msgspec.structs.replace(SPECIFIED, assume_zone="UTC")
        store = PostgresStore(options(postgres_empty, adopted), clock=SystemClock())
        assert (await store.adoption()).partitions == 6
        done = [step.sql async for step in store.adopt()]
        assert len(done) == len(set(done)) == 1 + 5 * (2 + 6 + 7)  # the key begins with the time, so no index of times
        assert (await store.adoption()).steps == ()
        await store.create()
        assert await red(store) == {}
        batch = [record(i, log_timestamp=BASE + i * 20 * DAY, is_success=i % 2 == 0) for i in range(6)]
        for _ in range(2):
            assert not (await store.write(batch)).failures
        assert [e.log_id async for e in store.scan(BASE, BASE + 200 * DAY)] == [r.log_id for r in batch]
        await store.close()

    async def test_the_specifications_table_needs_a_column_and_three_indexes(
        self, postgres_empty: settings.Postgres
    ) -> None:
        """Its own indexes serve where they can; every step says its lock, and only the column's blocks writers."""
        await run(postgres_empty, SPECIFICATION)
        store = PostgresStore(options(postgres_empty, SPECIFIED), clock=SystemClock())
        steps = (await store.adoption()).steps
        on, new = f'ON "public".{RELATION}', '"SidecarLogId"'
        assert [step.sql for step in steps] == [
            f'ALTER TABLE "public".{RELATION} ADD COLUMN "SidecarLogId" uuid',
            f'CREATE UNIQUE INDEX CONCURRENTLY "{TABLE}_sidecar_key" {on} ({new}) WHERE {new} IS NOT NULL',
            f'CREATE INDEX CONCURRENTLY "{TABLE}_sidecar_service_idx" {on} ("ServiceName", "LogTimestamp")',
            f'CREATE INDEX CONCURRENTLY "{TABLE}_sidecar_failures_idx" {on} ("LogTimestamp") WHERE NOT "IsSuccess"',
        ]
        assert [step.blocks_writers for step in steps] == [True, False, False, False]
        assert all(step.lock and step.held for step in steps)
        assert len((await store.adoption(read_indexes=False)).steps) == 2
        await store.close()

    async def test_an_index_whose_build_was_interrupted_is_made_anew(
        self, specified: settings.Postgres, specified_store: PostgresStore
    ) -> None:
        """Planned as a drop and a build; until then the store is blocked, for a repetition could double a record."""
        await run(
            specified,
            f"""UPDATE pg_index SET indisvalid = false WHERE indexrelid = '"{TABLE}_sidecar_key"'::regclass""",
        )
        with pytest.raises(StoreError, match=r"postgres\.key: seen .*invalid") as caught:
            await specified_store.write([record(1, **CHECKED)])
        assert caught.value.retry_class is RetryClass.BLOCKED
        assert [step.sql.split()[0] for step in (await specified_store.adoption()).steps] == ["DROP", "CREATE"]
        assert len([step async for step in specified_store.adopt()]) == 2
        assert not (await specified_store.write([record(1, **CHECKED)])).failures

    async def test_writers_are_not_held_up_by_a_lock_that_is_not_to_be_had(
        self, postgres_empty: settings.Postgres, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The column waits for a long transaction no longer than its bound, lets others pass, comes when it ends."""
        monkeypatch.setattr("sidecar.stores.postgres_plan.LOCK_SECONDS", 0.1)
        await run(postgres_empty, SPECIFICATION)
        store = PostgresStore(options(postgres_empty, SPECIFIED), clock=SystemClock())
        long, writer = await connect(postgres_empty), await connect(postgres_empty)
        transaction = long.transaction()
        await transaction.start()
        await long.execute(f"SELECT FROM {RELATION}")

        async def applied() -> int:
            return len([step async for step in store.adopt()])

        applying = asyncio.create_task(applied())
        async with asyncio.timeout(20):
            while not await writer.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation IS NOT NULL"):
                await asyncio.sleep(0.01)
            await old_rows(writer, BASE, 1)  # waits for the bound at most
            assert not applying.done()
            await transaction.rollback()
            assert await applying == 4
        for each in (long, writer):
            await each.close()
        await store.close()

    async def test_rights_to_insert_and_select_are_enough_but_for_the_plan(
        self, specified: settings.Postgres, partitioned: settings.Postgres
    ) -> None:
        """A modest role writes, reads, watches; only the owner adopts; a serial key asks for one right more."""
        for base, missing in ((specified, set()), (partitioned, {"postgres.grant.sequence"})):
            await run(
                base,
                "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'adopter') THEN "
                "CREATE ROLE adopter LOGIN PASSWORD 'pw'; END IF; END $$;"
                f"GRANT SELECT, INSERT ON {RELATION} TO adopter;"
                f'GRANT SELECT, INSERT, UPDATE, DELETE ON "{TABLE}_gaps", "{TABLE}_old_writers" TO adopter',
            )
            modest = msgspec.structs.replace(base, user="adopter", password=settings.Secret("pw"))
            store = PostgresStore(modest, clock=SystemClock())
            assert store.old_rows is not None
            found = {name for name in await red(store) if "fleet" not in name}
            assert {name for name in found if "grant" in name} == missing
            assert "postgres.old_writers" not in found
            assert await store.get(IDS.of(1)) is None
            assert (await store.old_rows.old_writers()).last_seen_us is None
            if not missing:
                assert not (await store.write([record(1, **CHECKED)])).failures
            await run(base, f'DROP INDEX "{TABLE}_sidecar_failures_idx"')
            with pytest.raises(StoreError, match="owner"):
                assert [step async for step in store.adopt()] == []
            await store.close()

    async def test_where_there_is_no_table_nothing_is_made(self, postgres_empty: settings.Postgres) -> None:
        """A typing error in its name is an error of plan, create and check, never a new table."""
        store = PostgresStore(options(postgres_empty, SPECIFIED), clock=SystemClock())
        for ask in (store.adoption, store.create, store.ping):
            with pytest.raises(StoreError, match=f"public.{TABLE}") as caught:
                await ask()
            assert caught.value.retry_class is RetryClass.BLOCKED
        assert set(await red(store)) == {"postgres.table"}
        await store.close()

    async def test_before_it_is_adopted_the_store_says_what_to_do(self, postgres_empty: settings.Postgres) -> None:
        """Writes and reads are held, not dead-lettered, and go on without a restart once it is adopted."""
        await run(postgres_empty, SPECIFICATION)
        store = PostgresStore(options(postgres_empty, SPECIFIED), clock=SystemClock())
        for ask in (lambda: store.write([record(1, **CHECKED)]), lambda: store.get(log_id(1))):
            with pytest.raises(StoreError, match="sidecar adopt --plan") as caught:
                await ask()
            assert caught.value.retry_class is RetryClass.BLOCKED
        assert [step async for step in store.adopt()]
        assert not (await store.write([record(1, **CHECKED)])).failures
        await store.close()


def _altered(column: str, change: str) -> str:
    return f'ALTER TABLE {RELATION} ALTER "{column}" {change}'


_IS_SUCCESS_AS_NUMBER = f'DROP INDEX "{TABLE}_sidecar_failures_idx"; ' + _altered("IsSuccess", "TYPE int USING 1")


class TestRefusals:
    """What a table may not be like: named by check and plan, and nothing is written to it, looked at before or not."""

    @pytest.mark.parametrize(
        ("harm", "line", "why"),
        [
            (_altered("RequestData", "TYPE jsonb USING NULL"), "column.request_data", "reorders keys"),
            (_altered("ResponseData", "TYPE json USING NULL"), "column.response_data", "refuses every payload"),
            (_altered("UserId", "TYPE char(20)"), "column.user_id", "pads with blanks"),
            (_altered("LogTimestamp", "TYPE timestamp"), "column.log_timestamp", "assume_zone"),
            (_altered("LogTimestamp", "TYPE timestamptz(3)"), "column.log_timestamp", "rounds microseconds"),
            (_altered("LogTimestamp", "TYPE date"), "column.log_timestamp", "it is no time"),
            (_altered("StatusCode", "TYPE varchar(10)"), "column.status_code", "status_code_text"),
            (_altered("ApplicationId", "TYPE text"), "column.application_id", "it is no integer"),
            (_IS_SUCCESS_AS_NUMBER, "column.is_success", "two values"),
            (_altered("LogType", "DROP NOT NULL"), "column.log_type", "NOT NULL"),
            (_altered("CorrelationId", "SET NOT NULL"), "column.correlation_id", "drop the NOT NULL"),
            (f'ALTER TABLE {RELATION} DROP "UserId"', "column.user_id", "missing"),
            (_altered("LogId", "DROP IDENTITY"), "adopt.key", "not numbered"),
            (f'ALTER TABLE {RELATION} DROP CONSTRAINT "{TABLE}_pkey"', "adopt.key_index", "not unique"),
            (_altered("SidecarLogId", "TYPE text"), "adopt.log_id", "text"),
            (f'DROP INDEX "{TABLE}_sidecar_key"', "key", "missing"),
        ],
    )
    async def test_a_column_that_cannot_hold_its_field_blocks_the_store(
        self, adopted: settings.Postgres, harm: str, line: str, why: str
    ) -> None:
        """BLOCKED with the reason, by write and read alike; the check names this line and the plan does nothing."""
        await run(adopted, harm)
        store = PostgresStore(adopted, clock=SystemClock())
        for ask in (lambda: store.write([record(1)]), lambda: store.get(log_id(1))):
            with pytest.raises(StoreError, match=why) as caught:
                await ask()
            assert caught.value.retry_class is RetryClass.BLOCKED
            assert f"postgres.{line}" in caught.value.reason
        found = await red(store)
        assert why in found[f"postgres.{line}"].observed + found[f"postgres.{line}"].required
        if line != "key":
            with pytest.raises(StoreError, match=line):
                assert [step async for step in store.adopt()] == []
        await store.close()

    @pytest.mark.parametrize(
        ("harm", "line", "observed"),
        [
            (f'ALTER TABLE {RELATION} ADD "Tenant" text NOT NULL', "column.Tenant", "NOT NULL"),
            (f'ALTER SEQUENCE "{TABLE}_LogId_seq" CACHE 20', "adopt.sequence", "20 at a time"),
            (f'DROP INDEX "{TABLE}_sidecar_time_idx"', "index.time", "none"),
            (f'DROP TABLE "{TABLE}_old_writers"', "old_writers", "missing"),
        ],
    )
    async def test_check_names_the_rest_and_nothing_else(
        self, adopted: settings.Postgres, harm: str, line: str, observed: str
    ) -> None:
        """What costs time or certainty turns its own line red."""
        await run(adopted, harm)
        store = PostgresStore(adopted, clock=SystemClock())
        found = await red(store)
        await store.close()
        assert set(found) == {f"postgres.{line}"}
        assert observed in found[f"postgres.{line}"].observed

    async def test_a_zone_that_is_assumed_where_there_is_one_is_refused(self, adopted: settings.Postgres) -> None:
        """Otherwise the server would convert by its own zone, in silence."""
        wrong = msgspec.structs.replace(adopted, adopt=msgspec.structs.replace(adopted.adopt, assume_zone="UTC"))
        store = PostgresStore(wrong, clock=SystemClock())
        with pytest.raises(StoreError, match="must not be set"):
            await store.write([record(1)])
        await store.close()

    async def test_a_partition_that_a_repetition_might_miss_is_refused(self, postgres_empty: settings.Postgres) -> None:
        """Partitioned by its number: a record written twice would be in two partitions."""
        ddl = PARTITIONED.split(") VALUES")[0].split("PARTITION BY")[0] + 'PARTITION BY HASH ("LogId")'
        await run(postgres_empty, ddl.replace('"LogTimestamp", "LogId"', '"LogId"'))
        adopted = msgspec.structs.replace(SPECIFIED, assume_zone="UTC")
        store = PostgresStore(options(postgres_empty, adopted), clock=SystemClock())
        problems = {check.name for check in (await store.adoption()).problems}
        assert problems == {"postgres.adopt.partitions"}
        await store.close()


class TestMapping:
    """Names from the configuration."""

    @pytest.mark.parametrize("name", ['a"b', 'x"; DROP TABLE y; --', "a.b", "1a", "", "a" * 64, "a b", "\u00e4", "a\n"])
    @pytest.mark.parametrize(
        ("setting", "change"),
        [
            ("key", lambda name: Adopted(enabled=True, key=name)),
            ("log_id", lambda name: Adopted(enabled=True, log_id=name)),
            ("columns.user_id", lambda name: Adopted(enabled=True, columns=AdoptedColumns(user_id=name))),
        ],
    )
    def test_a_name_that_is_no_plain_identifier_is_refused(
        self, setting: str, change: Callable[[str], Adopted], name: str
    ) -> None:
        """By the setting's name; nothing of it reaches a statement."""
        with pytest.raises(ConfigError, match=f"postgres.adopt.{setting}"):
            table_mapping(settings.Postgres(adopt=change(name)))

    async def test_any_plain_names_will_do(self, postgres_empty: settings.Postgres) -> None:
        """Keywords and other spellings: mapped, quoted, and the table works."""
        ddl = PLAIN.replace('"ServiceName"', '"select"').replace('"LogId"', '"Key"').replace('"UserId"', "user_id")
        adopted = Adopted(
            enabled=True, key="Key", log_id="order", columns=AdoptedColumns(service_name="select", user_id="user_id")
        )
        made = await adopt(postgres_empty, ddl, adopted)
        store = PostgresStore(made, clock=SystemClock())
        assert not (await store.write(records(3))).failures
        assert not (await store.write(records(4))).failures
        assert await store.get(log_id(3)) == records(4)[3]
        assert await red(store) == {}
        await store.close()

"""PostgreSQL beyond the contract: the two ways of writing, conflicts, and the plans behind every answer."""

import asyncio
import json

import asyncpg
import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.errors import ConfigError, RetryClass, StoreError
from sidecar.record import LogRecord
from sidecar.stores.base import ByApplication, ByCorrelation, ByService, CountQuery, ErrorsOn
from sidecar.stores.postgres import PostgresStore
from sidecar.stores.postgres_mapping import table_mapping
from sidecar.stores.postgres_statements import Statements
from tests.parts.postgres import connect
from tests.parts.postgres_relay import Relay
from tests.stores.records import BASE, DAY, log_id, record, records

TABLE = "integration_logs"
_SQL = Statements(table_mapping(settings.Postgres()))


async def commands(admin: asyncpg.Connection, what: str) -> int:
    """How many rows a statement-level trigger has noted."""
    return await admin.fetchval("SELECT count(*) FROM noted WHERE what = $1", what)


class TestConflicts:
    """Same id, other content."""

    async def test_other_content_under_an_id_is_a_conflict_and_the_first_wins(
        self, postgres_store: PostgresStore
    ) -> None:
        """Only that record fails, by its place in the batch; its neighbours are stored; the stored one stays."""
        first = record(2, request_data="first")
        await postgres_store.write([first])
        batch = [record(1), record(2, request_data="second"), record(3)]
        result = await postgres_store.write(batch)
        assert [(f.index, f.retry_class) for f in result.failures] == [(1, RetryClass.CONFLICT)]
        assert [await postgres_store.get(r.log_id) for r in batch] == [batch[0], first, batch[2]]

    @pytest.mark.parametrize("field", LogRecord.__struct_fields__[1:])
    async def test_a_difference_in_any_field_is_a_conflict(self, postgres_store: PostgresStore, field: str) -> None:
        """The comparison leaves no field out."""
        others = {int: 8, str: "x", bool: False, type(None): "y"}
        one = record(1)
        other = msgspec.structs.replace(one, **{field: others[type(getattr(one, field))]})
        await postgres_store.write([one])
        result = await postgres_store.write([other])
        assert [f.retry_class for f in result.failures] == [RetryClass.CONFLICT]

    async def test_null_and_empty_text_are_other_content(self, postgres_store: PostgresStore) -> None:
        """Not equal, both ways."""
        await postgres_store.write([record(1, user_id=None), record(2, user_id="")])
        result = await postgres_store.write([record(1, user_id=""), record(2, user_id=None)])
        assert [f.index for f in result.failures] == [0, 1]

    async def test_the_same_id_twice_in_a_batch_never_hides(self, postgres_store: PostgresStore) -> None:
        """Against the port's rule, yet the second content is reported, not dropped in silence."""
        result = await postgres_store.write([record(1, user_id="a"), record(1, user_id="b"), record(2)])
        assert [(f.index, f.retry_class) for f in result.failures] == [(1, RetryClass.CONFLICT)]

    async def test_a_reason_names_no_value(self, postgres_store: PostgresStore) -> None:
        """Neither content appears."""
        await postgres_store.write([record(1, request_data="planted-one")])
        result = await postgres_store.write([record(1, request_data="planted-two")])
        assert "planted" not in repr(result)


class TestTwoWays:
    """COPY where it has the effect of an insert, else the insert."""

    async def _note(self, admin: asyncpg.Connection) -> None:
        """From now on every inserting statement leaves a line; COPY fires statement triggers too."""
        await admin.execute(
            "CREATE TABLE noted (what text);"
            "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "INSERT INTO public.noted VALUES (split_part(current_query(), ' ', 1)); RETURN NULL; END $$;"
            f"CREATE TRIGGER note AFTER INSERT ON {TABLE} FOR EACH STATEMENT EXECUTE FUNCTION note()"
        )

    async def test_new_records_are_copied(
        self, postgres_store: PostgresStore, postgres_admin: asyncpg.Connection
    ) -> None:
        """One COPY and nothing else."""
        await postgres_store.ping()  # the store looks at the table before the trigger that notes is there
        await self._note(postgres_admin)
        await postgres_store.write(records(5))
        assert [tuple(r) for r in await postgres_admin.fetch("SELECT what FROM noted")] == [("COPY",)]

    async def test_new_records_are_copied_by_the_store_that_made_the_table(
        self, postgres_empty: settings.Postgres
    ) -> None:
        """What was looked at before there was a table is looked at again."""
        store = PostgresStore(postgres_empty, clock=SystemClock())
        with pytest.raises(StoreError):
            await store.write([record(1)])
        await store.create()
        await store.write([record(1)])
        admin = await connect(postgres_empty)
        await self._note(admin)
        await store.write([record(2)])
        assert [tuple(r) for r in await admin.fetch("SELECT what FROM noted")] == [("COPY",)]
        await store.close()
        await admin.close()

    async def test_a_table_with_a_trigger_is_not_copied_into(
        self, postgres: settings.Postgres, postgres_admin: asyncpg.Connection
    ) -> None:
        """Seen when the connection opens: the insert is used from the start."""
        await self._note(postgres_admin)
        store = PostgresStore(postgres, clock=SystemClock())
        await store.write(records(5))
        await store.close()
        assert [tuple(r) for r in await postgres_admin.fetch("SELECT what FROM noted")] == [("INSERT",)]

    async def test_a_replay_is_inserted_until_it_meets_no_duplicate(
        self, postgres_store: PostgresStore, postgres_admin: asyncpg.Connection
    ) -> None:
        """After a batch that was there already: no further futile COPY, and COPY again when the replay is over."""
        batch = records(6)
        await postgres_store.write(batch)
        await self._note(postgres_admin)
        await postgres_store.write(batch[:2])  # the COPY fails, and its note is rolled back with it
        await postgres_store.write(batch[2:4])
        await postgres_store.write([record(10)])
        await postgres_store.write([record(11)])
        noted = [r["what"] for r in await postgres_admin.fetch("SELECT what FROM noted")]
        assert noted == ["INSERT", "INSERT", "INSERT", "COPY"]

    @pytest.mark.parametrize("late", [False, True], ids=["seen when opening", "added later"])
    async def test_a_record_that_a_trigger_swallows_is_never_called_stored(
        self, postgres_store: PostgresStore, postgres_admin: asyncpg.Connection, *, late: bool
    ) -> None:
        """A BEFORE trigger that returns NULL: UNKNOWN for that record, its neighbours are stored."""
        if late:
            await postgres_store.ping()
        await postgres_admin.execute(
            "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "IF NEW.user_id = 'gone' THEN RETURN NULL; END IF; RETURN NEW; END $$;"
            f"CREATE TRIGGER swallow BEFORE INSERT ON {TABLE} FOR EACH ROW EXECUTE FUNCTION swallow()"
        )
        result = await postgres_store.write([record(1), record(2, user_id="gone"), record(3)])
        assert [(f.index, f.retry_class) for f in result.failures] == [(1, RetryClass.UNKNOWN)]
        assert await postgres_admin.fetchval(f"SELECT count(*) FROM {TABLE}") == 2

    async def test_a_trigger_that_files_rows_elsewhere_is_respected(
        self, postgres_store: PostgresStore, postgres_admin: asyncpg.Connection
    ) -> None:
        """Old-style partitioning by a trigger and a child table: the row is found, so the record is stored."""
        await postgres_admin.execute(
            f"CREATE TABLE child (PRIMARY KEY (log_id)) INHERITS ({TABLE});"
            "CREATE FUNCTION file_it() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "INSERT INTO public.child VALUES (NEW.*); RETURN NULL; END $$;"
            f"CREATE TRIGGER file_it BEFORE INSERT ON {TABLE} FOR EACH ROW EXECUTE FUNCTION file_it()"
        )
        assert list((await postgres_store.write(records(3))).failures) == []
        assert await postgres_admin.fetchval("SELECT count(*) FROM child") == 3

    async def test_row_level_security_takes_the_insert(
        self, postgres: settings.Postgres, postgres_admin: asyncpg.Connection
    ) -> None:
        """COPY refuses such a table; a role whose policy lets it in writes and reads as ever."""
        await _role(postgres_admin, "secured", "SELECT, INSERT")
        await postgres_admin.execute(
            f"ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY; CREATE POLICY all_of_it ON {TABLE} USING (true)"
        )
        store = PostgresStore(_as(postgres, "secured"), clock=SystemClock())
        try:
            assert list((await store.write(records(3))).failures) == []
            assert await store.count(CountQuery(BASE, BASE + DAY)) == 3
        finally:
            await store.close()

    async def test_insert_and_select_are_rights_enough(
        self, postgres: settings.Postgres, postgres_admin: asyncpg.Connection
    ) -> None:
        """Both ways of writing, both kinds of reading and ping need no other privilege."""
        await _role(postgres_admin, "modest", "SELECT, INSERT")
        store = PostgresStore(_as(postgres, "modest"), clock=SystemClock())
        try:
            await store.ping()
            await store.write(records(3))
            await store.write(records(4))
            assert list(await store.put_if_absent(records(5))) == [False] * 4 + [True]
            assert len([e async for e in store.scan(BASE, BASE + DAY)]) == 5
        finally:
            await store.close()

    async def test_columns_altered_under_an_open_connection_are_noticed(
        self, postgres_store: PostgresStore, postgres_admin: asyncpg.Connection
    ) -> None:
        """A column made wider while the sidecar runs costs one repetition, never a dead letter."""
        await postgres_store.write([record(1)])
        await postgres_admin.execute(f"ALTER TABLE {TABLE} ALTER status_code TYPE bigint")
        with pytest.raises(StoreError) as caught:
            await postgres_store.write([record(2)])
        assert caught.value.retry_class is RetryClass.TRANSIENT
        assert list((await postgres_store.write([record(2)])).failures) == []
        assert await postgres_store.get(log_id(2)) == record(2)
        assert await postgres_store.get(log_id(1)) == record(1)


class TestAmbiguousCommit:
    """The server committed, and its answer was lost."""

    @pytest.mark.parametrize("known", [False, True], ids=["copied", "inserted"])
    async def test_a_commit_whose_answer_is_lost_is_transient_and_the_repetition_converges(
        self, postgres: settings.Postgres, postgres_admin: asyncpg.Connection, *, known: bool
    ) -> None:
        """TRANSIENT although all is stored; written again, each record is there once and all are called stored."""
        async with Relay(postgres.port) as relay:
            store = PostgresStore(msgspec.structs.replace(postgres, port=relay.port), clock=SystemClock())
            batch = records(5)
            if known:  # a duplicate makes the store insert
                await store.write(batch[:1])
                await store.write(batch[:1])
            else:
                await store.write([record(99)])  # the statement's description is cached now
            relay.swallow = True
            with pytest.raises(StoreError) as caught:
                await store.write(batch)
            assert caught.value.retry_class is RetryClass.TRANSIENT
            stored = await postgres_admin.fetchval(f"SELECT count(*) FROM {TABLE} WHERE log_id <> $1", log_id(99))
            assert stored == 5
            assert list((await store.write(batch)).failures) == []
            await store.close()
        assert await postgres_admin.fetchval(f"SELECT count(*) FROM {TABLE} WHERE log_id <> $1", log_id(99)) == 5

    async def test_a_record_that_another_writer_has_not_yet_committed_is_waited_for(
        self, postgres_store: PostgresStore, postgres_admin: asyncpg.Connection
    ) -> None:
        """No early success on a row that may still be rolled back: then the record is stored by us."""
        batch = records(3)
        transaction = postgres_admin.transaction()
        await transaction.start()
        await postgres_admin.execute(
            f"INSERT INTO {TABLE} (log_id, service_name) VALUES ($1, 'other')", batch[1].log_id
        )
        writing = asyncio.create_task(postgres_store.write(batch))
        while not await postgres_admin.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            await asyncio.sleep(0.01)
        assert not writing.done()
        await transaction.rollback()
        assert list((await writing).failures) == []
        assert await postgres_store.get(batch[1].log_id) == batch[1]


class TestPlans:
    """Every answer walks along the index that was made for it, whatever the depth of the page."""

    @pytest.fixture
    async def filled(self, postgres_admin: asyncpg.Connection) -> None:
        """Twenty thousand records of many services, a fiftieth of them failures."""
        await postgres_admin.execute(
            f"INSERT INTO {TABLE} (log_id, application_id, service_name, is_success, log_timestamp, correlation_id, "
            "request_data) SELECT gen_random_uuid(), n % 500, 's' || n % 40, n % 50 <> 0, "
            f"to_timestamp({BASE // 1_000_000}) + n * interval '40 seconds', 'c' || n / 3, repeat('x', 300) "
            f"FROM generate_series(1, 20000) n; ANALYZE {TABLE}"
        )

    @pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
    @pytest.mark.parametrize(
        ("kind", "arguments"),
        [
            (ByApplication, ("7",)),
            (ByCorrelation, ("c99",)),
            (ByService, ("s7", "2026-01-15", "2026-01-24")),
            (ErrorsOn, ("2026-01-16", "2026-01-17")),
        ],
    )
    @pytest.mark.usefixtures("filled")
    async def test_a_page_walks_its_index_and_sorts_nothing(
        self, postgres_admin: asyncpg.Connection, kind: type, arguments: tuple[str, ...], mode: str
    ) -> None:
        """Whether the server plans for these values or for any: that index, no sort, no walk through the table."""
        index = {ByApplication: "application", ByCorrelation: "correlation", ByService: "service", ErrorsOn: "failures"}
        await postgres_admin.execute(f"SET plan_cache_mode = {mode}")
        plan = await _plan(postgres_admin, _SQL.pages[kind], ("20", "2026-01-20", log_id(0), *arguments))
        assert plan == ["Limit", f"Index Scan {TABLE}_{index[kind]}_idx"]

    @pytest.mark.usefixtures("filled")
    async def test_a_page_of_a_scan_walks_the_index_of_times(self, postgres_admin: asyncpg.Connection) -> None:
        """It starts where the last page ended, and only a page's worth is looked at."""
        plan = await _plan(postgres_admin, _SQL.scan, ("2026-01-16", "2026-01-17", log_id(0)))
        assert f"Index Scan {TABLE}_time_idx" in plan
        assert plan.index("Limit") == plan.index(f"Index Scan {TABLE}_time_idx") - 1
        assert "Seq Scan" not in "".join(plan)

    @pytest.mark.usefixtures("filled")
    async def test_a_scan_of_many_pages_misses_nothing(self, postgres_store: PostgresStore) -> None:
        """Twenty pages, ascending, each record once."""
        seen = [(e.log_timestamp, e.log_id) async for e in postgres_store.scan(BASE, BASE + 100 * DAY)]
        assert len(seen) == 20_000
        assert seen == sorted(set(seen))

    async def test_a_page_of_a_scan_is_bounded_in_bytes(self, postgres_store: PostgresStore) -> None:
        """Large records come a few at a time: memory stays bounded whatever they hold; none is missed."""
        sizes = []
        fetch = postgres_store._fetch

        async def measured(sql: str, *arguments: object) -> object:
            rows = await fetch(sql, *arguments)
            sizes.append(sum(len(row["request_data"]) for row in rows))
            return rows

        postgres_store._fetch = measured  # type: ignore[method-assign]  # a look at what each page brings
        batch = records(40, request_data="x" * 300_000)
        for start in range(0, 40, 10):
            await postgres_store.write(batch[start : start + 10])
        seen = [entry.log_id async for entry in postgres_store.scan(BASE, BASE + DAY)]
        assert seen == [r.log_id for r in batch]
        assert max(sizes) <= 4 * 1024 * 1024 + 300_000
        assert len(sizes) > 2


class TestSettings:
    """What is refused before anything is opened."""

    @pytest.mark.parametrize("name", ['a"b', "a.b", "1a", "", "a" * 64, "a b", "\u00e4", "a;", "a\n"])
    @pytest.mark.parametrize("setting", ["schema", "table"])
    async def test_an_identifier_that_is_none_is_refused(self, setting: str, name: str) -> None:
        """By the setting's name; nothing of it reaches a statement."""
        with pytest.raises(ConfigError, match=f"postgres.{setting}"):
            PostgresStore(settings.Postgres(**{setting: name}), clock=SystemClock())

    async def test_opening_does_not_connect(self) -> None:
        """A sidecar must accept records while a database is down."""
        store = PostgresStore(settings.Postgres(host="127.0.0.1", port=1), clock=SystemClock())
        assert store.name == "postgres"
        await store.close()

    async def test_a_table_named_like_a_keyword_in_a_schema_of_its_own_works(self, postgres: settings.Postgres) -> None:
        """Quoted everywhere: create, write, read, check."""
        options = msgspec.structs.replace(postgres, schema="Order", table="select")
        store = PostgresStore(options, clock=SystemClock())
        try:
            assert (await store.create())[:2] == ["schema Order", "table Order.select"]
            await store.write([record(1)])
            await store.write([record(1), record(2)])
            assert await store.get(log_id(2)) == record(2)
            assert all(c.ok for c in await store.check())
        finally:
            await store.close()


async def _plan(admin: asyncpg.Connection, sql: str, values: tuple[str, ...]) -> list[str]:
    """The nodes of a prepared statement's plan, from the top."""
    await admin.execute(f"PREPARE asked AS {sql}")
    literals = ", ".join(f"'{value}'" for value in values)
    (row,) = await admin.fetch(f"EXPLAIN (FORMAT JSON) EXECUTE asked({literals})")
    nodes, found = [json.loads(row[0])[0]["Plan"]], []
    while nodes:
        node = nodes.pop()
        found.append(" ".join(node[key] for key in ("Node Type", "Index Name") if key in node))
        nodes += node.get("Plans", [])
    return found


def _as(options: settings.Postgres, role: str) -> settings.Postgres:
    return msgspec.structs.replace(options, user=role, password=settings.Secret("pw"))


async def _role(admin: asyncpg.Connection, name: str, rights: str) -> None:
    """A role with some rights on the table; roles outlive a test's database, so it is made once."""
    if not await admin.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", name):
        await admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'pw'")
    await admin.execute(f"GRANT {rights} ON {TABLE} TO {name}")

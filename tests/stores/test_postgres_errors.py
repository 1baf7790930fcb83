"""What each error means for delivery: the table line by line, then the real server's real errors."""

import asyncio
import random
import ssl
import string
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.errors import RetryClass, StoreError
from sidecar.stores import postgres_errors
from sidecar.stores.postgres import PostgresStore
from tests.parts.postgres import connect
from tests.stores.records import log_id, record

TABLE = "integration_logs"
SECRET = "planted-4f1d"
CLIENT = "|22000"
"""The driver refuses to encode it: no code from COPY, the class's own from a statement's arguments."""
T, H, P, B, U = (
    RetryClass.TRANSIENT,
    RetryClass.THROTTLE,
    RetryClass.PERMANENT,
    RetryClass.BLOCKED,
    RetryClass.UNKNOWN,
)

EXPECTED = {
    T: "08000 08001 08003 08006 08P01 25006 25P02 25P03 40001 40P01 40003 53100 53200 53400 55006 55P03 57014 57P01"
    " 57P02 57P03 57P05 22P03 22P04",
    H: "53300",
    P: "22001 22003 22007 22021 22P02 22P05 23502 23503 23505 23514 23P01 40002 44000 54000 54001 54011 P0001",
    B: "0A000 26000 28000 28P01 3D000 3F000 42501 42601 42703 42804 42P01 42P05 42P10 57P04 58030 F0000 XX000 XX001"
    " XX002",
    U: "21000 23000 23001 27000 2F002 38000 55000 P0002 P0004 99999",
}
"""Semantics, section 5, written out: each class and SQLSTATEs of it."""

STATES = [(state, expected) for expected, states in EXPECTED.items() for state in states.split()]


def server_error(state: str, **fields: str) -> asyncpg.PostgresError:
    """What the driver makes of the server's answer; message, detail and hint quote the row."""
    texts = {"M": f"value {SECRET}", "D": f"Failing row contains ({SECRET}).", "H": SECRET, "W": SECRET, "C": state}
    return asyncpg.PostgresError.new(texts | fields, query=f"INSERT {SECRET}")


class TestTable:
    """The table alone."""

    @pytest.mark.parametrize(("state", "expected"), STATES)
    def test_a_sqlstate_means(self, state: str, expected: RetryClass) -> None:
        """Each SQLSTATE's class, its code kept, nothing of the server's texts."""
        error = postgres_errors.translate(server_error(state))
        assert (error.retry_class, error.code, error.store) == (expected, state, "postgres")
        assert SECRET not in repr((error.args, error.reason, vars(error)))

    def test_no_line_of_the_table_is_without_an_example_here(self) -> None:
        """A new line needs a line above."""
        named = {state for state, _ in STATES}
        unproved = [
            key for key in postgres_errors.BY_SQLSTATE if key not in named and not any(s.startswith(key) for s in named)
        ]
        assert unproved == []

    @pytest.mark.parametrize(("state", "expected"), STATES)
    def test_while_connecting_nothing_is_a_records_fault(self, state: str, expected: RetryClass) -> None:
        """Without a record at stake, what would bisect or dead-letter holds the store instead."""
        error = postgres_errors.translate(server_error(state), connecting=True)
        assert error.retry_class is (expected if expected in (T, H) else B)

    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (TimeoutError(), T),
            (ConnectionRefusedError(111, "refused"), T),
            (ConnectionResetError(104, "reset"), T),
            (ConnectionError("unexpected connection_lost() call"), T),
            (ConnectionError("PostgreSQL server at 'h' rejected SSL upgrade"), B),
            (OSError(113, "no route"), T),
            (ssl.SSLCertVerificationError("self-signed"), B),
            (ssl.SSLError("handshake"), T),
            (asyncpg.InterfaceError("connection is closed"), T),
            (asyncpg.InternalClientError("state"), T),
            (asyncpg.ProtocolError("unexpected message"), T),
            (asyncpg.OutdatedSchemaCacheError("altered"), T),
            (asyncpg.ConnectionDoesNotExistError("closed in the middle"), T),
            (asyncpg.InvalidCachedStatementError("cached plan"), T),
            (asyncpg.ClientConfigurationError("ssl"), B),
            (asyncpg.DataError(f"invalid input: {SECRET}"), P),
            (UnicodeEncodeError("utf-8", f"{SECRET}\ud800", 3, 4, "surrogates not allowed"), P),
            (OverflowError(f"{SECRET} out of int32 range"), P),
            (ValueError(f"invalid UUID {SECRET}"), P),
            (RuntimeError(SECRET), U),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
    )
    def test_a_drivers_error_means(self, error: Exception, expected: RetryClass) -> None:
        """Each exception type's class; its text, which may quote a value, stays behind."""
        seen = postgres_errors.translate(error)
        assert seen.retry_class is expected
        assert SECRET not in str(seen)

    def test_names_of_the_schema_are_told_and_what_is_no_name_is_not(self) -> None:
        """Table, constraint and column help the person on call; a trigger may put anything there."""
        named = server_error("23514", t=TABLE, n="amount_positive", c="status_code")
        told = postgres_errors.translate(named).reason
        assert told == f"check_violation (table {TABLE}, constraint amount_positive, column status_code)"
        odd = server_error("23514", n=f"value ({SECRET})", t="a b", c="x" * 64)
        assert postgres_errors.translate(odd).reason == "check_violation"


@dataclass(frozen=True)
class Harm:
    """Something done to the table, a record that meets it, and what the answer means."""

    expected: RetryClass
    code: str
    sql: str = "SELECT 1"
    changed: dict[str, Any] = field(default_factory=dict)


_RAISE = "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION '%', NEW.request_data"
_long = "".join(random.Random(1).choices(string.printable, k=40_000))  # too random to be compressed into an index

HARM = {
    "dropped table": Harm(B, "42P01", f"DROP TABLE {TABLE}"),
    "dropped column": Harm(B, "42703", f"ALTER TABLE {TABLE} DROP user_id"),
    "no unique key": Harm(B, "42P10", f"ALTER TABLE {TABLE} DROP CONSTRAINT {TABLE}_pkey"),
    "insert rule": Harm(B, "0A000", f"CREATE RULE r AS ON INSERT TO {TABLE} DO ALSO SELECT 1"),
    "check": Harm(P, "23514", f"ALTER TABLE {TABLE} ADD CHECK (request_data NOT LIKE 'planted%')"),
    "foreign key": Harm(
        P,
        "23503",
        f"CREATE TABLE app (id bigint PRIMARY KEY);ALTER TABLE {TABLE} ADD FOREIGN KEY (application_id) REFERENCES app",
    ),
    "not null": Harm(P, "23502", f"ALTER TABLE {TABLE} ALTER error_message SET NOT NULL"),
    "text too long": Harm(P, "22001", changed={"log_type": SECRET * 5}),
    "number out of range at the server": Harm(
        P,
        "22003",
        f"ALTER TABLE {TABLE} ADD ms integer GENERATED ALWAYS AS (processing_time_ms::integer) STORED",
        {"processing_time_ms": 2**40},
    ),
    "number out of range at the client": Harm(P, CLIENT, changed={"status_code": 2**31}),
    "time out of range": Harm(P, "22008", changed={"log_timestamp": -(2**62)}),
    "id that is none": Harm(P, CLIENT, changed={"log_id": SECRET}),
    "NUL": Harm(P, "22021", changed={"error_message": f"{SECRET}\x00"}),
    "lone surrogate": Harm(P, CLIENT, changed={"error_message": f"{SECRET}\ud800"}),
    "another unique key": Harm(
        P,
        "23505",
        f"CREATE UNIQUE INDEX other ON {TABLE} (user_id); INSERT INTO {TABLE} (log_id, service_name, user_id)"
        f" VALUES ('{log_id(99)}', 's', '{SECRET}')",
    ),
    "exclusion": Harm(
        P,
        "23P01",
        f"ALTER TABLE {TABLE} ADD EXCLUDE USING btree (user_id WITH =); INSERT INTO {TABLE} (log_id, service_name,"
        f" user_id) VALUES ('{log_id(99)}', 's', '{SECRET}')",
    ),
    "index row too large": Harm(
        P, "54000", f"CREATE INDEX ON {TABLE} (response_data)", {"response_data": f"{SECRET}{_long}"}
    ),
    "trigger that raises": Harm(
        P,
        "P0001",
        f"{_RAISE}; END $$;CREATE TRIGGER t BEFORE INSERT ON {TABLE} FOR EACH ROW EXECUTE FUNCTION f()",
    ),
    "deferred trigger that raises at the commit": Harm(
        P,
        "P0001",
        f"{_RAISE}; END $$;"
        f"CREATE CONSTRAINT TRIGGER t AFTER INSERT ON {TABLE} DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
        " EXECUTE FUNCTION f()",
    ),
    "trigger that raises a class of its own": Harm(
        U,
        "38000",
        f"{_RAISE} USING ERRCODE = '38000'; END $$;"
        f"CREATE TRIGGER t BEFORE INSERT ON {TABLE} FOR EACH ROW EXECUTE FUNCTION f()",
    ),
    "read-only server": Harm(T, "25006", "ALTER DATABASE current SET default_transaction_read_only = on"),
}


@pytest.fixture
async def closing() -> AsyncIterator[Callable[[settings.Postgres], PostgresStore]]:
    """Opens stores, and closes them when the test is over."""
    stores: list[PostgresStore] = []

    def opened(options: settings.Postgres) -> PostgresStore:
        stores.append(PostgresStore(options, clock=SystemClock()))
        return stores[-1]

    yield opened
    for store in stores:
        await store.close()


Closing = Callable[[settings.Postgres], PostgresStore]


async def refused(work: Awaitable[object]) -> StoreError:
    """The StoreError that ``work`` ends with; it is alone: no driver's error hangs on it, no value stands in it."""
    with pytest.raises(StoreError) as caught:
        await work
    error = caught.value
    assert SECRET not in "".join(traceback.format_exception(error))
    assert SECRET not in error.reason
    assert error.__cause__ is None
    assert error.__context__ is None
    return error


class TestRealErrors:
    """The server itself refuses; nothing of the batch is stored, and nothing of it is told."""

    @pytest.mark.parametrize("known", [False, True], ids=["copied", "inserted"])
    @pytest.mark.parametrize("name", HARM)
    async def test_a_refused_write_is_classified(
        self,
        closing: Closing,
        postgres: settings.Postgres,
        postgres_admin: asyncpg.Connection,
        name: str,
        *,
        known: bool,
    ) -> None:
        """Both ways of writing meet the same class and code; a planted value appears nowhere; no neighbour is in."""
        harm = HARM[name]
        await postgres_admin.execute(harm.sql.replace("current", f'"{postgres.database}"'))
        store = closing(postgres)
        store._optimistic = not known
        bad = record(2, **({"request_data": SECRET, "user_id": SECRET} | harm.changed))
        error = await refused(store.write([record(1), bad, record(3)]))
        assert error.retry_class is harm.expected
        assert error.code in harm.code.split("|")
        if name != "dropped table":
            left = await postgres_admin.fetchval(f"SELECT count(*) FROM {TABLE} WHERE log_id <> $1", log_id(99))
            assert left == 0

    async def test_a_revoked_right_blocks(
        self, closing: Closing, postgres: settings.Postgres, postgres_admin: asyncpg.Connection
    ) -> None:
        """INSERT taken away under an open store: write and ping are BLOCKED, reads go on; given back, all is well."""
        await _role(postgres_admin, "revoked")
        await postgres_admin.execute(f"GRANT SELECT, INSERT ON {TABLE} TO revoked")
        store = closing(msgspec.structs.replace(postgres, user="revoked", password=settings.Secret("pw")))
        await store.write([record(1)])
        await postgres_admin.execute(f"REVOKE INSERT ON {TABLE} FROM revoked")
        for work in (store.write([record(2)]), store.ping()):
            error = await refused(work)
            assert (error.retry_class, error.code) == (B, "42501")
            assert f"insufficient_privilege (table {TABLE.rpartition('.')[2]}): grant" in error.reason
        assert await store.get(log_id(1)) == record(1)
        await postgres_admin.execute(f"GRANT INSERT ON {TABLE} TO revoked")
        await store.ping()

    async def test_a_missing_table_blocks_ping_until_it_is_there(
        self, closing: Closing, postgres_empty: settings.Postgres
    ) -> None:
        """Then the same store, still open, goes on."""
        store = closing(postgres_empty)
        error = await refused(store.ping())
        assert (error.retry_class, error.code) == (B, "42P01")
        await store.create()
        await store.ping()
        await store.write([record(1)])

    @pytest.mark.parametrize(("setting", "code"), [("lock_timeout", "55P03"), ("statement_timeout", "57014")])
    async def test_a_wait_that_the_server_ends_is_transient(
        self,
        closing: Closing,
        postgres: settings.Postgres,
        postgres_admin: asyncpg.Connection,
        setting: str,
        code: str,
    ) -> None:
        """The administrator's shorter bound stands: TRANSIENT, and the store goes on when the lock is gone."""
        await postgres_admin.execute(f"ALTER DATABASE \"{postgres.database}\" SET {setting} = '60ms'")
        store = closing(postgres)
        async with postgres_admin.transaction():
            await postgres_admin.execute(f"LOCK TABLE {TABLE} IN SHARE MODE")
            error = await refused(store.write([record(1)]))
            assert (error.retry_class, error.code) == (T, code)
        await store.write([record(1)])

    async def test_a_deadlock_is_transient(
        self, closing: Closing, postgres: settings.Postgres, postgres_admin: asyncpg.Connection
    ) -> None:
        """Two writers meet in opposite orders: the server ends one; its repetition is stored."""
        await postgres_admin.execute("SET deadlock_timeout = '20s'")
        await postgres_admin.execute(f"ALTER DATABASE \"{postgres.database}\" SET deadlock_timeout = '500ms'")
        store = closing(postgres)
        insert = f"INSERT INTO {TABLE} (log_id, service_name) VALUES ($1, 's')"
        transaction = postgres_admin.transaction()
        await transaction.start()
        await postgres_admin.execute(insert, log_id(2))
        writing = asyncio.create_task(store.write([record(1), record(2)]))
        other = await connect(postgres)
        while not await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            await asyncio.sleep(0.005)
        await other.close()
        await postgres_admin.execute(insert, log_id(1))
        error = await refused(writing)
        assert (error.retry_class, error.code) == (T, "40P01")
        await transaction.rollback()
        assert list((await store.write([record(1), record(2)])).failures) == []

    async def test_a_terminated_backend_is_transient(
        self, closing: Closing, postgres: settings.Postgres, postgres_admin: asyncpg.Connection
    ) -> None:
        """At work and at rest: the next call has a new connection."""
        store = closing(postgres)
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'hybrid-log-sidecar'"
        async with postgres_admin.transaction():
            await postgres_admin.execute(f"LOCK TABLE {TABLE} IN SHARE MODE")
            writing = asyncio.create_task(store.write([record(1)]))
            while not await postgres_admin.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.005)
            await postgres_admin.execute(end)
            error = await refused(writing)
            assert error.retry_class is T
        await store.write([record(1)])
        await postgres_admin.execute(end)
        while await postgres_admin.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'hybrid-log-sidecar'"
        ):
            await asyncio.sleep(0.005)
        try:
            await store.write([record(2)])
        except StoreError as lost:  # the news of the end may be on its way still
            if lost.retry_class is not T:
                raise
            await store.write([record(2)])
        assert await store.get(log_id(2)) == record(2)

    async def test_no_connection_left_is_a_throttle(
        self, closing: Closing, postgres: settings.Postgres, postgres_admin: asyncpg.Connection
    ) -> None:
        """53300: fewer at a time helps."""
        await _role(postgres_admin, "single")
        await postgres_admin.execute(f"GRANT SELECT, INSERT ON {TABLE} TO single; ALTER ROLE single CONNECTION LIMIT 1")
        options = msgspec.structs.replace(postgres, user="single", password=settings.Secret("pw"))
        holder = await connect(options)
        error = await refused(closing(options).write([record(1)]))
        await holder.close()
        assert (error.retry_class, error.code) == (H, "53300")

    @pytest.mark.parametrize(
        ("changed", "code"),
        [
            ({"password": settings.Secret(SECRET)}, "28P01"),
            ({"user": "nobody_known"}, "28P01"),
            ({"database": "no_such_database"}, "3D000"),
            ({"sslmode": "require"}, ""),
        ],
        ids=["wrong password", "unknown user", "missing database", "a server without TLS"],
    )
    async def test_a_refused_connection_blocks(
        self, closing: Closing, postgres: settings.Postgres, changed: dict[str, Any], code: str
    ) -> None:
        """Nobody gets in until somebody mends it: BLOCKED, for every call alike."""
        store = closing(msgspec.structs.replace(postgres, **changed))
        for work in (store.write([record(1)]), store.get(log_id(1)), store.ping(), store.create()):
            error = await refused(work)
            assert (error.retry_class, error.code) == (B, code)

    async def test_a_missing_schema_blocks(self, closing: Closing, postgres: settings.Postgres) -> None:
        """As a missing table does."""
        error = await refused(closing(msgspec.structs.replace(postgres, schema="nowhere")).write([record(1)]))
        assert error.retry_class is B

    async def test_a_refused_port_is_transient(self, closing: Closing, postgres: settings.Postgres) -> None:
        """A database that is down."""
        server = await asyncio.start_server(lambda _, w: w.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        error = await refused(closing(msgspec.structs.replace(postgres, port=port)).write([record(1)]))
        assert error.retry_class is T

    async def test_a_read_only_server_is_left_for_another_connection(
        self, closing: Closing, postgres: settings.Postgres, postgres_admin: asyncpg.Connection
    ) -> None:
        """After a failover the name leads elsewhere: the connection to the former primary is not used again."""
        await postgres_admin.execute(f'ALTER DATABASE "{postgres.database}" SET default_transaction_read_only = on')
        store = closing(postgres)
        assert (await refused(store.write([record(1)]))).code == "25006"
        assert (await refused(store.ping())).code == "25006"
        await postgres_admin.execute(f'ALTER DATABASE "{postgres.database}" RESET default_transaction_read_only')
        await store.write([record(1)])

    async def test_a_reader_is_classified_like_a_writer(
        self, closing: Closing, postgres: settings.Postgres, postgres_admin: asyncpg.Connection
    ) -> None:
        """Never an empty answer: every reading call says what is wrong."""
        store = closing(postgres)
        await postgres_admin.execute(f"DROP TABLE {TABLE}")

        async def scanned() -> object:
            return [entry async for entry in store.scan(0, 10)]

        for work in (store.get(log_id(1)), scanned(), store.put_if_absent([record(1)])):
            error = await refused(work)
            assert (error.retry_class, error.code) == (B, "42P01")

    async def test_an_altered_column_is_no_readers_failure(
        self, closing: Closing, postgres: settings.Postgres, postgres_admin: asyncpg.Connection
    ) -> None:
        """A cached plan that no longer fits is planned again."""
        store = closing(postgres)
        await store.write([record(1)])
        assert await store.get(log_id(1)) == record(1)
        await postgres_admin.execute(f"ALTER TABLE {TABLE} ALTER status_code TYPE bigint")
        assert await store.get(log_id(1)) == record(1)


async def _role(admin: asyncpg.Connection, name: str) -> None:
    """A role; it outlives a test's database, so it is made once."""
    if not await admin.fetchval("SELECT count(*) FROM pg_roles WHERE rolname = $1", name):
        await admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'pw'")

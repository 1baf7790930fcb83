"""Each class of answers, raised for real by PostgreSQL or put into DynamoDB's mouth, leads to its action.

``harm`` is SQL that makes the server answer so, ``mend`` undoes it. What is seen: the record or the store is at fault,
the others are delivered, and nothing needs a restart.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import msgspec
import pytest

from sidecar import settings, shipper
from sidecar.clock import SystemClock
from sidecar.dead_letter import Selection
from sidecar.record import LogRecord
from sidecar.retry import State
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.postgres import PostgresStore
from tests.parts.delivery import QUICK, Delivery, delivering, record
from tests.parts.fault_proxy import Fault, FaultProxy, LoseReply, Refuse, Reset, Unprocess
from tests.parts.postgres import connect
from tests.parts.sidecar import eventually

BAD = 77
ALL = Selection(store="postgres")
ROLE = "CREATE ROLE {role} LOGIN PASSWORD 'pw'; GRANT INSERT, SELECT ON integration_logs TO {role}"


@dataclass
class Database:
    """A PostgreSQL, delivery into it, and a connection that does harm."""

    options: settings.Postgres
    delivery: Delivery
    admin: asyncpg.Connection

    async def numbers(self) -> list[int]:
        """What is in the table."""
        rows = await self.admin.fetch("SELECT application_id FROM integration_logs ORDER BY 1")
        return [row[0] for row in rows]


@asynccontextmanager
async def into_postgres(
    directory: Path, options: settings.Postgres, harm: str = "SELECT 1", **more: object
) -> AsyncIterator[Database]:
    """Harm first, then deliver."""
    admin = await connect(options)
    store = PostgresStore(
        msgspec.structs.replace(options, connect_timeout=2.0, command_timeout=2.0, idle_close=0.2), clock=SystemClock()
    )
    try:
        await admin.execute(harm)
        async with delivering(directory, store, **more) as delivery:  # type: ignore[arg-type]  (handed on)
            yield Database(options, delivery, admin)
    finally:
        await store.close()
        await admin.close()


def raising(condition: str, code: str) -> str:
    """A trigger that raises an SQLSTATE for some rows."""
    return f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF {condition} THEN RAISE EXCEPTION 'planted' USING ERRCODE = '{code}'; END IF; RETURN NEW; END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON integration_logs FOR EACH ROW EXECUTE FUNCTION refuse()"""


PERMANENT = {
    "CHECK": ("ALTER TABLE integration_logs ADD CHECK (processing_time_ms <> -1)", "23514", {}),
    "NOT NULL": ("ALTER TABLE integration_logs ALTER user_id SET NOT NULL", "23502", {"user_id": None}),
    "unique on another column": (
        "CREATE UNIQUE INDEX ON integration_logs (correlation_id)",
        "23505",
        {"correlation_id": "c-1"},
    ),
    "exclusion": (
        "ALTER TABLE integration_logs ADD EXCLUDE USING btree (correlation_id WITH =)",
        "23P01",
        {"correlation_id": "c-1"},
    ),
    "RAISE in a trigger": (raising("NEW.processing_time_ms = -1", "P0001"), "P0001", {}),
    "number that the driver refuses": (
        "ALTER TABLE integration_logs ALTER status_code TYPE smallint",
        "",
        {"status_code": 70_000},
    ),
    "number out of range": (
        "ALTER TABLE integration_logs ALTER application_id TYPE numeric(4)",
        "22003",
        {"application_id": 70_000},
    ),
    "text too long": (
        "ALTER TABLE integration_logs ALTER error_message TYPE varchar(5)",
        "22001",
        {"error_message": "too long"},
    ),
    "index row too large": (
        "CREATE INDEX ON integration_logs (request_data)",
        "54000",
        {"request_data": random.Random(1).randbytes(5_000).hex()},
    ),
}


@pytest.mark.parametrize("name", PERMANENT)
async def test_a_record_that_postgres_refuses_is_a_dead_letter_alone(tmp_path, postgres, name):
    """One of 100: 99 rows, one dead letter with class and code, none of the record's values in its reason."""
    harm, code, fields = PERMANENT[name]
    async with into_postgres(tmp_path, postgres, harm) as database:
        bad = record(BAD, **({"processing_time_ms": -1} | fields))
        await database.delivery.accept([record(1)])
        await database.delivery.settled()
        await database.delivery.accept([bad if n == BAD else record(n) for n in range(2, 101)])
        await database.delivery.settled()
        (letter,) = await database.delivery.dead()
        assert (letter.record, letter.retry_class, letter.code) == (bad, "permanent", code)
        assert "c-1" not in letter.reason
        assert "too long" not in letter.reason.replace("value too long", "")
        assert await database.numbers() == [n for n in range(1, 101) if n != BAD]


FOREIGN = """
    CREATE TABLE applications (id bigint PRIMARY KEY);
    INSERT INTO applications SELECT * FROM generate_series(1, 50);
    ALTER TABLE integration_logs ADD FOREIGN KEY (application_id) REFERENCES applications"""


async def test_a_parent_row_that_appears_later_saves_its_records(tmp_path, postgres):
    """23503: deferred, tried again within the grace, delivered once the parent is there; no dead letter."""
    async with into_postgres(tmp_path, postgres, FOREIGN) as database:
        delivery = database.delivery
        await delivery.accept([record(n) for n in range(1, 56)])
        await eventually(lambda: delivery.spool.counters("postgres").delivered == 50)
        assert delivery.spool.counters("postgres").pending == 5
        await database.admin.execute("INSERT INTO applications SELECT * FROM generate_series(51, 60)")
        await delivery.settled()
        assert not await delivery.dead()
        assert await database.numbers() == list(range(1, 56))


async def test_a_parent_row_that_never_appears_is_a_dead_letter_after_the_grace(tmp_path, postgres, monkeypatch):
    """23503 for good: one dead letter after all its tries, the others delivered."""
    monkeypatch.setattr(shipper, "_DEFERRED_POLL", 0.02)
    retry = msgspec.structs.replace(QUICK, fk_grace=0.3)
    async with into_postgres(tmp_path, postgres, FOREIGN, retry=retry) as database:
        await database.delivery.accept([record(n) for n in range(1, 52)])
        await database.delivery.settled()
        (letter,) = await database.delivery.dead()
        assert (letter.record, letter.code, letter.attempts) == (record(51), "23503", 16)


async def test_the_same_id_is_success_with_the_same_content_and_a_conflict_with_other(tmp_path, postgres):
    """What stands in the table is never overwritten."""
    async with into_postgres(tmp_path, postgres) as database:
        await database.delivery.accept([record(1), record(2)])
        await database.delivery.settled()
        await database.delivery.accept([record(1), record(2, service_name="other"), record(3)])
        await database.delivery.settled()
        (letter,) = await database.delivery.dead()
        assert (letter.log_id, letter.retry_class) == (record(2).log_id, "conflict")
        rows = await database.admin.fetch("SELECT DISTINCT service_name FROM integration_logs")
        assert [row[0] for row in rows] == ["orders"]


BLOCKED = {
    "a dropped table": (
        "ALTER TABLE integration_logs RENAME TO hidden",
        "ALTER TABLE hidden RENAME TO integration_logs",
    ),
    "a dropped column": (
        "ALTER TABLE integration_logs RENAME user_id TO hidden",
        "ALTER TABLE integration_logs RENAME hidden TO user_id",
    ),
    "REVOKE INSERT": (
        "REVOKE INSERT ON integration_logs FROM {role}",
        "GRANT INSERT ON integration_logs TO {role}",
    ),
    "another password": ("ALTER ROLE {role} PASSWORD 'other'", "ALTER ROLE {role} PASSWORD 'pw'"),
    "not supported": (raising("true", "0A000"), "DROP TRIGGER refuse ON integration_logs"),
    "internal error": (raising("true", "XX000"), "DROP TRIGGER refuse ON integration_logs"),
}
DOWN = {
    "read-only, as after a failover": (
        "ALTER ROLE {role} SET default_transaction_read_only = on",
        "ALTER ROLE {role} RESET default_transaction_read_only",
    ),
    "a disk that is full": (raising("true", "53100"), "DROP TRIGGER refuse ON integration_logs"),
    "serialization failures": (raising("true", "40001"), "DROP TRIGGER refuse ON integration_logs"),
    "deadlocks": (raising("true", "40P01"), "DROP TRIGGER refuse ON integration_logs"),
    "shutdown": (raising("true", "57P01"), "DROP TRIGGER refuse ON integration_logs"),
    "lock timeouts": (raising("true", "55P03"), "DROP TRIGGER refuse ON integration_logs"),
}
THROTTLED = {
    "too many connections": ("ALTER ROLE {role} CONNECTION LIMIT 0", "ALTER ROLE {role} CONNECTION LIMIT -1"),
}
STORE_FAULTS = [
    (state, name)
    for state, faults in ((State.BLOCKED, BLOCKED), (State.DOWN, DOWN), (State.THROTTLED, THROTTLED))
    for name in faults
]


@pytest.mark.parametrize(("state", "name"), STORE_FAULTS)
async def test_a_fault_of_postgres_itself_holds_everything_and_ends_without_a_restart(tmp_path, postgres, state, name):
    """The store's state says so, 0 dead letters, nothing lost; mended, all is delivered by the same run."""
    harm, mend = (BLOCKED | DOWN | THROTTLED)[name]
    role = f"role_{postgres.database}"
    admin = await connect(postgres)
    try:
        await admin.execute(ROLE.format(role=role))
        await admin.execute(harm.format(role=role))
        options = msgspec.structs.replace(postgres, user=role, password=settings.Secret("pw"))
        store = PostgresStore(msgspec.structs.replace(options, connect_timeout=2.0), clock=SystemClock())
        try:
            async with delivering(tmp_path, store) as delivery:
                await delivery.accept([record(n) for n in range(100)])
                await delivery.state(state)
                assert not await delivery.dead()
                assert delivery.spool.counters("postgres").delivered == 0
                await admin.execute(mend.format(role=role))
                await delivery.settled()
                assert not await delivery.dead()
        finally:
            await store.close()
        assert await admin.fetchval("SELECT count(*) FROM integration_logs") == 100
    finally:
        await admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        await admin.close()


async def test_a_connection_that_the_server_ends_costs_nothing(tmp_path, postgres):
    """pg_terminate_backend again and again while 2,000 records go through: every one is there once, none is dead."""
    async with into_postgres(tmp_path, postgres) as database:
        for start in range(0, 2000, 100):
            await database.delivery.accept([record(n) for n in range(start, start + 100)])
            await database.admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        await database.delivery.settled()
        assert not await database.delivery.dead()
        assert await database.numbers() == list(range(2000))


SWALLOWING = """
    CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF NEW.application_id >= {first} THEN RETURN NULL; END IF; RETURN NEW; END $$;
    CREATE TRIGGER swallow BEFORE INSERT ON integration_logs FOR EACH ROW EXECUTE FUNCTION swallow()"""


async def test_an_answer_of_unknown_meaning_is_a_dead_letter_after_its_attempts(tmp_path, postgres):
    """A trigger that silently swallows one row: tried three times alone, then dead, as unknown."""
    async with into_postgres(tmp_path, postgres, SWALLOWING.format(first=99)) as database:
        await database.delivery.accept([record(n) for n in range(100)])
        await database.delivery.settled()
        (letter,) = await database.delivery.dead()
        assert (letter.record, letter.retry_class, letter.attempts) == (record(99), "unknown", 3)
        assert await database.numbers() == list(range(99))


async def test_many_answers_of_unknown_meaning_in_a_row_block_the_store(tmp_path, postgres):
    """A trigger that swallows every row: the store is at fault; mended, everything is delivered."""
    async with into_postgres(tmp_path, postgres, SWALLOWING.format(first=0)) as database:
        await database.delivery.accept([record(n) for n in range(100)])
        await database.delivery.state(State.BLOCKED)
        assert not await database.delivery.dead()
        await database.admin.execute("DROP TRIGGER swallow ON integration_logs")
        await database.delivery.settled()
        assert not await database.delivery.dead()
        assert await database.numbers() == list(range(100))


async def test_the_brake_stops_a_rule_that_refuses_most_records(tmp_path, postgres):
    """A CHECK that nobody meets: blocked with its reason after some dozens; the rule gone, the rest is delivered."""
    async with into_postgres(
        tmp_path, postgres, "ALTER TABLE integration_logs ADD CONSTRAINT odd CHECK (status_code = 1) NOT VALID"
    ) as database:
        delivery = database.delivery
        await delivery.accept([record(n) for n in range(400)])
        await delivery.state(State.BLOCKED)
        assert "schema or rules" in delivery.shipper.status().reason
        await database.admin.execute("ALTER TABLE integration_logs DROP CONSTRAINT odd")
        await delivery.settled()
        dead = len(await delivery.dead())
        assert 40 < dead < 60
        assert len(await database.numbers()) == 400 - dead
        assert await delivery.letters.redrive(ALL, who="test", reason="mended") == dead
        await delivery.settled()
        assert await database.numbers() == list(range(400))
        assert not await delivery.dead()


async def test_at_their_bound_dead_letters_block_the_store_and_nothing_is_overwritten(tmp_path, postgres):
    """Room for a few: the letters stay as they are, the store waits, and goes on when an operator makes room."""
    async with into_postgres(
        tmp_path, postgres, "ALTER TABLE integration_logs ADD CHECK (processing_time_ms <> -1)", max_dead_bytes=500
    ) as database:
        delivery = database.delivery
        for start in (0, 100):
            await delivery.accept([poisoned(n) for n in range(start, start + 100)])
            await delivery.settled()
        letters = await delivery.dead()
        assert len(letters) == 10
        await delivery.accept([poisoned(n) for n in range(200, 300)])
        await delivery.state(State.BLOCKED)
        assert "bound" in delivery.shipper.status().reason
        await asyncio.sleep(0.3)  # three probes
        assert await delivery.dead() == letters
        assert await delivery.letters.discard(ALL, who="test", reason="known bad") == 10
        await delivery.settled()
        assert len(await database.numbers()) == 285
        assert len(await delivery.dead()) == 5


def poisoned(n: int) -> LogRecord:
    """One in twenty breaks the rule."""
    return record(n, processing_time_ms=-1 if n % 20 == 7 else n)


class Picky(FaultProxy):
    """Refuses every call that carries one of these ids."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.poison: dict[str, Fault] = {}

    def _next(self, operation: str) -> Fault | None:
        text = str(self.bodies[-1][1])
        return next((fault for log_id, fault in self.poison.items() if log_id in text), super()._next(operation))


@asynccontextmanager
async def into_dynamodb(directory: Path, options: settings.DynamoDB) -> AsyncIterator[tuple[Picky, Delivery]]:
    """Deliver through a proxy."""
    assert options.endpoint_url is not None
    async with Picky(options.endpoint_url) as proxy:
        behind = msgspec.structs.replace(options, endpoint_url=proxy.url, read_timeout=1.0, connect_timeout=1.0)
        store = DynamoDBStore(behind, clock=SystemClock())
        try:
            await store.ping()
            async with delivering(directory, store) as delivery:
                yield proxy, delivery
        finally:
            await store.close()


async def stored(store: DynamoDBStore, numbers: range) -> set[int]:
    """Which of them DynamoDB has, read by id."""
    found = await asyncio.gather(*(store.get(record(n).log_id) for n in numbers))
    return {n for n, each in zip(numbers, found, strict=True) if each is not None}


DYNAMODB_FAULTS: dict[str, tuple[State, Fault]] = {
    **{
        code: (State.BLOCKED, Refuse(400, code))
        for code in (
            "ResourceNotFoundException",
            "AccessDeniedException",
            "UnrecognizedClientException",
            "ExpiredTokenException",
            "InvalidSignatureException",
            "KMSAccessDeniedException",
        )
    },
    **{
        code: (State.THROTTLED, Refuse(400, code))
        for code in ("ProvisionedThroughputExceededException", "ThrottlingException", "RequestLimitExceeded")
    },
    "UnprocessedItems": (State.THROTTLED, Unprocess(0.0)),
    "InternalServerError": (State.DOWN, Refuse(500, "InternalServerError")),
    "TransactionConflictException": (State.DOWN, Refuse(400, "TransactionConflictException")),
    "a reset connection": (State.DOWN, Reset()),
    "a lost reply": (State.DOWN, LoseReply()),
}


@pytest.mark.parametrize("name", DYNAMODB_FAULTS)
async def test_a_fault_of_dynamodb_itself_holds_everything_and_ends_without_a_restart(
    tmp_path, dynamodb_store, dynamodb_settings, name
):
    """The store's state says so, 0 dead letters; when it ends, all is delivered by the same run."""
    state, fault = DYNAMODB_FAULTS[name]
    async with into_dynamodb(tmp_path, dynamodb_settings) as (proxy, delivery):
        proxy.on("BatchWriteItem", fault)
        await delivery.accept([record(n) for n in range(60)])
        await delivery.state(state)
        assert not await delivery.dead()
        assert delivery.spool.counters("dynamodb").delivered == 0
        proxy.clear()
        await delivery.settled()
        assert not await delivery.dead()
    assert await stored(dynamodb_store, range(60)) == set(range(60))


@pytest.mark.parametrize("expected", [("ValidationException", "permanent", 1), ("NeverHeardOfException", "unknown", 3)])
async def test_an_item_that_dynamodb_refuses_is_a_dead_letter_alone(
    tmp_path, dynamodb_store, dynamodb_settings, expected
):
    """Refused wherever it is in a batch: bisected to the item, its neighbours delivered."""
    async with into_dynamodb(tmp_path, dynamodb_settings) as (proxy, delivery):
        proxy.poison = {record(BAD).log_id: Refuse(400, expected[0])}
        await delivery.accept([record(n) for n in range(100)])
        await delivery.settled()
        (letter,) = await delivery.dead()
        assert (letter.record, letter.retry_class, letter.attempts) == (record(BAD), *expected[1:])
    assert await stored(dynamodb_store, range(100)) == set(range(100)) - {BAD}

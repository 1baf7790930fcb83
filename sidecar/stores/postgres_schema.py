r"""The table of integration logs in PostgreSQL: its columns, its indexes, what each is for, and how they are checked.

Columns: thirteen typed ones; payloads are ``text``, not ``jsonb``, which would reorder keys, drop duplicates and
refuse \u0000 (semantics, section 1). Texts that are looked up collate as ``"C"``: equality is by bytes anyway, bytes
compare faster, and an index does not rot when the operating system's collation changes.

Every index but the key ends in (log_timestamp, log_id), the order of every answer, so that a page costs a walk along
one index whatever its depth. What each index is worth on writes stands in ``docs/STORES.md``. ``application`` and
``correlation`` leave out the rows without one.

``create`` never touches a table or a valid index that is there: an index that is missing or invalid is made
CONCURRENTLY (writes go on), and what differs otherwise is for ``check`` to report.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

from sidecar.errors import RetryClass, StoreError
from sidecar.phase import POSTGRES
from sidecar.record import FIELDS
from sidecar.stores import postgres_fleet, postgres_gaps, postgres_tail
from sidecar.stores.base import Check
from sidecar.stores.identifiers import quoted, suffixed
from sidecar.stores.postgres_connections import Connection, Connections, Link, unique_on

_LOCK: Final = 0x5349_4445_4341_5200  # "SIDECAR\0": one creation at a time per database
_TURN_SECONDS: Final = 0.05  # between two questions whose turn it is
INDEX_SECONDS: Final = 24 * 3600.0
"""How long one index on a table with rows may take."""


class Column(NamedTuple):
    """A column as ``create`` makes it, and the types that ``check`` lets pass."""

    definition: str
    accepted: frozenset[str]  # of pg_catalog.format_type, length left out
    nullable: bool


class Index(NamedTuple):
    """An index: the end of its name, and what follows USING."""

    suffix: str
    definition: str
    serves: str


def _column(definition: str, *accepted: str, nullable: bool = True) -> Column:
    return Column(definition, frozenset(accepted), nullable)


_TEXT: Final = ("text", "character varying")

COLUMNS: Final = {
    "log_id": _column("uuid PRIMARY KEY", "uuid", nullable=False),
    "application_id": _column("bigint", "bigint"),
    "log_type": _column("varchar(50) NOT NULL DEFAULT 'INFO'", *_TEXT, nullable=False),
    "service_name": _column('varchar(100) COLLATE "C" NOT NULL', *_TEXT, nullable=False),
    "request_data": _column("text", "text"),
    "response_data": _column("text", "text"),
    "status_code": _column("integer", "integer", "bigint"),
    "is_success": _column("boolean NOT NULL DEFAULT true", "boolean", nullable=False),
    "error_message": _column("text", "text"),
    "processing_time_ms": _column("bigint", "bigint"),
    "log_timestamp": _column("timestamptz NOT NULL DEFAULT now()", "timestamp with time zone", nullable=False),
    "correlation_id": _column('varchar(100) COLLATE "C"', *_TEXT),
    "user_id": _column('varchar(100) COLLATE "C"', *_TEXT),
}
if tuple(COLUMNS) != FIELDS:
    raise AssertionError("the columns are the record's fields, in its order")

INDEXES: Final = (
    Index(
        "_application_idx",
        "(application_id, log_timestamp DESC, log_id DESC) WHERE application_id IS NOT NULL",
        "records of an application",
    ),
    Index(
        "_service_idx",
        "(service_name, log_timestamp DESC, log_id DESC)",
        "records of a service and a time range; counts of a service",
    ),
    Index(
        "_correlation_idx",
        "(correlation_id, log_timestamp DESC, log_id DESC) WHERE correlation_id IS NOT NULL",
        "records with a correlation id",
    ),
    Index(
        "_failures_idx",
        "(log_timestamp DESC, log_id DESC) WHERE NOT is_success",
        "failures of a day",
    ),
    Index(
        "_time_idx",
        "(log_timestamp, log_id)",
        "validation and backfill, which walk a window in order; counts of a time range",
    ),
)


def create_table(schema: str, table: str) -> str:
    """The statement that makes the table where it is missing."""
    columns = ",\n  ".join(f"{quoted(name)} {column.definition}" for name, column in COLUMNS.items())
    return f"CREATE TABLE IF NOT EXISTS {quoted(schema, table)} (\n  {columns}\n)"


def create_index(schema: str, table: str, index: Index, *, concurrently: bool = False) -> str:
    """The statement that makes one index where it is missing."""
    how = "CONCURRENTLY " if concurrently else ""
    name = quoted(suffixed(table, index.suffix))
    return f"CREATE INDEX {how}IF NOT EXISTS {name} ON {quoted(schema, table)} {index.definition}"


async def create(short: Connections, patient: Connections, schema: str, table: str) -> Sequence[str]:
    """Make schema, table, indexes, gap ledger and fleet tables where missing; returns what was done.

    One sidecar at a time per database, by an advisory lock: two concurrent builds on one table would end in a
    deadlock, and its victim in an invalid index. Who waits for the lock asks for it again and again, because a
    statement that waits holds a snapshot, for whose end a concurrent build waits in turn.

    Args:
        short: for the look that usually finds everything there.
        patient: at least two connections whose commands may take ``INDEX_SECONDS``.
        schema: checked name.
        table: checked name.
    """

    async def look(link: Link) -> bool:
        connection = link.connection
        return (
            not await _incomplete(connection, schema, table)
            and await postgres_gaps.exists(connection, schema, table)
            and not await postgres_fleet.missing(connection, schema, table)
        )

    async def make(link: Link) -> Sequence[str]:
        done: list[str] = []
        async with turn(link.connection):
            done += await _make_table(link.connection, schema, table)
        async with turn(link.connection):  # of its own: the table must be committed before a concurrent build
            missing = await _incomplete(link.connection, schema, table)
            # The last query's portal, and with it a snapshot that a concurrent build would wait for, lives until
            # the next simple statement.
            await link.connection.execute("SELECT 1")
            for index in missing:

                async def build(other: Link, index: Index = index) -> str:
                    return await _build_index(other.connection, schema, table, index)

                done.append(await patient.run(build, whole=False))
        return done

    if await short.run(look):
        return ()
    return await patient.run(make, whole=False)


async def create_beside(patient: Connections, schema: str, table: str) -> Sequence[str]:
    """Make the tables beside an adopted one, which is never touched; returns what was done.

    Raises:
        StoreError: BLOCKED where the adopted table is not there: nothing is made in its place.
    """

    async def make(link: Link) -> Sequence[str]:
        connection = link.connection
        async with turn(connection):
            if not await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", quoted(schema, table)):
                raise StoreError(
                    POSTGRES,
                    RetryClass.BLOCKED,
                    f"postgres.adopt: there is no table {schema}.{table}; postgres.schema and postgres.table name it",
                )
            done = [*await postgres_gaps.create(connection, schema, table)]
            done += await postgres_fleet.create(connection, schema, table)
            return [*done, *await postgres_tail.create(connection, schema, table)]

    return await patient.run(make, whole=False)


@asynccontextmanager
async def turn(connection: Connection) -> AsyncIterator[None]:
    """A transaction of the one sidecar whose turn it is."""
    while True:
        async with connection.transaction():
            if await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", _LOCK):
                yield
                return
        await asyncio.sleep(_TURN_SECONDS)


async def _make_table(connection: Connection, schema: str, table: str) -> Sequence[str]:
    done = []
    if not await connection.fetchval("SELECT to_regnamespace($1) IS NOT NULL", quoted(schema)):
        await connection.execute(f"CREATE SCHEMA {quoted(schema)}")
        done.append(f"schema {schema}")
    if not await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", quoted(schema, table)):
        await connection.execute(create_table(schema, table))
        done.append(f"table {schema}.{table}")
        for index in INDEXES:
            await connection.execute(create_index(schema, table, index))
            done.append(f"index {suffixed(table, index.suffix)}")
    done += await postgres_gaps.create(connection, schema, table)
    return [*done, *await postgres_fleet.create(connection, schema, table)]


async def _build_index(connection: Connection, schema: str, table: str, index: Index) -> str:
    """Give a table with rows one index while writes go on. Outside of a transaction: CONCURRENTLY asks for that."""
    name = suffixed(table, index.suffix)
    # An invalid one is what a build leaves that was interrupted; nobody builds now, it is our turn.
    await connection.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {quoted(schema, name)}")
    await connection.execute(create_index(schema, table, index, concurrently=True))
    return f"index {name}"


async def _incomplete(connection: Connection, schema: str, table: str) -> Sequence[Index]:
    """The indexes that are missing or invalid: all of them where the table is missing."""
    there = await _indexes(connection, schema, table)
    return [index for index in INDEXES if not there.get(suffixed(table, index.suffix))]


async def check(connection: Connection, schema: str, table: str) -> Sequence[Check]:
    """Compare server, table, key and indexes with what is needed."""
    relation = quoted(schema, table)
    checks = await check_server(connection)
    kind = await connection.fetchval("SELECT relkind::text FROM pg_class WHERE oid = to_regclass($1)", relation)
    there = kind in ("r", "p")
    checks.append(Check("postgres.table", there, f"{schema}.{table}: {KINDS.get(kind, kind)}", "an ordinary table"))
    if not there:
        return checks
    checks.extend(await _check_columns(connection, relation))
    checks.extend(await check_rights(connection, relation))
    checks.extend(await _check_keys(connection, schema, table))
    checks.extend(await postgres_gaps.check(connection, schema, table))
    checks.extend(await postgres_fleet.check(connection, schema, table))
    return checks


async def check_server(connection: Connection) -> list[Check]:
    """Encoding, a primary, and commits that reach the disk."""
    checks = [
        Check("postgres.encoding", seen == "UTF8", seen, "UTF8")
        for seen in [await connection.fetchval("SELECT current_setting('server_encoding')")]
    ]
    recovery = await connection.fetchval("SELECT pg_is_in_recovery()")
    checks.append(Check("postgres.writable", not recovery, "standby" if recovery else "primary", "primary"))
    durable = await connection.fetchval(
        "SELECT coalesce((SELECT reset_val FROM pg_settings WHERE name = 'synchronous_commit'), 'on')"
    )
    checks.append(Check("postgres.synchronous_commit", durable != "off", durable, "on (the sidecar raises off to on)"))
    return checks


KINDS: Final = {None: "missing", "r": "table", "p": "partitioned table", "v": "view", "f": "foreign table"}


async def _check_columns(connection: Connection, relation: str) -> Sequence[Check]:
    rows = await connection.fetch(
        "SELECT attname::text AS name, format_type(atttypid, NULL) AS type, attnotnull AS required, "
        "atthasdef AS filled FROM pg_attribute WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped",
        relation,
    )
    seen = {row["name"]: row for row in rows}
    checks = []
    for name, column in COLUMNS.items():
        row = seen.get(name)
        required = " or ".join(sorted(column.accepted))
        if row is None:
            checks.append(Check(f"postgres.column.{name}", ok=False, observed="missing", required=required))
            continue
        fits = row["type"] in column.accepted and not (column.nullable and row["required"])
        null = " NOT NULL" if row["required"] else ""
        checks.append(
            Check(
                f"postgres.column.{name}",
                fits,
                row["type"] + null,
                required + (", nullable" if column.nullable else ""),
            )
        )
    checks.extend(
        Check(f"postgres.column.{name}", ok=False, observed="NOT NULL", required="a default, or nullable")
        for name, row in seen.items()
        if name not in COLUMNS and row["required"] and not row["filled"]
    )
    return checks


async def check_rights(connection: Connection, relation: str) -> Sequence[Check]:
    """What a sidecar must be granted on the table of records."""
    return [
        Check(f"postgres.grant.{right.lower()}", held, "granted" if held else "missing", f"{right} on the table")
        for right in ("INSERT", "SELECT")
        for held in [await connection.fetchval("SELECT has_table_privilege(to_regclass($1), $2)", relation, right)]
    ]


async def _check_keys(connection: Connection, schema: str, table: str) -> Sequence[Check]:
    unique_key = unique_on("to_regclass($1)", "'log_id'")
    unique = await connection.fetchval(f"SELECT {unique_key}", quoted(schema, table))
    there = await _indexes(connection, schema, table)
    checks = [Check("postgres.key", unique, "unique" if unique else "not unique", "a unique index on log_id alone")]
    for index in INDEXES:
        name = suffixed(table, index.suffix)
        state = {True: "valid", False: "invalid: a build was interrupted; create makes it anew"}
        valid = there.get(name)
        observed = "missing" if valid is None else state[valid]
        checks.append(Check(f"postgres.index.{name}", bool(valid), observed, f"valid, for {index.serves}"))
    return checks


async def _indexes(connection: Connection, schema: str, table: str) -> dict[str, bool]:
    """Name of each index of the table, and whether it is valid."""
    rows = await connection.fetch(
        "SELECT c.relname::text AS name, i.indisvalid AS valid FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid "
        "WHERE i.indrelid = to_regclass($1)",
        quoted(schema, table),
    )
    return {row["name"]: row["valid"] for row in rows}

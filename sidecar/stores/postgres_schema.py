r"""The table of integration logs in PostgreSQL: its columns, its indexes, what each is for, and how they are checked.

Columns: thirteen typed ones; payloads are ``text``, not ``jsonb``, which would reorder keys, drop duplicates and
refuse \u0000 (semantics, section 1). Texts that are looked up collate as ``"C"``: equality is by bytes anyway, bytes
compare faster, and an index does not rot when the operating system's collation changes.

Every index but the key ends in (log_timestamp, log_id), the order of every answer, so that a page costs a walk along
one index whatever its depth. What each index is worth on writes stands in ``docs/STORES.md``. ``application`` and
``correlation`` leave out the rows without one.

``create`` never touches what is there: a table that lacks an index gets it CONCURRENTLY (writes go on), and what
differs otherwise is for ``check`` to report.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import asyncpg

from sidecar.record import FIELDS
from sidecar.stores import postgres_gaps
from sidecar.stores.base import Check
from sidecar.stores.identifiers import quoted, suffixed
from sidecar.stores.postgres_connections import Connection, unique_on_log_id

_LOCK: Final = 0x5349_4445_4341_5200  # "SIDECAR\0": one creation at a time per database
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


async def create(connection: Connection, schema: str, table: str) -> tuple[Sequence[str], Sequence[Index]]:
    """Make schema and table where missing; what was done, and which indexes an older table lacks.

    Safe beside another ``create``: one at a time per database.
    """
    done: list[str] = []
    async with connection.transaction():
        await connection.execute(f"SELECT pg_advisory_xact_lock({_LOCK})")
        if not await connection.fetchval("SELECT to_regnamespace($1) IS NOT NULL", quoted(schema)):
            await connection.execute(f"CREATE SCHEMA {quoted(schema)}")
            done.append(f"schema {schema}")
        if not await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", quoted(schema, table)):
            await connection.execute(create_table(schema, table))
            done.append(f"table {schema}.{table}")
            for index in INDEXES:
                await connection.execute(create_index(schema, table, index))
                done.append(f"index {suffixed(table, index.suffix)}")
        done.extend(await postgres_gaps.create(connection, schema, table))
        there = await _indexes(connection, schema, table)
    return done, [index for index in INDEXES if suffixed(table, index.suffix) not in there]


async def add_index(connection: Connection, schema: str, table: str, index: Index) -> Sequence[str]:
    """Give a table with rows one index while writes go on; not in a transaction. What was done."""
    try:
        await connection.execute(create_index(schema, table, index, concurrently=True))
    except (asyncpg.DuplicateTableError, asyncpg.UniqueViolationError):
        return ()  # another sidecar makes the same one at this moment
    return (f"index {suffixed(table, index.suffix)}",)


async def check(connection: Connection, schema: str, table: str) -> Sequence[Check]:
    """Compare server, table, key and indexes with what is needed."""
    relation = quoted(schema, table)
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
    kind = await connection.fetchval("SELECT relkind::text FROM pg_class WHERE oid = to_regclass($1)", relation)
    there = kind in ("r", "p")
    checks.append(Check("postgres.table", there, f"{schema}.{table}: {_KINDS.get(kind, kind)}", "an ordinary table"))
    if not there:
        return checks
    checks.extend(await _check_columns(connection, relation))
    checks.extend(await _check_rights(connection, relation))
    checks.extend(await _check_keys(connection, schema, table))
    checks.extend(await postgres_gaps.check(connection, schema, table))
    return checks


_KINDS: Final = {None: "missing", "r": "table", "p": "partitioned table", "v": "view", "f": "foreign table"}


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


async def _check_rights(connection: Connection, relation: str) -> Sequence[Check]:
    return [
        Check(f"postgres.grant.{right.lower()}", held, "granted" if held else "missing", f"{right} on the table")
        for right in ("INSERT", "SELECT")
        for held in [await connection.fetchval("SELECT has_table_privilege(to_regclass($1), $2)", relation, right)]
    ]


async def _check_keys(connection: Connection, schema: str, table: str) -> Sequence[Check]:
    unique = await connection.fetchval(f"SELECT {unique_on_log_id('to_regclass($1)')}", quoted(schema, table))
    there = await _indexes(connection, schema, table)
    checks = [Check("postgres.key", unique, "unique" if unique else "not unique", "a unique index on log_id alone")]
    for index in INDEXES:
        name = suffixed(table, index.suffix)
        state = {True: "valid", False: f"invalid: REINDEX INDEX CONCURRENTLY {quoted(schema, name)}"}
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

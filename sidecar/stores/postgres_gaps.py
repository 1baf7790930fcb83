"""The gap ledger in PostgreSQL: one row for each (store, kind, hour, source), in a table beside the records.

The table's name is the records' with ``_gaps`` behind it. Lines are merged by one INSERT of arrays with ON CONFLICT and
GREATEST: one statement, so all lines of a call or none, and writing them twice changes nothing. The rows are sorted by
their key first, so that two sidecars that write the same lines do not wait for each other in a circle.

A database that was created by an earlier version has no such table: then every call is BLOCKED with 42P01, which
``check`` reports, and ``create`` makes it.
"""

from collections.abc import Sequence
from typing import Final

from sidecar.gaps import GapLine, summed
from sidecar.stores.base import Check
from sidecar.stores.identifiers import quoted, suffixed
from sidecar.stores.postgres_connections import Connection, Connections

_SUFFIX: Final = "_gaps"
_RIGHTS: Final = ("INSERT", "SELECT", "UPDATE")


def gap_table(table: str) -> str:
    """The ledger's name beside a table of records."""
    return suffixed(table, _SUFFIX)


async def exists(connection: Connection, schema: str, table: str) -> bool:
    """Whether the table is there."""
    there: bool = await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", quoted(schema, gap_table(table)))
    return there


async def create(connection: Connection, schema: str, table: str) -> Sequence[str]:
    """Make the table where it is missing; what was done. Inside the transaction that makes the records' table."""
    name = gap_table(table)
    if await exists(connection, schema, table):
        return ()
    await connection.execute(
        f"CREATE TABLE {quoted(schema, name)} ("
        'store text COLLATE "C" NOT NULL, kind text COLLATE "C" NOT NULL, hour bigint NOT NULL, '
        'source text COLLATE "C" NOT NULL, opened bigint NOT NULL CHECK (opened >= 0), '
        "closed bigint NOT NULL DEFAULT 0 CHECK (closed >= 0), PRIMARY KEY (store, kind, hour, source))"
    )
    return (f"table {schema}.{name}",)


async def check(connection: Connection, schema: str, table: str) -> Sequence[Check]:
    """Whether the table is there and may be used."""
    name = gap_table(table)
    held = [
        right
        for right in _RIGHTS
        if await connection.fetchval("SELECT has_table_privilege(to_regclass($1), $2)", quoted(schema, name), right)
    ]
    observed = ", ".join(held) or "missing, or no right at all"
    return (
        Check(
            "postgres.gaps", len(held) == len(_RIGHTS), observed, f"table {schema}.{name} with INSERT, SELECT, UPDATE"
        ),
    )


class PostgresGaps:
    """``sidecar.gaps.GapLedger`` over the store's own connections."""

    def __init__(self, writers: Connections, readers: Connections, schema: str, table: str) -> None:
        relation = quoted(schema, gap_table(table))
        self._writers = writers
        self._readers = readers
        self._put = (
            f"INSERT INTO {relation} AS g (store, kind, hour, source, opened, closed) "
            "SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::bigint[], $6::bigint[]) "
            "ON CONFLICT (store, kind, hour, source) DO UPDATE SET "
            "opened = greatest(g.opened, EXCLUDED.opened), closed = greatest(g.closed, EXCLUDED.closed)"
        )
        self._open = f"SELECT store, kind, hour, source, opened, closed FROM {relation} WHERE opened > closed"

    async def put_gaps(self, lines: Sequence[GapLine]) -> None:
        """One statement for all lines; a key may stand in them more than once."""
        if not lines:
            return
        rows = sorted((*line.key, line.opened, line.closed) for line in summed(lines))
        columns = tuple(zip(*rows, strict=True))
        await self._writers.run(lambda link: link.connection.execute(self._put, *columns))

    async def gaps(self) -> Sequence[GapLine]:
        """All open lines in one answer; there is one for each hour and source."""
        rows = await self._readers.run(lambda link: link.connection.fetch(self._open))
        return [
            GapLine(store=store, kind=kind, hour=hour, source=source, opened=opened, closed=closed)
            for store, kind, hour, source, opened, closed in rows
        ]

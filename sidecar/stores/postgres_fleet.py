"""The fleet's tables in PostgreSQL: record, heartbeats, leases, audit trail and fates, beside the table of records.

Each table's name is the records' with a suffix; ``TABLES`` is the one description of what ``create`` makes, of the
rights that a sidecar needs, and of what ``check`` looks for. Values are JSON text; what conditions look at stands in
columns of its own beside it.

Every method but ``put_gaps`` is one statement, so it happens wholly or not at all, also with a transaction pooler:

* the record is one row; a compare-and-set is one UPDATE with (epoch, revision) in its WHERE, or, where none is
  expected, one INSERT that does nothing on conflict. The second of two at once waits for the first and compares again;
* heartbeats and fates are replaced only by a higher number; the trail's lines are inserted once and never touched;
* a lease expires by the server's clock. It is free, too, when it runs longer than its holder asked for: then the
  server's clock was set back, and nobody should wait for it to catch up. Who sees that another holds it writes
  nothing and locks nothing: every instance asks at every tick.

A heartbeat is the only row that is ever deleted, and only as it was last seen: it says that a process lives, and the
process is gone. Its table's pages are filled by half, so that a beat is written beside the last one and touches no
index.

CONNECTIONS. One of its own, opened at the first use: the fence falls when heartbeats fail, so they must not queue
behind batches that wait for a lock on the table of records, nor behind somebody's long count. The gap ledger keeps the
connections that it has.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple, TypeVar

import asyncpg
import msgspec

from sidecar.errors import RetryClass, StoreError
from sidecar.fleet_tables import AuditEntry, FateLine, FleetRecord, Heartbeat
from sidecar.gaps import GapLine
from sidecar.phase import POSTGRES, StoreName
from sidecar.stores.base import Check
from sidecar.stores.identifiers import quoted, suffixed
from sidecar.stores.postgres_connections import Connection, Connections
from sidecar.stores.postgres_gaps import PostgresGaps

_T = TypeVar("_T")
_json: Final = msgspec.json.encode
_MISSING: Final = asyncpg.UndefinedTableError.sqlstate


class Table(NamedTuple):
    """One of the fleet's tables: the end of its name, what follows CREATE TABLE, what a sidecar must be granted."""

    suffix: str
    definition: str
    rights: tuple[str, ...]


_TEXT: Final = 'text COLLATE "C" NOT NULL'

RECORD: Final = Table(
    "_fleet",
    "(one boolean PRIMARY KEY DEFAULT true CHECK (one), epoch bigint NOT NULL, revision bigint NOT NULL, "
    "document text NOT NULL)",
    ("INSERT", "SELECT", "UPDATE"),
)
HEARTBEATS: Final = Table(
    "_heartbeats",
    f"(instance {_TEXT}, incarnation {_TEXT}, seq bigint NOT NULL, document text NOT NULL, "
    "PRIMARY KEY (instance, incarnation)) WITH (fillfactor = 50)",
    ("DELETE", "INSERT", "SELECT", "UPDATE"),
)
LEASES: Final = Table(
    "_leases",
    f"(name {_TEXT} PRIMARY KEY, holder {_TEXT}, until timestamptz NOT NULL, lasts interval NOT NULL)",
    ("INSERT", "SELECT", "UPDATE"),
)
AUDIT: Final = Table(
    "_audit",
    f"(line bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, id {_TEXT}, outcome {_TEXT}, document text NOT NULL, "
    "UNIQUE (id, outcome))",
    ("INSERT", "SELECT"),
)
FATES: Final = Table(
    "_fates",
    f"(log_id uuid NOT NULL, store {_TEXT}, source {_TEXT}, state {_TEXT}, retry_class {_TEXT}, at_us bigint NOT NULL, "
    "revision bigint NOT NULL, PRIMARY KEY (log_id, store, source))",
    ("INSERT", "SELECT", "UPDATE"),
)
TABLES: Final = (RECORD, HEARTBEATS, LEASES, AUDIT, FATES)


def _names(table: str) -> dict[Table, str]:
    return {each: suffixed(table, each.suffix) for each in TABLES}


async def missing(connection: Connection, schema: str, table: str) -> Sequence[Table]:
    """Those that are not there yet."""
    relations = {each: quoted(schema, name) for each, name in _names(table).items()}
    rows = await connection.fetch(
        "SELECT name FROM unnest($1::text[]) name WHERE to_regclass(name) IS NULL", list(relations.values())
    )
    absent = {row["name"] for row in rows}
    return [each for each in TABLES if relations[each] in absent]


async def create(connection: Connection, schema: str, table: str) -> Sequence[str]:
    """Make those that are missing; what was done. Inside the transaction that makes the records' table."""
    done = []
    for each in await missing(connection, schema, table):
        name = suffixed(table, each.suffix)
        await connection.execute(f"CREATE TABLE {quoted(schema, name)} {each.definition}")
        done.append(f"table {schema}.{name}")
    return done


async def check(connection: Connection, schema: str, table: str) -> Sequence[Check]:
    """Whether each is there and may be used."""
    checks = []
    for each, name in _names(table).items():
        rows = await connection.fetch(
            "SELECT wanted FROM unnest($2::text[]) wanted WHERE has_table_privilege(to_regclass($1), wanted)",
            quoted(schema, name),
            list(each.rights),
        )
        held = [row["wanted"] for row in rows]
        checks.append(
            Check(
                f"postgres.fleet{each.suffix.removeprefix('_fleet')}",
                len(held) == len(each.rights),
                ", ".join(held) or "missing, or no right at all",
                f"table {schema}.{name} with {', '.join(each.rights)}",
            )
        )
    return checks


class PostgresFleet:
    """``sidecar.fleet_tables.FleetStore`` in the tables above.

    Args:
        connections: one connection, for this alone.
        gaps: the store's gap ledger, which is the fleet's.
        schema: checked name.
        table: checked name of the table of records.
    """

    def __init__(self, connections: Connections, gaps: PostgresGaps, schema: str, table: str) -> None:
        record, heartbeats, leases, audit, fates = (quoted(schema, name) for name in _names(table).values())
        self._connections = connections
        self._gaps = gaps
        self._read = f"SELECT document FROM {record}"
        self._first = (
            f"INSERT INTO {record} (epoch, revision, document) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING RETURNING 1"
        )
        self._replace = (
            f"UPDATE {record} SET epoch = $1, revision = $2, document = $3 "
            "WHERE epoch = $4 AND revision = $5 RETURNING 1"
        )
        self._beat = (
            f"INSERT INTO {heartbeats} AS h (instance, incarnation, seq, document) VALUES ($1, $2, $3, $4) "
            "ON CONFLICT (instance, incarnation) DO UPDATE SET seq = EXCLUDED.seq, document = EXCLUDED.document "
            "WHERE h.seq < EXCLUDED.seq"
        )
        self._beats = f"SELECT document FROM {heartbeats}"
        self._drop = f"DELETE FROM {heartbeats} WHERE instance = $1 AND incarnation = $2 AND seq = $3"
        self._take = (
            f"INSERT INTO {leases} AS l (name, holder, until, lasts) "
            "SELECT $1, $2, clock_timestamp() + make_interval(secs => $3), make_interval(secs => $3) "
            f"WHERE NOT EXISTS (SELECT FROM {leases} h WHERE h.name = $1 AND h.holder <> $2 "
            "AND h.until > clock_timestamp() AND h.until <= clock_timestamp() + h.lasts) "
            "ON CONFLICT (name) DO UPDATE SET holder = EXCLUDED.holder, until = EXCLUDED.until, lasts = EXCLUDED.lasts "
            "WHERE l.holder = EXCLUDED.holder OR l.until <= clock_timestamp() OR l.until > clock_timestamp() + l.lasts "
            "RETURNING 1"
        )
        self._release = f"UPDATE {leases} SET until = 'epoch' WHERE name = $1 AND holder = $2"
        cut = "strpos(reverse(l.holder), '/')"  # the holder's name is instance/incarnation
        self._leader = (
            f"SELECT h.document FROM {leases} l JOIN {heartbeats} h "
            f"ON h.instance = left(l.holder, -{cut}) AND h.incarnation = right(l.holder, {cut} - 1) "
            f"WHERE l.name = $1 AND l.until > clock_timestamp() AND {cut} > 1"
        )
        self._append = (
            f"INSERT INTO {audit} (id, outcome, document) VALUES ($1, $2, $3) ON CONFLICT (id, outcome) DO NOTHING"
        )
        self._trail = f"SELECT document FROM {audit} ORDER BY line DESC LIMIT $1"
        self._put_fates = (
            f"INSERT INTO {fates} AS f (log_id, store, source, state, retry_class, at_us, revision) "
            "SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[], "
            "$7::bigint[]) ON CONFLICT (log_id, store, source) DO UPDATE SET state = EXCLUDED.state, "
            "retry_class = EXCLUDED.retry_class, at_us = EXCLUDED.at_us, revision = EXCLUDED.revision "
            "WHERE f.revision < EXCLUDED.revision"
        )
        self._fates = (
            'SELECT log_id::text, store, source AS "by", state, retry_class, at_us, revision '
            f"FROM {fates} WHERE log_id = ANY($1::uuid[])"
        )

    @property
    def name(self) -> StoreName:
        """Return ``postgres``."""
        return POSTGRES

    async def read_record(self) -> FleetRecord | None:
        """The one row; None, too, where an earlier version made the database and the table is missing."""
        try:
            rows = await self._fetch(self._read)
        except StoreError as error:
            if error.code == _MISSING:
                return None
            raise
        return _decoded(rows[0][0], FleetRecord, "record") if rows else None

    async def cas_record(self, expected: FleetRecord | None, new: FleetRecord) -> bool:
        """One statement. An answer that was lost reads False when repeated, though the row is this writer's."""
        values = new.epoch, new.revision, _json(new).decode()
        if expected is None:
            return bool(await self._fetch(self._first, *values))
        return bool(await self._fetch(self._replace, *values, expected.epoch, expected.revision))

    async def put_heartbeat(self, heartbeat: Heartbeat) -> None:
        """One statement."""
        await self._fetch(self._beat, *heartbeat.key, heartbeat.seq, _json(heartbeat).decode())

    async def heartbeats(self) -> Sequence[Heartbeat]:
        """All rows in one answer, about half a kilobyte each."""
        return [_decoded(row[0], Heartbeat, "heartbeats") for row in await self._fetch(self._beats)]

    async def drop_heartbeat(self, key: tuple[str, str], seq: int) -> None:
        """One statement."""
        await self._fetch(self._drop, *key, seq)

    async def acquire_lease(self, name: str, holder: str, ttl_s: float) -> bool:
        """One statement, by the server's clock."""
        return bool(await self._fetch(self._take, name, holder, float(ttl_s)))

    async def release_lease(self, name: str, holder: str) -> None:
        """The row stays, as long past."""
        await self._fetch(self._release, name, holder)

    async def leader(self, lease: str) -> Heartbeat | None:
        """One statement: two rows, each by its key."""
        rows = await self._fetch(self._leader, lease)
        return _decoded(rows[0][0], Heartbeat, "heartbeats") if rows else None

    async def append_audit(self, entry: AuditEntry) -> None:
        """One statement; the first line of each (id, outcome) stays."""
        await self._fetch(self._append, entry.id, entry.outcome, _json(entry).decode())

    async def audits(self, limit: int) -> Sequence[AuditEntry]:
        """In the order in which they were appended."""
        return [_decoded(row[0], AuditEntry, "audit trail") for row in await self._fetch(self._trail, limit)]

    async def put_gaps(self, lines: Sequence[GapLine]) -> None:
        """The store's gap ledger: there is one."""
        await self._gaps.put_gaps(lines)

    async def gaps(self) -> Sequence[GapLine]:
        """The store's gap ledger."""
        return await self._gaps.gaps()

    async def put_fates(self, lines: Sequence[FateLine]) -> None:
        """One statement for all lines, sorted by key, so that two sidecars never wait for each other in a circle."""
        newest: dict[object, FateLine] = {}
        for line in sorted(lines, key=lambda each: each.revision, reverse=True):
            newest.setdefault(line.key, line)  # of equal revisions the first stays, as among separate calls
        if not newest:
            return
        rows = [
            (line.log_id, line.store, line.by, line.state, line.retry_class, line.at_us, line.revision)
            for line in sorted(newest.values(), key=lambda each: each.key)
        ]
        await self._fetch(self._put_fates, *zip(*rows, strict=True))

    async def fates(self, log_ids: Sequence[str]) -> Sequence[FateLine]:
        """One statement, by the key."""
        rows = await self._fetch(self._fates, sorted(set(log_ids))) if log_ids else ()
        return [_fate(row) for row in rows]

    async def _fetch(self, sql: str, *arguments: object) -> Sequence[asyncpg.Record]:
        return await self._connections.run(lambda link: link.connection.fetch(sql, *arguments))


def _decoded(document: str, kind: type[_T], what: str) -> _T:
    try:
        return msgspec.json.decode(document, type=kind)
    except msgspec.DecodeError:  # whose text may quote the value
        failure = _unreadable(what)
    raise failure


def _fate(row: asyncpg.Record) -> FateLine:
    try:
        return msgspec.convert(dict(row), FateLine)
    except msgspec.ValidationError:
        failure = _unreadable("fates")
    raise failure


def _unreadable(what: str) -> StoreError:
    return StoreError(
        POSTGRES, RetryClass.BLOCKED, f"the fleet's {what} cannot be read: restore the table", "FleetTables"
    )

"""Rows that old writers go on putting into an adopted table: found without missing one, and how long there were none.

THE TAIL. Rows are numbered when they are written and seen when they are committed, in another order: what is remembered
as "the highest key seen" skips, for ever, a row that was numbered before it and committed after. So a look remembers a
*bound* that no unseen row can lie below:

1. ``high``: the highest key that is visible;
2. then, which transactions hold the lock that every INSERT takes before it draws a number, and keeps until it ends;
3. then, in a later snapshot, the rows.

A transaction that is not among those of (2) has either ended, and its rows are seen in (3), or will draw numbers above
``high``. So the bound is ``high`` where nobody writes, and else what ``high`` was at the look before the oldest of
these writers was first seen. The next look reads again from there: an overlap, as long as the oldest running writer
makes it, and never a hole. Horizons of transaction ids would not do: a number is drawn before its transaction has an
id.

What this rests on: numbers are drawn in ascending order, by the INSERT itself. A sequence that hands out numbers in
advance (CACHE, hi/lo) breaks it; ``check`` says so, and validation finds what came late. Prepared transactions are told
by another name once they are prepared, so a prepared one that was not known holds back the whole bound.

A BEGINNING has no look before it: ``begin`` waits until everybody who wrote at its first look has ended.

THE WATCH (``sidecar.evidence.Writers``). Each look counts the old writers' rows above the last bound; more than before,
or somebody else's transaction that writes right now, is a sign of life. Whoever looks does so for the whole fleet: the
bound, the count and the times stand in one row beside the table, locked while it is replaced, so restarts and other
instances go on where the last look ended, and a time without any look is covered by the next one. Times are those of
the server's clock.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Final

import asyncpg
import msgspec

from sidecar.clock import Clock
from sidecar.errors import RetryClass, StoreError
from sidecar.evidence import OldWriters
from sidecar.phase import POSTGRES
from sidecar.record import LogRecord
from sidecar.stores.base import Check
from sidecar.stores.identifiers import quoted, suffixed
from sidecar.stores.postgres_connections import APPLICATION, Connection, Connections, Link
from sidecar.stores.postgres_mapping import TableMapping
from sidecar.stores.postgres_statements import Rows, Statements

_SUFFIX: Final = "_old_writers"
_RIGHTS: Final = ("INSERT", "SELECT", "UPDATE")
_LOWEST: Final = -(2**61) - 1  # below every key
_PREPARED: Final = "prepared "  # what we let the name of a transaction without a process begin with
_POLL: Final = 0.2  # seconds between two looks while a beginning waits


class Bound(msgspec.Struct, frozen=True, array_like=True):
    """Up to where every row of an old writer was seen. May be kept as JSON."""

    floor: int  # no row with a key up to here is still to come
    high: int  # the highest key at that look
    writers: tuple[tuple[str, int], ...] = ()  # who wrote then, each with the floor that it holds back


class _Look(msgspec.Struct, frozen=True):
    high: int
    writers: frozenset[str]
    strangers: int  # writers that are no sidecar
    now_us: int


class _Watched(msgspec.Struct):
    """The one row of the watch."""

    since_us: int
    last_us: int | None
    bound: Bound
    seen: int  # rows of old writers with keys in (floor, high]
    copied: Bound | None = None  # up to where somebody copied them; None: nobody began


def watch_table(table: str) -> str:
    """The name of the watch's table beside a table of records."""
    return suffixed(table, _SUFFIX)


async def create(connection: Connection, schema: str, table: str) -> Sequence[str]:
    """Make the watch's table where it is missing; what was done."""
    name = watch_table(table)
    if await connection.fetchval("SELECT to_regclass($1) IS NOT NULL", quoted(schema, name)):
        return ()
    await connection.execute(
        f"CREATE TABLE {quoted(schema, name)} "
        "(one boolean PRIMARY KEY DEFAULT true CHECK (one), document text NOT NULL)"
    )
    return (f"table {schema}.{name}",)


async def check(connection: Connection, schema: str, table: str) -> Check:
    """Whether the watch's table is there and may be used."""
    name = quoted(schema, watch_table(table))
    held = [
        right
        for right in _RIGHTS
        if await connection.fetchval("SELECT has_table_privilege(to_regclass($1), $2)", name, right)
    ]
    required = f"table {schema}.{watch_table(table)} with {', '.join(_RIGHTS)}; init-stores makes it"
    return Check("postgres.old_writers", len(held) == len(_RIGHTS), ", ".join(held) or "missing", required)


class OldRows:
    """The rows of old writers, and the watch over them.

    Args:
        mapping: of an adopted table.
        readers: connections to read with.
        clock: for the pauses of ``begin``.
    """

    def __init__(self, mapping: TableMapping, sql: Statements, rows: Rows, readers: Connections, clock: Clock) -> None:
        self._sql = sql
        self._rows = rows
        self._readers = readers
        self._clock = clock
        relation, key = mapping.relation, mapping.key()
        is_old = f"{mapping.column('log_id')} IS NULL"
        self._look = f"""
            SELECT coalesce((SELECT max({key}) FROM {relation} t), {_LOWEST}),
                   array_agg(coalesce(l.pid || ' ', '{_PREPARED}') || l.virtualtransaction)
                       FILTER (WHERE l.mode IS NOT NULL),
                   count(l.mode) FILTER (WHERE a.application_name IS DISTINCT FROM '{APPLICATION}'),
                   (extract(epoch FROM clock_timestamp()) * 1000000)::int8
            FROM (SELECT) one LEFT JOIN (
                SELECT DISTINCT virtualtransaction, pid, mode FROM pg_locks
                WHERE locktype = 'relation' AND granted AND mode = 'RowExclusiveLock'
                  AND pid IS DISTINCT FROM pg_backend_pid()
                  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
                  AND relation IN (SELECT to_regclass($1)::oid
                                   UNION SELECT relid FROM pg_partition_tree(to_regclass($1)))) l ON true
            LEFT JOIN pg_stat_activity a ON a.pid = l.pid"""
        self._count = (
            f"SELECT count(*), count(*) FILTER (WHERE {key} > $2::int8) FROM {relation} t "
            f"WHERE {is_old} AND {key} > $1::int8 AND {key} <= $3::int8"
        )
        self._relation = relation
        watch = quoted(mapping.schema, watch_table(mapping.table))
        self._kept = f"SELECT document FROM {watch} FOR UPDATE"
        self._keep = f"INSERT INTO {watch} (document) VALUES ($1) ON CONFLICT (one) DO UPDATE SET document = $1"

    async def begin(self, *, patience: float) -> Bound:
        """Where a copy of the history may begin: whoever reads now sees every row up to the bound.

        Args:
            patience: seconds to wait for those who are writing at the first look.

        Raises:
            StoreError: TRANSIENT where one of them is still writing then.
        """
        first = await self._readers.run(self._ask)
        end = self._clock.monotonic() + patience
        running = first.writers
        while running:
            if self._clock.monotonic() >= end:
                raise StoreError(
                    POSTGRES,
                    RetryClass.TRANSIENT,
                    f"{len(running)} transactions that write to the table have been open for {patience:g} s"
                    " (pg_locks, mode RowExclusiveLock): a row of theirs could be missed; end them, or wait",
                )
            await self._clock.sleep(_POLL)
            now = await self._readers.run(self._ask)
            running = now.writers & first.writers | frozenset(w for w in now.writers if w.startswith(_PREPARED))
        return Bound(first.high, first.high)

    async def advance(self, bound: Bound) -> Bound:
        """Look again: ``rows(bound, answer)`` are what is to be read, and the answer is the bound for the next time."""
        return _advanced(bound, await self._readers.run(self._ask))

    async def rows(self, bound: Bound, upto: Bound) -> AsyncIterator[Sequence[LogRecord]]:
        """The old writers' records above ``bound``, ascending by key, in pages; read before ``upto`` is kept.

        Some were there at an earlier look: whoever copies them does so by ``put_if_absent``.
        """
        last = bound.floor
        while last < upto.high:
            found = await self._page(last, upto.high)
            if not found:
                return
            last = found[-1][0]
            yield self._rows.records([tuple(row)[1:] for row in found])

    async def old_writers(self) -> OldWriters:
        """Look, for the whole fleet; ``sidecar.evidence.Writers``."""
        return await self._readers.run(self._watch, whole=False)

    async def copied(self) -> Bound | None:
        """Up to where the fleet has copied the rows of old writers; None: it has not begun."""
        kept = await self._readers.run(self._read)
        return None if kept is None else kept.copied

    async def keep_copied(self, bound: Bound) -> None:
        """Everything that ``rows`` gave up to ``bound`` is copied; an older one than is kept changes nothing."""
        await self.old_writers()  # makes the row where it is missing

        async def keep(link: Link) -> None:
            async with link.connection.transaction(isolation="read_committed"):
                kept = await self._read(link)
                if kept is not None and (kept.copied is None or kept.copied.high <= bound.high):
                    kept.copied = bound
                    await link.connection.execute(self._keep, msgspec.json.encode(kept).decode())

        await self._readers.run(keep, whole=False)

    async def _read(self, link: Link) -> _Watched | None:
        """The row of the watch, locked until the transaction around it ends."""
        document = await link.connection.fetchval(self._kept)
        return None if document is None else msgspec.json.decode(document, type=_Watched)

    async def _page(self, after: int, upto: int) -> Sequence[asyncpg.Record]:
        return await self._readers.run(lambda link: link.connection.fetch(self._sql.old_rows, after, upto))

    async def _ask(self, link: Link) -> _Look:
        # One statement: its snapshot, and with it ``high``, is taken before the locks are looked at.
        ((high, writers, strangers, now_us),) = await link.connection.fetch(self._look, self._relation)
        return _Look(high, frozenset(writers or ()), strangers, now_us)

    async def _watch(self, link: Link) -> OldWriters:
        connection = link.connection
        # Each statement has to see what was committed before it, whatever the server's default is.
        async with connection.transaction(isolation="read_committed"):
            found = await self._read(link)
            now = await self._ask(link)
            kept = found or _Watched(now.now_us, None, Bound(now.high, now.high), 0)
            bound = _advanced(kept.bound, now)
            ((total, left),) = await connection.fetch(self._count, kept.bound.floor, bound.floor, bound.high)
            last = now.now_us if total > kept.seen or now.strangers else kept.last_us
            new = _Watched(kept.since_us, last, bound, left, kept.copied)
            await connection.execute(self._keep, msgspec.json.encode(new).decode())
        return OldWriters(new.since_us, new.last_us)


def _advanced(bound: Bound, now: _Look) -> Bound:
    """The bound after a look."""
    known = dict(bound.writers)
    held = {
        # Who was not there at the last look draws its numbers above what was the highest then.
        writer: known.get(writer, bound.floor if writer.startswith(_PREPARED) else bound.high)
        for writer in now.writers
    }
    high = max(now.high, bound.high)
    return Bound(max(bound.floor, min(held.values(), default=high)), high, tuple(sorted(held.items())))

"""PostgreSQL as a store: idempotent batches in, ordered pages out.

How a batch is written, and why it is right at each stage:

1. *Optimistic*: one binary COPY straight into the table, where COPY has the effect of an insert (looked up when the
   connection opens). It is one statement, so all of it is stored or none. The server says how many rows it took.
2. Where a key is already there (23505), or fewer rows were taken than sent, or COPY will not do: one INSERT of arrays
   with ``ON CONFLICT (log_id) DO NOTHING RETURNING log_id``. What it did not insert is read back and compared:
   equal content is success, other content is a CONFLICT, nothing there at all means that a trigger or policy of the
   table swallowed the row (UNKNOWN).
3. An error of data stores nothing of the batch and surfaces as PERMANENT for the caller to bisect. A connection
   lost around the commit is TRANSIENT: the repetition meets its own rows in stage 2 and converges.

After a batch that met its own rows the next one starts at stage 2, until one meets none: a replay after a crash
costs one statement per batch, not two.

Times travel as plain integers (see ``postgres_connections``); ``uuid``s as text.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Final

import asyncpg
import msgspec

from sidecar.clock import Clock
from sidecar.errors import RetryClass, StoreError
from sidecar.phase import POSTGRES, StoreName
from sidecar.record import LogRecord, timestamp_text
from sidecar.settings import Postgres
from sidecar.stores import postgres_adoption, postgres_schema
from sidecar.stores.base import (
    HOUR_US,
    Check,
    Consistency,
    CountGroup,
    CountQuery,
    Estimate,
    Examined,
    Failure,
    FillResult,
    HourFilter,
    Position,
    Query,
    ScanEntry,
    Summary,
    WriteLimits,
    WriteResult,
    entry_of,
)
from sidecar.stores.postgres_adoption import ColumnLimits
from sidecar.stores.postgres_canary import tried
from sidecar.stores.postgres_connections import Connection, Connections, Link
from sidecar.stores.postgres_fleet import PostgresFleet
from sidecar.stores.postgres_gaps import PostgresGaps
from sidecar.stores.postgres_mapping import table_mapping
from sidecar.stores.postgres_plan import Plan, Step, apply, make_plan
from sidecar.stores.postgres_rehearsal import refused
from sidecar.stores.postgres_statements import DAY_US, Rows, Statements
from sidecar.stores.postgres_tail import OldRows

_NEWEST: Final = Position((3_000_000 * DAY_US), "00000000-0000-0000-0000-000000000000")
"""After every record that can be: the year 10183."""
_LAST_ID: Final = "ffffffff-ffff-ffff-ffff-ffffffffffff"
_SWALLOWED: Final = "neither inserted nor present: a trigger or a policy of the table discards it"
_OTHER_CONTENT: Final = "the same log_id is stored with other content"
_RESERVED: Final = (
    "its log_id names a row of the adopted table that is not there: only a copied row may have such an id"
)


class PostgresStore:
    """``stores.base.Store`` on one table. Opening does not connect.

    Args:
        options: where to and how.
        clock: for idle connections.

    Raises:
        ConfigError: ``postgres.schema`` or ``postgres.table`` is no plain identifier.
    """

    def __init__(self, options: Postgres, *, clock: Clock) -> None:
        self._options = options
        self._clock = clock
        self._mapping = mapping = table_mapping(options)
        self._schema, self._table, relation = mapping.schema, mapping.table, mapping.relation
        self._columns = mapping.names
        self._ids = None if mapping.adopted is None else mapping.adopted.ids
        self._sql = Statements(mapping)
        self._rows = Rows(mapping)
        fit = None if mapping.adopted is None else self._fit
        self._writers = Connections(options, relation=relation, size=options.write_connections, clock=clock, fit=fit)
        self._readers = Connections(options, relation=relation, size=options.read_connections, clock=clock, fit=fit)
        self.columns = ColumnLimits()
        self.old_rows = (
            None if mapping.adopted is None else OldRows(mapping, self._sql, self._rows, self._readers, clock)
        )
        self.on_columns: Callable[[ColumnLimits], None] = lambda _limits: None
        self._limits = WriteLimits(options.batch_records, options.batch_bytes, options.write_connections)
        self._optimistic = True
        self._member = Connections(options, relation=relation, size=1, clock=clock)
        self.gap_ledger = PostgresGaps(self._writers, self._readers, self._schema, self._table)
        self.fleet = PostgresFleet(self._member, self.gap_ledger, self._schema, self._table)

    @property
    def name(self) -> StoreName:
        """Return ``postgres``."""
        return POSTGRES

    @property
    def consistency(self) -> Consistency:
        """``strong`` where ``postgres.host`` is the primary."""
        return "strong"

    @property
    def limits(self) -> WriteLimits:
        """As configured: one batch in flight per write connection."""
        return self._limits

    async def write(self, batch: Sequence[LogRecord]) -> WriteResult:
        """Copy, else insert and compare: the stages of this module."""
        if not batch:
            return WriteResult()
        if len(batch) > self._limits.max_records:
            raise StoreError(  # PERMANENT makes the caller bisect, which mends it
                POSTGRES,
                RetryClass.PERMANENT,
                f"{len(batch)} records in one batch, at most {self._limits.max_records}",
            )
        if self._optimistic and not self._computed(batch) and await self._copy(batch):
            return WriteResult()
        inserted = await self._insert(batch)
        if len(inserted) == len(batch):
            self._optimistic = True
            return WriteResult()
        self._optimistic = False
        ids = {record.log_id for record in batch}
        # The same id twice in one batch breaks the port's rule; comparing all of it keeps the breach from hiding.
        known = inserted if len(ids) == len(batch) else set()
        return WriteResult(await self._compare([(i, r) for i, r in enumerate(batch) if r.log_id not in known]))

    async def put_if_absent(self, batch: Sequence[LogRecord]) -> Sequence[bool]:
        """One insert that skips what is there; nothing is compared."""
        if not batch:
            return ()
        inserted = await self._insert(batch)
        return [record.log_id in inserted for record in batch]

    async def fill(self, batch: Sequence[LogRecord]) -> FillResult:
        """As ``put_if_absent``: one statement, all of it or none."""
        return FillResult(await self.put_if_absent(batch))

    async def rehearse(self, batch: Sequence[LogRecord]) -> Sequence[Failure]:
        """The insert of ``fill`` in a transaction that is rolled back: constraints, triggers and policies are asked."""
        rows = self._rows.of(batch)
        return await self._writers.run(lambda link: refused(link.connection, self._sql.insert(link.unique), rows))

    async def canary(self, record: LogRecord) -> LogRecord | None:
        """Insert and select in a transaction that is rolled back (``sidecar.canary``)."""
        row = self._rows.of([record])[0]
        rows = await tried(self._writers, self._sql.insert, row, self._sql.stored, self._named([record.log_id]))
        return self._rows.records(rows)[0] if rows else None

    async def get(self, log_id: str) -> LogRecord | None:
        """Strongly consistent where ``postgres.host`` is the primary."""
        rows = await self._fetch(self._sql.stored, *self._named([log_id]))
        return self._rows.records(rows)[0] if rows else None

    async def examine(self, log_id: str) -> Examined | None:
        """Indexes are made from the columns: they cannot be wrong."""
        record = await self.get(log_id)
        return None if record is None else Examined(record)

    async def query(self, query: Query, *, before: Position | None, limit: int) -> Sequence[LogRecord]:
        """One walk along the index that serves the query."""
        time, log_id = before or _NEWEST
        sql = self._sql.pages[type(query)]
        rows = await self._fetch(sql, limit, self._rows.time(time), log_id, *self._rows.arguments(query))
        return self._rows.records(rows)

    async def summaries(self, query: Query, *, before: Position | None, limit: int) -> Sequence[Summary]:
        """The same walk, six columns: payloads out of line are not fetched."""
        time, log_id = before or _NEWEST
        sql = self._sql.summaries[type(query)]
        rows = await self._fetch(sql, limit, self._rows.time(time), log_id, *self._rows.arguments(query))
        return self._rows.summaries(rows)

    async def count(self, query: CountQuery) -> int:
        """Count at the server, in one statement."""
        counted, arguments = self._counted(query)
        number: int = (await self._fetch(f"SELECT count(*) {counted}", *arguments))[0][0]
        return number

    async def count_by(self, query: CountQuery, group: CountGroup) -> Mapping[str, int]:
        """Count at the server, in one statement."""
        counted, arguments = self._counted(query)
        rows = await self._fetch(f"SELECT {self._sql.groups[group]} AS g, count(*) {counted} GROUP BY 1", *arguments)
        if group == "date":
            return {timestamp_text(day * DAY_US)[:10]: number for day, number in rows}
        return {name: number for name, number in rows}  # noqa: C416  (a row is no tuple to the type checker)

    async def estimate(self, query: CountQuery) -> Estimate:
        """What the planner expects; as good as the last ANALYZE."""
        counted, arguments = self._counted(query)
        plan = (await self._fetch(f"EXPLAIN (FORMAT JSON) SELECT 1 {counted}", *arguments))[0][0]
        rows = int(msgspec.json.decode(plan)[0]["Plan"]["Plan Rows"])
        return Estimate(rows, "rows that PostgreSQL's planner expects from the table's statistics")

    async def sample(self, *, before: int, limit: int) -> Sequence[LogRecord]:
        """The newest ones."""
        return self._rows.records(await self._fetch(self._sql.sample, self._rows.time(before), limit))

    async def scan(self, start: int, end: int, *, hours: HourFilter | None = None) -> AsyncIterator[ScanEntry]:
        """The stream, digested: pages by (time, id), each at most 1,000 records and about 4 MiB of payloads."""
        async for page in self.stream(start, end, hours=hours):
            for record in page:
                yield entry_of(record)

    def deep_scan(self, start: int, end: int) -> AsyncIterator[ScanEntry]:
        """A scan reads and hashes the rows anyway."""
        return self.scan(start, end)

    async def stream(
        self, start: int, end: int, *, after: Position | None = None, hours: HourFilter | None = None
    ) -> AsyncIterator[Sequence[LogRecord]]:
        """Pages of at most 1,000 records and about 4 MiB of payloads; hours that are not wanted are jumped over."""
        # Pages of their own statements: no transaction stays open while the caller takes its time, so nothing holds
        # back the server's vacuum, and a pooler may give each page another server connection.
        position = Position(start - 1, _LAST_ID)
        if after is not None:
            position = max(position, after)
        time = self._rows.time
        while rows := await self._fetch(self._sql.scan, time(position.log_timestamp), time(end), position.log_id):
            page = self._rows.records(rows)
            position = Position(page[-1].log_timestamp, page[-1].log_id)
            if hours is not None:
                position = _skipped(position, end, hours)
                page = [record for record in page if hours(record.log_timestamp // HOUR_US)]
            if page:
                yield page

    async def ping(self) -> None:
        """Insert nothing: rights, columns, and a server that takes writes are all asked for."""
        await self._writers.run(lambda link: link.connection.execute(self._sql.ping))

    async def create(self) -> Sequence[str]:
        """Make schema, table, indexes, gap ledger and fleet tables where missing."""
        patient = self._patient()
        try:
            if self._mapping.adopted is not None:
                return await postgres_schema.create_beside(patient, self._schema, self._table)
            return await postgres_schema.create(self._writers, patient, self._schema, self._table)
        finally:
            await patient.close()

    async def adoption(self, *, read_indexes: bool = True) -> Plan:
        """What an adopted table still needs; changes nothing.

        Raises:
            StoreError: there is no such table, or it cannot be looked at.
        """
        patient = self._patient()
        try:
            return await patient.run(
                lambda link: make_plan(link.connection, self._mapping, read_indexes=read_indexes), whole=False
            )
        finally:
            await patient.close()

    async def adopt(self, *, read_indexes: bool = True) -> AsyncIterator[Step]:
        """Do what ``adoption`` plans, step by step; yields each when it is done.

        Raises:
            StoreError: BLOCKED where a problem stands against it; TRANSIENT where a lock was not to be had.
        """
        patient = self._patient()
        try:
            async for step in apply(patient, self._mapping, self._clock, read_indexes=read_indexes):
                yield step
        finally:
            await patient.close()

    async def check(self) -> Sequence[Check]:
        """Compare encoding, table, columns, rights, key and indexes with what is needed."""
        if self._mapping.adopted is None:
            return await self._readers.run(
                lambda link: postgres_schema.check(link.connection, self._schema, self._table)
            )
        looking = Connections(self._options, relation=self._mapping.relation, size=1, clock=self._clock)
        try:  # the others refuse to open where a line is red
            return await looking.run(lambda link: postgres_adoption.check(link.connection, self._mapping))
        finally:
            await looking.close()

    async def close(self) -> None:
        """End all connections; at most two seconds."""
        await asyncio.gather(*(each.close() for each in (self._writers, self._readers, self._member)))

    def _patient(self) -> Connections:
        """Connections whose commands may take as long as an index does."""
        return Connections(
            msgspec.structs.replace(self._options, command_timeout=postgres_schema.INDEX_SECONDS),
            relation=self._mapping.relation,
            size=2,
            clock=self._clock,
        )

    async def _fit(self, connection: Connection) -> str | None:
        """Look at the adopted table: what its columns hold at most, and why it cannot be used."""
        unfit, limits = await postgres_adoption.inspect(connection, self._mapping)
        if unfit:
            worst = unfit[0]
            return f"{worst.name}: seen {worst.observed}; required: {worst.required}"
        if limits != self.columns:
            self.columns = limits
            self.on_columns(limits)
        return None

    async def _copy(self, batch: Sequence[LogRecord]) -> bool:
        """True where the whole batch is in; False where stage 2 must look."""

        async def copy(link: Link) -> bool:
            if not link.copies:
                return False
            rows = self._rows.of(batch)
            taken: str = await link.connection.copy_records_to_table(
                self._table, schema_name=self._schema, columns=self._columns, records=rows
            )
            return taken == f"COPY {len(batch)}"

        try:
            return await self._writers.run(copy)
        except StoreError as error:
            if error.code == asyncpg.UniqueViolationError.sqlstate:
                return False
            raise

    async def _insert(self, batch: Sequence[LogRecord]) -> set[str]:
        """Insert what is not there; the ids that this call inserted."""
        columns = tuple(zip(*self._rows.of(batch), strict=True))
        rows = await self._writers.run(lambda link: link.connection.fetch(self._sql.insert(link.unique), *columns))
        return {str(row[0]) for row in rows}

    async def _compare(self, records: Sequence[tuple[int, LogRecord]]) -> Sequence[Failure]:
        """Look at what stands in the place of records that were not inserted."""
        named = self._named([record.log_id for _, record in records])
        rows = await self._writers.run(lambda link: link.connection.fetch(self._sql.stored, *named))
        stored = {found.log_id: found for found in self._rows.records(rows)}
        failures = []
        for index, record in records:
            found = stored.get(record.log_id)
            if found is None and self._computed([record]):
                failures.append(Failure(index, RetryClass.PERMANENT, _RESERVED))
            elif found is None:
                failures.append(Failure(index, RetryClass.UNKNOWN, _SWALLOWED))
            elif found != record:
                failures.append(Failure(index, RetryClass.CONFLICT, _OTHER_CONTENT))
        return failures

    def _counted(self, query: CountQuery) -> tuple[str, list[object]]:
        """FROM and WHERE of a count, and its arguments."""
        by_service = query.service_name is not None
        arguments: list[object] = [self._rows.time(query.start), self._rows.time(query.end)]
        if by_service:
            arguments.append(query.service_name)
        return self._sql.counted(service=by_service, success=query.is_success), arguments

    def _computed(self, batch: Sequence[LogRecord]) -> bool:
        """Whether a record of the batch has the id of an old writer's row, which COPY would not meet."""
        ids = self._ids
        return ids is not None and any(ids.key(record.log_id) is not None for record in batch)

    def _named(self, log_ids: Sequence[str]) -> tuple[Sequence[object], ...]:
        """The parameters that name rows by id."""
        if self._ids is None:
            return (log_ids,)
        keys = (self._ids.key(log_id) for log_id in log_ids)
        return log_ids, [key for key in keys if key is not None]

    async def _fetch(self, sql: str, *arguments: object) -> Sequence[asyncpg.Record]:
        return await self._readers.run(lambda link: link.connection.fetch(sql, *arguments))


def _skipped(position: Position, end: int, hours: HourFilter) -> Position:
    """Where to read on: behind ``position``, or before the next wanted hour where its own is not wanted."""
    hour = position.log_timestamp // HOUR_US
    if hours(hour):
        return position
    last = (end - 1) // HOUR_US
    while hour <= last and not hours(hour):
        hour += 1
    return Position(hour * HOUR_US - 1, _LAST_ID)

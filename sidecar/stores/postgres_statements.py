"""The SQL of one table, written once from its mapping, and the rows that go in and come out.

Rows are tuples in the order of the record's fields. Times travel as plain integers (see ``postgres_connections``),
``uuid``s as text.

INSERTS. Both kinds are one statement with one array for each field, skip what is there, and return the ids that they
stored. The own table needs no more than its unique index. On an adopted table an id may also be that of an old
writer's row, which no index knows: such ids are looked up by key, and one whose row is not there is stored only where
the database has already gone past its key, because a later row could take the id otherwise. Where the table is
partitioned, the unique index holds the partition's columns too, so that the id alone is looked up in every partition.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from sidecar.record import FIELDS, LogRecord
from sidecar.stores.base import (
    ByApplication,
    ByCorrelation,
    ByService,
    CountGroup,
    ErrorsOn,
    Query,
    Summary,
)
from sidecar.stores.identifiers import quoted
from sidecar.stores.postgres_mapping import TableMapping

DAY_US: Final = 86_400_000_000
_SCAN_ROWS: Final = 1_000  # of one page of a scan
_SCAN_BYTES: Final = 4 * 1024 * 1024  # of its payloads, one record at least
_ARRAYS: Final = {
    "log_id": "uuid",
    "application_id": "bigint",
    "status_code": "integer",
    "is_success": "boolean",
    "processing_time_ms": "bigint",
}
"""Element types of the arrays of an insert; ``text`` otherwise, so that the column's length is checked, not cut."""
_STATUS: Final = FIELDS.index("status_code")
_TIME: Final = FIELDS.index("log_timestamp")


class Statements:
    """The SQL of one table."""

    def __init__(self, mapping: TableMapping) -> None:
        self._mapping = mapping
        relation = mapping.relation
        values = {field: mapping.value(field) for field in FIELDS}
        time, log_id = mapping.column("log_timestamp"), values["log_id"]
        out = ", ".join(values.values())
        brief = ", ".join(values[field] for field in Summary.__struct_fields__)
        page = f"ORDER BY {time} DESC, {log_id} DESC LIMIT $1"
        before = f"({time}, {log_id}) < ($2, $3)"
        source = f"FROM {relation} t WHERE"
        names = ", ".join(map(quoted, mapping.names))
        self.ping = f"INSERT INTO {relation} ({names}) SELECT {names} FROM {relation} WHERE false"
        self.stored = self._stored(out)
        service, application = mapping.column("service_name"), mapping.column("application_id")
        self._success = mapping.column("is_success")
        self._service = service
        conditions: dict[type[Query], str] = {
            ByApplication: f"{application} = $4",
            ByCorrelation: f"{mapping.column('correlation_id')} = $4",
            ByService: f"{service} = $4 AND {time} >= $5 AND {time} <= $6",
            ErrorsOn: f"NOT {self._success} AND {time} >= $4 AND {time} < $5",
        }
        self.pages = {kind: f"SELECT {out} {source} {c} AND {before} {page}" for kind, c in conditions.items()}
        self.summaries = {kind: f"SELECT {brief} {source} {c} AND {before} {page}" for kind, c in conditions.items()}
        self.sample = f"SELECT {out} {source} {time} < $1 ORDER BY {time} DESC LIMIT $2"
        self.groups: dict[CountGroup, str] = {"date": mapping.day(), "service": service}
        self._counted = f"{source} {time} >= $1 AND {time} <= $2"
        self.scan = self._scan(source)
        self.old_rows = ""
        if mapping.adopted is not None:
            key, column = mapping.key(), mapping.column("log_id")
            self.old_rows = (
                f"SELECT {key}, {out} {source} {column} IS NULL AND {key} > $1::int8 AND {key} <= $2::int8 "
                f"ORDER BY {key} LIMIT {_SCAN_ROWS}"
            )
        self._inserts: dict[tuple[str, ...], str] = {}

    def insert(self, unique: tuple[str, ...]) -> str:
        """Insert what is not there; ``unique`` are the columns of the index that says so, () for the id's own."""
        found = self._inserts.get(unique)
        if found is None:
            found = self._inserts[unique] = self._insert(unique or (self._mapping.columns["log_id"],))
        return found

    def counted(self, *, service: bool, success: bool | None) -> str:
        """FROM and WHERE of a count between $1 and $2, inclusive; a service's name is $3."""
        sql = self._counted
        if service:
            sql += f" AND {self._service} = $3"
        if success is not None:
            sql += f" AND {self._success}" if success else f" AND NOT {self._success}"
        return sql

    def _insert(self, unique: tuple[str, ...]) -> str:
        mapping = self._mapping
        relation, column = mapping.relation, quoted(mapping.columns["log_id"])
        names = ", ".join(map(quoted, mapping.names))
        types = (
            _ARRAYS | {"log_timestamp": mapping.time_type} | ({"status_code": "text"} if mapping.status_text else {})
        )
        arrays = ", ".join(f"${n}::{types.get(f, 'text')}[]" for n, f in enumerate(FIELDS, 1))
        target = ", ".join(map(quoted, unique))
        if mapping.adopted is None:
            return (
                f"INSERT INTO {relation} ({names}) SELECT * FROM unnest({arrays}) "
                f"ON CONFLICT ({target}) DO NOTHING RETURNING {column}"
            )
        key, new = mapping.key("o"), f"n.{column}"
        old = mapping.adopted.ids.sql_key(new)
        elsewhere = ""
        if len(unique) > 1:
            id_column = mapping.column("log_id", "e")
            elsewhere = f"{new} NOT IN (SELECT {id_column} FROM {relation} e WHERE {id_column} = ANY($1::uuid[])) AND "
        return (
            f"INSERT INTO {relation} ({names}) SELECT n.* FROM unnest({arrays}) AS n({names}) WHERE {elsewhere}"
            f"(({old}) IS NULL OR ({old} <= (SELECT max({key}) FROM {relation} o) AND NOT EXISTS "
            f"(SELECT FROM {relation} o WHERE {key} = {old} AND {mapping.column('log_id', 'o')} IS NULL))) "
            f"ON CONFLICT ({target}) WHERE {column} IS NOT NULL DO NOTHING RETURNING {column}"
        )

    def _stored(self, out: str) -> str:
        """Records by id: $1 are the ids; on an adopted table $2 the keys of those that are computed."""
        mapping = self._mapping
        relation, column = mapping.relation, mapping.column("log_id")
        found = f"SELECT {out} FROM {relation} t WHERE {column} = ANY($1::uuid[])"
        if mapping.adopted is None:
            return found
        key = mapping.key()
        return f"{found} UNION ALL SELECT {out} FROM {relation} t WHERE {key} = ANY($2::int8[]) AND {column} IS NULL"

    def _scan(self, source: str) -> str:
        """A page ends at so many rows or so many bytes; octet_length does not fetch a TOASTed value."""
        mapping = self._mapping
        time, log_id = mapping.column("log_timestamp"), mapping.identity()
        inner = ", ".join(f"{mapping.value(field)} AS {quoted(field)}" for field in FIELDS)
        sizes = " + ".join(
            f"coalesce(octet_length({f}), 0)" for f in ("request_data", "response_data", "error_message")
        )
        out = ", ".join(f"t.{quoted(f)}" for f in FIELDS)
        return (
            f"SELECT {out} FROM (SELECT p.*, sum({sizes}) OVER (ORDER BY log_timestamp, log_id) - ({sizes}) AS ahead "
            f"FROM (SELECT {inner} {source} {time} < $2 AND ({time}, {log_id}) > ($1, $3) "
            f"ORDER BY {time}, {log_id} LIMIT {_SCAN_ROWS}) p) t "
            f"WHERE t.ahead < {_SCAN_BYTES} ORDER BY t.log_timestamp, t.log_id"
        )


class Rows:
    """Records to rows and back, for one mapping."""

    def __init__(self, mapping: TableMapping) -> None:
        self._epoch_us = mapping.epoch_us
        self._status_text = mapping.status_text

    def of(self, batch: Sequence[LogRecord]) -> Sequence[tuple[object, ...]]:
        """The records as rows in the order of FIELDS, the time counted from the table's epoch."""
        epoch_us = self._epoch_us
        rows: list[tuple[object, ...]] = [
            (
                r.log_id,
                r.application_id,
                r.log_type,
                r.service_name,
                r.request_data,
                r.response_data,
                r.status_code,
                r.is_success,
                r.error_message,
                r.processing_time_ms,
                r.log_timestamp - epoch_us,
                r.correlation_id,
                r.user_id,
            )
            for r in batch
        ]
        if self._status_text:
            return [
                row if row[_STATUS] is None else (*row[:_STATUS], str(row[_STATUS]), *row[_STATUS + 1 :])
                for row in rows
            ]
        return rows

    def records(self, rows: Iterable[Any]) -> list[LogRecord]:
        """Rows in the order of FIELDS as records; unpacked in one place, which is the fastest way."""
        epoch_us = self._epoch_us
        return [
            LogRecord(str(a), b, c, d, e, f, g, h, i, j, us + epoch_us, k, m)
            for a, b, c, d, e, f, g, h, i, j, us, k, m in rows
        ]

    def summaries(self, rows: Iterable[Any]) -> list[Summary]:
        """Rows of summaries."""
        epoch_us = self._epoch_us
        return [Summary(str(a), us + epoch_us, b, c, d, e) for a, us, b, c, d, e in rows]

    def time(self, us: int) -> int:
        """An instant as a parameter."""
        return us - self._epoch_us

    def arguments(self, query: Query) -> tuple[object, ...]:
        """The parameters of a query's condition, from $4 on."""
        match query:
            case ByApplication(application_id):
                return (application_id,)
            case ByCorrelation(correlation_id):
                return (correlation_id,)
            case ByService(service_name, start, end):
                return service_name, self.time(start), self.time(end)
            case ErrorsOn(day):
                return self.time(day * DAY_US), self.time((day + 1) * DAY_US)

"""Which table holds the records, and how its columns are a record's fields. The own table is the identity mapping.

Everything that is particular to an adopted table (``postgres.adopt``) is an SQL expression or a number of this module;
the statements (``postgres_statements``) are written from them, and nobody else knows whose table it is.

AN ADOPTED TABLE has two kinds of rows:

* *the sidecar's*: ``postgres.adopt.log_id`` holds their id; the database numbers them as it numbers all rows;
* *an old writer's*: that column is null, and the id is computed from the key (``computed_ids``). No row is ever updated
  to give it one. It is found by its key, and stands among the others by (time, id).

``identity`` is the expression that is a row's id either way. A row of the sidecar may carry an id of the computed shape
(a copy that came back after its row was gone); it is found by the column, and is not stored where the row is there.

TIMES without a zone (``assume_zone``) are stored at a fixed offset: both column types are an int64 of microseconds
since 2000 on the wire, so the offset is added to the number and the column's own order and indexes serve.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sidecar.record import FIELDS
from sidecar.settings import Postgres
from sidecar.stores.computed_ids import ComputedIds
from sidecar.stores.identifiers import checked, quoted
from sidecar.stores.postgres_connections import PG_EPOCH_US

_MINUTE_US: Final = 60_000_000
_INT32: Final = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    """What only an adopted table has."""

    key: str  # the integer key's column, as the catalogue has it
    ids: ComputedIds
    zone: str | None  # assume_zone as configured
    status_text: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TableMapping:
    """One table: ``columns`` gives each field's column, as the catalogue has it; all names were checked."""

    schema: str
    table: str
    columns: Mapping[str, str]
    adopted: Adoption | None = None

    @property
    def relation(self) -> str:
        """The quoted name."""
        return quoted(self.schema, self.table)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns in the order of the record's fields."""
        return tuple(self.columns[field] for field in FIELDS)

    @property
    def time_type(self) -> str:
        """Type of the column of times, as parameters are declared."""
        return "timestamp" if self.adopted is not None and self.adopted.zone is not None else "timestamptz"

    @property
    def epoch_us(self) -> int:
        """What a stored time counts from: microseconds since 1970, UTC."""
        return PG_EPOCH_US - (_offset_us(self.adopted.zone) if self.adopted is not None else 0)

    @property
    def status_text(self) -> bool:
        """Whether a status code is stored as text."""
        return self.adopted is not None and self.adopted.status_text

    def column(self, field: str, alias: str = "t") -> str:
        """A field's column, qualified."""
        return f"{alias}.{quoted(self.columns[field])}"

    def value(self, field: str, alias: str = "t") -> str:
        """The expression that is a field's value."""
        if field == "log_id":
            return self.identity(alias)
        column = self.column(field, alias)
        if field == "status_code" and self.status_text:
            # Two steps: a number of ten digits may be beyond an int32.
            number = f"CASE WHEN {column} ~ '^(0|-?[1-9][0-9]{{0,9}})$' THEN {column}::int8 END"
            return f"CASE WHEN {number} BETWEEN {-_INT32} AND {_INT32 - 1} THEN {column}::int4 END"
        return column

    def identity(self, alias: str = "t") -> str:
        """The expression that is a row's id."""
        column = self.column("log_id", alias)
        if self.adopted is None:
            return column
        return f"coalesce({column}, {self.adopted.ids.sql(self.key(alias))})"

    def key(self, alias: str = "t") -> str:
        """The integer key's column of an adopted table, qualified."""
        assert self.adopted is not None  # noqa: S101  (asked only where there is one)
        return f"{alias}.{quoted(self.adopted.key)}"

    def day(self, alias: str = "t") -> str:
        """The expression that is a row's UTC day, counted since 1970."""
        column = self.column("log_timestamp", alias)
        if self.time_type == "timestamptz":
            return f"({column} AT TIME ZONE 'UTC')::date - DATE '1970-01-01'"
        offset = PG_EPOCH_US - self.epoch_us
        return f"({column} - INTERVAL '{offset // _MINUTE_US} minutes')::date - DATE '1970-01-01'"


def table_mapping(options: Postgres) -> TableMapping:
    """The mapping that the configuration states.

    Raises:
        ConfigError: a name is no plain identifier.
    """
    schema = checked("postgres.schema", options.schema)
    table = checked("postgres.table", options.table)
    adopt = options.adopt
    if not adopt.enabled:
        return TableMapping(schema=schema, table=table, columns={field: field for field in FIELDS})
    columns = {
        field: checked(f"postgres.adopt.columns.{field}", getattr(adopt.columns, field))
        for field in adopt.columns.__struct_fields__
    }
    return TableMapping(
        schema=schema,
        table=table,
        columns={"log_id": checked("postgres.adopt.log_id", adopt.log_id), **columns},
        adopted=Adoption(
            key=checked("postgres.adopt.key", adopt.key),
            ids=ComputedIds(adopt.tag),
            zone=adopt.assume_zone,
            status_text=adopt.status_code_text,
        ),
    )


def _offset_us(zone: str | None) -> int:
    """``+02:00`` in microseconds, east of Greenwich positive; ``UTC`` and None are 0."""
    if zone is None or zone == "UTC":
        return 0
    minutes = int(zone[1:3]) * 60 + int(zone[4:6])
    return (-minutes if zone[0] == "-" else minutes) * _MINUTE_US

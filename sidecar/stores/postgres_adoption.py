r"""Whether an adopted table can hold records exactly, what it still lacks, and what it asks of the door.

Every line is a ``Check``: what was looked at, what was seen, what is required and why. ``unfit`` are the lines that
would lose or change data: with one of them the store is BLOCKED and writes nothing, whoever looked or did not look
before. The others cost time (a missing index) or certainty about old writers.

EXACTLY means: what goes in comes out, to the byte and the microsecond. So a payload in ``jsonb`` (keys reordered,
duplicates dropped, \u0000 refused) is refused, a ``char(n)`` (padded), a time with fewer than six digits (rounded),
and a time without a zone unless ``assume_zone`` says at which fixed offset it is meant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from sidecar.record import FIELDS
from sidecar.stores import postgres_fleet, postgres_gaps, postgres_schema, postgres_tail
from sidecar.stores.base import Check
from sidecar.stores.identifiers import quoted
from sidecar.stores.postgres_catalogue import Catalogue, ColumnSeen, IndexSeen, look
from sidecar.stores.postgres_connections import Connection
from sidecar.stores.postgres_mapping import TableMapping

_TEXTS: Final = frozenset({"text", "character varying"})
_INTEGERS: Final = {"smallint": 2**15, "integer": 2**31, "bigint": 2**63}
_FIELD_BOUND: Final = {"application_id": 2**63, "status_code": 2**31, "processing_time_ms": 2**63}
_TIMES: Final = {"timestamptz": "timestamp with time zone", "timestamp": "timestamp without time zone"}
_REQUIRED: Final = frozenset({"log_type", "service_name", "is_success", "log_timestamp"})
_MICROSECONDS: Final = 6  # digits
_WHY_NOT: Final[Mapping[str, str]] = {
    "jsonb": "it reorders keys, drops duplicates and refuses \\u0000, so a payload would not come back as it was sent;"
    " add a text column and map that, or keep this one for another reader",
    "json": "it refuses every payload that is not JSON; add a text column and map that",
    "character": "it pads with blanks, so a text would not come back as it was sent",
    "xml": "it holds only XML",
    "bytea": "it holds bytes, not text",
}
ADOPT: Final = "sidecar adopt --plan shows how to add it"


@dataclass(frozen=True, slots=True)
class ColumnLimits:
    """What the door must not let in because a column could not hold it: longest text, least and greatest number."""

    texts: Mapping[str, int] = field(default_factory=dict)  # characters, by field
    numbers: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # inclusive, by field


def limits(mapping: TableMapping, catalogue: Catalogue) -> ColumnLimits:
    """The columns' bounds, where they are narrower than a field's own."""
    texts: dict[str, int] = {}
    numbers: dict[str, tuple[int, int]] = {}
    for name in FIELDS:
        seen = catalogue.columns.get(mapping.columns[name])
        if seen is None:
            continue
        bound = _FIELD_BOUND.get(name)
        if seen.type in _TEXTS and seen.modifier is not None:
            if bound is None:
                texts[name] = seen.modifier
            else:  # a number as text: the sign takes a place
                least, greatest = -(10 ** (seen.modifier - 1)) + 1, 10**seen.modifier - 1
                if least > -bound or greatest < bound - 1:
                    numbers[name] = (max(least, -bound), min(greatest, bound - 1))
        elif bound is not None and (narrow := _INTEGERS.get(seen.type, bound)) < bound:
            numbers[name] = (-narrow, narrow - 1)
    return ColumnLimits(texts, numbers)


def unfit(mapping: TableMapping, catalogue: Catalogue) -> list[Check]:
    """What would lose or change data; empty where the table can be written to."""
    lines = [*_columns(mapping, catalogue), *_key(mapping, catalogue), *_id(mapping, catalogue)]
    return [line for line in lines if not line.ok]


async def inspect(connection: Connection, mapping: TableMapping) -> tuple[Sequence[Check], ColumnLimits]:
    """``unfit`` and ``limits`` of the table as it is now; a missing table is a line too."""
    assert mapping.adopted is not None  # noqa: S101  (asked only of an adopted table)
    catalogue = await look(connection, mapping.relation, mapping.adopted.key, sizes=False)
    if catalogue is None or catalogue.kind not in ("r", "p"):
        return [_table(mapping, catalogue)], ColumnLimits()
    return unfit(mapping, catalogue), limits(mapping, catalogue)


async def check(connection: Connection, mapping: TableMapping) -> Sequence[Check]:
    """Every line, good and bad: server, table, columns, key, indexes, rights, the tables beside it."""
    assert mapping.adopted is not None  # noqa: S101  (as above)
    checks = await postgres_schema.check_server(connection)
    catalogue = await look(connection, mapping.relation, mapping.adopted.key)
    checks.append(_table(mapping, catalogue))
    if catalogue is None or not checks[-1].ok:
        return checks
    checks += lines(mapping, catalogue)
    checks += await postgres_schema.check_rights(connection, mapping.relation)
    checks += await _check_sequence(connection, mapping)
    checks += await postgres_gaps.check(connection, mapping.schema, mapping.table)
    checks += await postgres_fleet.check(connection, mapping.schema, mapping.table)
    checks.append(await postgres_tail.check(connection, mapping.schema, mapping.table))
    return checks


async def _check_sequence(connection: Connection, mapping: TableMapping) -> list[Check]:
    """An identity numbers rows for everybody; a sequence as a default asks for a right of its own."""
    assert mapping.adopted is not None  # noqa: S101  (as above)
    held = await connection.fetchval(
        "SELECT has_sequence_privilege(pg_get_serial_sequence($1, $2), 'USAGE') FROM pg_attribute "
        "WHERE attrelid = to_regclass($1) AND attname = $2 AND attidentity = '' AND atthasdef",
        mapping.relation,
        mapping.adopted.key,
    )
    if held is None:
        return []
    required = f"USAGE on the sequence that numbers {mapping.adopted.key}"
    return [Check("postgres.grant.sequence", held, "granted" if held else "missing", required)]


def lines(mapping: TableMapping, catalogue: Catalogue) -> list[Check]:
    """What the catalogue alone tells of a table that is there."""
    return [
        *_columns(mapping, catalogue),
        *_key(mapping, catalogue),
        *_id(mapping, catalogue),
        *_others(mapping, catalogue),
        *_indexes(mapping, catalogue),
    ]


def _table(mapping: TableMapping, catalogue: Catalogue | None) -> Check:
    kind = None if catalogue is None else catalogue.kind
    seen = f"{mapping.schema}.{mapping.table}: {postgres_schema.KINDS.get(kind, kind)}"
    required = "the table that postgres.schema and postgres.table name, for postgres.adopt; case counts"
    foreign = catalogue is not None and any(part.kind == "f" for part in catalogue.parts)
    if foreign:
        return Check("postgres.table", ok=False, observed=f"{seen} with foreign partitions", required=required)
    return Check("postgres.table", kind in ("r", "p"), seen, required)


def _columns(mapping: TableMapping, catalogue: Catalogue) -> list[Check]:
    """One line for each field but the id."""
    checks = []
    for name in FIELDS[1:]:
        column = mapping.columns[name]
        seen = catalogue.columns.get(column)
        observed = f"{column}: {_shown(seen)}"
        required = _accepted(mapping, name)
        ok = seen is not None
        if seen is not None and (trouble := _trouble(mapping, name, seen)):
            observed, ok = f"{observed}: {trouble}", False
        checks.append(Check(f"postgres.column.{name}", ok, observed, required))
    return checks


def _shown(seen: ColumnSeen | None) -> str:
    if seen is None:
        return "missing"
    modifier = "" if seen.modifier is None else f"({seen.modifier})"
    return seen.type + modifier + (" NOT NULL" if seen.required else "")


def _accepted(mapping: TableMapping, name: str) -> str:
    if name == "log_timestamp":
        return f"{_TIMES[mapping.time_type]}, NOT NULL"
    if name == "is_success":
        return "boolean, NOT NULL"
    if name in _FIELD_BOUND and not (name == "status_code" and mapping.status_text):
        return "smallint, integer or bigint"
    return "text or character varying" + (", NOT NULL" if name in _REQUIRED else "")


def _trouble(mapping: TableMapping, name: str, seen: ColumnSeen) -> str | None:  # noqa: PLR0911  (one line a reason)
    """Why this column cannot hold this field exactly."""
    if seen.generated:
        return "it is computed by an expression, so nobody can write it"
    if name in _REQUIRED and not seen.required:
        return "a row without it would be no record; make it NOT NULL (docs/ADOPTING.md)"
    if name not in _REQUIRED and seen.required:
        return "a record may be without it; drop the NOT NULL"
    if name == "log_timestamp":
        return _time_trouble(mapping, seen)
    if name == "is_success":
        return None if seen.type == "boolean" else "only a boolean has exactly two values"
    if name in _FIELD_BOUND and seen.type in _INTEGERS:
        return "postgres.adopt.status_code_text is set" if name == "status_code" and mapping.status_text else None
    if name in _FIELD_BOUND and not (name == "status_code" and mapping.status_text):
        hint = "; postgres.adopt.status_code_text: true reads whole numbers, and any other text as null"
        return "it is no integer" + (hint if name == "status_code" and seen.type in _TEXTS else "")
    if seen.type not in _TEXTS:
        return _WHY_NOT.get(seen.type, "it is no text")
    return None if seen.exact else "its collation takes different texts for equal"


def _time_trouble(mapping: TableMapping, seen: ColumnSeen) -> str | None:
    if seen.type not in _TIMES.values():
        return "it is no time"
    if seen.type != _TIMES[mapping.time_type]:
        if mapping.time_type == "timestamptz":
            return "its zone is unknown; postgres.adopt.assume_zone says which fixed offset is meant"
        return "it has a zone, so postgres.adopt.assume_zone must not be set"
    if seen.modifier is not None and seen.modifier < _MICROSECONDS:
        return "it rounds microseconds; ALTER COLUMN .. TYPE with (6) changes the catalogue alone"
    return None


def _key(mapping: TableMapping, catalogue: Catalogue) -> list[Check]:
    """The integer key: an integer that the database numbers, found by an index, unique."""
    assert mapping.adopted is not None  # noqa: S101  (as above)
    name = mapping.adopted.key
    seen = catalogue.columns.get(name)
    good = seen is not None and seen.type in _INTEGERS and seen.required and seen.filled
    checks = [
        Check(
            "postgres.adopt.key",
            good,
            f"{name}: {_shown(seen)}" + ("" if seen is None or seen.filled else ", not numbered by the database"),
            "smallint, integer or bigint, NOT NULL, an identity or with a sequence as default",
        )
    ]
    whole = [index for index in catalogue.indexes if index.valid and index.predicate is None]
    # Where the table is partitioned its own columns stand in every unique index.
    unique = any(i.unique and name in i.columns and set(i.columns) <= {name, *catalogue.partitioned_by} for i in whole)
    found = any(index.columns[0] == name for index in whole)
    seen_so = f"{'unique' if unique else 'not unique'}, {'found' if found else 'not found'} by an index"
    checks.append(
        Check(
            "postgres.adopt.key_index",
            unique and found,
            seen_so,
            "unique (with the partition's columns), and an index that begins with it: old rows are looked up by it",
        )
    )
    return checks


def id_columns(mapping: TableMapping, catalogue: Catalogue) -> tuple[str, ...]:
    """The columns of the unique index of ids: the id's, and the partition's, which PostgreSQL asks for."""
    column = mapping.columns["log_id"]
    return (column, *(by for by in catalogue.partitioned_by if by is not None and by != column))


def id_index(mapping: TableMapping, catalogue: Catalogue) -> IndexSeen | None:
    """The unique index of ids, valid or not."""
    wanted = id_columns(mapping, catalogue)
    where = (None, f"({quoted(wanted[0])} IS NOT NULL)", f"({wanted[0]} IS NOT NULL)")
    fit = [i for i in catalogue.indexes if i.unique and i.columns == wanted and i.predicate in where]
    return min(fit, key=lambda index: not index.valid, default=None)


def _id(mapping: TableMapping, catalogue: Catalogue) -> list[Check]:
    """The uuid column, its index, and that a repetition reaches the same partition."""
    column = mapping.columns["log_id"]
    seen = catalogue.columns.get(column)
    plain = seen is not None and seen.type == "uuid" and not seen.required and not seen.filled
    index = id_index(mapping, catalogue)
    state = "missing" if index is None else f"{index.name}: {'valid' if index.valid else 'invalid'}"
    checks = [
        Check("postgres.adopt.log_id", plain, f"{column}: {_shown(seen)}", f"uuid, nullable, no default; {ADOPT}"),
        Check(
            "postgres.key",
            index is not None and index.valid,
            state,
            f"a valid unique index on ({', '.join(id_columns(mapping, catalogue))}); {ADOPT}",
        ),
    ]
    if catalogue.partitioned_by:
        mapped = set(mapping.columns.values())
        strange = [by or "an expression" for by in catalogue.partitioned_by if by not in mapped]
        checks.append(
            Check(
                "postgres.adopt.partitions",
                not strange,
                f"partitioned by {', '.join(by or 'an expression' for by in catalogue.partitioned_by)}",
                "columns of the record alone: a repetition must reach the partition of the first",
            )
        )
    return checks


def _others(mapping: TableMapping, catalogue: Catalogue) -> list[Check]:
    """Columns that nobody fills, and a sequence that hands out numbers in advance."""
    assert mapping.adopted is not None  # noqa: S101  (as above)
    ours = {*mapping.columns.values(), mapping.adopted.key}
    checks = [
        Check(f"postgres.column.{name}", ok=False, observed=f"{name}: NOT NULL", required="a default, or nullable")
        for name, seen in catalogue.columns.items()
        if name not in ours and seen.required and not seen.filled
    ]
    if catalogue.sequence_cache is not None:
        checks.append(
            Check(
                "postgres.adopt.sequence",
                catalogue.sequence_cache == 1,
                f"hands out {catalogue.sequence_cache} at a time",
                "1 (ALTER SEQUENCE .. CACHE 1): a session that keeps numbers for later writes rows behind the tail",
            )
        )
    return checks


@dataclass(frozen=True, slots=True)
class ReadIndex:
    """An index that makes one kind of read cheap: columns in order, and the predicate of a small one."""

    suffix: str
    columns: tuple[str, ...]  # fields
    enough: int  # so many leading columns of an index that is there are as good
    serves: str
    failures: bool = False


READ_INDEXES: Final = (
    ReadIndex("_sidecar_application_idx", ("application_id", "log_timestamp"), 2, "records of an application"),
    ReadIndex("_sidecar_service_idx", ("service_name", "log_timestamp"), 2, "records and counts of a service"),
    ReadIndex("_sidecar_correlation_idx", ("correlation_id", "log_timestamp"), 1, "records with a correlation id"),
    ReadIndex("_sidecar_failures_idx", ("log_timestamp",), 1, "failures of a day", failures=True),
    ReadIndex("_sidecar_time_idx", ("log_timestamp",), 1, "backfill and validation, which walk in order of time"),
)
"""Equal times are few, so (.., time) is enough: the server sorts them by id as it walks."""


def serving(mapping: TableMapping, catalogue: Catalogue, wanted: ReadIndex) -> IndexSeen | None:
    """A valid index that serves; the table's own as well as ours."""
    columns = tuple(mapping.columns[name] for name in wanted.columns[: wanted.enough])
    success = mapping.columns["is_success"]
    predicates = (f"(NOT {quoted(success)})", f"(NOT {success})") if wanted.failures else (None,)
    return next(
        (
            index
            for index in catalogue.indexes
            if index.valid and index.columns[: wanted.enough] == columns and index.predicate in predicates
        ),
        None,
    )


def _indexes(mapping: TableMapping, catalogue: Catalogue) -> list[Check]:
    checks = []
    for wanted in READ_INDEXES:
        found = serving(mapping, catalogue, wanted)
        required = f"a valid index for {wanted.serves}; {ADOPT}"
        checks.append(
            Check(
                f"postgres.index.{wanted.suffix.removeprefix('_sidecar_').removesuffix('_idx')}",
                found is not None,
                "none" if found is None else found.name,
                required,
            )
        )
    return checks

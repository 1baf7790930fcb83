"""What an adopted table still needs, as DDL that only adds: planned from the catalogue, applied step by step.

STEPS, in this order; what is there is left out, so a plan that was applied is empty:

1. a nullable ``uuid`` column without a default: a change of the catalogue alone, no row is touched;
2. a unique index on it, of the rows that have one, built CONCURRENTLY: old rows are read once and take no room in it;
3. indexes that the sidecar's reads, backfill and validation walk along, unless the table has some that serve.

A PARTITIONED table gets its indexes as PostgreSQL wants it: an empty one on the parent alone (ON ONLY), one built
CONCURRENTLY on each partition, each attached; when the last one is, the parent's becomes valid, and every partition
made later gets its own. A unique one holds the columns of the partition too.

LOCKS. What blocks writers takes its lock within ``LOCK_SECONDS`` or gives up and tries again: an ALTER that waits
behind a long transaction would make everybody else wait behind it. A CONCURRENTLY build blocks nobody, so it may wait.

FAILURE at any step leaves a table that works as before, perhaps with an invalid index, which the next plan replaces.
Nothing is ever dropped but such an index.
"""

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from sidecar.clock import Clock
from sidecar.errors import RetryClass, StoreError
from sidecar.phase import POSTGRES
from sidecar.stores.base import Check
from sidecar.stores.identifiers import MAX_BYTES
from sidecar.stores.postgres_adoption import READ_INDEXES, id_columns, id_index, lines, serving
from sidecar.stores.postgres_catalogue import Catalogue, Part, look
from sidecar.stores.postgres_connections import Connection, Connections, Link
from sidecar.stores.postgres_mapping import TableMapping
from sidecar.stores.postgres_schema import turn

LOCK_SECONDS: Final = 2.0
_TRIES: Final = 10
_PAUSE: Final = 1.0  # seconds between two tries
_LOCKED: Final = "55P03"
_NOT_OWNER: Final = "42501"
_READ_BYTES: Final = 100 * 1024 * 1024  # a second: what a common disk gives; only for the estimate
_MENDED_BY_PLAN: Final = frozenset({"postgres.adopt.log_id", "postgres.key"})
_BRIEF: Final = "for a moment"


@dataclass(frozen=True, slots=True)
class Step:
    """One statement: what it is for, which lock it takes on what and for how long, as far as the catalogue tells."""

    sql: str
    serves: str
    lock: str
    held: str
    required: bool  # False: reads are slow without it
    blocks_writers: bool  # while the lock is held


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done, on how much, and what no step mends."""

    table: str
    rows: int | None  # about; None: never analysed
    bytes: int  # of the table without its indexes
    partitions: int
    steps: Sequence[Step]
    problems: Sequence[Check]  # with one of these, nothing is applied
    lock_seconds: float = LOCK_SECONDS  # how long a step that blocks writers waits for its lock


async def make_plan(connection: Connection, mapping: TableMapping, *, read_indexes: bool = True) -> Plan:
    """Look and plan; changes nothing. Raises StoreError (BLOCKED) where there is no such table."""
    assert mapping.adopted is not None  # noqa: S101  (planned only for an adopted table)
    catalogue = await look(connection, mapping.relation, mapping.adopted.key)
    name = f"{mapping.schema}.{mapping.table}"
    if catalogue is None or catalogue.kind not in ("r", "p"):
        raise StoreError(
            POSTGRES, RetryClass.BLOCKED, f"{name} is no table there; postgres.schema and postgres.table name it"
        )
    problems = [
        line
        for line in lines(mapping, catalogue)
        if not line.ok and line.name not in _MENDED_BY_PLAN and not line.name.startswith("postgres.index.")
    ]
    column = catalogue.columns.get(mapping.columns["log_id"])
    if column is not None:
        problems += [c for c in lines(mapping, catalogue) if c.name == "postgres.adopt.log_id" and not c.ok]
    leaves = catalogue.leaves
    rows = sum(part.rows for part in leaves) if all(part.rows >= 0 for part in leaves) else None
    steps = tuple(_steps(mapping, catalogue, read_indexes=read_indexes))
    size = sum(part.bytes for part in leaves)
    return Plan(name, rows, size, len(leaves) if catalogue.kind == "p" else 0, steps, problems)


def _steps(mapping: TableMapping, catalogue: Catalogue, *, read_indexes: bool) -> Iterator[Step]:
    column = mapping.columns["log_id"]
    if column not in catalogue.columns:
        yield Step(
            f"ALTER TABLE {mapping.relation} ADD COLUMN {_quote(column)} uuid",
            "the ids of new rows; old writers leave it null",
            "ACCESS EXCLUSIVE on the table" + (" and its partitions" if catalogue.kind == "p" else ""),
            f"{_BRIEF}: the catalogue alone changes, whatever the table's size",
            required=True,
            blocks_writers=True,
        )
    unique = id_index(mapping, catalogue)
    if unique is None or not unique.valid:
        columns = ", ".join(map(_quote, id_columns(mapping, catalogue)))
        yield from _index(
            catalogue, "_sidecar_key", f"({columns}) WHERE {_quote(column)} IS NOT NULL", "each id once", unique=True
        )
    if not read_indexes:
        return
    for wanted in READ_INDEXES:
        if serving(mapping, catalogue, wanted) is None:
            columns = ", ".join(_quote(mapping.columns[name]) for name in wanted.columns)
            where = f" WHERE NOT {_quote(mapping.columns['is_success'])}" if wanted.failures else ""
            yield from _index(catalogue, wanted.suffix, f"({columns}){where}", wanted.serves)


def _index(catalogue: Catalogue, suffix: str, definition: str, serves: str, *, unique: bool = False) -> Iterator[Step]:
    """One index over all of the table: one statement, or the steps for a partitioned one."""
    kind = "UNIQUE INDEX" if unique else "INDEX"
    names = {part.oid: _name(part, suffix) for part in catalogue.parts}
    oids: dict[int, int] = {}
    for part in catalogue.parts:
        name, relation = names[part.oid], f"{_quote(part.schema)}.{_quote(part.table)}"
        parent = None if part.parent is None else oids.get(part.parent)
        own = next((i for i in part.indexes if i.name == name or (parent is not None and i.parent == parent)), None)
        if own is not None:
            oids[part.oid] = own.oid
        if own is not None and own.parent is not None:
            continue  # it is part of the parent's already, whatever its name
        qualified = f"{_quote(part.schema)}.{_quote(name)}"
        if part.leaf:
            if own is not None and not own.valid:
                yield Step(
                    f"DROP INDEX CONCURRENTLY {qualified}",
                    "an interrupted build left it invalid",
                    f"SHARE UPDATE EXCLUSIVE on {part.table}",
                    "writes go on",
                    unique,
                    blocks_writers=False,
                )
            if own is None or not own.valid:
                yield Step(
                    f"CREATE {kind} CONCURRENTLY {_quote(name)} ON {relation} {definition}",
                    serves,
                    f"SHARE UPDATE EXCLUSIVE on {part.table}",
                    f"{_duration(part)}; writes go on",
                    unique,
                    blocks_writers=False,
                )
        elif own is None:
            yield Step(
                f"CREATE {kind} {_quote(name)} ON ONLY {relation} {definition}",
                f"{serves}: the parent's, empty until the partitions' are attached",
                f"SHARE on {part.table}",
                _BRIEF,
                unique,
                blocks_writers=True,
            )
        if part.parent is not None:
            above = next(each for each in catalogue.parts if each.oid == part.parent)
            yield Step(
                f"ALTER INDEX {_quote(above.schema)}.{_quote(names[above.oid])} ATTACH PARTITION {qualified}",
                f"{serves}: the parent's is valid with the last one",
                f"ACCESS EXCLUSIVE on the index {name}",
                _BRIEF,
                unique,
                blocks_writers=True,
            )


def _name(part: Part, suffix: str) -> str:
    """An index's name; where the table's is too long, its oid keeps it apart from its neighbours'."""
    whole = part.table + suffix
    if len(whole.encode()) <= MAX_BYTES:
        return whole
    tail = f"_{part.oid}{suffix}"
    return part.table.encode()[: MAX_BYTES - len(tail)].decode(errors="ignore") + tail


def _quote(name: str) -> str:
    """Any name of the catalogue, quoted."""
    return '"' + name.replace('"', '""') + '"'


def _duration(part: Part) -> str:
    """How long reading a table for an index takes: it is read twice."""
    seconds = 2 * part.bytes / _READ_BYTES
    return f"about {seconds:.0f} s at 100 MiB/s" if seconds >= 1 else "less than a second"


async def apply(
    patient: Connections, mapping: TableMapping, clock: Clock, *, read_indexes: bool = True
) -> AsyncIterator[Step]:
    """Do what the plan says, one step after the other; yields each when it is done. Plans anew after every step.

    Args:
        patient: at least two connections whose commands may take as long as an index does.
        mapping: of the adopted table.
        clock: for the pauses between two tries.
        read_indexes: also those that only make reads cheap.

    Raises:
        StoreError: BLOCKED where a problem stands against it; TRANSIENT where a lock was not to be had.
    """

    async def plan(link: Link) -> Plan:
        return await make_plan(link.connection, mapping, read_indexes=read_indexes)

    # One at a time: each plan sees what the step before it left, an attached index's validity among it.
    while True:
        todo = await patient.run(plan, whole=False)
        if todo.problems:
            worst = todo.problems[0]
            raise StoreError(
                POSTGRES, RetryClass.BLOCKED, f"{worst.name}: {worst.observed}; required: {worst.required}"
            )
        if not todo.steps:
            return
        await _do(patient, todo.steps[0], clock)
        yield todo.steps[0]


async def _do(patient: Connections, step: Step, clock: Clock) -> None:
    """One step, on the turn of this process alone."""

    async def in_turn(link: Link) -> None:
        async with turn(link.connection):
            # The last query's portal, and with it a snapshot that a concurrent build would wait for, lives until the
            # next simple statement.
            await link.connection.execute("SELECT 1")
            await patient.run(alone, whole=False)

    async def alone(link: Link) -> None:
        seconds = LOCK_SECONDS if step.blocks_writers else 0
        await link.connection.execute(f"SET lock_timeout = {int(seconds * 1000)}")
        try:
            await link.connection.execute(step.sql)
        finally:
            if not link.connection.is_closed():
                await link.connection.execute("RESET lock_timeout")

    for left in range(_TRIES - 1, -1, -1):
        try:
            await patient.run(in_turn, whole=False)
        except StoreError as error:
            failure = error
        else:
            return
        if failure.code == _NOT_OWNER:
            reason = "only the table's owner may do this: connect as that role for --apply (SIDECAR__POSTGRES__USER)"
            raise StoreError(POSTGRES, RetryClass.BLOCKED, reason, _NOT_OWNER)
        if failure.code != _LOCKED or not left:
            raise failure
        await clock.sleep(_PAUSE)

"""What the catalogue says of a table that others made: columns, indexes, partitions, sizes. Reads only, in moments.

Sizes are those that VACUUM and ANALYZE left (``reltuples``) and that the files have now: nothing is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from sidecar.stores.postgres_connections import Connection


@dataclass(frozen=True, slots=True)
class ColumnSeen:
    """One column."""

    type: str  # of format_type, without its modifier
    modifier: int | None  # n of varchar(n), or the fraction's digits of a time; None: none stated
    required: bool  # NOT NULL
    filled: bool  # the database gives it a value: a default, an identity, an expression
    generated: bool  # by an expression: nobody may write it
    exact: bool  # its collation tells different bytes apart


@dataclass(frozen=True, slots=True)
class IndexSeen:
    """One index of the table itself (of a partitioned table: the parent's)."""

    name: str
    columns: tuple[str | None, ...]  # of the key; None for an expression
    unique: bool  # and fit for ON CONFLICT
    valid: bool
    predicate: str | None


class PartIndex(NamedTuple):
    """An index of one part."""

    oid: int
    name: str
    valid: bool
    parent: int | None  # oid of the parent's index that it is attached to


@dataclass(frozen=True, slots=True)
class Part:
    """The table, or one of its partitions at any level."""

    oid: int
    schema: str
    table: str
    parent: int | None  # oid
    leaf: bool
    kind: str  # of pg_class: r table, p partitioned table, f foreign table
    rows: int  # about; -1: never analysed
    bytes: int  # without indexes
    indexes: tuple[PartIndex, ...]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What was seen."""

    kind: str  # as of Part
    columns: dict[str, ColumnSeen]
    indexes: tuple[IndexSeen, ...]
    parts: tuple[Part, ...]  # the table first, parents before their partitions
    partitioned_by: tuple[str | None, ...]  # columns at all levels; None: an expression; empty: not partitioned
    sequence_cache: int | None  # of the key's sequence; None: there is none of its own

    @property
    def leaves(self) -> Sequence[Part]:
        """Where the rows are."""
        return [part for part in self.parts if part.leaf]


_COLUMNS: Final = """
SELECT a.attname::text, format_type(a.atttypid, NULL),
       CASE WHEN a.atttypid = 'varchar'::regtype AND a.atttypmod >= 4 THEN a.atttypmod - 4
            WHEN a.atttypid IN ('timestamp'::regtype, 'timestamptz'::regtype) AND a.atttypmod >= 0 THEN a.atttypmod END,
       a.attnotnull, a.atthasdef OR a.attidentity <> '' OR a.attgenerated <> '', a.attgenerated <> '',
       coalesce(c.collisdeterministic, true)
FROM pg_attribute a LEFT JOIN pg_collation c ON c.oid = a.attcollation
WHERE a.attrelid = $1::oid AND a.attnum > 0 AND NOT a.attisdropped
"""
_INDEXES: Final = """
SELECT c.relname::text, array(
           SELECT a.attname::text FROM unnest(i.indkey::int2[]) WITH ORDINALITY k(number, place)
           LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number AND k.number > 0
           WHERE k.place <= i.indnkeyatts ORDER BY k.place),
       i.indisunique AND i.indimmediate, i.indisvalid, pg_get_expr(i.indpred, i.indrelid)
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
WHERE i.indrelid = $1::oid AND m.amname = 'btree'
"""
_PARTS: Final = """
WITH RECURSIVE parts AS (
    SELECT $1::oid AS oid, NULL::oid AS parent, 0 AS level
    UNION ALL SELECT i.inhrelid, i.inhparent, p.level + 1 FROM pg_inherits i JOIN parts p ON p.oid = i.inhparent)
SELECT c.oid, n.nspname::text, c.relname::text, p.parent, c.relkind <> 'p', c.relkind::text, c.reltuples::bigint,
       CASE WHEN $2 THEN pg_table_size(c.oid) ELSE 0 END
FROM parts p JOIN pg_class c ON c.oid = p.oid JOIN pg_namespace n ON n.oid = c.relnamespace
ORDER BY p.level, c.relname
"""
_PART_INDEXES: Final = """
SELECT i.indrelid, x.oid, x.relname::text, i.indisvalid, h.inhparent
FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid LEFT JOIN pg_inherits h ON h.inhrelid = x.oid
WHERE i.indrelid = ANY($1::oid[]) ORDER BY x.oid
"""
_PARTITIONED_BY: Final = """
SELECT a.attname::text FROM pg_partitioned_table p CROSS JOIN unnest(p.partattrs::int2[]) AS k(number)
LEFT JOIN pg_attribute a ON a.attrelid = p.partrelid AND a.attnum = k.number AND k.number > 0
WHERE p.partrelid = ANY($1::oid[])
"""
_CACHE: Final = """
SELECT s.seqcache FROM pg_depend d JOIN pg_sequence s ON s.seqrelid = d.objid
JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
  AND d.refobjid = $1::oid AND a.attname = $2
"""


async def look(connection: Connection, relation: str, key: str, *, sizes: bool = True) -> Catalogue | None:
    """What the table is like; None where there is none.

    Args:
        connection: to its database.
        relation: the quoted name.
        key: the key's column.
        sizes: also how large each partition is and which indexes it has, which costs a look at the files of each.
    """
    found = await connection.fetchrow("SELECT oid, relkind::text FROM pg_class WHERE oid = to_regclass($1)", relation)
    if found is None:
        return None
    root, kind_of_table = found
    columns = {name: ColumnSeen(*rest) for name, *rest in await connection.fetch(_COLUMNS, root)}
    btrees = await connection.fetch(_INDEXES, root)
    found_parts = await connection.fetch(_PARTS, root, sizes)
    indexes: dict[int, list[PartIndex]] = {row[0]: [] for row in found_parts}
    for owner, *rest in await connection.fetch(_PART_INDEXES, list(indexes) if sizes else []):
        indexes[owner].append(PartIndex(*rest))
    parts = tuple(
        Part(oid, schema, table, parent, leaf, kind, rows, size, tuple(indexes[oid]))
        for oid, schema, table, parent, leaf, kind, rows, size in found_parts
    )
    parents = [part.oid for part in parts if part.kind == "p"]
    by = [row[0] for row in await connection.fetch(_PARTITIONED_BY, parents)] if parents else []
    return Catalogue(
        kind_of_table,
        columns,
        tuple(IndexSeen(name, tuple(keys), unique, valid, where) for name, keys, unique, valid, where in btrees),
        parts,
        tuple(dict.fromkeys(by)),
        await connection.fetchval(_CACHE, root, key),
    )

"""Ids of rows that never had one: a UUIDv8 of (table's tag, integer key), computed, reversible, never stored.

A row that an old writer put into an adopted table has an integer key and no UUID. Its ``log_id`` is arithmetic (RFC
9562, section 5.8), the same in every process and in SQL, so that no row is ever updated to give it one::

    51deca70-TTTT-8000-vKKK-KKKKKKKKKKKK
    |        |    |    two bits of variant (binary 10), then 62 bits: key + 2**61
    |        |    version 8 and twelve zero bits
    |        the table's tag, 16 bits
    a fixed mark, 32 bits

So key 42 of tag 1 is ``51deca70-0001-8000-a000-00000000002a``: people read the key at the end. The bias of 2**61 keeps
negative keys (identities that were reseeded) and makes the order of the ids that of the keys: equal times are paged in
the order in which the database numbered them.

INVARIANTS: two keys, or two tags, never share an id; ``key(of(k)) == k``; every other UUID has no key here. Ids that
the sidecar mints have version 7; one that it derives from an Idempotency-Key has version 8 and meets this shape with a
probability of 2**-58, and then it is refused like any other that names a row that is not there.
"""

import uuid
from typing import Final

_MARK: Final = 0x51DECA70
_VERSION: Final = 8
BIAS: Final = 2**61
"""Added to a key; keys lie in [-BIAS, BIAS)."""
MAX_TAG: Final = 2**16 - 1
_HALF: Final = 64  # bits
_VARIANT: Final = 0b10
_SIGNED: Final = 2**63 - BIAS
"""What an int8 is lessened by so that its two's complement is the id's second half, variant included."""


class ComputedIds:
    """The ids of one table's rows.

    Args:
        tag: the table's number, 0..65535; two tables that are copied into one place need two.
    """

    __slots__ = ("_high", "prefix")

    def __init__(self, tag: int) -> None:
        if not 0 <= tag <= MAX_TAG:
            raise ValueError(f"tag {tag} lies outside 0..{MAX_TAG}")
        self._high = _MARK << 32 | tag << 16 | _VERSION << 12
        self.prefix = f"{_MARK:08x}-{tag:04x}-{_VERSION}000-"
        """What the text of every such id begins with; the variant follows."""

    def of(self, key: int) -> str:
        """The id of the row with this key. Raises ValueError where the key is outside of [-2**61, 2**61)."""
        if not -BIAS <= key < BIAS:
            raise ValueError("a key outside of -2**61..2**61-1 has no computed id")
        return str(uuid.UUID(int=self._high << _HALF | 1 << (_HALF - 1) | (key + BIAS)))

    def key(self, log_id: str) -> int | None:
        """The key of the row that this id names; None where it is no computed id of this table."""
        if not log_id.startswith(self.prefix):
            return None
        low = int(log_id[19:23] + log_id[24:], 16)
        return None if low >> (_HALF - 2) != _VARIANT else (low & (1 << (_HALF - 2)) - 1) - BIAS

    def sql(self, key: str) -> str:
        """The same as an SQL expression of type uuid; ``key`` is an integer expression. Immutable."""
        return f"encode('\\x{self._high:016x}'::bytea || int8send(({key})::int8 - {_SIGNED}), 'hex')::uuid"

    def sql_key(self, log_id: str) -> str:
        """The inverse as an SQL expression of type int8; null for every other uuid."""
        first, last = self.of(-BIAS), self.of(BIAS - 1)
        low = f"right(replace({log_id}::text, '-', ''), 16)"
        return (
            f"CASE WHEN {log_id} BETWEEN '{first}'::uuid AND '{last}'::uuid "
            f"THEN ('x' || {low})::bit(64)::int8 + {_SIGNED} END"
        )

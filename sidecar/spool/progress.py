"""The rows of ``progress``: read, changed and written as a whole, each under a checksum.

A flipped bit in ``upto`` would make frames look settled, and they would be deleted: so a row whose checksum fails is
not believed, and its store is handed everything again.
"""

import sqlite3
from collections.abc import Sequence
from typing import Final, NamedTuple, Self
from zlib import crc32

from sidecar.spool.intervals import Intervals

COLUMNS: Final = (
    "bit, name, upto, ahead, accepted, accepted_seq, delivered, released, discarded, quarantined, strengthened, crc"
)


class Progress(NamedTuple):
    """One store's row, in the order of ``COLUMNS``."""

    bit: int
    name: str
    upto: int
    ahead: bytes
    accepted: int
    accepted_seq: int
    delivered: int
    released: int
    discarded: int
    quarantined: int
    strengthened: int
    crc: int

    @property
    def sound(self) -> bool:
        """True where the checksum fits."""
        return self.crc == _checksum(self)

    @property
    def marks(self) -> Intervals:
        """What the store has settled. Raises struct.error for an unsound row."""
        return Intervals((0, self.upto), *Intervals.unpack(self.ahead))

    def sealed(self) -> Self:
        """The row with the checksum of what it says."""
        return self._replace(crc=_checksum(self))


def _checksum(row: Progress) -> int:
    return crc32(repr(tuple(row)[:-1]).encode())


def fresh(bit: int, name: str) -> Progress:
    """The row of a store that has got nothing yet."""
    return Progress(bit, name, 0, b"", 0, 0, 0, 0, 0, 0, 0, 0).sealed()


def load(connection: sqlite3.Connection) -> list[Progress]:
    """All rows, sound or not, by bit."""
    return [Progress(*r) for r in connection.execute(f"SELECT {COLUMNS} FROM progress ORDER BY bit").fetchall()]


def store(connection: sqlite3.Connection, rows: Sequence[Progress]) -> None:
    """Write rows as they are, over those with the same bit."""
    connection.executemany(
        f"INSERT OR REPLACE INTO progress({COLUMNS}) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows
    )


def add(connection: sqlite3.Connection, name: str, **amounts: int) -> None:
    """Add to counters of a store, e.g. ``delivered=1``."""
    (row,) = [
        Progress(*r) for r in connection.execute(f"SELECT {COLUMNS} FROM progress WHERE name = ?", (name,)).fetchall()
    ]
    store(connection, [row._replace(**{k: getattr(row, k) + n for k, n in amounts.items()}).sealed()])

"""The dedup window on disk: one row per commit, trimmed by count and by age on the monotonic clock.

At a start there is nothing but the wall clock, which promises may not use (P11): every pair that is still in the file
is given a whole window. Recognising a resend for longer is never wrong.
"""

import sqlite3
from collections import deque
from collections.abc import Sequence

from sidecar.clock import Clock
from sidecar.settings import Dedup
from sidecar.spool.types import Seen

PAIR = 32  # 16 bytes id, 16 bytes digest


def pack(seen: Sequence[Seen]) -> bytes:
    """The pairs of one append, as they stand in a row."""
    return b"".join([part for s in seen for part in (s.log_id, s.content)])


class SeenRows:
    """Which rows there are; used by the database thread alone after the start."""

    def __init__(self, settings: Dedup, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._rows: deque[tuple[int, float, int]] = deque()  # line, monotonic seconds, pairs
        self.ids = 0

    def load(self, connection: sqlite3.Connection) -> Sequence[Seen]:
        """Read the window, oldest first, newest ``max_ids`` pairs."""
        expires = self._clock.now_us() + int(self._settings.window * 1_000_000)
        now = self._clock.monotonic()
        out: list[Seen] = []
        for line, n, body in connection.execute("SELECT line, n, body FROM seen ORDER BY line").fetchall():
            if not isinstance(body, bytes) or len(body) != PAIR * n:
                continue  # damaged: a resend is owed again, and the stores' keys make it have no second effect
            self._rows.append((line, now, n))
            self.ids += n
            out += [Seen(body[i : i + 16], body[i + 16 : i + 32], expires) for i in range(0, len(body), PAIR)]
        return out[max(0, len(out) - self._settings.max_ids) :]

    def insert(self, connection: sqlite3.Connection, pairs: bytes, now_us: int) -> None:
        """Add the pairs of a commit and trim what has left the window (in the same transaction)."""
        n = len(pairs) // PAIR
        now = self._clock.monotonic()
        cursor = connection.execute("INSERT INTO seen(at_us, n, body) VALUES(?, ?, ?)", (now_us, n, pairs))
        self._rows.append((cursor.lastrowid or 0, now, n))
        self.ids += n
        self.trim(connection)

    def rolled_back(self, connection: sqlite3.Connection) -> None:
        """The transaction did not happen: take the rows as the file has them."""
        ages = {line: at for line, at, _ in self._rows}
        now = self._clock.monotonic()
        rows = connection.execute("SELECT line, n FROM seen ORDER BY line").fetchall()
        self._rows = deque((line, ages.get(line, now), n) for line, n in rows)
        self.ids = sum(n for _, n in rows)

    def trim(self, connection: sqlite3.Connection) -> None:
        """Delete rows that are too old or too many; whole rows, so that a few more than ``max_ids`` may stay."""
        oldest = self._clock.monotonic() - self._settings.window
        last = 0
        while self._rows:
            line, at, n = self._rows[0]
            if at >= oldest and self.ids - n < self._settings.max_ids:
                break
            self._rows.popleft()
            self.ids -= n
            last = line
        if last:
            connection.execute("DELETE FROM seen WHERE line <= ?", (last,))

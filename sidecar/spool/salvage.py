"""Taking rows out of files that SQLite cannot be trusted with.

Two uses: the pages behind a failure in the write-ahead log (what SQLite would silently drop), and a whole database
that it refuses. Rows are read straight from pages (``pages``). Frames and progress carry checksums of their own, so
they are taken from wherever they are found; the small tables have none and are taken only where their tree is whole.
A frame may come back that was delivered and deleted: delivering twice has no second effect, losing has.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple
from zlib import crc32

from sidecar.spool import pages, progress
from sidecar.spool.framing import Header
from sidecar.spool.progress import Progress
from sidecar.spool.schema import DEAD, DEFERRED
from sidecar.spool.wal import Walk

SMALL: Final = {
    "resolutions": (int, int, int, int, int),
    "differences": (str, str, int),
    "seen": (int, int, int, bytes),
    "meta": (str, str),
    "audit": (int, int, str, str, str, str),
}
"""The tables without checksums, and what their columns hold."""
_WIDTHS: Final = {"frames": 13, "progress": 12, "leftovers": 20}
_KEYED: Final = frozenset({"frames", "progress", "leftovers", "resolutions", "seen", "audit"})  # rowid = first column
_BATCH_BYTES: Final = 8 * 1024 * 1024
_LEFTOVER_TEXTS: Final = (1, 14, 15, 16)
_LEFTOVER_NUMBERS: Final = (2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 17, 18)


class SavedFrame(NamedTuple):
    """A frame whose header is sound."""

    header: Header
    body: bytes


@dataclass(slots=True)
class Haul:
    """What was found."""

    frames: dict[int, SavedFrame] = field(default_factory=dict)
    progress: dict[int, Progress] = field(default_factory=dict)  # the furthest of each store
    leftovers: dict[int, tuple[pages.Value, ...]] = field(default_factory=dict)
    small: dict[str, list[tuple[pages.Value, ...]]] = field(default_factory=dict)
    unsound: dict[int, tuple[pages.Value, ...]] = field(default_factory=dict)  # rows whose header checksum fails
    size: int = 0  # bytes of bodies since it was emptied
    records: int = 0  # in sound frames

    def take(self, rowid: int, columns: Sequence[pages.Value]) -> None:
        """Take a row of one of the three tables that can be told by their shape."""
        values = (rowid, *columns[1:])
        if len(values) == _WIDTHS["frames"]:
            self._frame(values)
        elif len(values) == _WIDTHS["progress"]:
            self._progress(values)
        elif len(values) == _WIDTHS["leftovers"]:
            self._leftover(values)

    def _frame(self, values: tuple[pages.Value, ...]) -> None:
        *small, body = values
        self.size += len(body) if isinstance(body, bytes) else 0
        header = Header(*small)  # type: ignore[arg-type]  # its checksum covers the types too
        if header.sound and isinstance(body, bytes):
            self.records += 0 if header.seq in self.frames else header.n
            self.frames[header.seq] = SavedFrame(header, body.ljust(header.size, b"\0"))
        elif isinstance(body, bytes):
            self.unsound[header.seq] = values

    def _progress(self, values: tuple[pages.Value, ...]) -> None:
        row = Progress(*values)  # type: ignore[arg-type]  # its checksum covers the types too
        if row.sound:
            known = self.progress.get(row.bit)
            if known is None or (row.accepted_seq, row.upto) > (known.accepted_seq, known.upto):
                self.progress[row.bit] = row

    def _leftover(self, values: tuple[pages.Value, ...]) -> None:
        key, body, crc = values[0], values[19], values[18]
        texts, numbers = (values[i] for i in _LEFTOVER_TEXTS), (values[i] for i in _LEFTOVER_NUMBERS)
        if not isinstance(key, int) or not all(isinstance(t, str) for t in texts):
            return
        if not all(isinstance(n, int) for n in numbers):
            return
        if values[2] in (DEFERRED, DEAD) and (not isinstance(body, bytes) or crc32(body) != crc):
            return
        self.size += len(body) if isinstance(body, bytes) else 0
        self.leftovers.setdefault(key, values)


def from_log(log: Walk, database: Path) -> Haul:
    """The rows in the part of a log that SQLite will drop: from the newest good image of each page.

    Where the newest image of a page is damaged an older one stands in.
    """
    newest: dict[int, bytes] = {}
    for frame in log.frames:
        if frame.good:
            newest[frame.page] = log.image(frame)
    fd = os.open(database, os.O_RDONLY)
    try:

        def fetch(number: int) -> bytes | None:
            image = newest.get(number)
            return image if image is not None else read_page(fd, number)

        haul = Haul()
        touched = {f.page for f in log.frames[log.kept :]}
        for number in sorted(touched & newest.keys()):
            _harvest(newest[number], number, fetch, haul)
    finally:
        os.close(fd)
    return haul


def from_database(database: Path, log: Walk | None, haul: Haul) -> Iterator[None]:
    """All rows that can be told from the pages of a database and the log that belongs to it.

    Yields from time to time, for the haul to be emptied: memory does not grow with the file.
    """
    overlay: dict[int, bytes] = {}
    for frame in log.frames if log is not None else ():
        if frame.good and log is not None:
            overlay[frame.page] = log.image(frame)
    fd = os.open(database, os.O_RDONLY)
    try:
        last = max(os.fstat(fd).st_size // pages.PAGE, *overlay, 0)

        def fetch(number: int) -> bytes | None:
            image = overlay.get(number)
            return image if image is not None else read_page(fd, number)

        for number in range(1, last + 1):
            page = fetch(number)
            if page is not None and pages.is_leaf(page, number):
                _harvest(page, number, fetch, haul)
            if haul.size > _BATCH_BYTES:
                yield
        _small_tables(fetch, haul)
        yield
    finally:
        os.close(fd)


def _harvest(page: bytes, number: int, fetch: pages.Fetch, haul: Haul) -> None:
    if pages.is_leaf(page, number):
        for rowid, columns in pages.rows(page, number, fetch):
            haul.take(rowid, columns)


def read_page(fd: int, number: int) -> bytes | None:
    """A page of the file by its number; None where there is none."""
    if not 0 < number < 1 << 31:
        return None
    page = os.pread(fd, pages.PAGE, (number - 1) * pages.PAGE)
    return page if len(page) == pages.PAGE else None


def _small_tables(fetch: pages.Fetch, haul: Haul) -> None:
    """Tables without checksums: only by way of the schema, from trees that are whole."""
    for name, root in roots(fetch):
        if name not in SMALL:
            continue
        numbers, whole = pages.leaves(root, fetch)
        if whole:
            found = (row for number in numbers for row in pages.rows(fetch(number) or b"", number, fetch))
            rows = [(rowid, *columns[1:]) if name in _KEYED else tuple(columns) for rowid, columns in found]
            haul.small[name] = [row for row in rows if _fits(row, SMALL[name])]


def _fits(row: tuple[pages.Value, ...], kinds: tuple[type, ...]) -> bool:
    return len(row) == len(kinds) and all(isinstance(v, k) for v, k in zip(row, kinds, strict=True))


def roots(fetch: pages.Fetch) -> Iterator[tuple[str, int]]:
    """(name, root page) of every table that the schema names."""
    numbers, _ = pages.leaves(1, fetch)
    for number in numbers:
        page = fetch(number)
        if page is None:
            continue
        for _, columns in pages.rows(page, number, fetch):
            match columns:
                case ["table", str(name), _, int(root), _]:
                    yield name, root


def empty_into(connection: sqlite3.Connection, haul: Haul) -> None:
    """Write the large rows of a haul into a new spool, and forget them."""
    insert = f"INTO frames VALUES({', '.join('?' * 13)})"  # unsound ones are dealt with when the frames are counted
    connection.executemany(f"INSERT OR REPLACE {insert}", ((*f.header, f.body) for f in haul.frames.values()))
    connection.executemany(f"INSERT OR IGNORE {insert}", haul.unsound.values())
    put_leftovers(connection, haul.leftovers.values())
    for rows in (haul.frames, haul.unsound, haul.leftovers):
        rows.clear()
    haul.size = 0


def put_small(connection: sqlite3.Connection, haul: Haul) -> None:
    """Write the accounts and the small tables into a new spool."""
    progress.store(connection, list(haul.progress.values()))
    for name, rows in haul.small.items():
        for row in rows:
            connection.execute(f"INSERT OR IGNORE INTO {name} VALUES({', '.join('?' * len(row))})", row)


def put_frames(connection: sqlite3.Connection, frames: Iterable[SavedFrame]) -> None:
    """Insert frames under their own numbers; those that are there stay."""
    connection.executemany(
        f"INSERT OR IGNORE INTO frames VALUES({', '.join('?' * 13)})", ((*f.header, f.body) for f in frames)
    )


def put_leftovers(connection: sqlite3.Connection, rows: Iterable[tuple[pages.Value, ...]]) -> None:
    """Insert leftovers under their own keys; those that are there stay."""
    connection.executemany(f"INSERT OR IGNORE INTO leftovers VALUES({', '.join('?' * 20)})", rows)

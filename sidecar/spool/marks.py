"""Writing a snapshot of the ledger down: marks, counters, leftovers, trims. Runs in the database thread."""

import sqlite3
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sidecar.spool import divergence, progress
from sidecar.spool.divergence import Pair
from sidecar.spool.framing import UNRESOLVED
from sidecar.spool.ledger import Exceptional, MarkRow, Resolution, Snapshot
from sidecar.spool.progress import Progress
from sidecar.spool.schema import DEFERRED
from sidecar.spool.types import AuditLine
from sidecar.spool.work import Key

INSERT_LEFTOVER: Final = f"""INSERT INTO leftovers(store, state, seq, idx, log_id, phase, owed, required, accepted_us,
    first_us, last_us, due_us, attempts, retry_class, reason, code, size, crc, body)
    VALUES({", ".join("?" * 19)})"""


@dataclass(frozen=True, slots=True)
class Refreshed:
    """What the file says of a store's deferred records."""

    store: str
    oldest_us: int | None
    due: Sequence[tuple[int, int]]  # (due_us on the steady clock, key), the first few


@dataclass(frozen=True, slots=True)
class Written:
    """What the loop must know after marks were written."""

    corrections: Counter[Pair]
    refreshed: Sequence[Refreshed]


def write(connection: sqlite3.Connection, snapshot: Snapshot) -> Written:
    """Write a snapshot inside the current transaction; deletions first, to make room for leftovers."""
    for lo, hi in snapshot.trims:
        connection.execute("DELETE FROM frames WHERE seq BETWEEN ? AND ?", (lo, hi))
    if snapshot.marks:
        rows = {row.bit: row for row in progress.load(connection)}
        progress.store(connection, [_changed(rows[mark.bit], mark) for mark in snapshot.marks])
    changed: Counter[Pair] = Counter()
    deferring = set()
    for exceptional in snapshot.exceptional:
        changed.update(_settle(connection, exceptional))
        deferring |= {row.store for row in exceptional.rows if row.state == DEFERRED}
    add_differences(connection, snapshot.differences)
    return Written(changed, [refresh(connection, store) for store in deferring])


def add_differences(connection: sqlite3.Connection, differences: Sequence[tuple[int, int, int]]) -> None:
    """Add to the closed part of the divergence: (bit present in, bit missing from, records)."""
    connection.executemany(
        "INSERT INTO differences VALUES((SELECT name FROM progress WHERE bit = ?),"
        " (SELECT name FROM progress WHERE bit = ?), ?)"
        " ON CONFLICT(present_in, missing_from) DO UPDATE SET records = records + excluded.records",
        differences,
    )


def _changed(row: Progress, mark: MarkRow) -> Progress:
    return row._replace(
        upto=mark.upto,
        ahead=mark.ahead,
        accepted=row.accepted + mark.owed,
        accepted_seq=mark.accepted_seq,
        delivered=row.delivered + mark.delivered,
        released=row.released + mark.released,
        quarantined=row.quarantined + mark.quarantined,
    ).sealed()


def refresh(connection: sqlite3.Connection, store: str, held: int = 0) -> Refreshed:
    """The oldest deferred record of a store, and the next due ones (one more than ``held`` are looked at)."""
    (oldest,) = connection.execute(
        "SELECT min(accepted_us) FROM leftovers WHERE store = ? AND state = 1", (store,)
    ).fetchone()
    due = connection.execute(
        "SELECT due_us, key FROM leftovers WHERE store = ? AND state = 1 ORDER BY due_us LIMIT ?",
        (store, held + 1),
    ).fetchall()
    return Refreshed(store, oldest, due)


def _settle(connection: sqlite3.Connection, frame: Exceptional) -> Counter[Pair]:
    missing = masks_at(connection, frame.seq)
    before = divergence.total((frame.owed, frame.settled_before, m) for m in missing.values())
    if frame.rows:
        connection.executemany(INSERT_LEFTOVER, frame.rows)
        missing = masks_at(connection, frame.seq)
    after = divergence.total((frame.owed, frame.settled_after, m) for m in missing.values())
    after.subtract(before)
    return after


def masks_at(connection: sqlite3.Connection, seq: int, idx: int | None = None) -> dict[int, int]:
    """Per record of the frame with leftovers: the mask of stores that miss it."""
    missing: dict[int, int] = defaultdict(int)
    where, parameters = ("seq = ?", [seq]) if idx is None else ("seq = ? AND idx = ?", [seq, idx])
    for index, bit in connection.execute(
        f"SELECT idx, bit FROM leftovers JOIN progress ON name = store WHERE {where}", parameters
    ).fetchall():
        missing[index] |= 1 << bit
    return missing


def strengthen(connection: sqlite3.Connection, bit: int) -> int:
    """Every frame so far is required for the store; returns the last seq that this holds for."""
    (newest,) = connection.execute("SELECT coalesce(max(seq), 0) FROM frames").fetchone()
    row = next(row for row in progress.load(connection) if row.bit == bit)
    seq = max(row.strengthened, row.accepted_seq, int(newest))
    progress.store(connection, [row._replace(strengthened=seq).sealed()])
    return seq


def resolve(connection: sqlite3.Connection, key: Key) -> tuple[Resolution, dict[int, int]] | None:
    """Decide to whom all unresolved frames are owed; None where there is none.

    Frames up to ``accepted_seq`` are added to ``accepted`` here; later ones are counted with the next marks.
    """
    lo, hi = connection.execute(
        "SELECT min(seq), max(seq) FROM frames WHERE flags & ? AND seq >"
        " (SELECT coalesce(max(hi), 0) FROM resolutions)",
        (UNRESOLVED,),
    ).fetchone()
    if lo is None:
        return None
    resolution = Resolution(lo, hi, key.phase, key.owed, key.required)
    connection.execute("INSERT INTO resolutions VALUES(?, ?, ?, ?, ?)", resolution)
    counted = {}
    for row in progress.load(connection):
        if key.owed >> row.bit & 1:
            (n,) = connection.execute(
                "SELECT coalesce(sum(n), 0) FROM frames WHERE flags & ? AND seq BETWEEN ? AND ?",
                (UNRESOLVED, lo, row.accepted_seq),
            ).fetchone()
            progress.store(connection, [row._replace(accepted=row.accepted + n).sealed()])
            counted[row.bit] = int(n)
    return resolution, counted


def set_meta(connection: sqlite3.Connection, key: str, value: str) -> None:
    """Keep a small value."""
    connection.execute(
        "INSERT INTO meta VALUES(?, ?) ON CONFLICT(key) DO UPDATE SET value = excluded.value", (key, value)
    )


def audit(connection: sqlite3.Connection, line: tuple[int, str, str, str, str]) -> None:
    """Add a line: at_us, who, what, why, evidence."""
    connection.execute("INSERT INTO audit(at_us, who, what, why, evidence) VALUES(?, ?, ?, ?, ?)", line)


def audit_trail(connection: sqlite3.Connection, limit: int) -> list[AuditLine]:
    """The newest lines, newest first."""
    return [
        AuditLine(*line)
        for line in connection.execute("SELECT * FROM audit ORDER BY key DESC LIMIT ?", (limit,)).fetchall()
    ]

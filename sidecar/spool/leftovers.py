"""The table of leftovers: deferred records, dead letters, refused ones. Runs in the database thread.

Every change carries the audit line, the counters and the corrections of divergence in its own transaction.
"""

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple
from zlib import crc32

import msgspec

from sidecar.record import LogRecord, decode
from sidecar.spool import divergence, marks, progress
from sidecar.spool.divergence import Pair
from sidecar.spool.ledger import LeftoverRow
from sidecar.spool.marks import Refreshed
from sidecar.spool.schema import DEAD, DEFERRED, DISCARDED, DOOR, QUARANTINED
from sidecar.spool.types import DeadLetter, Deferred, Leftover

_COLUMNS: Final = (
    "key, store, state, seq, idx, log_id, phase, owed, required, accepted_us, first_us, last_us, due_us, attempts,"
    " retry_class, reason, code, size, crc, body"
)


class Row(NamedTuple):
    """A row of ``leftovers``."""

    key: int
    store: str
    state: int
    seq: int
    idx: int
    log_id: bytes | None
    phase: int
    owed: int
    required: int
    accepted_us: int
    first_us: int
    last_us: int
    due_us: int
    attempts: int
    retry_class: str
    reason: str
    code: str
    size: int
    crc: int
    body: bytes | None

    @property
    def record(self) -> LogRecord | None:
        """The decoded body; None where its checksum fails."""
        if self.body is None or crc32(self.body) != self.crc:
            return None
        try:
            return decode(self.body)
        except msgspec.MsgspecError:
            return None


@dataclass(slots=True)
class Change:
    """What a write did to the accounts of one or more stores."""

    moved: int = 0
    deferred: Counter[str] = field(default_factory=Counter)  # by store, as all that follow
    deferred_bytes: Counter[str] = field(default_factory=Counter)
    dead: Counter[tuple[str, str]] = field(default_factory=Counter)  # by store and retry class
    dead_bytes: Counter[str] = field(default_factory=Counter)
    delivered: Counter[str] = field(default_factory=Counter)
    discarded: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    corrections: Counter[Pair] = field(default_factory=Counter)
    refreshed: list[Refreshed] = field(default_factory=list)


class Selection(NamedTuple):
    """Which dead letters: by key, or by store and retry class (None: any)."""

    keys: tuple[int, ...] | None
    store: str | None
    retry_class: str | None

    def where(self) -> tuple[str, list[object]]:
        """The SQL condition and its parameters."""
        parts, parameters = ["state = ?"], [DEAD]
        values: list[object] = list(parameters)
        if self.keys is not None:
            parts.append(f"key IN ({', '.join('?' * len(self.keys))})")
            values += self.keys
        if self.store is not None:
            parts.append("store = ?")
            values.append(self.store)
        if self.retry_class is not None:
            parts.append("retry_class = ?")
            values.append(self.retry_class)
        return " AND ".join(parts), values


def rows(connection: sqlite3.Connection, where: str, parameters: Sequence[object]) -> list[Row]:
    """Read whole rows."""
    return [
        Row(*r) for r in connection.execute(f"SELECT {_COLUMNS} FROM leftovers WHERE {where}", parameters).fetchall()
    ]


def due(
    connection: sqlite3.Connection, store: str, *, now_us: int, limit: int, max_bytes: int, in_hand: frozenset[int]
) -> tuple[list[Row], Refreshed]:
    """Deferred rows of a store that are due and that nobody holds, within the bounds; one at least, if there is one."""
    free: list[Row] = []
    size = 0
    query = f"SELECT {_COLUMNS} FROM leftovers WHERE store = ? AND state = 1 AND due_us <= ? ORDER BY due_us"
    # Row by row, so that no more is read than is wanted; closed at the end: a half-read SELECT blocks checkpoints.
    with contextlib.closing(connection.execute(query, (store, now_us))) as found:
        for row in (Row(*values) for values in found):
            if row.key in in_hand:
                continue
            size += row.size
            if len(free) == limit or (free and size > max_bytes):
                break
            free.append(row)
    return free, marks.refresh(connection, store, len(in_hand) + len(free))


def deferred(row: Row, record: LogRecord, due_us: int) -> Deferred:
    """The value that a shipper gets."""
    return Deferred(
        key=row.key,
        store=row.store,
        record=record,
        accepted_us=row.accepted_us,
        first_us=row.first_us,
        due_us=due_us,
        attempts=row.attempts,
        retry_class=row.retry_class,
        reason=row.reason,
        code=row.code,
        phase=row.phase,
        size=row.size,
    )


def dead_letter(row: Row) -> DeadLetter:
    """The value that an operator gets."""
    door = row.store == DOOR
    record = None if door else row.record
    return DeadLetter(
        key=row.key,
        store=row.store,
        log_id=record.log_id if record is not None else None,
        record=record,
        raw=row.body if record is None else None,
        retry_class=row.retry_class,
        reason=row.reason,
        code=row.code,
        attempts=row.attempts,
        first_us=row.first_us,
        last_us=row.last_us,
        phase=row.phase,
        size=row.size,
    )


def finish(
    connection: sqlite3.Connection,
    key: int,
    outcome: Leftover | None,
    *,
    due_us: int,
    now_us: int,
    settled: int,
    held: int,
) -> Change:
    """A deferred record was delivered (None), is tried again later, or is dead."""
    change = Change()
    found = rows(connection, "key = ? AND state = 1", (key,))
    if not found:
        return change
    row = found[0]
    change.moved = 1
    if outcome is None:
        change.corrections = _corrections(connection, row, settled)
        connection.execute("DELETE FROM leftovers WHERE key = ?", (key,))
        progress.add(connection, row.store, delivered=1)
        before = change.corrections
        change.corrections = _corrections(connection, row, settled)
        change.corrections.subtract(before)
        change.delivered[row.store] = 1
    else:
        state = DEFERRED if outcome.kind == "deferred" else DEAD
        connection.execute(
            "UPDATE leftovers SET state = ?, due_us = ?, last_us = ?, attempts = ?, retry_class = ?, reason = ?,"
            " code = ? WHERE key = ?",
            (state, due_us, now_us, outcome.attempts, outcome.retry_class, outcome.reason, outcome.code, key),
        )
        if state == DEAD:
            change.dead[row.store, outcome.retry_class] = 1
            change.dead_bytes[row.store] = row.size
    if change.delivered or change.dead:
        change.deferred[row.store] = -1
        change.deferred_bytes[row.store] = -row.size
    change.refreshed.append(marks.refresh(connection, row.store, held))
    return change


def quarantine(connection: sqlite3.Connection, row: Row, held: int) -> Change:
    """A leftover's own body is damaged: it can be delivered no more; the row stays as the mark of that."""
    change = Change(1)
    connection.execute("UPDATE leftovers SET state = ? WHERE key = ?", (QUARANTINED, row.key))
    progress.add(connection, row.store, quarantined=1)
    change.quarantined[row.store] = 1
    if row.state == DEFERRED:
        change.deferred[row.store] = -1
        change.deferred_bytes[row.store] = -row.size
    else:
        change.dead[row.store, row.retry_class] = -1
        change.dead_bytes[row.store] = -row.size
    change.refreshed.append(marks.refresh(connection, row.store, held))
    return change


def redrive(connection: sqlite3.Connection, chosen: Selection, limit: int, now_us: int, held: int) -> Change:
    """Dead letters become deferred ones that are due now; refused ones have no store to go to and stay."""
    change = Change()
    for key, store, retry_class, size in _select(connection, chosen, limit, "store <> 'door'"):
        connection.execute("UPDATE leftovers SET state = 1, due_us = ? WHERE key = ?", (now_us, key))
        change.moved += 1
        change.dead[store, retry_class] -= 1
        change.dead_bytes[store] -= size
        change.deferred[store] += 1
        change.deferred_bytes[store] += size
    change.refreshed += [marks.refresh(connection, store, held) for store in change.deferred]
    return change


def discard(connection: sqlite3.Connection, chosen: Selection, limit: int) -> Change:
    """Dead letters are given up; a row without body stays until nobody's account of the record is open."""
    change = Change()
    for key, store, retry_class, size in _select(connection, chosen, limit, "1"):
        if store == DOOR:
            connection.execute("DELETE FROM leftovers WHERE key = ?", (key,))
        else:
            connection.execute("UPDATE leftovers SET state = ?, body = NULL WHERE key = ?", (DISCARDED, key))
            change.discarded[store] += 1
        change.moved += 1
        change.dead[store, retry_class] -= 1
        change.dead_bytes[store] -= size
    for store, n in change.discarded.items():
        progress.add(connection, store, discarded=n)
    return change


def _select(
    connection: sqlite3.Connection, chosen: Selection, limit: int, also: str
) -> list[tuple[int, str, str, int]]:
    where, parameters = chosen.where()
    return connection.execute(
        f"SELECT key, store, retry_class, size FROM leftovers WHERE {where} AND {also} ORDER BY key LIMIT ?",
        (*parameters, limit),
    ).fetchall()


def dead_letters(
    connection: sqlite3.Connection, store: str | None, retry_class: str | None, after: int, limit: int
) -> list[Row]:
    """A page of dead letters in the order of their keys."""
    where, parameters = Selection(None, store, retry_class).where()
    return rows(connection, f"{where} AND key > ? ORDER BY key LIMIT ?", (*parameters, after, limit))


def _corrections(connection: sqlite3.Connection, row: Row, settled: int) -> Counter[Pair]:
    missing = marks.masks_at(connection, row.seq, row.idx).values()
    return divergence.total((row.owed, settled, m) for m in missing)


def insert(connection: sqlite3.Connection, new: Sequence[LeftoverRow]) -> Change:
    """Add dead letters of the door."""
    change = Change(len(new))
    connection.executemany(marks.INSERT_LEFTOVER, new)
    for row in new:
        change.dead[row.store, row.retry_class] += 1
        change.dead_bytes[row.store] += row.size
    return change


def audited(
    connection: sqlite3.Connection,
    change: Callable[[sqlite3.Connection], Change],
    line: tuple[int, str, str, str],
    chosen: Selection,
) -> Change:
    """A change with its line in the audit trail, in one transaction; no line where nothing changed."""
    done = change(connection)
    if done.moved:
        which = f"keys={list(chosen.keys)}" if chosen.keys is not None else "all keys"
        evidence = f"records={done.moved} store={chosen.store} retry_class={chosen.retry_class} {which}"
        marks.audit(connection, (*line, evidence))
    return done

"""Looking at a running spool, in steps that its database thread makes between commits (``Spool.read``).

A step reads a bounded part of the file and says where the next one begins, so that no commit waits long and memory does
not grow with the backlog. What a step says is true for one commit; from step to step the spool moves on. Ask for
``Spool.flush_now()`` first, so that the file knows what is settled. A stopped sidecar's files: ``spool.inspect``.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple
from uuid import UUID
from zlib import crc32

from sidecar.spool import framing, leftovers, progress, schema
from sidecar.spool.divergence import single_bits
from sidecar.spool.framing import HEADER_COLUMNS, UNRESOLVED, Header
from sidecar.spool.inspect import FrameLine, Held
from sidecar.spool.ledger import Account, Ledger, Resolution
from sidecar.spool.types import Fate

_HEADERS: Final = 1_000  # looked at in one step
_BODIES: Final = 1024 * 1024  # bytes of bodies read in one step, about; one frame at least
_LEFT: Final = 32  # leftovers with their bodies in one step: at most 11 MiB
_KEYS: Final = 500  # ids looked up in one query
_ID: Final = 16  # bytes
_STATES: Final[Mapping[int, Fate]] = {
    schema.DEFERRED: "deferred",
    schema.DEAD: "dead_lettered",
    schema.DISCARDED: "discarded",
    schema.QUARANTINED: "quarantined",
}
OPEN: Final = frozenset({"pending", "deferred"})
"""Fates of a record that a store is still owed."""


class Position(NamedTuple):
    """Where a step begins: ``part`` 0 = frames, 1 = deferred records whose frame has left; after which seq or key."""

    part: int = 0
    after: int = 0


START: Final = Position()


def _book(connection: sqlite3.Connection) -> Ledger:
    """Marks, later obligations and names, as the file has them. A row whose checksum fails has settled nothing."""
    accounts = []
    for row in progress.load(connection):
        sound = row if row.sound else progress.fresh(row.bit, row.name)
        accounts.append(Account(row.name, 1 << row.bit, sound.marks, sound.strengthened))
    rows = connection.execute("SELECT lo, hi, phase, owed, required FROM resolutions ORDER BY lo").fetchall()
    return Ledger(accounts, [Resolution(*row) for row in rows], 0)


def _headers(connection: sqlite3.Connection, after: int) -> list[Header]:
    query = f"SELECT {HEADER_COLUMNS} FROM frames WHERE seq > ? ORDER BY seq LIMIT {_HEADERS}"
    return [Header(*values) for values in connection.execute(query, (after,)).fetchall()]


def frames(connection: sqlite3.Connection, after: int, limit: int) -> tuple[list[FrameLine], int | None]:
    """Up to ``limit`` frames behind seq ``after`` that are owed to somebody, damaged ones included; where to go on.

    Looks at 1,000 headers at most, so a page may be short, or empty, and not be the last; None ends it.
    """
    ledger = _book(connection)
    found: list[FrameLine] = []
    headers = _headers(connection, after)
    for stored in headers:
        if len(found) == limit:
            return found, found[-1].seq
        line = _line(ledger, stored)
        if line.owed - line.settled or line.unresolved or not line.sound:
            found.append(line)
    return found, headers[-1].seq if len(headers) == _HEADERS else None


def _line(ledger: Ledger, stored: Header) -> FrameLine:
    nobody: frozenset[str] = frozenset()
    if not stored.sound:
        return FrameLine(stored.seq, -1, 0, 0, 0, 0, 0, nobody, nobody, nobody, unresolved=False, sound=False)
    header = ledger.effective(stored)
    return FrameLine(
        seq=header.seq,
        phase=header.phase,
        records=header.n,
        size=header.size,
        accepted_us=header.accepted_us,
        first_us=header.t0,
        last_us=header.t1,
        owed=ledger.names(header.owed),
        required=ledger.names(header.required),
        settled=ledger.names(ledger.settled(header)),
        unresolved=bool(header.flags & UNRESOLVED),
        sound=True,
    )


def owed(
    connection: sqlite3.Connection, at: Position, log_id: bytes | None = None
) -> tuple[list[Held], Position | None]:
    """The next records that a store is still owed, with the fate at every store; damaged ones are left out.

    ``log_id`` (16 bytes): that record alone. Undecided records (of a fenced instance) come with no stores.
    """
    if at.part == 1:
        return _left(connection, at.after, log_id)
    ledger = _book(connection)
    found: list[Held] = []
    size = 0
    headers = _headers(connection, at.after)
    for stored in headers:
        if not stored.sound or (log_id is not None and framing.find(stored, log_id) is None):
            continue
        if size > _BODIES:
            return found, Position(0, stored.seq - 1)
        held, read = _of_frame(connection, ledger, stored, log_id)
        found += held
        size += read
    return found, Position(0, headers[-1].seq) if len(headers) == _HEADERS else Position(1, 0)


def _of_frame(
    connection: sqlite3.Connection, ledger: Ledger, stored: Header, log_id: bytes | None
) -> tuple[list[Held], int]:
    """Its open records, and how many bytes were read."""
    header = ledger.effective(stored)
    undecided = bool(header.flags & UNRESOLVED)
    settled = ledger.settled(header)
    whole: dict[str, Fate] = {
        ledger.by_mask[bit].name: "delivered" if settled & bit else "pending"
        for bit in (() if undecided else single_bits(header.owed))
    }
    left = _left_of(connection, header.seq) if settled else {}
    if not undecided and settled == header.owed and not left:
        return [], 0  # waits to be trimmed
    (body,) = connection.execute("SELECT body FROM frames WHERE seq = ?", (header.seq,)).fetchone()
    unpacked = framing.unpack(stored, body or b"")
    wanted = None if log_id is None else framing.find(stored, log_id)
    found = []
    for index, record in zip(unpacked.indexes, unpacked.records, strict=True):
        stores = whole | left.get(index, {})
        if wanted in (None, index) and (undecided or OPEN.intersection(stores.values())):
            found.append(Held(record, header.seq, header.accepted_us, header.phase, stores))
    return found, header.size


def _left_of(connection: sqlite3.Connection, seq: int) -> dict[int, dict[str, Fate]]:
    found: dict[int, dict[str, Fate]] = {}
    rows = connection.execute("SELECT idx, store, state FROM leftovers WHERE seq = ?", (seq,)).fetchall()
    for index, store, state in rows:
        found.setdefault(index, {})[store] = _STATES[state]
    return found


def _left(connection: sqlite3.Connection, after: int, log_id: bytes | None) -> tuple[list[Held], Position | None]:
    where = "state = 1 AND key > ? AND NOT EXISTS (SELECT 1 FROM frames WHERE frames.seq = leftovers.seq)"
    parameters: tuple[object, ...] = (after,)
    if log_id is not None:
        where, parameters = f"{where} AND log_id = ?", (after, log_id)
    rows = leftovers.rows(connection, f"{where} ORDER BY key LIMIT {_LEFT}", parameters)
    found = [
        Held(record, row.seq, row.accepted_us, row.phase, {row.store: "deferred"})
        for row in rows
        if (record := row.record) is not None
    ]
    return found, Position(1, rows[-1].key) if len(rows) == _LEFT else None


@dataclass(slots=True)
class Checked:
    """What a walk over every checksum found."""

    frames: int = 0
    records: int = 0
    leftovers: int = 0
    damaged_frames: int = 0
    damaged_records: int = 0

    @property
    def problems(self) -> list[str]:
        """One line each; empty where all is sound."""
        found = ((self.damaged_frames, "frames with a damaged header"), (self.damaged_records, "damaged records"))
        return [f"{n} {what}" for n, what in found if n]


def check(connection: sqlite3.Connection, at: Position) -> tuple[Checked, Position | None]:
    """Every checksum of the next frames and leftovers."""
    found = Checked()
    if at.part == 1:
        rows = leftovers.rows(connection, f"state IN (1, 2) AND key > ? ORDER BY key LIMIT {_LEFT}", (at.after,))
        found.leftovers = len(rows)
        found.damaged_records = sum(row.body is None or crc32(row.body) != row.crc for row in rows)
        return found, Position(1, rows[-1].key) if len(rows) == _LEFT else None
    size = 0
    headers = _headers(connection, at.after)
    for header in headers:
        if size > _BODIES:
            return found, Position(0, header.seq - 1)
        found.frames += 1
        if not header.sound:
            found.damaged_frames += 1
            continue
        found.records += header.n
        size += header.size
        (body,) = connection.execute("SELECT body FROM frames WHERE seq = ?", (header.seq,)).fetchone()
        found.damaged_records += len(framing.unpack(header, body or b"").damaged)
    return found, Position(0, headers[-1].seq) if len(headers) == _HEADERS else Position(1, 0)


def letter_keys(connection: sqlite3.Connection, log_ids: Sequence[str], store: str | None) -> list[int]:
    """The keys of the dead letters with these log_ids (canonical texts), at one store or at any, in order."""
    keys: list[int] = []
    for start in range(0, len(log_ids), _KEYS):
        part: list[object] = [bytes.fromhex(log_id.replace("-", "")) for log_id in log_ids[start : start + _KEYS]]
        query = f"SELECT key FROM leftovers WHERE state = 2 AND log_id IN ({', '.join('?' * len(part))})"
        if store is not None:
            query += " AND store = ?"
            part.append(store)
        keys += [key for (key,) in connection.execute(query, part).fetchall()]
    return sorted(keys)


class Sought(NamedTuple):
    """What one store has of one sought record, as a frame or a leftover says; ``retry_class`` of a leftover."""

    log_id: bytes
    store: str
    fate: Fate
    retry_class: str = ""


def sought(
    connection: sqlite3.Connection, at: Position, log_ids: frozenset[bytes]
) -> tuple[list[Sought], Position | None]:
    """Fates of those of ``log_ids`` (16 bytes each) that frames still owed to somebody, or leftovers, know of.

    What a leftover says of a record and store is newer than what its frame says: take the last one. Undecided records
    are pending at every store. A record that has left is not found: nothing is said of it.
    """
    if at.part == 1:
        return _sought_leftovers(connection, sorted(log_ids)), None
    ledger = _book(connection)
    found: list[Sought] = []
    headers = _headers(connection, at.after)
    for stored in headers:
        if not stored.sound:
            continue
        header = ledger.effective(stored)
        undecided = bool(header.flags & UNRESOLVED)
        pending = frozenset(ledger.accounts) if undecided else ledger.names(header.owed & ~ledger.settled(header))
        if pending:
            ids = {header.ids[i : i + _ID] for i in range(0, _ID * header.n, _ID)}
            found += [Sought(log_id, store, "pending") for log_id in ids & log_ids for store in pending]
    return found, Position(0, headers[-1].seq) if len(headers) == _HEADERS else Position(1, 0)


def _sought_leftovers(connection: sqlite3.Connection, log_ids: Sequence[bytes]) -> list[Sought]:
    found: list[Sought] = []
    for start in range(0, len(log_ids), _KEYS):
        part = log_ids[start : start + _KEYS]
        query = (
            f"SELECT log_id, store, state, retry_class FROM leftovers WHERE log_id IN ({', '.join('?' * len(part))})"
        )
        rows = connection.execute(f"{query} ORDER BY key", part).fetchall()
        found += [Sought(log_id, store, _STATES[state], kind) for log_id, store, state, kind in rows]
    return found


class Refused(NamedTuple):
    """A dead or discarded record: identity and class, no body."""

    log_id: str
    store: str
    fate: Fate
    retry_class: str


def refused(connection: sqlite3.Connection, after: int) -> tuple[list[Refused], int | None]:
    """The next dead and discarded records behind a key; where to go on. Those refused at the door have no id."""
    query = (
        "SELECT key, log_id, store, state, retry_class FROM leftovers"
        f" WHERE state IN (?, ?) AND key > ? AND log_id IS NOT NULL ORDER BY key LIMIT {_HEADERS}"
    )
    rows = connection.execute(query, (schema.DEAD, schema.DISCARDED, after)).fetchall()
    found = [Refused(str(UUID(bytes=log_id)), store, _STATES[state], kind) for _, log_id, store, state, kind in rows]
    return found, rows[-1][0] if len(rows) == _HEADERS else None

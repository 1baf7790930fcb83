"""From a directory to a spool that may be used: lock, look, repair, count. Blocking; before any thread starts."""

import contextlib
import sqlite3
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.clock import Clock
from sidecar.errors import SpoolFailed, SpoolLocked
from sidecar.settings import Dedup
from sidecar.settings import Spool as SpoolSettings
from sidecar.spool import disk, divergence, marks, progress, recovery, schema
from sidecar.spool.ledger import Account, Ledger, Resolution
from sidecar.spool.recount import recount
from sidecar.spool.types import RecoveryReport, Seen
from sidecar.spool.window import SeenRows

Connect = recovery.Connect
_CORRUPT: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR})
_LOCKED: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


def connect(path: str) -> sqlite3.Connection:
    """A connection without implicit transactions that gives up on a lock at once."""
    return sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False, cached_statements=256)


@dataclass(slots=True)
class Loaded:
    """What is in the database."""

    connection: sqlite3.Connection
    ledger: Ledger
    door: Account
    oldest_us: dict[str, int | None]
    seen: SeenRows
    window: Sequence[Seen]
    meta: dict[str, str]


@dataclass(slots=True)
class Opened:
    """All that the spool starts from."""

    lock: disk.Lock
    position: disk.Position
    ballast: disk.Ballast
    loaded: Loaded
    report: RecoveryReport

    def close(self) -> None:
        """Let go of all of it: the start has failed after all."""
        self.loaded.connection.close()
        self.position.close()
        self.lock.release()


class _Missing(Exception):
    """Records are missing from a file that looks sound."""


_DAMAGE: Final = (sqlite3.Error, _Missing, KeyError, TypeError, ValueError, struct.error)
"""What damaged values lead to when a file is read: a NULL or a text where a number was, an unknown name."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the spool was asked to be."""

    directory: Path
    settings: SpoolSettings
    dedup: Dedup
    stores: Sequence[str]
    clock: Clock
    connector: Connect


def open_directory(
    directory: Path,
    settings: SpoolSettings,
    dedup: Dedup,
    stores: Sequence[str],
    clock: Clock,
    *,
    connector: Connect = connect,
) -> Opened:
    """Open, repairing what can be repaired.

    Raises:
        SpoolLocked: another process has it (at once).
        SpoolRefused: volatile file system, newer schema, somebody else's file, no permission.
        SpoolFailed: the disk answers with errors.
    """
    disk.prepare(directory)
    disk.require_durable(directory, allow_volatile=settings.allow_volatile)
    with contextlib.ExitStack() as undo, translated(directory):
        lock = disk.Lock(directory)
        undo.callback(lock.release)
        plan = _Plan(directory, settings, dedup, stores, clock, connector)
        opened = _open_locked(plan, lock, undo)
        undo.pop_all()
    return opened


@contextlib.contextmanager
def translated(directory: Path) -> Iterator[None]:
    """What goes wrong with the disk while a spool is opened, in one line.

    Raises:
        SpoolLocked: another process has the file.
        SpoolFailed: every other error of SQLite or of the operating system.
    """
    try:
        yield
    except sqlite3.Error as exc:
        if schema.code(exc) in _LOCKED:
            raise SpoolLocked(f"spool.directory: {directory} is in use by another process; stop it") from exc
        raise SpoolFailed(f"spool.directory: {directory}: {exc}; look at the volume") from exc
    except OSError as exc:
        raise SpoolFailed(f"spool.directory: {directory}: {exc.strerror}; look at the volume") from exc


def _open_locked(plan: _Plan, lock: disk.Lock, undo: contextlib.ExitStack) -> Opened:
    directory, settings, clock = plan.directory, plan.settings, plan.clock
    last = disk.Position.read(directory)
    quarantine = recovery.Quarantine(directory, clock)
    found = recovery.before_open(directory, last, quarantine, used=lock.used)
    position = disk.Position(directory)
    undo.callback(position.close)
    if not found.unclean:
        position.name(last.names if last else ())
        position.write(disk.OPENING, last.seq if last else 0, dict(enumerate(last.accepted if last else ())))
        position.sync()
    disk.keep_log(directory)
    disk.sync_directory(directory)
    loaded, found = _open_database(plan, last, found, quarantine)
    undo.callback(loaded.connection.close)
    recovery.done(loaded.connection, directory, found, quarantine)
    disk.keep_log(directory)
    ballast = disk.Ballast(directory, settings.ballast_bytes)
    ballast.make()
    disk.sync_directory(directory)
    accounts = loaded.ledger.accounts.values()
    position.name([a.name for a in accounts])
    position.write(disk.RUNNING, loaded.ledger.last_seq, {a.bit: a.owed for a in accounts})
    position.sync()
    lock.use()
    return Opened(lock, position, ballast, loaded, found.report())


def _open_database(
    plan: _Plan, last: disk.Mark | None, found: recovery.Findings, quarantine: recovery.Quarantine
) -> tuple[Loaded, recovery.Findings]:
    """Open the file; where it is damaged, or records are missing without a reason, rebuild it and open that."""
    path = plan.directory / disk.DATABASE
    if not (found.repair and path.exists()):
        trial = found.copy()
        disk.create_private(path)
        try:
            return _load(plan, last, trial, quarantine, final=False), trial
        except _DAMAGE as exc:
            if isinstance(exc, sqlite3.Error) and schema.code(exc) not in _CORRUPT:
                raise
    recovery.rebuild(plan.directory, found, plan.connector)
    recovery.exchange(plan.directory, quarantine)
    found.messages.append(f"spool: the damaged files are kept in {quarantine.path.name}")
    return _load(plan, last, found, quarantine, final=True), found


def _load(
    plan: _Plan,
    last: disk.Mark | None,
    found: recovery.Findings,
    quarantine: recovery.Quarantine,
    *,
    final: bool,
) -> Loaded:
    """Count everything, in one transaction that also sweeps and balances.

    Raises:
        sqlite3.Error: also where the schema itself is damaged.
        _Missing: records are missing and nothing explains it; not where ``final``.
    """
    connection = plan.connector(str(plan.directory / disk.DATABASE))
    with contextlib.ExitStack() as undo:
        undo.callback(connection.close)
        schema.configure(connection, plan.settings)
        schema.create_or_check(connection)
        connection.execute("BEGIN IMMEDIATE")
        recovery.compare(connection, last, found, quarantine)
        ledger = _ledger(connection, plan.stores, last, found)
        scan = recount(connection, ledger)
        recovery.set_aside_frames(connection, ledger, scan.unsound, found, quarantine)
        for lo, hi in scan.settled:
            connection.execute("DELETE FROM frames WHERE seq BETWEEN ? AND ?", (lo, hi))
        _close_accounts(connection, ledger)
        door = Account(schema.DOOR, 0)
        _leftovers(connection, ledger, door, plan.clock)
        _balance(connection, ledger, last, found)
        if found.quarantined and not found.wal_damage and not final:
            raise _Missing
        seen = SeenRows(plan.dedup, plan.clock)
        window = seen.load(connection)
        meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        connection.execute("COMMIT")
        undo.pop_all()
    return Loaded(connection, ledger, door, scan.oldest_us, seen, window, meta)


def _ledger(
    connection: sqlite3.Connection, stores: Sequence[str], last: disk.Mark | None, found: recovery.Findings
) -> Ledger:
    rows = {row.bit: row for row in progress.load(connection)}
    for bit, name in enumerate(last.names if last else ()):  # a row that got lost keeps its bit
        if bit not in rows:
            rows[bit] = progress.fresh(bit, name)
    known = {row.name for row in rows.values()}
    for name in stores:
        if name not in known:
            bit = max(rows, default=-1) + 1
            rows[bit] = progress.fresh(bit, name)
    for bit, row in list(rows.items()):
        if not row.sound:
            name = last.names[bit] if last and bit < len(last.names) else row.name
            rows[bit] = progress.fresh(bit, name)
            found.lower_bound = True
            found.messages.append(
                f"spool: the account of {name} is damaged; whatever is in the file is handed to it again"
            )
    progress.store(connection, list(rows.values()))
    accounts = [
        Account(
            row.name,
            1 << bit,
            row.marks,
            row.strengthened,
            row.accepted_seq,
            owed=row.accepted,
            delivered=row.delivered,
            released=row.released,
            discarded=row.discarded,
            quarantined=row.quarantined,
        )
        for bit, row in sorted(rows.items())
    ]
    resolutions = [
        Resolution(*r)
        for r in connection.execute("SELECT lo, hi, phase, owed, required FROM resolutions ORDER BY lo").fetchall()
    ]
    ledger = Ledger(accounts, resolutions, max(recovery.recovered_seq(connection), last.seq if last else 0))
    names = {a.name: a.mask for a in accounts}
    for present, missing, records in connection.execute("SELECT * FROM differences").fetchall():
        if present in names and missing in names:
            ledger.corrections[names[present], names[missing]] += records
    return ledger


def _close_accounts(connection: sqlite3.Connection, ledger: Ledger) -> None:
    """Marks of discarded and quarantined records whose frame is gone move to ``differences``, where nothing is open.

    Resolutions of frames that are gone go too.
    """
    connection.execute(
        "DELETE FROM resolutions WHERE NOT EXISTS (SELECT 1 FROM frames WHERE seq BETWEEN lo AND hi AND flags)"
    )
    closed = connection.execute(
        "SELECT seq, idx, max(owed), sum(1 << bit) FROM leftovers JOIN progress ON name = store"
        " WHERE seq NOT IN (SELECT seq FROM frames) GROUP BY seq, idx HAVING min(state) >= ?",
        (schema.DISCARDED,),
    ).fetchall()
    moved = divergence.total((owed, owed, missing) for _, _, owed, missing in closed)
    ledger.corrections.update(moved)
    marks.add_differences(connection, [(a.bit_length() - 1, b.bit_length() - 1, n) for (a, b), n in moved.items()])
    connection.executemany("DELETE FROM leftovers WHERE seq = ? AND idx = ?", [(seq, idx) for seq, idx, *_ in closed])


def _leftovers(connection: sqlite3.Connection, ledger: Ledger, door: Account, clock: Clock) -> None:
    """Count deferred and dead records; all deferred ones are due now: wall-clock times did not survive (P11)."""
    now_us = clock.now_us()
    connection.execute(
        "UPDATE leftovers SET due_us = ? WHERE state = ? AND due_us > ?", (now_us, schema.DEFERRED, now_us)
    )
    for store, state, retry_class, n, size, oldest in connection.execute(
        "SELECT store, state, retry_class, count(*), sum(size), min(accepted_us) FROM leftovers GROUP BY 1, 2, 3"
    ).fetchall():
        account = door if store == schema.DOOR else ledger.accounts.get(store)
        if account is None:
            continue  # a name that damage invented: the row stays, the store it was meant for shows in the balance
        if state == schema.DEFERRED:
            account.deferred += n
            account.deferred_bytes += size
            account.deferred_oldest_us = min(oldest, account.deferred_oldest_us or oldest)
            account.next_due_us = now_us
        elif state == schema.DEAD:
            account.dead[retry_class] += n
            account.dead_bytes += size
    for seq, owed, missing in _missing(connection):
        ledger.excepted.add(seq)
        settled = sum(b for b in divergence.single_bits(owed) if ledger.by_mask[b].marks.covers(seq))
        for pair, change in divergence.corrections(owed, settled, missing):
            ledger.corrections[pair] += change


def _missing(connection: sqlite3.Connection) -> Iterator[tuple[int, int, int]]:
    """Per record with leftovers: seq, owed, the mask of stores that miss it."""
    yield from connection.execute(
        "SELECT seq, max(owed), sum(1 << bit) FROM leftovers JOIN progress ON name = store"
        " GROUP BY seq, idx ORDER BY seq"
    ).fetchall()


def _balance(connection: sqlite3.Connection, ledger: Ledger, last: disk.Mark | None, found: recovery.Findings) -> None:
    """Compare the durable counters with what is there; what cannot be accounted for becomes ``quarantined`` (P4)."""
    worst = 0
    rows = {row.bit: row for row in progress.load(connection)}
    for account in ledger.accounts.values():
        expected = last.accepted[account.bit] if last and account.bit < len(last.accepted) else 0
        gone = max(0, expected - account.owed)  # acknowledged, and not even counted: the log was cut short
        account.owed += gone
        here = account.counters(None)
        rest = here.delivered + here.pending + here.dead_lettered + here.released + here.discarded
        lost = account.owed - rest - here.quarantined
        if lost < 0:
            account.owed -= lost
            if not found.salvaged:  # frames that come back from damaged files were counted as gone
                found.messages.append(f"spool: {account.name} has {-lost} records more than were counted; corrected")
            lost = 0
        account.quarantined += lost
        worst = max(worst, lost)
        rows[account.bit] = rows[account.bit]._replace(
            accepted=account.owed, accepted_seq=ledger.last_seq, quarantined=account.quarantined
        )
        account.written = (account.owed, account.delivered, account.released, account.quarantined)
        account.dirty = False
    progress.store(connection, [row.sealed() for row in rows.values()])
    if worst:
        found.quarantined += worst
        found.messages.append(
            f"spool: {worst} accepted records cannot be found any more; they are counted as quarantined"
            " (some may have been delivered): compare the stores over the last hours (validate-consistency)"
        )
    for name, value in (("quarantined_records", found.quarantined), ("wal_damage", found.wal_damage)):
        if value:
            connection.execute(
                "INSERT INTO meta VALUES(?, ?) ON CONFLICT(key) DO UPDATE SET value = value + excluded.value",
                (name, value),
            )

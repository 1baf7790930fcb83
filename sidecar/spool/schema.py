"""The spool's file: format, invariants, and what happens when something fails at each stage.

FORMAT (SQLite, one row per frame; ``framing`` has the bytes inside a row)::

    frames(seq, phase, owed, required, flags, n, bytes, accepted_us, t0, t1, crc, ids, body)
        the records of one commit with one obligation; small columns first, so that scans skip the body's pages
    progress(bit, name, upto, ahead, accepted, accepted_seq, delivered, released, discarded, quarantined,
             strengthened, crc)
        one row per store; ``bit`` is its place in the masks ``owed`` and ``required``
    resolutions(lo, hi, phase, owed, required)
        what frames with the flag "unresolved" in lo..hi are owed, decided once
    leftovers(key, store, state, seq, idx, ...)
        records that a store did not take with their frame: deferred, dead letters (with their own copy of the body),
        and marks of discarded and quarantined ones, kept while another store's account of the record is open
    differences(present_in, missing_from, records)
        closed part of the divergence: records released or discarded for one store, delivered to the other
    seen(line, at_us, n, body)      the dedup window: one row per commit, n pairs of 16-byte id and 16-byte digest
    meta(key, value), audit(key, at_us, who, what, why, evidence)

INVARIANTS

1. ``append`` answers after COMMIT returned, with synchronous=FULL: the write-ahead log is fsynced.
2. A frame is settled for a store when seq <= upto or seq is in ``ahead`` (intervals). What the store did not take is
   copied to ``leftovers`` in the transaction that settles the frame; a frame is deleted in a transaction whose marks
   say that it is settled for every owed store, never before.
3. seq only grows: next = 1 + max(frames, upto, ahead, accepted_seq, meta "written", position). (SQLite restarts
   rowids at 1 on an empty table; new frames would look settled.)
4. accepted = delivered + pending + dead + released + discarded + quarantined per store. ``accepted`` counts frames
   up to ``accepted_seq``; later frames are counted when the file is opened. Counters change by differences, in the
   transaction of the change. A row of ``progress`` whose checksum fails is not believed.
5. Obligations are never weakened: ``strengthened`` is the last seq whose best-effort obligations became required.
6. One process (flock on ``lock`` and SQLite's exclusive lock), one connection, one thread.

FAILURE AT EACH STAGE

* Killed before COMMIT returned: nobody was answered; SQLite drops the part. Killed after: the frame is there.
* Killed between settling in memory and the mark: the frame is handed out again; stores are idempotent.
* No space: the transaction is rolled back, appends get Busy; marks and leftovers are tried again alone in the reserve
  (``max_page_count`` is raised for them, the ballast file is unlinked when the disk itself is full).
* Any other error of SQLite, a failed fsync among them: the thread stops, all who wait and all later calls get
  SpoolFailed, nothing is tried again, the connection is not even closed (closing would checkpoint).
* A start that fails, a process that ends after an error: SQLite closes, copies the log into the file and deletes it.
  ``spool.db-wal.kept`` is a second name of the log, from the start to a stop in order: the next start gives it the
  first one back, so that a log which is missing is always one that was lost.
* Killed in the middle of a repair: what stood behind a damage in the log is overwritten by the commit that takes it
  over. ``spool.db-wal.found`` is the log as it was found, until that commit is durable; the next start reads it.
* Damage found while running that needs a repair leaves the file ``repair`` behind; the next start salvages.
* Unclean stop: ``position`` says so. The write-ahead log is walked before SQLite opens it (``wal``); SQLite drops
  everything after a damaged frame without a word. Damaged files are kept in ``quarantine-<time>/``, never deleted.

Files beside ``spool.db``: ``spool.db-wal`` (and the two above), ``lock``, ``position`` (state and last acknowledged
commit, written after each commit without fsync: it survives a kill and betrays a log that was cut short), ``ballast``,
``repair``.
Deleted payloads stay in free pages until they are overwritten (secure_delete is off): protect the volume.
"""

import sqlite3
from typing import Final

from sidecar.errors import SpoolRefused
from sidecar.settings import Spool as SpoolSettings

APPLICATION_ID: Final = 0x484C5350  # "HLSP"
VERSION: Final = 1
PAGE: Final = 4096
RESERVE_BYTES: Final = 4 * 1024 * 1024  # above the cap, for marks and leftovers only
WAL_SIZE_LIMIT: Final = 16 * 1024 * 1024

DEFERRED: Final = 1  # leftovers.state
DEAD: Final = 2
DISCARDED: Final = 3
QUARANTINED: Final = 4
DOOR: Final = "door"  # leftovers.store of records refused at the door

_TABLES: Final = """
CREATE TABLE frames(
    seq INTEGER PRIMARY KEY, phase INTEGER, owed INTEGER, required INTEGER, flags INTEGER, n INTEGER, bytes INTEGER,
    accepted_us INTEGER, t0 INTEGER, t1 INTEGER, crc INTEGER, ids BLOB, body BLOB);
CREATE TABLE progress(
    bit INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, upto INTEGER, ahead BLOB, accepted INTEGER,
    accepted_seq INTEGER, delivered INTEGER, released INTEGER, discarded INTEGER, quarantined INTEGER,
    strengthened INTEGER, crc INTEGER);
CREATE TABLE resolutions(lo INTEGER PRIMARY KEY, hi INTEGER, phase INTEGER, owed INTEGER, required INTEGER);
CREATE TABLE leftovers(
    key INTEGER PRIMARY KEY AUTOINCREMENT, store TEXT, state INTEGER, seq INTEGER, idx INTEGER, log_id BLOB,
    phase INTEGER, owed INTEGER, required INTEGER, accepted_us INTEGER, first_us INTEGER, last_us INTEGER,
    due_us INTEGER, attempts INTEGER, retry_class TEXT, reason TEXT, code TEXT, size INTEGER, crc INTEGER, body BLOB);
CREATE INDEX leftovers_at ON leftovers(seq, idx);
CREATE INDEX leftovers_id ON leftovers(log_id);
CREATE INDEX leftovers_due ON leftovers(store, due_us) WHERE state = 1;
CREATE INDEX leftovers_age ON leftovers(store, accepted_us) WHERE state = 1;
CREATE INDEX leftovers_dead ON leftovers(store, key) WHERE state = 2;
CREATE TABLE differences(present_in TEXT, missing_from TEXT, records INTEGER, UNIQUE(present_in, missing_from));
CREATE TABLE seen(line INTEGER PRIMARY KEY AUTOINCREMENT, at_us INTEGER, n INTEGER, body BLOB);
CREATE TABLE meta(key TEXT UNIQUE, value TEXT);
CREATE TABLE audit(
    key INTEGER PRIMARY KEY AUTOINCREMENT, at_us INTEGER, who TEXT, what TEXT, why TEXT, evidence TEXT);
"""


def configure(connection: sqlite3.Connection, settings: SpoolSettings) -> None:
    """Set every pragma, in the one order that works, and read each back.

    auto_vacuum after WAL is silently ignored; max_page_count is forgotten by the file; Debian's build has
    secure_delete on; autocheckpoint would run inside COMMIT, before the answer.

    Raises:
        SpoolRefused: SQLite did not take a pragma that the promise rests on.
        sqlite3.OperationalError: the file is locked by another process.
    """
    wanted: tuple[tuple[str, object, object], ...] = (
        ("page_size", PAGE, PAGE),
        ("locking_mode", "EXCLUSIVE", "exclusive"),
        ("auto_vacuum", "INCREMENTAL", 2),
        ("journal_mode", "WAL", "wal"),
        ("synchronous", "FULL", 2),
        ("secure_delete", "OFF", 0),
        ("wal_autocheckpoint", 0, 0),
        ("journal_size_limit", WAL_SIZE_LIMIT, WAL_SIZE_LIMIT),
        ("max_page_count", settings.cap_bytes // PAGE, None),
        ("temp_store", "MEMORY", 2),
    )
    for name, value, _ in wanted:
        connection.execute(f"PRAGMA {name} = {value}").fetchall()
    for name, _, expected in wanted:
        (seen,) = connection.execute(f"PRAGMA {name}").fetchone()
        if expected is not None and seen != expected:
            raise SpoolRefused(
                f"spool.directory: SQLite keeps {name}={seen!r} where {expected!r} is needed;"
                " the file was made by something else: move it aside"
            )


def configure_throwaway(connection: sqlite3.Connection) -> None:
    """For a file that is filled, flushed and only then put in its place: no journal, nothing flushed on the way."""
    for pragma in (
        f"page_size = {PAGE}",
        "auto_vacuum = INCREMENTAL",
        "journal_mode = OFF",
        "synchronous = OFF",
        "secure_delete = OFF",
    ):
        connection.execute(f"PRAGMA {pragma}").fetchall()


def create_or_check(connection: sqlite3.Connection) -> None:
    """Create the tables in an empty file; refuse a file of somebody else's or of a newer sidecar.

    Raises:
        SpoolRefused: with one clear line.
    """
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application == 0 and version == 0 and tables == 0:
        connection.execute("BEGIN IMMEDIATE")
        for statement in _TABLES.split(";\n"):
            if statement.strip():
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")
        return
    if application != APPLICATION_ID:
        raise SpoolRefused(
            f"spool.directory: spool.db has application_id {application:#x}, not a spool's {APPLICATION_ID:#x};"
            " point spool.directory elsewhere or move the file aside"
        )
    if version != VERSION:
        raise SpoolRefused(
            f"spool.directory: spool.db has schema version {version}, this sidecar knows {VERSION};"
            " start the sidecar that wrote it, or drain it first"
        )


def code(exc: sqlite3.Error) -> int:
    """The primary result code of an error; -1 where the driver gives none (a misuse of it)."""
    found = getattr(exc, "sqlite_errorcode", None)
    return -1 if found is None else found & 0xFF

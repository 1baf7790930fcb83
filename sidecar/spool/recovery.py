"""What is looked at before SQLite opens the file, and what is made of damage (P9). Nothing is ever deleted.

After an unclean stop the write-ahead log is walked first, because SQLite drops everything after a damaged frame
without a word. ``position`` tells how far acknowledgements went at least, so that a log which was cut short, or is
gone, is noticed too.
"""

import contextlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from sidecar.clock import Clock
from sidecar.errors import SpoolRefused
from sidecar.record import encode
from sidecar.spool import disk, framing, progress, salvage, schema, wal
from sidecar.spool.ledger import Ledger
from sidecar.spool.types import RecoveryReport

Connect = Callable[[str], sqlite3.Connection]


@dataclass(slots=True)
class Findings:
    """What recovery has found so far."""

    unclean: bool = False
    quarantined: int = 0
    wal_damage: int = 0
    salvaged: int = 0
    lower_bound: bool = False
    messages: list[str] = field(default_factory=list)
    repair: bool = False  # salvage the file, whatever SQLite says of it
    log: wal.Walk | None = None
    behind: salvage.Haul | None = None  # what stands behind a failure of the log

    def copy(self) -> Self:
        """A copy for an attempt that may fail."""
        return replace(self, messages=list(self.messages))

    def report(self) -> RecoveryReport:
        """The frozen form."""
        return RecoveryReport(
            self.unclean,
            self.quarantined,
            self.wal_damage,
            self.salvaged,
            self.lower_bound,
            tuple(self.messages),
        )


class Quarantine:
    """The directory of this start's damaged files, made when the first one comes."""

    def __init__(self, directory: Path, clock: Clock) -> None:
        self.directory = directory
        stamp = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=clock.now_us())
        self._name = f"quarantine-{stamp:%Y%m%dT%H%M%S.%fZ}"

    @property
    def path(self) -> Path:
        """The directory; made and made durable at the first call."""
        path = self.directory / self._name
        if not path.exists():
            path.mkdir(mode=0o700)
            disk.sync_directory(self.directory)
        return path

    def keep(self, name: str, data: bytes) -> None:
        """Keep bytes under a name."""
        disk.replace(self.path / name, data)

    def move(self, name: str, to: str = "") -> None:
        """Put a file aside, if it is there, under its own name or another."""
        if (self.directory / name).exists():
            (self.directory / name).rename(self.path / (to or name))
            disk.sync_directory(self.path)
            disk.sync_directory(self.directory)


def before_open(directory: Path, last: disk.Mark | None, quarantine: Quarantine, *, used: bool) -> Findings:
    """Look at the files before SQLite does; what SQLite would drop is taken into memory, the log is copied aside.

    ``used`` says that a spool was opened here before.
    """
    found = Findings()
    database, log, as_found = (directory / name for name in (disk.DATABASE, disk.WAL, disk.FOUND))
    if last is not None and last.state == disk.CLEAN:
        # All of it is in the file. A second name that is still there is of an earlier log: this stop was cut off behind
        # its mark, or was that of a version that knows no second names, and went on without it.
        (directory / disk.KEPT).unlink(missing_ok=True)
    else:
        disk.restore_log(directory)
    there = _has_bytes(database)
    if last is None and (there or used or _has_bytes(directory / "position")):
        # It is on the disk before the database is; without it a log that was cut short looks whole.
        found.lower_bound = True
        gone = "position is missing or damaged" if there else f"position and {disk.DATABASE} are missing or damaged"
        found.messages.append(
            f"spool: {gone}, though a spool was here; what may be missing cannot be counted:"
            " compare the stores over the last hours (validate-consistency)"
        )
    if last is None and not there and not log.exists() and not (directory / disk.REBUILT).exists():
        return found  # a new spool
    found.unclean = last is None or last.state != disk.CLEAN
    if exchange(directory, quarantine):
        found.messages.append("spool: a repair that was cut off is finished; see the quarantine directories")
        return found
    if (directory / disk.REPAIR).exists():
        found.repair = True
        quarantine.move(disk.REPAIR)
    if there and not found.repair:
        found.repair = not _is_ours(database, last)
    if log.exists() or as_found.exists():
        _judge(found, as_found if as_found.exists() else log, database, there=there)
    elif there and (last is None or last.state == disk.RUNNING):
        found.wal_damage = 1
        found.repair = True  # pages may have been copied in part
        found.lower_bound = True
        found.messages.append(
            f"spool: {disk.WAL} is missing after an unclean stop; commits since the last checkpoint are gone"
        )
    if not there and last is not None and last.seq:
        found.lower_bound = True
        found.messages.append(f"spool: {disk.DATABASE} is missing or empty, though records were accepted before")
    return found


def _has_bytes(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _is_ours(database: Path, last: disk.Mark | None) -> bool:
    """True for a spool of this version, False for a damaged one of ours; before anything is touched.

    Raises:
        SpoolRefused: a newer sidecar's, or somebody else's.
    """
    with database.open("rb") as file:
        header = file.read(100)
    magic, application, version = (
        header[:16],
        int.from_bytes(header[68:72], "big"),
        int.from_bytes(header[60:64], "big"),
    )
    ours = application == schema.APPLICATION_ID
    unborn = application == version == 0 and database.stat().st_size <= schema.PAGE  # killed while it was created
    shape = header[16:18] == b"\x10\x00" and header[18:20] in (b"\1\1", b"\2\2") and header[20:24] == b"\0@  "
    if magic == b"SQLite format 3\0" and (ours or unborn) and (shape or last is None):
        if version > schema.VERSION:
            raise SpoolRefused(
                f"spool.directory: {database} has schema version {version}, this sidecar knows {schema.VERSION};"
                f" start the newer sidecar, or drain the spool with it (if the file is damaged: touch {disk.REPAIR})"
            )
        return True
    if last is None:
        raise SpoolRefused(
            f"spool.directory: {database} is not a spool (application_id {application:#x});"
            " point spool.directory elsewhere or move the file aside"
        )
    return False  # position says that it was one


def _judge(found: Findings, path: Path, database: Path, *, there: bool) -> None:
    """Walk the log. Where commits stand behind a failure they are salvaged, and the log is kept as it was found.

    For what is committed next overwrites them: a start that does not live to commit what it salvaged leaves it to the
    next one.
    """
    log = found.log = wal.walk(path.read_bytes())
    if log.frames and not there:
        disk.create_private(database)
        found.repair = True  # SQLite deletes a log whose file is empty
    if log.transactions_lost and there:
        found.behind = salvage.from_log(log, database)
        if path.name != disk.FOUND:
            disk.replace(path.with_name(disk.FOUND), log.data)
    if log.damaged:
        found.wal_damage = max(1, log.bad_frames)
        found.messages.append(
            f"spool: {disk.WAL} is damaged: {log.transactions_lost} commits stand behind the first bad frame"
        )


def compare(connection: sqlite3.Connection, last: disk.Mark | None, found: Findings, quarantine: Quarantine) -> None:
    """Compare what SQLite recovered with what was acknowledged, and take over what stands behind a failure.

    A torn last transaction counts as damage only where an acknowledgement is missing: kills leave them too. In the
    current transaction.
    """
    reached = recovered_seq(connection)
    short = last is not None and last.state == disk.RUNNING and last.seq > reached
    if short and not found.wal_damage:
        found.wal_damage = 1
        found.messages.append(f"spool: the file ends at commit {reached}; later ones were acknowledged")
    if not found.wal_damage:
        return
    found.lower_bound = True
    if found.log is not None:
        if not (quarantine.directory / disk.FOUND).exists():
            quarantine.keep(disk.WAL, found.log.data)
        found.messages.append(f"spool: {disk.WAL} as it was found is kept in {quarantine.path.name}")
    if found.behind is not None:
        _take_over(connection, found.behind, reached, found)


def recovered_seq(connection: sqlite3.Connection) -> int:
    """The highest number that the file knows of."""
    (newest,) = connection.execute("SELECT coalesce(max(seq), 0) FROM frames").fetchone()
    written = connection.execute("SELECT value FROM meta WHERE key = 'written'").fetchone()
    numbers = [int(newest), int(written[0]) if written and str(written[0]).isdigit() else 0]
    for row in progress.load(connection):
        if row.sound:
            numbers += [row.accepted_seq, row.marks.highest]
    return max(numbers)


def _take_over(connection: sqlite3.Connection, haul: salvage.Haul, reached: int, found: Findings) -> None:
    """Progress from behind the failure is newer than SQLite's; a frame from there is new, or was there before."""
    frames = [frame for seq, frame in haul.frames.items() if seq > reached]
    for row in progress.load(connection):
        later = haul.progress.get(row.bit)
        if later is not None and later.name == row.name and later.accepted_seq >= row.accepted_seq:
            progress.store(connection, [later])
    salvage.put_frames(connection, frames)
    (last_key,) = connection.execute("SELECT coalesce(max(key), 0) FROM leftovers").fetchone()
    leftovers = [row for key, row in haul.leftovers.items() if key > last_key]
    salvage.put_leftovers(connection, leftovers)
    found.salvaged += sum(frame.header.n for frame in frames) + len(leftovers)
    if found.salvaged:
        found.messages.append(f"spool: {found.salvaged} records were salvaged from the damaged log")


def rebuild(directory: Path, found: Findings, connector: Connect) -> None:
    """Salvage a database that cannot be trusted into a new file, to be put in its place by :func:`exchange`.

    The old one is only read; a crash on the way starts over.
    """
    found.behind = None  # the log's pages are read along
    found.unclean = True
    found.lower_bound = True
    making = directory / f"{disk.DATABASE}.making"
    making.unlink(missing_ok=True)  # of an attempt that was cut off
    disk.create_private(making)
    haul = salvage.Haul()
    with contextlib.closing(connector(str(making))) as connection:
        schema.configure_throwaway(connection)
        schema.create_or_check(connection)
        connection.execute("BEGIN IMMEDIATE")
        for _ in salvage.from_database(directory / disk.DATABASE, found.log, haul):
            salvage.empty_into(connection, haul)
        salvage.put_small(connection, haul)
        connection.execute("COMMIT")
    disk.sync_file(making)
    making.rename(directory / disk.REBUILT)
    disk.sync_directory(directory)
    found.salvaged += haul.records
    found.messages.append(
        f"spool: {disk.DATABASE} is damaged; {haul.records} records of frames were salvaged into a new file"
    )
    found.messages += [
        f"spool: the table {table} is damaged; its rows are only in the file kept aside"
        for table in salvage.SMALL
        if table not in haul.small
    ]


def exchange(directory: Path, quarantine: Quarantine) -> bool:
    """Put a finished new file in the place of the damaged one, which is kept; True where there was one."""
    if not (directory / disk.REBUILT).exists():
        return False
    disk.restore_log(directory)
    quarantine.move(disk.DATABASE)
    quarantine.move(disk.WAL)
    quarantine.move(disk.FOUND)
    (directory / disk.KEPT).unlink(missing_ok=True)
    disk.create_private(directory / disk.WAL)  # empty: a start that ends now is not taken for one that lost it
    disk.keep_log(directory)
    (directory / disk.REBUILT).rename(directory / disk.DATABASE)
    disk.sync_directory(directory)
    return True


def done(connection: sqlite3.Connection, directory: Path, found: Findings, quarantine: Quarantine) -> None:
    """What was found is committed: take it out of the log, and put the log as it was found aside, or away."""
    if found.log is not None and found.log.transactions_lost:
        # Left there, behind what is committed from now on, it would look like damage to every later start.
        try:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.Error as exc:
            if schema.code(exc) != sqlite3.SQLITE_FULL:
                raise
    if found.wal_damage:
        quarantine.move(disk.FOUND, disk.WAL)
    else:
        (directory / disk.FOUND).unlink(missing_ok=True)


def set_aside_frames(
    connection: sqlite3.Connection, ledger: Ledger, seqs: list[int], found: Findings, quarantine: Quarantine
) -> None:
    """Frames whose header is damaged: the row goes to a file, its sound records into a new frame.

    The obligation is taken from the row where it makes sense; a wrong one shows in the balance that follows.
    """
    every = sum(ledger.by_mask)
    for seq in seqs:
        row = connection.execute("SELECT * FROM frames WHERE seq = ?", (seq,)).fetchone()
        quarantine.keep(f"frame-{seq}.bin", b"".join(v if isinstance(v, bytes) else f"{v}\n".encode() for v in row))
        connection.execute("DELETE FROM frames WHERE seq = ?", (seq,))
        _, phase, owed, required, *_, body = row
        if not (isinstance(owed, int) and 0 < owed <= every and isinstance(required, int) and not required & ~owed):
            owed = required = every
        records = framing.scan(body) if isinstance(body, bytes) else []
        for chunk in framing.pack(records, [encode(r) for r in records]) if records else []:
            ledger.last_seq += 1
            kept_phase = phase if phase in range(4) else 0
            at_us = row[7] if isinstance(row[7], int) else 0
            small = (ledger.last_seq, kept_phase, owed, required, 0, len(chunk.sizes), len(chunk.body), at_us)
            header = framing.seal((*small, chunk.t0, chunk.t1), chunk.ids + chunk.lengths)
            salvage.put_frames(connection, [salvage.SavedFrame(header, chunk.body)])
            ledger.found(owed, required, 0, every, (header.n, header.size))
            found.salvaged += header.n
    if seqs:
        found.lower_bound = True
        found.messages.append(
            f"spool: {len(seqs)} frames have a damaged header; they are kept in {quarantine.path.name},"
            " their sound records are delivered"
        )

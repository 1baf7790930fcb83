"""What is looked at before SQLite opens the file, and what is made of damage (P9). Nothing is ever deleted.

After an unclean stop the write-ahead log is walked first, because SQLite drops everything after a damaged frame
without a word. ``position`` tells how far acknowledgements went at least, so that a log which was cut short, or is
gone, is noticed too.
"""

import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sidecar.clock import Clock
from sidecar.spool import disk
from sidecar.spool.types import RecoveryReport


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
        self._parent = directory
        stamp = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=clock.now_us())
        self._name = f"quarantine-{stamp:%Y%m%dT%H%M%S.%fZ}"

    @property
    def path(self) -> Path:
        """The directory; made and made durable at the first call."""
        path = self._parent / self._name
        if not path.exists():
            path.mkdir(mode=0o700)
            disk.sync_directory(self._parent)
        return path

    def copy(self, name: str) -> None:
        """Keep a copy of a file."""
        shutil.copyfile(self._parent / name, self.path / name)
        (self.path / name).chmod(0o600)
        disk.sync_file(self.path / name)
        disk.sync_directory(self.path)

    def move(self, name: str) -> None:
        """Put a file aside."""
        (self._parent / name).rename(self.path / name)
        disk.sync_directory(self.path)
        disk.sync_directory(self._parent)

    def write(self, name: str, data: bytes) -> None:
        """Keep bytes under a name."""
        path = self.path / name
        disk.create_private(path)
        path.write_bytes(data)
        disk.sync_file(path)
        disk.sync_directory(self.path)


def before_open(directory: Path, last: disk.Mark | None, quarantine: Quarantine) -> Findings:
    """Look at the files before SQLite does."""
    found = Findings()
    database, log = directory / disk.DATABASE, directory / disk.WAL
    if not database.exists() or database.stat().st_size == 0:
        if last is None and not log.exists():
            return found  # a new spool
    found.unclean = last is None or last.state != disk.CLEAN
    if (directory / disk.REPAIR).exists():
        found.repair = True
        quarantine.move(disk.REPAIR)
    return found

"""Records whose checksum failed while the sidecar runs: kept in files, counted once."""

import errno
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sidecar.spool import disk, marks
from sidecar.spool.framing import Damaged

FOLDER: Final = "quarantine-records"


def keep(connection: sqlite3.Connection, directory: Path, name: str, damaged: Sequence[Damaged]) -> int:
    """Write the bytes into files unless they are there, and count the new ones; returns how many were new."""
    try:
        new = _write_new(directory, name, damaged)
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise
        return 0  # no room to keep the bytes now; they stay in the frame until it is settled
    if new:
        (seen,) = connection.execute(
            "SELECT coalesce(max(CAST(value AS INTEGER)), 0) FROM meta WHERE key = 'quarantined_records'"
        ).fetchone()
        marks.set_meta(connection, "quarantined_records", str(seen + new))
    return new


def _write_new(directory: Path, name: str, damaged: Sequence[Damaged]) -> int:
    folder = directory / FOLDER
    if not folder.exists():
        folder.mkdir(mode=0o700)
        disk.sync_directory(directory)
    new = 0
    for index, raw in damaged:
        path = folder / f"{name}-{index}.bin"
        if path.exists():
            continue
        disk.create_private(path)
        path.write_bytes(raw)
        disk.sync_file(path)
        new += 1
    if new:
        disk.sync_directory(folder)
    return new

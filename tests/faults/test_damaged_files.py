"""F5: bytes of a stopped spool are damaged; afterwards every acknowledged record is delivered or counted."""

import asyncio
import contextlib
import random
import shutil
import sqlite3
from pathlib import Path

from sidecar.errors import SpoolRefused
from sidecar.spool import disk
from tests.faults.verdict import Violation, guilty, require
from tests.spool.harness import crash_copy, deliver, open_spool
from tests.spool.test_damage import _account_for, _write_spools

FILES = (disk.DATABASE, disk.WAL, "position", disk.KEPT, "lock")


def flip(path: Path, rng: random.Random) -> str:
    """One bit."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bit of byte {at}"


def zero(path: Path, rng: random.Random) -> str:
    """A stretch of zeros, of noise or of another place of the same file."""
    data = bytearray(path.read_bytes())
    at, size = rng.randrange(len(data)), rng.choice((1, 100, 4096, 20_000))
    size = min(size, len(data) - at)
    other = rng.randrange(len(data) - size + 1)
    data[at : at + size] = rng.choice((bytes(size), rng.randbytes(size), bytes(data[other : other + size])))
    path.write_bytes(data)
    return f"{size} bytes at {at}"


def cut(path: Path, rng: random.Random) -> str:
    """The end is missing."""
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])
    return "cut short"


def grow(path: Path, rng: random.Random) -> str:
    """Something stands behind the end."""
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 10_000)))
    return "grown"


def lose(path: Path, _rng: random.Random) -> str:
    """The file is gone; the log under both of its names."""
    path.unlink()
    if path.name == disk.WAL:
        path.with_name(disk.KEPT).unlink(missing_ok=True)
    return "gone"


def stray(path: Path, rng: random.Random) -> str:
    """Foreign files beside it."""
    for name in ("spool.db-journal", "spool.db-shm", "notes", "spool.db.rebuilt-x"):
        (path.parent / name).write_bytes(rng.randbytes(100))
    (path.parent / "quarantine-records").mkdir(exist_ok=True)
    return "foreign files"


KINDS = (flip, flip, zero, zero, cut, grow, lose, stray)


async def examples(row, root: Path, acked: set[str], count: int) -> int:
    """Damage a copy of a killed or stopped spool, start it, deliver, account; how many examples lost something."""
    lossy = 0
    for n in range(count):
        directory = crash_copy(root / row.rng.choice(("killed", "stopped")), root / f"example-{n}")
        said = []
        for _ in range(row.rng.choice((1, 1, 1, 2))):
            path = directory / row.rng.choice(FILES[: 3 if row.rng.random() < 0.8 else 5])
            if path.exists() and path.stat().st_size:
                said.append(f"{path.name}: {row.rng.choice(KINDS)(path, row.rng)}")
        row.note("damage", files=said)
        with contextlib.suppress(SpoolRefused):  # one clear line, nothing deleted: the other allowed end
            try:
                came, _ = await _account_for(directory, acked, exactly=False)
            except AssertionError as error:
                raise Violation("silent", f"{said}: {error}") from error
            lossy += came != acked
        shutil.rmtree(directory)
    return lossy


def test_f5_damaged_files_are_delivered_or_counted_never_silent(begin, tmp_path):
    """F5: flipped, zeroed, overwritten, cut, grown, lost, foreign: it starts or refuses; what is missing is counted."""
    row = begin("F5")
    acked = asyncio.run(_write_spools(tmp_path))
    assert asyncio.run(examples(row, tmp_path, acked, row.rounds)) > 0, "nothing was ever lost: the row proves nothing"


async def _plain(directory: Path, acked: set[str]) -> None:
    """What SQLite alone makes of a damaged log: opened, delivered, not counted."""
    with contextlib.closing(sqlite3.connect(directory / disk.DATABASE)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    for name in ("position", disk.KEPT):
        (directory / name).unlink()
    spool = open_spool(directory)
    try:
        came = {record.log_id for record in await deliver(spool, "postgres")}
        counted = spool.counters("postgres").quarantined
    finally:
        await spool.close()
    require("silent", len(acked - came) > counted and len(acked - came), "records are gone and nobody says so")


def test_f5_control_sqlite_alone_drops_what_is_behind_a_flipped_bit_without_a_word(begin, tmp_path):
    """The control: SQLite opens the same damaged log first, says ok, and the rest of the log is gone."""
    begin("F5")
    acked = asyncio.run(_write_spools(tmp_path))
    log = tmp_path / "killed" / disk.WAL
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 1
    log.write_bytes(data)
    with guilty("silent"):
        asyncio.run(_plain(tmp_path / "killed", acked))

"""A start that fails leaves what the next one needs: nothing is lost, nothing is told that is not so.

The spool of a killed sidecar, sound or damaged, is started with a failure at each statement in turn: an error of the
disk, a full disk, or a kill (a copy of the files at that moment). The start after it must come to what a start without
a failure comes to. The dangerous helper is SQLite: it deletes the write-ahead log whenever a connection is closed,
at the end of a process too.
"""

import asyncio
import errno
import gc
import shutil
import sqlite3
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from sidecar.errors import SpoolFailed, SpoolRefused
from sidecar.spool import disk, wal
from tests.spool.harness import (
    SQL_ONLY,
    changed,
    crash_copy,
    deliver,
    flushed,
    open_spool,
    put,
    records,
    spool_at,
)

ERRORS = {"EIO": ("disk I/O error", sqlite3.SQLITE_IOERR), "ENOSPC": ("database or disk is full", sqlite3.SQLITE_FULL)}
FRAME = 24 + 4096  # bytes of one frame of SQLite's log: its header and a page


def _sound(_: Path) -> None:
    """As the kill left it."""


def _damaged(directory: Path) -> None:
    """A page image in the middle of the log is destroyed: commits stand behind it."""
    frames = wal.walk((directory / disk.WAL).read_bytes()).frames
    with changed(directory / disk.WAL) as content:
        at = frames[len(frames) // 2].at
        content[at + 100 : at + 200] = bytes(~b & 0xFF for b in content[at + 100 : at + 200])


def _without_a_head(directory: Path) -> None:
    """The first bytes of the log are gone: SQLite takes all of it for nothing."""
    with changed(directory / disk.WAL) as content:
        content[:32] = bytes(32)


def _cut(directory: Path) -> None:
    """The second half of the log is gone."""
    with changed(directory / disk.WAL) as content:
        del content[len(content) // 2 :]


def _without_a_file(directory: Path) -> None:
    """The database is gone, the log is there."""
    (directory / disk.DATABASE).unlink()


def _page_zeroed(directory: Path) -> None:
    """A page of the file is zeroed: it is rebuilt."""
    with changed(directory / disk.DATABASE) as content:
        content[4096:8192] = bytes(4096)


DAMAGED = (_damaged, _without_a_head, _cut)  # the others are sound, or are rebuilt
STATES = (_sound, _damaged, _without_a_head, _cut, _without_a_file, _page_zeroed)


@dataclass(frozen=True)
class Outcome:
    """What a start came to."""

    came: frozenset[str]
    quarantined: int
    told: bool


async def _outcome(directory: Path) -> Outcome:
    gc.collect()
    spool = open_spool(directory)
    try:
        came = {r.log_id for r in await deliver(spool, "postgres")}
        await flushed(spool)
        return Outcome(frozenset(came), spool.counters("postgres").quarantined, bool(spool.state().wal_damage))
    finally:
        await spool.close()


async def _write(directory: Path) -> None:
    spool = open_spool(directory / "live")
    for i in range(6):
        await put(spool, records(1 + i % 3, size=60 if i % 5 else 9_000), SQL_ONLY)
    await spool.close()  # some in the file
    spool = open_spool(directory / "live")
    for i in range(12):
        await put(spool, records(1 + i % 4, size=60 if i % 5 else 9_000), SQL_ONLY)
    crash_copy(directory / "live", directory / "killed")
    await spool.close()


class Failing(sqlite3.Connection):
    """Counts statements; ``at_each`` may raise instead of running one."""

    at_each = staticmethod(lambda n, sql: None)
    n = 0

    def execute(self, sql, *args):
        if threading.current_thread() is threading.main_thread():  # the spool's own thread is not the start
            Failing.n += 1
            Failing.at_each(Failing.n, sql)
        return super().execute(sql, *args)


def failing(path):
    """The seam of Spool.open."""
    return sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False, factory=Failing)


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """Makes a copy of a killed spool in one of the states."""
    monkeypatch.setattr(Failing, "n", 0)
    monkeypatch.setattr(Failing, "at_each", lambda n, sql: None)
    asyncio.run(_write(tmp_path))

    def make(name: str, state) -> Path:
        copy = crash_copy(tmp_path / "killed", tmp_path / name)
        state(copy)
        return copy

    return make


def _statements(directory: Path) -> int:
    """How many statements a start runs."""
    Failing.n = 0
    spool = open_spool(directory, connect=failing)
    total = Failing.n
    asyncio.run(_closed(spool))
    return total


async def _closed(spool) -> None:
    await spool.close()


@pytest.mark.parametrize(
    ("error", "state"), [*(("EIO", state) for state in STATES), ("ENOSPC", _damaged), ("ENOSPC", _page_zeroed)]
)
def test_an_error_at_any_statement_of_a_start_costs_the_next_one_nothing(killed, tmp_path, state, error):
    """The next start delivers, counts and tells what it would have without the one that failed."""
    expected = asyncio.run(_outcome(killed("reference", state)))
    assert expected.came
    assert expected.told == (state in DAMAGED)
    total = _statements(killed("counted", state))
    assert total > 20
    failed = 0
    for k in range(1, total + 1):
        directory = killed(f"failed-{k}", state)

        def fail(n, sql, k=k):
            if n == k:
                text, code = ERRORS[error]
                exc = sqlite3.OperationalError(text)
                exc.sqlite_errorcode = code
                raise exc

        Failing.n, Failing.at_each = 0, fail
        try:
            spool = open_spool(directory, connect=failing)
        except (SpoolFailed, SpoolRefused):
            failed += 1
        else:  # where the disk is full a checkpoint is put off
            shutil.copytree(directory, tmp_path / "aside")
            asyncio.run(_closed(spool))
            shutil.rmtree(directory)
            (tmp_path / "aside").rename(directory)
        finally:
            Failing.at_each = lambda n, sql: None
        again = asyncio.run(_outcome(directory))
        assert again == expected, f"after a failure at statement {k} of {total}"
        shutil.rmtree(directory)
    assert failed > total // 2, "the failures were not felt: nothing is proved"


@pytest.mark.parametrize("state", STATES)
def test_a_kill_at_any_statement_of_a_start_costs_the_next_one_nothing(killed, tmp_path, state):
    """A copy of the files before each statement is what a kill there leaves."""
    expected = asyncio.run(_outcome(killed("reference", state)))
    directory = killed("live-start", state)
    copies = []

    def copy(n, sql):
        copies.append((sql, crash_copy(directory, tmp_path / f"kill-{n}")))

    Failing.n, Failing.at_each = 0, copy
    spool = open_spool(directory, connect=failing)
    Failing.at_each = lambda n, sql: None
    asyncio.run(_closed(spool))
    assert len(copies) > 20
    for sql, at in copies:
        assert asyncio.run(_outcome(at)) == expected, f"after a kill before {sql!r}"


def _to_be_rebuilt(directory: Path) -> None:
    """Somebody asked for it."""
    (directory / disk.REPAIR).touch()


def _rebuilt_without_a_position(directory: Path) -> None:
    """And nothing says how far acknowledgements went."""
    _to_be_rebuilt(directory)
    (directory / "position").unlink()


@pytest.mark.parametrize("state", [_damaged, _to_be_rebuilt, _rebuilt_without_a_position])
def test_a_kill_between_any_two_changes_of_names_costs_the_next_start_nothing(killed, tmp_path, monkeypatch, state):
    """A repair puts files aside and another in their place: a copy before each step is what a kill there leaves."""
    expected = asyncio.run(_outcome(killed("reference", state)))
    assert expected.came
    directory = killed("live-start", state)
    steps: list[tuple[str, Path]] = []

    def noted(call, what):
        def stepping(path, *args, **kwargs):
            if path.is_relative_to(directory):
                steps.append((f"{what} {path.name}", crash_copy(directory, tmp_path / f"kill-{len(steps)}")))
            return call(path, *args, **kwargs)

        return stepping

    with monkeypatch.context() as patched:
        for name in ("rename", "unlink", "hardlink_to", "mkdir", "write_bytes"):
            patched.setattr(Path, name, noted(getattr(Path, name), name))
        patched.setattr(disk, "create_private", noted(disk.create_private, "create"))
        spool = open_spool(directory)
    asyncio.run(_closed(spool))
    assert len(steps) > 4
    for step, at in steps:
        assert asyncio.run(_outcome(at)) == expected, f"after a kill before {step}"


def test_a_kill_in_the_middle_of_the_commit_that_repairs_costs_the_next_start_nothing(killed, tmp_path):
    """What is taken over from behind a damage is committed onto the bytes that it was read from.

    The log is put together from both sides of that commit, cut at each frame and in the middle of each.
    """
    expected = asyncio.run(_outcome(killed("reference", _damaged)))
    directory = killed("live-start", _damaged)
    before: list[Path] = []

    def copy(n, sql):
        if sql == "COMMIT":
            before.append(crash_copy(directory, tmp_path / f"kill-{n}"))
        elif before and not (tmp_path / "after").exists():
            crash_copy(directory, tmp_path / "after")

    Failing.n, Failing.at_each = 0, copy
    spool = open_spool(directory, connect=failing)
    Failing.at_each = lambda n, sql: None
    asyncio.run(_closed(spool))
    (at,) = before
    old = (at / disk.WAL).read_bytes()
    new = (tmp_path / "after" / disk.WAL).read_bytes()
    first = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    last = max(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    assert last - first > FRAME, "the commit overwrote nothing: nothing is proved"
    for n, cut in enumerate(range(first + 100, len(new), FRAME // 2)):
        torn = crash_copy(at, tmp_path / f"torn-{n}")
        (torn / disk.WAL).write_bytes(new[:cut] + old[cut:])
        again = asyncio.run(_outcome(torn))
        assert again == expected, f"cut at {cut}"


def test_after_a_repair_a_kill_tells_nothing_a_second_time(killed, tmp_path):
    """What stood behind the damage is no longer in the log: it would look like damage at every later start."""
    directory = killed("live-start", _damaged)

    async def twice() -> None:
        spool = open_spool(directory)
        assert spool.recovery.wal_damage
        await put(spool, records(2), SQL_ONLY)
        crash_copy(directory, tmp_path / "again")
        await spool.close()
        async with spool_at(tmp_path / "again") as again:
            assert again.recovery.unclean
            assert again.recovery.messages == ()
            assert again.recovery.wal_damage == 0

    asyncio.run(twice())


DIES = """
import asyncio, sqlite3, sys
from pathlib import Path
from tests.spool.harness import BOTH, open_spool, put, records
class Failing(sqlite3.Connection):
    armed = False
    def execute(self, sql, *args):
        if sql == "COMMIT" and Failing.armed:
            raise sqlite3.OperationalError("disk I/O error")
        return super().execute(sql, *args)
async def main():
    spool = open_spool(Path(sys.argv[1]), connect=lambda path: sqlite3.connect(
        path, timeout=0, isolation_level=None, check_same_thread=False, factory=Failing))
    await put(spool, records(3), BOTH)
    Failing.armed = True
    try:
        await put(spool, records(3), BOTH)
    finally:
        await spool.close()
asyncio.run(main())
"""


async def test_a_process_that_ends_after_a_failed_flush_leaves_its_log(tmp_path):
    """The interpreter closes what is left at its end, and SQLite deletes the log then: the next start has it still."""
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", DIES, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "SpoolFailed" in done.stderr
    async with spool_at(tmp_path) as again:
        assert again.recovery.unclean
        assert again.recovery.messages == ()
        assert len(await deliver(again, "postgres")) == 3


async def test_a_kill_between_the_last_checkpoint_and_the_mark_of_a_clean_stop_is_no_damage(tmp_path):
    """The log is gone by then, in order."""
    spool = open_spool(tmp_path / "a")
    await put(spool, records(3), SQL_ONLY)
    sync = spool._committer._position.write

    def before(state, *args):
        if state == disk.CLEAN:
            crash_copy(tmp_path / "a", tmp_path / "b")
        sync(state, *args)

    spool._committer._position.write = before
    await spool.close()
    assert not (tmp_path / "b" / disk.WAL).exists()
    async with spool_at(tmp_path / "b") as again:
        assert again.recovery.messages == ()
        assert len(await deliver(again, "postgres")) == 3


@pytest.mark.parametrize("reason", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSPC])
async def test_a_file_system_without_second_names_is_no_reason_not_to_start(tmp_path, monkeypatch, reason):
    """Then a log that SQLite deleted is told as missing, as before; nothing else changes."""

    def refused(self, target):
        raise OSError(reason, "no link")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    async with spool_at(tmp_path) as spool:
        await put(spool, records(2), SQL_ONLY)
        assert not (tmp_path / disk.KEPT).exists()
        assert len(await deliver(spool, "postgres")) == 2


async def test_a_disk_that_fails_to_name_the_log_is_told_in_one_line(tmp_path, monkeypatch):
    """EIO is EIO, whatever was asked for."""

    def broken(self, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "hardlink_to", broken)
    with pytest.raises(SpoolFailed, match="look at the volume"):
        open_spool(tmp_path)
    monkeypatch.undo()
    async with spool_at(tmp_path) as spool:
        assert spool.recovery.messages == ()


async def test_a_stop_in_order_leaves_neither_name(tmp_path):
    """The log has said all it knows."""
    async with spool_at(tmp_path) as spool:
        await put(spool, records(1), SQL_ONLY)
        assert (tmp_path / disk.KEPT).samefile(tmp_path / disk.WAL)
    assert not (tmp_path / disk.KEPT).exists()
    assert not (tmp_path / disk.WAL).exists()


async def test_a_log_of_before_a_stop_in_order_is_not_played_back(tmp_path):
    """Its second name, left over by a version that does not know it, would take the file back to what it was then."""
    async with spool_at(tmp_path) as spool:
        await put(spool, records(3), SQL_ONLY)
        earlier = (tmp_path / disk.WAL).read_bytes()
        for _ in range(20):
            await put(spool, records(50), SQL_ONLY)
    assert wal.walk(earlier).frames
    (tmp_path / disk.KEPT).write_bytes(earlier)
    async with spool_at(tmp_path) as spool:
        assert (spool.recovery.unclean, spool.counters("postgres").pending) == (False, 1003)
        assert len(await deliver(spool, "postgres")) == 1003

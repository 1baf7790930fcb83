"""Whatever the bytes are, the spool starts or refuses with one line; nothing acknowledged is lost silently.

Each example damages a copy of a spool, opens it, delivers all it can and accounts for the rest: acknowledged records
that do not come back must be counted as quarantined. Controls: an undamaged copy reports nothing.
"""

import asyncio
import contextlib
import gc
import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar.errors import SpoolFailed, SpoolRefused
from sidecar.spool import disk, pages, wal
from tests.spool.harness import (
    BOTH,
    SQL_ONLY,
    balanced,
    changed,
    crash_copy,
    dead,
    deliver,
    flushed,
    open_spool,
    pending_in_frames,
    put,
    records,
    spool_at,
    take,
    until,
)

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
COMMITS = 30


async def _write_spools(root: Path) -> set[str]:
    """Two spools with the same backlog: ``killed`` (all in the log) and ``stopped`` (all in the file)."""
    spool = open_spool(root / "live")
    ids = set()
    for i in range(COMMITS):
        batch = records(1 + i % 4, size=60 if i % 5 else 9_000)
        ids |= {r.log_id for r in batch}
        await put(spool, batch, SQL_ONLY)
    crash_copy(root / "live", root / "killed")
    await spool.close()
    shutil.move(root / "live", root / "stopped")
    return ids


@pytest.fixture(scope="module")
def spools(tmp_path_factory):
    """The directory of both spools, and the ids that were acknowledged."""
    root = tmp_path_factory.mktemp("spools")
    return root, asyncio.run(_write_spools(root))


async def _account_for(directory: Path, acked: set[str], *, exactly: bool = True) -> tuple[set[str], list]:
    """Open, restarting where a failure asks for it, and deliver; returns what came and the reports of all starts.

    Not ``exactly``: where two files are damaged, one of them being what counts, it may be that only a message says so.
    """
    came, reports = set(), []
    for _ in range(4):
        if reports:  # a spool that failed keeps its connection, and with it SQLite's lock, until its process ends
            gc.collect()
        spool = open_spool(directory)
        reports.append(spool.recovery)
        try:
            while pending_in_frames(spool, "postgres"):
                taken = asyncio.ensure_future(spool.cursor("postgres").take(100, 1 << 20))
                # Frames of which no record is whole are settled by the cursor itself: then there is nothing to come.
                await until(lambda t=taken, s=spool: t.done() or not pending_in_frames(s, "postgres"))
                if not taken.done():
                    taken.cancel()
                    break
                for frame in taken.result():
                    came |= {r.log_id for r in frame.records}
                    spool.cursor("postgres").settle(frame)
                await asyncio.sleep(0)
            await flushed(spool)
        except SpoolFailed:
            await asyncio.sleep(0.1)  # for its timers, which hold it
            continue
        else:
            counters = spool.counters("postgres")
            assert balanced(counters)
            assert counters.pending == 0
            assert came <= acked, "a record was invented"
            missing = acked - came
            told = not exactly and any(report.lower_bound and report.messages for report in reports)
            assert counters.quarantined >= len(missing) or told, (missing, counters, reports)
            return came, reports
        finally:
            await spool.close()
            del spool
    raise AssertionError(f"a crash loop: {reports}")


@contextlib.contextmanager
def _copy(source: Path):
    with tempfile.TemporaryDirectory(dir=source.parent) as target:
        yield crash_copy(source, Path(target) / "spool")


def test_an_undamaged_log_reports_nothing(spools):
    """The control: all come back, no alarm, no quarantine directory."""
    root, acked = spools
    with _copy(root / "killed") as directory:
        log = wal.walk((directory / disk.WAL).read_bytes())
        assert log.transactions_lost == log.bad_frames == 0
        assert log.kept == len(log.frames) > COMMITS
        came, (report,) = asyncio.run(_account_for(directory, acked))
        assert came == acked
        assert (report.unclean, report.quarantined, report.wal_damage, report.messages) == (True, 0, 0, ())
        assert not list(directory.glob("quarantine*"))


def test_an_undamaged_file_reports_nothing(spools):
    """The control of the damaged-page tests."""
    root, acked = spools
    with _copy(root / "stopped") as directory:
        came, (report,) = asyncio.run(_account_for(directory, acked))
        assert came == acked
        assert (report.unclean, report.messages) == (False, ())


@given(data=st.data())
@QUICK
def test_a_flipped_bit_in_the_log_is_counted_or_harmless(spools, data):
    """SQLite drops everything behind it without a word; here it is salvaged, or counted."""
    root, acked = spools
    with _copy(root / "killed") as directory:
        with changed(directory / disk.WAL) as content:
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        came, reports = asyncio.run(_account_for(directory, acked))
        if came != acked:
            assert reports[0].wal_damage
            assert reports[0].messages
        assert len(acked - came) <= 8, "one bit costs at most one commit and its page"


@given(data=st.data())
@QUICK
def test_a_log_cut_short_is_counted(spools, data):
    """Whatever was acknowledged behind the cut is counted exactly, thanks to the position file."""
    root, acked = spools
    with _copy(root / "killed") as directory:
        log = directory / disk.WAL
        cut = data.draw(st.integers(0, log.stat().st_size - 1))
        log.write_bytes(log.read_bytes()[:cut])
        came, reports = asyncio.run(_account_for(directory, acked))
        lost = len(acked - came)
        assert reports[0].quarantined == lost
        assert bool(reports[0].wal_damage) == bool(lost)


def test_a_missing_log_is_the_same_alarm(spools):
    """After an unclean stop it must be there, under one of its names."""
    root, acked = spools
    with _copy(root / "killed") as directory:
        (directory / disk.WAL).unlink()
        (directory / disk.KEPT).unlink()
        came, reports = asyncio.run(_account_for(directory, acked))
        assert reports[0].wal_damage == 1
        assert reports[0].quarantined == len(acked - came) == len(acked)


def test_a_spool_of_which_only_the_lock_is_left_says_so_once(spools):
    """Nothing can be counted then; a new directory, and one whose first start ended early, say nothing."""
    root, acked = spools
    with _copy(root / "stopped") as directory:
        for name in (disk.DATABASE, "position"):
            (directory / name).unlink()
        came, (report,) = asyncio.run(_account_for(directory, acked, exactly=False))
        assert not came
        assert report.lower_bound
        assert "a spool was here" in report.messages[0]
        assert asyncio.run(_account_for(directory, set()))[1][0].messages == ()


def test_a_first_start_that_ended_before_its_position_was_written_says_nothing(tmp_path):
    """The control: the lock alone is no loss."""
    disk.Lock(tmp_path).release()
    assert asyncio.run(_account_for(tmp_path, set()))[1][0].messages == ()


def test_a_log_that_lost_its_first_name_is_found_by_its_second(spools):
    """SQLite deletes the first where a process ends after an error; nothing is missing, nothing is told."""
    root, acked = spools
    with _copy(root / "killed") as directory:
        (directory / disk.WAL).unlink()
        came, (report,) = asyncio.run(_account_for(directory, acked))
        assert came == acked
        assert report.messages == ()


@given(data=st.data())
@QUICK
def test_a_damaged_stretch_of_the_log_is_counted_or_harmless(spools, data):
    """Zeros or noise over up to 20,000 bytes."""
    root, acked = spools
    with _copy(root / "killed") as directory:
        with changed(directory / disk.WAL) as content:
            at = data.draw(st.integers(0, len(content) - 1))
            size = min(data.draw(st.integers(1, 20_000)), len(content) - at)
            fill = data.draw(st.sampled_from([b"\0", b"\xff", b"\x0d"]))
            content[at : at + size] = fill * size
        asyncio.run(_account_for(directory, acked))


def test_commits_behind_a_damaged_frame_are_salvaged(spools):
    """One page image in the middle is destroyed: what its own commit does not need comes back."""
    root, acked = spools
    with _copy(root / "killed") as directory:
        log = wal.walk((directory / disk.WAL).read_bytes())
        frame = log.frames[len(log.frames) // 2]
        with changed(directory / disk.WAL) as content:
            content[frame.at + 100 : frame.at + 200] = bytes(
                ~b & 0xFF for b in content[frame.at + 100 : frame.at + 200]
            )
        came, (report, *_) = asyncio.run(_account_for(directory, acked))
        assert report.salvaged > len(acked) // 3
        assert len(acked - came) <= 4
        (aside,) = directory.glob("quarantine-2*")
        assert (aside / disk.WAL).exists()


@given(data=st.data())
@QUICK
def test_a_flipped_bit_in_the_file_is_counted_or_harmless(spools, data):
    """Wherever it hits: header, tree, a frame's columns, a record, the progress of a store."""
    root, acked = spools
    with _copy(root / "stopped") as directory:
        with changed(directory / disk.DATABASE) as content:
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        with contextlib.suppress(SpoolRefused) if 56 <= at < 64 else contextlib.nullcontext():  # the schema's version
            came, _ = asyncio.run(_account_for(directory, acked))
            assert len(acked - came) <= 4, "one bit costs at most one record, or the frame's"


@given(data=st.data())
@QUICK
def test_a_damaged_page_is_counted_or_harmless(spools, data):
    """A whole page zeroed or overwritten; the file is rebuilt from the others, the damaged one is kept."""
    root, acked = spools
    with _copy(root / "stopped") as directory:
        with changed(directory / disk.DATABASE) as content:
            number = data.draw(st.integers(0, len(content) // pages.PAGE - 1))
            noise = data.draw(st.sampled_from([b"\0", b"\xff", b"\x0d", b"ab"]))
            content[number * 4096 : (number + 1) * 4096] = (noise * 4096)[:4096]
        came, _ = asyncio.run(_account_for(directory, acked))
        assert len(acked - came) <= len(acked) // 3


def test_a_file_cut_short_is_salvaged(spools):
    """The last pages are gone; the others' records come, the rest is counted."""
    root, acked = spools
    with _copy(root / "stopped") as directory:
        with changed(directory / disk.DATABASE) as content:
            del content[len(content) * 7 // 8 // 4096 * 4096 :]
        came, reports = asyncio.run(_account_for(directory, acked))
        assert 0 < len(came) < len(acked)
        assert sum(r.salvaged for r in reports) > 0
        assert any((aside / disk.DATABASE).exists() for aside in directory.glob("quarantine-2*"))


@given(data=st.binary(max_size=200))
@QUICK
def test_garbage_as_a_log_never_stops_a_start(spools, data):
    """Foreign bytes in the place of the log: the file's own records come back."""
    root, acked = spools
    with _copy(root / "stopped") as directory:
        (directory / disk.WAL).write_bytes(data)
        came, _ = asyncio.run(_account_for(directory, acked))
        assert came == acked


def test_a_missing_file_is_not_silent(spools):
    """The database is gone, position says that records were accepted: they are counted as quarantined."""
    root, acked = spools
    with _copy(root / "killed") as directory:
        for name in (disk.DATABASE, disk.WAL, disk.KEPT):
            (directory / name).unlink()
        came, reports = asyncio.run(_account_for(directory, acked))
        assert came == set()
        assert reports[0].quarantined == len(acked)


@pytest.mark.parametrize("position", [None, b"", b"torn"], ids=["missing", "empty", "damaged"])
def test_a_log_cut_short_without_a_position_is_told_though_it_cannot_be_counted(spools, position):
    """Both witnesses are gone: nothing can be counted, but the start says so; the control is the cut without that."""
    root, acked = spools
    with _copy(root / "killed") as directory:
        log = directory / disk.WAL
        log.write_bytes(log.read_bytes()[: log.stat().st_size // 2 // 4120 * 4120 + 32])
        (directory / "position").unlink()
        if position is not None:
            (directory / "position").write_bytes(position)
        came, reports = asyncio.run(_account_for(directory, acked, exactly=False))
        assert len(came) < len(acked)
        assert reports[0].lower_bound
        assert "position is missing or damaged" in reports[0].messages[0]


def test_a_lost_file_with_a_damaged_position_is_told(spools):
    """Nothing is left but a position that cannot be read: it says that there was something."""
    root, acked = spools
    with _copy(root / "killed") as directory:
        for name in (disk.DATABASE, disk.WAL, disk.KEPT):
            (directory / name).unlink()
        (directory / "position").write_bytes(b"torn")
        came, reports = asyncio.run(_account_for(directory, acked, exactly=False))
        assert came == set()
        assert reports[0].lower_bound


async def test_foreign_files_in_the_directory_are_left_alone(tmp_path):
    """Somebody's notes are neither read nor deleted."""
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "spool.db.old").write_text("mine too")
    async with spool_at(tmp_path) as spool:
        await put(spool, records(1))
    assert (tmp_path / "notes.txt").read_text() == "mine"


async def test_a_repair_that_was_cut_off_is_finished(tmp_path):
    """Killed between building the new file and putting it in place: the next start uses it and keeps the old one."""
    async with spool_at(tmp_path) as spool:
        batch = records(3)
        await put(spool, batch)
    shutil.copy(tmp_path / disk.DATABASE, tmp_path / disk.REBUILT)
    (tmp_path / disk.DATABASE).write_bytes(b"rubbish")
    async with spool_at(tmp_path) as again:
        assert await deliver(again, "postgres") == batch
        assert "finished" in again.recovery.messages[0]
    (aside,) = tmp_path.glob("quarantine-2*")
    assert (aside / disk.DATABASE).read_bytes() == b"rubbish"


async def test_a_damaged_record_takes_no_neighbour_with_it(tmp_path):
    """Its bytes are kept in a file, it is counted once, whatever the number of stores; the others are delivered."""
    async with spool_at(tmp_path) as spool:
        batch = records(5, size=200)
        await put(spool, batch, BOTH)
    with changed(tmp_path / disk.DATABASE) as content:
        at = content.index(b"2:xxxxxxxxxx")
        content[at + 20] ^= 1
    async with spool_at(tmp_path) as again:
        rest = [r for n, r in enumerate(batch) if n != 2]
        assert await deliver(again, "postgres") == rest
        assert await deliver(again, "dynamodb") == rest
        await flushed(again)
        for store in ("postgres", "dynamodb"):
            assert again.counters(store).quarantined == 1
            assert balanced(again.counters(store))
        assert again.state().quarantined_records == 1
        (kept,) = (tmp_path / "quarantine-records").iterdir()
        assert b"2:xxxxxxxxxx" in kept.read_bytes()
    async with spool_at(tmp_path) as third:
        assert third.state().quarantined_records == 1
        assert third.counters("postgres").quarantined == 1


async def test_a_damaged_obligation_is_noticed_at_a_start(tmp_path):
    """A flipped store bit would be a silent loss: the frame is set aside and its records are delivered all the same."""
    async with spool_at(tmp_path) as spool:
        batch = records(3)
        await put(spool, batch, BOTH)
        await spool.write(lambda c: c.execute("UPDATE frames SET owed = 1"))
    async with spool_at(tmp_path) as again:
        assert again.recovery.salvaged == 3
        assert sorted(r.log_id for r in await deliver(again, "postgres")) == sorted(r.log_id for r in batch)
        assert again.counters("dynamodb").quarantined == 3
        assert balanced(again.counters("dynamodb"))


async def test_damaged_progress_is_not_believed(tmp_path):
    """A flipped bit in a store's position would make its backlog look settled; it is handed out again instead."""
    async with spool_at(tmp_path) as spool:
        batch = records(4)
        await put(spool, batch, BOTH)
    with contextlib.closing(sqlite3.connect(tmp_path / disk.DATABASE, isolation_level=None)) as connection:
        connection.execute("UPDATE progress SET upto = 4096 WHERE name = 'postgres'")
    async with spool_at(tmp_path) as again:
        assert await deliver(again, "postgres") == batch
        assert any("account of postgres" in line for line in again.recovery.messages)
        assert balanced(again.counters("postgres"))


async def test_dead_letters_and_meta_survive_a_rebuild(tmp_path):
    """The tables beside the frames are salvaged too."""
    async with spool_at(tmp_path) as spool:
        await put(spool, records(3), BOTH)
        (frame,) = await take(spool, "postgres")
        spool.cursor("postgres").settle(frame, [dead(1)])
        await spool.set_meta("phase", "dual_write")
        await spool.audit("me", "did", "because")
        letters = await spool.dead_letters()
        counters = spool.counters("postgres")
        store = spool.counters("dynamodb")
    (tmp_path / disk.REPAIR).touch()
    async with spool_at(tmp_path) as again:
        assert await again.dead_letters() == letters
        assert again.meta("phase") == "dual_write"
        assert [line.who for line in await again.audit_trail()] == ["me"]
        assert again.counters("postgres") == counters
        assert again.counters("dynamodb") == store
        assert not (tmp_path / disk.REPAIR).exists()

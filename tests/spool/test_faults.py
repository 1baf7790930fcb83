"""What happens when the disk is full, fails, is taken or forgets."""

import asyncio
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.errors import Busy, SpoolFailed, SpoolLocked, SpoolRefused
from sidecar.settings import KIB, MIB
from sidecar.spool import disk
from sidecar.spool.work import Write
from tests.spool.harness import (
    BOTH,
    SQL_ONLY,
    balanced,
    crash_copy,
    dead,
    deliver,
    flushed,
    open_spool,
    put,
    records,
    settings,
    spool_at,
    take,
    take_now,
    until,
)

SMALL = settings(cap_bytes=16 * MIB, high_watermark=0.5, low_watermark=0.25)
TO_THE_BRIM = settings(cap_bytes=16 * MIB, high_watermark=1.0, low_watermark=0.9)


async def fill(spool, obligation=BOTH):
    """Append until pushed back; returns what was accepted and why it ended."""
    accepted = []
    while True:
        batch = records(20, size=16 * KIB)
        try:
            await put(spool, batch, obligation)
        except Busy as busy:
            return accepted, busy
        accepted += batch


async def test_a_full_spool_pushes_back_and_recovers_by_itself(tmp_path):
    """Busy at the high watermark with a time to wait; reads and drains go on; open again below the low one."""
    async with spool_at(tmp_path, settings=SMALL) as spool:
        accepted, busy = await fill(spool)
        assert (busy.reason, busy.retry_after > 0) == ("spool_full", True)
        assert spool.state().busy_reason == "spool_full"
        assert not spool.state().accepting
        assert 8 * MIB <= spool.state().bytes_used <= 16 * MIB
        assert await deliver(spool, "postgres") == accepted
        assert await deliver(spool, "dynamodb") == accepted
        await until(lambda: spool.state().accepting)
        await put(spool, records(1))


async def test_a_file_at_its_very_cap_still_takes_marks_and_dead_letters(tmp_path):
    """When SQLite itself says full, appends are refused, delivery and the dead letters go on, nothing is lost."""
    async with spool_at(tmp_path / "a", settings=TO_THE_BRIM) as spool:
        spool._admission.enter = lambda size: None  # only SQLite's own limit is left
        spool._admission.leave = lambda size: None
        accepted, busy = await fill(spool)
        assert busy.reason == "spool_full"
        frames = await take(spool, "postgres", 40)
        for frame in frames:
            spool.cursor("postgres").settle(frame, [dead(0), dead(1)])
        await flushed(spool)
        letters = await spool.dead_letters()
        assert len(letters) == 2 * len(frames)
        assert balanced(spool.counters("postgres"))
        copy = crash_copy(tmp_path / "a", tmp_path / "b")
    async with spool_at(copy, settings=TO_THE_BRIM) as again:
        assert [d.log_id for d in await again.dead_letters()] == [d.log_id for d in letters]
        settled = sum(len(f.records) for f in frames)
        assert again.counters("postgres").pending == len(accepted) - settled
        assert await deliver(again, "dynamodb") == accepted


async def test_leftovers_that_find_no_room_wait_for_the_other_store_to_make_some(tmp_path):
    """A whole backlog becomes leftovers of one store: not even the reserve holds the copies.

    The store is handed nothing more, the other one goes on; what it delivers makes the room. Nothing is lost, and a
    crash before that hands the frames out again.
    """
    async with spool_at(tmp_path / "a", settings=TO_THE_BRIM) as spool:
        spool._admission.enter = lambda size: None
        spool._admission.leave = lambda size: None
        accepted, _ = await fill(spool)
        frames = await take_now(spool, "postgres")
        for frame in frames:
            spool.cursor("postgres").settle(frame, [dead(i) for i in range(len(frame.records)) if i % 5])
        more = asyncio.ensure_future(spool.cursor("postgres").take(1, 1))
        await until(lambda: spool.stalled("postgres"))
        assert not spool.stalled("dynamodb")
        del spool._admission.enter, spool._admission.leave
        with pytest.raises(Busy):
            await put(spool, records(1))
        left = spool.counters("postgres").dead_lettered
        assert left == len(accepted) * 4 // 5
        copy = crash_copy(tmp_path / "a", tmp_path / "b")
        assert await deliver(spool, "dynamodb") == accepted
        await until(lambda: not spool.stalled("postgres"))
        assert len(await spool.dead_letters(limit=2_000)) == left
        assert await spool.discard(who="me", reason="makes room") == left
        await until(lambda: spool.state().accepting)
        assert not more.done()
        await put(spool, records(1), SQL_ONLY)
        (frame,) = await more
        spool.cursor("postgres").settle(frame)
        before = {store: spool.counters(store) for store in ("postgres", "dynamodb")}
    async with spool_at(tmp_path / "a", settings=TO_THE_BRIM) as again:
        assert {store: again.counters(store) for store in before} == before
        assert again.recovery.messages == ()
    async with spool_at(copy, settings=TO_THE_BRIM) as crashed:
        assert crashed.counters("postgres").pending == len(accepted)
        assert crashed.recovery.messages == ()


async def test_marks_taken_before_others_came_back_are_turned_away_too(tmp_path):
    """They say how far a store got as a whole: written alone they would forget the leftovers of the earlier ones."""
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL

    def no_room(_):
        raise full

    async with spool_at(tmp_path) as spool:
        loop = asyncio.get_running_loop()

        async def send(run, generation):
            future = loop.create_future()
            spool._submit(Write(run, future, marks=generation), loop)
            return await future

        with pytest.raises(Busy):
            await send(no_room, 1)
        with pytest.raises(Busy):
            await send(lambda _: "written", 1)
        assert await send(lambda _: "written", 2) == "written"
        await until(lambda: spool.state().accepting)


async def test_marks_that_rode_on_a_refused_append_are_written_all_the_same(tmp_path):
    """The transaction of an append that finds no room is rolled back; the marks in it are committed without it."""
    async with spool_at(tmp_path, settings=TO_THE_BRIM) as spool:
        spool._admission.enter = lambda size: None
        spool._admission.leave = lambda size: None
        accepted, _ = await fill(spool)
        frames = await take(spool, "postgres")
        for frame in frames[:5]:
            spool.cursor("postgres").settle(frame)
        spool.flush_now()
        with pytest.raises(Busy):
            await put(spool, records(200, size=16 * KIB))
        upto = await spool.read(lambda c: c.execute("SELECT upto FROM progress WHERE name = 'postgres'").fetchone()[0])
        assert upto >= frames[4].seq
        assert len(await deliver(spool, "dynamodb")) == len(accepted)


async def test_a_full_disk_closes_the_door_before_the_ballast_is_eaten(tmp_path, monkeypatch):
    """Free space under the floor: disk_full; nothing is handed out while marks find no room; it opens again."""
    async with spool_at(tmp_path) as spool:
        with monkeypatch.context() as patched:
            patched.setattr(disk, "free_bytes", lambda _: MIB)
            await until(lambda: not spool.state().accepting)
            with pytest.raises(Busy) as caught:
                await put(spool, records(1))
            assert caught.value.reason == "disk_full"
        await until(lambda: spool.state().accepting)
        await put(spool, records(1))


def test_ballast_is_given_up_and_made_again_when_there_is_room(tmp_path, monkeypatch):
    """It is whole or not there; it is not made where twice its size is not free."""
    ballast = disk.Ballast(tmp_path, MIB)
    assert not ballast.whole
    monkeypatch.setattr(disk, "free_bytes", lambda _: 2 * MIB - 1)
    assert not ballast.make()
    monkeypatch.setattr(disk, "free_bytes", lambda _: 2 * MIB)
    assert ballast.make()
    assert (tmp_path / "ballast").stat().st_size == MIB
    assert ballast.drop()
    assert not ballast.drop()
    assert disk.Ballast(tmp_path, 0).whole


class Failing(sqlite3.Connection):
    """A connection whose next COMMIT fails as a failed fsync does."""

    armed = False
    commits = 0

    def execute(self, sql, *args):
        if sql == "COMMIT":
            Failing.commits += 1
            if Failing.armed:
                raise sqlite3.OperationalError("disk I/O error")
        return super().execute(sql, *args)


def failing(path):
    """The seam of Spool.open."""
    return sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False, factory=Failing)


async def test_a_failed_fsync_fails_everybody_for_ever_and_is_not_tried_again(tmp_path, monkeypatch):
    """Appends, cursors and waiters get SpoolFailed; on_failure is called once; the next start has what was acked."""
    monkeypatch.setattr(Failing, "armed", False)
    spool = open_spool(tmp_path / "a", connect=failing)
    failures = []
    spool.on_failure = failures.append
    batch = records(2)
    receipt = await put(spool, batch, SQL_ONLY)
    taking = asyncio.ensure_future(spool.cursor("dynamodb").take(1, 1))
    waiting = asyncio.ensure_future(spool.wait_settled(receipt, frozenset({"postgres"})))
    await asyncio.sleep(0)
    Failing.armed, Failing.commits = True, 0
    puts = asyncio.gather(*(put(spool, records(1)) for _ in range(3)), return_exceptions=True)
    assert [type(r) for r in await asyncio.wait_for(puts, 10)] == [SpoolFailed] * 3
    for future in (taking, waiting):
        with pytest.raises(SpoolFailed):
            await asyncio.wait_for(future, 10)
    with pytest.raises(SpoolFailed):
        await put(spool, records(1))
    with pytest.raises(SpoolFailed):
        await spool.dead_letters()
    assert len(failures) == 1
    assert Failing.commits == 1
    assert not spool.state().accepting
    copy = crash_copy(tmp_path / "a", tmp_path / "b")
    await spool.close()
    Failing.armed = False
    async with spool_at(copy) as again:
        assert batch == (await deliver(again, "postgres"))[:2]


async def test_an_error_in_the_spools_thread_fails_all_waiters(tmp_path):
    """Trap 5: a bug in the thread is not a hang."""
    spool = open_spool(tmp_path)

    def bug(_):
        raise KeyError("bug")

    results = await asyncio.wait_for(
        asyncio.gather(spool.write(bug), spool.read(bug), put(spool, records(1)), return_exceptions=True), 10
    )
    assert [type(r) for r in results] == [SpoolFailed] * 3
    await spool.close()


async def test_a_second_process_is_refused(tmp_path):
    """It ends with SpoolLocked while the first goes on."""
    code = (
        "import sys; from pathlib import Path; from sidecar.clock import SystemClock; from sidecar import settings;"
        "from sidecar.spool import Spool; from sidecar.errors import SpoolLocked\n"
        "try: Spool.open(Path(sys.argv[1]), settings.Spool(allow_volatile=True), settings.Dedup(), ['postgres'],"
        " SystemClock())\n"
        "except SpoolLocked as exc: print('locked', exc)\n"
    )
    async with spool_at(tmp_path) as spool:
        out = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", code, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert out.stdout.startswith("locked spool.directory: "), out
        await put(spool, records(1))
    async with spool_at(tmp_path):
        pass


async def test_a_second_spool_in_the_same_process_is_refused(tmp_path):
    """The lock also holds within a process."""
    async with spool_at(tmp_path):
        with pytest.raises(SpoolLocked, match="in use"):
            open_spool(tmp_path)


async def test_a_newer_schema_is_refused_with_one_line(tmp_path):
    """A file of a later sidecar is left alone."""
    async with spool_at(tmp_path) as spool:
        await put(spool, records(1))
    with sqlite3.connect(tmp_path / "spool.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(SpoolRefused, match="schema version 99"):
        open_spool(tmp_path)


async def test_somebody_elses_file_is_refused(tmp_path):
    """An SQLite file that is no spool is not touched."""
    with sqlite3.connect(tmp_path / "spool.db") as connection:
        connection.execute("PRAGMA page_size = 4096")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        connection.execute("CREATE TABLE theirs(x)")
    connection.close()
    with pytest.raises(SpoolRefused, match="not a spool"):
        open_spool(tmp_path)


MOUNTS = """21 1 254:0 / / rw,relatime - ext4 /dev/vda rw
22 21 0:20 / /run rw - tmpfs tmpfs rw
23 21 0:21 / /var/lib/my\\040disk rw - xfs /dev/vdb rw
24 21 0:22 / /net rw shared:5 master:1 - nfs4 server:/x rw
25 21 0:23 / /run/deep rw - ext4 /dev/vdc rw
26 21 0:24 / /run/deep rw - overlay overlay rw
"""


PLACES = {
    "/data": "ext4",
    "/run/x": "tmpfs",
    "/var/lib/my disk/s": "xfs",
    "/net/a": "nfs4",
    "/run/deep": "overlay",
}


@pytest.mark.parametrize(("path", "kind"), PLACES.items())
def test_the_file_system_of_a_directory_is_found(tmp_path, path, kind):
    """The longest mount point counts, and of equals the last."""
    (tmp_path / "mountinfo").write_text(MOUNTS)
    assert disk.file_system(Path(path), tmp_path / "mountinfo") == kind


def test_a_file_system_that_forgets_is_refused(tmp_path):
    """tmpfs, overlay and NFS give no durability; a test may insist."""
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(f"21 1 254:0 / {tmp_path} rw - tmpfs tmpfs rw\n")
    with pytest.raises(SpoolRefused, match="is on tmpfs"):
        disk.require_durable(tmp_path, allow_volatile=False, mountinfo=mountinfo)
    disk.require_durable(tmp_path, allow_volatile=True, mountinfo=mountinfo)
    mountinfo.write_text(f"21 1 254:0 / {tmp_path} rw - ext4 /dev/vda rw\n")
    disk.require_durable(tmp_path, allow_volatile=False, mountinfo=mountinfo)
    disk.require_durable(tmp_path, allow_volatile=False, mountinfo=tmp_path / "not on this system")


async def test_a_directory_that_is_a_file_is_refused(tmp_path):
    """One clear line, no traceback of the operating system's."""
    (tmp_path / "spool").write_text("")
    with pytest.raises(SpoolRefused, match=r"spool\.directory"):
        open_spool(tmp_path / "spool")


async def test_the_file_shrinks_when_it_is_idle(tmp_path):
    """After an outage the free pages are given back."""
    async with spool_at(tmp_path) as spool:
        for _ in range(40):
            await put(spool, records(20, size=16 * KIB))
        for store in ("postgres", "dynamodb"):
            await deliver(spool, store)
        await flushed(spool)
        await until(lambda: (tmp_path / "spool.db").stat().st_size < 6 * MIB)

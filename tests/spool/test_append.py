"""Append and deliver: what a receipt means, what a cursor hands out, what the counters say."""

import asyncio
import sqlite3
import stat

import pytest

from sidecar.errors import Busy, SpoolFailed
from sidecar.settings import MIB, Dedup
from sidecar.spool import Seen
from tests.spool.harness import (
    BOTH,
    DUAL,
    DYNAMO,
    SQL_ONLY,
    ManualClock,
    balanced,
    crash_copy,
    dead,
    deliver,
    flushed,
    open_spool,
    put,
    record,
    records,
    settings,
    spool_at,
    take,
    until,
)

PRAGMAS = ("journal_mode", "synchronous", "locking_mode", "auto_vacuum", "secure_delete", "page_size")


async def test_an_appended_record_is_in_the_file_when_append_returns(tmp_path):
    """A crash right after the answer keeps the record."""
    async with spool_at(tmp_path / "a") as spool:
        batch = records(3)
        await put(spool, batch)
        copy = crash_copy(tmp_path / "a", tmp_path / "b")
    async with spool_at(copy) as again:
        assert again.recovery.unclean
        assert again.recovery.messages == ()
        assert await deliver(again, "postgres") == batch
        assert await deliver(again, "dynamodb") == batch


async def test_each_store_gets_each_record_it_is_owed_once(tmp_path):
    """Two cursors go their own ways; what is owed to one store alone is not handed to the other."""
    async with spool_at(tmp_path) as spool:
        sql, both, dynamo = records(2), records(3), records(4)
        for batch, obligation in ((sql, SQL_ONLY), (both, BOTH), (dynamo, DYNAMO)):
            await put(spool, batch, obligation)
        assert await deliver(spool, "postgres") == [*sql, *both]
        assert await deliver(spool, "dynamodb") == [*both, *dynamo]
        assert spool.counters("postgres").owed == 5
        assert spool.counters("dynamodb").owed == 7


async def test_concurrent_appends_share_commits_but_each_is_whole(tmp_path):
    """Appends that wait together land in shared frames; every record is there once."""
    async with spool_at(tmp_path) as spool:
        batches = [records(7) for _ in range(50)]
        receipts = await asyncio.gather(*(put(spool, b) for b in batches))
        assert len({seq for r in receipts for seq in r.seqs}) < 50
        got = await deliver(spool, "postgres")
        assert sorted(r.log_id for r in got) == sorted(r.log_id for b in batches for r in b)


async def test_obligations_do_not_mix_in_a_frame(tmp_path):
    """Records of different phases that commit together are in different frames."""
    async with spool_at(tmp_path) as spool:
        one, two = await asyncio.gather(put(spool, records(2), DUAL), put(spool, records(2), BOTH))
        assert not set(one.seqs) & set(two.seqs)
        frames = await take(spool, "dynamodb")
        assert sorted((f.phase, f.required) for f in frames) == [(1, False), (2, True)]
        for frame in frames:
            spool.cursor("dynamodb").settle(frame)


async def test_a_large_append_is_split_over_frames_of_one_commit(tmp_path):
    """2,500 records are three frames, in order, under one receipt."""
    async with spool_at(tmp_path) as spool:
        batch = records(2_500)
        receipt = await put(spool, batch)
        assert len(receipt.seqs) == 3
        assert await deliver(spool, "postgres") == batch


async def test_a_frame_is_at_most_four_mebibytes_or_one_record(tmp_path):
    """Records of 350 KB: a frame holds what fits; take hands out at least one whatever its bounds."""
    async with spool_at(tmp_path) as spool:
        batch = records(30, size=350_000)
        await put(spool, batch)
        (frame,) = await spool.cursor("postgres").take(1, 1)
        assert sum(frame.sizes) <= 4 * MIB
        assert len(frame.records) == 11
        spool.cursor("postgres").settle(frame)
        assert [*frame.records, *await deliver(spool, "postgres")] == batch


async def test_take_keeps_to_its_bounds(tmp_path):
    """Take hands out whole frames up to the numbers asked for."""
    async with spool_at(tmp_path) as spool:
        for _ in range(5):
            await put(spool, records(10))
        assert sum(len(f.records) for f in await spool.cursor("postgres").take(25, MIB)) == 20
        assert sum(len(f.records) for f in await spool.cursor("postgres").take(100, 700)) == 10


async def test_take_waits_for_a_record(tmp_path):
    """A cursor with nothing to do wakes up when something is committed."""
    async with spool_at(tmp_path) as spool:
        waiting = asyncio.ensure_future(take(spool, "postgres"))
        await asyncio.sleep(0)
        batch = records(1)
        await put(spool, batch)
        (frame,) = await waiting
        assert frame.records == batch


async def test_a_cancelled_take_loses_nothing(tmp_path):
    """What a cancelled take would have handed out, the next one does."""
    async with spool_at(tmp_path, settings=settings(tail_cache_bytes=0)) as spool:
        batch = records(3)
        await put(spool, batch)
        for _ in range(5):
            task = asyncio.ensure_future(spool.cursor("postgres").take(10, MIB))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert await deliver(spool, "postgres") == batch


async def test_a_store_that_keeps_up_never_reads_the_file(tmp_path, monkeypatch):
    """Frames in the tail cache are handed out without a query; without the cache they are read."""
    async with spool_at(tmp_path) as spool:
        batch = records(5)
        await put(spool, batch)

        async def no_read(run):
            raise AssertionError("the file was read")

        with monkeypatch.context() as patched:
            patched.setattr(spool, "read", no_read)
            assert await deliver(spool, "postgres") == batch
            spool.tail.drop(1)
            spool.tail.first = 2
            with pytest.raises(AssertionError):
                await deliver(spool, "dynamodb")
        assert await deliver(spool, "dynamodb") == batch


async def test_a_store_far_behind_keeps_no_memory_and_the_other_one_still_never_reads_the_file(tmp_path, monkeypatch):
    """The cache is trimmed to what the store that keeps up has yet to take; the other one gets everything, in order."""
    limit = 40_000
    async with spool_at(tmp_path, settings=settings(tail_cache_bytes=limit)) as spool:

        async def no_read(run):
            raise AssertionError("the file was read")

        everything = []
        with monkeypatch.context() as patched:
            patched.setattr(spool, "read", no_read)
            for _ in range(60):
                batch = records(10, size=200)
                everything += batch
                await put(spool, batch)
                assert await deliver(spool, "postgres") == batch
        assert spool.counters("dynamodb").pending_bytes > 4 * limit
        assert spool.tail.size < limit // 2
        assert await deliver(spool, "dynamodb") == everything
        with monkeypatch.context() as patched:  # both keep up again
            patched.setattr(spool, "read", no_read)
            batch = records(10)
            await put(spool, batch)
            assert [await deliver(spool, store) for store in ("postgres", "dynamodb")] == [batch, batch]


async def test_records_come_back_from_the_file_as_they_went_in(tmp_path):
    """Without a cache, in batches smaller than the backlog, everything is read back in order."""
    async with spool_at(tmp_path, settings=settings(tail_cache_bytes=0)) as spool:
        batch = records(300, size=900)
        for i in range(0, 300, 10):
            await put(spool, batch[i : i + 10], BOTH if i % 20 else SQL_ONLY)
        got = []
        while len(got) < 300:
            for frame in await spool.cursor("postgres").take(35, 64_000):
                got += frame.records
                spool.cursor("postgres").settle(frame)
        assert got == batch


async def test_a_frame_leaves_the_file_when_all_have_settled_it_and_not_before(tmp_path):
    """One store's settling keeps the frame; the other's deletes it."""
    async with spool_at(tmp_path) as spool:
        await put(spool, records(3))
        await deliver(spool, "postgres")
        await flushed(spool)
        count = "SELECT count(*) FROM frames"
        assert (await spool.read(lambda c: c.execute(count).fetchone())) == (1,)
        await deliver(spool, "dynamodb")
        await flushed(spool)
        assert (await spool.read(lambda c: c.execute(count).fetchone())) == (0,)


async def test_marks_reach_the_file_by_themselves(tmp_path):
    """Without further appends a settled frame is written down before long."""
    async with spool_at(tmp_path) as spool:
        await put(spool, records(3), SQL_ONLY)
        await deliver(spool, "postgres")
        await until(lambda: not spool.ledger.dirty)
        await flushed(spool)
        copy = crash_copy(tmp_path, tmp_path.with_name("copy"))
    async with spool_at(copy) as again:
        assert again.counters("postgres").delivered == 3
        assert again.counters("postgres").pending == 0


async def test_marks_that_a_crash_lost_are_delivered_again(tmp_path):
    """A frame settled in memory only is handed out again, and the identity holds."""
    async with spool_at(tmp_path / "a") as spool:
        batch = records(4)
        await put(spool, batch)
        await flushed(spool)
        for frame in await take(spool, "postgres"):
            spool.cursor("postgres").settle(frame, [dead(0)])
        copy = crash_copy(tmp_path / "a", tmp_path / "b")
        assert spool.counters("postgres").dead_lettered == 1
    async with spool_at(copy) as again:
        assert again.counters("postgres").pending == 4
        assert balanced(again.counters("postgres"))
        assert await deliver(again, "postgres") == batch


async def test_out_of_order_settling_survives_a_restart(tmp_path):
    """Frames settled ahead of an unsettled one are not handed out again; the unsettled one is."""
    async with spool_at(tmp_path) as spool:
        batches = [records(2) for _ in range(5)]
        for batch in batches:
            await put(spool, batch)
        frames = await take(spool, "postgres")
        for i in (1, 2, 4):
            spool.cursor("postgres").settle(frames[i])
    async with spool_at(tmp_path) as again:
        assert await deliver(again, "postgres") == [*batches[0], *batches[3]]
        assert again.counters("postgres").delivered == 10


async def test_an_emptied_spool_goes_on_counting_up(tmp_path):
    """Trap 1: after everything was trimmed and the file reopened, new frames do not look settled."""
    async with spool_at(tmp_path) as spool:
        first = await put(spool, records(5))
        for store in ("postgres", "dynamodb"):
            await deliver(spool, store)
    async with spool_at(tmp_path) as again:
        batch = records(2)
        second = await put(again, batch)
        assert second.seqs[0] > first.seqs[0]
        assert await deliver(again, "postgres") == batch


async def test_settling_a_frame_twice_is_an_error(tmp_path):
    """A frame that is not in the consumer's hands cannot be settled."""
    async with spool_at(tmp_path) as spool:
        await put(spool, records(1))
        (frame,) = await take(spool, "postgres")
        spool.cursor("postgres").settle(frame)
        with pytest.raises(ValueError, match="not taken"):
            spool.cursor("postgres").settle(frame)


async def test_counters_say_where_everything_is(tmp_path):
    """Owed, delivered, pending with bytes and age, dead letters; at once, and the same after a restart."""
    async with spool_at(tmp_path) as spool:
        await put(spool, records(10))
        before = spool.counters("postgres")
        assert (before.owed, before.pending) == (10, 10)
        assert before.pending_bytes > 0
        assert before.oldest_pending_us is not None
        (frame,) = await take(spool, "postgres")
        spool.cursor("postgres").settle(frame, [dead(2), dead(3)])
        after = spool.counters("postgres")
        assert (after.owed, after.delivered, after.pending, after.dead_lettered) == (10, 8, 0, 2)
        assert after.oldest_pending_us is None
        assert after.dead_letter_bytes > 0
        dynamo = spool.counters("dynamodb")
    async with spool_at(tmp_path) as again:
        assert again.counters("postgres") == after
        assert again.counters("dynamodb") == dynamo
        assert again.recovery.unclean is False


async def test_wait_settled_waits_for_the_named_stores_only(tmp_path):
    """A receipt is settled when every named store that is owed has settled its frames."""
    async with spool_at(tmp_path) as spool:
        receipt = await put(spool, records(3))
        waiting = asyncio.ensure_future(spool.wait_settled(receipt, frozenset({"postgres"})))
        await asyncio.sleep(0)
        assert not waiting.done()
        await deliver(spool, "postgres")
        await asyncio.wait_for(waiting, 5)
        both = asyncio.ensure_future(spool.wait_settled(receipt, frozenset({"postgres", "dynamodb"})))
        await asyncio.sleep(0)
        assert not both.done()
        both.cancel()
        await asyncio.gather(both, return_exceptions=True)
        assert not spool.awaited("dynamodb").is_set()
        assert spool._waiters._futures == {}
        other = await put(spool, records(1), SQL_ONLY)
        await deliver(spool, "postgres")
        await asyncio.wait_for(spool.wait_settled(other, frozenset({"postgres", "dynamodb"})), 5)


async def test_the_dedup_window_comes_back(tmp_path):
    """Pairs stored with their records are there after a crash, oldest first, with a whole window to live."""
    pairs = [Seen(bytes([i]) * 16, bytes([i + 100]) * 16) for i in range(5)]
    async with spool_at(tmp_path / "a") as spool:
        await put(spool, records(2), seen=pairs[:3])
        await put(spool, records(2), seen=pairs[3:])
        assert spool.state().dedup_ids == 5
        copy = crash_copy(tmp_path / "a", tmp_path / "b")
    async with spool_at(copy) as again:
        assert [(s.log_id, s.content) for s in again.window()] == [(s.log_id, s.content) for s in pairs]
        assert all(s.expires_us > 0 for s in again.window())


async def test_the_dedup_window_is_trimmed_by_count_and_by_age(tmp_path):
    """Whole commits leave it when there are more than max_ids newer pairs, or when they are older than the window."""
    clock = ManualClock()
    async with spool_at(tmp_path, clock=clock, dedup=Dedup(max_ids=6, window=60.0)) as spool:
        for i in range(10):
            await put(spool, records(1), seen=[Seen(bytes([i]) * 16, bytes(16)), Seen(bytes([i + 50]) * 16, bytes(16))])
        assert spool.state().dedup_ids == 6
        clock.pass_time(61)
        await put(spool, records(1), seen=[Seen(b"z" * 16, bytes(16))])
        assert spool.state().dedup_ids == 1
    async with spool_at(tmp_path) as again:
        assert [s.log_id for s in again.window()] == [b"z" * 16]


async def test_directory_and_files_are_private(tmp_path):
    """The directory is 0700 and every file 0600, whatever the umask was."""
    async with spool_at(tmp_path / "spool", settings=settings(ballast_bytes=MIB)) as spool:
        await put(spool, records(1))
        directory = tmp_path / "spool"
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in directory.iterdir()}
        assert {"spool.db", "spool.db-wal", "lock", "position", "ballast"} <= modes.keys()
        assert set(modes.values()) == {0o600}


async def test_nothing_is_accepted_after_close(tmp_path):
    """A closed spool refuses; what was undelivered is there at the next start."""
    spool = open_spool(tmp_path)
    batch = records(2)
    await put(spool, batch)
    await spool.close()
    with pytest.raises(SpoolFailed):
        await put(spool, records(1))
    await spool.close()
    async with spool_at(tmp_path) as again:
        assert not again.recovery.unclean
        assert await deliver(again, "postgres") == batch


async def test_appending_nothing_or_to_nobody_is_an_error(tmp_path):
    """No records, no store, a store that is not known: the caller's mistake, nothing stored."""
    async with spool_at(tmp_path, stores=("postgres",)) as spool:
        with pytest.raises(ValueError, match="no records"):
            await put(spool, [])
        with pytest.raises(KeyError):
            await put(spool, [record()], BOTH)
        assert spool.counters("postgres").owed == 0


async def test_too_much_waiting_in_memory_is_pushed_back(tmp_path):
    """Appends that no commit takes are bounded in bytes."""
    async with spool_at(tmp_path) as spool:
        spool._admission.waiting = 70 * MIB
        with pytest.raises(Busy) as caught:
            await put(spool, records(1))
        assert caught.value.reason == "spool_slow"
        spool._admission.waiting = 0
        await put(spool, records(1))


async def test_pragmas_are_what_the_promise_needs(tmp_path):
    """The settings that every open must make are in force, also at the second open."""
    for _ in range(2):
        async with spool_at(tmp_path) as spool:
            seen = await spool.read(lambda c: [c.execute(f"PRAGMA {n}").fetchone()[0] for n in PRAGMAS])
            assert seen == ["wal", 2, "exclusive", 2, 0, 4096]
            limit = await spool.read(lambda c: c.execute("PRAGMA max_page_count").fetchone()[0])
            assert limit == settings().cap_bytes // 4096
            assert sqlite3.threadsafety >= 1

"""What a store did not take: deferred, dead letters, refused at the door; and what became of single records."""

import asyncio

import pytest

from sidecar.settings import MIB
from tests.spool.harness import (
    BOTH,
    DUAL,
    FENCED,
    SQL_ONLY,
    ManualClock,
    balanced,
    crash_copy,
    dead,
    deliver,
    flushed,
    later,
    put,
    records,
    settings,
    spool_at,
    take,
)


async def settle_with(spool, store, *leftovers):
    """Take the one frame there is and settle it with leftovers."""
    (frame,) = await take(spool, store)
    spool.cursor(store).settle(frame, leftovers)
    return frame


async def test_a_dead_letter_has_its_own_copy_of_the_record(tmp_path):
    """The frame is trimmed, the dead letter stays, with class, reason, attempts and phase."""
    async with spool_at(tmp_path) as spool:
        batch = records(3)
        await put(spool, batch, SQL_ONLY)
        await settle_with(spool, "postgres", dead(1, "conflict", "other content"))
        (letter,) = await spool.dead_letters()
        assert (letter.record, letter.store, letter.retry_class) == (batch[1], "postgres", "conflict")
        assert (letter.reason, letter.code, letter.attempts, letter.phase) == ("other content", "22001", 1, 0)
        assert letter.log_id == batch[1].log_id
        assert letter.size > 0
        assert spool.dead_letter_counts() == {("postgres", "conflict"): 1}
        await flushed(spool)
        assert (await spool.read(lambda c: c.execute("SELECT count(*) FROM frames").fetchone())) == (0,)


async def test_dead_letters_survive_restarts_unchanged(tmp_path):
    """Three restarts later the entries are identical."""
    async with spool_at(tmp_path) as spool:
        await put(spool, records(5), SQL_ONLY)
        await settle_with(spool, "postgres", dead(0), dead(4, "conflict"))
        letters = await spool.dead_letters()
    for _ in range(3):
        async with spool_at(tmp_path) as again:
            assert await again.dead_letters() == letters
            assert again.dead_letter_counts() == {("postgres", "permanent"): 1, ("postgres", "conflict"): 1}
            assert balanced(again.counters("postgres"))


async def test_dead_letters_come_in_pages_and_by_filter(tmp_path):
    """Pages follow the key; store and class select."""
    async with spool_at(tmp_path) as spool:
        await put(spool, records(6), BOTH)
        await settle_with(spool, "postgres", *(dead(i) for i in range(4)))
        await settle_with(spool, "dynamodb", dead(0, "conflict"))
        first = await spool.dead_letters(limit=3)
        rest = await spool.dead_letters(after=first[-1].key, limit=3)
        assert len(first) == 3
        assert len(rest) == 2
        assert [d.store for d in await spool.dead_letters(store="dynamodb")] == ["dynamodb"]
        assert len(await spool.dead_letters(retry_class="permanent")) == 4


async def test_a_deferred_record_is_due_at_its_time_and_once(tmp_path):
    """It is pending meanwhile; handed out when its time has come, not again before it is finished."""
    clock = ManualClock()
    async with spool_at(tmp_path, clock=clock) as spool:
        batch = records(2)
        await put(spool, batch, SQL_ONLY)
        await settle_with(spool, "postgres", later(1, clock.now_us() + 5_000_000))
        assert spool.counters("postgres").pending == 1
        assert spool.next_due_us("postgres") == clock.now_us() + 5_000_000
        assert await spool.due("postgres", clock.now_us(), 10) == []
        clock.pass_time(6)
        (item,) = await spool.due("postgres", clock.now_us(), 10)
        assert (item.record, item.attempts, item.retry_class, item.phase) == (batch[1], 1, "unknown", 0)
        assert await spool.due("postgres", clock.now_us(), 10) == []
        assert spool.next_due_us("postgres") is None
        await spool.finish_deferred(item, None)
        counters = spool.counters("postgres")
        assert (counters.delivered, counters.pending) == (2, 0)
        with pytest.raises(ValueError, match="not handed out"):
            await spool.finish_deferred(item, None)
    async with spool_at(tmp_path, clock=clock) as again:
        assert again.counters("postgres") == counters
        assert again.recovery.messages == ()


async def test_a_deferred_record_may_be_deferred_again_or_die(tmp_path):
    """Attempts and reason are kept; the identity holds after each step."""
    clock = ManualClock()
    async with spool_at(tmp_path, clock=clock) as spool:
        await put(spool, records(1), SQL_ONLY)
        await settle_with(spool, "postgres", later(0, clock.now_us()))
        (item,) = await spool.due("postgres", clock.now_us(), 10)
        again = later(0, clock.now_us() + 1_000_000)
        await spool.finish_deferred(item, type(again)(0, "deferred", "unknown", "still odd", "", 2, again.due_us))
        clock.pass_time(2)
        (item,) = await spool.due("postgres", clock.now_us(), 10)
        assert (item.attempts, item.reason) == (2, "still odd")
        await spool.finish_deferred(item, dead(0, "unknown"))
        counters = spool.counters("postgres")
        assert (counters.pending, counters.dead_lettered) == (0, 1)
        assert balanced(counters)


async def test_a_jump_of_the_wall_clock_changes_no_retry(tmp_path):
    """Two days back or ten years ahead: due after the same seconds as without the jump."""
    for jump in (-2 * 86_400, 10 * 365 * 86_400):
        clock = ManualClock()
        async with spool_at(tmp_path / str(jump), clock=clock) as spool:
            await put(spool, records(1), SQL_ONLY)
            await settle_with(spool, "postgres", later(0, clock.now_us() + 5_000_000))
            clock.wall_us += jump * 1_000_000
            assert await spool.due("postgres", clock.now_us(), 1) == []
            assert spool.next_due_us("postgres") == clock.now_us() + 5_000_000
            clock.pass_time(5)
            assert len(await spool.due("postgres", clock.now_us(), 1)) == 1


async def test_deferred_records_are_due_at_once_after_a_restart(tmp_path):
    """What the old process's clock meant is unknown, so nothing waits for it."""
    clock = ManualClock()
    async with spool_at(tmp_path, clock=clock) as spool:
        await put(spool, records(1), SQL_ONLY)
        await settle_with(spool, "postgres", later(0, clock.now_us() + 3_600_000_000))
    clock.wall_us -= 86_400_000_000
    async with spool_at(tmp_path, clock=clock) as again:
        assert len(await again.due("postgres", clock.now_us(), 1)) == 1


async def test_redrive_makes_dead_letters_due_now(tmp_path):
    """By key, by class, or all; an audit line is written in the same transaction; delivery removes the entry."""
    async with spool_at(tmp_path) as spool:
        await put(spool, records(4), SQL_ONLY)
        await settle_with(spool, "postgres", dead(0), dead(1), dead(2, "conflict"))
        letters = await spool.dead_letters()
        assert await spool.redrive([letters[0].key], who="me", reason="mended") == 1
        assert await spool.redrive(store="postgres", retry_class="permanent") == 1
        assert await spool.redrive() == 1
        assert await spool.redrive() == 0
        assert spool.counters("postgres").pending == 3
        for item in await spool.due("postgres", 1 << 60, 10):
            await spool.finish_deferred(item, None)
        assert spool.counters("postgres").delivered == 4
        assert await spool.dead_letters() == []
        trail = await spool.audit_trail()
        assert [line.what for line in trail] == ["redrive"] * 3
        assert (trail[-1].who, trail[-1].why) == ("me", "mended")


async def test_what_is_due_comes_in_bounded_portions(tmp_path):
    """However many were redriven: no more bytes at once than are asked for, one record at least, each of them once."""
    async with spool_at(tmp_path) as spool:
        batch = records(12, size=10_000)
        await put(spool, batch, SQL_ONLY)
        await settle_with(spool, "postgres", *(dead(i) for i in range(12)))
        assert await spool.redrive() == 12
        came = []
        while spool.counters("postgres").pending:
            items = await spool.due("postgres", 1 << 60, 10, 35_000)
            came += [item.record.log_id for item in items]
            assert len(items) == 3
            assert sum(item.size for item in items) <= 35_000
            held = await spool.due("postgres", 1 << 60, 10, 5_000)
            assert len(held) == (1 if len(came) < 12 else 0), "a record that is larger than the bound comes alone"
            came += [item.record.log_id for item in held]
            for item in (*items, *held):
                await spool.finish_deferred(item, None)
        assert sorted(came) == sorted(r.log_id for r in batch)


async def test_discard_needs_a_reason_and_leaves_a_trace(tmp_path):
    """Without who or reason nothing happens; with them the record counts as discarded and its status says so."""
    async with spool_at(tmp_path) as spool:
        batch = records(2)
        await put(spool, batch, SQL_ONLY)
        await settle_with(spool, "postgres", dead(0))
        with pytest.raises(ValueError, match="reason"):
            await spool.discard(who="me", reason=" ")
        assert await spool.discard(who="me", reason="test data") == 1
        counters = spool.counters("postgres")
        assert (counters.discarded, counters.dead_lettered, counters.dead_letter_bytes) == (1, 0, 0)
        status = await spool.status(batch[0].log_id)
        assert status is not None
        assert status.stores == {"postgres": "discarded"}
        (line,) = await spool.audit_trail()
        assert (line.who, line.what, line.why) == ("me", "discard", "test data")
    async with spool_at(tmp_path) as again:
        assert again.counters("postgres") == counters


async def test_refused_records_have_a_quota_of_their_own(tmp_path):
    """What fits is kept with field and reason, the rest is only counted by the caller; they can be discarded."""
    small = settings(cap_bytes=16 * MIB, refused_share=0.001)
    async with spool_at(tmp_path, settings=small) as spool:
        assert await spool.refuse([(b'{"x":1}', "x", "unknown field")]) == 1
        assert await spool.refuse([(bytes(20_000), "body", "too large")]) == 0
        (letter,) = await spool.dead_letters(store="door")
        assert (letter.raw, letter.code, letter.reason, letter.record) == (b'{"x":1}', "x", "unknown field", None)
        assert spool.dead_letter_counts() == {("door", "refused"): 1}
        assert await spool.redrive() == 0
        assert await spool.discard([letter.key], who="me", reason="seen") == 1
        assert spool.dead_letter_counts() == {}


async def test_status_follows_a_record(tmp_path):
    """Pending, delivered, dead; in the cache, in the file, and for a short while after it left; then None."""
    async with spool_at(tmp_path, settings=settings(tail_cache_bytes=0)) as spool:
        batch = records(3)
        await put(spool, batch, DUAL)
        await put(spool, records(3), DUAL)

        async def stores(n):
            return (await spool.status(batch[n].log_id)).stores

        assert await stores(0) == {"postgres": "pending", "dynamodb": "pending"}
        frames = await take(spool, "postgres")
        spool.cursor("postgres").settle(frames[0], [dead(1), later(2)])
        assert await stores(0) == {"postgres": "delivered", "dynamodb": "pending"}
        assert await stores(1) == {"postgres": "dead_lettered", "dynamodb": "pending"}
        assert await stores(2) == {"postgres": "deferred", "dynamodb": "pending"}
        await deliver(spool, "dynamodb")
        await flushed(spool)
        assert await stores(0) == {"postgres": "delivered", "dynamodb": "delivered"}
        assert await stores(1) == {"postgres": "dead_lettered", "dynamodb": "delivered"}
        assert (await spool.status(batch[0].log_id)).required == {"postgres"}
        assert await spool.status(records(1)[0].log_id) is None
        assert await spool.status("no uuid") is None
    async with spool_at(tmp_path) as again:
        assert await again.status(batch[0].log_id) is None
        assert (await again.status(batch[1].log_id)).stores == {"postgres": "dead_lettered", "dynamodb": "delivered"}


async def test_fates_of_a_receipt(tmp_path):
    """After waiting, the answer to the client can say what each store did with each record."""
    async with spool_at(tmp_path) as spool:
        batch = records(3)
        receipt = await put(spool, batch, BOTH)
        (frame,) = await take(spool, "postgres")
        waiting = asyncio.ensure_future(spool.wait_settled(receipt, frozenset({"postgres"})))
        spool.cursor("postgres").settle(frame, [dead(0)])
        await waiting
        fates = await spool.fates(receipt, [r.log_id for r in batch])
        assert fates[batch[0].log_id] == {"postgres": "dead_lettered", "dynamodb": "pending"}
        assert fates[batch[1].log_id] == {"postgres": "delivered", "dynamodb": "pending"}


async def test_divergence_counts_what_one_store_has_and_the_other_misses(tmp_path):
    """Pending, dead, redriven, discarded: the count follows each step, and a restart finds the same."""
    async with spool_at(tmp_path) as spool:
        key = ("postgres", "dynamodb")
        await put(spool, records(10), BOTH)
        await settle_with(spool, "postgres", dead(0))
        await flushed(spool)
        assert spool.divergence()[key] == 9
        assert spool.divergence_oldest_us() is not None
        await settle_with(spool, "dynamodb", dead(0), dead(1), dead(2))
        await flushed(spool)
        assert spool.divergence() == {key: 2, key[::-1]: 0}
        letters = await spool.dead_letters(store="dynamodb")
        await spool.redrive([letters[1].key])
        (item,) = await spool.due("dynamodb", 1 << 60, 5)
        await spool.finish_deferred(item, None)
        assert spool.divergence()[key] == 1
        await spool.redrive([letters[0].key])
        (item,) = await spool.due("dynamodb", 1 << 60, 5)
        await spool.finish_deferred(item, None)
        assert spool.divergence() == {key: 1, key[::-1]: 1}
        await spool.discard(who="me", reason="test")
        expected = spool.divergence()
        assert expected == {key: 1, key[::-1]: 1}
    for _ in range(2):
        async with spool_at(tmp_path) as again:
            assert again.divergence() == expected
            assert (await again.read(lambda c: c.execute("SELECT count(*) FROM leftovers").fetchone())) == (0,)


async def test_strengthened_obligations_are_required_for_ever(tmp_path):
    """Frames accepted before are required for the store, also after a crash; later ones are as they were stamped."""
    async with spool_at(tmp_path / "a") as spool:
        await put(spool, records(3), DUAL)
        assert await spool.strengthen("dynamodb") == 3
        assert await spool.strengthen("dynamodb") == 0
        await put(spool, records(1), DUAL)
        copy = crash_copy(tmp_path / "a", tmp_path / "b")
    async with spool_at(copy) as again:
        assert [f.required for f in await take(again, "dynamodb")] == [True, False]


async def test_unresolved_records_wait_until_they_are_resolved_once(tmp_path):
    """Nobody is handed them; resolving owes them to the phase's stores; the identity holds; a crash changes nothing."""
    async with spool_at(tmp_path / "a") as spool:
        before, fenced = records(2), records(3)
        await put(spool, before, BOTH)
        receipt = await put(spool, fenced, FENCED)
        assert await deliver(spool, "postgres") == before
        assert spool.counters("postgres").owed == 2
        assert (await spool.status(fenced[0].log_id)).stores == {}
        assert await spool.resolve(SQL_ONLY) == 3
        assert await spool.resolve(BOTH) == 0
        assert spool.counters("postgres").owed == 5
        assert spool.counters("dynamodb").owed == 2
        await asyncio.wait_for(spool.wait_settled(receipt, frozenset({"dynamodb"})), 5)
        copy = crash_copy(tmp_path / "a", tmp_path / "b")
        assert await deliver(spool, "postgres") == fenced
        assert await deliver(spool, "dynamodb") == before
        assert balanced(spool.counters("postgres"))
    async with spool_at(copy) as again:
        assert again.recovery.messages == ()
        assert again.counters("postgres").owed == 5
        assert [r.log_id for r in await deliver(again, "postgres")][-3:] == [r.log_id for r in fenced]
        assert balanced(again.counters("postgres"))


async def test_release_takes_only_what_every_required_store_has(tmp_path):
    """Candidates are confirmed by the required store, best-effort, not in the consumer's hands; hours are counted."""
    hour = 3_600_000_000
    async with spool_at(tmp_path) as spool:
        old = [*records(2, at_us=10 * hour), *records(1, at_us=11 * hour)]
        await put(spool, old, DUAL)
        await put(spool, records(5), BOTH)
        await put(spool, records(4), DUAL)
        assert await spool.release_candidates("dynamodb", MIB) is None
        frames = await take(spool, "postgres")
        spool.cursor("postgres").settle(frames[0])
        spool.cursor("postgres").settle(frames[1])
        spool.cursor("postgres").settle(frames[2], [dead(0)])
        plan = await spool.release_candidates("dynamodb", MIB)
        assert plan is not None
        assert (plan.records, plan.hours) == (3, {10: 2, 11: 1})
        assert await spool.release(plan) == 3
        assert await spool.release(plan) == 0
        counters = spool.counters("dynamodb")
        assert (counters.released, counters.pending) == (3, 9)
        assert balanced(counters)
        assert (await spool.status(old[0].log_id)).stores == {"postgres": "delivered", "dynamodb": "released"}
        assert spool.divergence()["postgres", "dynamodb"] == 3 + 5 + 3
        assert len(await deliver(spool, "dynamodb")) == 9
        await flushed(spool)
        assert spool.divergence()["postgres", "dynamodb"] == 3
    async with spool_at(tmp_path) as again:
        assert again.counters("dynamodb").released == 3
        assert again.divergence()["postgres", "dynamodb"] == 3


async def test_a_frame_in_the_consumers_hands_is_not_released(tmp_path):
    """Also when it was taken between the two steps."""
    async with spool_at(tmp_path) as spool:
        await put(spool, records(2), DUAL)
        await deliver(spool, "postgres")
        plan = await spool.release_candidates("dynamodb", MIB)
        frames = await take(spool, "dynamodb")
        assert await spool.release_candidates("dynamodb", MIB) is None
        assert await spool.release(plan) == 0
        spool.cursor("dynamodb").settle(frames[0])
        assert spool.counters("dynamodb").delivered == 2


async def test_meta_and_audit_are_durable(tmp_path):
    """Small values and audit lines survive a crash right after the call."""
    async with spool_at(tmp_path / "a") as spool:
        await spool.set_meta("phase", "dual_write")
        await spool.set_meta("phase", "sql_only")
        await spool.audit("me", "what", "why", "evidence")
        copy = crash_copy(tmp_path / "a", tmp_path / "b")
    async with spool_at(copy) as again:
        assert again.meta("phase") == "sql_only"
        assert again.meta("nothing") is None
        (line,) = await again.audit_trail()
        assert (line.who, line.what, line.why, line.evidence) == ("me", "what", "why", "evidence")

"""Delivery of one store: the real spool and the reference store, with what stores really answer put in between."""

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from sidecar import settings
from sidecar import shipper as shipper_module
from sidecar.clock import SystemClock
from sidecar.dead_letter import Brake
from sidecar.errors import RetryClass, StoreError
from sidecar.metrics import Metrics
from sidecar.phase import POSTGRES
from sidecar.record import LogRecord, encode
from sidecar.retry import State
from sidecar.shipper import Shipper
from sidecar.spool import Obligation, Spool
from sidecar.stores.base import Failure, WriteLimits, WriteResult
from sidecar.stores.memory import MemoryStore
from tests.parts.sidecar import eventually

OWED = Obligation(0, frozenset({"postgres"}))
QUICK = settings.Retry(delay=0.01, max_delay=0.05, probe_interval=0.05, fk_grace=0.3)


def record(n: int, service: str = "svc") -> LogRecord:
    """A record told from others by its id."""
    log_id = f"00000000-0000-7000-8000-{n:012x}"
    return LogRecord(log_id, n, "INFO", service, "{}", None, 200, True, None, 5, 1_700_000_000_000_000 + n, None, None)


Rule = Callable[[Sequence[LogRecord]], WriteResult | StoreError | None]


class Answering:
    """The reference store behind a rule that may answer in its place; counts calls."""

    def __init__(self, rule: Rule = lambda _: None, limits: WriteLimits | None = None) -> None:
        self.inner = MemoryStore(POSTGRES)
        self.name = POSTGRES
        self.limits = limits or WriteLimits(500, 10**7, 2)
        self.rule = rule
        self.calls: list[int] = []

    async def write(self, batch: Sequence[LogRecord]) -> WriteResult:
        """Ask the rule, then the real thing."""
        self.calls.append(len(batch))
        answer = self.rule(batch)
        if isinstance(answer, StoreError):
            raise answer
        if answer is None:
            return await self.inner.write(batch)
        failed = {f.index for f in answer.failures}
        await self.inner.write([r for i, r in enumerate(batch) if i not in failed])
        return answer

    async def ids(self) -> set[str]:
        """What the store holds."""
        return {entry.log_id async for entry in self.inner.scan(0, 2**60)}


@asynccontextmanager
async def delivering(
    tmp_path: Path, store: Answering, *, full: Callable[[], bool] = lambda: False, retry: settings.Retry = QUICK
) -> AsyncIterator[tuple[Spool, Shipper]]:
    """A running shipper between a real spool and ``store``."""
    clock = SystemClock()
    options = settings.Spool(directory=str(tmp_path), cap_bytes=64 * settings.MIB, ballast_bytes=0, allow_volatile=True)
    spool = Spool.open(tmp_path, options, settings.Dedup(), ["postgres", "dynamodb"], clock)
    shipper = Shipper(
        store,  # type: ignore[arg-type]  (the part of a store that a shipper uses)
        spool,
        retry=lambda: retry,
        dead_letters_full=full,
        clock=clock,
        metrics=Metrics(CollectorRegistry()),
        rng=random.Random(7),
    )
    task = asyncio.create_task(shipper.run())
    try:
        yield spool, shipper
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await spool.close()


async def accept(spool: Spool, records: Sequence[LogRecord]) -> None:
    """Make records durable, owed to one store."""
    await spool.append(records, [encode(r) for r in records], OWED)


async def settled(spool: Spool) -> None:
    """Wait until nothing is pending, then check the account."""
    await eventually(lambda: spool.counters("postgres").pending == 0, what="settled")
    c = spool.counters("postgres")
    assert c.owed == c.delivered + c.pending + c.dead_lettered + c.released + c.discarded + c.quarantined


def refuses(bad: set[str], kind: RetryClass = RetryClass.PERMANENT, code: str = "23514") -> Rule:
    """A store that refuses any call with one of these ids, without saying which."""
    return lambda batch: (
        StoreError("postgres", kind, "check violated", code) if any(r.log_id in bad for r in batch) else None
    )


async def test_one_poison_record_among_500_is_found_alone_in_few_calls(tmp_path):
    """499 delivered, one dead letter, at most 2*log2(500)+2 extra calls."""
    bad = record(321)
    store = Answering(refuses({bad.log_id}))
    async with delivering(tmp_path, store) as (spool, _):
        await accept(spool, [record(i) for i in range(500)])
        await settled(spool)
        assert await store.ids() == {record(i).log_id for i in range(500)} - {bad.log_id}
        (letter,) = await spool.dead_letters(store="postgres", retry_class=None, after=0, limit=10)
        assert (letter.record, letter.retry_class, letter.code) == (bad, "permanent", "23514")
        assert len(store.calls) - 1 <= 2 * math.log2(500) + 2


async def test_poison_spread_over_many_small_frames_is_isolated_too(tmp_path):
    """Sixty frames of one record, three of them poison at first, middle and last place."""
    bad = {record(i).log_id for i in (0, 30, 59)}
    store = Answering(refuses(bad))
    async with delivering(tmp_path, store) as (spool, _):
        await asyncio.gather(*(accept(spool, [record(i)]) for i in range(60)))
        await settled(spool)
        assert len(await store.ids()) == 57
        assert spool.counters("postgres").dead_lettered == 3


async def test_records_gather_and_share_a_call_and_a_lone_one_is_never_held_back(tmp_path, monkeypatch):
    """The first goes at once, the next ten wait for each other, until somebody waits for one of them."""
    monkeypatch.setattr(shipper_module, "_GATHER", 3600.0)
    store = Answering()
    async with delivering(tmp_path, store) as (spool, _):
        await accept(spool, [record(0)])
        await settled(spool)
        assert store.calls == [1]
        for n in range(1, 11):
            receipt = await spool.append([record(n)], [encode(record(n))], OWED)
        assert spool.counters("postgres").pending == 10
        await spool.wait_settled(receipt, frozenset({"postgres"}))
        await settled(spool)
        assert store.calls == [1, 10]
        assert not spool.awaited("postgres").is_set()


async def test_what_fills_a_call_does_not_wait_for_more(tmp_path, monkeypatch):
    """Gathering costs a busy store nothing: full calls follow each other at once."""
    monkeypatch.setattr(shipper_module, "_GATHER", 3600.0)
    store = Answering(limits=WriteLimits(20, 10**7, 2))
    async with delivering(tmp_path, store) as (spool, _):
        for first in range(0, 100, 20):
            await accept(spool, [record(n) for n in range(first, first + 20)])
            await settled(spool)
        assert store.calls == [20] * 5


async def test_a_transient_outage_of_any_length_costs_no_record_and_no_dead_letter(tmp_path):
    """Refused 20 times, then taken: everything is delivered, nothing is dead."""
    store = Answering()
    left = iter(range(20))
    store.rule = lambda _: (
        StoreError("postgres", RetryClass.TRANSIENT, "connection refused") if next(left, None) is not None else None
    )
    async with delivering(tmp_path, store) as (spool, shipper):
        await accept(spool, [record(i) for i in range(2000)])
        await settled(spool)
        assert len(await store.ids()) == 2000
        assert spool.counters("postgres").dead_lettered == 0
        assert shipper.status().state is State.UP


async def test_a_blocked_store_holds_everything_and_goes_on_by_itself(tmp_path):
    """A dropped table: state blocked, no dead letter, and delivery resumes when it is back."""
    store = Answering(lambda _: StoreError("postgres", RetryClass.BLOCKED, "undefined table", "42P01"))
    async with delivering(tmp_path, store) as (spool, shipper):
        await accept(spool, [record(i) for i in range(100)])
        await eventually(lambda: shipper.status().state is State.BLOCKED)
        calls = len(store.calls)
        await eventually(lambda: len(store.calls) >= calls + 3)
        assert set(store.calls[1:]) == {1}
        assert "42P01" in shipper.status().reason
        assert spool.counters("postgres").dead_lettered == 0
        store.rule = lambda _: None
        await settled(spool)
        assert len(await store.ids()) == 100


async def test_throttled_records_are_sent_again_and_count_no_attempt(tmp_path):
    """A store that takes half of every call in the end has everything, and nothing is dead."""
    throttle = RetryClass.THROTTLE
    store = Answering(limits=WriteLimits(25, 10**7, 8))
    store.rule = lambda batch: (
        WriteResult(tuple(Failure(i, throttle, "unprocessed") for i in range(0, len(batch), 2)))
        if len(store.calls) < 40
        else None
    )
    async with delivering(tmp_path, store) as (spool, shipper):
        await accept(spool, [record(i) for i in range(300)])
        await eventually(lambda: shipper.status().state is State.THROTTLED)
        await settled(spool)
        assert len(await store.ids()) == 300
        assert spool.counters("postgres").dead_lettered == 0


async def test_a_conflict_is_a_dead_letter_and_its_neighbours_are_delivered(tmp_path):
    """The same id with other content in the store: dead letter ``conflict``, never overwritten."""
    store = Answering()
    await store.inner.write([record(5, service="first")])
    async with delivering(tmp_path, store) as (spool, _):
        await accept(spool, [record(i, service="second") for i in range(10)])
        await settled(spool)
        assert dict(spool.dead_letter_counts()) == {("postgres", "conflict"): 1}
        kept = await store.inner.get(record(5).log_id)
        assert kept is not None
        assert kept.service_name == "first"


async def test_an_unknown_answer_is_tried_three_times_before_the_dead_letter(tmp_path):
    """retry.attempts counts for answers of unknown meaning, and only for the record itself."""
    bad = record(3)
    store = Answering(refuses({bad.log_id}, RetryClass.UNKNOWN, "??"))
    async with delivering(tmp_path, store) as (spool, _):
        await accept(spool, [record(i) for i in range(8)])
        await settled(spool)
        (letter,) = await spool.dead_letters(store="postgres", retry_class=None, after=0, limit=10)
        assert (letter.retry_class, letter.attempts) == ("unknown", QUICK.attempts)


async def test_a_missing_parent_row_may_come_within_the_grace(tmp_path):
    """23503 is deferred; when the parent comes, the record is delivered and nothing is dead."""
    child = record(1)
    store = Answering(refuses({child.log_id}, code="23503"))
    async with delivering(tmp_path, store) as (spool, _):
        await accept(spool, [record(i) for i in range(4)])
        await eventually(lambda: len(store.calls) > 6)
        assert spool.counters("postgres").dead_lettered == 0
        assert spool.counters("postgres").pending == 1
        store.rule = lambda _: None
        await settled(spool)
        assert len(await store.ids()) == 4


async def test_a_parent_row_that_never_comes_makes_a_dead_letter_after_the_grace(tmp_path):
    """The grace ends: the child is a dead letter, alone."""
    child = record(1)
    store = Answering(refuses({child.log_id}, code="23503"))
    retry = settings.Retry(delay=0.01, max_delay=0.05, probe_interval=0.05, fk_grace=0.01)
    async with delivering(tmp_path, store, retry=retry) as (spool, _):
        await accept(spool, [record(i) for i in range(4)])
        await settled(spool)
        assert dict(spool.dead_letter_counts()) == {("postgres", "permanent"): 1}


async def test_when_most_records_would_die_the_store_is_blocked_instead(tmp_path):
    """The brake: a CHECK that every record breaks makes one state, not a thousand dead letters."""
    store = Answering(lambda _: StoreError("postgres", RetryClass.PERMANENT, "check violated", "23514"))
    async with delivering(tmp_path, store) as (spool, shipper):
        await accept(spool, [record(i) for i in range(1000)])
        await eventually(lambda: shipper.status().state is State.BLOCKED)
        calls = len(store.calls)
        await eventually(lambda: len(store.calls) > calls + 3)
        assert spool.counters("postgres").dead_lettered < 60
        store.rule = lambda _: None
        await eventually(lambda: spool.counters("postgres").pending == 0)
        c = spool.counters("postgres")
        assert c.delivered + c.dead_lettered == 1000


async def test_at_the_bound_of_dead_letters_the_store_is_blocked_and_nothing_is_overwritten(tmp_path):
    """No room for one more dead letter: hold, say so, go on when there is room."""
    room = False
    bad = record(3)
    store = Answering(refuses({bad.log_id}))
    async with delivering(tmp_path, store, full=lambda: not room) as (spool, shipper):
        await accept(spool, [record(i) for i in range(8)])
        await eventually(lambda: shipper.status().state is State.BLOCKED)
        assert "bound" in shipper.status().reason
        assert spool.counters("postgres").dead_lettered == 0
        room = True
        await settled(spool)
        assert spool.counters("postgres").dead_lettered == 1
        assert len(await store.ids()) == 7


async def test_a_redriven_dead_letter_is_delivered_when_the_cause_is_gone(tmp_path):
    """Redrive: the entry goes, the record arrives, the account adds up."""
    bad = record(3)
    store = Answering(refuses({bad.log_id}))
    async with delivering(tmp_path, store) as (spool, _):
        await accept(spool, [record(i) for i in range(8)])
        await settled(spool)
        (letter,) = await spool.dead_letters(store="postgres", retry_class=None, after=0, limit=10)
        store.rule = lambda _: None
        assert await spool.redrive([letter.key]) == 1
        await settled(spool)
        assert await store.ids() == {record(i).log_id for i in range(8)}
        assert spool.counters("postgres").dead_lettered == 0


async def test_large_records_that_are_tried_again_keep_to_the_stores_bounds(tmp_path):
    """A parent row that comes late defers 60 records of 20 KB: no call carries more bytes than the store allows."""

    def refused(batch: Sequence[LogRecord]) -> WriteResult:
        return WriteResult([Failure(i, RetryClass.PERMANENT, "no parent", "23503") for i in range(len(batch))])

    store = Answering(refused, WriteLimits(500, 100_000, 2))
    patient = msgspec.structs.replace(QUICK, fk_grace=3.0)
    async with delivering(tmp_path, store, retry=patient) as (spool, _):
        await accept(spool, [msgspec.structs.replace(record(i), request_data="x" * 20_000) for i in range(60)])
        account = spool.ledger.accounts["postgres"]
        await eventually(lambda: account.deferred == 60, what="deferred")
        store.rule = lambda _: None
        await settled(spool)
        assert len(await store.ids()) == 60
        assert max(store.calls) <= 5


async def test_a_new_run_after_a_bug_hands_out_what_was_not_settled(tmp_path):
    """A run that died in the middle loses memory only; the next one delivers everything."""
    store = Answering()
    clock = SystemClock()
    options = settings.Spool(directory=str(tmp_path), cap_bytes=64 * settings.MIB, ballast_bytes=0, allow_volatile=True)
    spool = Spool.open(tmp_path, options, settings.Dedup(), ["postgres", "dynamodb"], clock)
    bug = ValueError("a bug")

    def broken(_: Sequence[LogRecord]) -> None:
        raise bug

    shipper = Shipper(
        store,  # type: ignore[arg-type]  (the part of a store that a shipper uses)
        spool,
        retry=lambda: QUICK,
        dead_letters_full=lambda: False,
        clock=clock,
        metrics=Metrics(CollectorRegistry()),
        rng=random.Random(7),
    )
    try:
        await accept(spool, [record(i) for i in range(50)])
        store.rule = broken
        with pytest.raises(ExceptionGroup):
            await shipper.run()
        store.rule = lambda _: None
        task = asyncio.create_task(shipper.run())
        await settled(spool)
        assert len(await store.ids()) == 50
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    finally:
        await spool.close()


def test_the_brake_lets_single_poison_pass_and_stops_a_flood():
    """A few dead among many delivered pass; more dead than delivered do not; a delivery releases it."""
    brake = Brake()
    for _ in range(100):
        brake.delivered(5)
        assert brake.allows()
    assert not brake.engaged
    flood = [brake.allows() for _ in range(300)]
    assert not all(flood)
    assert brake.engaged
    brake.delivered(1)
    assert brake.allows()


async def test_at_debug_each_record_that_a_store_has_is_named_and_no_other(tmp_path: Path, caplog) -> None:
    """Once, by its id, without a payload; at info there is no such line."""
    store = Answering(lambda batch: WriteResult((Failure(0, RetryClass.PERMANENT, "no", "23514"),)) if batch else None)
    async with delivering(tmp_path, store) as (spool, _):
        for level, expected in (("DEBUG", [record(2).log_id]), ("INFO", [])):
            with caplog.at_level(level, "sidecar.shipper"):
                caplog.clear()
                await accept(spool, [record(1), record(2)])
                await settled(spool)
                lines = [each for each in caplog.records if each.getMessage() == "delivered"]
                assert [each.log_id for each in lines] == expected  # type: ignore[attr-defined]
                assert all(each.store == "postgres" for each in lines)  # type: ignore[attr-defined]

"""Release of a best-effort store's backlog: a real spool at its least cap, ledgers that fail on command, crashes."""

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.errors import Busy, RetryClass, StoreError
from sidecar.fleet import MemoryFleetStore
from sidecar.gaps import GapLine
from sidecar.overflow import Intent, Overflow
from sidecar.phase import DYNAMODB, POSTGRES, TABLE, Phase
from sidecar.record import LogRecord, encode
from sidecar.spool import Obligation, ReleasePlan, Spool
from tests.parts.sidecar import eventually

OPTIONS = settings.Spool(cap_bytes=16 * settings.MIB, ballast_bytes=0, allow_volatile=True)
WEAK = Obligation(1, frozenset({"postgres"}), frozenset({"dynamodb"}))
STRONG = Obligation(2, frozenset({"postgres", "dynamodb"}))
HOUR_US = 3_600_000_000
KIB_8 = "x" * 8192


class Ledger(MemoryFleetStore):
    """The fleet's reference; ``fault`` may refuse the call, or apply it and lose the answer."""

    def __init__(self) -> None:
        super().__init__(POSTGRES, SystemClock())
        self.fault: str | None = None

    async def put_gaps(self, lines: Sequence[GapLine]) -> None:
        """Fail as told."""
        if self.fault != "refuse":
            await super().put_gaps(lines)
        if self.fault is not None:
            raise StoreError(POSTGRES, RetryClass.TRANSIENT, "planted")

    async def released(self) -> Counter[int]:
        """Hour -> records."""
        found: Counter[int] = Counter()
        for line in await self.gaps():
            assert (line.store, line.kind) == (DYNAMODB, "released")
            found[line.hour] += line.open
        return found


def record(n: int, hour: int = 0) -> LogRecord:
    """About 8 KiB, stamped in an hour."""
    log_id = f"00000000-0000-7000-8000-{n:012x}"
    return LogRecord(log_id, n, "INFO", "svc", KIB_8, None, 200, True, None, 5, hour * HOUR_US + n, None, None)


def opened(directory: Path, options: settings.Spool = OPTIONS) -> Spool:
    """The spool of a directory."""
    return Spool.open(directory, options, settings.Dedup(), ["postgres", "dynamodb"], SystemClock())


@asynccontextmanager
async def watching(
    spool: Spool,
    ledger: Ledger,
    phase: Phase = Phase.DUAL_WRITE,
    *,
    up: bool = True,
    options: settings.Spool = OPTIONS,
) -> AsyncIterator[Overflow]:
    """A running overflow; ``up``: the required stores take records. It ends at rest, with no release half done.

    The ledger is written before the spool lets go: the two are compared after the block, never in it.
    """
    overflow = Overflow(
        spool,
        ledgers={POSTGRES: ledger, DYNAMODB: ledger},
        policy=lambda: TABLE[phase],
        delivering=lambda _: up,
        options=options,
        instance="pod-1",
        clock=SystemClock(),
    )
    relieving, relieve = asyncio.Lock(), overflow._relieve

    async def relieve_undisturbed() -> None:
        async with relieving:
            await relieve()

    overflow._relieve = relieve_undisturbed  # type: ignore[method-assign]
    task = asyncio.create_task(overflow.run())
    try:
        yield overflow
        if task.done():
            task.result()
    finally:
        async with relieving:  # what was begun is finished
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def append(spool: Spool, first: int, count: int, obligation: Obligation = WEAK, *, per_hour: int = 64) -> None:
    """Records of 8 KiB, 8 a frame."""
    for start in range(first, first + count, 8):
        records = [record(n, hour=n // per_hour) for n in range(start, start + 8)]
        await spool.append(records, [encode(r) for r in records], obligation)


async def offer(spool: Spool, overflow: Overflow, first: int, count: int, *, per_hour: int = 64) -> None:
    """Append as intake does, PostgreSQL taking all at once. Raises Busy where nobody makes room."""
    for start in range(first, first + count, 8):
        while True:
            try:
                await append(spool, start, 8, per_hour=per_hour)
            except Busy as busy:
                if busy.reason != "spool_slow" and not await overflow.make_room(busy):  # slow: the disk of the day
                    raise
            else:
                break
        await confirm(spool)
        holds(spool)


async def confirm(spool: Spool, store: str = "postgres") -> None:
    """The store takes all that it is owed."""
    while spool.counters(store).pending:
        for frame in await spool.cursor(store).take(1000, 64 * settings.MIB):
            spool.cursor(store).settle(frame)


def holds(spool: Spool) -> None:
    """The account adds up."""
    for store in ("postgres", "dynamodb"):
        c = spool.counters(store)
        assert c.owed == c.delivered + c.pending + c.dead_lettered + c.released + c.discarded + c.quarantined


async def test_a_backlog_of_twice_the_cap_refuses_nobody_and_is_in_the_ledger_by_hour(tmp_path):
    """Released and pending together are all; the ledger says exactly what was released, hour by hour, oldest first."""
    spool, ledger = opened(tmp_path), Ledger()
    try:
        async with watching(spool, ledger) as overflow:
            await offer(spool, overflow, 0, 4000)
        counters = spool.counters("dynamodb")
        assert counters.released + counters.pending == 4000
        hours = await ledger.released()
        assert hours.total() == counters.released > 2000
        assert all(hours[h] == 64 for h in range(counters.released // 64))
        assert overflow.open_gaps() == {(DYNAMODB, "released"): counters.released}
        (source,) = {line.source.rpartition("/")[0].rpartition("/")[0] for line in await ledger.gaps()}
        assert source == "pod-1"
    finally:
        await spool.close()


async def test_nothing_is_released_while_the_ledger_cannot_be_written_and_all_goes_on_when_it_can(tmp_path):
    """Refused, or applied with the answer lost: 0 released, push-back; afterwards no record is counted twice."""
    spool, ledger = opened(tmp_path), Ledger()
    try:
        for fault in ("refuse", "lose"):
            ledger.fault = fault
            async with watching(spool, ledger) as overflow:
                with pytest.raises(Busy):
                    await offer(spool, overflow, 0, 4000)
                assert spool.counters("dynamodb").released == 0
                assert not await overflow.make_room(Busy("spool_full", "", 1))
        ledger.fault = None
        async with watching(spool, ledger):
            await eventually(lambda: spool.counters("dynamodb").released and spool.state().accepting)
        assert (await ledger.released()).total() == spool.counters("dynamodb").released
        holds(spool)
    finally:
        await spool.close()


@pytest.mark.parametrize("when", ["before the ledger", "after the ledger", "after the release"])
async def test_a_crash_at_each_stage_counts_no_record_twice(tmp_path, when):
    """The process ends between two stages; the next one goes on, and the ledger says what was released in all."""
    spool, ledger = opened(tmp_path), Ledger()
    await append(spool, 0, 1500)
    await confirm(spool)

    class Crashed(Exception):
        """The process is gone."""

    async def crash(*_: object) -> None:
        raise Crashed

    overflow = Overflow(
        spool,
        ledgers={POSTGRES: ledger},
        policy=lambda: TABLE[Phase.DUAL_WRITE],
        delivering=lambda _: True,
        options=OPTIONS,
        instance="pod-1",
        clock=SystemClock(),
    )
    plan = await spool.release_candidates("dynamodb", settings.MIB)
    assert plan is not None
    assert await overflow._release(DYNAMODB, plan, POSTGRES) == plan.records  # an earlier one, whole
    plan = await spool.release_candidates("dynamodb", settings.MIB)
    assert plan is not None
    overflow._ledgers = {POSTGRES: _Crashing(ledger, crash, before=when == "before the ledger")}
    if when == "after the release":
        overflow._ledgers = {POSTGRES: ledger}
        await overflow._release(DYNAMODB, plan, POSTGRES)
    else:
        with contextlib.suppress(Crashed):
            await overflow._release(DYNAMODB, plan, POSTGRES)
    await spool.close()
    spool = opened(tmp_path)
    try:
        async with watching(spool, ledger) as again:
            await offer(spool, again, 1504, 1500)
            await eventually(lambda: spool.counters("dynamodb").released > 3 * plan.records)
        assert (await ledger.released()).total() == spool.counters("dynamodb").released
        holds(spool)
    finally:
        await spool.close()


class _Crashing:
    """A ledger before or after which the process ends."""

    def __init__(self, inner: Ledger, crash, *, before: bool) -> None:
        self._inner = inner
        self._crash = crash
        self._before = before

    async def put_gaps(self, lines: Sequence[GapLine]) -> None:
        """Crash, before or after."""
        if not self._before:
            await self._inner.put_gaps(lines)
        await self._crash()


async def test_what_a_required_store_that_is_down_has_not_confirmed_is_never_released(tmp_path):
    """Both stores behind: the door closes at once, nothing goes; as the required one confirms, room is made."""
    spool, ledger = opened(tmp_path), Ledger()
    try:
        async with watching(spool, ledger, up=False) as overflow:
            with pytest.raises(Busy) as raised:
                await append(spool, 0, 4000)
            assert not await overflow.make_room(raised.value)
            assert spool.counters("dynamodb").released == 0
            assert list(await ledger.gaps()) == []
            await confirm(spool)
            await eventually(lambda: spool.counters("dynamodb").released > 0 and spool.state().accepting)
            holds(spool)
    finally:
        await spool.close()


async def test_a_closed_door_opens_by_itself_although_room_was_made_in_two_parts(tmp_path):
    """Released to just below where releasing begins, nothing more may go, the door is closed; then the rest may."""
    options = msgspec.structs.replace(OPTIONS, low_watermark=0.4)  # wide: the file shrinks in leaps
    spool, ledger = opened(tmp_path, options), Ledger()
    try:
        async with watching(spool, ledger, up=False, options=options) as overflow:
            with pytest.raises(Busy):
                await append(spool, 0, 4000)
            confirmed = 0
            while spool.state().bytes_used >= overflow._start:
                (frame,) = await spool.cursor("postgres").take(8, 1)
                spool.cursor("postgres").settle(frame)
                confirmed += 8
                await eventually(lambda n=confirmed: spool.counters("dynamodb").released == n)
            assert overflow._stop < spool.state().bytes_used
            assert spool.state().busy_reason == "spool_full"
            await confirm(spool)
            await eventually(lambda: spool.state().accepting)
        holds(spool)
    finally:
        await spool.close()


async def test_a_request_waits_while_a_required_store_is_confirming_what_can_be_released_then(tmp_path):
    """The required store is up and behind: no refusal, but a release as soon as it has confirmed."""
    spool, ledger = opened(tmp_path), Ledger()
    try:
        async with watching(spool, ledger) as overflow:
            with pytest.raises(Busy) as raised:
                await append(spool, 0, 4000)
            asked = asyncio.create_task(overflow.make_room(raised.value))
            assert not await settles(asked)
            assert spool.counters("dynamodb").released == 0
            await confirm(spool)
            assert await asked
            assert spool.counters("dynamodb").released > 0
    finally:
        await spool.close()


async def settles(task: asyncio.Task[bool]) -> bool:
    """Whether a task ends within some rounds of the part's poll."""
    await asyncio.wait((task,), timeout=0.3)
    return task.done()


async def test_required_and_strengthened_backlogs_push_back_and_are_never_released(tmp_path):
    """Owed as required from the start, or strengthened since: full means push-back, and no gap is opened."""
    spool, ledger = opened(tmp_path), Ledger()
    try:
        async with watching(spool, ledger, Phase.DUAL_WRITE_READ_DYNAMO) as overflow:
            await append(spool, 0, 800)
            await confirm(spool)
            assert await spool.strengthen("dynamodb") == 800
            with pytest.raises(Busy) as raised:
                await append(spool, 800, 4000, STRONG)
            await confirm(spool)
            assert not await overflow.make_room(raised.value)
            assert spool.counters("dynamodb").released == 0
            assert list(await ledger.gaps()) == []
    finally:
        await spool.close()


@pytest.mark.parametrize("reason", ["disk_full", "spool_slow"])
async def test_no_other_push_back_waits_for_a_release(tmp_path, reason):
    """A full disk and slow commits are not the backlog's doing."""
    spool = opened(tmp_path)
    try:
        async with watching(spool, Ledger()) as overflow:
            assert not await overflow.make_room(Busy(reason, "", 1))
    finally:
        await spool.close()


async def test_a_campaign_ends_before_its_intent_grows_large(tmp_path):
    """A record an hour over 4,800 hours: a second source, no count lost, the intent small."""
    spool, ledger = opened(tmp_path), Ledger()
    try:
        async with watching(spool, ledger) as overflow:
            await offer(spool, overflow, 0, 4800, per_hour=1)
        value = spool.meta("release:dynamodb")
        assert value is not None
        released = spool.counters("dynamodb").released
        assert (await ledger.released()).total() == released
        assert released > 2500
        assert len({line.source for line in await ledger.gaps()}) == 2
        assert len(msgspec.json.decode(value, type=Intent).after) < 2300
    finally:
        await spool.close()


async def test_a_store_that_comes_back_during_a_release_is_not_handed_what_is_being_released(tmp_path):
    """The ledger is exact: reserved frames wait; given up, they are handed out again, each record once."""
    spool = opened(tmp_path)
    try:
        await append(spool, 0, 64)
        await confirm(spool)
        plan = await spool.release_candidates("dynamodb", 200_000)
        assert plan is not None
        assert spool.reserve(plan)
        taken = await spool.cursor("dynamodb").take(1000, 64 * settings.MIB)
        assert not {frame.seq for frame in taken} & set(plan.seqs)
        assert not spool.reserve(ReleasePlan("dynamodb", (taken[0].seq,), {0: 8}, 8, 1))
        spool.unreserve(plan)
        taken = [*taken, *await spool.cursor("dynamodb").take(1000, 64 * settings.MIB)]
        assert sorted(each.application_id for frame in taken for each in frame.records) == list(range(64))
        assert await spool.release(plan) == 0
        for frame in taken:
            spool.cursor("dynamodb").settle(frame)
        assert spool.counters("dynamodb").delivered == 64
    finally:
        await spool.close()


async def test_an_open_gap_is_known_by_store_and_hour_and_the_ledgers_are_read_again_for_it(tmp_path):
    """Another sidecar's line is found though it was written after the last look; neither hour nor store is confused."""
    spool, ledger = opened(tmp_path), Ledger()
    hour = 3_600_000_000
    try:
        async with watching(spool, ledger) as overflow:
            line = GapLine(store=DYNAMODB, kind="released", hour=7, source="pod-2", opened=2)
            await ledger.put_gaps([line])
            assert await overflow.lacks(DYNAMODB, 8 * hour - 1, 8 * hour - 1)
            assert await overflow.lacks(DYNAMODB, 0, 100 * hour)
            assert not await overflow.lacks(DYNAMODB, 8 * hour, 9 * hour)
            assert not await overflow.lacks(DYNAMODB, 0, 7 * hour - 1)
            assert not await overflow.lacks(POSTGRES, 7 * hour, 7 * hour)
    finally:
        await spool.close()


class Jumps(SystemClock):
    """Time that passes only while somebody sleeps."""

    def __init__(self, end: float) -> None:
        self.now = 0.0
        self._end = end
        self.over = asyncio.Event()

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self._end:
            self.over.set()
        await asyncio.sleep(0)


class Slow(Ledger):
    """A ledger that takes some seconds to be read, or is read at once."""

    reads = 0

    def __init__(self, clock: Jumps, takes: float) -> None:
        super().__init__()
        self._jumps = clock
        self._takes = takes

    async def gaps(self):
        self.reads += 1
        self._jumps.now += self._takes
        return await super().gaps()


@pytest.mark.parametrize(
    ("every", "takes", "looks"),
    [(10.0, 0.0, range(115, 121)), (10.0, 1.0, range(11, 13)), (10.0, 60.0, range(4, 5)), (math.inf, 0.0, range(4, 6))],
    ids=["at each heartbeat", "at most a hundredth of the time", "every five minutes at least", "another one looks"],
)
async def test_the_ledgers_are_read_as_often_as_it_costs_little(tmp_path, every, takes, looks):
    """In twenty minutes, of one ledger."""
    spool, clock = opened(tmp_path), Jumps(1200.0)
    ledger = Slow(clock, takes)
    overflow = Overflow(
        spool,
        ledgers={POSTGRES: ledger},
        policy=lambda: TABLE[Phase.SQL_ONLY],
        delivering=lambda _: True,
        options=OPTIONS,
        instance="pod-1",
        clock=clock,
        fleet=SimpleNamespace(looks_every=every, told_gaps=None),
    )
    task = asyncio.create_task(overflow.watch())
    try:
        async with asyncio.timeout(30):
            await clock.over.wait()
        assert ledger.reads in looks
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await spool.close()


async def test_what_another_one_tells_is_shown_instead_of_an_old_look(tmp_path):
    """Also that nothing is open any more."""
    spool, ledger = opened(tmp_path), Ledger()
    try:
        await ledger.put_gaps([GapLine(store=DYNAMODB, kind="history", hour=1, source="x", opened=3)])
        fleet = SimpleNamespace(looks_every=math.inf, told_gaps=None)
        overflow = Overflow(
            spool,
            ledgers={POSTGRES: ledger, DYNAMODB: ledger},
            policy=lambda: TABLE[Phase.SQL_ONLY],
            delivering=lambda _: True,
            options=OPTIONS,
            instance="pod-1",
            clock=SystemClock(),
            fleet=fleet,
        )
        assert await overflow.lacks(DYNAMODB, 3_600_000_000, 3_600_000_001)
        assert overflow.open_gaps() == {(DYNAMODB, "history"): 3}
        fleet.told_gaps = {(DYNAMODB, "history"): 5}
        assert overflow.open_gaps() == {(DYNAMODB, "history"): 5}
        fleet.told_gaps = {}
        assert overflow.open_gaps() == {}
    finally:
        await spool.close()

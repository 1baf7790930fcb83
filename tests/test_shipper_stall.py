"""Delivery never falls asleep: while anything is pending there is a call under way, or the next one has its time.

In virtual time, so that hours of outage take a moment and nothing depends on the machine: the real shipper, regulator
and backlog between a spool that is a list and a store whose weather is drawn: right answers, refusals of every class,
of whole calls and of parts, soon or late. The longest pause between two calls has a bound that follows from the
settings alone; when the weather has cleared everything arrives.
"""

import asyncio
import random
from collections import deque
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from sidecar import settings
from sidecar.errors import RetryClass, StoreError
from sidecar.metrics import Metrics
from sidecar.phase import DYNAMODB
from sidecar.record import LogRecord
from sidecar.retry import Pace, State
from sidecar.shipper import Shipper
from sidecar.spool import Deferred, Frame, Leftover
from sidecar.stores.base import Failure, WriteLimits, WriteResult
from tests.fleet.virtual import TrueClock, VirtualLoop
from tests.test_shipper import record

RETRY = settings.Retry(delay=1.0, max_delay=30.0, probe_interval=30.0)
LATEST = 3.0  # seconds: the slowest answer
WHOLE = (RetryClass.TRANSIENT, RetryClass.THROTTLE, RetryClass.BLOCKED, RetryClass.UNKNOWN)
PARTS = (RetryClass.TRANSIENT, RetryClass.THROTTLE, RetryClass.BLOCKED, RetryClass.UNKNOWN, RetryClass.PERMANENT)
BOUND = LATEST + max(RETRY.max_delay, RETRY.probe_interval) + 1.0  # seconds between two calls; 1 s: ``Rate.delay``


class Listed:
    """The part of a spool that a shipper uses, in memory: frames, and records that are deferred."""

    def __init__(self, clock: TrueClock) -> None:
        self._clock = clock
        self._frames: deque[Frame] = deque()
        self._held: dict[int, Frame] = {}
        self._deferred: dict[int, Deferred] = {}
        self._there = asyncio.Event()
        self._nobody = asyncio.Event()
        self._key = 0
        self.accepted = 0
        self.dead = 0

    @property
    def pending(self) -> int:
        return sum(len(f.records) for f in (*self._frames, *self._held.values())) + len(self._deferred)

    def accept(self, count: int) -> None:
        records = [record(self.accepted + i) for i in range(count)]
        self.accepted += count
        self._key += 1
        self._frames.append(Frame(self._key, 1, True, 0, records, [300] * count, range(count)))
        self._there.set()

    def cursor(self, _store: str) -> "Listed":
        return self

    async def take(self, max_records: int, _max_bytes: int) -> Sequence[Frame]:
        while not self._frames:
            self._there.clear()
            await self._there.wait()
        taken = [self._frames.popleft()]
        while self._frames and len(taken[0].records) + len(self._frames[0].records) <= max_records:
            taken.append(self._frames.popleft())
        self._held.update((frame.seq, frame) for frame in taken)
        return taken

    def settle(self, frame: Frame, leftovers: Sequence[Leftover] = ()) -> None:
        del self._held[frame.seq]
        for leftover in leftovers:
            self._leave(frame.records[leftover.position], leftover)

    def take_back(self, _store: str) -> None:
        self._frames.extendleft(self._held.values())
        self._held.clear()

    def awaited(self, _store: str) -> asyncio.Event:
        return self._nobody

    def next_due_us(self, _store: str) -> int | None:
        return min((item.due_us for item in self._deferred.values()), default=None)

    async def due(self, _store: str, now_us: int, limit: int, _max_bytes: int) -> Sequence[Deferred]:
        return [item for item in self._deferred.values() if item.due_us <= now_us][:limit]

    async def finish_deferred(self, item: Deferred, outcome: Leftover | None) -> None:
        del self._deferred[item.key]
        if outcome is not None:
            self._leave(item.record, outcome)

    def _leave(self, log: LogRecord, why: Leftover) -> None:
        if why.kind == "dead_letter":
            self.dead += 1
            return
        self._key += 1
        self._deferred[self._key] = Deferred(
            self._key, DYNAMODB, log, 0, 0, why.due_us, why.attempts, why.retry_class, why.reason, why.code, 1, 300
        )


class Weather:
    """A store that answers as drawn; notes when it was called."""

    name = DYNAMODB

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        self.limits = WriteLimits(25, 1 << 21, rng.choice((1, 2, 4)))
        self._loop = loop
        self._rng = rng
        self.bad = 0.0  # share of calls that are refused
        self.kinds: Sequence[RetryClass] = WHOLE
        self.calls: list[float] = []
        self.stored: set[str] = set()

    async def write(self, batch: Sequence[LogRecord]) -> WriteResult:
        self.calls.append(self._loop.time())
        await asyncio.sleep(self._rng.choice((0.0, 0.01, self._rng.uniform(0, LATEST))))
        if self._rng.random() >= self.bad:
            self.stored |= {r.log_id for r in batch}
            return WriteResult()
        kind = self._rng.choice(self.kinds)
        if self._rng.random() < 0.5 or kind not in PARTS:
            raise StoreError(DYNAMODB, kind, "weather", "X")
        refused = sorted(self._rng.sample(range(len(batch)), self._rng.randint(1, len(batch))))
        self.stored |= {r.log_id for i, r in enumerate(batch) if i not in refused}
        return WriteResult([Failure(i, self._rng.choice(PARTS), "weather", "X") for i in refused])


def run(loop: VirtualLoop, coroutine: Coroutine[Any, Any, None]) -> None:
    """To the end, and the loop closed."""
    try:
        loop.run_until_complete(coroutine)
    finally:
        loop.close()


class Stand:
    """A shipper at work in a virtual hour."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.loop = VirtualLoop()
        clock = TrueClock(self.loop)
        self.spool = Listed(clock)
        self.store = Weather(self.loop, self.rng)
        self.shipper = Shipper(
            self.store,  # type: ignore[arg-type]  (the part of a store that a shipper uses)
            self.spool,  # type: ignore[arg-type]
            retry=lambda: RETRY,
            dead_letters_full=lambda: False,
            clock=clock,
            metrics=Metrics(CollectorRegistry()),
            rng=self.rng,
        )

    async def watched(self, seconds: float) -> None:
        """Let so much time pass; while something is pending no pause between two calls is longer than the bound."""
        end = self.loop.time() + seconds
        idle_until = self.loop.time()
        while self.loop.time() < end:
            await asyncio.sleep(0.5)
            if not self.spool.pending:
                idle_until = self.loop.time()
            last = max(self.store.calls[-1] if self.store.calls else 0.0, idle_until)
            assert self.loop.time() - last <= BOUND, (
                f"no call since {last:.1f}, now {self.loop.time():.1f}: {self.shipper.status()}"
            )

    async def live(self, epochs: int) -> None:
        task = asyncio.ensure_future(self.shipper.run())
        try:
            for _ in range(epochs):
                self.store.bad = self.rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
                self.store.kinds = self.rng.choice((WHOLE, *((kind,) for kind in WHOLE)))
                for _ in range(self.rng.randint(0, 5)):
                    self.spool.accept(self.rng.choice((1, 3, 40, 400)))
                    await self.watched(self.rng.uniform(0, 5))
                await self.watched(self.rng.choice((1, 60, 600)))
            self.store.bad = 0.0
            for _ in range(60):
                await self.watched(60)
                if not self.spool.pending:
                    break
            assert not self.spool.pending, self.shipper.status()
            assert len(self.store.stored) + self.spool.dead >= self.spool.accepted
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("seed", range(12))
def test_delivery_never_sleeps_while_something_is_pending(seed):
    """Whatever the store answers, the next call comes; when it answers well, all is delivered."""
    stand = Stand(seed)
    run(stand.loop, stand.live(6))


def test_control_a_lost_wake_up_is_found(monkeypatch):
    """The control: an answer that wakes nobody, and the watch finds the sleep."""
    from sidecar.shipper import _Run

    start = _Run._start_call
    monkeypatch.setattr(_Run, "_start_call", lambda self: start(self) and None)  # no timer is ever set
    stand = Stand(3)
    with pytest.raises(AssertionError, match="no call since"):
        run(stand.loop, stand.live(6))


@examples(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_the_regulator_always_says_when(seed):
    """It permits, or names a time after which it permits, or a call is under way whose answer will change its mind."""
    rng = random.Random(seed)
    now = 0.0
    pace = Pace(RETRY, rng.randint(1, 4), rng, now)
    flying = []
    for _ in range(300):
        ticket = pace.permit(rng.randint(1, 50), now)
        if ticket is not None:
            flying.append(ticket)
        elif not flying:
            for _ in range(200):
                wait = pace.delay(1, now)
                assert wait is not None, "nothing is under way, and no time is named"
                assert 0.0 <= wait <= max(RETRY.max_delay, RETRY.probe_interval) + 1e-6
                now += wait + 1e-6
                ticket = pace.permit(1, now)
                if ticket is not None:
                    break
            assert ticket is not None, "the time that it named came, again and again, and it permits nothing"
            flying.append(ticket)
        if flying and rng.random() < 0.6:
            now += rng.choice((0.0, 0.01, rng.uniform(0, 10), rng.uniform(0, 4_000)))
            ended = flying.pop(rng.randrange(len(flying)))
            match rng.randrange(6):
                case 0 | 1:
                    pace.succeeded(ended, ended.records, now)
                case 2:
                    pace.throttled(ended, rng.randint(0, ended.records), "slow", now)
                case 3:
                    pace.failed(ended, State.DOWN, "down", now)
                case 4:
                    pace.failed(ended, State.BLOCKED, "blocked", now)
                case 5:
                    pace.blame(ended, "blame", now)
        assert pace.in_flight == len(flying)

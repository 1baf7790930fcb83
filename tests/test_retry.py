"""The regulator of delivery, in virtual time."""

import heapq
import itertools
import math
import random

import pytest

from sidecar import settings
from sidecar.retry import Backoff, Pace, State

CONFIG = settings.Retry()


def pace(seed: int = 1, in_flight: int = 16) -> Pace:
    """A regulator at time zero."""
    return Pace(CONFIG, in_flight, random.Random(seed), now=0.0)


class Simulation:
    """A store with a capacity in records/s, a latency, and a switch; driven in virtual time."""

    def __init__(self, regulator: Pace, *, batch: int, latency: float, capacity: float) -> None:
        self.pace = regulator
        self.batch, self.latency, self.capacity = batch, latency, capacity
        self.now = 0.0
        self.up = True
        self.tokens = 0.0
        self.filled = 0.0
        self.chance = random.Random(0)
        self.refuses = 0.0  # the share of single records that it refuses at any rate
        self.refuses_every = math.inf  # seconds between two records that it refuses, at any rate
        self.refuses_next = math.inf
        self.sent: list[tuple[float, int]] = []
        self.delivered: list[tuple[float, int]] = []
        self.calls: list[tuple[float, int, object]] = []
        self._n = itertools.count()

    def _answer(self, ticket) -> None:
        if not self.up:
            self.pace.failed(ticket, State.DOWN, "refused", self.now)
            return
        self.tokens = min(self.capacity / 5, self.tokens + (self.now - self.filled) * self.capacity)
        self.filled = self.now
        taken = min(ticket.records, int(self.tokens))
        if self.refuses:
            taken = sum(self.chance.random() >= self.refuses for _ in range(taken))
        if taken and self.now >= self.refuses_next:
            taken -= 1
            self.refuses_next = self.now + self.refuses_every
        self.tokens -= taken
        self.delivered.append((self.now, taken))
        if taken < ticket.records:
            self.pace.throttled(ticket, taken, "slow down", self.now)
        else:
            self.pace.succeeded(ticket, taken, self.now)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            while (ticket := self.pace.permit(self.batch, self.now)) is not None:
                self.sent.append((self.now, ticket.records))
                heapq.heappush(self.calls, (self.now + self.latency, next(self._n), ticket))
            delay = self.pace.delay(self.batch, self.now)
            wake = min(
                self.now + delay if delay is not None else end,
                self.calls[0][0] if self.calls else end,
            )
            self.now = max(wake, self.now + 1e-6)
            while self.calls and self.calls[0][0] <= self.now:
                self._answer(heapq.heappop(self.calls)[2])

    def one_refused_every(self, seconds: float) -> None:
        """From now on, beside what is over the capacity."""
        self.refuses_every, self.refuses_next = seconds, self.now + seconds

    def rate(self, events: list[tuple[float, int]], start: float, stop: float) -> float:
        return sum(n for t, n in events if start <= t < stop) / (stop - start)


@pytest.mark.parametrize("capacity", [50, 500, 5_000, 40_000])
@pytest.mark.parametrize("seed", range(5))
def test_a_throttling_store_is_offered_between_70_and_110_percent_of_what_it_takes(capacity, seed):
    """The settled offer and the settled delivery are both within 0.7 to 1.1 of the store's rate."""
    sim = Simulation(pace(seed), batch=25, latency=0.005, capacity=capacity)
    sim.run(60)
    assert 0.7 * capacity <= sim.rate(sim.delivered, 20, 60) <= 1.1 * capacity
    assert 0.7 * capacity <= sim.rate(sim.sent, 20, 60) <= 1.1 * capacity


def test_without_the_regulator_the_same_store_is_stormed():
    """Control: a sender that never waits offers many times what the store takes."""
    sim = Simulation(pace(), batch=25, latency=0.005, capacity=500)
    sim.pace.rate.throttled = lambda now, delivered: None  # type: ignore[method-assign]
    sim.run(10)
    assert sim.rate(sim.sent, 5, 10) > 2 * 500


@pytest.mark.parametrize("seed", range(3))
def test_a_store_that_throttles_every_call_is_asked_ever_less_and_found_again(seed):
    """No storm of refused calls: at most 60 records/s after three seconds; full speed within 40 s of the store's."""
    sim = Simulation(pace(seed), batch=25, latency=0.005, capacity=1e9)
    sim.run(10)
    sim.capacity = sim.tokens = 0.0
    sim.run(30)
    assert sim.rate(sim.sent, 13, 40) <= 60
    sim.capacity = 1e9
    sim.run(60)
    assert sim.rate(sim.delivered, 80, 100) > 10_000


@pytest.mark.parametrize("share", [0.001, 0.003, 0.01])
@pytest.mark.parametrize("capacity", [500, 5_000])
def test_a_store_that_refuses_a_little_at_any_rate_is_still_used(share, capacity):
    """A hot key, a neighbour's burst: asking for less would not help, so nearly all that it takes is delivered."""
    sim = Simulation(pace(), batch=25, latency=0.02, capacity=capacity)
    sim.refuses = share
    sim.run(60)
    assert sim.rate(sim.delivered, 20, 60) >= 0.9 * min(capacity, 16 * 25 / 0.02)
    assert sim.rate(sim.sent, 20, 60) <= 1.1 * capacity


@pytest.mark.parametrize("every", [5, 10, 20, math.inf])
@pytest.mark.parametrize("seed", range(3))
def test_after_a_storm_a_store_that_refuses_a_record_now_and_then_is_back_in_two_minutes(every, seed):
    """From one record a second to nine tenths of what it takes, though throttles never cease."""
    sim = Simulation(pace(seed), batch=25, latency=0.005, capacity=1_000)
    sim.run(10)
    sim.capacity = sim.tokens = 0.0
    sim.run(30)
    assert sim.pace.rate.current == pytest.approx(1.0, abs=1.0)
    sim.capacity = 1_000
    sim.one_refused_every(every)
    sim.run(150)
    assert sim.rate(sim.delivered, 160, 190) >= 0.9 * 1_000


@pytest.mark.parametrize("seed", range(3))
def test_after_a_storm_a_store_that_takes_everything_is_found_again_in_25_seconds(seed):
    """Growth is the faster the longer nothing is refused."""
    sim = Simulation(pace(seed), batch=25, latency=0.005, capacity=1_000)
    sim.run(10)
    sim.capacity = sim.tokens = 0.0
    sim.run(30)
    sim.capacity = 1_000
    sim.run(40)
    assert sim.rate(sim.delivered, 65, 80) >= 0.9 * 1_000


def test_a_refusal_seen_in_light_traffic_holds_no_later_burst_for_long():
    """What got in was what there was, not what the store can take."""
    p = pace()
    now = 0.0
    for i in range(100):  # 20 records a second, one of which is refused
        now = i * 0.05
        ticket = p.permit(1, now)
        if i == 99:
            p.throttled(ticket, 0, "slow", now)
        else:
            p.succeeded(ticket, 1, now)
    assert p.rate.current < 30
    sim = Simulation(p, batch=25, latency=0.005, capacity=1_000)
    sim.now = sim.filled = now
    sim.run(60)
    assert sim.rate(sim.delivered, now + 20, now + 60) >= 0.9 * 1_000


def test_one_refused_record_among_many_costs_no_calls_in_flight():
    """A thousand calls of 25, one record of which is refused each second: all sixteen may still be under way."""
    p = pace()
    for i in range(1_000):
        now = i * 0.025
        ticket = p.permit(25, now)
        if i % 40:
            p.succeeded(ticket, 25, now)
        else:
            p.throttled(ticket, 24, "slow", now)
    assert p.limit == 16


def test_a_call_that_carries_less_than_it_may_gives_the_rest_back():
    """Large records: the bound in bytes, not the rate, decides how many go; the rate is what is sent."""
    p = pace()
    p.rate.manual = 100.0
    sent = 0
    now = 0.0
    while now < 20.0:
        ticket = p.permit(1_000, now)
        if ticket is None:
            now += 0.01
            continue
        ticket = p.narrowed(ticket, min(ticket.records, 3))
        sent += ticket.records
        p.succeeded(ticket, ticket.records, now)
    assert 0.9 * 100 <= sent / 20.0 <= 1.1 * 100


@pytest.mark.parametrize("steady", [1_000, 50_000])
@pytest.mark.parametrize("seed", range(5))
def test_after_five_minutes_of_outage_the_first_second_sees_a_tenth_of_the_steady_rate(steady, seed):
    """Recovery starts slowly and still reaches the steady rate within seconds."""
    batch = max(25, steady // 200)
    sim = Simulation(pace(seed, in_flight=1), batch=batch, latency=batch / steady, capacity=10 * steady)
    sim.run(20)
    assert sim.rate(sim.delivered, 10, 20) > 0.9 * steady
    sim.up = False
    sim.run(300)
    sim.up = True
    back = sim.now
    before = len(sim.delivered)
    sim.run(60)
    first = sim.delivered[before][0]
    assert first - back <= CONFIG.max_delay
    assert sim.rate(sim.delivered, first, first + 1) <= 0.1 * steady
    assert sim.rate(sim.delivered, first + 8, first + 18) > 0.8 * steady


@pytest.mark.parametrize("capacity", [150, 1_500, 15_000])
@pytest.mark.parametrize("seed", range(5))
def test_after_an_outage_a_throttling_store_is_offered_a_tenth_of_its_rate_in_the_first_second(capacity, seed):
    """The rate learnt from throttling is the one that the slow start begins from, probe included."""
    sim = Simulation(pace(seed), batch=25, latency=0.005, capacity=capacity)
    sim.run(20)
    sim.up = False
    sim.run(300)
    sim.up = True
    before = len(sim.delivered)
    sim.run(90)
    first = sim.delivered[before][0]
    assert sim.rate(sim.sent, first - 0.01, first + 0.99) <= 0.1 * capacity
    assert sim.rate(sim.delivered, first + 30, first + 60) >= 0.7 * capacity


def test_while_a_store_is_down_one_call_at_a_time_is_under_way():
    """However many calls fail together, one outage is one back-off step, and then one probe flies at a time."""
    p = pace()
    tickets = [p.permit(25, 0.0) for _ in range(16)]
    assert p.permit(25, 0.0) is None
    for ticket in tickets:
        p.failed(ticket, State.DOWN, "refused", 1.0)
    assert p.state(1.0) is State.DOWN
    assert p._backoff.failures == 1
    assert p.permit(25, 1.0) is None
    later = 1.0 + (p.delay(25, 1.0) or 0)
    probe = p.permit(25, later)
    assert probe is not None
    assert probe.probe
    assert p.permit(25, later + 100) is None
    p.succeeded(probe, 25, later + 1)
    assert p.state(later + 1) is State.UP


def test_a_blocked_store_is_probed_with_one_record_every_probe_interval():
    """Blocked: one record, probe_interval apart, for ever."""
    p = pace()
    p.failed(p.permit(25, 0.0), State.BLOCKED, "42P01", 0.0)
    now = 0.0
    for _ in range(10):
        delay = p.delay(25, now)
        assert delay == pytest.approx(CONFIG.probe_interval)
        now += delay
        probe = p.permit(25, now)
        assert probe.records == 1
        p.failed(probe, State.BLOCKED, "42P01", now)
    assert p.state(now) is State.BLOCKED


def test_pause_holds_everything_and_resume_asks_at_once():
    """An operator's pause shows who and why; resume does not wait for the back-off."""
    p = pace()
    p.pause("alice", "vacuum full", 5.0)
    assert p.permit(25, 6.0) is None
    assert p.state(6.0) is State.PAUSED
    assert (p.paused_by, p.reason) == ("alice", "vacuum full")
    p.resume(7.0)
    assert p.permit(25, 7.0) is not None


def test_a_manual_rate_bounds_what_is_sent():
    """``rate`` set by hand: never more than it, measured over ten seconds."""
    sim = Simulation(pace(), batch=25, latency=0.001, capacity=1e9)
    sim.pace.rate.manual = 300.0
    sim.run(20)
    assert 0.9 * 300 <= sim.rate(sim.sent, 5, 15) <= 1.05 * 300


def test_back_off_has_full_jitter_and_a_cap():
    """Waits lie in (0, min(cap, base * 2^n)] and differ from seed to seed."""
    waits = [[Backoff(1.0, 30.0, random.Random(s)).next()] for s in range(50)]
    assert len({w[0] for w in waits}) > 40
    backoff = Backoff(1.0, 30.0, random.Random(3))
    for n in range(40):
        assert 0.1 <= backoff.next() <= min(30.0, 2.0**n)


def test_a_throttle_is_no_attempt_and_no_failure():
    """Throttled answers leave the back-off alone."""
    p = pace()
    for i in range(20):
        ticket = p.permit(25, float(i * 10))
        p.throttled(ticket, 5, "slow", float(i * 10))
    assert p._backoff.failures == 0
    assert p.state(191.0) is State.THROTTLED

"""When to send, how much, and how long to wait: pure decisions, no I/O, time passed in (seconds, monotonic).

``Pace`` is the one regulator that a shipper asks before each call and tells about each answer. It joins

* the **state** of a store: ``up``, ``throttled``, ``down``, ``blocked``, ``paused``, with a reason and a since,
* the **back-off** with full jitter while it is down (no attempt limit, no age limit: semantics, section 5),
* the **in-flight limit**: additive increase, multiplicative decrease (AIMD), and
* the **rate**: without bound while nothing limits; when the store throttles cut by the share that it refused, and then
  raised, the faster the longer it refuses nothing; a slow start after an outage, so that a recovering store sees a
  tenth of the steady rate in the first second at most.

A store that refuses a little at any rate (one hot key, a neighbour's burst) must not cost its throughput: a refused
record is sent again for little, a rate far below what the store takes fills the spool. So a cut is as large as the
share refused, and what is lost by it comes back within seconds.

Invariants
----------
1. While down or blocked at most one call is under way: the probe.
2. Answers of calls begun before the state last changed do not change it again (one outage = one back-off step, however
   many calls fail with it), except that a success is always believed.
3. A throttle never counts as an attempt.
4. ``permit`` never returns more than the rate allows, and at least one record when it returns anything.
5. A store that refuses up to a fiftieth of what it is offered, whatever that is, is offered no less for it; one that
   takes everything is offered a thousand times as much after 20 s.
"""

import math
import random
from collections import deque
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from sidecar import settings


class State(StrEnum):
    """What delivery to a store is doing."""

    UP = "up"
    THROTTLED = "throttled"  # up, but it told us to slow down within the last seconds
    DOWN = "down"  # transient trouble: backing off
    BLOCKED = "blocked"  # nothing gets through until somebody mends it: probing
    PAUSED = "paused"  # by an operator
    WAITING = "waiting"  # not asked: what its records need first does not come (``sidecar.not_owed``); no pace says so


_FIRST_RATE: Final = 500.0  # records/s after an outage when no steady rate is known yet
_PROBE: Final = 25  # records of a probe at most
_SHORT_OUTAGE: Final = 5.0  # seconds; shorter ones start again at a quarter instead of 1/32
_GROWTH_PERIOD: Final = 0.5  # seconds per doubling of the slow start
_CUT_MOST: Final = 0.15  # of the rate that gets in; less where less than this share is refused
_NOT_THE_KNEE: Final = 0.1  # refused shares below it do not end a slow start
_LIMIT_CUT_MOST: Final = 0.3  # of the calls that may be under way, likewise
_GROWTH: Final = 0.05  # of the learnt rate per second, right after a throttle
_FASTER_EVERY: Final = 3.0  # seconds without a throttle, after which it grows twice as fast
_FASTEST: Final = math.log(2) / _GROWTH_PERIOD  # of the learnt rate per second: that of the slow start
_CALM: Final = _FASTER_EVERY * math.log2(_FASTEST / _GROWTH)  # seconds until then: 14.4
_THROTTLE_HOLD: Final = 1.0  # seconds between two cuts: one burst of answers is one event
_THROTTLED_FOR: Final = 30.0  # seconds after the last throttle in which the state says so
_WINDOW: Final = 2.0  # seconds over which the delivered rate is measured
_RECENT: Final = 0.5  # seconds over which the share refused is measured
_ENOUGH: Final = 50  # records; longer than that where fewer were answered
_LONGEST: Final = 10.0  # seconds, but no longer than this


class Backoff:
    """Full jitter: uniform in (0, min(cap, base * 2^n)], never shorter than a tenth of the base."""

    def __init__(self, base: float, cap: float, rng: random.Random) -> None:
        self._base = max(base, 0.001)
        self._cap = max(cap, self._base)
        self._rng = rng
        self.failures = 0

    def next(self) -> float:
        """Seconds to wait after one more failure."""
        ceiling = min(self._cap, self._base * 2 ** min(self.failures, 30))
        self.failures += 1
        return max(self._base / 10, self._rng.uniform(0, ceiling))

    def reset(self) -> None:
        """Forget the failures: the store answered."""
        self.failures = 0


class Throughput:
    """Records per second over the last two seconds, and the best two-second rate seen before the last outage."""

    def __init__(self) -> None:
        self._events: deque[tuple[float, int]] = deque()
        self._sum = 0
        self.steady = 0.0

    def add(self, now: float, n: int) -> None:
        """Note ``n`` delivered records."""
        self._events.append((now, n))
        self._sum += n
        self.rate(now)  # forgets what is too old
        # Over the whole window, however young: a first burst is not a steady rate.
        self.steady = max(self._sum / _WINDOW, self.steady * 0.999)

    def rate(self, now: float) -> float:
        """Records per second over the last two seconds."""
        while self._events and self._events[0][0] < now - _WINDOW:
            self._sum -= self._events.popleft()[1]
        if not self._events:
            return 0.0
        return self._sum / max(now - self._events[0][0], _WINDOW / 4)


class Answers:
    """What the store took and refused lately, since the last cut at most.

    Over half a second, or as long as the last 50 records took: at a low rate one refused record is not everything.
    """

    def __init__(self) -> None:
        self._events: deque[tuple[float, int, int]] = deque()  # at, taken, refused
        self._taken = 0
        self._refused = 0

    def add(self, now: float, taken: int, refused: int) -> None:
        """Note an answer."""
        events = self._events
        events.append((now, taken, refused))
        self._taken += taken
        self._refused += refused
        while len(events) > 1:
            at, old_taken, old_refused = events[0]
            rest = self._taken + self._refused - old_taken - old_refused
            if at >= now - _LONGEST and (at >= now - _RECENT or rest < _ENOUGH):
                break
            events.popleft()
            self._taken -= old_taken
            self._refused -= old_refused

    def clear(self) -> None:
        """What comes now is the answer to another rate."""
        self._events.clear()
        self._taken = self._refused = 0

    @property
    def share(self) -> float:
        """Of what was offered, the share refused; 0.0 where nothing was."""
        offered = self._taken + self._refused
        return self._refused / offered if offered else 0.0

    def rate(self, now: float) -> float | None:
        """Records a second taken; None: too young to tell."""
        if not self._events or (age := now - self._events[0][0]) < _RECENT:
            return None
        return self._taken / age


class Rate:
    """A token bucket whose rate is unbounded, learnt from throttling, starting slowly, or set by hand."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.manual: float | None = None
        self._learnt = math.inf  # records/s
        self._starting = False
        self._knee = math.inf  # the rate at which the store last throttled
        self._tokens = 0.0
        self._filled_at = 0.0
        self._last_cut = -math.inf
        self._throttled_at = -math.inf

    @property
    def current(self) -> float:
        """Records per second that may be sent now; ``inf`` where nothing limits."""
        return self._learnt if self.manual is None else min(self._learnt, self.manual)

    def throttled(self, now: float, answers: Answers) -> None:
        """The store asked us to slow down; ``answers`` has what it took and refused, this answer included."""
        self._throttled_at = now
        share = answers.share
        if now - self._last_cut < (_RECENT if share == 1.0 else _THROTTLE_HOLD):
            return
        if self._starting and share < _NOT_THE_KNEE:
            return  # that may happen at any rate: the slow start goes on
        self._last_cut = now
        if self._learnt == math.inf:
            taken = answers.rate(now)
            if not taken:
                # A first burst taught nothing yet: start low and double until the store says where the knee is.
                self._begin(now, _FIRST_RATE / 10)
                answers.clear()
                return
            self._learnt = taken
        elif share == 1.0:
            # Nothing at all gets through: offering half as much would still be a storm of refused calls.
            self._learnt = min(self._learnt / 4, _FIRST_RATE / 10)
        else:
            self._learnt *= max(0.5, 1.0 - share)
        answers.clear()
        self._starting = False
        self._knee = max(1.0, self._learnt)
        self._learnt = max(1.0, self._learnt * (1.0 - min(_CUT_MOST, share)))
        self._tokens = min(self._tokens, 0.0)

    def _begin(self, now: float, rate: float) -> None:
        self._learnt = rate
        self._starting = True
        self._knee = math.inf
        self._tokens = 0.0
        self._filled_at = now

    def recovered(self, now: float, steady: float, outage: float) -> None:
        """The first success after ``outage`` seconds: start slowly towards what was steady."""
        share = 1 / 32 if outage >= _SHORT_OUTAGE else 1 / 4
        base = min(steady, self._knee) if steady > 0 else _FIRST_RATE * 32
        self._begin(now, max(1.0, base * share * self._rng.uniform(0.7, 1.0)))

    def grow(self, now: float, delivered: float) -> None:
        """Let the rate rise with time; called with every success."""
        dt = now - self._filled_at
        if self._learnt == math.inf or dt <= 0:
            return
        calm = now - self._throttled_at
        fast = self._starting or calm >= _CALM
        self._learnt *= math.exp(min(dt, 1.0) * (_FASTEST if fast else _GROWTH * 2 ** (calm / _FASTER_EVERY)))
        if fast and self._learnt > max(4 * delivered, 1e6):
            self._learnt = math.inf
            self._starting = False

    def take(self, now: float, wanted: int, delivered: float) -> int:
        """How many of ``wanted`` records may go now; 0 means wait ``delay``."""
        self.grow(now, delivered)
        rate = self.current
        if rate == math.inf:
            self._filled_at = now
            return wanted
        burst = max(1.0, rate / 10)
        self._tokens = min(burst, self._tokens + rate * max(0.0, now - self._filled_at))
        self._filled_at = now
        n = min(wanted, int(self._tokens))
        self._tokens -= n
        return n

    def give_back(self, n: int) -> None:
        """Records that were permitted but not sent after all."""
        if self.current != math.inf:
            self._tokens += n

    def delay(self, wanted: int = 1) -> float:
        """Seconds until ``take`` gives a useful share of ``wanted``."""
        rate = self.current
        if rate == math.inf:
            return 0.0
        useful = min(float(wanted), max(1.0, rate / 20))
        return min(1.0, max(0.001, (useful - self._tokens) / rate))


@dataclass(frozen=True, slots=True)
class Ticket:
    """Permission for one call; carries the state's generation so that late answers are read right."""

    records: int
    generation: int
    probe: bool


class Pace:
    """The regulator of one store (see the module's invariants)."""

    def __init__(self, config: settings.Retry, max_in_flight: int, rng: random.Random, now: float) -> None:
        self._config = config
        self._rng = rng
        self._backoff = Backoff(config.delay, config.max_delay, rng)
        self._max_in_flight = max_in_flight
        self._limit = float(max_in_flight)
        self.rate = Rate(rng)
        self.throughput = Throughput()
        self._answers = Answers()
        self.in_flight = 0
        self._generation = 0
        self._trouble: State = State.UP
        self.reason = ""
        self.since = now
        self._retry_at = 0.0
        self._down_since: float | None = None
        self._throttled_at = -math.inf
        self._probing = False
        self.paused_by: str | None = None
        self._last_cut = -math.inf

    def configure(self, config: settings.Retry) -> None:
        """Take new live settings (hot reload)."""
        if config != self._config:
            failures = self._backoff.failures
            self._config = config
            self._backoff = Backoff(config.delay, config.max_delay, self._rng)
            self._backoff.failures = failures

    def state(self, now: float) -> State:
        """What delivery is doing now."""
        if self.paused_by is not None:
            return State.PAUSED
        if self._trouble is State.UP and now - self._throttled_at < _THROTTLED_FOR:
            return State.THROTTLED
        return self._trouble

    @property
    def limit(self) -> int:
        """Calls that may be under way."""
        return 1 if self._trouble is not State.UP else max(1, int(self._limit))

    def pause(self, by: str, reason: str, now: float) -> None:
        """Stop sending (what is under way finishes)."""
        self.paused_by, self.reason, self.since = by, reason, now

    def resume(self, now: float) -> None:
        """Go on; also asks a blocked or waiting store at once."""
        self.paused_by = None
        self._retry_at = now
        self.since = now
        if self._trouble is State.UP:
            self.reason = ""

    def permit(self, wanted: int, now: float) -> Ticket | None:
        """A ticket for up to ``wanted`` records, or None: then ask again after ``delay`` or the next answer."""
        if self.paused_by is not None or self.in_flight >= self.limit:
            return None
        if self._trouble is not State.UP:
            if self._probing or now < self._retry_at:
                return None
            self._probing = True
            self.in_flight += 1
            # A blocked store is probed with one record: a brake's cause must not cost a whole batch.
            n = 1 if self._trouble is State.BLOCKED else min(wanted, self._probe_size)
            return Ticket(n, self._generation, probe=True)
        n = self.rate.take(now, wanted, self.throughput.rate(now))
        if n == 0:
            return None
        self.in_flight += 1
        return Ticket(n, self._generation, probe=False)

    @property
    def _probe_size(self) -> int:
        """Records of one probe: little beside the steady rate, so that it is no storm by itself."""
        steady = self.throughput.steady
        return _PROBE if steady == 0 else max(1, min(_PROBE, int(steady / 50)))

    def narrowed(self, ticket: Ticket, records: int) -> Ticket:
        """The ticket for a call that carries only so many records (they are large): the others' share is given back."""
        if records == ticket.records:
            return ticket
        if not ticket.probe:
            self.rate.give_back(ticket.records - records)
        return replace(ticket, records=records)

    def cancel(self, ticket: Ticket) -> None:
        """The call was not made after all."""
        self.in_flight -= 1
        if ticket.probe:
            self._probing = False
        else:
            self.rate.give_back(ticket.records)

    def delay(self, wanted: int, now: float) -> float | None:
        """Seconds until ``permit`` may say yes by the passing of time alone; None: only an answer can change it."""
        if self.paused_by is not None or self.in_flight >= self.limit or self._probing:
            return None
        if self._trouble is not State.UP:
            return max(0.0, self._retry_at - now)
        return self.rate.delay(wanted)

    def _ended(self, ticket: Ticket) -> None:
        self.in_flight -= 1
        if ticket.probe:
            self._probing = False

    def succeeded(self, ticket: Ticket, delivered: int, now: float) -> None:
        """The store answered and took ``delivered`` records of the call; the others not for want of capacity."""
        self._took(ticket, delivered, 0, now)
        if now - self._last_cut > _RECENT:
            self._limit = min(float(self._max_in_flight), self._limit + 1 / max(1.0, self._limit))

    def throttled(self, ticket: Ticket, delivered: int, reason: str, now: float) -> None:
        """The store took ``delivered`` records and asked us to slow down."""
        self._took(ticket, delivered, ticket.records - delivered, now)
        self._throttled_at = now
        self.reason = reason
        if now - self._last_cut >= _THROTTLE_HOLD:
            self._last_cut = now
            self._limit = max(1.0, self._limit * (1.0 - min(_LIMIT_CUT_MOST, self._answers.share)))
        self.rate.throttled(now, self._answers)

    def _took(self, ticket: Ticket, delivered: int, refused: int, now: float) -> None:
        self._ended(ticket)
        if self._trouble is not State.UP:
            outage = now - (self._down_since if self._down_since is not None else now)
            self.rate.recovered(now, self.throughput.steady, outage)
            self._answers.clear()
            self._limit = max(1.0, self._max_in_flight / 4)
            self._enter(State.UP, "", now)
            self._down_since = None
            self._backoff.reset()
        if delivered:
            self.throughput.add(now, delivered)
        if delivered or refused:
            self._answers.add(now, delivered, refused)

    def failed(self, ticket: Ticket, state: State, reason: str, now: float) -> None:
        """The call failed for reasons of the store: ``State.DOWN`` or ``State.BLOCKED``."""
        self._ended(ticket)
        if ticket.generation != self._generation and not (state is State.BLOCKED and self._trouble is State.DOWN):
            return
        self.trouble(state, reason, now)

    def blame(self, ticket: Ticket, reason: str, now: float) -> None:
        """The store answered, but what it answered is the store's fault and not the records': blocked."""
        self._ended(ticket)
        self.trouble(State.BLOCKED, reason, now)

    def restart(self) -> None:
        """A new run of the shipper: no call is under way."""
        self.in_flight = 0
        self._probing = False

    def trouble(self, state: State, reason: str, now: float) -> None:
        """Enter or stay in a bad state, and set the time of the next probe."""
        if self._down_since is None:
            self._down_since = now
        wait = self._config.probe_interval if state is State.BLOCKED else self._backoff.next()
        self._retry_at = now + wait
        if state is not self._trouble or reason != self.reason:
            self._enter(state, reason, now)
        else:
            self._generation += 1

    def _enter(self, state: State, reason: str, now: float) -> None:
        self._generation += 1
        if state is not self._trouble:
            self.since = now
        self._trouble = state
        self.reason = reason

    def down_for(self, now: float) -> float:
        """Seconds since the store last took anything while in trouble; 0 while up."""
        return 0.0 if self._down_since is None else now - self._down_since

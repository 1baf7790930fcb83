"""Answers reads: may it be asked, is it within bounds, which store, for how long, and what is said with the answer."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from sidecar.clock import Clock
from sidecar.errors import BadRequest, Busy, Forbidden, RetryClass, StoreError
from sidecar.metrics import Metrics
from sidecar.phase import Policy, StoreName
from sidecar.reads import cursor
from sidecar.reads.questions import ById, CountOf, PageOf, Question, Result, Services, View
from sidecar.reads.shadow import Served, Shadow
from sidecar.reads.slots import Slots
from sidecar.record import LogRecord
from sidecar.settings import Reads as ReadSettings
from sidecar.settings import Settings
from sidecar.stores.base import (
    ByService,
    Consistency,
    CountGroup,
    CountQuery,
    Estimate,
    Query,
    Store,
    Summary,
    position_of,
)

DEFAULT_LIMIT: Final = 100  # records of a page where the request does not say
_ESTIMATE_MAX_DAYS: Final = 3_660
_DAY_US: Final = 86_400_000_000
T = TypeVar("T")


class Hold(Protocol):
    """A read's hold on the policy that it began with; ``fleet.Use`` is one."""

    def confirm(self) -> Policy:
        """The policy. Raises Busy (``phase_unknown``) where this instance cannot tell which store to read from."""
        ...


@dataclass(frozen=True, slots=True)
class Always:
    """The hold of an instance that knows its phase at any time."""

    policy: Policy

    def confirm(self) -> Policy:
        """The policy."""
        return self.policy


def always(policy: Callable[[], Policy]) -> Callable[[], AbstractContextManager[Hold]]:
    """A ``hold`` for an instance without a fleet."""
    return lambda: nullcontext(Always(policy()))


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What was asked for, who served it under which policy, and how far behind that store may be.

    ``owed`` is how many records this sidecar still owes to the store that answered.
    """

    value: T
    served_by: StoreName
    policy: Policy
    consistency: Consistency
    owed: int


@dataclass(frozen=True, slots=True)
class Page:
    """Entries newest first; ``next_cursor`` None: there are no more."""

    entries: tuple[LogRecord | Summary, ...]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Numbers:
    """A complete enumeration that began at ``as_of`` (microseconds since the epoch)."""

    count: int
    groups: Mapping[str, int] | None
    as_of: int


class Reads:
    """Every read of the sidecar.

    All methods raise

    * BadRequest: a bound is broken (named), or the cursor is not of this query;
    * Forbidden: the service asked for is not in ``reads.services``;
    * Busy: too many reads, or this instance does not know its phase;
    * StoreError: the store failed, or gave no complete answer in ``reads.timeout``. Never "no data" instead.

    Args:
        stores: by name.
        hold: the policy in force, held from the question to the answer.
        settings: asked for once per read.
        owed: how many records this sidecar owes to a store.
        shadow: what repeats a share of the reads; None: nobody.
    """

    def __init__(
        self,
        stores: Mapping[StoreName, Store],
        hold: Callable[[], AbstractContextManager[Hold]],
        settings: Callable[[], Settings],
        *,
        owed: Callable[[StoreName], int],
        clock: Clock,
        metrics: Metrics,
        shadow: Shadow | None = None,
    ) -> None:
        self._stores = stores
        self._hold = hold
        self._settings = settings
        self._owed = owed
        self._clock = clock
        self._metrics = metrics
        self._shadow = shadow
        self._slots = Slots(lambda: settings().reads)

    async def get(self, log_id: str) -> Answer[LogRecord | None]:
        """One record by its canonical id, strongly consistent; None: the store answered, and has none."""
        answer = await self._answer(ById(log_id))
        record = next((e for e in answer.value.entries if isinstance(e, LogRecord)), None)
        services = self._settings().reads.services
        if record is not None and services is not None and record.service_name not in services:
            raise Forbidden("service_name: this record's service is not in reads.services")
        return _with(answer, record, "strong")

    async def page(
        self, query: Query, *, cursor_text: str | None = None, limit: int | None = None, view: View = "full"
    ) -> Answer[Page]:
        """One page, newest first, after the cursor."""
        settings = self._settings().reads
        if isinstance(query, ByService):
            _check_service(settings, query.service_name)
            _check_range(query.start, query.end, settings.max_days, "reads.max_days")
        if limit is None:
            limit = min(DEFAULT_LIMIT, settings.max_limit)
        elif not 1 <= limit <= settings.max_limit:
            raise BadRequest(f"limit: allowed are 1 to {settings.max_limit} (reads.max_limit)")
        before = None if cursor_text is None else cursor.decode(query, cursor_text)
        answer = await self._answer(PageOf(query, before, limit, settings.max_page_bytes, view, _services(settings)))
        result = answer.value
        after = None if result.complete else cursor.encode(query, position_of(result.entries[-1]))
        return _with(answer, Page(tuple(result.entries), after), answer.consistency)

    async def count(self, query: CountQuery, group: CountGroup | None = None) -> Answer[Numbers]:
        """How many, exactly: a complete enumeration."""
        settings = self._settings().reads
        if query.service_name is not None:
            _check_service(settings, query.service_name)
        _check_range(query.start, query.end, settings.count_max_days, "reads.count_max_days")
        as_of = self._clock.now_us()
        answer = await self._answer(CountOf(query, group, _services(settings)))
        totals = answer.value.totals
        groups = None if group is None else totals
        return _with(answer, Numbers(sum(totals.values()), groups, as_of), answer.consistency)

    async def estimate(self, query: CountQuery) -> tuple[Answer[Estimate], int]:
        """About how many, cheaply, and how that was made; and when that began (microseconds since the epoch)."""
        settings = self._settings().reads
        _check_range(query.start, query.end, _ESTIMATE_MAX_DAYS, "an estimate")
        if query.service_name is not None:
            _check_service(settings, query.service_name)
        elif settings.services is not None:
            raise Forbidden("service_name: reads.services restricts reads, so an estimate needs one of its services")
        as_of = self._clock.now_us()
        return await self._serve("count", lambda store: store.estimate(query)), as_of

    async def _answer(self, question: Question) -> Answer[Result]:
        started = self._clock.monotonic()
        answer = await self._serve(question.pattern, question.ask)
        if self._shadow is not None:
            seconds = self._clock.monotonic() - started
            self._shadow.offer(Served(question, answer.value, answer.served_by, answer.policy, seconds))
        return answer

    async def _serve(self, pattern: str, ask: Callable[[Store], Awaitable[T]]) -> Answer[T]:
        """Ask the store of the policy, in a slot, within ``reads.timeout``."""
        seconds = self._settings().reads.timeout
        with self._hold() as hold:
            policy = hold.confirm()
            store = self._stores[policy.reads_from]
            started: float | None = None
            try:
                async with asyncio.timeout(seconds), self._slots.slot():
                    started = self._clock.monotonic()
                    value = await ask(store)
            except TimeoutError:
                if started is None:
                    raise Busy("reads_busy", f"no slot for this read came free in {seconds:g} s", 1) from None
                raise StoreError(
                    policy.reads_from,
                    RetryClass.TRANSIENT,
                    f"no complete answer within reads.timeout ({seconds:g} s); ask for less, or again",
                    "timeout",
                ) from None
            finally:
                if started is not None:
                    self._metrics.read_seconds.labels(pattern, policy.reads_from).observe(
                        self._clock.monotonic() - started
                    )
            hold.confirm()
        return Answer(value, policy.reads_from, policy, store.consistency, self._owed(policy.reads_from))


def _with(answer: Answer[Result], value: T, consistency: Consistency) -> Answer[T]:
    return Answer(value, answer.served_by, answer.policy, consistency, answer.owed)


def _services(settings: ReadSettings) -> Services:
    return None if settings.services is None else frozenset(settings.services)


def _check_service(settings: ReadSettings, name: str) -> None:
    if settings.services is not None and name not in settings.services:
        raise Forbidden("service_name: not in reads.services; ask for a service that is")


def _check_range(start: int, end: int, days: int, bound: str) -> None:
    if start > end:
        raise BadRequest("start: after end; both are inclusive, swap them")
    if end - start > days * _DAY_US:
        raise BadRequest(f"end: more than {days} days after start ({bound}); ask for a narrower range")

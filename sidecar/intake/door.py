"""``Intake``: accepts one request's body. The package's docstring gives the stages."""

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol, cast

import msgspec
import prometheus_client as metric

from sidecar.clock import Clock
from sidecar.errors import Busy, ContentConflict, InvalidRecord, TooLarge
from sidecar.intake.mapped import screen_mapped
from sidecar.intake.standing import Firm, Hold, Standing
from sidecar.intake.window import DedupWindow
from sidecar.mapping import Mapped
from sidecar.metrics import Metrics
from sidecar.phase import Phase, Policy
from sidecar.record import LogRecord, to_dict
from sidecar.screening import Bounds, Form, Minter, Refused, Rule, Screened, Screener
from sidecar.settings import Dedup, Settings
from sidecar.spool.types import Fate, Obligation, Receipt, RecordStatus, Seen

_CONFLICT: Final = (
    "the same log_id was accepted before with other content; the first wins, so mint a new id for this one"
)
_UNSETTLED: Final = frozenset({"pending", "deferred"})
_UNDECIDED: Final = "undecided"  # of a fenced instance: owed, to whom the fleet's phase says
_ROOM_SECONDS: Final = 10.0  # that a request waits while the spool makes room
_BETWEEN_PAUSES: Final = 64  # duplicates looked up
_STATUS_POLL: Final = 0.05  # seconds between two looks at duplicates that somebody waits for


async def _no_room(_busy: Busy) -> bool:
    """Nobody makes room: a push-back is the answer."""
    return False


class SpoolDoor(Protocol):
    """What intake uses of the spool (``sidecar.spool.Spool``)."""

    async def append(
        self,
        records: Sequence[LogRecord],
        encoded: Sequence[bytes],
        obligation: Obligation,
        seen: Sequence[Seen] = (),
    ) -> Receipt:
        """All of the records in one commit; returns after fsync. Raises Busy, SpoolFailed."""
        ...

    async def wait_settled(self, receipt: Receipt, stores: frozenset[str]) -> None:
        """Return when every record of the receipt is settled (delivered or given up) for these stores."""
        ...

    async def fates(self, receipt: Receipt, log_ids: Sequence[str]) -> Mapping[str, Mapping[str, Fate]]:
        """Where the records of a receipt stand now per store owed, by log_id."""
        ...

    async def status(self, log_id: str) -> RecordStatus | None:
        """Where one record stands; None when it is not in local retention."""
        ...

    async def refuse(self, raws: Sequence[tuple[bytes, str, str]]) -> int:
        """Keep (raw, field, reason) of refused records within their quota; returns how many were kept."""
        ...


@dataclass(slots=True)
class Outcome:
    """What became of a request. ``log_ids`` has one entry per record of the input, None where it was refused.

    ``committed`` is False only where ``strict`` refused the whole batch. ``waited`` says that the client preferred to
    wait; then ``stored`` says whether every required store has every accepted record, and ``states`` gives, where not,
    the state of each store for the records that are not there yet, by their index.
    """

    batch: bool
    policy: Policy
    log_ids: list[str | None]
    correlation_id: str | None = None  # of a single record
    duplicates: list[int] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    committed: bool = True
    waited: bool = False
    stored: bool = False
    states: Mapping[int, Mapping[str, str]] = field(default_factory=dict)


class Plain(NamedTuple):
    """Records of several requests, one each, their stored forms and contents (``Screened``), in order."""

    records: list[LogRecord]
    encoded: list[bytes]
    contents: list[bytes | None]


class Intake:
    """Accepts requests; one per instance, used from the event loop."""

    def __init__(
        self,
        *,
        spool: SpoolDoor,
        standing: Callable[[], Standing],
        settings: Callable[[], Settings],
        minter: Minter,
        clock: Clock,
        metrics: Metrics,
        closed: Callable[[], Busy | None] = lambda: None,
        make_room: Callable[[Busy], Awaitable[bool]] = _no_room,
        dedup: Dedup,
        column_limits: Mapping[str, int] | None = None,
        hold: Callable[[], AbstractContextManager[Hold]] | None = None,
    ) -> None:
        """Join the parts.

        ``hold`` begins a request's hold on the standing; None: an instance without a fleet, whose standing is firm.
        ``closed`` says why nothing is accepted now (fail-closed); ``make_room`` whether to try again after a push-back
        of the spool, because there is room now; ``column_limits`` an adopted table's widths.
        """
        self._spool = spool
        self._standing = standing
        self._hold = hold or (lambda: nullcontext(Firm(standing())))
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._closed = closed
        self._make_room = make_room
        self._screener = Screener(clock, minter, column_limits or {})
        self.window = DedupWindow(dedup, clock)
        self._stopping: Busy | None = None
        self._last_standing: Standing | None = None
        self._last_obligation = Obligation(0, frozenset())
        self._accepted_counters: dict[Phase, metric.Counter] = {}
        self._waits: set[asyncio.Timeout] = set()
        self._longest_wait = math.inf

    def load(self, seen: Sequence[Seen]) -> None:
        """Take over the dedup window that the spool kept."""
        self.window.load((one.log_id, one.content) for one in seen)

    def narrow(self, texts: Mapping[str, int], numbers: Mapping[str, tuple[int, int]], reserved: str) -> None:
        """Hold the records of new requests against an adopted table's columns (``Screener.narrow``)."""
        self._screener.narrow(texts, numbers, reserved)

    def stop(self, retry_after: int = 5) -> None:
        """Accept nothing more; requests under way are finished."""
        self._stopping = Busy("stopping", "this sidecar is stopping; send again shortly", retry_after)

    def end_waits(self) -> None:
        """Answer whoever waits for the stores with how things stand: their records are on disk, and nobody delivers."""
        self._longest_wait = 0.0
        now = asyncio.get_running_loop().time()
        for limit in self._waits:
            if not limit.expired():
                limit.reschedule(now)

    def check_open(self) -> None:
        """Raises Busy where nothing is accepted now; cheap, for before the body is read."""
        busy = self._stopping or self._closed()
        if busy is not None:
            raise busy

    async def accept(
        self, body: bytes, form: Form, *, key: str | None = None, strict: bool = False, wait: float | None = None
    ) -> Outcome:
        """Screen a body and make its records durable.

        ``key`` is a checked Idempotency-Key. ``wait`` is how many seconds to wait for the required stores afterwards.

        Raises:
            MalformedBody, TooLarge, InvalidRecord, ContentConflict: nothing was stored.
            Busy: nothing was stored; try again.
            SpoolFailed: the disk failed; nothing more will be stored by this process.
        """
        self.check_open()
        screened = await self._screen(body, form, key)
        if screened.refused and not screened.batch:
            self._count(screened.refused)
            raise _alone(screened.refused[0])
        return await self._take(screened, strict=strict, wait=wait)

    def plain_bounds(self) -> Bounds | None:
        """What plain records are held against in this turn of the loop; None: let every request go its own way."""
        ingest = self._settings().ingest
        if ingest.ack == "stores" or self._stopping is not None or self._closed() is not None:
            return None
        return self._screener.bounds(ingest)

    def plain(self, bodies: Sequence[bytes], bounds: Bounds) -> Plain | None:
        """Bodies that are one good record each, screened; None: at least one is not."""
        screened = self._screener.singles(bodies, bounds)
        return None if screened is None else Plain(*screened)

    async def accept_plain(self, plain: Plain) -> Policy | None:
        """Make the records of several requests durable by one append, all or none. Raises Busy, SpoolFailed.

        None: nothing was stored, because an id among them is known, on its way to disk, or there twice: each alone.
        """
        fresh = self.window.unknown(
            (_key(record.log_id), content)
            for record, content in zip(plain.records, plain.contents, strict=True)
            if content is not None
        )
        if fresh is None:
            return None
        together = Screened(batch=True, records=plain.records, encoded=plain.encoded)
        outcome = Outcome(True, self._standing().policy, [])
        await self._append_fresh(together, outcome, fresh, strict=False)
        return outcome.policy

    async def accept_mapped(self, mapped: Mapped, *, wait: float | None = None) -> Outcome:
        """Screen what a mapping made of a request's events, a batch, and make it durable. Raises as ``accept``."""
        self.check_open()
        ingest = self._settings().ingest
        screened = await screen_mapped(self._screener, mapped, ingest, lambda: self._clock.sleep(0))
        return await self._take(screened, strict=False, wait=wait)

    async def _take(self, screened: Screened, *, strict: bool, wait: float | None) -> Outcome:
        outcome = Outcome(screened.batch, self._standing().policy, _log_ids(screened), refused=screened.refused)
        if not screened.batch:
            outcome.correlation_id = screened.records[0].correlation_id
        if any(screened.contents):
            receipt = await self._append_known(screened, outcome, strict=strict)
        else:
            receipt = await self._append(screened, outcome, (), strict=strict)
        if outcome.refused:
            self._count(outcome.refused)
            if outcome.committed:
                await self._spool.refuse([(one.raw, one.field, one.reason) for one in outcome.refused])
        if wait is not None and outcome.committed:
            await self._wait(outcome, receipt, wait)
        return outcome

    async def _screen(self, body: bytes, form: Form, key: str | None) -> Screened:
        ingest = self._settings().ingest
        bounds = self._screener.bounds(ingest)
        fast = self._screener.whole(body, form, bounds, ingest.max_records, key)
        if fast is not None:
            return fast
        steps = self._screener.steps(body, form, bounds, ingest.max_records, key)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                return cast("Screened", done.value)
            await self._clock.sleep(0)

    async def _append(
        self, screened: Screened, outcome: Outcome, seen: Sequence[Seen], *, strict: bool
    ) -> Receipt | None:
        if strict and outcome.refused:
            outcome.committed = False
            return None
        if not screened.records:
            return None
        deadline = self._clock.monotonic() + _ROOM_SECONDS
        while True:
            try:
                # Taken in the tick in which the spool gets the records: a phase change makes good all that came before.
                with self._hold() as hold:
                    standing = hold.standing
                    outcome.policy = standing.policy
                    receipt = await self._spool.append(
                        screened.records, screened.encoded, self._obligation(standing), seen
                    )
                    if not hold.valid:  # the fleet may have gone on without us: owe them to whom it says, too
                        undecided = Standing(standing.policy, fenced=True).obligation
                        receipt = await self._spool.append(screened.records, screened.encoded, undecided)
            except Busy as busy:
                if self._clock.monotonic() < deadline and await self._make_room(busy):
                    self.check_open()
                    continue
                raise
            self._accepted(standing.policy, len(screened.records))
            return receipt

    async def _append_known(self, screened: Screened, outcome: Outcome, *, strict: bool) -> Receipt | None:
        """Append what the dedup window does not know; settles duplicates and conflicts in ``outcome``."""
        ids = [
            None if content is None else _key(record.log_id)
            for record, content in zip(screened.records, screened.contents, strict=True)
        ]
        await self.window.settled([log_id for log_id in ids if log_id is not None])
        fresh = self._sift(screened, ids, outcome)  # no await between here and the claim
        receipt = await self._append_fresh(screened, outcome, fresh, strict=strict)
        if outcome.committed and outcome.duplicates:
            self._metrics.records_duplicate.inc(len(outcome.duplicates))
        return receipt

    async def _append_fresh(
        self, screened: Screened, outcome: Outcome, fresh: Mapping[bytes, bytes], *, strict: bool
    ) -> Receipt | None:
        """Append records whose ids, as far as clients gave them, are ``fresh`` with their contents."""
        if not fresh:
            return await self._append(screened, outcome, (), strict=strict)
        claim = self.window.claim(fresh)
        try:
            seen = [Seen(log_id, content) for log_id, content in fresh.items()]
            receipt = await self._append(screened, outcome, seen, strict=strict)
            if receipt is not None:
                claim.keep()
        finally:
            claim.drop()
        return receipt

    def _sift(self, screened: Screened, ids: Sequence[bytes | None], outcome: Outcome) -> dict[bytes, bytes]:
        """Leave in ``screened`` only the records that are new; returns their ids and contents."""
        fresh: dict[bytes, bytes] = {}
        new: list[int] = []
        for position, (log_id, content) in enumerate(zip(ids, screened.contents, strict=True)):
            if log_id is None or content is None:
                new.append(position)
                continue
            known = fresh.get(log_id) or self.window.content(log_id)
            index = screened.indexes[position]
            if known is None:
                fresh[log_id] = content
                new.append(position)
            elif known == content:
                outcome.duplicates.append(index)
            elif outcome.batch:
                raw = msgspec.json.encode(to_dict(screened.records[position]))
                outcome.refused.append(Refused(index, "log_id", Rule.CONFLICT, _CONFLICT, raw))
                outcome.log_ids[index] = None
            else:
                self._metrics.records_refused.labels(Rule.CONFLICT.value).inc()
                raise ContentConflict(_CONFLICT)
        if len(new) < len(ids):
            outcome.refused.sort(key=lambda one: one.index)
            screened.records = [screened.records[i] for i in new]
            screened.encoded = [screened.encoded[i] for i in new]
        return fresh

    async def _wait(self, outcome: Outcome, receipt: Receipt | None, seconds: float) -> None:
        """Wait for the required stores, then say where each record stands that is not there yet."""
        outcome.waited = True
        required = outcome.policy.required
        limit = asyncio.timeout(min(seconds, self._longest_wait))
        self._waits.add(limit)
        try:
            async with limit:
                if receipt is not None:
                    await self._spool.wait_settled(receipt, required)
                await self._wait_for_duplicates(outcome, required)
        except TimeoutError:
            pass  # durable all the same; the answer says which store is behind
        finally:
            self._waits.discard(limit)
        outcome.states = await self._states(outcome, receipt, required)
        outcome.stored = not outcome.states

    async def _wait_for_duplicates(self, outcome: Outcome, required: frozenset[str]) -> None:
        """Duplicates have no receipt: look at the first that is pending until it is not, then at the next.

        One look at a time: looking at all of a large batch each time would leave no time for anybody else.
        """
        for log_id in map(outcome.log_ids.__getitem__, outcome.duplicates):
            while log_id is not None:
                status = await self._spool.status(log_id)
                if status is None or _is_settled(status.stores, required):
                    break
                await self._clock.sleep(_STATUS_POLL)

    async def _states(
        self, outcome: Outcome, receipt: Receipt | None, required: frozenset[str]
    ) -> dict[int, Mapping[str, str]]:
        """The stores of each accepted record that a required store does not have, or of which nobody can tell."""
        known = set(outcome.duplicates)
        mine = {log_id: i for i, log_id in enumerate(outcome.log_ids) if log_id is not None and i not in known}
        states: dict[int, Mapping[str, str]] = {}
        if receipt is not None:
            for log_id, stores in (await self._spool.fates(receipt, list(mine))).items():
                if not _is_delivered(stores, required):
                    states[mine[log_id]] = stores or dict.fromkeys(sorted(required), _UNDECIDED)
        for number, index in enumerate(outcome.duplicates):
            if number % _BETWEEN_PAUSES == _BETWEEN_PAUSES - 1:
                await self._clock.sleep(0)
            found = await self._spool.status(outcome.log_ids[index] or "")
            if found is None:
                states[index] = dict.fromkeys(sorted(required), "not_in_local_retention")
            elif not _is_delivered(found.stores, required):
                states[index] = found.stores or dict.fromkeys(sorted(required), _UNDECIDED)
        return states

    def _obligation(self, standing: Standing) -> Obligation:
        """The same object while the standing stays, so that nothing is built per request."""
        last = self._last_standing
        if last is None or standing.policy is not last.policy or standing.fenced is not last.fenced:
            self._last_standing = standing
            self._last_obligation = standing.obligation
        return self._last_obligation

    def _accepted(self, policy: Policy, count: int) -> None:
        counter = self._accepted_counters.get(policy.phase)
        if counter is None:
            counter = self._metrics.records_accepted.labels(policy.phase.label)
            self._accepted_counters[policy.phase] = counter
        counter.inc(count)

    def _count(self, refused: Sequence[Refused]) -> None:
        for rule, count in Counter(one.rule for one in refused).items():
            self._metrics.records_refused.labels(rule.value).inc(count)


def _key(log_id: str) -> bytes:
    return bytes.fromhex(log_id.replace("-", ""))


def _log_ids(screened: Screened) -> list[str | None]:
    log_ids: list[str | None] = [None] * screened.total
    for index, record in zip(screened.indexes, screened.records, strict=True):
        log_ids[index] = record.log_id
    return log_ids


def _alone(refused: Refused) -> InvalidRecord | TooLarge:
    """A single record's refusal as the request's."""
    if refused.rule is Rule.TOO_LARGE:
        return TooLarge(f"{refused.field}: {refused.reason}")
    return InvalidRecord(refused.field, refused.reason)


def _is_settled(stores: Mapping[str, Fate], required: frozenset[str]) -> bool:
    return not any(stores.get(store) in _UNSETTLED for store in required)


def _is_delivered(stores: Mapping[str, Fate], required: frozenset[str]) -> bool:
    return all(stores.get(store) == "delivered" for store in required)

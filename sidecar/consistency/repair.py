"""Repair: what a validation found missing is inserted, from the store that has it; nothing is ever deleted.

It validates as any run does and acts on what is left, stretch by stretch, so what it writes was missing a moment ago by
a strongly consistent read, after everybody who could still deliver it had been asked.

* *Insert missing* (the default): by ``fill``, which stores a record only where its id is not there: a live write that
  comes in between stays, whatever it is. The bytes are those of the live path: the same encoder.
* *Overwrite* (only where asked): DynamoDB's item of a field_mismatch is replaced by PostgreSQL's row, on the condition
  that it is still the one that was compared. Rows of PostgreSQL are never updated.
* *Left alone*: dead letters (redrive or discard them), conflicts (two records claim one id: a person decides), what is
  in flight, in a gap (backfill), expired, or somebody else's. What retention removed, or would remove within the hour,
  is not inserted.

The days written to are noted before each write, so that their verdicts are stale whatever ends it. A second run finds
nothing to do.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

from sidecar.clock import Clock
from sidecar.consistency.patience import PASSING, patiently, pause
from sidecar.consistency.types import Difference, Reason
from sidecar.errors import RetryClass, StoreError
from sidecar.phase import DYNAMODB, POSTGRES, StoreName
from sidecar.record import LogRecord
from sidecar.stores.base import Failure, Store
from sidecar.verdicts import ValidationLedger, WrittenDays

INSERTED: Final = frozenset({Reason.MISSING_IN_SQL, Reason.MISSING_IN_DYNAMO, Reason.OLD_WRITER})
"""Reasons that inserting mends."""
_TRIES: Final = 8  # of a batch of which some are throttled: half a minute
_KEPT: Final = 100  # refusals named in the answer
_OF_A_RECORD: Final = frozenset({RetryClass.PERMANENT, RetryClass.UNKNOWN})

Replace = Callable[[LogRecord, LogRecord], Awaitable[bool]]
"""(new, seen): put ``new`` into DynamoDB if the item is still ``seen``; whether it was. Raises StoreError."""


class Retention(Protocol):
    """From which log_timestamp on a store keeps records."""

    def __call__(self, store: StoreName) -> int:
        """Microseconds; a margin for clocks included."""
        ...


@dataclass(slots=True)
class Repaired:
    """What was done, or would be."""

    dry_run: bool
    inserted: Counter[str] = field(default_factory=Counter)  # by store
    overwritten: int = 0
    already_there: int = 0  # somebody wrote it meanwhile
    changed_meanwhile: int = 0  # not overwritten: it is not what was compared any more
    expired: int = 0
    refused: list[dict[str, str]] = field(default_factory=list)  # log_id, store, reason; cut at a hundred
    refused_total: int = 0
    left: Counter[str] = field(default_factory=Counter)  # by reason: not for repair to mend

    def document(self) -> dict[str, object]:
        """For people and programs."""
        return {
            "dry_run": self.dry_run,
            "inserted": dict(self.inserted),
            "overwritten": self.overwritten,
            "already_there": self.already_there,
            "changed_meanwhile": self.changed_meanwhile,
            "expired": self.expired,
            "refused": self.refused_total,
            "refusals": self.refused,
            "left": dict(self.left),
        }


class Repair:
    """Give ``mend`` to a validator as ``found``.

    Args:
        stores: by name. replace: see ``Replace``. retention: see ``Retention``.
        ledger: where the days written to are noted.
        dry_run: change nothing, say what would be done; ``rehearse`` says what would be refused.
        overwrite: also replace DynamoDB's side of a field_mismatch.
    """

    def __init__(
        self,
        stores: Mapping[StoreName, Store],
        replace: Replace,
        retention: Retention,
        ledger: ValidationLedger,
        *,
        clock: Clock,
        dry_run: bool,
        overwrite: bool,
    ) -> None:
        self._stores = stores
        self._replace = replace
        self._retention = retention
        self._days = WrittenDays(ledger, clock)
        self._clock = clock
        self._overwrite = overwrite
        self.result = Repaired(dry_run)

    async def mend(self, found: Sequence[Difference]) -> None:
        """Act on these. Raises StoreError where a store takes nothing."""
        missing: dict[StoreName, list[LogRecord]] = {POSTGRES: [], DYNAMODB: []}
        changed = []
        for each in found:
            present = each.sql or each.dynamo
            if each.reason in INSERTED and present is not None:
                missing[DYNAMODB if each.dynamo is None else POSTGRES].append(present)
            elif each.reason is Reason.FIELD_MISMATCH and self._overwrite:
                changed.append(each)
            else:
                self.result.left[each.reason.value] += 1
        for store, records in missing.items():
            await self._insert(store, records)
        for each in changed:
            await self._put(each)

    async def _note(self, records: Sequence[LogRecord]) -> None:
        await patiently(lambda: self._days.before([record.log_timestamp for record in records]), self._clock)

    async def _insert(self, name: StoreName, records: Sequence[LogRecord]) -> None:
        limits = self._stores[name].limits
        batch: list[LogRecord] = []
        size = 0
        for record in records:
            if record.log_timestamp < self._retention(name):
                self.result.expired += 1
                continue
            weight = sum(len(t) * 4 for t in (record.request_data, record.response_data, record.error_message) if t)
            if batch and (len(batch) >= limits.max_records or size + weight > limits.max_bytes):
                await self._fill(name, batch)
                batch, size = [], 0
            batch.append(record)
            size += weight
        if batch:
            await self._fill(name, batch)

    async def _fill(self, name: StoreName, batch: Sequence[LogRecord]) -> None:
        store = self._stores[name]
        if self.result.dry_run:
            refused = await patiently(lambda: store.rehearse(batch), self._clock)
            self._refuse(name, batch, refused)
            self.result.inserted[name] += len(batch) - len(refused)
            return
        rest = list(batch)
        for attempt in range(_TRIES):
            await self._note(rest)
            try:
                done = await patiently(partial(store.fill, rest), self._clock)
            except StoreError as error:
                if error.retry_class not in _OF_A_RECORD:
                    raise
                if len(rest) == 1:
                    self._refuse(name, rest, [Failure(0, error.retry_class, error.reason, error.code)])
                    return
                middle = len(rest) // 2
                await self._fill(name, rest[:middle])
                await self._fill(name, rest[middle:])
                return
            later = [f for f in done.failures if f.retry_class in PASSING]
            final = [f for f in done.failures if f.retry_class not in PASSING]
            self._refuse(name, rest, final)
            stored = sum(done.stored)
            self.result.inserted[name] += stored
            self.result.already_there += len(rest) - stored - len(done.failures)
            rest = [rest[f.index] for f in later]
            if not rest:
                return
            await self._clock.sleep(pause(attempt))
        raise StoreError(name, RetryClass.THROTTLE, "repair gave up: it throttles; run it again later")

    async def _put(self, each: Difference) -> None:
        sql, dynamo = each.sql, each.dynamo
        if sql is None or dynamo is None:
            return
        if sql.log_timestamp < self._retention(DYNAMODB):
            self.result.expired += 1
        elif self.result.dry_run:
            self.result.overwritten += 1
        else:
            await self._note([sql, dynamo])  # where the item stood on another day, that one loses it
            if await patiently(lambda: self._replace(sql, dynamo), self._clock):
                self.result.overwritten += 1
            else:
                self.result.changed_meanwhile += 1

    def _refuse(self, name: StoreName, batch: Sequence[LogRecord], failures: Sequence[Failure]) -> None:
        self.result.refused_total += len(failures)
        for failure in failures[: _KEPT - len(self.result.refused)]:
            log_id = batch[failure.index].log_id
            self.result.refused.append({"log_id": log_id, "store": name, "reason": failure.reason})

"""What old writers put into an adopted table goes on to DynamoDB too, as long as the phase writes there.

The history is copied by ``sidecar backfill``; meanwhile, and until the last old writer is switched over, new rows of
theirs appear. One sidecar of the fleet (a lease) copies them as they come, every ``EVERY`` seconds, from the bound that
was kept last (``sidecar.stores.postgres_tail``): none is missed, and what the overlap reads twice is not stored twice.

STAGES, and a failure at each:

1. The phase owes records to DynamoDB and nobody has begun: ``begin`` waits for the writers of that moment, the bound is
   kept beside the table. Every row up to it is history, for whichever backfill comes later.
2. A look, then pages of rows, each put where it is absent. What DynamoDB refuses as data (too large) is counted,
   logged and left to validation, which names it; a throttle or an outage ends the round, and the next begins at the
   same bound. The days of a page are noted before it is put: their verdicts are overtaken.
3. The new bound is kept. A crash before it repeats the round.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Final

from sidecar.clock import Clock
from sidecar.errors import RetryClass, StoreError
from sidecar.fleet_tables import FleetStore
from sidecar.phase import DYNAMODB, Policy
from sidecar.record import LogRecord
from sidecar.stores.base import Store
from sidecar.stores.postgres_tail import Bound, OldRows
from sidecar.verdicts import WrittenDays

log = logging.getLogger(__name__)

EVERY: Final = 5.0  # seconds
_LEASE: Final = "old-rows"
_PATIENCE: Final = 60.0  # seconds that a beginning waits for those who are writing
_LEASE_SECONDS: Final = 90.0  # longer than a beginning or a page takes
_BATCH: Final = 100
_REFUSED: Final = frozenset({RetryClass.PERMANENT, RetryClass.UNKNOWN, RetryClass.CONFLICT})


class OldRowsCopy:
    """Copies the rows of old writers.

    Args:
        rows: of the adopted table.
        target: DynamoDB.
        days: where it is noted which days were written to.
        leases: where one sidecar of the fleet is chosen.
        policy: of the phase in force.
        holder: this instance.
        clock: for the pauses.
    """

    def __init__(
        self,
        rows: OldRows,
        target: Store,
        leases: FleetStore,
        days: WrittenDays,
        *,
        policy: Callable[[], Policy],
        holder: str,
        clock: Clock,
    ) -> None:
        self._rows = rows
        self._target = target
        self._leases = leases
        self._days = days
        self._policy = policy
        self._holder = holder
        self._clock = clock

    async def run(self) -> None:
        """Until cancelled."""
        failing = False
        while True:
            try:
                await self.round()
            except StoreError as error:
                if not failing:
                    log.warning("rows of old writers wait to be copied", extra={"what": str(error)})
                failing = True
            else:
                failing = False
            await self._clock.sleep(EVERY)

    async def round(self) -> int:
        """One look and its rows; how many were stored. Raises StoreError; nothing is lost by that."""
        if DYNAMODB not in self._policy().owed or not await self._leased():
            return 0
        bound = await self._rows.copied()
        if bound is None:
            bound = await self._rows.begin(patience=_PATIENCE)
            await self._rows.keep_copied(bound)
            log.info("rows of old writers are copied from here on", extra={"key": bound.high})
        upto = await self._rows.advance(bound)
        stored = await self._copy(bound, upto)
        if upto != bound:
            await self._rows.keep_copied(upto)
        return stored

    async def _copy(self, bound: Bound, upto: Bound) -> int:
        stored = refused = 0
        async for page in self._rows.rows(bound, upto):
            for start in range(0, len(page), _BATCH):
                new, bad = await self._fill(page[start : start + _BATCH])
                stored, refused = stored + new, refused + bad
            await self._leased()
        if stored or refused:
            log.info("rows of old writers copied", extra={"stored": stored, "refused": refused, "key": upto.high})
        return stored

    async def _fill(self, batch: Sequence[LogRecord]) -> tuple[int, int]:
        """How many were stored and how many refused as data. Raises StoreError where the store is in trouble."""
        await self._days.before(record.log_timestamp for record in batch)
        try:
            done = await self._target.fill(batch)
        except StoreError as error:
            if error.retry_class not in _REFUSED:
                raise
        else:
            for failure in done.failures:
                if failure.retry_class not in _REFUSED:
                    raise StoreError(DYNAMODB, failure.retry_class, failure.reason, failure.code)
            return sum(done.stored), len(done.failures)
        if len(batch) == 1:
            return 0, 1
        half = len(batch) // 2
        first, second = await self._fill(batch[:half]), await self._fill(batch[half:])
        return first[0] + second[0], first[1] + second[1]

    async def _leased(self) -> bool:
        return await self._leases.acquire_lease(_LEASE, self._holder, _LEASE_SECONDS)

"""What an adopted table asks of the sidecar around its store: bounds at the door, and the watch over old writers.

The door refuses what a column could not hold, whatever the phase, and it opens while databases are down. So the
columns' bounds are looked up whenever a connection to PostgreSQL opens, and the spool remembers them for the next
start. Only the first start of all waits for the database, as long as one connection may take; without an answer the
record's own bounds hold until there is one, and what a column then refuses is a dead letter, as any other such record.

The watch over old writers, and the copy of what they write (``old_rows``), run beside delivery. The watch looks every
``_WATCH`` seconds, for the whole fleet (``stores.postgres_tail``); a look that fails is made up for by the next one.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import msgspec

from sidecar.app.consistency import home_of
from sidecar.app.old_rows import OldRowsCopy
from sidecar.clock import Clock
from sidecar.errors import StoreError
from sidecar.evidence import NotYet, Writers
from sidecar.intake import Intake
from sidecar.phase import POSTGRES, Policy, StoreName
from sidecar.settings import Postgres
from sidecar.spool import Spool
from sidecar.stores.base import Store
from sidecar.stores.computed_ids import ComputedIds
from sidecar.stores.postgres import PostgresStore
from sidecar.stores.postgres_adoption import ColumnLimits
from sidecar.verdicts import WrittenDays

log = logging.getLogger(__name__)

_META: Final = "adopted_columns"
_WATCH: Final = 15.0  # seconds


class _Remembered(msgspec.Struct):
    """The value in the spool's meta table."""

    table: str
    texts: dict[str, int]
    numbers: dict[str, tuple[int, int]]


class AdoptedTable:
    """Keeps the door as narrow as the table, and looks for old writers; does nothing where the table is our own."""

    def __init__(
        self,
        stores: Mapping[StoreName, Store],
        options: Postgres,
        intake: Intake,
        spool: Spool,
        *,
        policy: Callable[[], Policy],
        instance: str,
        clock: Clock,
    ) -> None:
        store = stores[POSTGRES]
        self._target = home_of(stores)
        self._policy = policy
        self._instance = instance
        self._store = store if isinstance(store, PostgresStore) and options.adopt.enabled else None
        self._table = f"{options.schema}.{options.table}"
        self._reserved = ComputedIds(options.adopt.tag).prefix
        self._intake = intake
        self._spool = spool
        self._clock = clock
        self._limits = ColumnLimits()
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Before the door opens: the bounds of the last run; at the first start of all, those of the table."""
        if self._store is None:
            return
        self._intake.narrow({}, {}, self._reserved)
        self._store.on_columns = self._seen
        remembered = self._spool.meta(_META)
        if remembered is not None:
            last = msgspec.json.decode(remembered, type=_Remembered)
            if last.table == self._table:
                self._intake.narrow(last.texts, last.numbers, self._reserved)
                return
        try:
            await self._store.ping()
        except StoreError as error:
            log.warning(
                "the adopted table's columns are not known yet; the record's own bounds hold until they are",
                extra={"what": str(error)},
            )

    def tasks(self) -> Sequence[tuple[str, Callable[[], Awaitable[None]]]]:
        """What is to be kept running."""
        if self._store is None or self._store.old_rows is None:
            return ()
        rows, leases = self._store.old_rows, self._store.fleet
        copy = OldRowsCopy(
            rows,
            self._target,
            leases,
            WrittenDays(self._target.verdicts, self._clock),
            policy=self._policy,
            holder=self._instance,
            clock=self._clock,
        )
        return (
            ("adopted table's columns", self._remember),
            ("adopted table's writers", self._watch),
            ("rows of old writers", copy.run),
        )

    async def _remember(self) -> None:
        """Until cancelled: keep the bounds that were seen last."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            limits = self._limits
            kept = _Remembered(self._table, dict(limits.texts), dict(limits.numbers))
            await self._spool.set_meta(_META, msgspec.json.encode(kept).decode())

    async def _watch(self) -> None:
        """Until cancelled: look for old writers."""
        assert self._store is not None  # noqa: S101  (see tasks)
        assert self._store.old_rows is not None  # noqa: S101  (of an adopted table)
        failing = False
        while True:
            try:
                await self._store.old_rows.old_writers()
            except StoreError as error:
                if not failing:
                    log.warning("cannot look for old writers", extra={"what": str(error)})
                failing = True
            else:
                failing = False
            await self._clock.sleep(_WATCH)

    def _seen(self, limits: ColumnLimits) -> None:
        self._intake.narrow(limits.texts, limits.numbers, self._reserved)
        self._limits = limits
        self._changed.set()


def old_writers(stores: Mapping[StoreName, Store]) -> Writers:
    """Who answers whether anybody but the fleet writes (``sidecar.evidence.Evidence.writers``)."""
    store = stores[POSTGRES]
    found = store.old_rows if isinstance(store, PostgresStore) else None
    return NotYet() if found is None else found

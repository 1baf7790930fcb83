"""How ``clear-dynamodb`` is put together."""

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

from sidecar.app.backfill import job_store
from sidecar.app.consistency import home_of
from sidecar.app.delivery import build_stores
from sidecar.backfill.clearing import Asked, Stand, clear
from sidecar.backfill.comparison import Comparison
from sidecar.clock import SystemClock
from sidecar.phase import DYNAMODB, POSTGRES
from sidecar.settings import Settings
from sidecar.stores.dynamodb_schema import drop
from sidecar.stores.dynamodb_wire import Wire


async def clear_dynamodb(settings: Settings, asked: Asked, say: Callable[[str], None]) -> None:
    """Guarded (``sidecar.backfill.clearing``). Raises NotCleared, StoreError."""
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        stores = build_stores(settings, clock)
        for store in stores.values():
            stack.push_async_callback(store.close)
        jobs = await stack.enter_async_context(job_store(settings, clock))
        wire = Wire(settings.dynamodb, clock=clock)
        stack.push_async_callback(wire.close)

        async def recreate() -> Sequence[str]:
            gone = await drop(wire, settings.dynamodb, clock=clock)
            return [*gone, *await stores[DYNAMODB].create()]

        stand = Stand(
            table=settings.dynamodb.table,
            wished=settings.phase,
            postgres=stores[POSTGRES],
            ledgers={name: store.gap_ledger for name, store in stores.items()},
            fleets={name: store.fleet for name, store in stores.items()},
            only_in_dynamodb=Comparison(
                stores[DYNAMODB],
                stores[POSTGRES],
                settle_us=int(settings.phases.max_lag * 1_000_000),
                now_us=clock.now_us,
            ),
            jobs=jobs,
            verdicts=home_of(stores).verdicts,
            recreate=recreate,
            clock=clock,
        )
        await clear(stand, asked, say)

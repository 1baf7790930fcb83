"""How a backfill is put together and run to its end: stores, pace, checkpoint, metrics, signals."""

import asyncio
import random
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final

import msgspec
from prometheus_client import CollectorRegistry

from sidecar.api.listener import Listener
from sidecar.api.parts import OpsParts, Readiness
from sidecar.api.server import build_ops
from sidecar.app.consistency import home_of
from sidecar.app.delivery import build_stores
from sidecar.app.parts import LedgeredStore
from sidecar.backfill.checkpoint import Checkpoint, JobStore, Keeper
from sidecar.backfill.comparison import Comparison
from sidecar.backfill.filler import Filler, GaveUp
from sidecar.backfill.gaps import Gaps
from sidecar.backfill.job import FIRST_US, Job
from sidecar.backfill.reading import QUIET_READS, Reading
from sidecar.backfill.run import Backfill, Parts
from sidecar.clock import Clock, SystemClock
from sidecar.errors import RetryClass, StoreError
from sidecar.metrics import Metrics
from sidecar.phase import StoreName
from sidecar.record import LogRecord
from sidecar.retry import Backoff
from sidecar.settings import Settings
from sidecar.stores.base import Store
from sidecar.stores.dynamodb_items import DAY
from sidecar.stores.dynamodb_jobs import DynamoDBJobs
from sidecar.stores.dynamodb_wire import Wire
from sidecar.verdicts import WrittenDays

PATIENCE: Final = 900.0  # seconds without any progress until it gives up
_OPENING: Final = 60.0  # seconds in which the checkpoint must be found
_TICK: Final = 0.2  # seconds between two looks at the progress
_STAGES: Final = ("survey", "copy", "verify", "done")


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asks for."""

    job: Job
    rate: float | None = None  # records/s of this process
    units: float | None = None  # DynamoDB's capacity units/s of this process
    skip_refused: bool = False
    restart: bool = False
    ops: str | None = None  # host:port for /metrics


@asynccontextmanager
async def job_store(settings: Settings, clock: Clock) -> AsyncIterator[JobStore]:
    """Where checkpoints and orders are kept."""
    wire = Wire(settings.dynamodb, clock=clock)
    try:
        yield DynamoDBJobs(wire, settings.dynamodb)
    finally:
        await wire.close()


async def backfill(settings: Settings, request: Request, show: Callable[[Backfill], None]) -> Checkpoint:
    """Run one job's share until it ends or is told to stop (SIGTERM, SIGINT); how far it came.

    ``show`` is called often with the run, for whoever watches.

    Raises:
        StoreError: a store took or gave nothing for too long, or another process has this shard.
        ConfigError: ``ops`` cannot be listened on.
    """
    clock = SystemClock()
    if request.rate is not None:
        quiet = min(QUIET_READS, settings.dynamodb.read_in_flight)
        dynamodb = msgspec.structs.replace(settings.dynamodb, read_in_flight=quiet)
        settings = msgspec.structs.replace(settings, dynamodb=dynamodb)
    async with AsyncExitStack() as stack:
        stores = build_stores(settings, clock)
        for store in stores.values():
            stack.push_async_callback(store.close)
        jobs = await stack.enter_async_context(job_store(settings, clock))
        keeper = Keeper(jobs, request.job.key, clock)
        checkpoint = await _take(keeper, request, clock)
        run = Backfill(request.job, build_parts(settings, request, stores, keeper, clock), checkpoint)
        if request.ops is not None:
            listener = _listener(run, request.ops, settings)
            await listener.start()
            stack.push_async_callback(listener.stop, 1.0)
        watching = asyncio.create_task(_watch(run, show, clock), name="backfill-progress")
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, run.stop)
        try:
            await run.run()
        except GaveUp as gave_up:
            raise gave_up.cause from None
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
        show(run)
        return checkpoint


async def _take(keeper: Keeper, request: Request, clock: Clock) -> Checkpoint:
    """The checkpoint; a store that is busy or away for a moment is asked again. Raises StoreError."""
    end = clock.monotonic() + _OPENING
    while True:
        try:
            return await keeper.take(secrets.token_hex(4), dry=request.job.dry, restart=request.restart)
        except StoreError as error:
            if error.retry_class not in (RetryClass.TRANSIENT, RetryClass.THROTTLE) or clock.monotonic() > end:
                raise
        await clock.sleep(1.0)


def build_parts(
    settings: Settings,
    request: Request,
    stores: "dict[StoreName, LedgeredStore]",
    keeper: Keeper,
    clock: Clock,
) -> Parts:
    """Everything that a run is made of."""
    job = request.job
    source: Store = stores[job.source]
    destination: Store = stores[job.destination]
    rng = random.Random()  # noqa: S311  (jitter, not secrets)
    ttl_days = settings.dynamodb.ttl_days
    days = WrittenDays(home_of(stores).verdicts, clock)

    async def before(records: Sequence[LogRecord]) -> None:
        await days.before(record.log_timestamp for record in records)

    filler = Filler(
        destination,
        settings.retry,
        before=before,
        clock=clock,
        rng=rng,
        rate=request.rate,
        units=request.units,
        patience=PATIENCE,
    )
    reading = Reading(filler.pace, clock)
    return Parts(
        source=source,
        destination=destination,
        filler=filler,
        reading=reading,
        keeper=keeper,
        gaps=Gaps({name: store.gap_ledger for name, store in stores.items()}, job.destination),
        validator=Comparison(
            source,
            destination,
            settle_us=int(settings.phases.max_lag * 1_000_000),
            now_us=clock.now_us,
            paced=reading.paced,
        ),
        clock=clock,
        backoff=Backoff(settings.retry.delay, settings.retry.max_delay, rng),
        visible_from=lambda: FIRST_US if ttl_days is None else clock.now_us() - ttl_days * DAY + 1,
        patience=PATIENCE,
        skip_refused=request.skip_refused,
    )


async def _watch(run: Backfill, show: Callable[[Backfill], None], clock: Clock) -> None:
    while True:
        show(run)
        await clock.sleep(_TICK)


def _listener(run: Backfill, address: str, settings: Settings) -> Listener:
    """/metrics and health of this process."""
    metrics = Metrics(CollectorRegistry())
    observe_backfill(metrics, run)
    parts = OpsParts(
        metrics.registry,
        ready=lambda: Readiness(ready=True),
        health=lambda: {
            "stage": run.checkpoint.stage,
            "state": run.parts.filler.pace.state(run.parts.clock.monotonic()),
        },
    )
    return Listener(build_ops(parts, metrics), address, settings.listen, newest_gets_in=True)


def observe_backfill(metrics: Metrics, run: Backfill) -> None:
    """The run's progress, as the checkpoint has it."""
    seen = run.checkpoint
    filler = run.parts.filler
    metrics.observe("backfill_stage", lambda: [((s,), float(seen.stage == s)) for s in _STAGES])
    metrics.observe(
        "backfill_records_total",
        lambda: [
            (("copied",), float(seen.copied)),
            (("present",), float(seen.present)),
            (("refused",), float(sum(seen.refused.values()))),
        ],
    )
    metrics.observe("backfill_left_records", lambda: [((), float(run.left))])
    metrics.observe("backfill_rate_limit_records", lambda: [((), filler.pace.rate.current)])
    metrics.observe(
        "backfill_consumed_capacity_units_total",
        lambda: [((target,), units) for target, units in filler.capacity.consumed.items()],
    )


async def with_jobs(settings: Settings, use: Callable[[JobStore], Awaitable[int]]) -> int:
    """Something to do with the checkpoints and orders of all jobs."""
    async with job_store(settings, SystemClock()) as jobs:
        return await use(jobs)

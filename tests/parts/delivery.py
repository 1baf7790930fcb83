"""One shipper between a real spool and a real store, in this process: a scenario without whole sidecars."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.dead_letter import DeadLetters
from sidecar.metrics import Metrics
from sidecar.record import LogRecord, encode
from sidecar.retry import State
from sidecar.shipper import Shipper
from sidecar.spool import DeadLetter, Obligation, Spool
from sidecar.stores.base import Store
from tests.parts.sidecar import eventually

QUICK = settings.Retry(delay=0.02, max_delay=0.1, probe_interval=0.1, fk_grace=3.0)
STAMP_US = 1_795_000_000_000_000


def record(n: int, **changes: object) -> LogRecord:
    """A record told from others by its number; every nullable field set."""
    fields: dict[str, object] = {
        "log_id": f"00000000-0000-7000-8000-{n:012x}",
        "application_id": n,
        "log_type": "INFO",
        "service_name": "orders",
        "request_data": "{}",
        "response_data": None,
        "status_code": 200,
        "is_success": True,
        "error_message": None,
        "processing_time_ms": n,
        "log_timestamp": STAMP_US + n,
        "correlation_id": f"c-{n}",
        "user_id": "u",
    }
    return LogRecord(**{**fields, **changes})  # type: ignore[arg-type]  (the fields by name)


@dataclass
class Delivery:
    """A running shipper, and what is asked of it."""

    spool: Spool
    shipper: Shipper
    letters: DeadLetters
    name: str
    runs: Callable[[], bool]

    async def accept(self, records: Sequence[LogRecord]) -> None:
        """Make records durable, owed to the store."""
        obligation = Obligation(0, frozenset({self.name}))
        await self.spool.append(records, [encode(each) for each in records], obligation)

    async def settled(self, seconds: float = 20.0) -> None:
        """Wait until nothing is pending; the account adds up and the shipper never died."""
        await eventually(lambda: self.spool.counters(self.name).pending == 0, seconds=seconds, what=self.shipper.status)
        c = self.spool.counters(self.name)
        assert c.owed == c.delivered + c.dead_lettered + c.released + c.discarded + c.quarantined
        assert self.runs(), "the shipper died"

    async def state(self, *states: State) -> None:
        """Wait until delivery is in one of these states."""
        await eventually(lambda: self.shipper.status().state in states, what=self.shipper.status)

    async def dead(self) -> Sequence[DeadLetter]:
        """The store's dead letters."""
        return await self.spool.dead_letters(store=self.name, limit=10_000)


@asynccontextmanager
async def delivering(
    directory: Path, store: Store, *, retry: settings.Retry = QUICK, max_dead_bytes: int = 2**30
) -> AsyncIterator[Delivery]:
    """Deliver to ``store`` until the block ends; the store stays open."""
    clock = SystemClock()
    options = settings.Spool(cap_bytes=64 * settings.MIB, ballast_bytes=0, allow_volatile=True)
    spool = Spool.open(directory, options, settings.Dedup(), ["postgres", "dynamodb"], clock)
    letters = DeadLetters(spool, max_bytes=max_dead_bytes, clock=clock)
    shipper = Shipper(
        store,
        spool,
        retry=lambda: retry,
        dead_letters_full=partial(letters.full, store.name),
        clock=clock,
        metrics=Metrics(CollectorRegistry()),
        rng=random.Random(7),
    )
    task = asyncio.create_task(shipper.run())
    try:
        yield Delivery(spool, shipper, letters, store.name, lambda: not task.done())
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await spool.close()

"""Reads for tests: over any stores, with a phase that the test turns and stores that the test breaks."""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry

from sidecar.clock import SystemClock
from sidecar.errors import RetryClass, StoreError
from sidecar.metrics import Metrics
from sidecar.phase import STORES, TABLE, Phase, StoreName
from sidecar.reads import Reads, Shadow, always
from sidecar.settings import Phases, Settings
from sidecar.settings import Reads as ReadSettings
from sidecar.stores.base import Store
from sidecar.stores.memory import MemoryStore

HOUR_US = 3_600_000_000


class Breakable:
    """A store in front of another: raises what the test plants, waits, or answers through ``twist``."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.failure: Exception | None = None
        self.gate = asyncio.Event()  # clear it to make every call wait
        self.gate.set()
        self.calls: list[str] = []
        self.twist: Any = None  # called with (operation, answer)

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self._store, name)
        if not asyncio.iscoroutinefunction(inner):
            return inner

        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            await self.gate.wait()
            if self.failure is not None:
                raise self.failure
            answer = await inner(*args, **kwargs)
            return answer if self.twist is None else self.twist(name, answer)

        return call

    def down(self, retry_class: RetryClass = RetryClass.TRANSIENT, code: str = "") -> None:
        """Refuse everything from now on."""
        self.failure = StoreError(self._store.name, retry_class, "planted by the test", code)


class PausableClock(SystemClock):
    """Never sleeps: each sleep is one turn of the loop; the monotonic clock goes on by what was slept."""

    def __init__(self) -> None:
        self.slept = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.slept

    async def sleep(self, seconds: float) -> None:
        self.slept += seconds
        await asyncio.sleep(0)


@dataclass
class ReadsStand:
    """Reads and their shadow over ``stores``; ``phase``, ``settings``, ``owed`` and ``trouble`` may be replaced."""

    stores: Mapping[StoreName, Any] = field(
        default_factory=lambda: {name: Breakable(MemoryStore(name)) for name in STORES}
    )
    phase: Phase = Phase.DUAL_WRITE
    settings: Settings = field(default_factory=Settings)
    owed: set[tuple[str, str]] = field(default_factory=set)  # (log_id, store)
    gaps: set[tuple[str, int]] = field(default_factory=set)  # (store, hour) with an open gap
    pending: dict[str, int] = field(default_factory=dict)
    trouble: dict[str, str] = field(default_factory=dict)
    clock: PausableClock = field(default_factory=PausableClock)

    def __post_init__(self) -> None:
        self.metrics = Metrics(CollectorRegistry())

        async def owed(log_id: str, _us: int, store: StoreName) -> bool:
            return (log_id, store) in self.owed

        async def gap(store: StoreName, first: int, last: int) -> bool:
            return any(s == store and first // HOUR_US <= hour <= last // HOUR_US for s, hour in self.gaps)

        self.shadow = Shadow(
            self.stores,
            lambda: self.settings,
            lambda: TABLE[self.phase],
            trouble=self.trouble.get,
            owed=owed,
            gap=gap,
            clock=self.clock,
            metrics=self.metrics,
            rng=random.Random(1),
        )
        self.reads = Reads(
            self.stores,
            always(lambda: TABLE[self.phase]),
            lambda: self.settings,
            owed=lambda store: self.pending.get(store, 0),
            clock=self.clock,
            metrics=self.metrics,
            shadow=self.shadow,
        )

    def configure(self, *, max_lag: float | None = None, **reads: Any) -> None:
        """Change settings of the reads section, live."""
        phases = self.settings.phases if max_lag is None else Phases(max_lag=max_lag)
        changed: ReadSettings = msgspec.structs.replace(self.settings.reads, **reads)
        self.settings = msgspec.structs.replace(self.settings, reads=changed, phases=phases)

    def keep(self, store: StoreName, days: int) -> None:
        """That store removes records which are older."""
        if store == "dynamodb":
            options = msgspec.structs.replace(self.settings.dynamodb, ttl_days=days)
            self.settings = msgspec.structs.replace(self.settings, dynamodb=options)
        else:
            kept = msgspec.structs.replace(self.settings.validation, postgres_retention_days=days)
            self.settings = msgspec.structs.replace(self.settings, validation=kept)

    async def write(self, batch: Any, *names: StoreName) -> None:
        """Into these stores, or both."""
        for name in names or STORES:
            size = self.stores[name].limits.max_records
            for start in range(0, len(batch), size):
                assert not (await self.stores[name].write(batch[start : start + size])).failures

    def shadowed(self) -> dict[tuple[str, str], int]:
        """(pattern, result) -> comparisons."""
        return dict(self.shadow.counts())

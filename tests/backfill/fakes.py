"""A place for checkpoints, a clock that is moved by hand, and stores that misbehave on command."""

import asyncio
from collections.abc import Callable, Sequence

from sidecar.errors import RetryClass, StoreError
from sidecar.phase import DYNAMODB, StoreName
from sidecar.record import LogRecord
from sidecar.stores.base import Failure, FillResult, WriteLimits
from sidecar.stores.memory import MemoryStore


class Jobs:
    """``JobStore`` in a dictionary; ``fail`` is called before each write and may raise."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[bytes, int]] = {}
        self.fail: Callable[[str], None] = lambda _when: None

    async def read(self, key: str) -> tuple[bytes, int] | None:
        return self.kept.get(key)

    async def write(self, key: str, value: bytes, expected: int) -> bool:
        self.fail("before")
        if self.kept.get(key, (b"", 0))[1] != expected:
            return False
        self.kept[key] = (value, expected + 1)
        self.fail("after")
        return True

    async def all(self, prefix: str) -> Sequence[tuple[str, bytes]]:
        return [(key, value) for key, (value, _) in sorted(self.kept.items()) if key.startswith(prefix)]


class Time:
    """Both clocks; a sleep moves them and lets others run."""

    def __init__(self, now_us: int = 1_800_000_000_000_000) -> None:
        self.us = now_us
        self.seconds = 0.0

    def now_us(self) -> int:
        return self.us

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        self.us += int(seconds * 1_000_000)
        await asyncio.sleep(0)


class Picky(MemoryStore):
    """A memory store whose ``fill`` throttles, refuses or fails as ``plan`` says, call by call; then it is good.

    ``plan`` holds ``throttle`` (nothing is taken), ``half`` (the second half of the batch is throttled), ``down``,
    ``blocked``, or None. ``refused`` are ids that it never takes.
    """

    def __init__(self, name: StoreName = DYNAMODB, *, batch: int = 25) -> None:
        super().__init__(name, WriteLimits(max_records=batch, max_bytes=1 << 22, max_in_flight=4))
        self.plan: list[str | None] = []
        self.refused: set[str] = set()
        self.filled: list[str] = []  # ids, in the order in which they were put

    async def rehearse(self, batch: Sequence[LogRecord]) -> Sequence[Failure]:
        return [
            Failure(index, RetryClass.PERMANENT, "not this one", "Refused")
            for index, each in enumerate(batch)
            if each.log_id in self.refused
        ]

    async def fill(self, batch: Sequence[LogRecord]) -> FillResult:
        await asyncio.sleep(0)
        fault = self.plan.pop(0) if self.plan else None
        if fault == "down":
            raise StoreError(self.name, RetryClass.TRANSIENT, "the connection failed")
        if fault == "blocked":
            raise StoreError(self.name, RetryClass.BLOCKED, "permission missing")
        if fault == "throttle":
            raise StoreError(self.name, RetryClass.THROTTLE, "throttled")
        if self.refused & {each.log_id for each in batch}:
            raise StoreError(self.name, RetryClass.PERMANENT, "some record, unknown which", "23514")
        taken = len(batch) // 2 if fault == "half" else len(batch)
        stored = list(await self.put_if_absent(batch[:taken]))
        self.filled += [each.log_id for each in batch[:taken]]
        failures = [Failure(i, RetryClass.THROTTLE, "throttled") for i in range(taken, len(batch))]
        units = (("table", float(taken)),)
        return FillResult([*stored, *[False] * (len(batch) - taken)], failures, units)

"""Virtual time: an event loop that never waits, machines that can be stopped, links that can be cut."""

import asyncio
import random
import selectors
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sidecar.errors import RetryClass, StoreError
from sidecar.fleet import MemoryFleetStore
from sidecar.phase import StoreName

T = TypeVar("T")


class _NoWaiting(selectors.SelectSelector):
    """Jumps to the next timer instead of waiting for it."""

    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("every task waits for something that nobody will do")
        self.loop.now += max(0.0, timeout)
        self.loop.on_step()
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs as fast as the machine can; ``on_step`` is called before each iteration."""

    def __init__(self) -> None:
        self.now = 0.0
        self.on_step: Callable[[], None] = lambda: None
        selector = _NoWaiting()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


class TrueClock:
    """The clock of a store's server: never jumps, never stops."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def now_us(self) -> int:
        return int(self._loop.now * 1e6)

    def monotonic(self) -> float:
        return self._loop.now

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Machine:
    """A Clock of its own speed and offset, that can be stopped like SIGSTOP does: every await ends after the thaw."""

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        self._loop = loop
        self._offset = rng.uniform(0, 1e6)
        self._rate = rng.uniform(0.98, 1.02)
        self.wall_offset_us = 0
        self._running = asyncio.Event()
        self._running.set()

    def now_us(self) -> int:
        return int(self._loop.now * 1e6) + self.wall_offset_us

    def monotonic(self) -> float:
        return self._loop.now * self._rate + self._offset

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / self._rate)
        await self.thawed()

    @property
    def frozen(self) -> bool:
        return not self._running.is_set()

    def freeze(self) -> None:
        self._running.clear()

    def thaw(self) -> None:
        self._running.set()

    async def thawed(self) -> None:
        while self.frozen:
            await self._running.wait()


class Network:
    """Which machine reaches which store, how slowly, and which replies are lost."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.down: set[StoreName] = set()
        self.cut: set[tuple[str, StoreName]] = set()
        self.lossy = True
        self.late: set[asyncio.Task[object]] = set()

    def broken(self, machine: str, store: StoreName) -> bool:
        return store in self.down or (machine, store) in self.cut

    async def call(self, name: str, machine: Machine, store: StoreName, operation: Callable[[], Awaitable[T]]) -> T:
        """One request and its reply; either may be lost, and a request may land long after its sender gave up."""
        rng = self._rng
        await asyncio.sleep(rng.uniform(0.001, 0.03))
        if self.broken(name, store):
            await asyncio.sleep(2.0)
            await machine.thawed()
            raise StoreError(store, RetryClass.TRANSIENT, "cannot be reached")
        if self.lossy and rng.random() < 0.02:
            late = asyncio.ensure_future(self._land(operation, rng.choice((0.5, 5.0, 40.0))))
            self.late.add(late)
            late.add_done_callback(self.late.discard)
            await asyncio.sleep(2.0)
            await machine.thawed()
            raise StoreError(store, RetryClass.TRANSIENT, "did not answer in time")
        result = await operation()
        if self.lossy and rng.random() < 0.3:
            await asyncio.sleep(rng.uniform(0.001, 0.5))
        await machine.thawed()
        return result

    @staticmethod
    async def _land(operation: Callable[[], Awaitable[T]], delay: float) -> T:
        await asyncio.sleep(delay)
        return await operation()


class Link:
    """A FleetStore as one machine reaches it."""

    def __init__(self, server: MemoryFleetStore, name: str, machine: Machine, network: Network) -> None:
        self._server = server
        self._name = name
        self._machine = machine
        self._network = network

    @property
    def name(self) -> StoreName:
        return self._server.name

    def __getattr__(self, method: str) -> Callable[..., Awaitable[object]]:
        operation = getattr(self._server, method)

        async def call(*arguments: object) -> object:
            return await self._network.call(self._name, self._machine, self.name, lambda: operation(*arguments))

        self.__dict__[method] = call
        return call

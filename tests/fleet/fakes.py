"""A clock set by hand and stores that fail on demand, for tests of one part."""

from collections.abc import Awaitable, Callable

from sidecar.errors import RetryClass, StoreError
from sidecar.fleet import FleetMember, Identity, MemoryFleetStore, Wish
from sidecar.phase import STORES, Phase, StoreName


class HandClock:
    """Moves when told; ``sleep`` only moves it on."""

    def __init__(self) -> None:
        self.time = 1000.0

    def now_us(self) -> int:
        return int(self.time * 1e6)

    def monotonic(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


class Failing:
    """A FleetStore with a switch; ``on_reply`` runs when a call was done and before its answer is seen."""

    def __init__(self, server: MemoryFleetStore) -> None:
        self.server = server
        self.down = False
        self.calls: list[str] = []
        self.on_reply: Callable[[str], None] = lambda _method: None

    @property
    def name(self) -> StoreName:
        return self.server.name

    def __getattr__(self, method: str) -> Callable[..., Awaitable[object]]:
        operation = getattr(self.server, method)

        async def call(*arguments: object) -> object:
            self.calls.append(method)
            if self.down:
                raise StoreError(self.name, RetryClass.TRANSIENT, "cannot be reached")
            result = await operation(*arguments)
            self.on_reply(method)
            return result

        return call


class Fleet:
    """Two stores, and instances made on demand."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.servers = {s: MemoryFleetStore(s, self.clock) for s in STORES}
        self.stores = {s: Failing(self.servers[s]) for s in STORES}
        self.wish = Wish(Phase.SQL_ONLY)

    def member(self, name: str = "a", **options: object) -> FleetMember:
        options.setdefault("wish", lambda: self.wish)
        return FleetMember(
            Identity(name, f"{name}-1", "1.0"),
            self.stores,
            self.clock,
            interval_s=10.0,
            fence_after_s=120.0,
            **options,
        )

    async def rounds(self, *members: FleetMember) -> None:
        """Every member exchanges with both stores, twice: to apply, and to tell."""
        for _ in range(2):
            for member in members:
                for store in STORES:
                    await member.round(store)

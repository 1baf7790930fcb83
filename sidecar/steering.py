"""What operators order for a store's delivery while it runs: pause, resume, rate; with who, why and since when.

An order is kept in the spool (meta ``orders:<store>``, JSON, fields are only ever added) and is in force again after a
restart: a database that is being mended must not be written to because a pod was restarted. It ends by ``resume`` (or
``rate`` without a number), never by itself; a fresh volume knows of none. Every order is in the audit trail before it
has any effect, so a failure at any stage leaves a line too many, never one too few.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from sidecar.clock import Clock
from sidecar.errors import ConfigError, NotFound
from sidecar.record import timestamp_text
from sidecar.retry import Pace

log = logging.getLogger(__name__)

SLOWEST: Final = 0.1  # records per second; slower is a pause
FASTEST: Final = 1e6


class Order(msgspec.Struct, frozen=True):
    """One order; ``records_per_second`` only where it is about the rate."""

    by: str
    reason: str
    since_us: int  # wall clock, for people
    records_per_second: float | None = None


class Orders(msgspec.Struct, frozen=True):
    """What is ordered for one store."""

    paused: Order | None = None
    rate: Order | None = None


class Delivery(Protocol):
    """What is steered (``sidecar.shipper.Shipper``)."""

    pace: Pace

    def wake(self) -> None:
        """Look again now."""
        ...


class Memory(Protocol):
    """What is needed of the spool."""

    def meta(self, key: str) -> str | None:
        """A small durable value."""
        ...

    async def set_meta(self, key: str, value: str) -> None:
        """Make it durable."""
        ...

    async def audit(self, who: str, what: str, why: str, evidence: str = "") -> None:
        """Add a line to the audit trail."""
        ...


@dataclass(frozen=True, slots=True)
class Steering:
    """Applies and keeps the orders. ``deliveries`` lacks the stores whose delivery does not run here (a stopped spool).

    All methods raise NotFound for a store that is not in ``stores``, and SpoolFailed.
    """

    spool: Memory
    stores: tuple[str, ...]
    deliveries: Mapping[str, Delivery]
    clock: Clock

    def orders(self, store: str) -> Orders:
        """What is in force."""
        if store not in self.stores:
            raise NotFound(f"store: not one of {', '.join(self.stores)}")
        kept = self.spool.meta(_key(store))
        return Orders() if kept is None else msgspec.json.decode(kept, type=Orders)

    def restore(self) -> None:
        """Put in force what was ordered before a restart."""
        for store in self.stores:
            orders = self.orders(store)
            self._apply(store, orders)
            if orders != Orders():
                log.warning("an operator's order is in force again", extra={"store": store, **document(orders)})

    async def pause(self, store: str, *, by: str, reason: str) -> Orders:
        """Stop delivery to a store; what is under way finishes. Accepting goes on and the spool fills."""
        before = self.orders(store)
        paused = Order(by, reason, self.clock.now_us())
        return await self._order(store, msgspec.structs.replace(before, paused=paused), f"pause {store}", by, reason)

    async def resume(self, store: str, *, by: str, reason: str) -> Orders:
        """End a pause; also asks a blocked or failing store at once. A rate stays in force."""
        orders = msgspec.structs.replace(self.orders(store), paused=None)
        await self._order(store, orders, f"resume {store}", by, reason)
        if store in self.deliveries:
            self.deliveries[store].pace.resume(self.clock.monotonic())
            self.deliveries[store].wake()
        return orders

    async def rate(self, store: str, records_per_second: float | None, *, by: str, reason: str) -> Orders:
        """Deliver at most so many records a second; None: as it takes. Raises ConfigError: no such rate."""
        if records_per_second is not None and not SLOWEST <= records_per_second <= FASTEST:
            raise ConfigError(
                "rate",
                seen=records_per_second,
                allowed=f"{SLOWEST:g} to {FASTEST:g} records a second, or none for no bound",
                hint="to stop, pause",
            )
        before = self.orders(store)
        order = None
        if records_per_second is not None:
            order = Order(by, reason, self.clock.now_us(), records_per_second)
        what = f"rate {store} {'none' if records_per_second is None else f'{records_per_second:g}/s'}"
        return await self._order(store, msgspec.structs.replace(before, rate=order), what, by, reason)

    async def _order(self, store: str, orders: Orders, what: str, by: str, reason: str) -> Orders:
        await self.spool.audit(by, what, reason)
        await self.spool.set_meta(_key(store), msgspec.json.encode(orders).decode())
        self._apply(store, orders)
        log.warning("operator's order", extra={"store": store, "what": what, "by": by, "why": reason})
        return orders

    def _apply(self, store: str, orders: Orders) -> None:
        delivery = self.deliveries.get(store)
        if delivery is None:
            return
        pace, now = delivery.pace, self.clock.monotonic()
        pace.rate.manual = None if orders.rate is None else orders.rate.records_per_second
        if orders.paused is not None:
            pace.pause(orders.paused.by, orders.paused.reason, now)
        elif pace.paused_by is not None:
            pace.resume(now)
        delivery.wake()

    def status(self) -> dict[str, object]:
        """The part of ``/status`` about orders: per store, only what is in force."""
        return {store: document(self.orders(store)) for store in self.stores}


def document(orders: Orders) -> dict[str, object]:
    """The JSON shape."""
    return {
        name: {
            "by": order.by,
            "reason": order.reason,
            "since": timestamp_text(order.since_us),
            **({} if order.records_per_second is None else {"records_per_second": order.records_per_second}),
        }
        for name, order in (("paused", orders.paused), ("rate", orders.rate))
        if order is not None
    }


def _key(store: str) -> str:
    return f"orders:{store}"

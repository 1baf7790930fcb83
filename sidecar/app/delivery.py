"""How delivery is put together, for ``serve`` and for ``drain`` alike: stores, dead letters, shippers, steering."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from sidecar.app.parts import LedgeredStore
from sidecar.clock import Clock
from sidecar.dead_letter import DeadLetters
from sidecar.metrics import Metrics
from sidecar.not_owed import Wait
from sidecar.phase import DYNAMODB, POSTGRES, STORES, StoreName
from sidecar.retry import State
from sidecar.settings import Settings
from sidecar.settings import Spool as SpoolSettings
from sidecar.shipper import WINDOW_BYTES, Shipper, ShipperStatus, SpoolPort
from sidecar.spool import Spool
from sidecar.steering import Steering
from sidecar.stores.base import Store
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.postgres import PostgresStore


def build_stores(settings: Settings, clock: Clock) -> dict[StoreName, LedgeredStore]:
    """The only place that names concrete stores."""
    return {
        POSTGRES: PostgresStore(settings.postgres, clock=clock),
        DYNAMODB: DynamoDBStore(settings.dynamodb, clock=clock),
    }


def build_letters(spool: Spool, options: SpoolSettings, clock: Clock) -> DeadLetters:
    """The dead letters of a spool with their bound."""
    return DeadLetters(spool, max_bytes=int(options.cap_bytes * options.dead_letter_share), clock=clock)


@dataclass(frozen=True, slots=True)
class Delivery:
    """What delivers and what an operator does to it."""

    letters: DeadLetters
    shippers: dict[str, Shipper]
    steering: Steering


def build_delivery(
    stores: Mapping[StoreName, Store],
    spool: Spool,
    settings: Callable[[], Settings],
    *,
    clock: Clock,
    metrics: Metrics,
    source: SpoolPort | None = None,
) -> Delivery:
    """One shipper per store, not yet running; ``settings`` is asked each time, because ``retry`` may be reloaded.

    ``source`` is where shippers take records from, where that is not the spool itself (``sidecar.not_owed``).
    """
    options = settings().spool
    letters = build_letters(spool, options, clock)
    shippers: dict[str, Shipper] = {
        name: Shipper(
            store,
            source or spool,
            retry=lambda: settings().retry,
            dead_letters_full=partial(letters.full, name),
            clock=clock,
            metrics=metrics,
            rng=random.Random(),  # noqa: S311  (jitter, not secrets)
            window_bytes=min(WINDOW_BYTES, options.cap_bytes // 16),
        )
        for name, store in stores.items()
    }
    return Delivery(letters, shippers, Steering(spool, STORES, shippers, clock))


def standing(shipper: Shipper, wait: Wait | None, clock: Clock) -> ShipperStatus:
    """What delivery is doing, where its records may wait before the shipper is handed any: that is not ``up``."""
    status = shipper.status()
    if wait is None or status.state not in (State.UP, State.THROTTLED):
        return status
    return replace(status, state=State.WAITING, reason=wait.reason, since_seconds=clock.monotonic() - wait.since)

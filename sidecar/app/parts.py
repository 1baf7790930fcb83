"""Small pieces that join two parts that do not know each other."""

import asyncio
import secrets
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from sidecar.canary import CanaryStore
from sidecar.clock import Clock
from sidecar.errors import Busy
from sidecar.fleet_tables import KeepsFleet
from sidecar.gaps import KeepsGaps
from sidecar.not_owed import Wait
from sidecar.phase import Policy, StoreName
from sidecar.retry import State
from sidecar.settings import Settings
from sidecar.shipper import Shipper
from sidecar.spool import Spool
from sidecar.stores.base import Store

_APPLIED: Final = "applied_phase"
_NAME: Final = "fleet_spool"
_ON_THE_WAY: Final = frozenset({"pending", "deferred"})


class LedgeredStore(Store, KeepsGaps, KeepsFleet, CanaryStore, Protocol):
    """What the sidecar needs of a store: records, the gap ledger and the fleet's tables beside them, and a canary."""


class SpoolMemory:
    """The phase switch's memory: one value in the spool's meta table."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    async def get(self) -> bytes | None:
        """The value that was set last."""
        value = self._spool.meta(_APPLIED)
        return None if value is None else value.encode()

    async def set(self, value: bytes) -> None:
        """Return when ``value`` is on disk."""
        await self._spool.set_meta(_APPLIED, value.decode())


def spool_name(spool: Spool) -> str | None:
    """What the spool is called for as long as its volume lives, by which the fleet tells two under one instance."""
    return spool.meta(_NAME)


def named_apart(instance: str, spool: Spool) -> str:
    """The name under which a lease is held: two processes may have been given one ``instance``, never one spool."""
    return f"{instance}/{spool_name(spool) or ''}"


async def drawn_name(spool: Spool, patience: float = 5.0) -> str:
    """That name, drawn where it has none; raises SpoolFailed.

    "" where the disk has no room for it within ``patience`` seconds: a start that waited would keep it from draining.
    """
    name = spool_name(spool)
    if name is None:
        name = secrets.token_hex(4)
        try:
            async with asyncio.timeout(patience):
                await spool.set_meta(_NAME, name)
        except TimeoutError:
            return ""
    return name


class FailClosed:
    """``continue_on_write_failure: false``: an owed store down for too long closes the door (semantics, section 2)."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        policy: Callable[[], Policy],
        shippers: Mapping[str, Shipper],
        waits: Mapping[StoreName, Wait],
        clock: Clock,
    ) -> None:
        """``waits``: records that no shipper was handed yet (``NotOwed.waits``); such a store takes nothing either."""
        self._settings = settings
        self._policy = policy
        self._shippers = shippers
        self._waits = waits
        self._clock = clock

    def __call__(self) -> Busy | None:
        """Why nothing is accepted now, or None."""
        settings = self._settings()
        if settings.continue_on_write_failure:
            return None
        now = self._clock.monotonic()
        for name in self._policy().owed:
            wait = self._waits.get(name)
            waited = 0.0 if wait is None else now - wait.since
            if max(waited, self._shippers[name].pace.down_for(now)) > settings.fail_closed_after:
                return Busy(
                    "fail_closed",
                    f"{name} has taken nothing for more than {settings.fail_closed_after:g} s and"
                    " continue_on_write_failure is false: nothing is accepted until it does",
                    retry_after=5,
                )
        return None


class ShadowTrouble:
    """Why a store should not be read from for comparison now, in one word; None: it may be."""

    def __init__(
        self, settings: Callable[[], Settings], spool: Spool, shippers: Mapping[str, Shipper], clock: Clock
    ) -> None:
        self._settings = settings
        self._spool = spool
        self._shippers = shippers
        self._clock = clock

    def __call__(self, store: StoreName) -> str | None:
        """The state of delivery to it, or ``lag`` where that is behind by more than ``phases.max_lag``."""
        state = self._shippers[store].pace.state(self._clock.monotonic())
        if state is not State.UP:
            return state.value
        since = self._spool.counters(store).oldest_pending_us
        late = since is not None and self._clock.now_us() - since > self._settings().phases.max_lag * 1e6
        return "lag" if late else None


class PendingIn:
    """Whether this sidecar still owes a record to a store: then the store may lack it."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool

    async def __call__(self, log_id: str, _log_timestamp: int, store: StoreName) -> bool:
        """True while it is pending or deferred; a dead letter is not on its way."""
        status = await self._spool.status(log_id)
        return status is not None and status.stores.get(store) in _ON_THE_WAY

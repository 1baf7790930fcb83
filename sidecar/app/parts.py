"""Small pieces that join two parts that do not know each other."""

from collections.abc import Callable
from typing import Final

from sidecar.clock import Clock
from sidecar.errors import Busy
from sidecar.migration import PhaseSwitch
from sidecar.settings import Settings
from sidecar.shipper import Shipper
from sidecar.spool import Spool

_APPLIED: Final = "applied_phase"


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


class FailClosed:
    """``continue_on_write_failure: false``: an owed store down for too long closes the door (semantics, section 2)."""

    def __init__(
        self,
        settings: Callable[[], Settings],
        switch: Callable[[], PhaseSwitch],
        shippers: Callable[[], dict[str, Shipper]],
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._switch = switch
        self._shippers = shippers
        self._clock = clock

    def __call__(self) -> Busy | None:
        """Why nothing is accepted now, or None."""
        settings = self._settings()
        if settings.continue_on_write_failure:
            return None
        now = self._clock.monotonic()
        for name in self._switch().policy.owed:
            if self._shippers()[name].pace.down_for(now) > settings.fail_closed_after:
                return Busy(
                    "fail_closed",
                    f"{name} has taken nothing for more than {settings.fail_closed_after:g} s and"
                    " continue_on_write_failure is false: nothing is accepted until it does",
                    retry_after=5,
                )
        return None

"""A store that fails for a moment is asked again: an hour's comparison must not end with one lost connection."""

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from sidecar.clock import Clock
from sidecar.errors import RetryClass, StoreError

TRIES: Final = 4  # of one call: two seconds in all, so that whoever waits hears of a store that is down
_PAUSE: Final = 0.25  # seconds before the second try; doubles
PASSING: Final = frozenset({RetryClass.TRANSIENT, RetryClass.THROTTLE})
_T = TypeVar("_T")


def pause(attempt: int) -> float:
    """Seconds after the failed try number ``attempt``, counted from 0."""
    return float(_PAUSE * 2**attempt)


async def patiently(call: Callable[[], Awaitable[_T]], clock: Clock) -> _T:
    """Call again while it fails for a moment. Raises StoreError."""
    for attempt in range(TRIES - 1):
        try:
            return await call()
        except StoreError as error:
            if error.retry_class not in PASSING:
                raise
        await clock.sleep(pause(attempt))
    return await call()

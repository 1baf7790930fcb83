"""Keeps the shippers alive: a delivery task that dies is an error that is seen, counted and restarted."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from sidecar.clock import Clock
from sidecar.errors import SpoolError

log = logging.getLogger(__name__)

_FIRST_PAUSE: Final = 1.0  # seconds before a dead task is started again; doubles up to the longest
_LONGEST_PAUSE: Final = 30.0
_HEALTHY: Final = 60.0  # seconds of life after which the pause is short again


def _fatal(error: BaseException) -> bool:
    """Whether the spool itself is gone: then there is nothing to restart for."""
    if isinstance(error, BaseExceptionGroup):
        return any(_fatal(inner) for inner in error.exceptions)
    return isinstance(error, SpoolError)


async def keep_running(
    name: str, run: Callable[[], Awaitable[None]], *, clock: Clock, died: Callable[[str], None]
) -> None:
    """Call ``run`` for ever; whatever it raises is logged, reported to ``died`` and followed by another call.

    Returns only when the spool has failed (``SpoolError``), which its owner reports. Cancellation passes through.
    """
    pause = _FIRST_PAUSE
    while True:
        started = clock.monotonic()
        try:
            await run()
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a bug in one task must not end delivery for ever: seen, counted, restarted
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            if _fatal(error):
                return
            died(name)
            log.exception("task died and is started again", extra={"task": name, "pause_seconds": pause})
        if clock.monotonic() - started > _HEALTHY:
            pause = _FIRST_PAUSE
        await clock.sleep(pause)
        pause = min(_LONGEST_PAUSE, pause * 2)

"""How many reads may be under way: few, so that they do not slow ingest; and how many may wait: a bounded number."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from sidecar.errors import Busy
from sidecar.settings import Reads as ReadSettings

_RETRY_AFTER: Final = 1  # seconds


class Slots:
    """First come, first served. The bounds are asked for each time, because a reload may change them."""

    def __init__(self, settings: Callable[[], ReadSettings]) -> None:
        self._settings = settings
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def running(self) -> int:
        """Reads under way."""
        return self._running

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold a slot. Raises Busy (``reads_busy``) where too many wait already."""
        settings = self._settings()
        if self._running < settings.in_flight and not self._waiting:
            self._running += 1
        elif len(self._waiting) >= settings.waiting:
            raise Busy(
                "reads_busy",
                f"{settings.in_flight} reads are under way and {settings.waiting} wait (reads.in_flight,"
                " reads.waiting); send again shortly",
                _RETRY_AFTER,
            )
        else:
            await self._turn()
        try:
            yield
        finally:
            self._running -= 1
            self._hand_on()

    async def _turn(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the slot was given in the same instant: pass it on
                self._running -= 1
                self._hand_on()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            raise

    def _hand_on(self) -> None:
        limit = self._settings().in_flight
        while self._waiting and self._running < limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._running += 1
                turn.set_result(None)

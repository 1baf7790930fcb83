"""Who waits until stores have settled frames; for which stores anybody does, so that delivery holds nothing back."""

import asyncio
from collections import Counter
from collections.abc import Container, Sequence

from sidecar.errors import SpoolFailed


class Waiters:
    """The waiters of one spool; used from the event loop alone."""

    def __init__(self, stores: Sequence[str]) -> None:
        self._futures: dict[tuple[str, int], list[asyncio.Future[None]]] = {}
        self._awaited = {store: asyncio.Event() for store in stores}
        self._waiting: Counter[str] = Counter()

    def awaited(self, store: str) -> asyncio.Event:
        """Set while anybody waits for a frame of this store. Raises KeyError for an unknown name."""
        return self._awaited[store]

    async def wait(self, store: str, seq: int) -> None:
        """Wait until the store has settled the frame. Raises what :meth:`fail` is given."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = self._futures.setdefault((store, seq), [])
        waiting.append(future)
        self._waiting[store] += 1
        self._awaited[store].set()
        try:
            await future
        finally:
            self._waiting[store] -= 1
            if not self._waiting[store]:
                self._awaited[store].clear()
            if future.cancelled():
                waiting.remove(future)
                if not waiting:
                    self._futures.pop((store, seq), None)

    def settled(self, store: str, seq: int) -> None:
        """The store has settled the frame."""
        if self._futures:
            for future in self._futures.pop((store, seq), ()):
                if not future.done():
                    future.set_result(None)

    def resolved(self, lo: int, hi: int, owed: Container[str]) -> None:
        """Frames from ``lo`` to ``hi`` are owed to these stores alone: nobody need wait for another one."""
        for store, seq in list(self._futures):
            if store not in owed and lo <= seq <= hi:
                self.settled(store, seq)

    def fail(self, error: SpoolFailed) -> None:
        """The spool is broken or closed."""
        for futures in self._futures.values():
            for future in futures:
                if not future.done():
                    future.set_exception(error)
        self._futures.clear()

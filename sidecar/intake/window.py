"""The dedup window in memory: which ids came with which content, and which are on their way to disk.

INVARIANTS

* An id is remembered only after the commit that holds its record; the durable twin is the spool's (``spool.window``).
* An id is in flight exactly while one ``claim`` holds it. Nobody claims while waiting for another's claim, so no two
  requests wait for each other.
* At most ``max_ids`` ids, each for ``window`` seconds of the monotonic clock: a jump of the wall clock changes nothing.

Cost: about 130 bytes and half a microsecond an id; ids expire by the batch that they came in.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final

from sidecar.clock import Clock
from sidecar.settings import Dedup

_LOADED_TOGETHER: Final = 1_000  # ids of one expiry group when a window is loaded


class Claim:
    """The ids of one request on their way to disk; ends with ``keep`` or ``drop``, exactly once."""

    __slots__ = ("_contents", "_landed", "_window")

    def __init__(self, window: "DedupWindow", contents: Mapping[bytes, bytes]) -> None:
        self._window = window
        self._contents = contents
        self._landed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for log_id in contents:
            window.flying[log_id] = self._landed

    def keep(self) -> None:
        """The records are durable: remember their ids."""
        self._window.remember(self._contents)
        self.drop()

    def drop(self) -> None:
        """The records are on their way no longer; whoever waits for them looks again."""
        for log_id in self._contents:
            self._window.flying.pop(log_id, None)
        if not self._landed.done():
            self._landed.set_result(None)


class DedupWindow:
    """See the module; used from the event loop only."""

    def __init__(self, settings: Dedup, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._contents: dict[bytes, bytes] = {}
        self._groups: deque[tuple[float, tuple[bytes, ...]]] = deque()  # monotonic expiry, ids
        self.flying: dict[bytes, asyncio.Future[None]] = {}

    def __len__(self) -> int:
        return len(self._contents)

    def load(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        """Take over (id, content) pairs that were durable before this start, oldest first; each gets a whole window."""
        group: dict[bytes, bytes] = {}
        for log_id, content in pairs:
            group[log_id] = content
            if len(group) == _LOADED_TOGETHER:
                self.remember(group)
                group = {}
        self.remember(group)

    def content(self, log_id: bytes) -> bytes | None:
        """Digest of what came under this id, if it is remembered."""
        return self._contents.get(log_id)

    async def settled(self, log_ids: Iterable[bytes]) -> None:
        """Return when none of these ids is in flight; no await between that and the return."""
        while True:
            landing = {self.flying[log_id] for log_id in log_ids if log_id in self.flying}
            if not landing:
                self._expire()
                return
            await asyncio.wait(landing)

    def unknown(self, pairs: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes] | None:
        """These (id, content) pairs, if none of the ids is known, in flight, or there twice; else None."""
        fresh: dict[bytes, bytes] = {}
        for log_id, content in pairs:
            if log_id in fresh or log_id in self.flying or log_id in self._contents:
                return None
            fresh[log_id] = content
        return fresh

    def claim(self, contents: Mapping[bytes, bytes]) -> Claim:
        """Mark ids as on their way to disk; none of them is in flight (see ``settled``)."""
        return Claim(self, contents)

    def remember(self, contents: Mapping[bytes, bytes]) -> None:
        """The records under these ids are durable."""
        if not contents:
            return
        self._contents.update(contents)
        self._groups.append((self._clock.monotonic() + self._settings.window, tuple(contents)))
        self._expire()

    def _expire(self) -> None:
        now = self._clock.monotonic()
        while self._groups and (self._groups[0][0] <= now or len(self._contents) > self._settings.max_ids):
            for log_id in self._groups.popleft()[1]:
                self._contents.pop(log_id, None)

"""When settlements are written down: with a commit 25 ms after the last time, or alone after 50 ms.

Marks that find no room come back and are sent again, later, with all that was settled meanwhile, frames to be deleted
first: what one store delivers makes room for the other's leftovers. A snapshot says where a store stands as a whole, so
none may be written that was taken before an earlier one came back: all of its generation are turned away.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

from sidecar.errors import Busy
from sidecar.spool import marks
from sidecar.spool.ledger import Ledger, Snapshot
from sidecar.spool.work import Write

_RIDE_AFTER: Final = 0.025  # seconds since the last marks: then they ride on a commit
_ALONE_AFTER: Final = 0.05  # seconds: then they go alone
_AGAIN_AFTER: Final = 0.25  # seconds after they found no room


class MarkSender:
    """Takes snapshots of the ledger and sends them to the database thread."""

    def __init__(
        self,
        ledger: Ledger,
        submit: Callable[[Write, asyncio.AbstractEventLoop], None],
        written: Callable[[marks.Written], None],
    ) -> None:
        self._ledger = ledger
        self._submit = submit
        self._written = written
        self._under_way = 0
        self._generation = 1
        self._turned_away = False
        self._held: frozenset[str] = frozenset()
        self._timer: asyncio.TimerHandle | None = None
        self._waiting = False  # something was settled since the last snapshot
        self._sent_at = 0.0
        self._closed = False

    def marked(self) -> None:
        """Something was settled: see that it is written down."""
        self._waiting = True
        if self._timer is None and not self._closed:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_AGAIN_AFTER if self._turned_away else _ALONE_AFTER, self._alone, loop)

    def ride(self, loop: asyncio.AbstractEventLoop) -> None:
        """An append is about to be queued: go along where it is time."""
        if self._waiting and loop.time() - self._sent_at >= _RIDE_AFTER and not self._turned_away:
            self._send(loop)

    def flush_now(self) -> None:
        """Queue the marks, so that whatever is asked for next sees them (unless there is no room for them)."""
        self._send(asyncio.get_running_loop(), now=True)

    def stalled(self, store: str) -> bool:
        """True while leftovers of the store wait for room: nothing more is handed out to it."""
        return self._turned_away and store in self._held

    def close(self) -> None:
        """Send nothing by itself any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _alone(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._waiting:
            self._send(loop)

    def _send(self, loop: asyncio.AbstractEventLoop, *, now: bool = False) -> None:
        if (self._under_way and not now) or (self._turned_away and self._under_way):
            return
        self._waiting = False
        if not self._ledger.dirty:
            return
        self._under_way += 1
        self._sent_at = loop.time()
        snapshot = self._ledger.snapshot(whole=self._turned_away)
        future: asyncio.Future[marks.Written] = loop.create_future()
        future.add_done_callback(partial(self._ended, snapshot))
        self._submit(Write(partial(marks.write, snapshot=snapshot), future, self._done, marks=self._generation), loop)

    def _done(self, written: marks.Written) -> None:
        self._under_way -= 1
        self._turned_away = False
        self._written(written)
        if self._ledger.dirty:
            self.marked()

    def _ended(self, snapshot: Snapshot, future: "asyncio.Future[marks.Written]") -> None:
        """Any other failure than Busy has told everybody already."""
        if future.cancelled() or not isinstance(future.exception(), Busy):
            return
        self._under_way -= 1
        self._ledger.give_back(snapshot)
        self._turned_away = True
        self._held = self._ledger.stores_with_leftovers()
        if not self._under_way:
            self._generation += 1
            self.marked()

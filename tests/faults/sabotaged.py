"""The sidecar with one guarantee taken out, for negative controls: ``python -m tests.faults.sabotaged NAME serve ...``.

Production knows no switch for any of this: the process is changed from outside, before its ``main`` runs.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def stopped_after_imports() -> None:
    """No sabotage: a moment for a debugger to attach; SIGCONT goes on."""
    import sidecar.app  # noqa: F401  (the imports are what is skipped)

    os.kill(os.getpid(), signal.SIGSTOP)


def ack_before_commit() -> None:
    """Answers first, commits a moment later."""
    from sidecar.spool import Receipt, Spool

    commit = Spool.append
    under_way = set()

    async def append(self: Any, records: Any, encoded: Any, obligation: Any, seen: Any = ()) -> Receipt:
        self.check()

        async def later() -> None:
            await asyncio.sleep(0.05)
            await commit(self, records, encoded, obligation, seen)

        task = asyncio.ensure_future(later())
        under_way.add(task)
        task.add_done_callback(lambda done: (under_way.discard(done), done.exception()))
        return Receipt((), obligation)

    Spool.append = append  # type: ignore[method-assign]  (that is the sabotage)


def synchronous_off() -> None:
    """The database never fsyncs."""
    from sidecar.spool import schema

    configure = schema.configure

    def weaker(connection: Any, settings: Any) -> None:
        configure(connection, settings)
        connection.execute("PRAGMA synchronous = OFF").fetchall()

    schema.configure = weaker


def ignored_errors() -> None:
    """A commit that fails is answered as done, and the thread goes on whatever the disk says."""
    import sqlite3

    from sidecar.spool.committer import Committer

    commit, step = Committer._commit, Committer._step

    def ignoring(self: Any, appends: Any, writes: Any) -> None:
        try:
            commit(self, appends, writes)
        except (sqlite3.Error, OSError):
            with contextlib.suppress(sqlite3.Error):
                self._connection.rollback()

            def tell() -> None:
                self._committed((), sum(append.size for append in appends), None)
                for append in appends:
                    if not append.future.done():
                        append.future.set_result(())

            self._post(tell)

    def going_on(self: Any) -> bool:
        with contextlib.suppress(sqlite3.Error, OSError):
            return step(self)
        return True

    Committer._commit = ignoring  # type: ignore[method-assign]  (that is the sabotage)
    Committer._step = going_on  # type: ignore[method-assign]


SABOTAGES: dict[str, Callable[[], None]] = {
    each.__name__: each for each in (stopped_after_imports, ack_before_commit, synchronous_off, ignored_errors)
}


def main() -> int:
    """Take the guarantee out and go on as the sidecar does."""
    for name in sys.argv.pop(1).split(","):
        SABOTAGES[name]()
    from sidecar.__main__ import main as sidecar

    return sidecar()


if __name__ == "__main__":
    sys.exit(main())

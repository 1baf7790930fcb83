"""The sidecar with one guarantee taken out, for negative controls: ``python -m tests.faults.sabotaged NAME serve ...``.

Production knows no switch for any of this: the process is changed from outside, before its ``main`` runs.
"""

import asyncio
import sys
from collections.abc import Callable
from typing import Any


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


SABOTAGES: dict[str, Callable[[], None]] = {each.__name__: each for each in (ack_before_commit, synchronous_off)}


def main() -> int:
    """Take the guarantee out and go on as the sidecar does."""
    name = sys.argv.pop(1)
    SABOTAGES[name]()
    from sidecar.__main__ import main as sidecar

    return sidecar()


if __name__ == "__main__":
    sys.exit(main())

"""The sidecar with one guarantee taken out, for negative controls: ``python -m tests.faults.sabotaged NAME serve ...``.

Production knows no switch for any of this: the process is changed from outside, before its ``main`` runs.
"""

import asyncio
import contextlib
import os
import pathlib
import re
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


def defective_reload() -> None:
    """A defect in the reading of the mounted file: the first look at each new content raises what nobody expects."""
    from sidecar import reload

    look = reload.Watcher.look
    seen = set()

    async def once_wrong(self: Any, *, asked: bool = False) -> None:
        content = pathlib.Path(self._path).read_bytes()
        if content not in seen:
            seen.add(content)
            raise RuntimeError("defect")
        await look(self, asked=asked)

    reload.Watcher.look = once_wrong  # type: ignore[method-assign]


def defective_warming() -> None:
    """A defect in a part that nobody supervises."""
    import importlib

    async def warm(stores: Any) -> None:
        raise RuntimeError("defect")

    importlib.import_module("sidecar.app.serve").warm = warm  # type: ignore[attr-defined]


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


def _giving_up(failures: int) -> None:
    from sidecar.shipper import _TROUBLE, _Run

    refused = _Run._refused
    seen = 0

    def instead(self: Any, ticket: Any, chunk: Any, error: Any) -> None:
        nonlocal seen
        if error.retry_class not in _TROUBLE:
            refused(self, ticket, chunk, error)
            return
        seen += 1
        if seen <= failures:
            refused(self, ticket, chunk, error)
            return
        self._pace.succeeded(ticket, 0, self._clock.monotonic())
        for piece in chunk:
            self._decided(piece.load, len(piece))

    _Run._refused = instead  # type: ignore[method-assign]  (that is the sabotage)


def gives_up() -> None:
    """Retries have a limit, as elsewhere: then the records are dropped."""
    _giving_up(50)


def believes_lost_replies() -> None:
    """A call without an answer is taken for done."""
    _giving_up(0)


def no_conflict_clause() -> None:
    """Plain inserts."""
    import asyncpg

    fetch = asyncpg.Connection.fetch

    async def plain(self: Any, query: str, *args: Any, **kwargs: Any) -> Any:
        return await fetch(self, re.sub(r"ON CONFLICT \([^)]*\) DO NOTHING", "", query), *args, **kwargs)

    asyncpg.Connection.fetch = plain


def ignores_unprocessed() -> None:
    """What DynamoDB hands back is taken for stored."""
    from sidecar.stores import dynamodb

    dynamodb._throttled = lambda _batch, _left: []


def _dropping(unwanted: Callable[[str, Any], bool]) -> None:
    """Calls of which ``unwanted(store, records)`` is true are taken for done without being made."""
    from sidecar.shipper import _Run

    call = _Run._call

    async def instead(self: Any, ticket: Any, chunk: Any) -> None:
        if not unwanted(self._store.name, chunk):
            await call(self, ticket, chunk)
            return
        self._pace.succeeded(ticket, 0, self._clock.monotonic())
        for piece in chunk:
            self._decided(piece.load, len(piece))
        self.wake.set()

    _Run._call = instead  # type: ignore[method-assign]  (that is the sabotage)


def drops_poisoned_batches() -> None:
    """A refused batch is dropped whole, the good records with the bad one."""
    from sidecar.shipper import _Run

    refused = _Run._refused

    def instead(self: Any, ticket: Any, chunk: Any, error: Any) -> None:
        if error.retry_class.value != "permanent":
            refused(self, ticket, chunk, error)
            return
        self._pace.succeeded(ticket, 0, self._clock.monotonic())
        for piece in chunk:
            self._decided(piece.load, len(piece))

    _Run._refused = instead  # type: ignore[method-assign]  (that is the sabotage)


def forgets_what_it_owes() -> None:
    """What a record is owed to is asked of the phase of now, not of the phase in which it was accepted."""
    from sidecar.migration import PhaseSwitch

    switches: list[Any] = []
    begin = PhaseSwitch.__init__

    def kept(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        switches.append(self)

    PhaseSwitch.__init__ = kept  # type: ignore[method-assign]  (that is the sabotage)
    _dropping(lambda store, _chunk: store not in switches[-1].policy.owed)


def garbage_means_defaults() -> None:
    """A configuration that cannot be read is replaced by the defaults."""
    from sidecar import reload
    from sidecar.config import interpret
    from sidecar.errors import ConfigError

    def lenient(data: bytes, path: str, environ: Any) -> Any:
        try:
            return interpret(data, path, environ)
        except ConfigError:
            return interpret(b"phase: sql_only", path, environ)

    reload.interpret = lenient


def wall_clock_intervals() -> None:
    """Intervals are measured with the wall clock."""
    import time

    from sidecar.clock import SystemClock

    SystemClock.monotonic = lambda _self: time.time()  # type: ignore[method-assign]  (that is the sabotage)


def forgets_at_exit() -> None:
    """A stop in order clears the directory."""
    from pathlib import Path

    from sidecar.spool import Spool

    close = Spool.close

    async def clear(self: Any) -> None:
        await close(self)
        for name in ("spool.db", "position"):
            (Path(self._directory) / name).unlink(missing_ok=True)

    Spool.close = clear  # type: ignore[method-assign]  (that is the sabotage)


def no_lock() -> None:
    """Nothing keeps a second process out."""
    import fcntl

    from sidecar.spool import schema

    fcntl.flock = lambda _fd, _how: None
    configure = schema.configure

    def shared(connection: Any, settings: Any) -> None:
        class Deaf:
            def execute(self, sql: str) -> Any:
                return connection.execute("SELECT 'exclusive'" if "locking_mode" in sql else sql)

        connection.execute("PRAGMA busy_timeout = 10000").fetchall()  # they wait for each other's transactions
        configure(Deaf(), settings)  # type: ignore[arg-type]  (that is the sabotage)

    schema.configure = shared


def opens_a_file_per_commit() -> None:
    """Each commit needs a descriptor of its own."""
    from sidecar.spool.committer import Committer

    commit = Committer._commit

    def opening(self: Any, appends: Any, writes: Any) -> None:
        with open("/dev/null"):  # noqa: PTH123  (shorter)
            commit(self, appends, writes)

    Committer._commit = opening  # type: ignore[method-assign]  (that is the sabotage)


def no_budget() -> None:
    """Nothing bounds what all bodies take together."""
    from sidecar.api.body import Budget

    Budget.take = lambda _self, _size: None  # type: ignore[method-assign]  (that is the sabotage)


def no_admission() -> None:
    """Nobody is pushed back before the disk itself is full."""
    from sidecar.spool.admission import Admission

    Admission.enter = lambda _self, _size: None  # type: ignore[method-assign]  (that is the sabotage)
    Admission.leave = lambda _self, _size: None  # type: ignore[method-assign]  (that is the sabotage)


def no_directory_sync() -> None:
    """Names of new files are left to the file system."""
    from sidecar.spool import disk

    disk.sync_directory = lambda _directory: None


SABOTAGES: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        stopped_after_imports,
        ack_before_commit,
        defective_reload,
        defective_warming,
        synchronous_off,
        ignored_errors,
        gives_up,
        believes_lost_replies,
        no_conflict_clause,
        ignores_unprocessed,
        drops_poisoned_batches,
        forgets_what_it_owes,
        garbage_means_defaults,
        wall_clock_intervals,
        forgets_at_exit,
        no_lock,
        opens_a_file_per_commit,
        no_budget,
        no_admission,
        no_directory_sync,
    )
}


def main() -> int:
    """Take the guarantee out and go on as the sidecar does."""
    for name in sys.argv.pop(1).split(","):
        SABOTAGES[name]()
    from sidecar.__main__ import main as sidecar

    return sidecar()


if __name__ == "__main__":
    sys.exit(main())

"""The one thread that owns the database: group commit without a timer, reads in between, upkeep when idle.

What waits when a commit returns goes into the next one. Results go to the event loop in one call per commit, in the
order: new frames, then writes. A waiter learns of its record only after COMMIT returned from fsync.

A full disk rolls back: appends are refused with Busy, the other writes (marks, leftovers) are tried again alone with
the reserve. Everything else that goes wrong here ends the spool (P8): all waiters fail, nothing is tried again.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sidecar.clock import Clock
from sidecar.errors import Busy, SpoolFailed
from sidecar.record import LogRecord
from sidecar.settings import Spool as SpoolSettings
from sidecar.spool import disk, divergence, framing, schema, window
from sidecar.spool.framing import Chunk, Entry
from sidecar.spool.work import Append, Key, Read, Stats, Stop, Write

_GROUP_BYTES: Final = 16 * 1024 * 1024  # of records in one transaction
_STATS_EVERY: Final = 0.02  # seconds
_STUCK_PAUSE: Final = 0.25
_IDLE_PAUSE: Final = 0.2
_VACUUM_PAGES: Final = 256
_KEPT_FREE_PAGES: Final = 1024  # 4 MiB that the file does not give back
_WRITTEN: Final = "INSERT INTO meta VALUES('written', ?) ON CONFLICT(key) DO UPDATE SET value = excluded.value"
_CORRUPT: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})

_Answer = tuple[Write | Read, Any]


@dataclass(slots=True)
class _Open:
    """A frame that is being filled from the appends of one commit."""

    seq: int
    key: Key
    chunks: list[Chunk]
    n: int
    size: int


class Committer:
    """Runs appends, writes and reads on the database; see the module. Start it once; all calls from the loop."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        directory: Path,
        settings: SpoolSettings,
        clock: Clock,
        *,
        last_seq: int,
        accepted: dict[int, int],
        position: disk.Position,
        ballast: disk.Ballast,
        seen: window.SeenRows,
        committed: Callable[[Sequence[Entry], int, Stats | None], None],
        broken: Callable[[SpoolFailed], None],
        busy: Callable[[str], Busy],
    ) -> None:
        self._connection = connection
        self._directory = directory
        self._settings = settings
        self._clock = clock
        self._last_seq = last_seq
        self._accepted = accepted
        self._position = position
        self._ballast = ballast
        self._seen = seen
        self._committed = committed
        self._broken = broken
        self._busy = busy
        self._queue: queue.SimpleQueue[Append | Write | Read | Stop] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="spool", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._hands: list[Append | Write | Read | Stop] = []
        self._stuck: list[Write] = []
        self._stuck_reason = ""
        self._turned_away = 0  # the last generation of marks that found no room
        self._wal_pages = 0
        self._stats_at = 0.0
        self._commit_seconds = 0.0
        self.on_commit: Callable[[float], None] | None = None  # called on the loop with each commit's seconds
        self._dead = False
        self.error: SpoolFailed | None = None
        self._lock = threading.Lock()  # between the last look at the queue and a late submit

    # --- the loop's side -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; what it finds by itself goes to the running loop, else to that of the first work."""
        with contextlib.suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()
        self._thread.start()

    def measure(self) -> Stats:
        """First figures, before the thread starts."""
        return self._stats()

    def submit(self, work: Append | Write | Read | Stop, loop: asyncio.AbstractEventLoop) -> bool:
        """Queue work; False where the thread is gone."""
        self._loop = loop
        with self._lock:
            if self._dead:
                return False
            self._queue.put(work)
        return True

    def join(self) -> None:
        """Wait for the thread's end after Stop; bounded by one checkpoint."""
        self._thread.join()

    # --- the thread ------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as exc:  # noqa: BLE001  whatever it was, everybody who waits must learn of it (trap 5)
            self._die(exc)

    def _die(self, cause: BaseException) -> None:
        """Fail everybody. The connection stays open on purpose: closing it would checkpoint on a failed disk.

        The interpreter closes it all the same when the process ends; ``disk.keep_log`` is for that.
        """
        if isinstance(cause, sqlite3.Error) and schema.code(cause) in _CORRUPT:
            self.ask_for_repair()
        error = SpoolFailed(f"the spool's disk failed: {type(cause).__name__}: {cause}; restart to recover")
        error.__cause__ = cause
        with self._lock:
            self._dead = True
            self.error = error
            late = [self._queue.get_nowait() for _ in range(self._queue.qsize())]
        waiting = [*self._stuck, *self._hands, *late]

        def tell() -> None:
            self._broken(error)
            for work in waiting:
                _fail(work, error)

        self._post(tell)

    def ask_for_repair(self) -> None:
        """Ask the next start to salvage the file; best effort, as the disk may be gone."""
        with contextlib.suppress(OSError):
            disk.create_private(self._directory / disk.REPAIR)
            disk.sync_directory(self._directory)

    def _post(self, call: Callable[[], None]) -> None:
        loop = self._loop
        if loop is None:
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            loop.call_soon_threadsafe(call)

    def _step(self) -> bool:
        try:
            self._hands = [self._queue.get(timeout=_STUCK_PAUSE if self._stuck else _IDLE_PAUSE)]
        except queue.Empty:
            self._idle()
            return True
        room = _GROUP_BYTES - getattr(self._hands[0], "size", 0)
        while room > 0 and self._queue.qsize():
            work = self._queue.get_nowait()
            self._hands.append(work)
            room -= getattr(work, "size", 0)
        appends = [w for w in self._hands if isinstance(w, Append)]
        writes = [w for w in self._hands if isinstance(w, Write)]
        if appends or writes:
            self._settle_group(appends, writes)
        reads = [w for w in self._hands if isinstance(w, Read)]
        if reads:
            answers: list[_Answer] = [(read, read.run(self._connection)) for read in reads]
            self._post(lambda: _tell(answers))
        stop = any(isinstance(w, Stop) for w in self._hands)
        self._hands = []
        if stop:
            self._close()
            return False
        self._checkpoint_if_due()
        return True

    def _settle_group(self, appends: list[Append], writes: list[Write]) -> None:
        late = [w for w in writes if 0 < w.marks <= self._turned_away]
        if late:  # taken before marks that came back: see ``sender``
            self._refuse(late)
            writes = [w for w in writes if w not in late]
            if not appends and not writes:
                return
        if self._stuck:
            self._refuse(appends)
            self._commit_in_reserve([*self._stuck, *writes])
            return
        try:
            self._commit(appends, writes)
        except sqlite3.Error as exc:
            if schema.code(exc) != sqlite3.SQLITE_FULL:
                raise
            self._stuck_reason = self._why_full()
            self._refuse([*appends, *(w for w in writes if w.refusable)])
            self._commit_in_reserve([w for w in writes if not w.refusable])
        else:
            if self._stuck_reason and any(w.marks for w in writes):
                self._stuck_reason = ""
                self._post_stats()

    def _commit_in_reserve(self, writes: list[Write]) -> None:
        """Marks and leftovers once more, alone, with the reserve.

        Where even that has no room, marks go back to the sender, which adds what makes room; the others wait.
        """
        self._stuck = []
        if not writes:
            self._stuck_reason = ""
            self._post_stats()
            return
        self._set_page_limit(self._settings.cap_bytes + schema.RESERVE_BYTES)
        try:
            self._commit([], sorted(writes, key=lambda w: not w.marks))
            self._stuck_reason = ""
        except sqlite3.Error as exc:
            if schema.code(exc) != sqlite3.SQLITE_FULL:
                raise
            self._stuck_reason = self._why_full()
            self._turned_away = max([self._turned_away, *(w.marks for w in writes)])
            self._refuse([w for w in writes if w.marks])
            self._stuck = [w for w in writes if not w.marks]
        finally:
            self._set_page_limit(self._settings.cap_bytes)
        self._post_stats()

    def _why_full(self) -> str:
        (pages,) = self._connection.execute("PRAGMA page_count").fetchone()
        (limit,) = self._connection.execute("PRAGMA max_page_count").fetchone()
        if pages + 16 >= limit or disk.free_bytes(self._directory) > schema.RESERVE_BYTES:
            return "spool_full"
        self._ballast.drop()
        return "disk_full"

    def _set_page_limit(self, size: int) -> None:
        self._connection.execute(f"PRAGMA max_page_count = {size // schema.PAGE}").fetchall()

    def _refuse(self, works: Sequence[Append | Write]) -> None:
        if not works:
            return
        reason = self._stuck_reason or "spool_full"
        leaving = sum(work.size for work in works if isinstance(work, Append))

        def tell() -> None:
            self._committed((), leaving, None)
            for work in works:
                _fail(work, self._busy(reason))

        self._post(tell)

    def _commit(self, appends: Sequence[Append], writes: Sequence[Write]) -> None:
        connection = self._connection
        started = time.perf_counter()
        connection.execute("BEGIN IMMEDIATE")
        try:
            entries = self._insert(appends) if appends else []
            answers: list[_Answer] = [(write, write.run(connection)) for write in writes]
            durable = any(not write.marks for write in writes)
            if durable:  # leaves a trace in the numbers, so that its loss would be noticed at the next start
                self._last_seq += 1
                connection.execute(_WRITTEN, (str(self._last_seq),))
            connection.execute("COMMIT")
        except sqlite3.Error as exc:
            if schema.code(exc) == sqlite3.SQLITE_FULL:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                self._seen.rolled_back(connection)
            raise
        now = time.perf_counter()
        seconds = self._commit_seconds = now - started
        if entries or durable:
            self._remember(entries)
        self._wal_pages += 3 + len(writes) + sum(2 + e.header.size // 4000 for e in entries)
        due = now - self._stats_at > _STATS_EVERY or any(write.measured for write in writes)
        stats = self._stats() if due else None

        leaving = sum([append.size for append in appends])

        def tell() -> None:
            self._committed(entries, leaving, stats)
            if self.on_commit is not None:
                self.on_commit(seconds)
            for append in appends:
                if not append.future.done():
                    append.future.set_result(tuple(append.seqs))
            _tell(answers)

        self._post(tell)

    def _remember(self, entries: Sequence[Entry]) -> None:
        """Note how far acknowledgements go, beside the database."""
        for entry in entries:
            for store in divergence.single_bits(entry.header.owed):
                bit = store.bit_length() - 1
                self._accepted[bit] = self._accepted.get(bit, 0) + entry.header.n
        self._position.write(disk.RUNNING, self._last_seq, self._accepted)

    def _insert(self, appends: Sequence[Append]) -> list[Entry]:
        now_us = self._clock.now_us()
        filling: dict[Key, _Open] = {}
        frames: list[_Open] = []
        for append in appends:
            append.seqs.clear()
            for chunk in append.chunks:
                frame = filling.get(append.key)
                n, size = len(chunk.sizes), len(chunk.body)
                if frame is None or frame.n + n > framing.MAX_RECORDS or (frame.size + size > framing.MAX_BYTES):
                    self._last_seq += 1
                    frame = filling[append.key] = _Open(self._last_seq, append.key, [], 0, 0)
                    frames.append(frame)
                frame.chunks.append(chunk)
                frame.n += n
                frame.size += size
                if not append.seqs or append.seqs[-1] != frame.seq:
                    append.seqs.append(frame.seq)
        entries = []
        for frame in frames:
            entry, body = _finish(frame, now_us)
            self._connection.execute(
                "INSERT INTO frames VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*entry.header, body)
            )
            entries.append(entry)
        seen = b"".join([append.seen for append in appends])
        if seen:
            self._seen.insert(self._connection, seen, now_us)
        return entries

    # --- upkeep ----------------------------------------------------------------------------------------------------

    def _stats(self) -> Stats:
        connection = self._connection
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (free,) = connection.execute("PRAGMA freelist_count").fetchone()
        self._stats_at = time.perf_counter()
        return Stats(
            (pages - free + self._wal_pages) * schema.PAGE,
            disk.free_bytes(self._directory),
            self._ballast.whole,
            self._commit_seconds,
            self._stuck_reason,
        )

    def _post_stats(self) -> None:
        stats = self._stats()
        self._post(lambda: self._committed((), 0, stats))

    def _checkpoint_if_due(self) -> None:
        if self._wal_pages * schema.PAGE >= self._settings.checkpoint_bytes:
            self._checkpoint()

    def _checkpoint(self) -> None:
        """Copy the log into the file; a full disk puts it off."""
        try:
            _, logged, copied = self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error as exc:
            if schema.code(exc) != sqlite3.SQLITE_FULL:
                raise
            self._ballast.drop()
            return
        self._wal_pages = max(0, logged - copied)

    def _idle(self) -> None:
        if self._stuck:
            self._commit_in_reserve(self._stuck)
            return
        if self._wal_pages > 64:  # noqa: PLR2004  (a quarter MiB: little to replay at a start)
            self._checkpoint()
        (free,) = self._connection.execute("PRAGMA freelist_count").fetchone()
        if free > _KEPT_FREE_PAGES:
            while free > _KEPT_FREE_PAGES and not self._queue.qsize():
                # executescript steps to the end; execute() stops after the first page, as there are no columns
                self._connection.executescript(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})")
                free -= _VACUUM_PAGES
                self._wal_pages += _VACUUM_PAGES
                self._checkpoint_if_due()
            self._post_stats()
        elif time.perf_counter() - self._stats_at > 1.0:
            self._ballast.make()
            self._post_stats()

    def _close(self) -> None:
        with self._lock:
            self._dead = True
            late = [self._queue.get_nowait() for _ in range(self._queue.qsize())]
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._connection.close()
        self._position.write(disk.CLEAN, self._last_seq, self._accepted)
        self._position.sync().close()
        (self._directory / disk.KEPT).unlink(missing_ok=True)
        error = SpoolFailed("the spool is closed")

        def tell() -> None:
            for work in late:
                _fail(work, error)

        self._post(tell)


def _finish(frame: _Open, now_us: int) -> tuple[Entry, bytes]:
    chunks = frame.chunks
    if len(chunks) == 1:
        (chunk,) = chunks
        records, sizes, body = chunk.records, chunk.sizes, chunk.body
        ids, t0, t1 = chunk.ids + chunk.lengths, chunk.t0, chunk.t1
    else:
        merged: list[LogRecord] = []
        merged_sizes: list[int] = []
        for chunk in chunks:
            merged += chunk.records
            merged_sizes += chunk.sizes
        records, sizes = merged, merged_sizes
        body = b"".join([c.body for c in chunks])
        ids = b"".join([c.ids for c in chunks] + [c.lengths for c in chunks])
        t0, t1 = min(c.t0 for c in chunks), max(c.t1 for c in chunks)
    phase, owed, required, flags = frame.key
    small = (frame.seq, phase, owed, required, flags, frame.n, frame.size, now_us, t0, t1)
    return Entry(framing.seal(small, ids), records, sizes), body


def _tell(answers: Sequence[_Answer]) -> None:
    for work, answer in answers:
        if work.done is not None:
            work.done(answer)
        if not work.future.done():  # not cancelled meanwhile
            work.future.set_result(answer)


def _fail(work: Append | Write | Read | Stop, error: Exception) -> None:
    if not isinstance(work, Stop) and not work.future.done():
        work.future.set_exception(error)

"""The spool as the other parts see it. All calls come from one event loop; SQLite lives in one thread of its own."""

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Self, TypeVar

from sidecar.clock import Clock
from sidecar.errors import Busy, SpoolFailed
from sidecar.record import LogRecord
from sidecar.settings import MIB, Dedup
from sidecar.settings import Spool as SpoolSettings
from sidecar.spool import damage, framing, marks, opening, window
from sidecar.spool.admission import Admission
from sidecar.spool.committer import Committer
from sidecar.spool.cursor import StoreCursor
from sidecar.spool.fates import Fates
from sidecar.spool.framing import UNRESOLVED, Damaged, Entry, Header
from sidecar.spool.ledger import Resolution
from sidecar.spool.letters import Letters
from sidecar.spool.release import Release
from sidecar.spool.sender import MarkSender
from sidecar.spool.tail import Ring, Tail
from sidecar.spool.types import (
    AuditLine,
    Counters,
    Cursor,
    DeadLetter,
    Deferred,
    Fate,
    Leftover,
    Obligation,
    Receipt,
    RecordStatus,
    ReleasePlan,
    Seen,
    SpoolState,
)
from sidecar.spool.waiting import Waiters
from sidecar.spool.work import Append, Key, Read, Stats, Stop, Write

_T = TypeVar("_T")


class Spool:
    """The durable buffer; the promise stands in the package's docstring, the format in ``schema``."""

    def __init__(self, opened: opening.Opened, directory: Path, settings: SpoolSettings, clock: Clock) -> None:
        """Use :meth:`open`."""
        loaded = opened.loaded
        self.recovery = opened.report
        self.on_failure: Callable[[SpoolFailed], None] | None = None
        self.on_accepted: Callable[[int, Sequence[LogRecord], int], None] | None = None
        """Called for every frame: smallest log_timestamp, its records, wall time at the commit, microseconds."""
        self.ledger = loaded.ledger
        self.tail = Tail(settings.tail_cache_bytes, loaded.ledger.last_seq + 1)
        self.ring = Ring()
        self._directory = directory
        self._lock = opened.lock
        self._clock = clock
        self._settings = settings
        self._seen = loaded.seen
        self._window = loaded.window
        self._meta = loaded.meta
        self._failed: SpoolFailed | None = None
        self._keys: dict[Obligation, Key] = {}
        self._waiters = Waiters(list(self.ledger.accounts))
        self._sender = MarkSender(self.ledger, self._submit, self._marks_written)
        self._base_us, self._base = clock.now_us(), clock.monotonic()
        self.ledger.on_settled = self._waiters.settled
        self.ledger.on_done = self._done
        self._cursors = {
            name: StoreCursor(self, account, loaded.oldest_us.get(name))
            for name, account in self.ledger.accounts.items()
        }
        self._committer = Committer(
            loaded.connection,
            directory,
            settings,
            clock,
            last_seq=self.ledger.last_seq,
            accepted={a.bit: a.owed for a in self.ledger.accounts.values()},
            position=opened.position,
            ballast=opened.ballast,
            seen=loaded.seen,
            committed=self._committed,
            broken=self._broken,
            busy=self._busy,
        )
        self._admission = Admission(settings, self._committer.measure(), clock)
        self._letters = Letters(self, loaded.door, settings, clock)
        self._fates = Fates(self, self.ring)
        self._release = Release(self)
        self._quarantined = int(self._meta.get("quarantined_records", "0"))
        self._committer.start()

    @classmethod
    def open(
        cls,
        directory: Path,
        settings: SpoolSettings,
        dedup: Dedup,
        stores: Sequence[str],
        clock: Clock,
        *,
        connect: opening.Connect = opening.connect,
    ) -> Self:
        """Open a spool, recovering what an unclean stop left. Blocks; call it before requests come in.

        ``stores`` are the names that obligations may use. ``connect`` opens the database (a seam for fault tests).

        Raises:
            SpoolLocked: another process has it (at once).
            SpoolRefused: volatile file system, newer schema, somebody else's file, no permission.
            SpoolFailed: the disk answers with errors.
        """
        with opening.translated(directory), contextlib.ExitStack() as undo:
            opened = opening.open_directory(directory, settings, dedup, stores, clock, connector=connect)
            undo.callback(opened.close)
            spool = cls(opened, directory, settings, clock)
            undo.pop_all()
        return spool

    # --- writing ---------------------------------------------------------------------------------------------------

    async def append(
        self,
        records: Sequence[LogRecord],
        encoded: Sequence[bytes],
        obligation: Obligation,
        seen: Sequence[Seen] = (),
    ) -> Receipt:
        """Make records durable: returns after the commit that holds all of them returned from fsync.

        ``encoded[i]`` is ``record.encode(records[i])``. All or nothing; normally one frame, shared with other callers.

        Raises:
            Busy: at the cap, disk full, or commits lag; nothing was stored.
            SpoolFailed: the disk failed; nothing is known of these records.
            ValueError: no records, nobody to owe them to, or an id that is no UUID.
        """
        self.check()
        if not records:
            raise ValueError("append: no records")
        key = self._keys.get(obligation) or self._key(obligation)
        chunks = framing.pack(records, encoded)
        size = 0
        for chunk in chunks:
            size += len(chunk.body) + len(chunk.ids)
        self._admission.enter(size)
        loop = asyncio.get_running_loop()
        self._sender.ride(loop)
        future: asyncio.Future[tuple[int, ...]] = loop.create_future()
        pairs = window.pack(seen) if seen else b""
        self._submit(Append(key, chunks, pairs, size, future), loop)
        return Receipt(await future, obligation)

    def _key(self, obligation: Obligation) -> Key:
        if obligation.unresolved:
            key = Key(obligation.phase, 0, 0, UNRESOLVED)
        else:
            owed, required = self.ledger.mask(obligation.owed), self.ledger.mask(obligation.required)
            if not owed:
                raise ValueError("append: an obligation needs at least one store")
            key = Key(obligation.phase, owed, required, 0)
        self._keys[obligation] = key
        return key

    def check(self) -> None:
        """Raise SpoolFailed where the spool is broken or closed."""
        if self._failed is not None:
            raise self._failed

    # --- the database thread ---------------------------------------------------------------------------------------

    def _submit(self, work: Append | Write | Read | Stop, loop: asyncio.AbstractEventLoop) -> None:
        if not self._committer.submit(work, loop):
            self._broken(self._committer.error or SpoolFailed("the spool is closed"))
            self.check()

    async def read(self, run: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run a query in the database thread, after all writes asked for so far."""
        self.check()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()
        self._submit(Read(run, future), loop)
        return await future

    async def write(
        self,
        run: Callable[[sqlite3.Connection], _T],
        done: Callable[[_T], None] | None = None,
        *,
        refusable: bool = False,
        measured: bool = False,
    ) -> _T:
        """Run a change with the next commit; ``done`` is called on the loop after it, before the caller goes on.

        ``done`` is called even where the caller was cancelled. ``measured``: admission knows the new figures when it
        returns. Raises Busy where ``refusable`` and there is no room.
        """
        self.check()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()
        self._submit(Write(run, future, done, refusable, measured=measured), loop)
        return await future

    def _busy(self, reason: str) -> Busy:
        return self._admission.busy(reason)

    def _committed(self, entries: Sequence[Entry], leaving: int, stats: Stats | None) -> None:
        self._admission.leave(leaving)
        if stats is not None:
            self._admission.measured(stats)
        if self.tail.worth_trimming:
            self._trim_tail()
        for entry in entries:
            self.ledger.accepted(entry.header)
            self.tail.add(entry)
            if self.on_accepted is not None:
                self.on_accepted(entry.header.t0, entry.records, entry.header.accepted_us)
        for name, cursor in self._cursors.items():
            mask = self.ledger.accounts[name].mask
            for entry in entries:
                if entry.header.owed & mask:
                    cursor.accepted(entry.header)
            cursor.wake()

    def _trim_tail(self) -> None:
        """With a store far behind, the tail keeps what the other one has yet to take, and nothing for that one."""
        wanted = [cursor.tail_after(self.tail.limit) for cursor in self._cursors.values()]
        if None in wanted:
            self.tail.forget(min((seq for seq in wanted if seq is not None), default=self.ledger.last_seq))

    def _broken(self, error: SpoolFailed) -> None:
        if self._failed is not None:
            return
        self._failed = error
        for cursor in self._cursors.values():
            cursor.wake()
        self._waiters.fail(error)
        if self.on_failure is not None:
            self.on_failure(error)

    def header_damaged(self, header: Header) -> SpoolFailed:
        """A frame's obligation cannot be trusted: stop; the next start salvages."""
        error = SpoolFailed(f"the header of frame {header.seq} is damaged; restart to recover what can be read")
        self._committer.ask_for_repair()
        self._broken(error)
        return error

    def keep_damaged(self, name: str, damaged: Sequence[Damaged]) -> None:
        """Have damaged bytes kept in files and counted, once; returns at once."""

        def done(new: int) -> None:
            self._quarantined += new

        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()
        future.add_done_callback(_observed)
        run = partial(damage.keep, directory=self._directory, name=name, damaged=damaged)
        self._submit(Write(run, future, done), loop)

    # --- marks -----------------------------------------------------------------------------------------------------

    def marked(self) -> None:
        """Something was settled: it rides on a commit or goes alone before long."""
        self._sender.marked()

    def flush_now(self) -> None:
        """Queue the marks, so that whatever is asked for next sees them."""
        self._sender.flush_now()

    def stalled(self, store: str) -> bool:
        """True while the store's leftovers find no room on the disk: nothing more is handed out to it."""
        return self._sender.stalled(store)

    def _marks_written(self, written: marks.Written) -> None:
        self.ledger.corrections.update(written.corrections)
        self._letters.refreshed(written.refreshed)

    @property
    def accepting(self) -> bool:
        """False while appends are pushed back."""
        return not self._admission.reason and self._failed is None

    def _done(self, header: Header) -> None:
        self._admission.drained(header.size)
        self.ring.add(header)
        self.tail.drop(header.seq)

    # --- time ------------------------------------------------------------------------------------------------------

    def now_us(self) -> int:
        """Wall clock, microseconds."""
        return self._clock.now_us()

    def steady_us(self, wall_us: int) -> int:
        """A wall-clock time on a clock that does not jump with the wall clock (P11)."""
        steady = self._base_us + int((self._clock.monotonic() - self._base) * 1_000_000)
        return wall_us - self._clock.now_us() + steady

    def wall_us(self, steady_us: int) -> int:
        """The inverse of :meth:`steady_us`."""
        return 2 * steady_us - self.steady_us(steady_us)

    # --- looking ---------------------------------------------------------------------------------------------------

    def observe_commits(self, observe: Callable[[float], None]) -> None:
        """Call ``observe`` on the loop with the seconds of each commit, its fsync included."""
        self._committer.on_commit = observe

    def cursor(self, store: str) -> Cursor:
        """The store's own way through the spool; one per store and run. Raises KeyError for an unknown name."""
        return self._cursors[store]

    def take_back(self, store: str) -> None:
        """The store's consumer ended, whatever it held: its frames and deferred records are handed out again."""
        self._cursors[store].take_back()
        self._letters.take_back(store)

    def holds(self, store: str, seq: int) -> bool:
        """True while the store's consumer has the frame."""
        return self._cursors[store].holds(seq)

    def counters(self, store: str) -> Counters:
        """The store's account. Raises KeyError for an unknown name."""
        return self.ledger.accounts[store].counters(self._cursors[store].oldest_us)

    def state(self) -> SpoolState:
        """What the spool says of itself; figures of the disk are at most about a second old."""
        stats = self._admission.stats
        return SpoolState(
            bytes_used=self._admission.used,
            capacity_bytes=self._settings.cap_bytes,
            free_disk_bytes=stats.disk_free,
            accepting=self.accepting,
            busy_reason=self._admission.reason,
            commit_seconds_last=stats.commit_seconds,
            quarantined_records=self._quarantined,
            wal_damage=int(self._meta.get("wal_damage", "0")),
            dedup_ids=self._seen.ids,
        )

    def window(self) -> Sequence[Seen]:
        """The dedup window as it was when the spool was opened, oldest first."""
        return self._window

    def divergence(self) -> Mapping[tuple[str, str], int]:
        """(present_in, missing_from) -> records of this spool that the one has confirmed and the other is owed."""
        frames, corrections = self.ledger.frame_pairs, self.ledger.corrections
        return {
            (a.name, b.name): max(0, frames[a.mask, b.mask] + corrections[a.mask, b.mask])
            for a, b in permutations(self.ledger.accounts.values(), 2)
        }

    def divergence_oldest_us(self) -> int | None:
        """Accept time of the oldest pending record of a store that misses something another has; None: none pending."""
        behind = {missing for (_, missing), records in self.divergence().items() if records}
        ages = [us for us in (self.counters(store).oldest_pending_us for store in behind) if us is not None]
        return min(ages, default=None)

    async def wait_settled(self, receipt: Receipt, stores: frozenset[str]) -> None:
        """Wait until every named store that is owed the receipt's frames has settled them (in memory counts).

        Settled is not delivered: ask :meth:`fates`. Raises SpoolFailed.
        """
        for name in stores:
            if not receipt.obligation.unresolved and name not in receipt.obligation.owed:
                continue
            marks_of = self.ledger.accounts[name].marks
            for seq in receipt.seqs:
                self.check()
                if not marks_of.covers(seq):
                    await self._waiters.wait(name, seq)

    def awaited(self, store: str) -> asyncio.Event:
        """Set while a caller of :meth:`wait_settled` waits for the store. Raises KeyError for an unknown name."""
        return self._waiters.awaited(store)

    async def fates(self, receipt: Receipt, log_ids: Sequence[str]) -> Mapping[str, Mapping[str, Fate]]:
        """Per log_id of the receipt, per store owed: what became of it so far."""
        return await self._fates.of_receipt(receipt, log_ids)

    async def status(self, log_id: str) -> RecordStatus | None:
        """Where a record of this spool stands; None once it has left local retention (or was never here)."""
        return await self._fates.status(log_id)

    # --- leftovers -------------------------------------------------------------------------------------------------

    async def due(self, store: str, now_us: int, limit: int, max_bytes: int = 8 * MIB) -> Sequence[Deferred]:
        """Deferred records whose time has come, each once until ``finish_deferred`` (or a restart).

        As many as ``limit`` and ``max_bytes`` (stored bytes) allow, one at least.
        """
        return await self._letters.due(store, now_us, limit, max_bytes)

    def next_due_us(self, store: str) -> int | None:
        """When the next deferred record is due, wall-clock microseconds; None: there is none that nobody holds."""
        return self._letters.next_due_us(store)

    async def finish_deferred(self, item: Deferred, outcome: Leftover | None) -> None:
        """Write down what became of a record from :meth:`due`: None = delivered. Durable when it returns."""
        await self._letters.finish(item, outcome)

    async def dead_letters(
        self, *, store: str | None = None, retry_class: str | None = None, after: int = 0, limit: int = 100
    ) -> Sequence[DeadLetter]:
        """A page of dead letters in the order of their keys, after a key."""
        return await self._letters.page(store, retry_class, after, limit)

    def dead_letter_counts(self) -> Mapping[tuple[str, str], int]:
        """(store, retry class) -> dead letters; records refused at the door under ("door", "refused")."""
        return self._letters.counts()

    async def refuse(self, raws: Sequence[tuple[bytes, str, str]]) -> int:
        """Keep what was refused at the door: (source bytes, field, reason); returns how many were kept (own quota)."""
        return await self._letters.refuse(raws)

    async def redrive(
        self,
        keys: Sequence[int] | None = None,
        *,
        store: str | None = None,
        retry_class: str | None = None,
        who: str = "",
        reason: str = "",
    ) -> int:
        """Try dead letters again: they become deferred, due now. By keys, or by store and class (None: all)."""
        return await self._letters.redrive(keys, store, retry_class, who, reason)

    async def discard(
        self,
        keys: Sequence[int] | None = None,
        *,
        store: str | None = None,
        retry_class: str | None = None,
        who: str,
        reason: str,
    ) -> int:
        """Give dead letters up, with an audit line in the same transaction. Raises ValueError without a reason."""
        return await self._letters.discard(keys, store, retry_class, who, reason)

    # --- obligations -----------------------------------------------------------------------------------------------

    async def strengthen(self, store: str) -> int:
        """Make every best-effort obligation to a store required; returns how many records that concerned."""
        account = self.ledger.accounts[store]
        weak = 0

        def done(seq: int) -> None:
            nonlocal weak
            weak, account.weak_records = account.weak_records, 0
            account.strengthened = max(account.strengthened, seq)

        await self.write(partial(marks.strengthen, bit=account.bit), done)
        return weak

    async def resolve(self, obligation: Obligation) -> int:
        """Give every unresolved frame its obligation, once; returns how many records that concerned."""
        key = self._key(obligation)
        if key.flags:
            raise ValueError("resolve: the obligation is itself unresolved")
        self.flush_now()
        concerned = 0

        def done(resolved: tuple[Resolution, dict[int, int]] | None) -> None:
            nonlocal concerned
            if resolved is None:
                return
            resolution, counted = resolved
            concerned = self.ledger.unresolved_records
            self.ledger.resolved(resolution, counted)
            for name, cursor in self._cursors.items():
                if name in obligation.owed:
                    cursor.rewind(resolution.lo, self.ledger.unresolved_us)
            self._waiters.resolved(resolution.lo, resolution.hi, obligation.owed)

        await self.write(partial(marks.resolve, key=key), done)
        return concerned

    async def release_candidates(self, store: str, max_bytes: int) -> ReleasePlan | None:
        """The oldest best-effort backlog of a store that every required store has confirmed; None: there is none.

        Write its ``hours`` to the gap ledger in a required store first, then call :meth:`release`.
        """
        return await self._release.candidates(store, max_bytes)

    def reserve(self, plan: ReleasePlan) -> bool:
        """Keep the plan's frames from being handed out, until :meth:`unreserve`; False where one already was."""
        return self._cursors[plan.store].reserve(plan.seqs)

    def unreserve(self, plan: ReleasePlan) -> None:
        """The plan is done or given up: what was not released is handed out again."""
        self._cursors[plan.store].unreserve()

    async def release(self, plan: ReleasePlan) -> int:
        """Release a plan's frames; returns the records released (frames whose state changed since stay pending)."""
        return await self._release.release(plan)

    # --- odds and ends ---------------------------------------------------------------------------------------------

    def meta(self, key: str) -> str | None:
        """A small durable value, from memory."""
        return self._meta.get(key)

    async def set_meta(self, key: str, value: str) -> None:
        """Make a small value durable."""

        def done(_: None) -> None:
            self._meta[key] = value

        await self.write(partial(marks.set_meta, key=key, value=value), done)

    async def audit(self, who: str, what: str, why: str, evidence: str = "") -> None:
        """Add a line to the audit trail, durable when it returns."""
        line = (self._clock.now_us(), who, what, why, evidence)
        await self.write(partial(marks.audit, line=line))

    async def audit_trail(self, limit: int = 100) -> Sequence[AuditLine]:
        """The newest lines, newest first."""
        return await self.read(partial(marks.audit_trail, limit=limit))

    async def close(self) -> None:
        """Write the marks down, checkpoint, note the clean stop. What is undelivered stays. Idempotent."""
        self._sender.close()
        if self._failed is None:
            loop = asyncio.get_running_loop()
            while self.ledger.dirty and not self._admission.stats.stuck:
                self.flush_now()
                await self.read(lambda _: None)
            self._committer.submit(Stop(), loop)
            await loop.run_in_executor(None, self._committer.join)
            await asyncio.sleep(0)  # lets the thread's last words arrive
            closed = SpoolFailed("the spool is closed")
            self.on_failure = None
            self._broken(closed)
        self._lock.release()


def _observed(future: "asyncio.Future[_T]") -> None:
    """For work that nobody awaits: its failure has told everybody already, by way of ``_broken``."""
    if not future.cancelled():
        future.exception()

"""What the event loop knows: per store what is settled, counted and still to be written down.

Everything here counts at once; ``snapshot`` takes the differences since the last one, to be written by the database
thread with a commit. So a crash loses at most differences of settled frames, which are then handed out again.
"""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from sidecar.spool.divergence import Pair, single_bits
from sidecar.spool.framing import UNRESOLVED, Header
from sidecar.spool.intervals import Intervals
from sidecar.spool.types import Counters

_TRIM_LEAST: Final = 4 * 1024 * 1024


@dataclass(slots=True)
class Account:
    """One store's account in memory."""

    name: str
    mask: int
    marks: Intervals = field(default_factory=lambda: Intervals((0, 0)))
    strengthened: int = 0
    accepted_seq: int = 0  # when the file was opened: frames up to here were counted in ``owed``
    owed: int = 0
    delivered: int = 0
    released: int = 0
    discarded: int = 0
    quarantined: int = 0
    frame_records: int = 0  # pending in frames
    frame_bytes: int = 0
    weak_records: int = 0  # of these, best-effort
    deferred: int = 0
    deferred_bytes: int = 0
    deferred_oldest_us: int | None = None
    next_due_us: int | None = None  # on the spool's steady clock
    dead: Counter[str] = field(default_factory=Counter)  # by retry class
    dead_bytes: int = 0
    written: tuple[int, int, int, int] = (0, 0, 0, 0)  # owed, delivered, released, quarantined already on disk
    dirty: bool = False
    released_frames: Intervals = field(default_factory=Intervals)  # in this run, for status

    @property
    def bit(self) -> int:
        """Row of ``progress``."""
        return self.mask.bit_length() - 1

    def counters(self, oldest_us: int | None) -> Counters:
        """The account as others see it."""
        ages = [us for us in (oldest_us, self.deferred_oldest_us if self.deferred else None) if us is not None]
        return Counters(
            owed=self.owed,
            delivered=self.delivered,
            pending=self.frame_records + self.deferred,
            dead_lettered=self.dead.total(),
            released=self.released,
            discarded=self.discarded,
            quarantined=self.quarantined,
            pending_bytes=self.frame_bytes + self.deferred_bytes,
            oldest_pending_us=min(ages) if ages else None,
            dead_letter_bytes=self.dead_bytes,
        )


class LeftoverRow(NamedTuple):
    """One row of ``leftovers`` to be inserted, in the order of its columns after ``key``."""

    store: str
    state: int
    seq: int
    idx: int
    log_id: bytes | None
    phase: int
    owed: int
    required: int
    accepted_us: int
    first_us: int
    last_us: int
    due_us: int
    attempts: int
    retry_class: str
    reason: str
    code: str
    size: int
    crc: int
    body: bytes | None


class Exceptional(NamedTuple):
    """A frame with leftovers was settled by one store: the corrections of divergence depend on the masks."""

    order: int
    seq: int
    owed: int
    settled_before: int
    settled_after: int
    rows: Sequence[LeftoverRow]


class MarkRow(NamedTuple):
    """Differences for one row of ``progress``."""

    upto: int
    ahead: bytes
    owed: int
    accepted_seq: int
    delivered: int
    released: int
    quarantined: int
    bit: int


class Snapshot(NamedTuple):
    """What one mark commit writes."""

    marks: Sequence[MarkRow]
    exceptional: Sequence[Exceptional]
    trims: Sequence[tuple[int, int]]
    differences: Sequence[tuple[int, int, int]]  # bit present in, bit missing from, records


class Resolution(NamedTuple):
    """To whom unresolved frames lo..hi are owed."""

    lo: int
    hi: int
    phase: int
    owed: int
    required: int


class Ledger:
    """All accounts, the obligations that changed after accept, and what is still to be written."""

    def __init__(self, accounts: Sequence[Account], resolutions: Sequence[Resolution], last_seq: int) -> None:
        self.accounts = {a.name: a for a in accounts}
        self.by_mask = {a.mask: a for a in accounts}
        self.resolutions = list(resolutions)
        self.last_seq = last_seq
        self.unresolved = Intervals()
        self.unresolved_records = 0
        self.unresolved_bytes = 0
        self.unresolved_us = 0  # accept time of the oldest
        self.excepted = Intervals()  # frames that have, or had in this run, leftovers of some store
        self.frame_pairs: Counter[Pair] = Counter()
        self.corrections: Counter[Pair] = Counter()
        self.on_settled: Callable[[str, int], None] = lambda _store, _seq: None
        self.on_done: Callable[[Header], None] = lambda _header: None
        self._exceptional: list[Exceptional] = []
        self._order = 0
        self._differences: Counter[Pair] = Counter()
        self._trims: deque[tuple[int, int, int]] = deque()
        self._bytes_since = 0

    # --- obligations -----------------------------------------------------------------------------------------------

    def mask(self, names: frozenset[str]) -> int:
        """The bit mask of names. Raises KeyError for a name that the spool was not opened with."""
        return sum(self.accounts[name].mask for name in names)

    def names(self, mask: int) -> frozenset[str]:
        """The inverse of :meth:`mask`."""
        return frozenset(self.by_mask[bit].name for bit in single_bits(mask) if bit in self.by_mask)

    def effective(self, header: Header) -> Header:
        """The header with what was decided after accept: resolved, strengthened."""
        if header.flags & UNRESOLVED:
            found = next((r for r in self.resolutions if r.lo <= header.seq <= r.hi), None)
            if found is None:
                return header
            header = header._replace(phase=found.phase, owed=found.owed, required=found.required, flags=0)
        weak = header.owed & ~header.required
        if weak:
            for bit in single_bits(weak):
                if header.seq <= self.by_mask[bit].strengthened:
                    header = header._replace(required=header.required | bit)
        return header

    def settled(self, header: Header) -> int:
        """The mask of owed stores that have settled the frame."""
        return sum(b for b in single_bits(header.owed) if self.by_mask[b].marks.covers(header.seq))

    # --- changes ---------------------------------------------------------------------------------------------------

    def accepted(self, header: Header) -> None:
        """A frame was committed (or found when the file was opened)."""
        self.last_seq = max(self.last_seq, header.seq)
        self._bytes_since += header.size
        if header.flags & UNRESOLVED:
            if not self.unresolved:
                self.unresolved_us = header.accepted_us
            self.unresolved.add(header.seq)
            self.unresolved_records += header.n
            self.unresolved_bytes += header.size
            return
        for bit in single_bits(header.owed):
            account = self.by_mask[bit]
            account.owed += header.n
            account.frame_records += header.n
            account.frame_bytes += header.size
            if not header.required & bit:
                account.weak_records += header.n
            account.dirty = True

    def found(self, owed: int, required: int, settled: int, fresh: int, amount: tuple[int, int]) -> None:
        """Frames were in the file when it was opened: (records, bytes) with one obligation, settled for a mask.

        ``fresh`` is the mask of stores whose durable ``accepted`` has not got them yet.
        """
        records, size = amount
        for bit in single_bits(owed):
            account = self.by_mask[bit]
            if fresh & bit:
                account.owed += records
            if settled & bit:
                for other in single_bits(owed & ~settled):
                    self.frame_pairs[bit, other] += records
                continue
            account.frame_records += records
            account.frame_bytes += size
            if not required & bit:
                account.weak_records += records

    def settle(
        self,
        account: Account,
        header: Header,
        rows: Sequence[LeftoverRow] = (),
        *,
        delivered: int,
        released: int = 0,
        quarantined: int = 0,
    ) -> None:
        """The store is done with the frame (an effective header)."""
        before = self.settled(header)
        account.marks.add(header.seq)
        account.delivered += delivered
        account.released += released
        account.quarantined += quarantined
        account.frame_records -= header.n
        account.frame_bytes -= header.size
        if not header.required & account.mask:
            account.weak_records -= header.n
        account.dirty = True
        others = header.owed & ~account.mask
        if others:
            for bit in single_bits(others):
                if before & bit:
                    self.frame_pairs[(bit, account.mask)] -= header.n
                else:
                    self.frame_pairs[(account.mask, bit)] += header.n
        if released:
            account.released_frames.add(header.seq)
            for bit in single_bits(before):
                self.corrections[bit, account.mask] += released
                self._differences[bit, account.mask] += released
        if rows:
            self.excepted.add(header.seq)
        if self.excepted and self.excepted.covers(header.seq):
            after = before | account.mask
            self._order += 1
            self._exceptional.append(Exceptional(self._order, header.seq, header.owed, before, after, rows))
        self.on_settled(account.name, header.seq)
        if header.owed == before | account.mask:
            self.trim(header)

    def trim(self, header: Header) -> None:
        """Nobody owes the frame any more: delete it with one of the next marks."""
        if self._trims and self._trims[-1][1] == header.seq - 1:
            lo, _, size = self._trims.pop()
            self._trims.append((lo, header.seq, size + header.size))
        else:
            self._trims.append((header.seq, header.seq, header.size))
        self.on_done(header)

    def resolved(self, resolution: Resolution, counted: dict[int, int]) -> None:
        """All unresolved frames are owed now. ``counted``: records per bit that the file's ``accepted`` has already."""
        self.resolutions.append(resolution)
        records, size = self.unresolved_records, self.unresolved_bytes
        for account in self.accounts.values():
            if not resolution.owed & account.mask:
                for lo, hi in self.unresolved:
                    account.marks.add(lo, hi)
                continue
            account.owed += records
            account.frame_records += records
            account.frame_bytes += size
            if not resolution.required & account.mask:
                account.weak_records += records
            owed, *rest = account.written
            account.written = (owed + counted.get(account.bit, 0), rest[0], rest[1], rest[2])
            account.dirty = True
        self.unresolved = Intervals()
        self.unresolved_records = self.unresolved_bytes = 0

    def wrote(self, account: Account, delivered: int, quarantined: int) -> None:
        """A write of its own has these already in the file; count them here."""
        account.delivered += delivered
        account.quarantined += quarantined
        a, b, c, d = account.written
        account.written = (a, b + delivered, c, d + quarantined)

    # --- writing down ----------------------------------------------------------------------------------------------

    @property
    def dirty(self) -> bool:
        """True where a snapshot would hold something."""
        return bool(self._trims or self._exceptional) or any(a.dirty for a in self.accounts.values())

    def give_back(self, snapshot: Snapshot) -> None:
        """A snapshot found no room: it is part of the next one."""
        for mark in snapshot.marks:
            account = self.by_mask[1 << mark.bit]
            gone = (mark.owed, mark.delivered, mark.released, mark.quarantined)
            owed, delivered, released, quarantined = (a - b for a, b in zip(account.written, gone, strict=True))
            account.written = (owed, delivered, released, quarantined)
            account.dirty = True
        self._exceptional = sorted([*snapshot.exceptional, *self._exceptional], key=lambda e: e.order)
        self._trims.extendleft((lo, hi, 0) for lo, hi in reversed(snapshot.trims))
        for present, missing, records in snapshot.differences:
            self._differences[1 << present, 1 << missing] += records

    def stores_with_leftovers(self) -> frozenset[str]:
        """Stores whose leftovers are still to be written."""
        return frozenset(row.store for e in self._exceptional for row in e.rows)

    def snapshot(self, *, whole: bool = False) -> Snapshot:
        """Take the differences since the last snapshot; they are on their way to the file.

        Deletions are limited to about what came in since, for the sake of the commit's length; not where ``whole``.
        """
        marks = []
        for account in self.accounts.values():
            if not account.dirty:
                continue
            now = (account.owed, account.delivered, account.released, account.quarantined)
            owed, delivered, released, quarantined = (a - b for a, b in zip(now, account.written, strict=True))
            upto = account.marks.first_end
            ahead = Intervals(*(pair for pair in account.marks if pair[0] > upto)).pack()
            marks.append(MarkRow(upto, ahead, owed, self.last_seq, delivered, released, quarantined, account.bit))
            account.written = now
            account.dirty = False
        budget = 1 << 62 if whole else max(_TRIM_LEAST, 2 * self._bytes_since)
        self._bytes_since = 0
        trims = []
        while self._trims and budget > 0:
            lo, hi, size = self._trims.popleft()
            if size > budget and hi > lo:  # part of a long range: by share
                cut = min(hi - 1, lo + (hi - lo + 1) * budget // size)
                share = size * (cut - lo + 1) // (hi - lo + 1)
                self._trims.appendleft((cut + 1, hi, size - share))
                hi, size = cut, share
            trims.append((lo, hi))
            budget -= size
        exceptional, self._exceptional = self._exceptional, []
        differences = [(a.bit_length() - 1, b.bit_length() - 1, n) for (a, b), n in self._differences.items()]
        self._differences.clear()
        return Snapshot(marks, exceptional, trims, differences)

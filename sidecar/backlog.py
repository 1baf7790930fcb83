"""The bounded window of records that one shipper holds: loads cut into pieces, pieces joined into chunks. Pure.

A **load** is settled as a whole (a frame, or one deferred record); a **piece** is a run of records of one load; a
**chunk** is the list of pieces that one write call carries. Everything is per run of records, nothing per record,
until a store refuses something.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sidecar.record import LogRecord
from sidecar.spool import Deferred, Frame, Leftover
from sidecar.stores.base import WriteLimits


@dataclass(slots=True, eq=False)
class Load:
    """Records that are settled together; ``outstanding`` of them are not yet decided."""

    records: Sequence[LogRecord]
    sizes: Sequence[int]
    outstanding: int
    frame: Frame | None = None
    deferred: Deferred | None = None
    leftovers: list[Leftover] = field(default_factory=list)


@dataclass(slots=True, frozen=True)
class Piece:
    """Records ``start`` to ``stop`` of one load."""

    load: Load
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def records(self) -> Sequence[LogRecord]:
        """The records of this run."""
        return self.load.records[self.start : self.stop]

    def split(self, n: int) -> "tuple[Piece, Piece]":
        """The first ``n`` records, and the rest."""
        middle = self.start + n
        return Piece(self.load, self.start, middle), Piece(self.load, middle, self.stop)


Chunk = list[Piece]


def count(chunk: Sequence[Piece]) -> int:
    """How many records a chunk carries."""
    return sum(map(len, chunk))


def records_of(chunk: Chunk) -> Sequence[LogRecord]:
    """The records of a chunk in order; no copy where it is one piece of a whole load."""
    first = chunk[0].records
    if len(chunk) == 1:
        return first
    records = list(first)
    for piece in chunk[1:]:
        records.extend(piece.records)
    return records


def singles(chunk: Chunk) -> Iterator[Piece]:
    """One piece per record, in order."""
    for piece in chunk:
        for i in range(piece.start, piece.stop):
            yield Piece(piece.load, i, i + 1)


def cut(chunk: Sequence[Piece], n: int) -> tuple[Chunk, Chunk]:
    """The first ``n`` records of a chunk, and the rest."""
    left: Chunk = []
    right: Chunk = []
    for piece in chunk:
        take = min(len(piece), n)
        n -= take
        head, tail = piece.split(take)
        if len(head):
            left.append(head)
        if len(tail):
            right.append(tail)
    return left, right


class Backlog:
    """Queue of one store. ``held`` counts every record taken from the spool and not yet decided."""

    def __init__(self, limits: WriteLimits, *, max_records: int, max_bytes: int) -> None:
        self._limits = limits
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._queue: deque[Piece] = deque()
        self._suspects: deque[Chunk] = deque()  # halves of refused batches: go by themselves, never merged
        self._queued = 0
        self._held = 0
        self._held_bytes = 0
        self.oldest = 0.0  # when the queue last became non-empty, monotonic seconds

    @property
    def has_room(self) -> bool:
        """Whether more may be taken from the spool."""
        return self._held < self._max_records and self._held_bytes < self._max_bytes

    @property
    def room(self) -> tuple[int, int]:
        """Records and bytes that may be taken from the spool now; at least one of each."""
        return max(1, self._max_records - self._held), max(1, self._max_bytes - self._held_bytes)

    @property
    def ready(self) -> int:
        """Records that the next chunk may carry, before rate and limits; 0 when there is nothing to send."""
        if self._suspects:
            return count(self._suspects[0])
        return min(self._queued, self._limits.max_records)

    @property
    def full_chunk(self) -> bool:
        """Whether waiting would not make the next chunk any larger."""
        return bool(self._suspects) or self._queued >= self._limits.max_records

    def add(self, load: Load, now: float) -> None:
        """Take a load in."""
        n = len(load.records)
        self._held += n
        self._held_bytes += sum(load.sizes)
        self.give_back([Piece(load, 0, n)], now, front=False)

    def give_back(self, chunk: Chunk, now: float, *, front: bool) -> None:
        """Records to be sent (again): at the front, or behind all others."""
        if not self._queued:
            self.oldest = now
        self._queued += count(chunk)
        if front:
            self._queue.extendleft(reversed(chunk))
        else:
            self._queue.extend(chunk)

    def bisect(self, chunk: Chunk) -> None:
        """A chunk that was refused as a whole: its halves go by themselves."""
        self._suspects.extend(cut(chunk, count(chunk) // 2))

    def decided(self, load: Load, n: int) -> bool:
        """``n`` more records of a load are stored or left over; True when that was the last of it."""
        load.outstanding -= n
        if load.outstanding:
            return False
        self._held -= len(load.records)
        self._held_bytes -= sum(load.sizes)
        return True

    def next_chunk(self, n: int, now: float) -> Chunk:
        """Up to ``n`` records within the store's limits, no id twice; at least one."""
        if self._suspects:
            chunk, rest = cut(self._suspects.popleft(), n)
            if rest:
                self._suspects.appendleft(rest)
            return chunk
        n = min(n, self._limits.max_records)
        room = self._limits.max_bytes
        chunk = []
        while n and self._queue:
            piece = self._queue.popleft()
            fit = min(len(piece), n)
            sizes = piece.load.sizes[piece.start : piece.start + fit]
            used = sum(sizes)
            if used > room:
                fit, used = _fitting(sizes, room, at_least=0 if chunk else 1)
                n = fit  # nothing more fits behind this piece
            if fit < len(piece):
                piece, rest_of_piece = piece.split(fit)
                self._queue.appendleft(rest_of_piece)
            if fit:
                chunk.append(piece)
            room -= used
            n -= fit
        self._queued -= count(chunk)
        return self._without_twins(chunk, now)

    def _without_twins(self, chunk: Chunk, now: float) -> Chunk:
        """No id twice in one call: the later one goes behind all others."""
        ids = [r.log_id for r in records_of(chunk)]
        if len(set(ids)) == len(ids):
            return chunk
        seen: set[str] = set()
        kept: Chunk = []
        for single in singles(chunk):
            log_id = single.records[0].log_id
            if log_id in seen:
                self.give_back([single], now, front=False)
            else:
                seen.add(log_id)
                kept.append(single)
        return kept


def _fitting(sizes: Sequence[int], room: int, *, at_least: int) -> tuple[int, int]:
    """How many of the first sizes fit into ``room`` bytes (but ``at_least`` so many), and their sum."""
    fit = used = 0
    for size in sizes:
        if used + size > room and fit >= at_least:
            break
        fit += 1
        used += size
    return fit, used

"""One store's own way through the spool: from the tail cache while it keeps up, from the file while it does not.

All numbers up to ``pos`` are settled for the store, in its hands, reserved for release, or unresolved. What is not owed
to it is passed over and marked, so that its intervals grow together.
"""

import asyncio
import contextlib
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from zlib import crc32

from sidecar.record import LogRecord, encode
from sidecar.spool import framing, schema
from sidecar.spool.framing import HEADER_COLUMNS, UNRESOLVED, Damaged, Header
from sidecar.spool.ledger import Account, LeftoverRow
from sidecar.spool.parts import Parts
from sidecar.spool.types import Frame, Leftover

_HEADERS: Final = 512  # looked at in one read

Found = list[tuple[Header, bytes | None]]


@dataclass(slots=True)
class _Taken:
    header: Header  # as it stands in the file
    frame: Frame
    damaged: Sequence[Damaged]


class StoreCursor:
    """The Cursor of ``types``, for one account."""

    def __init__(self, parts: Parts, account: Account, oldest_us: int | None) -> None:
        self._parts = parts
        self._account = account
        self._pos = account.marks.first_end
        self._taken: dict[int, _Taken] = {}
        self._reserved: frozenset[int] = frozenset()  # being released: not handed out meanwhile
        self._hint_us = oldest_us  # accept time of a frame that is not younger than the next one
        self._waiter: asyncio.Future[None] | None = None
        self._turn = 0  # raised by rewind: what a read under way found is stale

    # --- handing out -----------------------------------------------------------------------------------------------

    async def take(self, max_records: int, max_bytes: int) -> Sequence[Frame]:
        """See types.Cursor."""
        parts = self._parts
        while True:
            parts.check()
            if not parts.stalled(self._account.name):
                frames = self._from_tail(max_records, max_bytes)
                if frames:
                    return frames
                if self._behind:
                    frames = await self._from_file(max_records, max_bytes)
                    if frames:
                        return frames
                    continue
            await self._wait()

    def wake(self) -> None:
        """There may be something to take, or to raise."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def accepted(self, header: Header) -> None:
        """A frame that is owed to the store was committed."""
        if self._hint_us is None or self._account.frame_records == header.n:
            self._hint_us = header.accepted_us

    def rewind(self, seq: int, oldest_us: int) -> None:
        """Frames from ``seq`` on, the oldest of ``oldest_us``, are owed now (resolved): look at them again."""
        if self._hint_us is None or not self._taken:
            self._hint_us = min(oldest_us, self._hint_us or oldest_us)
        self._pos = min(self._pos, seq - 1)
        self._turn += 1
        self.wake()

    def take_back(self) -> None:
        """The consumer is gone: what it held is handed out again, from the oldest on."""
        if self._taken:
            self._hint_us = next(iter(self._taken.values())).frame.accepted_us
        self._taken.clear()
        self._pos = self._account.marks.first_end
        self._turn += 1

    def reserve(self, seqs: Sequence[int]) -> bool:
        """Hand none of these out until :meth:`unreserve`; False where one is in the consumer's hands or settled."""
        if any(seq in self._taken or self._account.marks.covers(seq) for seq in seqs):
            return False
        self._reserved = frozenset(seqs)
        return True

    def unreserve(self) -> None:
        """Hand out again what was reserved and is not settled."""
        if self._reserved:
            self._pos = min(self._pos, min(self._reserved) - 1)
            self._reserved = frozenset()
            self._turn += 1
            self.wake()

    def holds(self, seq: int) -> bool:
        """True while the frame is with the consumer."""
        return seq in self._taken

    def tail_after(self, reach: int) -> int | None:
        """The number behind which the tail cache is wanted; None: there are more than ``reach`` bytes to read first."""
        return None if self._behind and self._account.frame_bytes > reach else self._pos

    @property
    def oldest_us(self) -> int | None:
        """Accept time of the oldest frame that is pending for the store; None where there is none."""
        if not self._account.frame_records:
            return None
        if self._taken:
            return next(iter(self._taken.values())).frame.accepted_us
        entry = self._parts.tail.get(self._account.marks.next_uncovered(self._pos + 1))
        return entry.header.accepted_us if entry is not None else self._hint_us

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    @property
    def _behind(self) -> bool:
        return self._next(self._pos + 1) < min(self._parts.tail.first, self._parts.ledger.last_seq + 1)

    def _next(self, seq: int) -> int:
        """The first number >= seq that is neither settled nor taken."""
        marks = self._account.marks
        seq = marks.next_uncovered(seq)
        while seq in self._taken or seq in self._reserved:
            seq = marks.next_uncovered(seq + 1)
        return seq

    def _from_tail(self, max_records: int, max_bytes: int) -> list[Frame]:
        parts, mask = self._parts, self._account.mask
        last, tail, marks = parts.ledger.last_seq, parts.tail, self._account.marks
        out: list[Frame] = []
        records = size = 0
        while (seq := self._next(self._pos + 1)) <= last:
            if seq < tail.first:
                break
            entry = tail.get(seq)
            if entry is None:  # never committed, or gone: owed to nobody
                marks.add(seq)
            else:
                header = parts.ledger.effective(entry.header)
                if not header.flags & UNRESOLVED:
                    if not header.owed & mask:
                        marks.add(seq)
                    else:
                        records += header.n
                        size += header.size
                        if out and (records > max_records or size > max_bytes):
                            return out
                        out.append(self._hand_out(header, entry.records, entry.sizes, range(header.n), ()))
            self._pos = seq
        return out

    async def _from_file(self, max_records: int, max_bytes: int) -> list[Frame]:
        marks, mask = self._account.marks, self._account.mask
        lo = self._next(self._pos + 1)
        hi = min(self._parts.tail.first - 1, self._parts.ledger.last_seq)
        covered = marks.next_covered(lo)
        if covered is not None:
            hi = min(hi, covered - 1)
        turn = self._turn
        found, scanned = await self._parts.read(lambda c: _fetch(c, lo, hi, mask, (max_records, max_bytes)))
        if turn != self._turn:
            return []
        out: list[Frame] = []
        at = lo - 1
        for raw_header, body in found:
            if not raw_header.sound:
                raise self._parts.header_damaged(raw_header)
            header = self._parts.ledger.effective(raw_header)
            seq = header.seq
            marks.add(at + 1, seq - 1)
            at = seq
            self._pos = max(self._pos, seq)
            if header.flags & UNRESOLVED or marks.covers(seq) or seq in self._taken or seq in self._reserved:
                continue  # released, reserved or handed out, while it was read
            if not header.owed & mask:
                marks.add(seq)
                continue
            if body is None:
                raise AssertionError(f"frame {seq} is owed, and its body was not read")
            unpacked = framing.unpack(header, body)
            if unpacked.damaged:
                self._parts.keep_damaged(f"frame-{seq}", unpacked.damaged)
            frame = self._hand_out(header, unpacked.records, unpacked.sizes, unpacked.indexes, unpacked.damaged)
            if frame.records:
                out.append(frame)
            else:
                self.settle(frame)
        marks.add(at + 1, scanned)
        self._pos = max(self._pos, scanned)
        return out

    def _hand_out(
        self,
        header: Header,
        records: Sequence[LogRecord],
        sizes: Sequence[int],
        indexes: Sequence[int],
        damaged: Sequence[Damaged],
    ) -> Frame:
        required = bool(header.required & self._account.mask)
        frame = Frame(header.seq, header.phase, required, header.accepted_us, records, sizes, indexes)
        self._taken[header.seq] = _Taken(header, frame, damaged)
        self._hint_us = header.accepted_us
        return frame

    # --- settling --------------------------------------------------------------------------------------------------

    def settle(self, frame: Frame, leftovers: Sequence[Leftover] = ()) -> None:
        """See types.Cursor. Raises ValueError for a frame that is not in the consumer's hands."""
        taken = self._taken.pop(frame.seq, None)
        if taken is None:
            raise ValueError(f"frame {frame.seq} is not taken by {self._account.name}")
        header = self._parts.ledger.effective(taken.header)
        account = self._account
        rows: Sequence[LeftoverRow] = ()
        if leftovers or taken.damaged:
            rows = [self._row(header, frame, leftover) for leftover in leftovers]
            rows += [self._damaged_row(header, damaged) for damaged in taken.damaged]
            self._count(rows)
        self._parts.ledger.settle(account, header, rows, delivered=header.n - len(rows), quarantined=len(taken.damaged))
        self._parts.marked()

    def _count(self, rows: Sequence[LeftoverRow]) -> None:
        account = self._account
        for row in rows:
            if row.state == schema.DEFERRED:
                account.deferred += 1
                account.deferred_bytes += row.size
                account.deferred_oldest_us = min(row.accepted_us, account.deferred_oldest_us or row.accepted_us)
                account.next_due_us = min(row.due_us, account.next_due_us or row.due_us)
            elif row.state == schema.DEAD:
                account.dead[row.retry_class] += 1
                account.dead_bytes += row.size

    def _row(self, header: Header, frame: Frame, leftover: Leftover) -> LeftoverRow:
        record = frame.records[leftover.position]
        body = encode(record)
        now = self._parts.now_us()
        return LeftoverRow(
            store=self._account.name,
            state=schema.DEFERRED if leftover.kind == "deferred" else schema.DEAD,
            seq=header.seq,
            idx=frame.indexes[leftover.position],
            log_id=bytes.fromhex(record.log_id.replace("-", "")),
            phase=header.phase,
            owed=header.owed,
            required=header.required,
            accepted_us=header.accepted_us,
            first_us=now,
            last_us=now,
            due_us=self._parts.steady_us(leftover.due_us),
            attempts=leftover.attempts,
            retry_class=leftover.retry_class,
            reason=leftover.reason,
            code=leftover.code,
            size=len(body),
            crc=crc32(body),
            body=body,
        )

    def _damaged_row(self, header: Header, damaged: Damaged) -> LeftoverRow:
        now = self._parts.now_us()
        log_id = header.ids[16 * damaged.idx : 16 * damaged.idx + 16]
        return LeftoverRow(
            store=self._account.name,
            state=schema.QUARANTINED,
            seq=header.seq,
            idx=damaged.idx,
            log_id=log_id,
            phase=header.phase,
            owed=header.owed,
            required=header.required,
            accepted_us=header.accepted_us,
            first_us=now,
            last_us=now,
            due_us=0,
            attempts=0,
            retry_class="quarantined",
            reason="checksum failed",
            code="",
            size=len(damaged.raw),
            crc=0,
            body=None,
        )


def _fetch(connection: sqlite3.Connection, lo: int, hi: int, mask: int, bounds: tuple[int, int]) -> tuple[Found, int]:
    """Headers from lo to hi, bodies of those owed to the mask within the bounds; and up to where all was looked at."""
    found: Found = []
    records = size = taken = 0
    max_records, max_bytes = bounds
    query = f"SELECT {HEADER_COLUMNS} FROM frames WHERE seq BETWEEN ? AND ? ORDER BY seq LIMIT {_HEADERS}"
    # Row by row: the index of a large frame is 20 KB. Closed at the end: a half-read SELECT blocks checkpoints (trap 3)
    with contextlib.closing(connection.execute(query, (lo, hi))) as headers:
        for values in headers:
            header = Header(*values)
            body = None
            if not header.sound:
                found.append((header, None))
                return found, header.seq
            if header.owed & mask or header.flags & UNRESOLVED:
                records += header.n
                size += header.size
                if taken and (records > max_records or size > max_bytes):
                    return found, header.seq - 1
                taken += 1
                (body,) = connection.execute("SELECT body FROM frames WHERE seq = ?", (header.seq,)).fetchone()
            found.append((header, body))
            if records >= max_records:
                return found, header.seq
    return found, (found[-1][0].seq if len(found) == _HEADERS else hi)

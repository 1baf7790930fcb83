"""Release of a best-effort store's oldest backlog, in two steps (semantics, section 2).

Only frames that every required store has settled without a leftover, that the store's own consumer does not hold, and
whose obligation is still best-effort. The line in the gap ledger is committed between the two steps, by the caller.
"""

import sqlite3
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Final

from sidecar.spool import framing
from sidecar.spool.framing import HEADER_COLUMNS, UNRESOLVED, Header
from sidecar.spool.ledger import Account
from sidecar.spool.parts import Parts
from sidecar.spool.types import ReleasePlan

_STEP: Final = 256  # frames looked at in one read
_HOUR_US: Final = 3_600_000_000


class Release:
    """Picks and releases."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def candidates(self, store: str, max_bytes: int) -> ReleasePlan | None:
        """See Spool.release_candidates."""
        account = self._parts.ledger.accounts[store]
        seqs: list[int] = []
        hours: Counter[int] = Counter()
        size = 0
        if not account.weak_records:
            return None
        at = account.strengthened + 1
        self._parts.flush_now()
        while size < max_bytes:
            first = self._next(account, at)
            if first is None:
                break
            headers = await self._parts.read(partial(_headers, lo=first))
            if not headers:
                break
            for raw in headers:
                at = raw.seq + 1
                header = self._may_go(store, raw)
                if header is None:
                    continue
                counted = await self._hours(header)
                if counted is None:
                    continue
                hours += counted
                seqs.append(header.seq)
                size += header.size
                if size >= max_bytes:
                    break
        if not seqs:
            return None
        return ReleasePlan(store, tuple(seqs), dict(hours), hours.total(), size)

    def _next(self, account: Account, seq: int) -> int | None:
        """The first number >= seq that this store has not settled and another has; None: there is none.

        So that the file is not read for a backlog that nobody has confirmed, however long it is.
        """
        others = [other.marks for other in self._parts.ledger.accounts.values() if other is not account]
        while seq <= self._parts.ledger.last_seq:
            mine = account.marks.next_uncovered(seq)
            theirs = [at for at in (marks.next_covered(mine) for marks in others) if at is not None]
            if not theirs:
                return None
            seq = min(theirs)
            if not account.marks.covers(seq):
                return seq if seq <= self._parts.ledger.last_seq else None
        return None

    def _may_go(self, store: str, raw: Header) -> Header | None:
        """The effective header of a frame that may be released now, else None."""
        ledger = self._parts.ledger
        if not raw.sound:
            return None
        header = ledger.effective(raw)
        account = ledger.accounts[store]
        if (
            header.flags & UNRESOLVED
            or not header.owed & ~header.required & account.mask
            or not header.required
            or account.marks.covers(header.seq)
            or self._parts.holds(store, header.seq)
            or ledger.settled(header) & header.required != header.required
            or ledger.excepted.covers(header.seq)
        ):
            return None
        return header

    async def _hours(self, header: Header) -> Counter[int] | None:
        """Records by UTC hour; None where a damaged record cannot be counted."""
        first, last = header.t0 // _HOUR_US, header.t1 // _HOUR_US
        if first == last:
            return Counter({first: header.n})
        body = await self._parts.read(partial(_body, seq=header.seq))
        if body is None:
            return None
        unpacked = framing.unpack(header, body)
        if unpacked.damaged:
            return None
        return Counter(record.log_timestamp // _HOUR_US for record in unpacked.records)

    async def release(self, plan: ReleasePlan) -> int:
        """See Spool.release."""
        ledger = self._parts.ledger
        account = ledger.accounts[plan.store]
        headers = await self._parts.read(partial(_of_seqs, seqs=plan.seqs))
        released = 0
        for raw in headers:
            header = self._may_go(plan.store, raw)
            if header is None:
                continue
            ledger.settle(account, header, delivered=0, released=header.n)
            released += header.n
        if released:
            self._parts.marked()
            self._parts.flush_now()
            await self._parts.write(_nothing, measured=True)  # commits with the marks, or after them
        return released


def _headers(connection: sqlite3.Connection, lo: int) -> list[Header]:
    query = f"SELECT {HEADER_COLUMNS} FROM frames WHERE seq >= ? ORDER BY seq LIMIT {_STEP}"
    return [Header(*values) for values in connection.execute(query, (lo,)).fetchall()]


def _of_seqs(connection: sqlite3.Connection, seqs: Sequence[int]) -> list[Header]:
    query = f"SELECT {HEADER_COLUMNS} FROM frames WHERE seq = ?"
    rows = [connection.execute(query, (seq,)).fetchone() for seq in seqs]
    return [Header(*row) for row in rows if row is not None]


def _body(connection: sqlite3.Connection, seq: int) -> bytes | None:
    row = connection.execute("SELECT body FROM frames WHERE seq = ?", (seq,)).fetchone()
    return None if row is None else row[0]


def _nothing(_: sqlite3.Connection) -> None:
    """The queue's order is what is wanted."""

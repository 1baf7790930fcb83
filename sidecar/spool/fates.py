"""What became of single records: from marks, leftovers and the ids of frames that have left, never from absence."""

import sqlite3
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final, NamedTuple

from sidecar.spool import divergence, framing, schema
from sidecar.spool.framing import HEADER_COLUMNS, UNRESOLVED, Header
from sidecar.spool.parts import Parts
from sidecar.spool.tail import Ring
from sidecar.spool.types import Fate, Receipt, RecordStatus

_SCAN: Final = 2_000  # frames looked through in one read
_STATES: Final[Mapping[int, Fate]] = {
    schema.DEFERRED: "deferred",
    schema.DEAD: "dead_lettered",
    schema.DISCARDED: "discarded",
    schema.QUARANTINED: "quarantined",
}


class _Left(NamedTuple):
    store: str
    state: int
    seq: int
    idx: int
    log_id: bytes
    phase: int
    owed: int
    required: int
    accepted_us: int


_LEFT_COLUMNS: Final = "store, state, seq, idx, log_id, phase, owed, required, accepted_us"


class Fates:
    """Looks records up."""

    def __init__(self, parts: Parts, ring: Ring) -> None:
        self._parts = parts
        self._ring = ring

    async def of_receipt(self, receipt: Receipt, log_ids: Sequence[str]) -> Mapping[str, Mapping[str, Fate]]:
        """See Spool.fates."""
        ledger = self._parts.ledger
        excepted = [seq for seq in receipt.seqs if ledger.excepted.covers(seq)]
        left: list[_Left] = []
        if excepted:
            self._parts.flush_now()
            left = await self._parts.read(partial(_left_of_frames, seqs=excepted))
        states: dict[bytes, dict[str, Fate]] = {}
        for row in left:
            states.setdefault(row.log_id, {})[row.store] = _STATES[row.state]
        owed = receipt.obligation.owed
        if receipt.obligation.unresolved:
            seq = receipt.seqs[0]
            found = next((r for r in ledger.resolutions if r.lo <= seq <= r.hi), None)
            owed = ledger.names(found.owed) if found is not None else frozenset()
        whole = {name: self._of_frames(name, receipt.seqs) for name in owed}
        return {log_id: whole | states.get(_bytes(log_id), {}) for log_id in log_ids}

    def _of_frames(self, store: str, seqs: Sequence[int]) -> Fate:
        account = self._parts.ledger.accounts[store]
        if not all(account.marks.covers(seq) for seq in seqs):
            return "pending"
        return "released" if any(account.released_frames.covers(seq) for seq in seqs) else "delivered"

    async def status(self, log_id: str) -> RecordStatus | None:
        """See Spool.status."""
        try:
            wanted = _bytes(log_id)
        except ValueError:
            return None
        ledger = self._parts.ledger
        self._parts.flush_now()
        found = self._parts.tail.find(wanted) or self._ring.find(wanted) or await self._in_file(wanted)
        left: list[_Left] = []
        if ledger.excepted:
            left = await self._parts.read(partial(_left_of_id, log_id=wanted))
        if found is not None:
            header = ledger.effective(found[0])
            seq, owed, required = header.seq, header.owed, header.required
            accepted_us, phase = header.accepted_us, header.phase
            if header.flags & UNRESOLVED:
                owed = required = 0
        elif left:
            newest = max(left, key=lambda row: row.seq)
            seq, owed, required = newest.seq, newest.owed, newest.required
            accepted_us, phase = newest.accepted_us, newest.phase
        else:
            return None
        stores = {ledger.by_mask[bit].name: self._of_frames(ledger.by_mask[bit].name, [seq]) for bit in _bits(owed)}
        stores |= {row.store: _STATES[row.state] for row in left if row.seq == seq}
        return RecordStatus(log_id.lower(), accepted_us, phase, stores, ledger.names(required))

    async def _in_file(self, wanted: bytes) -> tuple[Header, int] | None:
        """Newest first, in steps, so that commits go on in between."""
        ledger = self._parts.ledger
        lowest = 1 + min((a.marks.first_end for a in ledger.accounts.values()), default=0)
        hi = self._parts.tail.first - 1
        while hi >= lowest:
            lo = max(lowest, hi - _SCAN + 1)
            for header in await self._parts.read(partial(_headers_with, lo=lo, hi=hi, log_id=wanted)):
                index = framing.find(header, wanted) if header.sound else None
                if index is not None:
                    return header, index
            hi = lo - 1
        return None


_bits = divergence.single_bits


def _bytes(log_id: str) -> bytes:
    value = bytes.fromhex(log_id.replace("-", ""))
    if len(value) != 16:  # noqa: PLR2004  (a UUID)
        raise ValueError(log_id)
    return value


def _headers_with(connection: sqlite3.Connection, lo: int, hi: int, log_id: bytes) -> list[Header]:
    query = f"SELECT {HEADER_COLUMNS} FROM frames WHERE seq BETWEEN ? AND ? AND instr(ids, ?) ORDER BY seq DESC"
    return [Header(*values) for values in connection.execute(query, (lo, hi, log_id)).fetchall()]


def _left_of_frames(connection: sqlite3.Connection, seqs: Sequence[int]) -> list[_Left]:
    query = f"SELECT {_LEFT_COLUMNS} FROM leftovers WHERE seq IN ({', '.join('?' * len(seqs))})"
    return [_Left(*values) for values in connection.execute(query, tuple(seqs)).fetchall()]


def _left_of_id(connection: sqlite3.Connection, log_id: bytes) -> list[_Left]:
    query = f"SELECT {_LEFT_COLUMNS} FROM leftovers WHERE log_id = ?"
    return [_Left(*values) for values in connection.execute(query, (log_id,)).fetchall()]

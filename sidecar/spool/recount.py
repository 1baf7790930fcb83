"""Counting what is in the file when it is opened: from the headers alone, in one pass, a few microseconds a frame.

Between two numbers at which some store's account changes (an interval of its marks ends, ``accepted_seq``,
``strengthened``) all frames with one obligation count alike, so they are summed and booked once.
"""

import sqlite3
import struct
from dataclasses import dataclass, field
from typing import Final, NamedTuple
from zlib import crc32

from sidecar.spool import divergence
from sidecar.spool.framing import HEADER_COLUMNS, SMALL, UNRESOLVED, Header
from sidecar.spool.ledger import Ledger

_FLAGS: Final = 4
_CRC: Final = 10
_IDS: Final = 11


@dataclass(slots=True)
class Recount:
    """What the frames of the file add up to; the sums themselves are in the ledger."""

    settled: list[tuple[int, int]] = field(default_factory=list)  # by all, not yet deleted (trap 4)
    unsound: list[int] = field(default_factory=list)  # the header's checksum fails
    oldest_us: dict[str, int | None] = field(default_factory=dict)  # of what is pending, by store

    def _done(self, seq: int) -> None:
        if self.settled and self.settled[-1][1] == seq - 1:
            self.settled[-1] = (self.settled[-1][0], seq)
        else:
            self.settled.append((seq, seq))


class _Stretch(NamedTuple):
    """Up to ``end`` every store's account treats frames alike."""

    end: int
    covered: int  # mask of stores whose marks cover the stretch
    fresh: int  # mask of stores that have not counted these frames as accepted
    strong: int  # mask of stores to which best-effort obligations became required


def recount(connection: sqlite3.Connection, ledger: Ledger) -> Recount:
    """Book every frame of the file in the ledger."""
    count = Recount()
    stretch = _Stretch(-1, 0, 0, 0)
    sums: dict[tuple[int, int], list[int]] = {}  # (owed, required): records, bytes
    pack = SMALL.pack
    for row in connection.execute(f"SELECT {HEADER_COLUMNS} FROM frames ORDER BY seq"):
        seq, _, owed, required, flags, n, size = row[:7]
        ids = row[_IDS]
        try:
            sound = crc32(ids, crc32(pack(*row[:10]))) == row[_CRC] and len(ids) == 20 * n
        except (struct.error, TypeError):  # damage made a column NULL, text or out of range
            sound = False
        if not sound:
            count.unsound.append(seq)
            continue
        if flags:
            header = ledger.effective(Header(*row))
            if header.flags & UNRESOLVED:
                ledger.accepted(header)
                continue
            owed, required = header.owed, header.required
        if seq > stretch.end:
            _book(ledger, stretch, sums)
            stretch = _stretch(ledger, seq)
        known = sums.get((owed, required))
        if known is None:
            sums[owed, required] = [n, size]
            for bit in divergence.single_bits(owed & ~stretch.covered):
                count.oldest_us.setdefault(ledger.by_mask[bit].name, row[7])
        else:
            known[0] += n
            known[1] += size
        if not owed & ~stretch.covered:
            count._done(seq)  # noqa: SLF001  (its own module)
    _book(ledger, stretch, sums)
    return count


def _stretch(ledger: Ledger, seq: int) -> _Stretch:
    ends = []
    covered = fresh = strong = 0
    for account in ledger.accounts.values():
        if account.marks.covers(seq):
            covered |= account.mask
            ends.append(account.marks.next_uncovered(seq) - 1)
        else:
            following = account.marks.next_covered(seq)
            ends += [following - 1] if following is not None else []
        fresh |= account.mask if seq > account.accepted_seq else 0
        strong |= account.mask if seq <= account.strengthened else 0
        ends += [last for last in (account.accepted_seq, account.strengthened) if last >= seq]
    return _Stretch(min(ends, default=1 << 62), covered, fresh, strong)


def _book(ledger: Ledger, stretch: _Stretch, sums: dict[tuple[int, int], list[int]]) -> None:
    for (owed, required), (records, size) in sums.items():
        strong = required | owed & stretch.strong
        ledger.found(owed, strong, owed & stretch.covered, stretch.fresh, (records, size))
    sums.clear()

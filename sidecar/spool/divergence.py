"""How many records one owed store has confirmed and another has not, without ever scanning.

Per frame: where A has settled a frame that B still owes, all its records count for (A, B). Leftovers correct that per
record: of a record with a leftover for A, A has nothing, whatever the frame says. The corrections of one record follow
from three masks (owed, settled, missing); they are kept up to date by differences, in the transaction of the change,
and found again at a start from the leftovers in the file. What is closed for ever (released, discarded) moves to the
table ``differences``.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

Pair = tuple[int, int]  # masks of one store each: (present in, missing from)


def single_bits(mask: int) -> Iterator[int]:
    """The powers of two in a mask, lowest first."""
    while mask:
        low = mask & -mask
        yield low
        mask ^= low


def corrections(owed: int, settled: int, missing: int) -> Iterator[tuple[Pair, int]]:
    """What one record with leftovers changes in the per-frame counts.

    ``missing`` is the mask of stores that have a leftover (deferred, dead, discarded, ...) of this record.
    """
    for a in single_bits(owed & settled):
        for b in single_bits(owed & ~a):
            if not settled & b:
                if missing & a:
                    yield (a, b), -1
            elif missing & b and not missing & a:
                yield (a, b), 1


def total(records: Iterable[tuple[int, int, int]]) -> Counter[Pair]:
    """The corrections of several records, each (owed, settled, missing)."""
    out: Counter[Pair] = Counter()
    for owed, settled, missing in records:
        for pair, change in corrections(owed, settled, missing):
            out[pair] += change
    return out

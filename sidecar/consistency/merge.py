"""Two ordered scans side by side: what one has and the other has not, in bounded memory.

Both scans ascend by (log_timestamp, log_id), so one entry of each in hand decides: equal keys are compared by digest
and by the service that shows them, the smaller key is missing on the other side. Counts are kept by UTC day. Nothing
is concluded here: the scans read at different moments, and an index may lag; what comes out are candidates.

A scan that fails raises StoreError from ``advance``; nothing of what was read then is called compared.
"""

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from sidecar.consistency.types import Candidate
from sidecar.stores.base import ScanEntry
from sidecar.verdicts import DAY_US


@dataclass(slots=True)
class Tally:
    """What was counted of one UTC day."""

    sql: int = 0
    dynamo: int = 0
    matched: int = 0
    reasons: Counter[str] = field(default_factory=Counter)


class Merge:
    """Walks both scans once; ``advance`` until ``done``."""

    def __init__(
        self, sql: AsyncIterator[ScanEntry], dynamo: AsyncIterator[ScanEntry], tallies: dict[int, Tally]
    ) -> None:
        """``tallies``: day -> counts, added to as the walk goes on."""
        self._sql = sql
        self._dynamo = dynamo
        self._tallies = tallies
        self._left: ScanEntry | None = None
        self._right: ScanEntry | None = None
        self._begun = False
        self.compared = 0  # entries of either store

    @property
    def done(self) -> bool:
        """Whether both scans have ended."""
        return self._begun and self._left is None and self._right is None

    @property
    def position_us(self) -> int | None:
        """The smallest time that was not compared yet; None at the end, and before the first step."""
        times = [head.log_timestamp for head in (self._left, self._right) if head is not None]
        return min(times) if times else None

    async def advance(self, entries: int) -> list[Candidate]:
        """Compare about ``entries`` more, to the end of an instant: all before ``position_us`` is compared then."""
        if not self._begun:
            self._left = await anext(self._sql, None)
            self._right = await anext(self._dynamo, None)
            self._begun = True
        left, right = self._left, self._right
        found: list[Candidate] = []
        taken, last = 0, None
        day, tally = -(10**9), Tally()
        while left is not None or right is not None:
            if left is not None and (right is None or left[:2] <= right[:2]):
                time, log_id = left[:2]
            else:
                assert right is not None  # noqa: S101  (one of them is not None; the type checker cannot see which)
                time, log_id = right[:2]
            if taken >= entries and time != last:
                break
            last = time
            if time // DAY_US != day:
                day = time // DAY_US
                tally = self._tallies.setdefault(day, Tally())
            a = left if left is not None and left[1] == log_id and left[0] == time else None
            b = right if right is not None and right[1] == log_id and right[0] == time else None
            if a is not None:
                tally.sql += 1
                taken += 1
                left = await anext(self._sql, None)
            if b is not None:
                tally.dynamo += 1
                taken += 1
                right = await anext(self._dynamo, None)
            if a is not None and b is not None and a[2] == b[2] and a[3] == b[3]:
                tally.matched += 1
            else:
                found.append(Candidate(time, log_id, a and a[2], b and b[2]))
        self._left, self._right = left, right
        self.compared += taken
        return found

    async def close(self) -> None:
        """End both scans where they are."""
        for scan in (self._sql, self._dynamo):
            close = getattr(scan, "aclose", None)
            if close is not None:
                await close()

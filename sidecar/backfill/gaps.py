"""The gap ledger as backfill sees it: which hours a store lacks records of, and closing what was filled.

A line is closed up to what was seen of it *before* the hour was validated (``GapLine``: both counts only grow), in each
ledger that showed it: what is opened meanwhile stays open.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import msgspec

from sidecar.gaps import GapLedger, GapLine, summed
from sidecar.phase import StoreName


class Gaps:
    """The open lines of one store, as both ledgers show them now.

    Args:
        ledgers: by the store that keeps them.
        store: which lacks the records.
    """

    def __init__(self, ledgers: Mapping[StoreName, GapLedger], store: StoreName) -> None:
        self._ledgers = ledgers
        self._store = store
        self._seen: dict[StoreName, dict[int, list[GapLine]]] = {}

    async def read(self) -> None:
        """Look anew. Raises StoreError: a ledger that cannot be read may show more."""
        seen: dict[StoreName, dict[int, list[GapLine]]] = {}
        for name, ledger in self._ledgers.items():
            by_hour: dict[int, list[GapLine]] = defaultdict(list)
            for line in await ledger.gaps():
                if line.store == self._store:
                    by_hour[line.hour].append(line)
            seen[name] = by_hour
        self._seen = seen

    @property
    def hours(self) -> Collection[int]:
        """Hours with an open line."""
        return {hour for by_hour in self._seen.values() for hour in by_hour}

    def records(self, hour: int) -> int:
        """Records that the lines of an hour say are missing."""
        lines = [line for by_hour in self._seen.values() for line in by_hour.get(hour, ())]
        return sum(line.open for line in summed(lines))

    async def close(self, hours: Sequence[int]) -> int:
        """Close the lines of hours that were found clean; how many records they counted. Raises StoreError."""
        number = sum(self.records(hour) for hour in hours)
        for name, by_hour in self._seen.items():
            lines = [
                msgspec.structs.replace(line, closed=line.opened) for hour in hours for line in by_hour.pop(hour, ())
            ]
            if lines:
                await self._ledgers[name].put_gaps(lines)
        return number

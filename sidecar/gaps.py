"""The gap ledger: which records a store was never given, by UTC hour, kept in the stores and not in the pod.

A **gap** is (store, kind, UTC hour of log_timestamp, count) (semantics, section 2). It is opened before the records are
given up or left out, and closed by backfill and a clean validation of its hour. The ledger may say too much for a
while, never too little: a step of the migration that trusts it waits too long rather than not at all.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from sidecar.phase import StoreName

GapKind = Literal["history", "not_owed", "released"]


class GapLine(msgspec.Struct, frozen=True, kw_only=True):
    """Records of one UTC hour that ``store`` was not given, as ``source`` counts them (semantics, section 2).

    Both counts only grow and lines merge by the larger one, so writing a line twice changes nothing, and closing what
    was seen never hides what was opened meanwhile.
    """

    store: StoreName
    kind: GapKind
    hour: int  # of log_timestamp: hours since the epoch
    source: str  # who counts: an instance, alone or with what makes its count unique; "fleet" for what belongs to none
    opened: int
    closed: int = 0

    @property
    def key(self) -> tuple[StoreName, GapKind, int, str]:
        """Identity of the line."""
        return self.store, self.kind, self.hour, self.source

    @property
    def open(self) -> int:
        """Records still missing."""
        return max(0, self.opened - self.closed)

    def merge(self, other: "GapLine") -> "GapLine":
        """The line that knows what both know."""
        return msgspec.structs.replace(
            self, opened=max(self.opened, other.opened), closed=max(self.closed, other.closed)
        )


class GapLedger(Protocol):
    """The ledger in one store. Every method raises ``StoreError`` and nothing else, within the store's timeouts.

    ``sidecar.fleet.FleetStore`` has these two methods too. A write that failed may have been done: repeat it.
    """

    async def put_gaps(self, lines: Sequence[GapLine]) -> None:
        """Merge lines (``GapLine.merge``), each atomically; durable when it returns; the same line twice is one."""
        ...

    async def gaps(self) -> Sequence[GapLine]:
        """Every line that is still open; sees every write that was answered before."""
        ...


class KeepsGaps(Protocol):
    """A store that keeps a ledger beside its records."""

    @property
    def gap_ledger(self) -> GapLedger:
        """The ledger; the store's ``create`` makes it."""
        ...


def summed(lines: Sequence[GapLine]) -> list[GapLine]:
    """One line for each (store, kind, hour, source) of several ledgers' lines."""
    merged: dict[object, GapLine] = {}
    for line in lines:
        known = merged.get(line.key)
        merged[line.key] = line if known is None else known.merge(line)
    return list(merged.values())

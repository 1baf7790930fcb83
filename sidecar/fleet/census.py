"""Who is alive, as one observer sees it: by its own monotonic clock and by nothing that another machine's clock says.

Invariant (the other half of the fence): a process is called ``gone`` only if both stores answered, and still showed the
heartbeat that this observer first saw at least the process's own ``fence_after`` plus a margin earlier. The time is
taken *before* the stores are read; so at that time the process's fence had fallen, and if it has come back since, it
announced itself after these reads and reads its record after that. The margin covers two clocks that run at
different speeds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sidecar.fleet.protocol import Claim
from sidecar.fleet_tables import Heartbeat
from sidecar.phase import STORES, StoreName

MARGIN: Final = 0.25  # of fence_after: covers clocks that differ by a quarter; real ones differ by 0.05 %
MISSED: Final = 3  # heartbeats after which a process is called silent
FORGET: Final = 3600.0  # seconds after which the row of a process that is gone or drained is deleted


class Presence(StrEnum):
    """What an observer calls a process."""

    LIVE = "live"
    SILENT = "silent"  # some heartbeats missed; it counts
    GONE = "gone"  # silent for so long that it has fenced itself; it does not count
    DRAINED = "drained"  # it said that it stopped; it does not count


@dataclass(frozen=True, slots=True)
class Member:
    """One process with its newest heartbeat from either store."""

    heartbeat: Heartbeat
    presence: Presence
    unchanged_s: float  # since this observer first saw this heartbeat

    @property
    def counts(self) -> bool:
        """True while it may be working."""
        return self.presence in (Presence.LIVE, Presence.SILENT)

    @property
    def claim(self) -> Claim:
        """What the protocol needs to know of it."""
        return Claim(self.heartbeat.instance, self.heartbeat.epoch, self.counts)


class Census:
    """What one process has observed. One per process; not shared."""

    def __init__(self) -> None:
        self._first_seen: dict[tuple[str, str], tuple[int, float]] = {}
        self._complete = False
        self.members: Sequence[Member] = ()

    @property
    def complete(self) -> bool:
        """True if both stores answered in the last observation."""
        return self._complete

    def observe(
        self, rows: Mapping[StoreName, Sequence[Heartbeat]], *, asked_at: float, answered_at: float
    ) -> Sequence[Member]:
        """Take in what the stores that answered hold; monotonic seconds before the question and after the answers."""
        self._complete = all(store in rows for store in STORES)
        newest = _newest(row for held in rows.values() for row in held)
        if self._complete:
            self._first_seen = {key: seen for key, seen in self._first_seen.items() if key in newest}
        self.members = tuple(
            self._classify(row, asked_at, answered_at) for row in sorted(newest.values(), key=lambda row: row.key)
        )
        return self.members

    def forgettable(self) -> Sequence[Member]:
        """Processes whose rows may be deleted: they no longer count and have not changed for ``FORGET``."""
        return [m for m in self.members if self._complete and not m.counts and m.unchanged_s >= FORGET]

    def _classify(self, row: Heartbeat, asked_at: float, answered_at: float) -> Member:
        known = self._first_seen.get(row.key)
        if known is None or known[0] < row.seq:
            known = self._first_seen[row.key] = (row.seq, answered_at)
        unchanged = max(0.0, asked_at - known[1])
        if row.state == "drained":
            presence = Presence.DRAINED
        elif self._complete and row.seq == known[0] and unchanged >= row.fence_after_s * (1 + MARGIN):
            presence = Presence.GONE
        elif unchanged >= row.interval_s * MISSED:
            presence = Presence.SILENT
        else:
            presence = Presence.LIVE
        return Member(row, presence, unchanged)


def _newest(rows: Iterable[Heartbeat]) -> dict[tuple[str, str], Heartbeat]:
    newest: dict[tuple[str, str], Heartbeat] = {}
    for row in rows:
        known = newest.get(row.key)
        if known is None or known.seq < row.seq:
            newest[row.key] = row
    return newest

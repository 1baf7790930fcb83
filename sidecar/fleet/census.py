"""Who is alive, as one observer sees it: by its own monotonic clock and by nothing that another machine's clock says.

Invariant (the other half of the fence): a process is called ``gone`` only if both stores answered, and still showed the
heartbeat that this observer first saw at least the process's own ``fence_after`` plus a margin earlier. The time is
taken *before* the stores are read; so at that time the process's fence had fallen, and if it has come back since, it
announced itself after these reads and reads its record after that. The margin covers two clocks that run at
different speeds.

ONE NAME, SEVERAL PROCESSES. A process whose spool another one has gone on with is history (:func:`current`): the
spool's lock lets one at a time in. Under one name with different spools each speaks for itself, whether a volume was
lost or two pods were given one ``instance``: no gate overlooks what either of them has. Two that share a name are told
(:func:`shared_names`): each was heard after the other was known, as no process is that is dead.
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
    known_s: float = 0.0  # since it first saw any of this process

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
        self._known_since: dict[tuple[str, str], float] = {}
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
            self._known_since = {key: since for key, since in self._known_since.items() if key in newest}
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
        since = self._known_since.setdefault(row.key, answered_at)
        return Member(row, presence, unchanged, max(0.0, asked_at - since))


def current(members: Sequence[Member]) -> Sequence[Member]:
    """Without those whose spool another process of their name has gone on with."""
    return [
        each
        for same in _by_instance(members).values()
        for each in same
        if len(same) == 1 or not any(_goes_on(other, each) for other in same)
    ]


def shared_names(members: Sequence[Member]) -> Sequence[str]:
    """Names under which more than one process is at work, sorted."""
    return sorted(
        name
        for name, same in _by_instance(members).items()
        if any(_at_once(a, b) for at, a in enumerate(same) for b in same[at + 1 :])
    )


def _by_instance(members: Sequence[Member]) -> dict[str, list[Member]]:
    found: dict[str, list[Member]] = {}
    for member in members:
        found.setdefault(member.heartbeat.instance, []).append(member)
    return found


def _at_once(a: Member, b: Member) -> bool:
    live = a.presence is Presence.LIVE and b.presence is Presence.LIVE
    return live and a.unchanged_s < b.known_s and b.unchanged_s < a.known_s


def _goes_on(new: Member, old: Member) -> bool:
    """Whether ``new`` has the spool that ``old`` had, as far as their heartbeats say which."""
    spools = {new.heartbeat.spool, old.heartbeat.spool}
    later = (new.counts, -new.unchanged_s, new.heartbeat.key) > (old.counts, -old.unchanged_s, old.heartbeat.key)
    return later and (len(spools) == 1 or "" in spools) and not _at_once(new, old)


def _newest(rows: Iterable[Heartbeat]) -> dict[tuple[str, str], Heartbeat]:
    newest: dict[tuple[str, str], Heartbeat] = {}
    for row in rows:
        known = newest.get(row.key)
        if known is None or known.seq < row.seq:
            newest[row.key] = row
    return newest

"""Leases in a store that has no clock: expiry by watching, pure (time in monotonic seconds passed in).

A holder changes ``seq`` with every renewal. Whoever has seen the same (holder, seq) for the lease's whole time on its
own monotonic clock may try to take it, by a compare-and-set on that same (holder, seq). Wall clocks play no part.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """As it is stored."""

    holder: str
    seq: int
    ttl_s: float


class LeaseWatch:
    """What one process has seen of others' leases."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Lease, float]] = {}

    def may_take(self, name: str, lease: Lease | None, holder: str, now: float) -> bool:
        """True if ``holder`` may replace ``lease`` (as just read, None: there is none) at time ``now``."""
        if lease is None or lease.holder == holder:
            self._seen.pop(name, None)
            return True
        known = self._seen.get(name)
        if known is None or known[0] != lease:
            self._seen[name] = (lease, now)
            return False
        return now - known[1] >= lease.ttl_s

"""The port through which one store keeps the fleet's tables; one contract test defines it (``tests/fleet``).

Every method raises ``StoreError`` and nothing else, and ends within the store's own timeouts: a store that does not
answer must not hold up the other one. Reads see every write that was answered before they began (PostgreSQL: the
primary; DynamoDB: ``ConsistentRead``): the protocol's safety rests on it. A write that failed may have been done.
"""

from collections.abc import Sequence
from typing import Protocol

from sidecar.fleet.types import AuditEntry, FleetRecord, GapLine, Heartbeat
from sidecar.phase import StoreName


class FleetStore(Protocol):
    """The fleet's record, heartbeats, leases, audit trail and gap ledger in one store."""

    @property
    def name(self) -> StoreName:
        """Which store of the phase table this is."""
        ...

    async def read_record(self) -> FleetRecord | None:
        """This store's copy; None means that the store answered and has none (the table may not exist yet)."""
        ...

    async def cas_record(self, expected: FleetRecord | None, new: FleetRecord) -> bool:
        """Replace the copy if its epoch and revision are those of ``expected`` (None: if there is none), atomically.

        False means that the copy is another one and nothing was written.
        """
        ...

    async def put_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Keep the row of (instance, incarnation); a row with the same or a higher ``seq`` is left as it is."""
        ...

    async def heartbeats(self) -> Sequence[Heartbeat]:
        """All rows of this store, in any order."""
        ...

    async def drop_heartbeat(self, key: tuple[str, str], seq: int) -> None:
        """Delete the row of (instance, incarnation) if its ``seq`` is still this one."""
        ...

    async def acquire_lease(self, name: str, holder: str, ttl_s: float) -> bool:
        """Take or renew a lease for ``ttl_s`` seconds; False while another holds it. No safety rests on it.

        Expiry is judged by one clock: the store's own (PostgreSQL), or the caller's monotonic clock on a lease that it
        has seen unchanged for ``ttl_s`` (DynamoDB: :class:`sidecar.fleet.lease.LeaseWatch`); never by a time that
        another machine wrote.
        """
        ...

    async def release_lease(self, name: str, holder: str) -> None:
        """Give the lease back if ``holder`` has it, so that the next one need not wait."""
        ...

    async def append_audit(self, entry: AuditEntry) -> None:
        """Add a line to the trail; the same (id, outcome) twice is one line. Nothing is ever changed or removed."""
        ...

    async def audits(self, limit: int) -> Sequence[AuditEntry]:
        """The last ``limit`` lines, newest first."""
        ...

    async def put_gaps(self, lines: Sequence[GapLine]) -> None:
        """Merge lines into the ledger (``GapLine.merge``), each atomically; the same line twice is one."""
        ...

    async def gaps(self) -> Sequence[GapLine]:
        """Every line that is still open (``opened`` above ``closed``)."""
        ...

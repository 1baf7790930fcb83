"""The fleet's tables in memory: the reference that the contract test compares other stores with. Not durable."""

from collections.abc import Sequence

from sidecar.clock import Clock
from sidecar.fleet.protocol import rank
from sidecar.fleet_tables import AuditEntry, FateLine, FleetRecord, Heartbeat
from sidecar.gaps import GapLine
from sidecar.phase import StoreName


class MemoryFleetStore:
    """Implements :class:`sidecar.fleet_tables.FleetStore`; every call is atomic because it never awaits."""

    def __init__(self, name: StoreName, clock: Clock) -> None:
        self._name: StoreName = name
        self._clock = clock
        self._record: FleetRecord | None = None
        self._heartbeats: dict[tuple[str, str], Heartbeat] = {}
        self._leases: dict[str, tuple[str, float]] = {}  # holder, expiry by this store's monotonic clock
        self._audits: dict[tuple[str, str], AuditEntry] = {}
        self._gaps: dict[object, GapLine] = {}
        self._fates: dict[object, FateLine] = {}

    @property
    def name(self) -> StoreName:
        """Return the name given."""
        return self._name

    async def read_record(self) -> FleetRecord | None:
        """Return the copy."""
        return self._record

    async def cas_record(self, expected: FleetRecord | None, new: FleetRecord) -> bool:
        """Compare by (epoch, revision)."""
        if rank(self._record) != rank(expected):
            return False
        self._record = new
        return True

    async def put_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Keep the row with the higher ``seq``."""
        known = self._heartbeats.get(heartbeat.key)
        if known is None or known.seq < heartbeat.seq:
            self._heartbeats[heartbeat.key] = heartbeat

    async def heartbeats(self) -> Sequence[Heartbeat]:
        """Return all rows."""
        return list(self._heartbeats.values())

    async def drop_heartbeat(self, key: tuple[str, str], seq: int) -> None:
        """Delete the row if it is still that one."""
        known = self._heartbeats.get(key)
        if known is not None and known.seq == seq:
            del self._heartbeats[key]

    async def acquire_lease(self, name: str, holder: str, ttl_s: float) -> bool:
        """Judge expiry by the clock given."""
        now = self._clock.monotonic()
        held = self._leases.get(name)
        if held is not None and held[0] != holder and now < held[1]:
            return False
        self._leases[name] = (holder, now + ttl_s)
        return True

    async def release_lease(self, name: str, holder: str) -> None:
        """Delete the lease if ``holder`` has it."""
        held = self._leases.get(name)
        if held is not None and held[0] == holder:
            del self._leases[name]

    async def leader(self, lease: str) -> Heartbeat | None:
        """Judge expiry by the clock given."""
        holder, until = self._leases.get(lease, ("", 0.0))
        instance, _, incarnation = holder.rpartition("/")
        return self._heartbeats.get((instance, incarnation)) if self._clock.monotonic() < until else None

    async def append_audit(self, entry: AuditEntry) -> None:
        """Keep the first line of each (id, outcome)."""
        self._audits.setdefault((entry.id, entry.outcome), entry)

    async def audits(self, limit: int) -> Sequence[AuditEntry]:
        """Return the newest first."""
        return list(self._audits.values())[::-1][:limit]

    async def put_gaps(self, lines: Sequence[GapLine]) -> None:
        """Merge line by line."""
        for line in lines:
            known = self._gaps.get(line.key)
            self._gaps[line.key] = line if known is None else known.merge(line)

    async def gaps(self) -> Sequence[GapLine]:
        """Return the open ones."""
        return [line for line in self._gaps.values() if line.open]

    async def put_fates(self, lines: Sequence[FateLine]) -> None:
        """Keep the line with the higher ``revision``."""
        for line in lines:
            known = self._fates.get(line.key)
            if known is None or known.revision < line.revision:
                self._fates[line.key] = line

    async def fates(self, log_ids: Sequence[str]) -> Sequence[FateLine]:
        """Return the lines of these ids."""
        wanted = frozenset(log_ids)
        return [line for line in self._fates.values() if line.log_id in wanted]

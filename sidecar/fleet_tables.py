"""What the fleet keeps in the stores: frozen values, and the port through which one store keeps them.

Below the stores in the layers, as the gap ledger is (``sidecar.gaps``), so that each store implements the port itself
and ``sidecar.fleet`` knows no store. One contract test defines it for all: ``tests/fleet/test_store_contract.py``.

VALUES. Stored as they are: msgspec encodes each to JSON, and a field that a newer version added is skipped when it is
read. All ``*_us`` are wall-clock microseconds for people to read; no decision is taken from them (P11).

PORT. Every method raises ``StoreError`` and nothing else, and ends within the store's own timeouts: a store that does
not answer must not hold up the other one. Reads see every write that was answered before they began (PostgreSQL: the
primary; DynamoDB: ``ConsistentRead``): the protocol's safety rests on it. A write that failed may have been done; each
may be repeated: a compare-and-set then says False, and the next read shows whose record it is.
"""

from collections.abc import Sequence
from typing import Final, Literal, Protocol

import msgspec

from sidecar.gaps import GapKind, GapLedger
from sidecar.phase import Phase, StoreName

NO_EPOCH: Final = 0
"""The epoch of an instance that has applied no record; the first record has epoch 1."""


class FleetRecord(msgspec.Struct, frozen=True):
    """The phase that the whole fleet follows. Two copies exist, one in each store.

    ``epoch`` grows by one with every change of (phase, preparing): what instances must apply. ``revision`` grows by one
    with every write, so that a compare-and-set never loses a write that left the epoch alone. ``preparing`` announces
    the phase that comes next: what it requires is required from now on, and its backlog is no longer released.
    ``settled`` says that both copies reached this epoch and that every instance that counts has applied it: once true
    it stays true, so that the next step can be taken while one store is down.

    ``desired``, ``phase_epoch`` and ``force`` are the wish that was accepted last (configuration or API).
    """

    epoch: int
    phase: Phase
    by: str  # instance or token name
    why: str
    at_us: int
    revision: int = 0
    preparing: Phase | None = None
    settled: bool = False
    desired: Phase | None = None  # None: nothing was ever wished beyond the phase at creation
    phase_epoch: int = 0  # of the configuration that the wish came from; 0: none was stated
    force: str | None = None  # reason given for overriding red gates, while the wish is not reached


class Hold(msgspec.Struct, frozen=True):
    """Why the fleet is not where it is wished; ``since_us``: since when, as the controller that found it saw it."""

    gate: str
    observed: str
    required: str
    since_us: int = 0


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """What one process says of itself, one row per (instance, incarnation) and store; the highest ``seq`` is the truth.

    ``epoch`` is the highest epoch that this process has *wholly* applied: nothing that it began under an earlier one is
    still under way. It never falls within an incarnation.
    """

    instance: str
    incarnation: str  # drawn at process start: a restarted process is another one
    spool: str = ""  # which one it works on: one at a time has it; "": an earlier version does not say
    seq: int
    state: Literal["running", "drained"] = "running"
    epoch: int = NO_EPOCH
    phase: Phase | None = None
    fenced: bool = True
    fence_after_s: float = 120.0  # its own: an observer waits for the one that is observed
    interval_s: float = 10.0
    version: str = ""
    desired: Phase | None = None
    phase_epoch: int | None = None
    force: str | None = None
    pending: dict[StoreName, int] = {}
    oldest_pending_us: dict[StoreName, int] = {}
    dead_letters: dict[StoreName, int] = {}
    open_gaps: dict[StoreName, int] = {}
    shadow: dict[str, int] = {}  # shadow reads since the process started: ``compared``, ``unexplained``
    holds: tuple[Hold, ...] | None = None  # of who leads, for the others to show; None: this one does not
    gaps: tuple[tuple[StoreName, GapKind, int], ...] = ()  # likewise: records of open gaps, as it read the ledgers last
    at_us: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """Identity of the row: (instance, incarnation)."""
        return self.instance, self.incarnation


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Who changed what, why, when and on what evidence. Written before the change, and again with its outcome."""

    id: str  # the same for both lines of one change; appending one (id, outcome) twice keeps one
    outcome: Literal["intended", "done", "lost", "refused"]
    action: str  # "create", "prepare", "step", "abandon", "wish", ...
    by: str
    why: str
    at_us: int
    epoch: int  # that the change creates, or at which it was refused
    from_phase: Phase | None = None
    to_phase: Phase | None = None
    forced: bool = False
    evidence: tuple[dict[str, str], ...] = ()  # gate, observed, required, since


FateState = Literal["dead_lettered", "discarded", "redriven"]


class FateLine(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one record that a store refused, as one instance's spool has it; no payload, no reason's text.

    A mirror for whoever compares the stores: a record that is missing in ``store`` and has a line here is explained.
    Lines of one (log_id, store, by) replace each other, the highest ``revision`` wins; two instances that were given
    the same record have a line each.
    """

    log_id: str  # canonical text of a UUID
    store: StoreName  # that has not got the record
    state: FateState  # redriven: given to the store again; what comes of it is a new line, or nothing
    retry_class: str  # of the refusal, e.g. ``permanent``
    by: str  # the instance whose spool has the record
    at_us: int  # when, by its wall clock
    revision: int  # as ``by`` counts: grows with each change of this line

    @property
    def key(self) -> tuple[str, StoreName, str]:
        """Identity of the line: (log_id, store, by)."""
        return self.log_id, self.store, self.by


class FleetStore(GapLedger, Protocol):
    """The fleet's record, heartbeats, leases, audit trail, gap ledger and fates in one store."""

    @property
    def name(self) -> StoreName:
        """Which store of the phase table this is."""
        ...

    async def read_record(self) -> FleetRecord | None:
        """This store's copy; None means that the store answered and has none (the table may not exist yet).

        Every other method fails where its table does not exist: a store that lost its heartbeats is not one in which
        nobody is alive.
        """
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
        has seen unchanged for ``ttl_s`` (DynamoDB: :class:`sidecar.stores.lease.LeaseWatch`); never by a time that
        another machine wrote.
        """
        ...

    async def release_lease(self, name: str, holder: str) -> None:
        """Give the lease back if ``holder`` has it, so that the next one need not wait."""
        ...

    async def leader(self, lease: str) -> Heartbeat | None:
        """The heartbeat of the process that holds a lease as ``instance/incarnation``; None: nobody, or not known.

        For people to read: it may be that of a moment ago.
        """
        ...

    async def append_audit(self, entry: AuditEntry) -> None:
        """Add a line to the trail; the same (id, outcome) twice is one line. Nothing is ever changed or removed."""
        ...

    async def audits(self, limit: int) -> Sequence[AuditEntry]:
        """The last ``limit`` lines, newest first."""
        ...

    async def put_fates(self, lines: Sequence[FateLine]) -> None:
        """Keep each line unless one of the same key has its ``revision`` or a higher one; each atomically."""
        ...

    async def fates(self, log_ids: Sequence[str]) -> Sequence[FateLine]:
        """Every line of these records, in any order; ids that nothing is known of are left out."""
        ...


class KeepsFleet(Protocol):
    """A store that keeps the fleet's tables beside its records."""

    @property
    def fleet(self) -> FleetStore:
        """The tables; the store's ``create`` makes them."""
        ...

"""What the fleet's tables hold: frozen values, stored as they are (msgspec encodes each to JSON).

All ``*_us`` are wall-clock microseconds for people to read; no decision is taken from them (P11).
"""

from typing import Final, Literal

import msgspec

from sidecar.gaps import GapKind, GapLine
from sidecar.phase import Phase, StoreName

__all__ = ["NO_EPOCH", "AuditEntry", "FleetRecord", "GapKind", "GapLine", "Heartbeat"]

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


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """What one process says of itself, one row per (instance, incarnation) and store; the highest ``seq`` is the truth.

    ``epoch`` is the highest epoch that this process has *wholly* applied: nothing that it began under an earlier one is
    still under way. It never falls within an incarnation.
    """

    instance: str
    incarnation: str  # drawn at process start: a restarted process is another one
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

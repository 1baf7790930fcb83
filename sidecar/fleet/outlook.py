"""What a look at the fleet found: evidence of gates, and the outlook that ``/status``, metrics and the trail show."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sidecar.fleet.census import Member
from sidecar.fleet_tables import FleetRecord, Heartbeat, Hold
from sidecar.phase import Phase

Evidences = tuple[dict[str, str], ...]
"""Gates with what they found, as the trail keeps them."""


class Evidence(Protocol):
    """What one gate found; any object with these attributes."""

    @property
    def gate(self) -> str:
        """Its name."""
        ...

    @property
    def ok(self) -> bool:
        """True: it does not stop the step."""
        ...

    @property
    def observed(self) -> str:
        """What was seen, for people."""
        ...

    @property
    def required(self) -> str:
        """What must be seen."""
        ...


class StepGate(Protocol):
    """A condition of some steps. ``evaluate`` may raise SidecarError: that is red, with the error as observed."""

    @property
    def name(self) -> str:
        """As it is reported, e.g. ``no_open_gap``."""
        ...

    @property
    def steps(self) -> frozenset[tuple[Phase, Phase]]:
        """The steps (from, to) that it guards."""
        ...

    async def evaluate(self) -> Evidence:
        """Look now."""
        ...


@dataclass(frozen=True, slots=True)
class Finding:
    """One gate's evidence as it is kept and shown."""

    gate: str
    ok: bool
    observed: str
    required: str
    since_us: int  # wall clock: since when it is like this, as this controller saw it


@dataclass(frozen=True, slots=True)
class Outlook:
    """What the last tick found: for ``/status``, metrics, and one log line per change of reason."""

    record: FleetRecord | None = None
    leads: bool = False
    holds: tuple[Hold, ...] = ()
    findings: tuple[Finding, ...] = ()  # gates of the step that is due
    members: Sequence[Member] = ()
    leader: Heartbeat | None = None  # who leads, where that is another one, as it tells
    shared_names: tuple[str, ...] = ()  # that more than one process bears, as who leads sees them
    done: tuple[str, ...] = ()  # changes made by this tick, e.g. "step to dual_write"

    @property
    def told(self) -> tuple[Hold, ...]:
        """What holds the fleet: as found here, or else as who leads tells."""
        return self.holds or (() if self.leader is None else self.leader.holds or ())

    @property
    def desired(self) -> Phase | None:
        """The phase that the fleet was told to reach, None before there is a record."""
        return None if self.record is None else self.record.desired


def evidence_of(findings: Sequence[Finding]) -> Evidences:
    """As the trail keeps it."""
    return tuple(
        {
            "gate": f.gate,
            "ok": str(f.ok).lower(),
            "observed": f.observed,
            "required": f.required,
            "since_us": str(f.since_us),
        }
        for f in findings
    )

"""What a change of phase would take: the way, the gates of its next step with what they say, and what came of asking.

Values between whoever decides (``sidecar.app``) and whoever asks (``sidecar.api``, the command line).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, Protocol

from sidecar.canary import CanaryOutcome
from sidecar.fleet import Finding
from sidecar.gates import STEPS
from sidecar.phase import Phase


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One adjacent step and the names of its gates."""

    source: Phase
    target: Phase
    gates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The way from the phase in force to ``target``. Only the first step's gates have been looked at.

    ``waits`` says what holds the fleet up now whatever is asked: a request is not refused for it, it waits.
    """

    applied: Phase
    desired: Phase
    target: Phase
    epoch: int
    steps: tuple[PlannedStep, ...]
    findings: tuple[Finding, ...] = ()
    waits: tuple[Finding, ...] = ()

    @property
    def failed(self) -> tuple[Finding, ...]:
        """Gates that refuse the next step."""
        return tuple(finding for finding in self.findings if not finding.ok)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What somebody asks for. ``force`` is the reason for overriding red gates."""

    target: Phase
    by: str
    why: str
    force: str | None = None
    evidence_id: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """What came of asking. ``patch``: the file decides; this command changes it."""

    applied: bool  # the target is in force here
    desired: Phase
    patch: str | None = None


class PhaseControl(Protocol):
    """Decides nothing by itself: looks, and passes on. Every method may raise StoreError, Busy and SpoolFailed."""

    authority: Literal["file", "api"]

    def state(self) -> Mapping[str, object]:
        """Where the migration stands, as this instance knows it."""
        ...

    async def fleet(self) -> Mapping[str, object]:
        """Every instance."""
        ...

    async def history(self, limit: int) -> Sequence[Mapping[str, object]]:
        """Every change and every refused request, newest first."""
        ...

    async def plan(self, target: Phase | None) -> Plan:
        """What it would take; None: the phase that is desired now."""
        ...

    async def request(self, wanted: Wanted, plan: Plan) -> Asked:
        """Ask for it, gates having been looked at (``plan``)."""
        ...

    async def refused(self, wanted: Wanted, plan: Plan) -> None:
        """Keep in the trail that it was refused."""
        ...

    async def canary(self) -> Sequence[CanaryOutcome]:
        """Try both stores now."""
        ...


def way(source: Phase, target: Phase) -> tuple[PlannedStep, ...]:
    """The adjacent steps from ``source`` to ``target``."""
    direction = 1 if target > source else -1
    phases = [Phase(number) for number in range(source, target + direction, direction)]
    return tuple(PlannedStep(a, b, tuple(rule.name for rule in STEPS[a, b])) for a, b in pairwise(phases))


@dataclass(frozen=True, slots=True)
class Moments:
    """Since when each gate has been as it is."""

    seen: dict[tuple[str, bool], int] = field(default_factory=dict)

    def finding(self, gate: str, *, ok: bool, observed: str, required: str, now_us: int) -> Finding:
        """With the moment at which it became so."""
        self.seen.pop((gate, not ok), None)
        return Finding(gate, ok, observed, required, self.seen.setdefault((gate, ok), now_us))

"""The phase in force, as the other parts ask for it: of an instance that decides alone, or of one of a fleet.

``Alone`` is here (``fleet.enabled: false``): the applied phase is local and durable, an adjacent step that the file
asks for is made at once. ``sidecar.app.fleet`` has the other.
"""

import logging
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, Protocol

from sidecar.app import observe
from sidecar.app.parts import SpoolMemory
from sidecar.clock import Clock
from sidecar.gaps import GapKind
from sidecar.intake import Firm, Hold, Standing
from sidecar.metrics import Metrics
from sidecar.migration import Desired, PhaseSwitch, Transition
from sidecar.migration import Hold as PhaseHold
from sidecar.phase import STORES, Policy, StoreName
from sidecar.settings import Settings
from sidecar.spool import Spool

log = logging.getLogger(__name__)

_RECONSIDER: Final = 1.0  # seconds between two looks at a held phase change

Task = tuple[str, Callable[[], Awaitable[None]]]


class Use(Protocol):
    """A hold on the policy: ``sidecar.fleet.Use``, or :class:`Steady`."""

    @property
    def policy(self) -> Policy | None:
        """None: fenced."""
        ...

    @property
    def valid(self) -> bool:
        """Whether it held all the time since this began."""
        ...

    def confirm(self) -> Policy:
        """The policy. Raises Busy (``phase_unknown``)."""
        ...


class InForce(Protocol):
    """What the other parts ask."""

    @property
    def policy(self) -> Policy:
        """What this instance does; while it is fenced, what it did last."""
        ...

    @property
    def releasable(self) -> Container[StoreName]:
        """Stores whose backlog may be released at this instant."""
        ...

    @property
    def looks_every(self) -> float:
        """Seconds between two looks of this instance at the gap ledgers; inf where another one looks for it."""
        ...

    @property
    def told_gaps(self) -> Mapping[tuple[StoreName, GapKind], int] | None:
        """Open gaps as the one that leads tells; None: this one leads, or it is not known who does."""
        ...

    def use(self) -> AbstractContextManager[Use]:
        """Hold the policy: from the question to the answer, from the gap line to the store's confirmation."""
        ...

    def standing(self) -> Standing:
        """To whom records are owed at this instant."""
        ...

    def hold(self) -> AbstractContextManager[Hold]:
        """The same, held from the stamp to the commit."""
        ...

    async def start(self) -> None:
        """Called once, before anything is accepted. Raises SpoolFailed."""
        ...

    async def configured(self) -> None:
        """The configuration has changed. Raises SpoolFailed."""
        ...

    def tasks(self) -> Sequence[Task]:
        """What has to run beside: name and what to run until it is cancelled."""
        ...

    def status(self) -> Mapping[str, object]:
        """The part of ``/status`` about the phase."""
        ...

    async def leave(self) -> None:
        """This process stops for good; nothing is accepted or read any more."""
        ...


@dataclass(frozen=True, slots=True)
class Steady:
    """The use of an instance that knows its phase at any time."""

    policy: Policy
    valid: bool = True

    def confirm(self) -> Policy:
        """The policy."""
        return self.policy


class Chronicle:
    """Says and keeps what happens to the phase: log, metric, audit trail."""

    def __init__(self, spool: Spool, metrics: Metrics) -> None:
        self._spool = spool
        self._metrics = metrics

    async def changed(self, transition: Transition) -> None:
        """A step was made."""
        source = "none" if transition.source is None else transition.source.label
        target = transition.target.label
        self._metrics.phase_transitions.labels(source, target, str(transition.forced).lower()).inc()
        log.warning(
            "phase changed",
            extra={
                "from": source,
                "to": target,
                "by": transition.by,
                "why": transition.why,
                "forced": transition.forced,
                "overridden": ",".join(transition.overridden),
            },
        )
        await self._spool.audit(
            transition.by, f"phase {source} -> {target}", transition.why, ",".join(transition.overridden)
        )

    def held(self, hold: PhaseHold | None) -> None:
        """What stops a change of phase is another gate than before."""
        if hold is None:
            log.info("phase change no longer held")
        else:
            log.warning(
                "phase change held",
                extra={"gate": hold.gate, "observed": hold.observed, "required": hold.required},
            )


def phase_document(policy: Policy, switch: PhaseSwitch) -> dict[str, object]:
    """What both kinds of instance say of the phase in ``/status``."""
    return {
        "applied": policy.phase.label,
        "description": policy.description,
        "flags": policy.flags,
        "history": switch.applied.history[-10:],
    }


class Alone:
    """See the module's docstring. ``phase_authority: api``: the file's phase is that of the first start alone."""

    def __init__(self, switch: PhaseSwitch, settings: Callable[[], Settings]) -> None:
        self.switch = switch
        self._settings = settings

    @classmethod
    async def open(cls, spool: Spool, settings: Callable[[], Settings], *, clock: Clock, metrics: Metrics) -> "Alone":
        """What the spool remembers, then what the file asks for. Raises as ``PhaseSwitch.open`` does."""
        chronicle = Chronicle(spool, metrics)
        asked = settings()
        switch = await PhaseSwitch.open(
            SpoolMemory(spool),
            Desired(asked.phase, asked.phase_epoch, asked.phase_force),
            strengthen=spool.strengthen,
            clock=clock,
            recorder=chronicle.changed,
            on_hold=(chronicle.held,),
            stay=asked.phase_authority == "api",
        )
        observe.observe_phase(
            metrics,
            lambda: switch.policy.phase,
            lambda: switch.desired.phase,
            lambda: switch.applied.epoch or 0,
            lambda: [] if switch.hold is None else [switch.hold.gate],
        )
        return cls(switch, settings)

    @property
    def policy(self) -> Policy:
        """See InForce."""
        return self.switch.policy

    @property
    def releasable(self) -> Container[StoreName]:
        """All: what must not go is required, and the spool knows that."""
        return STORES

    @property
    def looks_every(self) -> float:
        """As often as one that leads."""
        return self._settings().fleet.heartbeat

    @property
    def told_gaps(self) -> None:
        """There is nobody to tell."""

    def use(self) -> AbstractContextManager[Use]:
        """See InForce."""
        return nullcontext(Steady(self.switch.policy))

    def standing(self) -> Standing:
        """See InForce."""
        return Standing(self.switch.policy)

    def hold(self) -> AbstractContextManager[Hold]:
        """See InForce."""
        return nullcontext(Firm(Standing(self.switch.policy)))

    async def start(self) -> None:
        """It decides alone: there is nobody to ask."""

    async def configured(self) -> None:
        """See InForce."""
        asked = self._settings()
        if asked.phase_authority == "file":
            await self.switch.desire(asked.phase, asked.phase_epoch, asked.phase_force)

    def tasks(self) -> Sequence[Task]:
        """Looks again at what is held."""
        return (("phase", self._reconsider),)

    async def _reconsider(self) -> None:
        await self.switch.run(_RECONSIDER)

    def status(self) -> Mapping[str, object]:
        """See InForce."""
        switch = self.switch
        return {
            **phase_document(switch.policy, switch),
            "desired": switch.desired.phase.label,
            "epoch": switch.applied.epoch,
            "hold": switch.hold,
        }

    async def leave(self) -> None:
        """Nobody has to know."""

"""How the phase is put together: who decides it, what is looked at before a step, the ledger of what it leaves out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sidecar.app.fleet import FleetPhase
from sidecar.app.parts import LedgeredStore
from sidecar.app.phase_control import AloneControl, FleetControl
from sidecar.app.phases import Alone, InForce
from sidecar.canary import Canary
from sidecar.clock import Clock
from sidecar.evidence import Evidence
from sidecar.fleet.stores import build_fleet_stores
from sidecar.gaps import GapKind
from sidecar.gates import Gate, KeptCanary, Report, Sources, build_gates
from sidecar.metrics import Metrics
from sidecar.not_owed import NotOwed
from sidecar.obligations import Obligations
from sidecar.phase import STORES, Phase, StoreName
from sidecar.plan import PhaseControl
from sidecar.settings import Settings
from sidecar.spool import Spool


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of parts that are made later: at each call."""

    open_gaps: Callable[[], Mapping[tuple[StoreName, GapKind], int]]
    shadow: Callable[[], Mapping[str, int]]  # reads compared, and unexplained


@dataclass(frozen=True, slots=True)
class Phased:
    """The parts."""

    phase: InForce
    not_owed: NotOwed
    control: PhaseControl


async def open_phase(
    spool: Spool,
    stores: Mapping[StoreName, LedgeredStore],
    settings: Callable[[], Settings],
    *,
    instance: str,
    metrics: Metrics,
    clock: Clock,
    asked: Asked,
    evidence: Evidence,
) -> Phased:
    """The phase in force as the spool remembers it. Raises SpoolRefused, Busy, SpoolFailed."""
    obligations = Obligations(spool)
    canary = Canary(stores, clock)
    kept = KeptCanary(canary, clock)

    def gates(
        reports: Callable[[], Sequence[Report]], phase: Callable[[], Phase], since: Callable[[], int | None]
    ) -> Sequence[Gate]:
        return build_gates(
            Sources(
                stores=stores,
                ledgers={name: store.gap_ledger for name, store in stores.items()},
                reports=reports,
                phase=phase,
                in_force_since_us=since,
                canary=kept,
                settings=lambda: settings().phases,
                clock=clock,
                evidence=evidence,
            )
        )

    phase: Alone | FleetPhase
    control: PhaseControl
    if settings().fleet.enabled:
        phase = fleet = await FleetPhase.open(
            spool,
            build_fleet_stores(stores),
            settings,
            obligations=obligations,
            instance=instance,
            gates=gates,
            metrics=metrics,
            open_gaps=asked.open_gaps,
            shadow=asked.shadow,
        )
        control = FleetControl(fleet, spool=spool, canary=canary, settings=settings, clock=clock)
    else:
        phase = alone = await Alone.open(spool, settings, clock=clock, metrics=metrics)
        control = AloneControl(
            alone,
            gates(
                lambda: [_own_report(instance, alone, spool, asked.shadow(), clock)],
                lambda: alone.policy.phase,
                lambda: alone.switch.applied.history[-1].at_us if alone.switch.applied.history else None,
            ),
            instance=instance,
            spool=spool,
            canary=canary,
            settings=settings,
            clock=clock,
        )
    not_owed = NotOwed(
        spool,
        ledgers={name: store.gap_ledger for name, store in stores.items()},
        uses=phase.use,
        undecided=obligations.undecided,
        instance=instance,
        clock=clock,
    )
    if isinstance(phase, FleetPhase):
        phase.republish = not_owed.republish
    return Phased(phase, not_owed, control)


def _own_report(instance: str, phase: Alone, spool: Spool, shadow: Mapping[str, int], clock: Clock) -> Report:
    """What an instance that is alone would say in a heartbeat."""
    counters = {store: spool.counters(store) for store in STORES}
    now = clock.now_us()
    return Report(
        instance=instance,
        works=True,
        phase=phase.policy.phase,
        pending={store: each.pending for store, each in counters.items()},
        oldest_s={
            store: max(0.0, (now - each.oldest_pending_us) / 1e6)
            for store, each in counters.items()
            if each.oldest_pending_us is not None
        },
        dead_letters={store: each.dead_lettered for store, each in counters.items()},
        compared=shadow.get("compared", 0),
        unexplained=shadow.get("unexplained", 0),
    )

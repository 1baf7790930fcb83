"""One instance of a fleet: member, controller, and what this instance has to do when the record says so.

START. The spool's memory says what was applied last; nothing is done by it. One exchange with both stores is tried, so
that an instance whose stores answer serves from its first request on; else it starts fenced: it accepts records, owed
to be decided, and answers reads 503 ``phase_unknown``, until it has joined. STOP: when nothing is accepted or read any
more it says so (``drained``) and gives the lease back.

A RECORD IN FORCE (``_follow``), in this order, each idempotent, a failure anywhere means that the epoch is not claimed
and all of it is done again at the next round: what is pending is made good (``sidecar.obligations``); this instance's
gap lines are copied to the ledger that the phase's gates ask; the phase is remembered, counted, logged and audited.
"""

import asyncio
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Final, Self

from sidecar import __version__
from sidecar.app import observe
from sidecar.app.parts import SpoolMemory, drawn_name
from sidecar.app.phases import Chronicle, Task, Use, phase_document
from sidecar.clock import Clock
from sidecar.fleet import (
    Controller,
    FleetMember,
    Hold,
    Identity,
    Load,
    Member,
    Outlook,
    Presence,
    StepGate,
    Wish,
    current,
    protocol,
)
from sidecar.fleet import Use as FleetUse
from sidecar.fleet.clock import BootClock
from sidecar.fleet_tables import FleetRecord, FleetStore
from sidecar.gaps import GapKind
from sidecar.gates import Report
from sidecar.intake import Standing
from sidecar.metrics import Metrics, Row
from sidecar.migration import Desired, PhaseSwitch
from sidecar.obligations import Obligations
from sidecar.phase import STORES, Phase, Policy, StoreName
from sidecar.settings import Settings
from sidecar.spool import Spool

log = logging.getLogger(__name__)

_FIRST_EXCHANGE: Final = 3.0  # seconds that a start waits for it
_FAREWELL: Final = 2.0  # seconds for the last heartbeat
_SOON: Final = 0.5  # seconds between two ticks while something is moving
_MOST_TOLD: Final = 10  # reasons in a leader's heartbeat
_LONGEST_TOLD: Final = 300  # characters of each text


MakeGates = Callable[
    [Callable[[], Sequence[Report]], Callable[[], Phase], Callable[[], int | None]], Sequence[StepGate]
]
"""Gates from the instances' reports, the phase in force, and since when it is."""


class _Hold:
    """A request's hold: the use, and what records are stamped with under it."""

    __slots__ = ("_use", "standing")

    def __init__(self, use: FleetUse, known: Policy) -> None:
        self._use = use
        self.standing = Standing(known if use.policy is None else use.policy, fenced=use.policy is None)

    @property
    def valid(self) -> bool:
        return self._use.valid

    def __enter__(self) -> Self:
        self._use.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._use.__exit__(*exception)


class FleetPhase:
    """See the module's docstring; ``sidecar.app.phases.InForce``."""

    def __init__(
        self,
        spool: Spool,
        stores: Mapping[StoreName, FleetStore],
        settings: Callable[[], Settings],
        *,
        switch: PhaseSwitch,
        obligations: Obligations,
        identity: Identity,
        gates: MakeGates,
        metrics: Metrics,
        open_gaps: Callable[[], Mapping[tuple[StoreName, GapKind], int]],
        shadow: Callable[[], Mapping[str, int]],
        clock: Clock,
    ) -> None:
        """``open_gaps`` is what this instance knows of them; ``clock`` must go on while the machine is suspended."""
        self.switch = switch
        self.republish: Callable[[Policy], Awaitable[None]] | None = None  # gap lines; set by who builds both
        self._spool = spool
        self._settings = settings
        self._obligations = obligations
        self._open_gaps = open_gaps
        self._shadow = shadow
        self._clock = clock
        self.stores = stores
        self._nudged = asyncio.Event()
        fleet = settings().fleet
        self._interval = fleet.heartbeat
        self.member = FleetMember(
            identity,
            stores,
            clock,
            wish=self._wish,
            load=self._load,
            on_applied=self._follow,
            holds=self._telling,
            interval_s=fleet.heartbeat,
            fence_after_s=fleet.fence_after,
        )
        self.controller = Controller(
            self.member,
            stores,
            clock,
            wish=self._wish,
            gates=gates(self.reports, lambda: self.policy.phase, self._since),
            authority=settings().phase_authority,
            lease_s=3 * fleet.heartbeat,
            on_change=self._said,
        )
        self._held: frozenset[str] = frozenset()
        self._shared_names: tuple[str, ...] = ()
        self._observe(metrics)

    @classmethod
    async def open(
        cls,
        spool: Spool,
        stores: Mapping[StoreName, FleetStore],
        settings: Callable[[], Settings],
        *,
        obligations: Obligations,
        instance: str,
        gates: MakeGates,
        metrics: Metrics,
        open_gaps: Callable[[], Mapping[tuple[StoreName, GapKind], int]] = dict,
        shadow: Callable[[], Mapping[str, int]] = dict,
        clock: Clock | None = None,
    ) -> "FleetPhase":
        """What the spool remembers. Raises SpoolRefused, Busy, SpoolFailed."""
        time = clock or BootClock()
        chronicle = Chronicle(spool, metrics)
        switch = await PhaseSwitch.open(
            SpoolMemory(spool),
            Desired(settings().phase),
            strengthen=spool.strengthen,
            clock=time,
            recorder=chronicle.changed,
            stay=True,
        )
        return cls(
            spool,
            stores,
            settings,
            switch=switch,
            obligations=obligations,
            identity=Identity(instance, secrets.token_hex(8), __version__, await drawn_name(spool)),
            gates=gates,
            metrics=metrics,
            open_gaps=open_gaps,
            shadow=shadow,
            clock=time,
        )

    async def start(self) -> None:
        """One exchange with both stores, and the first record where there is none; at most three seconds."""
        try:
            async with asyncio.timeout(_FIRST_EXCHANGE):
                await self._rounds()
                if self.member.fenced:
                    await self.controller.tick()
                    await self._rounds()
        except TimeoutError:
            log.warning("the fleet was not reached at start: records are accepted undecided, reads are refused")

    # --- InForce ---------------------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """See InForce."""
        applied = self.member.applied
        return self.switch.policy if applied is None else protocol.policy_of(applied)

    @property
    def releasable(self) -> Container[StoreName]:
        """See InForce."""
        return self.member.releasable

    @property
    def looks_every(self) -> float:
        """See InForce; at each heartbeat, which tells the others."""
        return self._interval if self.controller.outlook.leads else math.inf

    @property
    def told_gaps(self) -> Mapping[tuple[StoreName, GapKind], int] | None:
        """See InForce."""
        leader = self.controller.outlook.leader
        return None if leader is None else {(store, kind): n for store, kind, n in leader.gaps}

    def use(self) -> AbstractContextManager[Use]:
        """See InForce."""
        return self.member.use()

    def standing(self) -> Standing:
        """See InForce."""
        return Standing(self.policy, fenced=self.member.fenced)

    def hold(self) -> _Hold:
        """See InForce."""
        return _Hold(self.member.use(), self.policy)

    async def configured(self) -> None:
        """The wish is told with the next heartbeat: send it."""
        await self.nudge()

    async def nudge(self) -> None:
        """Look now instead of at the next heartbeat."""
        self._nudged.set()

    def tasks(self) -> Sequence[Task]:
        """Heartbeats, and the controller."""
        return (("fleet member", self.member.run), ("fleet controller", self._control))

    def status(self) -> Mapping[str, object]:
        """See InForce."""
        member, outlook = self.member, self.controller.outlook
        record = self.record
        states: dict[str, int] = {}
        for each in outlook.members:
            states[each.presence.value] = states.get(each.presence.value, 0) + 1
        return {
            **phase_document(self.policy, self.switch),
            "desired": (self.desired or self.policy.phase).label,
            "epoch": 0 if member.applied is None else member.applied.epoch,
            "hold": outlook.told[0] if outlook.told else None,
            "fleet": {
                "fenced": member.fenced,
                "claimed_epoch": member.claimed,
                "leads": outlook.leads,
                "leader": self._leader(),
                "record": None if record is None else record_document(record),
                "holds": outlook.told,
                "instances": states,
                "shared_names": outlook.shared_names,
                "trouble": member.trouble,
            },
        }

    async def leave(self) -> None:
        """See InForce; a store that is down has two seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_FAREWELL):
                await self.member.leave()
                await self.controller.resign()

    # --- the record ------------------------------------------------------------------------------------------------

    @property
    def record(self) -> FleetRecord | None:
        """The newest that this instance has seen."""
        return protocol.highest((self.member.applied, self.controller.outlook.record))

    @property
    def desired(self) -> Phase | None:
        """What the fleet was told to reach."""
        return None if self.record is None else self.record.desired

    async def _follow(self, record: FleetRecord) -> None:
        policy = protocol.policy_of(record)
        await self._obligations.apply(policy)
        if self.republish is not None:
            await self.republish(policy)
        forced = "(forced)" in record.by
        await self.switch.follow(
            record.phase, epoch=record.phase_epoch or None, by=record.by, why=record.why, forced=forced
        )

    async def _control(self) -> None:
        while True:
            outlook = await self.controller.tick()
            moving = bool(outlook.done) or outlook.record != self.member.applied
            if moving:
                await self._rounds()
            await self._pause(_SOON if moving else self._interval)

    async def _pause(self, seconds: float) -> None:
        """Until ``seconds`` have passed or somebody asks for a look."""
        sleeping = asyncio.ensure_future(self._clock.sleep(seconds))
        nudge = asyncio.ensure_future(self._nudged.wait())
        try:
            await asyncio.wait((sleeping, nudge), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleeping.cancel()
            nudge.cancel()
            await asyncio.gather(sleeping, nudge, return_exceptions=True)
        if self._nudged.is_set():
            self._nudged.clear()
            await self._rounds()  # the wish travels with the heartbeat

    async def _rounds(self) -> None:
        await asyncio.gather(*(self.member.round(store) for store in self.stores))

    def _wish(self) -> Wish:
        settings = self._settings()
        return Wish(settings.phase, settings.phase_epoch, settings.phase_force)

    def _load(self) -> Load:
        counters = {store: self._spool.counters(store) for store in STORES}
        gaps = self._open_gaps()
        return Load(
            pending={store: each.pending for store, each in counters.items()},
            oldest_pending_us={
                store: each.oldest_pending_us for store, each in counters.items() if each.oldest_pending_us is not None
            },
            dead_letters={store: each.dead_lettered for store, each in counters.items()},
            open_gaps={store: sum(n for (of, _), n in gaps.items() if of == store) for store in STORES},
            shadow=dict(self._shadow()),
            gaps=tuple((store, kind, n) for (store, kind), n in gaps.items()) if self.controller.outlook.leads else (),
        )

    # --- what gates ask --------------------------------------------------------------------------------------------

    def reports(self) -> Sequence[Report]:
        """Of every process as observed last; of one that restarted, not what it was before."""
        return [report_of(member) for member in current(self.controller.census.members)]

    def _since(self) -> int | None:
        record = self.member.applied
        return None if record is None else record.at_us

    def _leader(self) -> str | None:
        """Who leads, as far as this instance knows."""
        outlook = self.controller.outlook
        if outlook.leads:
            return self.member.identity.instance
        return None if outlook.leader is None else outlook.leader.instance

    def _telling(self) -> tuple[Hold, ...] | None:
        """For the heartbeat: what is found here, while this instance leads; cut to what a row may well carry."""
        outlook = self.controller.outlook
        if not outlook.leads:
            return None
        return tuple(
            Hold(hold.gate, hold.observed[:_LONGEST_TOLD], hold.required[:_LONGEST_TOLD], hold.since_us)
            for hold in outlook.holds[:_MOST_TOLD]
        )

    # --- what is said ----------------------------------------------------------------------------------------------

    def _said(self, outlook: Outlook) -> None:
        """One log line per change of reason, and of the names that several processes bear."""
        if outlook.shared_names != self._shared_names:
            self._shared_names = outlook.shared_names
            if outlook.shared_names:
                log.error("processes share a name: give each its own `instance`", extra={"names": outlook.shared_names})
            else:
                log.info("no name is shared any more")
        held = frozenset(hold.gate for hold in outlook.holds)
        if held == self._held:
            return
        self._held = held
        if not held:
            log.info("phase change no longer held")
        for hold in outlook.holds:
            log.warning(
                "phase change held", extra={"gate": hold.gate, "observed": hold.observed, "required": hold.required}
            )

    def _observe(self, metrics: Metrics) -> None:
        observe.observe_phase(
            metrics,
            lambda: self.policy.phase,
            lambda: self.desired or self.policy.phase,
            lambda: 0 if self.member.applied is None else self.member.applied.epoch,
            lambda: [hold.gate for hold in self.controller.outlook.holds],
        )
        metrics.observe("fleet_fenced", lambda: [((), float(self.member.fenced))])
        metrics.observe("fleet_instances", self._instances)
        metrics.observe("fleet_shared_names", self._shared)

    def _shared(self) -> list[Row]:
        """As the leader sees them; nobody else says anything."""
        outlook = self.controller.outlook
        return [((), float(len(outlook.shared_names)))] if outlook.leads else []

    def _instances(self) -> list[Row]:
        """By phase and presence, as the leader sees them; nobody else says anything."""
        if not self.controller.outlook.leads:
            return []
        counts = {(phase.label, presence.value): 0 for phase in Phase for presence in Presence}
        for each in self.controller.outlook.members:
            if each.heartbeat.phase is not None:
                counts[each.heartbeat.phase.label, each.presence.value] += 1
        return [(labels, float(n)) for labels, n in counts.items()]


def report_of(member: Member) -> Report:
    """What a heartbeat says, with ages by its own clock and the time since by ours."""
    row = member.heartbeat
    return Report(
        instance=row.instance,
        works=member.counts,
        phase=row.phase,
        pending=row.pending,
        oldest_s={s: max(0.0, (row.at_us - us) / 1e6) + member.unchanged_s for s, us in row.oldest_pending_us.items()},
        dead_letters=row.dead_letters,
        compared=row.shadow.get("compared", 0),
        unexplained=row.shadow.get("unexplained", 0),
    )


def record_document(record: FleetRecord) -> dict[str, object]:
    """The record with phases by name."""
    document: dict[str, object] = {name: getattr(record, name) for name in record.__struct_fields__}
    document["phase"] = record.phase.label
    for name in ("preparing", "desired"):
        phase = getattr(record, name)
        document[name] = None if phase is None else phase.label
    return document

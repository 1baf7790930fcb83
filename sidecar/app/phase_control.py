"""What stands behind ``/api/migration``: a plan with evidence, and a wish put where it is followed.

WHO DECIDES (``phase_authority``). ``file``: the mounted file alone; a request is looked at like any other and answered
with the command that changes the file. ``api``: a request sets the desired phase, in the fleet record or, in an
instance that is alone, at once; the file's phase then counts at the very first start only.

GATES of a request are looked at by whoever was asked, whatever kind of instance it is. An instance that is alone looks
at none where its file asks for the adjacent phase (semantics, section 9: one instance, development).
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal

from sidecar.app.fleet import FleetPhase, record_document
from sidecar.app.phases import Alone
from sidecar.canary import CanaryOutcome
from sidecar.clock import Clock
from sidecar.errors import StoreError
from sidecar.fleet import Finding, Hold, Member, protocol
from sidecar.fleet.outlook import evidence_of
from sidecar.fleet_tables import AuditEntry
from sidecar.gates import Gate, TryCanary
from sidecar.migration import Desired, Transition
from sidecar.phase import STORES, Phase
from sidecar.plan import Asked, Moments, Plan, Wanted, way
from sidecar.record import timestamp_text
from sidecar.settings import Settings
from sidecar.spool import Spool

_PATIENCE: Final = 3.0  # seconds that a request waits for its phase to be in force here
_POLL: Final = 0.05  # seconds
_CONFIG_MAP: Final = "sidecar-config"


class AloneControl:
    """Of an instance that decides alone; ``sidecar.plan.PhaseControl``."""

    def __init__(
        self,
        phase: Alone,
        gates: Sequence[Gate],
        *,
        instance: str,
        spool: Spool,
        canary: TryCanary,
        settings: Callable[[], Settings],
        clock: Clock,
    ) -> None:
        self.authority: Literal["file", "api"] = settings().phase_authority
        self._instance = instance
        self._canary = canary
        self._phase = phase
        self._gates = gates
        self._spool = spool
        self._settings = settings
        self._clock = clock
        self._moments = Moments()

    def state(self) -> Mapping[str, object]:
        """See PhaseControl."""
        hold = self._phase.switch.hold
        holds = [] if hold is None else [_held(hold.gate, hold.observed, hold.required, hold.since_us)]
        return {
            **self._phase.status(),
            "history": _newest(self._phase.switch.applied.history[-1:]),
            "authority": self.authority,
            "forced": self._phase.switch.desired.force,
            "hold": holds[0] if holds else None,
            "holds": holds,
            "fleet": None,
        }

    async def fleet(self) -> Mapping[str, object]:
        """Nobody but this one."""
        switch = self._phase.switch
        counters = {store: self._spool.counters(store) for store in STORES}
        me = {
            "instance": self._instance,
            "state": "live",
            "phase": switch.policy.phase.label,
            "epoch": switch.applied.epoch,
            "pending": {store: each.pending for store, each in counters.items()},
            "dead_letters": {store: each.dead_lettered for store, each in counters.items()},
        }
        return {"enabled": False, "instances": [me], "unreachable": {}}

    async def history(self, limit: int) -> Sequence[Mapping[str, object]]:
        """What the spool remembers: steps, their evidence and refused requests from its audit trail."""
        trail = await self._spool.audit_trail(1000)
        asked = (line.evidence.partition(" ") for line in trail if line.what.startswith(_ASKED))
        lines = _newest(self._phase.switch.applied.history, {each: seen for each, _, seen in asked})
        for line in trail:
            if line.what.startswith(_REFUSED):
                lines.append(
                    {
                        "at": timestamp_text(line.at_us),
                        "action": line.what,
                        "outcome": "refused",
                        "by": line.who,
                        "why": line.why,
                        "evidence": line.evidence,
                    }
                )
        return sorted(lines, key=lambda line: str(line["at"]), reverse=True)[:limit]

    async def plan(self, target: Phase | None) -> Plan:
        """See PhaseControl."""
        switch = self._phase.switch
        applied = switch.applied.phase
        wanted = switch.desired.phase if target is None else target
        steps = way(applied, wanted)
        found: list[Finding] = []
        for gate in self._gates:
            if steps and (steps[0].source, steps[0].target) in gate.steps:
                seen = await gate.evaluate()
                found.append(
                    self._moments.finding(
                        seen.gate,
                        ok=seen.ok,
                        observed=seen.observed,
                        required=seen.required,
                        now_us=self._clock.now_us(),
                    )
                )
        return Plan(applied, switch.desired.phase, wanted, switch.applied.epoch or 0, steps, tuple(found))

    async def request(self, wanted: Wanted, plan: Plan) -> Asked:
        """See PhaseControl; one step at a time, each with its gates looked at; a red one ends the walk where it is."""
        switch = self._phase.switch
        if self.authority == "file" and plan.applied != wanted.target:
            return Asked(False, switch.desired.phase, patch_command(wanted, self._settings()))
        current = plan
        while current.steps and (current is plan or not current.failed or wanted.force is not None):
            step = current.steps[0]
            red = tuple(finding.gate for finding in current.failed)
            seen = "; ".join(f"{'ok' if each.ok else 'RED'} {each.gate}: {each.observed}" for each in current.findings)
            what = f"{_ASKED}: {step.source.label} -> {step.target.label}"
            await self._spool.audit(wanted.by, what, wanted.why, f"{wanted.evidence_id} {seen}")
            wish = Desired(
                step.target,
                None if switch.applied.epoch is None else switch.applied.epoch + 1,
                wanted.force,
                wanted.by,
                wanted.why,
                red,
                wanted.evidence_id,
            )
            if await switch.ask(wish) is not None:
                break
            current = await self.plan(wanted.target)
        return Asked(switch.policy.phase == wanted.target, switch.desired.phase)

    async def canary(self) -> Sequence[CanaryOutcome]:
        """See PhaseControl."""
        return await self._canary()

    async def refused(self, wanted: Wanted, plan: Plan) -> None:
        """See PhaseControl."""
        await _note_refusal(self._spool, wanted, plan)


class FleetControl:
    """Of one instance of a fleet; ``sidecar.plan.PhaseControl``."""

    def __init__(
        self, phase: FleetPhase, *, spool: Spool, canary: TryCanary, settings: Callable[[], Settings], clock: Clock
    ) -> None:
        self.authority: Literal["file", "api"] = settings().phase_authority
        self._canary = canary
        self._phase = phase
        self._spool = spool
        self._settings = settings
        self._clock = clock

    def state(self) -> Mapping[str, object]:
        """See PhaseControl; who does not lead says what the leader tells."""
        record, outlook = self._phase.record, self._phase.controller.outlook
        holds = [_held(hold.gate, hold.observed, hold.required, hold.since_us) for hold in outlook.told]
        return {
            **self._phase.status(),
            "history": _newest(self._phase.switch.applied.history[-1:]),
            "authority": self.authority,
            "forced": None if record is None else record.force,
            "hold": holds[0] if holds else None,
            "holds": holds,
            "gates": [_held(f.gate, f.observed, f.required, f.since_us) | {"ok": f.ok} for f in outlook.findings],
        }

    async def fleet(self) -> Mapping[str, object]:
        """See PhaseControl; reads the heartbeats now."""
        view = await self._phase.controller.survey()
        record = protocol.highest(view.copies.values())
        return {
            "enabled": True,
            "asked": self._phase.member.identity.instance,
            "record": None if record is None else record_document(record),
            "instances": [_member_document(member) for member in view.members],
            "unreachable": dict(view.unreachable),
        }

    async def history(self, limit: int) -> Sequence[Mapping[str, object]]:
        """The trail of both stores; one that does not answer is left out while the other does."""
        found: dict[tuple[str, str], AuditEntry] = {}
        failure: StoreError | None = None
        answered = False
        for store in self._phase.stores.values():
            try:
                found.update(((entry.id, entry.outcome), entry) for entry in await store.audits(limit))
                answered = True
            except StoreError as error:
                failure = error
        if failure is not None and not answered:
            raise failure
        entries = sorted(found.values(), key=lambda entry: (entry.at_us, entry.outcome != "intended"), reverse=True)
        return [_entry_document(entry) for entry in entries[:limit]]

    async def plan(self, target: Phase | None) -> Plan:
        """See PhaseControl. Raises StoreError where no copy of the record can be read."""
        outlook = await self._phase.controller.examine(target)
        record = outlook.record
        if record is None:
            hold = next(iter(outlook.holds), Hold("fleet_record", "none", "one"))
            known = self._phase.policy.phase
            wanted = known if target is None else target
            return Plan(known, known, wanted, 0, way(known, wanted), (_waiting(hold),))
        desired = record.phase if record.desired is None else record.desired
        wanted = desired if target is None else target
        waits = tuple(_waiting(hold) for hold in outlook.holds)
        return Plan(record.phase, desired, wanted, record.epoch, way(record.phase, wanted), outlook.findings, waits)

    async def request(self, wanted: Wanted, plan: Plan) -> Asked:
        """See PhaseControl."""
        if self.authority == "file":
            if plan.applied == wanted.target == plan.desired:
                return Asked(True, plan.desired)
            return Asked(False, plan.desired, patch_command(wanted, self._settings()))
        record = await self._phase.controller.request(
            wanted.target,
            by=wanted.by,
            why=wanted.why,
            force=wanted.force,
            evidence=_evidence(plan),
            entry_id=wanted.evidence_id,
        )
        await self._phase.nudge()
        end = self._clock.monotonic() + _PATIENCE
        while self._phase.policy.phase != wanted.target and self._clock.monotonic() < end:
            await self._clock.sleep(_POLL)
        desired = record.phase if record.desired is None else record.desired
        return Asked(self._phase.policy.phase == wanted.target, desired)

    async def canary(self) -> Sequence[CanaryOutcome]:
        """See PhaseControl."""
        return await self._canary()

    async def refused(self, wanted: Wanted, plan: Plan) -> None:
        """See PhaseControl; in the fleet's trail too, if the store that decides answers."""
        await _note_refusal(self._spool, wanted, plan)
        entry = AuditEntry(
            id=wanted.evidence_id or uuid.uuid4().hex,
            outcome="refused",
            action="wish",
            by=wanted.by,
            why=wanted.why,
            at_us=self._clock.now_us(),
            epoch=plan.epoch,
            from_phase=plan.applied,
            to_phase=wanted.target,
            forced=wanted.force is not None,
            evidence=_evidence(plan),
        )
        try:
            await self._phase.stores[protocol.AUTHORITY[plan.applied]].append_audit(entry)
        except StoreError:  # this instance's own trail has it
            return


_REFUSED: Final = "phase refused"
_ASKED: Final = "phase asked"


async def _note_refusal(spool: Spool, wanted: Wanted, plan: Plan) -> None:
    what = f"{_REFUSED}: {plan.applied.label} -> {wanted.target.label}"
    seen = "; ".join(f"{f.gate}: {f.observed}" for f in plan.failed)
    await spool.audit(wanted.by, what, wanted.why, seen)


def _evidence(plan: Plan) -> tuple[dict[str, str], ...]:
    return evidence_of(plan.findings)


def _waiting(hold: Hold) -> Finding:
    return Finding(hold.gate, False, hold.observed, hold.required, hold.since_us)


def _held(gate: str, observed: str, required: str, since_us: int) -> dict[str, object]:
    return {"gate": gate, "observed": observed, "required": required, "since": timestamp_text(since_us)}


def _newest(
    history: Sequence[Transition], evidence: Mapping[str, str] = MappingProxyType({})
) -> list[dict[str, object]]:
    return [
        {
            "at": timestamp_text(step.at_us),
            "id": step.evidence_id,
            "action": "step",
            "outcome": "done",
            "by": step.by,
            "why": step.why,
            "from": None if step.source is None else step.source.label,
            "to": step.target.label,
            "epoch": step.epoch,
            "forced": step.forced,
            "overridden": step.overridden,
            "evidence": evidence.get(step.evidence_id, ""),
        }
        for step in reversed(history)
    ]


def _entry_document(entry: AuditEntry) -> dict[str, object]:
    return {
        "at": timestamp_text(entry.at_us),
        "id": entry.id,
        "action": entry.action,
        "outcome": entry.outcome,
        "by": entry.by,
        "why": entry.why,
        "from": None if entry.from_phase is None else entry.from_phase.label,
        "to": None if entry.to_phase is None else entry.to_phase.label,
        "epoch": entry.epoch,
        "forced": entry.forced,
        "evidence": entry.evidence,
    }


def _member_document(member: Member) -> dict[str, object]:
    row = member.heartbeat
    ages = {store: max(0.0, (row.at_us - us) / 1e6) + member.unchanged_s for store, us in row.oldest_pending_us.items()}
    return {
        "instance": row.instance,
        "incarnation": row.incarnation,
        "state": member.presence.value,
        "counts": member.counts,
        "leads": row.holds is not None and member.counts,
        "phase": None if row.phase is None else row.phase.label,
        "epoch": row.epoch,
        "fenced": row.fenced,
        "version": row.version,
        "desired": None if row.desired is None else row.desired.label,
        "phase_epoch": row.phase_epoch,
        "pending": row.pending,
        "oldest_pending_age_seconds": ages,
        "dead_letters": row.dead_letters,
        "heartbeat_at": timestamp_text(row.at_us),
        "unchanged_seconds": round(member.unchanged_s, 3),
    }


def patch_command(wanted: Wanted, settings: Settings) -> str:
    """The command that makes the mounted file ask for the phase; names are those of ``k8s/base``."""
    edits = [f'sub("(?m)^phase:.*"; "phase: {wanted.target.label}")']  # jq's (?m) and ^: at each line
    if settings.phase_epoch is not None:
        edits.append(f'sub("(?m)^phase_epoch:.*"; "phase_epoch: {settings.phase_epoch + 1}")')
    program = f'{{data: {{"config.yaml": (.data["config.yaml"] | {" | ".join(edits)})}}}}'
    return (
        f"kubectl patch configmap {_CONFIG_MAP} --type merge -p "
        f"\"$(kubectl get configmap {_CONFIG_MAP} -o json | jq '{program}')\""
    )

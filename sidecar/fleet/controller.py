"""The controller: level-triggered, any instance may run it, one leads at a time to save work.

Each tick looks at the world afresh and does what ``decision`` says until there is nothing to do: create the first
record, make the copies equal, settle the epoch, record the wish, make one move whose gates are green. It keeps nothing
that it could not lose: a new leader needs no hand-over. Two leaders at once are safe (``protocol``), only wasteful.

FAILURE. A store that fails in the middle of a tick ends the tick with a hold; the next tick begins anew. A write whose
answer was lost is found done, or not, by the next look. The audit line is written before the change (``intended``) and
completed after it, so that no change is ever missing from the trail.

COST for 1,000 instances at the default interval of 10 s, per store of the phase: 100 heartbeats written per second and
100 single reads of the record; the leader alone reads the 1,000 heartbeats (about 0.5 KB each) once per tick. In
DynamoDB: 100 write and 100 read units per second, and about 13 read units per second for the leader; a follower's look
at the lease, and at what its holder tells, is two small reads more per tick. A step adds two heartbeats per instance.
"""

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import msgspec

from sidecar.clock import Clock
from sidecar.errors import RetryClass, SidecarError, SpoolFailed, StoreError
from sidecar.fleet import decision, protocol
from sidecar.fleet.census import Census, shared_names
from sidecar.fleet.decision import Decision, PhaseAuthority, View
from sidecar.fleet.member import FleetMember, Wish
from sidecar.fleet.outlook import Evidences, Finding, Outlook, StepGate, evidence_of
from sidecar.fleet.protocol import Change, Move
from sidecar.fleet_tables import AuditEntry, FleetRecord, FleetStore, Heartbeat, Hold
from sidecar.phase import STORES, Phase, StoreName

LEASE: Final = "phase-controller"
PATIENCE: Final = 60.0  # seconds that gates may be red after a preparation before it is given up
STEPS: Final = 16  # changes at most in one tick: a whole walk, with room; more would be a loop


class Controller:
    """See the module's docstring. One task calls :meth:`tick` every heartbeat interval."""

    def __init__(
        self,
        member: FleetMember,
        stores: Mapping[StoreName, FleetStore],
        clock: Clock,
        *,
        wish: Callable[[], Wish],
        gates: Sequence[StepGate] = (),
        authority: PhaseAuthority = "file",
        lease_s: float = 30.0,
        on_change: Callable[[Outlook], None] = lambda _outlook: None,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        """``on_change`` is called when the record or the set of reasons for a hold has changed."""
        self.outlook = Outlook()
        self.census = Census()
        self._member = member
        self._stores = stores
        self._clock = clock
        self._wish = wish
        self._gates = gates
        self._authority: PhaseAuthority = authority
        self._lease_s = lease_s
        self._on_change = on_change
        self._new_id = new_id
        self._since: dict[tuple[str, bool], int] = {}
        self._red_since: float | None = None
        self._holder = f"{member.identity.instance}/{member.identity.incarnation}"

    async def tick(self) -> Outlook:
        """Look, and do what is due. Raises nothing but SpoolFailed (from a gate that looks at the spool)."""
        done: list[str] = []
        for _ in range(STEPS):
            outlook = await self._once(done)
            if outlook is not None:
                break
        else:
            outlook = replace(self.outlook, done=tuple(done))
        return self._publish(outlook)

    async def run(self, interval_s: float) -> None:
        """Tick every ``interval_s`` seconds until cancelled."""
        while True:
            await self.tick()
            await self._clock.sleep(interval_s)

    async def resign(self) -> None:
        """Give the lease back at a graceful stop."""
        for store in self._stores.values():
            try:
                await store.release_lease(LEASE, self._holder)
            except StoreError:  # it expires by itself
                continue

    async def examine(self, target: Phase | None = None) -> Outlook:
        """The same look by any instance, with gates, and nothing changed: for ``?dry_run=true`` and people.

        The gates are those of the next step toward ``target``; None: of the step that is due.
        """
        copies = await self._copies()
        if protocol.highest(copies.copies.values()) is None:
            return Outlook(holds=decision.create(copies, self._wish(), by="", at_us=0).holds)
        view = await self._with_members(copies)
        decided = decision.decide(view, self._authority)
        record = protocol.highest(view.copies.values())
        findings: tuple[Finding, ...] = ()
        move = decided.move if target is None or record is None else protocol.next_move(record, target)
        if record is not None and move is not None:
            findings = await self.evaluate(record, move)
        return Outlook(record, False, self._dated(decided.holds), findings, view.members)

    async def survey(self) -> View:
        """Both copies and every heartbeat, read now; nothing is decided."""
        return await self._with_members(await self._copies())

    async def evaluate(self, record: FleetRecord, move: Move) -> tuple[Finding, ...]:
        """Evidence of every gate that guards this move (a preparation is guarded as its step is)."""
        target = move.preparing if move.preparing is not None else move.phase
        found: list[Finding] = []
        for gate in self._gates:
            if (record.phase, target) not in gate.steps:
                continue
            try:
                evidence = await gate.evaluate()
            except SpoolFailed:
                raise
            except SidecarError as error:
                found.append(self._finding(gate.name, False, str(error), "an answer"))
            else:
                found.append(self._finding(evidence.gate, evidence.ok, evidence.observed, evidence.required))
        return tuple(found)

    async def request(
        self, phase: Phase, *, by: str, why: str, force: str | None = None, evidence: Evidences = (), entry_id: str = ""
    ) -> FleetRecord:
        """Set the desired phase in the fleet record (``phase_authority: api``); returns the record with it.

        ``evidence`` is kept in the trail under ``entry_id``.

        Raises:
            StoreError: the copy that decides cannot be reached, or somebody else kept changing it.
        """
        for _ in range(STEPS):
            copies = await self._copies()
            top = protocol.authoritative(copies.copies)
            if top is None:
                highest = protocol.highest(copies.copies.values())
                store = protocol.FIRST if highest is None else protocol.AUTHORITY[highest.phase]
                raise await self._refusal(store)
            change = decision.rewish(top, Wish(phase, None, force))
            if change is None:
                return top
            entry = self._entry("wish", top, top.phase, phase, by=by, why=why, forced=force is not None)
            entry = msgspec.structs.replace(entry, evidence=evidence, id=entry_id or entry.id)
            if await self._write(change, entry):
                return change.new
        raise await self._refusal(protocol.AUTHORITY[Phase.SQL_ONLY])

    # -- one look, at most one change -------------------------------------------------------------------------------

    async def _once(self, done: list[str]) -> Outlook | None:
        """None after a change: look again."""
        try:
            known = self._member.applied
            return await (self._before_joining(done) if known is None else self._joined(known, done))
        except StoreError as error:
            hold = Hold("authority_reachable", str(error), "the store that decides to answer")
            return replace(self.outlook, leads=False, leader=None, holds=self._dated((hold,)), done=tuple(done))

    async def _before_joining(self, done: list[str]) -> Outlook | None:
        """This instance has read no record: create the first one if there is none anywhere."""
        copies = await self._copies()
        record = protocol.highest(copies.copies.values())
        base = Outlook(record, done=tuple(done))
        if record is not None:
            return base
        decided = decision.create(copies, self._wish(), by=self._member.identity.instance, at_us=self._clock.now_us())
        return await self._do(decided, base, done)

    async def _joined(self, known: FleetRecord, done: list[str]) -> Outlook | None:
        """Lead if nobody else does."""
        base = Outlook(known, done=tuple(done))
        if self._member.fenced:
            hold = Hold("this_instance", "fenced: no heartbeat succeeded lately", "to have joined the fleet")
            return replace(base, holds=self._dated((hold,)))
        store = self._stores[protocol.AUTHORITY[known.phase]]
        if not await store.acquire_lease(LEASE, self._holder, self._lease_s):
            return replace(base, leader=await store.leader(LEASE))
        view = await self._with_members(await self._copies())
        record = protocol.highest(view.copies.values())
        if record is None:
            hold = Hold("record_not_lost", "no store has the fleet record", f"the record of epoch {known.epoch}")
            return replace(base, leads=True, holds=self._dated((hold,)))
        shared = tuple(shared_names(view.members))
        base = replace(base, record=record, leads=True, members=view.members, shared_names=shared)
        await self._forget()
        decided = decision.decide(view, self._authority)
        if decided.move is not None:
            return await self._move(record, view, decided, base, done)
        return await self._do(decided, base, done)

    async def _do(self, decided: Decision, base: Outlook, done: list[str]) -> Outlook | None:
        if decided.change is None:
            self._red_since = None
            return replace(base, holds=self._dated(decided.holds))
        new = decided.change.new
        entry: AuditEntry | None = None
        if decided.action == "create":
            entry = self._entry("create", base.record, None, new.phase, by=new.by, why=new.why)
        elif decided.action == "wish":
            entry = self._entry(
                "wish", base.record, new.phase, new.desired, by=self._holder, why=new.force or "configuration"
            )
        if await self._write(decided.change, entry):
            done.append(decided.action)
        return None

    async def _move(
        self, record: FleetRecord, view: View, decided: Decision, base: Outlook, done: list[str]
    ) -> Outlook | None:
        move = decided.move
        if move is None:
            raise ValueError("a move is needed")
        findings = await self.evaluate(record, move)
        red = [f for f in findings if not f.ok]
        if red and record.force is None:
            holds = tuple(Hold(f.gate, f.observed, f.required, f.since_us) for f in red)
            stopped = replace(base, holds=self._dated(decided.holds) + holds, findings=findings)
            if record.preparing is None or not self._tired():
                return stopped
            move = Move(record.phase)  # nothing is to be held back for ever for a step that does not come
        self._red_since = None
        target = move.preparing if move.preparing is not None else move.phase
        forced = bool(red) and record.force is not None
        change = protocol.advance(
            view.copies,
            move,
            by=self._holder if record.force is None else f"{self._holder} (forced)",
            why=record.force if forced and record.force is not None else f"toward {self._toward(record)}",
            at_us=self._clock.now_us(),
        )
        if change is None:
            return replace(base, holds=self._dated(decided.holds), findings=findings)
        action = "prepare" if move.preparing is not None else "abandon" if move.phase == record.phase else "step"
        entry = self._entry(action, record, record.phase, target, by=change.new.by, why=change.new.why, forced=forced)
        if await self._write(change, msgspec.structs.replace(entry, evidence=evidence_of(findings))):
            done.append(f"{action} to {target.label}")
        return None

    @staticmethod
    def _toward(record: FleetRecord) -> str:
        return (record.phase if record.desired is None else record.desired).label

    def _tired(self) -> bool:
        now = self._clock.monotonic()
        if self._red_since is None:
            self._red_since = now
        return now - self._red_since >= PATIENCE

    # -- reading and writing ----------------------------------------------------------------------------------------

    async def _copies(self) -> View:
        answers = await asyncio.gather(*(self._copy(self._stores[s]) for s in STORES))
        copies = {s: a for s, a in zip(STORES, answers, strict=True) if not isinstance(a, StoreError)}
        unreachable = {s: str(a) for s, a in zip(STORES, answers, strict=True) if isinstance(a, StoreError)}
        return View(copies, unreachable)

    @staticmethod
    async def _copy(store: FleetStore) -> FleetRecord | StoreError | None:
        try:
            return await store.read_record()
        except StoreError as error:
            return error

    async def _with_members(self, view: View) -> View:
        """Heartbeats, read after the copies: the order that settling rests on."""
        asked = self._clock.monotonic()
        answers = await asyncio.gather(*(self._rows(self._stores[s]) for s in STORES))
        rows = {s: a for s, a in zip(STORES, answers, strict=True) if not isinstance(a, StoreError)}
        unreachable = dict(view.unreachable)
        unreachable |= {s: str(a) for s, a in zip(STORES, answers, strict=True) if isinstance(a, StoreError)}
        members = self.census.observe(rows, asked_at=asked, answered_at=self._clock.monotonic())
        return View(view.copies, unreachable, members, self.census.complete)

    @staticmethod
    async def _rows(store: FleetStore) -> Sequence[Heartbeat] | StoreError:
        try:
            return await store.heartbeats()
        except StoreError as error:
            return error

    async def _forget(self) -> None:
        for member in self.census.forgettable():
            for store in STORES:
                await self._stores[store].drop_heartbeat(member.heartbeat.key, member.heartbeat.seq)

    async def _write(self, change: Change, entry: AuditEntry | None) -> bool:
        store = self._stores[change.store]
        if entry is not None:
            await store.append_audit(entry)
        written = await store.cas_record(change.expected, change.new)
        if entry is not None:
            await store.append_audit(_completed(entry, written, self._clock.now_us()))
        return written

    async def _refusal(self, store: StoreName) -> StoreError:
        try:
            await self._stores[store].read_record()
        except StoreError as error:
            return error
        return StoreError(store, RetryClass.TRANSIENT, "the fleet record is being changed; try again")

    # -- what is said -----------------------------------------------------------------------------------------------

    def _entry(
        self,
        action: str,
        record: FleetRecord | None,
        source: Phase | None,
        target: Phase | None,
        *,
        by: str,
        why: str,
        forced: bool = False,
    ) -> AuditEntry:
        epoch = (0 if record is None else record.epoch) + (action != "wish")
        return AuditEntry(
            id=self._new_id(),
            outcome="intended",
            action=action,
            by=by,
            why=why,
            at_us=self._clock.now_us(),
            epoch=epoch,
            from_phase=source,
            to_phase=target,
            forced=forced,
        )

    def _finding(self, gate: str, ok: bool, observed: str, required: str) -> Finding:
        self._since.pop((gate, not ok), None)
        since = self._since.setdefault((gate, ok), self._clock.now_us())
        return Finding(gate, ok, observed, required, since)

    def _dated(self, holds: Sequence[Hold]) -> tuple[Hold, ...]:
        found = [(h, self._finding(h.gate, False, h.observed, h.required)) for h in holds]
        return tuple(msgspec.structs.replace(h, since_us=f.since_us) for h, f in found)

    def _publish(self, outlook: Outlook) -> Outlook:
        before, self.outlook = self.outlook, outlook
        held = {h.gate for h in outlook.holds}
        for gate, ok in list(self._since):  # a reason that went away begins anew when it comes back
            if not ok and gate not in held:
                del self._since[gate, ok]
        changed = outlook.record != before.record or outlook.shared_names != before.shared_names
        if changed or held != {h.gate for h in before.holds}:
            self._on_change(outlook)
        return outlook


def _completed(entry: AuditEntry, written: bool, at_us: int) -> AuditEntry:
    return msgspec.structs.replace(entry, outcome="done" if written else "lost", at_us=at_us, evidence=())

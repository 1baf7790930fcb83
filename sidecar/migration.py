"""Desired and applied phase of one instance: the one place where the phase turns.

*Desired* is what the configuration (or the control API) asks for; *applied* is what this instance does, and it is
durable: after a restart the applied phase comes from the spool's memory, not from the file, and the file's wish is then
applied by the same rules as any other. ``desired != applied`` is always explained by :attr:`PhaseSwitch.hold`.

RULES (semantics, section 9)

* One adjacent step at a time. A wish further away is held as ``adjacent_step``; with a force reason it is walked step
  by step, each one durable, recorded and published before the next: no step is ever skipped.
* Every step passes its gates; a force reason overrides red ones, and the transition names them.
* ``epoch_conflict``: a wish for another phase whose epoch is not above the applied one moves nothing, force or not. An
  absent epoch is not above one. Intermediate steps of a walk keep the old epoch; the last takes the wish's, so that a
  walk that was interrupted goes on after a restart.
* The first start of a spool applies the configured phase as it is.

ONE STEP, in this order, and what a crash or a failure at each stage leaves:

1. gates are evaluated. Red, and not forced: held; nothing has changed.
2. ``strengthen(store)`` for every store that the target requires: best-effort obligations become required. A failure:
   held (Busy) or raised (SpoolFailed); a crash: the old phase with stronger obligations, which is harmless and
   idempotent.
3. ``memory.set``: phase, epoch and history in one durable value. A failure that stored nothing (Busy): held, old phase.
   A crash before it: old phase at the next start. A crash after it: new phase at the next start.
4. ``policy`` is replaced, one attribute, no await since 3: requests that began before keep the policy they took.
5. ``strengthen`` again, for records that were stamped with the old policy between 2 and 4. It catches all of them as
   long as intake takes the policy in the same tick in which it hands the records to the spool, whose queue keeps the
   order. A crash before it is made good by :meth:`PhaseSwitch.open`, which strengthens what the applied phase requires.
   A failure (Busy): held, the new phase applied; the next try makes this stage and 6 good before anything else.
6. ``recorder`` and ``on_transition`` are told. The history in the memory is the durable record; theirs are copies.

Wishes are serialised; a caller who goes away (a closed connection) does not interrupt a step.

TO EXTEND: gates are objects handed in (:class:`Gate`), each naming the steps that it guards, so that no gate compares
phases; a red one is looked at again by :meth:`PhaseSwitch.reconsider`, which is level-triggered. In a fleet others
decide: its controller advances the fleet record when the gates are green, and every instance calls
:meth:`PhaseSwitch.follow` with it: the stages from 2 on, in one step whatever the distance, because an instance that
was away passes over what the others have walked.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, Self

import msgspec

from sidecar.clock import Clock
from sidecar.errors import Busy, SidecarError, SpoolRefused
from sidecar.phase import TABLE, Phase, Policy, StoreName, adjacent

HISTORY: Final = 100  # transitions kept in the memory, some 200 bytes each


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """One step that was made; what the history shows."""

    source: Phase | None  # None: the first start
    target: Phase
    epoch: int | None  # in force after the step
    by: str  # who asked: configuration, api, ...
    why: str  # the force reason, or ""
    at_us: int  # wall clock, microseconds
    forced: bool = False
    overridden: tuple[str, ...] = ()  # gates that were red
    evidence_id: str = ""  # of the request that asked for it


class Applied(msgspec.Struct, frozen=True, kw_only=True):
    """What this instance does, as it is kept in the memory (JSON; fields are only ever added)."""

    phase: Phase
    epoch: int | None
    history: tuple[Transition, ...]  # oldest first, at most ``HISTORY``


@dataclass(frozen=True, slots=True)
class Desired:
    """What is asked for. ``force`` is the reason for overriding gates, None to respect them.

    ``overridden`` names red gates that whoever asks has looked at and overrides; they are recorded with the step.
    """

    phase: Phase
    epoch: int | None = None
    force: str | None = None
    by: str = "configuration"
    why: str = ""
    overridden: tuple[str, ...] = ()
    evidence_id: str = ""


@dataclass(frozen=True, slots=True)
class GateResult:
    """What one gate found."""

    gate: str
    ok: bool
    observed: str
    required: str


@dataclass(frozen=True, slots=True)
class Hold:
    """Why the applied phase is not the desired one; ``since_us`` is when this gate began to hold (wall clock)."""

    gate: str
    observed: str
    required: str
    since_us: int


class Gate(Protocol):
    """A condition of some steps."""

    @property
    def name(self) -> str:
        """As it is reported, e.g. ``no_open_gap``."""
        ...

    @property
    def steps(self) -> frozenset[tuple[Phase, Phase]]:
        """The steps (from, to) that it guards."""
        ...

    async def evaluate(self) -> GateResult:
        """Look now. A SidecarError that it raises counts as red, with the error as what was observed."""
        ...


class PhaseMemory(Protocol):
    """One durable value; the spool's meta table is behind it."""

    async def get(self) -> bytes | None:
        """The value that was set last, None if there never was one. Raises SpoolFailed."""
        ...

    async def set(self, value: bytes) -> None:
        """Return when ``value`` is on disk. Raises Busy when nothing was stored, SpoolFailed when that is unknown."""
        ...


Strengthen = Callable[[StoreName], Awaitable[object]]
"""Make every best-effort obligation to the store required. Idempotent. Raises Busy or SpoolFailed."""


async def _record_nothing(_transition: Transition) -> None:
    """The recorder of an instance whose history is the memory alone."""


class PhaseSwitch:
    """Holds the applied policy and turns it.

    ``policy`` is what the hot path reads: one attribute, replaced whole. Everything else is for people.
    """

    def __init__(
        self,
        applied: Applied,
        memory: PhaseMemory,
        *,
        strengthen: Strengthen,
        clock: Clock,
        gates: Sequence[Gate] = (),
        recorder: Callable[[Transition], Awaitable[object]] = _record_nothing,
        on_transition: Sequence[Callable[[Transition], None]] = (),
        on_hold: Sequence[Callable[[Hold | None], None]] = (),
    ) -> None:
        self.policy: Policy = TABLE[applied.phase]
        self.applied = applied
        self.desired = Desired(applied.phase, applied.epoch)
        self.hold: Hold | None = None
        self.results: tuple[GateResult, ...] = ()  # of the last evaluation
        self._memory = memory
        self._strengthen = strengthen
        self._clock = clock
        self._gates = gates
        self._recorder = recorder
        self._on_transition = on_transition
        self._on_hold = on_hold
        self._unfinished: Transition | None = None  # published, but not past stage 5
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[Hold | None]] = set()

    @classmethod
    async def open(
        cls,
        memory: PhaseMemory,
        desired: Desired,
        *,
        strengthen: Strengthen,
        clock: Clock,
        gates: Sequence[Gate] = (),
        recorder: Callable[[Transition], Awaitable[object]] = _record_nothing,
        on_transition: Sequence[Callable[[Transition], None]] = (),
        on_hold: Sequence[Callable[[Hold | None], None]] = (),
        stay: bool = False,
    ) -> Self:
        """The switch as the memory says, or as desired where the memory is empty; then apply what is desired.

        ``stay``: what the memory says stays in force: others than the configuration decide.

        Raises:
            SpoolRefused: the memory holds something that this version cannot read.
            Busy: there is no room to remember the first phase.
            SpoolFailed: the disk failed.
        """
        value = await memory.get()
        first: Transition | None = None
        if value is None:
            first = Transition(
                source=None,
                target=desired.phase,
                epoch=desired.epoch,
                by=desired.by,
                why="first start",
                at_us=clock.now_us(),
            )
            applied = Applied(phase=desired.phase, epoch=desired.epoch, history=(first,))
            await memory.set(msgspec.json.encode(applied))
        else:
            applied = _remembered(value)
        switch = cls(
            applied,
            memory,
            strengthen=strengthen,
            clock=clock,
            gates=gates,
            recorder=recorder,
            on_transition=on_transition,
            on_hold=on_hold,
        )
        await switch._strengthen_for(switch.policy)
        if first is not None:
            await switch._tell(first)
        wish = switch.desired if stay else desired
        await switch.desire(wish.phase, wish.epoch, wish.force, wish.by)
        return switch

    async def desire(
        self, phase: Phase, epoch: int | None = None, force: str | None = None, by: str = "configuration"
    ) -> Hold | None:
        """Ask for a phase; returns why it is not applied, or None when it is. Raises as :meth:`ask`."""
        return await self.ask(Desired(phase, epoch, force, by))

    async def ask(self, desired: Desired) -> Hold | None:
        """The same, with all that may be said of a wish.

        Raises:
            SpoolFailed: the disk failed; the applied phase is known again after the next start.
        """
        return await self._in_turn(desired)

    async def follow(self, phase: Phase, *, epoch: int | None, by: str, why: str, forced: bool = False) -> None:
        """Apply what a fleet decided: no rule and no gate, any distance. Raises Busy, SpoolFailed: call it again."""
        async with self._turn:
            await self._finish()
            self.desired = Desired(phase, epoch, None, by)
            self._held(None)
            if self.applied.phase != phase:
                source = self.applied.phase
                await self._step(
                    Transition(
                        source=source,
                        target=phase,
                        epoch=epoch,
                        by=by,
                        why=why,
                        at_us=self._clock.now_us(),
                        forced=forced,
                    )
                )
            elif self.applied.epoch != epoch:
                await self._remember(msgspec.structs.replace(self.applied, epoch=epoch))

    async def findings(self, target: Phase) -> tuple[GateResult, ...]:
        """What the gates of the step from the applied phase to ``target`` say now; nothing is changed."""
        return await self._evaluate(self.applied.phase, target)

    async def reconsider(self) -> Hold | None:
        """Try the last wish again where it is held; cheap where nothing is. Raises as :meth:`desire` does."""
        if self.hold is None:
            return None
        return await self._in_turn(None)

    async def run(self, interval: float) -> None:
        """Reconsider every ``interval`` seconds until cancelled."""
        while True:
            await self._clock.sleep(interval)
            await self.reconsider()

    async def _in_turn(self, desired: Desired | None) -> Hold | None:
        async def turn() -> Hold | None:
            async with self._turn:
                self.desired = desired or self.desired
                try:
                    reason = await self._approach(self.desired)
                except Busy as error:
                    reason = "spool_room", str(error), "room in the spool for the change of phase"
                return self._held(reason)

        task = asyncio.create_task(turn())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _approach(self, desired: Desired) -> tuple[str, str, str] | None:
        """Step towards ``desired`` as far as the rules allow; (gate, observed, required) of what stops it."""
        await self._finish()
        walked = not adjacent(self.applied.phase, desired.phase)
        while self.applied.phase != desired.phase:
            source = self.applied.phase
            target = Phase(source + (1 if desired.phase > source else -1))
            refusal = self._rules(desired)
            if refusal is not None:
                return refusal
            self.results = await self._evaluate(source, target)
            red = tuple(result for result in self.results if not result.ok)
            if red and desired.force is None:
                return red[0].gate, red[0].observed, red[0].required
            transition = Transition(
                source=source,
                target=target,
                epoch=self.applied.epoch if target != desired.phase or desired.epoch is None else desired.epoch,
                by=desired.by,
                why=desired.force or desired.why,
                at_us=self._clock.now_us(),
                forced=walked or bool(red) or bool(desired.overridden),
                overridden=(*desired.overridden, *(result.gate for result in red)),
                evidence_id=desired.evidence_id,
            )
            await self._step(transition)
        if desired.epoch is not None and (self.applied.epoch is None or desired.epoch > self.applied.epoch):
            await self._remember(msgspec.structs.replace(self.applied, epoch=desired.epoch))
        return None

    def _rules(self, desired: Desired) -> tuple[str, str, str] | None:
        applied = self.applied
        if applied.epoch is not None and (desired.epoch is None or desired.epoch <= applied.epoch):
            seen = "no phase_epoch" if desired.epoch is None else f"phase_epoch {desired.epoch}"
            return "epoch_conflict", seen, f"a phase_epoch above {applied.epoch} to change the phase"
        if not adjacent(applied.phase, desired.phase) and desired.force is None:
            return (
                "adjacent_step",
                f"{applied.phase.label} to {desired.phase.label}, {abs(desired.phase - applied.phase)} steps",
                "one step at a time, or phase_force with a reason to walk them all",
            )
        return None

    async def _evaluate(self, source: Phase, target: Phase) -> tuple[GateResult, ...]:
        results: list[GateResult] = []
        for gate in self._gates:
            if (source, target) not in gate.steps:
                continue
            try:
                results.append(await gate.evaluate())
            except SidecarError as error:
                results.append(GateResult(gate.name, ok=False, observed=str(error), required="an answer"))
        return tuple(results)

    async def _step(self, transition: Transition) -> None:
        policy = TABLE[transition.target]
        await self._strengthen_for(policy)
        history = (*self.applied.history, transition)[-HISTORY:]
        await self._remember(Applied(phase=transition.target, epoch=transition.epoch, history=history))
        self.policy = policy
        self._unfinished = transition
        await self._finish()

    async def _finish(self) -> None:
        if self._unfinished is None:
            return
        await self._strengthen_for(self.policy)
        transition, self._unfinished = self._unfinished, None
        await self._tell(transition)

    async def _remember(self, applied: Applied) -> None:
        await self._memory.set(msgspec.json.encode(applied))
        self.applied = applied

    async def _strengthen_for(self, policy: Policy) -> None:
        for store in sorted(policy.required):
            await self._strengthen(store)

    async def _tell(self, transition: Transition) -> None:
        for listener in self._on_transition:
            listener(transition)
        await self._recorder(transition)

    def _held(self, reason: tuple[str, str, str] | None) -> Hold | None:
        before = self.hold
        if reason is None:
            self.hold = None
        else:
            since = before.since_us if before is not None and before.gate == reason[0] else self._clock.now_us()
            self.hold = Hold(*reason, since_us=since)
        if (before and before.gate) != (self.hold and self.hold.gate):
            for listener in self._on_hold:
                listener(self.hold)
        return self.hold


def _remembered(value: bytes) -> Applied:
    try:
        return msgspec.json.decode(value, type=Applied)
    except msgspec.MsgspecError as error:
        raise SpoolRefused(
            f"the applied phase in the spool cannot be read ({error}); start the version that wrote it"
        ) from None

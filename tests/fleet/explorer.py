"""Every reachable state of the fleet protocol, breadth first: N instances, two stores, any number of controllers.

WHAT IS EXPLORED. The decisions are the product's own (``sidecar.fleet.protocol``); this module adds only the world:
every interleaving of single store operations, with crashes and restarts, and delays without bound. A partition or a
store that is down is an operation that does not happen (yet), and every reader may see either copy, both or none.

WHAT MAKES IT FINITE, and why nothing is lost:

* *Epochs are relative.* The rules only compare epochs, so a state keeps each one's distance from the highest copy. The
  exploration thus covers walks of any length, up and down.
* *Time is order.* A fence may lapse at any moment (any time may pass between two steps). An observer may count an
  instance out only when its fence has lapsed: that is what ``fence_after`` plus margin on the observer's clock buys.
* *Controllers have no state.* Everything that a controller has read and acts upon later is either compared at the write
  (the record) or stays true once seen (a copy reached an epoch; an instance applied it, or had lapsed, or had not
  announced itself). So what any controller saw is kept as two bits for each instance (``seen``: nothing older than the
  highest epoch can come from it by way of this store), and any controller may act on them at any later time.
* *Instances are interchangeable*: states that differ by a permutation are one.
* ``eager=True``: evidence and the settling that follows from it happen as soon as they can. They only ever permit more,
  and never undo anything, so every history with a later observation is contained. It is used for three instances; the
  plain form (rows of heartbeats, one look at one store at a time) for two.

An instance's life: ``OUT`` (started or lapsed; fenced) -> ``TOLD`` (announced; fenced) -> ``READ`` (has read, not yet
applied; fenced) -> ``IN`` (unfenced) -> ``OUT`` ... A crash forgets what it had applied.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from sidecar.fleet import protocol
from sidecar.fleet_tables import FleetRecord
from sidecar.phase import DYNAMODB, POSTGRES, STORES, Phase, StoreName

OUT, TOLD, READ, IN = "out", "told", "read", "in"
ABSENT, BEHIND, CURRENT = 0, 1, 2  # what a heartbeat row says of the highest epoch
BASE = 10  # epoch of the highest copy when records are rebuilt; distances count down from it


class Copy(NamedTuple):
    """A record: how many epochs behind the highest copy, and what it says."""

    lag: int
    phase: int
    preparing: int | None
    settled: bool = False


class Instance(NamedTuple):
    """One process. ``record`` is what it has applied (IN, or remembered) or has read (READ)."""

    stage: str = OUT
    record: Copy | None = None
    rows: tuple[int, int] = (ABSENT, ABSENT)
    seen: tuple[bool, bool] = (False, False)


class State(NamedTuple):
    """The world between two atomic steps."""

    copies: tuple[Copy | None, Copy | None]  # as STORES: PostgreSQL, DynamoDB
    instances: tuple[Instance, ...]


class Found(NamedTuple):
    """A violation: which invariant, how it comes about, and the state."""

    reason: str
    trace: list[str]
    state: State


@dataclass(frozen=True)
class World:
    """What is explored. ``without`` names rules that are taken away."""

    instances: int
    eager: bool = False
    symmetric: bool = True  # False: traces name the same instance by the same number throughout
    born: tuple[Phase, ...] = tuple(Phase)  # phases that the first record may have
    without: frozenset[str] = field(default_factory=frozenset)


RULES = {
    "fence": "an instance that cannot send heartbeats stops",
    "wait": "a step waits until all have applied the current epoch",
    "mirror": "an epoch is settled only when both copies have it",
    "order": "a change begins at the authority of the phase that is left",
    "compare": "a write compares with what was read",
    "announce": "an instance announces itself before it reads",
    "reread": "a lapsed instance reads the record before it goes on",
    "both": "heartbeats are read in both stores",
    "monotone": "an instance never applies an older record than it has",
    "prepare": "release is forbidden before a step into a phase that reads",
    "first": "the first record is created in PostgreSQL, after hearing from both stores where the phase needs both",
}


@cache
def record_of(copy: Copy | None) -> FleetRecord | None:
    """The product's record for a relative one."""
    if copy is None:
        return None
    epoch = BASE - copy.lag
    return FleetRecord(
        epoch,
        Phase(copy.phase),
        "",
        "",
        0,
        revision=2 * epoch + copy.settled,
        preparing=None if copy.preparing is None else Phase(copy.preparing),
        settled=copy.settled,
    )


def _copy(record: FleetRecord | None) -> Copy | None:
    if record is None:
        return None
    return Copy(
        BASE - record.epoch,
        int(record.phase),
        None if record.preparing is None else int(record.preparing),
        record.settled,
    )


def is_settled(state: State) -> bool:
    """True if the highest epoch is recorded as settled."""
    return any(c is not None and c.lag == 0 and c.settled for c in state.copies)


@cache
def _order(instance: Instance) -> str:
    return repr(instance)


def _named(move: protocol.Move) -> str:
    return f"step to {move.phase.label}" + (" (preparing)" if move.preparing is not None else "")


def _bare(copy: Copy | None) -> Copy | None:
    return None if copy is None else copy._replace(settled=False)


class Explorer:
    """Breadth-first search; see the module's docstring."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.without = world.without
        self.parents: dict[State, tuple[State | None, str]] = {}
        self.steps = 0
        self._local = cache(self._local_steps)
        self._global = cache(self._copy_steps)

    # -- the copies -------------------------------------------------------------------------------------------------

    def _visible(self, copies: tuple[Copy | None, Copy | None]) -> Iterator[dict[StoreName, FleetRecord | None]]:
        records = tuple(record_of(c) for c in copies)
        for names in (STORES, (POSTGRES,), (DYNAMODB,)):
            yield {s: r for s, r in zip(STORES, records, strict=True) if s in names}

    def _copy_steps(
        self, copies: tuple[Copy | None, Copy | None]
    ) -> list[tuple[str, tuple[Copy | None, Copy | None], bool]]:
        """Writes to the copies that some controller may do now: (label, copies, whether the highest epoch grew)."""
        found: dict[tuple[tuple[Copy | None, Copy | None], bool], str] = {}

        def write(change: protocol.Change, what: str) -> None:
            index = STORES.index(change.store)
            current = record_of(copies[index])
            if current != change.expected and "compare" not in self.without:
                return
            new = list(map(record_of, copies))
            new[index] = change.new
            grew = change.new.epoch > BASE
            shift = 1 if grew else 0
            after = tuple(None if r is None else _copy(r)._replace(lag=BASE + shift - r.epoch) for r in new)
            found.setdefault(((after[0], after[1]), grew), f"{what} in {change.store}")

        for seen in self._visible(copies):
            for phase in self.world.born:
                if protocol.may_create(phase, seen, tuple(seen)):
                    write(
                        protocol.Change(protocol.FIRST, None, FleetRecord(BASE, phase, "", "", 0, 2 * BASE)),
                        f"create {phase.label}",
                    )
                elif "first" in self.without:
                    for store, record in seen.items():
                        if record is None:
                            write(
                                protocol.Change(store, None, FleetRecord(BASE, phase, "", "", 0, 2 * BASE)),
                                f"create {phase.label}",
                            )
            if len(seen) == len(STORES) and (change := protocol.mirror(seen)) is not None:
                write(change, "mirror")
            top = protocol.highest(seen.values())
            if top is None:
                continue
            for move in self._moves(top):
                for change in self._advances(seen, top, move):
                    write(change, _named(move))
        if "compare" in self.without:  # a controller that read the previous epoch, and slept, writes over this one
            for old in map(record_of, copies):
                if old is not None and old.epoch == BASE - 1 and old.settled:
                    for move in self._moves(old):
                        change = protocol.advance({protocol.AUTHORITY[old.phase]: old}, move, by="", why="", at_us=0)
                        if change is not None:
                            write(change, "(late) " + _named(move))
        return [(what, after, grew) for (after, grew), what in found.items()]

    def _moves(self, record: FleetRecord) -> set[protocol.Move]:
        moves = {m for d in Phase if (m := protocol.next_move(record, d)) is not None}
        if "prepare" in self.without:
            moves = {protocol.Move(m.preparing) if m.preparing is not None else m for m in moves}
        return moves

    def _advances(
        self, seen: dict[StoreName, FleetRecord | None], record: FleetRecord, move: protocol.Move
    ) -> Iterator[protocol.Change]:
        change = protocol.advance(seen, move, by="", why="", at_us=0)
        if change is not None:
            yield change
        if "order" in self.without and record.settled:
            for store, held in seen.items():
                if held == record:
                    forged = {protocol.AUTHORITY[record.phase]: record}
                    change = protocol.advance(forged, move, by="", why="", at_us=0)
                    if change is not None:
                        yield protocol.Change(store, record, change.new)

    # -- one instance -----------------------------------------------------------------------------------------------

    def _local_steps(self, me: Instance, copies: tuple[Copy | None, Copy | None]) -> list[tuple[str, Instance]]:
        steps: list[tuple[str, Instance]] = []

        def to(label: str, **changes: object) -> None:
            new = me._replace(**changes)  # type: ignore[arg-type]
            if new != me:
                steps.append((label, new))

        says = CURRENT if me.record is not None and me.record.lag == 0 and me.stage in (OUT, TOLD, IN) else BEHIND
        if me.stage == READ:
            says = BEHIND
        for index, store in enumerate(STORES):
            rows = tuple(max(r, says) if i == index else r for i, r in enumerate(me.rows))
            if me.stage == OUT:
                stage = IN if "reread" in self.without and me.record is not None else TOLD
                to(f"announces in {store}", stage=stage, rows=rows)
            else:
                to(f"heartbeat to {store}", rows=rows)
            copy = _bare(copies[index])
            if copy is None:
                continue
            kept = (
                copy
                if "monotone" in self.without
                else _bare(_copy(protocol.adopt(record_of(me.record), (record_of(copy),))))
            )
            if me.stage in (TOLD, READ) or (me.stage == OUT and "announce" in self.without):
                to(f"reads {store}", stage=READ, record=kept)
            elif me.stage == IN:
                to(f"reads and applies {store}", record=kept)
        if me.stage == READ:
            to("applies", stage=IN)
        if me.stage != OUT and "fence" not in self.without:
            to("lapses", stage=OUT)
        to("crashes and restarts", stage=OUT, record=None, rows=(ABSENT, ABSENT))
        return steps

    # -- evidence ---------------------------------------------------------------------------------------------------

    def _may_look(self, copies: tuple[Copy | None, Copy | None]) -> bool:
        if "mirror" in self.without:
            return any(c is not None for c in copies)
        return protocol.mirrored({s: record_of(c) for s, c in zip(STORES, copies, strict=True)})

    def _look(self, me: Instance, store: int) -> Instance:
        """What a controller that reads this store's heartbeats now may conclude."""
        row = me.rows[store]
        silent = me.stage == OUT or "fence" in self.without
        if row == CURRENT or silent or "wait" in self.without:
            return me._replace(seen=(True, True))
        if row == ABSENT:
            return me._replace(seen=tuple(s or i == store for i, s in enumerate(me.seen)))
        return me

    def _settle(self, state: State) -> State:
        if not all(all(i.seen) for i in state.instances):
            return state
        copies = tuple(None if c is None else (c._replace(settled=True) if c.lag == 0 else c) for c in state.copies)
        return state._replace(copies=copies)

    # -- the graph --------------------------------------------------------------------------------------------------

    def successors(self, state: State) -> Iterator[tuple[str, State]]:
        for what, copies, grew in self._global(state.copies):
            instances = state.instances
            if grew:
                instances = tuple(self._older(i) for i in instances)
            yield f"controller: {what}", State(copies, instances)
        for index, me in enumerate(state.instances):
            for what, new in self._local(me, state.copies):
                yield (
                    f"instance {index + 1} {what}",
                    state._replace(instances=(*state.instances[:index], new, *state.instances[index + 1 :])),
                )
        if not self.world.eager and not is_settled(state) and self._may_look(state.copies):
            for index, store in enumerate(STORES):
                looked = state._replace(instances=tuple(self._look(i, index) for i in state.instances))
                if "both" in self.without and index == 0:
                    looked = state._replace(
                        instances=tuple(
                            i._replace(seen=(True, True)) if n.seen[0] else i
                            for i, n in zip(state.instances, looked.instances, strict=True)
                        )
                    )
                yield f"controller reads heartbeats in {store}", looked
            yield "controller settles the epoch", self._settle(state)

    def _older(self, me: Instance) -> Instance:
        record = None if me.record is None else me.record._replace(lag=me.record.lag + 1)
        if record is not None and record.lag > 1 and me.stage != IN:
            record = None  # every copy is newer: whatever it reads wins
        rows = tuple(min(r, BEHIND) for r in me.rows)
        return Instance(me.stage, record, (rows[0], rows[1]), (False, False))

    def canonical(self, state: State) -> State:
        """One representative of the states that behave alike."""
        if self.world.eager:
            instances = tuple(i._replace(rows=(ABSENT, ABSENT)) for i in state.instances)
            if not is_settled(state) and self._may_look(state.copies):
                instances = tuple(
                    i._replace(seen=(True, True))
                    if i.stage == OUT or (i.record is not None and i.record.lag == 0)
                    else i
                    for i in instances
                )
            state = self._settle(state._replace(instances=instances))
        instances = state.instances
        if is_settled(state):  # evidence is used up
            instances = tuple(i._replace(seen=(False, False)) for i in instances)
        if self.world.symmetric:
            instances = tuple(sorted(instances, key=_order))
        return state._replace(instances=instances)

    def run(self, violated: Callable[[State], str | None], limit: int = 1_000_000) -> Found | None:
        """Explore; the first violation found with a shortest trace to it, or None after every state was visited."""
        start = self.canonical(State((None, None), (Instance(),) * self.world.instances))
        self.parents = {start: (None, "start")}
        queue = deque([start])
        while queue:
            state = queue.popleft()
            for label, raw in self.successors(state):
                self.steps += 1
                new = self.canonical(raw)
                if new in self.parents:
                    continue
                self.parents[new] = (state, label)
                if (reason := violated(new)) is not None:
                    return Found(reason, self.trace(new), new)
                queue.append(new)
                if len(self.parents) > limit:
                    raise AssertionError(f"more than {limit} states: the abstraction no longer bounds them")
        return None

    def trace(self, state: State) -> list[str]:
        """What happened from the start to ``state``."""
        lines: list[str] = []
        at: State | None = state
        while at is not None:
            at, label = self.parents[at]
            lines.append(label)
        return lines[::-1]

    def graph(self) -> tuple[list[State], list[list[int]]]:
        """After ``run``: all states, and for each the states from which one step leads to it."""
        states = list(self.parents)
        number = {state: n for n, state in enumerate(states)}
        sources: list[list[int]] = [[] for _ in states]
        for n, state in enumerate(states):
            for _, raw in self.successors(state):
                sources[number[self.canonical(raw)]].append(n)
        return states, sources

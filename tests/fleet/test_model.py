"""The protocol, explored exhaustively: its invariants hold, and each of its rules is needed.

Numbers at the time of writing: three instances 5,148 states and 78,000 steps (1 s); two instances with heartbeats,
looks and settling one by one 117,190 states and 1.2 million steps (5 s). The plain form was also run once for three
instances: 6,369,012 states, 89 million steps, 7 minutes, no violation.
"""

from collections import deque
from collections.abc import Callable
from functools import cache

import pytest

from sidecar.fleet import protocol
from sidecar.phase import POSTGRES, STORES, TABLE, Phase, adjacent
from tests.fleet.explorer import IN, RULES, Copy, Explorer, State, World, is_settled, record_of

SAFETY = "two unfenced instances, and one reads from a store that the other does not write"
RELEASE = "an instance may release backlog to a store from which a later one reads"
COPIES = "the copies are more than one permitted step apart, or differ at one epoch"
BEHIND = "an unfenced instance is more than one epoch behind"


@cache
def _pair(a: Copy, b: Copy) -> str | None:
    first, second = record_of(a), record_of(b)
    assert first is not None
    assert second is not None
    if not protocol.compatible(protocol.policy_of(first), protocol.policy_of(second)):
        return SAFETY
    early, late = (first, second) if first.epoch < second.epoch else (second, first)
    if early.epoch < late.epoch and protocol.policy_of(late).reads_from in protocol.releasable(early):
        forward = late.phase > early.phase  # 2->1 may release while a last one still reads: docs/FLEET.md
        return RELEASE if forward else None
    return None


def unsafe(state: State) -> str | None:
    """S1 and S5: what a user would lose by."""
    working = [i.record for i in state.instances if i.stage == IN and i.record is not None]
    for n, a in enumerate(working):
        for b in working[:n]:
            if (reason := _pair(a, b)) is not None:
                return reason
    return None


@cache
def _copies(a: Copy | None, b: Copy | None) -> str | None:
    if a is None or b is None:
        return COPIES if (a or b or Copy(0, 0, None)).lag > 0 else None
    if a.lag == b.lag:
        return COPIES if a[:3] != b[:3] else None
    early, late = record_of(max(a, b)), record_of(min(a, b))
    assert early is not None
    assert late is not None
    permitted = {protocol.next_move(early, desired) for desired in Phase}
    allowed = protocol.Move(late.phase, late.preparing) in permitted and late.epoch == early.epoch + 1
    return None if allowed else COPIES


def violated(state: State) -> str | None:
    """All safety invariants, the inductive ones too: S1, S2, S3, S5 (S4 is the shape of the explorer's instances)."""
    if (reason := unsafe(state) or _copies(*state.copies)) is not None:
        return reason
    if any(i.stage == IN and i.record is not None and i.record.lag > 1 for i in state.instances):
        return BEHIND
    return None


def _describe(trace: list[str]) -> str:
    return "\n".join(f"  {n:2} {line}" for n, line in enumerate(trace))


def _reaches(explorer: Explorer, goal: Callable[[State], bool]) -> tuple[int, int]:
    """(states, states from which the goal can be reached)."""
    states, sources = explorer.graph()
    good = {n for n, state in enumerate(states) if goal(state)}
    queue = deque(good)
    while queue:
        for source in sources[queue.popleft()]:
            if source not in good:
                good.add(source)
                queue.append(source)
    return len(states), len(good)


@pytest.fixture(scope="module")
def three() -> Explorer:
    """Three instances, two stores, everything visited."""
    explorer = Explorer(World(3, eager=True))
    found = explorer.run(violated)
    assert found is None, f"{found.reason}\n{_describe(found.trace)}"
    return explorer


@pytest.fixture(scope="module")
def two() -> Explorer:
    """Two instances without the eager reduction, everything visited."""
    explorer = Explorer(World(2))
    found = explorer.run(violated)
    assert found is None, f"{found.reason}\n{_describe(found.trace)}"
    return explorer


def test_the_phases_that_may_coexist_are_exactly_the_equal_and_the_adjacent() -> None:
    """What S1 demands of reads and writes is what the table of phases calls adjacent."""
    for a in Phase:
        for b in Phase:
            assert protocol.compatible(TABLE[a], TABLE[b]) == (a == b or adjacent(a, b))


def test_three_instances_and_two_stores_keep_every_invariant(three: Explorer) -> None:
    """No interleaving of crashes, lapses, partitions and controllers breaks S1, S2, S3 or S5."""
    phases = {(c.phase, c.preparing) for state in three.parents for c in state.copies if c is not None}
    assert phases == {(0, None), (1, None), (1, 2), (2, None), (3, None)}
    mixed = {
        tuple(sorted({i.record.phase for i in state.instances if i.stage == IN and i.record is not None}))
        for state in three.parents
    }
    assert {(0, 1), (1, 2), (2, 3)} <= mixed, "the exploration must see fleets in mid-step, or it proves nothing"


def test_two_instances_keep_every_invariant_with_heartbeats_read_one_store_at_a_time(two: Explorer) -> None:
    """The same without the reduction that is used for three."""
    assert len(two.parents) > 50_000


def test_the_reduction_for_three_instances_contains_every_behaviour(two: Explorer) -> None:
    """Whatever two instances and the copies can do in the plain form, they can do in the reduced one."""

    def shape(state: State) -> object:
        instances = sorted((i.stage, repr(i.record)) for i in state.instances)
        return tuple(c and c[:3] for c in state.copies), tuple(instances)

    reduced = Explorer(World(2, eager=True))
    assert reduced.run(violated) is None
    assert {shape(s) for s in two.parents} <= {shape(s) for s in reduced.parents}


def test_nobody_stays_fenced_for_ever(three: Explorer) -> None:
    """From every state all instances can come to work at the highest epoch, with both copies at it (L1)."""

    def healthy(state: State) -> bool:
        return all(i.stage == IN and i.record is not None and i.record.lag == 0 for i in state.instances) and all(
            c is not None and c.lag == 0 for c in state.copies
        )

    states, good = _reaches(three, healthy)
    assert states == good


@pytest.mark.parametrize("phase", list(Phase))
def test_no_state_is_a_dead_end(three: Explorer, phase: Phase) -> None:
    """From every state every phase can be reached by both copies (L1)."""
    states, good = _reaches(three, lambda s: all(c is not None and c.phase == phase for c in s.copies))
    assert states == good


def test_a_settled_fleet_steps_back_with_dynamodb_down(three: Explorer) -> None:
    """In phases 1 and 2, once settled, the step down needs nothing but PostgreSQL."""
    checked = 0
    for state in three.parents:
        top = protocol.highest(map(record_of, state.copies))
        if top is None or not is_settled(state) or top.phase not in (Phase.DUAL_WRITE, Phase.DUAL_WRITE_READ_DYNAMO):
            continue
        move = protocol.next_move(top, Phase.SQL_ONLY)
        only = {POSTGRES: record_of(state.copies[STORES.index(POSTGRES)])}
        assert move is not None
        assert protocol.advance(only, move, by="", why="", at_us=0) is not None
        checked += 1
    assert checked > 100


def _reads_miss_writes(state: State) -> str | None:
    return reason if (reason := unsafe(state)) == SAFETY else None


@pytest.mark.parametrize("rule", sorted(RULES))
def test_without_a_rule_the_fleet_is_unsafe(rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Take one rule away and two instances come to read and write past each other; the trace is printed."""
    born = (Phase.SQL_ONLY, Phase.DYNAMO_ONLY) if rule == "first" else (Phase.DUAL_WRITE_READ_DYNAMO,)
    judge = _reads_miss_writes
    if rule == "prepare":
        born, judge = (Phase.DUAL_WRITE,), unsafe
    found = Explorer(World(2, symmetric=False, born=born, without=frozenset({rule}))).run(judge)
    assert found is not None, f"nothing breaks without: {RULES[rule]}"
    with capsys.disabled():
        print(f"\nwithout '{rule}' ({RULES[rule]}): {found.reason}\n{_describe(found.trace)}")
    assert found.reason == (RELEASE if rule == "prepare" else SAFETY)
    assert len(found.trace) < 20, "a shortest trace: longer ones say that the model has changed"

"""What a controller does with what it has read: which wish counts, in which order things are done, what holds them."""

import msgspec
import pytest

from sidecar.fleet import FleetRecord, Heartbeat, Hold, Member, Move, Presence, Wish, protocol
from sidecar.fleet.decision import View, accepted, create, decide
from sidecar.phase import DYNAMODB, POSTGRES, STORES, Phase, StoreName

SQL, DUAL, BOTH, DYNAMO = Phase


def record(epoch: int = 5, phase: Phase = DUAL, **more: object) -> FleetRecord:
    """A settled record without a wish."""
    more.setdefault("settled", True)
    more.setdefault("revision", 2 * epoch)
    return FleetRecord(epoch, phase, "", "", 0, **more)


def member(name: str, phase: Phase = DUAL, epoch: int = 5, number: int | None = None, **more: object) -> Member:
    """A live instance whose configuration wishes ``phase``."""
    presence = more.pop("presence", Presence.LIVE)
    beat = Heartbeat(
        instance=name,
        incarnation="1",
        seq=1,
        epoch=epoch,
        desired=phase,
        phase_epoch=number,
        force=more.pop("force", None),
    )
    return Member(beat, presence, 0.0)


def view(
    postgres: FleetRecord | None, dynamodb: FleetRecord | None, *members: Member, down: tuple[StoreName, ...] = ()
):
    """Both stores read, but for those that are down."""
    copies = {POSTGRES: postgres, DYNAMODB: dynamodb}
    return View(
        {s: copies[s] for s in STORES if s not in down}, dict.fromkeys(down, "refused"), members, complete=not down
    )


def gates(holds: tuple[Hold, ...]) -> list[str]:
    """Their names."""
    return [hold.gate for hold in holds]


# -- two processes of one name -------------------------------------------------------------------------------------


def named_a(incarnation: str, spool: str, phase: Phase) -> Member:
    """A live process of the instance ``a``."""
    beat = Heartbeat(instance="a", incarnation=incarnation, seq=1, epoch=5, desired=phase, spool=spool)
    return Member(beat, Presence.LIVE, 0.0 if incarnation == "2" else 20.0)


def test_every_process_that_counts_is_heard_whatever_its_name() -> None:
    """With spools of their own they must agree; of one spool the process that went on with it speaks."""
    record = FleetRecord(5, DUAL, "a", "w", 0, settled=True, desired=DUAL)
    for order in (1, -1):
        apart = [named_a("1", "x", Phase.SQL_ONLY), named_a("2", "y", DUAL)][::order]
        assert gates(decide(view(record, record, *apart), "file").holds) == ["configurations_agree"]
        restarted = [named_a("1", "x", Phase.SQL_ONLY), named_a("2", "x", DUAL)][::order]
        assert decide(view(record, record, *restarted), "file").holds == ()


# -- which wish counts ----------------------------------------------------------------------------------------------


def test_without_phase_epoch_all_instances_must_agree() -> None:
    """One that still has the old configuration holds the fleet, and is named."""
    wish, hold = accepted(record(), [member("a", BOTH), member("b", DUAL)])
    assert wish is None
    assert hold is not None
    assert hold.gate == "configurations_agree"
    assert "dual_write: b" in hold.observed
    assert accepted(record(), [member("a", BOTH), member("b", BOTH)]) == (Wish(BOTH), None)


@pytest.mark.parametrize("presence", [Presence.GONE, Presence.DRAINED])
def test_the_configuration_of_one_that_does_not_count_is_ignored(presence: Presence) -> None:
    """The pods of yesterday do not vote."""
    assert accepted(record(), [member("a", BOTH), member("b", DUAL, presence=presence)]) == (Wish(BOTH), None)


def test_the_highest_phase_epoch_wins_and_older_configurations_are_conflicts() -> None:
    """An old ReplicaSet's stale ConfigMap moves nothing, before and after the new wish was recorded."""
    members = [member("new", BOTH, number=7), member("old", SQL, number=6)]
    assert accepted(record(phase_epoch=6, desired=SQL), members) == (Wish(BOTH, 7), None)
    wish, hold = accepted(record(phase_epoch=7, desired=BOTH), members)
    assert wish == Wish(BOTH, 7)
    assert hold is not None
    assert hold.gate == "epoch_conflict"
    assert "old" in hold.observed
    assert "8" in hold.required


@pytest.mark.parametrize("number", [None, 6, 7])
def test_a_changed_phase_with_an_epoch_not_above_the_recorded_one_is_refused(number: int | None) -> None:
    """Also if every instance says so, and also if the epoch was left out."""
    wish, hold = accepted(record(phase_epoch=7, desired=DUAL), [member("a", DYNAMO, number=number)])
    assert wish is None
    assert hold is not None
    assert hold.gate == "epoch_conflict"


def test_one_phase_epoch_with_two_phases_moves_nothing() -> None:
    """Nobody can tell which one is meant."""
    wish, hold = accepted(record(), [member("a", BOTH, number=7), member("b", SQL, number=7)])
    assert wish is None
    assert hold is not None
    assert hold.gate == "epoch_conflict"


def test_a_force_counts_when_all_say_so() -> None:
    """A fleet is not forced by the first pod that reads the new file."""
    some = accepted(record(), [member("a", BOTH, force="because"), member("b", BOTH)])
    every = accepted(record(), [member("a", BOTH, force="because"), member("b", BOTH, force="because")])
    assert some == (Wish(BOTH), None)
    assert every == (Wish(BOTH, None, "because"), None)


# -- the order of things --------------------------------------------------------------------------------------------


def test_the_lagging_copy_comes_first() -> None:
    """Copies are made equal before anything else."""
    decided = decide(view(record(6, SQL, settled=False), record(5), member("a", epoch=6)), "file")
    assert decided.action == "mirror"
    assert decided.change is not None
    assert decided.change.store == DYNAMODB
    assert decided.change.expected == record(5)


def test_an_epoch_is_settled_when_all_that_count_have_applied_it() -> None:
    """The last one is waited for, and named; one that is gone is not."""
    top = record(settled=False, desired=DUAL)
    waiting = decide(view(top, top, member("a"), member("b", epoch=4)), "file")
    assert waiting.change is None
    assert gates(waiting.holds) == ["all_applied"]
    assert "b" in waiting.holds[0].observed
    gone = decide(view(top, top, member("a"), member("b", epoch=4, presence=Presence.GONE)), "file")
    assert gone.action == "settle"
    assert gone.change is not None
    assert gone.change.new.settled
    assert gone.change.new.epoch == top.epoch


def test_nothing_is_settled_while_a_store_is_down() -> None:
    """Its copy and its heartbeats are not known."""
    decided = decide(view(record(settled=False, desired=DUAL), None, member("a"), down=(DYNAMODB,)), "file")
    assert decided.change is None
    assert decided.move is None
    assert gates(decided.holds) == ["both_copies"]


def test_a_settled_fleet_steps_down_with_dynamodb_down() -> None:
    """1->0 and 2->1 need PostgreSQL alone."""
    for phase in (DUAL, BOTH):
        top = record(phase=phase, desired=SQL)
        decided = decide(view(top, None, member("a", SQL), down=(DYNAMODB,)), "file")
        assert decided.move == Move(Phase(phase - 1))


@pytest.mark.parametrize(("phase", "store"), [(SQL, POSTGRES), (DUAL, POSTGRES), (BOTH, POSTGRES), (DYNAMO, DYNAMODB)])
def test_an_unreachable_authority_is_a_hold_and_nothing_else(phase: Phase, store: StoreName) -> None:
    """The other copy is seen, and nothing is changed."""
    top = record(phase=phase)
    decided = decide(view(top, top, member("a", phase), down=(store,)), "file")
    assert (decided.change, decided.move) == (None, None)
    assert gates(decided.holds) == ["authority_reachable"]
    assert store in decided.holds[0].observed


def test_a_wish_is_recorded_before_the_first_move_toward_it() -> None:
    """So that it outlives the instance that brought it; the epoch stays."""
    decided = decide(view(record(), record(), member("a", DYNAMO, number=3)), "file")
    assert decided.action == "wish"
    assert decided.change is not None
    assert (decided.change.new.desired, decided.change.new.phase_epoch) == (DYNAMO, 3)
    assert decided.change.new.epoch == 5
    assert decided.change.new.settled


def test_with_the_api_as_authority_files_are_not_asked() -> None:
    """The record's wish is followed whatever the configurations say."""
    top = record(desired=SQL)
    assert decide(view(top, top, member("a", DYNAMO)), "api").move == Move(SQL)


def test_a_lost_record_is_noticed() -> None:
    """Somebody has applied an epoch that no store has: a restored backup moves nothing until that one has stopped."""
    decided = decide(view(record(), record(), member("a", epoch=6)), "file")
    assert (decided.change, decided.move) == (None, None)
    assert gates(decided.holds) == ["record_not_lost"]
    top = record(desired=SQL)
    stopped = decide(view(top, top, member("a", epoch=6, presence=Presence.DRAINED)), "api")
    assert stopped.move == Move(SQL)


# -- moves and writes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "desired", "moves"),
    [
        (SQL, DYNAMO, [Move(DUAL), Move(DUAL, BOTH), Move(BOTH), Move(DYNAMO)]),
        (DYNAMO, SQL, [Move(BOTH), Move(DUAL), Move(SQL)]),
        (DUAL, DUAL, []),
    ],
)
def test_every_way_is_walked_in_adjacent_steps(start: Phase, desired: Phase, moves: list[Move]) -> None:
    """No wish skips a phase; the step into phase 2 is prepared."""
    top, walked = record(phase=start), []
    while (move := protocol.next_move(top, desired)) is not None:
        walked.append(move)
        copies = {POSTGRES: top, DYNAMODB: top}
        change = protocol.advance(copies, move, by="", why="", at_us=0)
        assert change is not None
        assert not change.new.settled
        assert change.new.epoch == top.epoch + 1
        top = msgspec.structs.replace(change.new, settled=True)
    assert walked == moves


def test_a_preparation_is_given_up_when_the_wish_goes_back() -> None:
    """Phase 1 preparing 2, and phase 1 wished: what may be released may be released again."""
    assert protocol.next_move(record(preparing=BOTH), DUAL) == Move(DUAL)


@pytest.mark.parametrize(
    ("phase", "move", "first"),
    [(BOTH, Move(DYNAMO), POSTGRES), (DYNAMO, Move(BOTH), DYNAMODB), (BOTH, Move(DUAL), POSTGRES)],
)
def test_a_change_is_written_first_where_the_phase_that_is_left_decides(
    phase: Phase, move: Move, first: StoreName
) -> None:
    """2->3 PostgreSQL and then DynamoDB; 3->2 the other way."""
    top = record(phase=phase)
    change = protocol.advance({POSTGRES: top, DYNAMODB: top}, move, by="", why="", at_us=0)
    assert change is not None
    assert change.store == first
    after = {POSTGRES: top, DYNAMODB: top} | {first: change.new}
    second = protocol.mirror(after)
    assert second is not None
    assert second.store == protocol.OTHER[first]


def test_an_unsettled_epoch_has_no_successor() -> None:
    """The next step waits for the last instance and the other copy."""
    top = record(settled=False)
    assert protocol.advance({POSTGRES: top, DYNAMODB: top}, Move(SQL), by="", why="", at_us=0) is None


# -- the first record -----------------------------------------------------------------------------------------------


def test_a_fleet_in_phase_0_is_born_without_dynamodb() -> None:
    """A baseline needs PostgreSQL alone."""
    decided = create(view(None, None, down=(DYNAMODB,)), Wish(SQL, 4), by="a", at_us=1)
    assert decided.change is not None
    assert decided.change.store == POSTGRES
    assert (decided.change.new.epoch, decided.change.new.phase, decided.change.new.phase_epoch) == (1, SQL, 4)


@pytest.mark.parametrize("phase", [DUAL, BOTH, DYNAMO])
@pytest.mark.parametrize("down", STORES)
def test_every_other_fleet_is_born_when_both_stores_have_answered(phase: Phase, down: StoreName) -> None:
    """Or two halves could be born apart; the hold names the store that did not answer."""
    held = create(view(None, None, down=(down,)), Wish(phase), by="a", at_us=1)
    assert held.change is None
    assert gates(held.holds) == ["fleet_record"]
    assert down in held.holds[0].observed
    assert create(view(None, None), Wish(phase), by="a", at_us=1).change is not None

"""Who is alive: by the observer's clock, and gone only beyond doubt. Leases in a store that has no clock."""

import pytest

from sidecar.fleet import Census, Heartbeat, Presence, current, shared_names
from sidecar.phase import DYNAMODB, POSTGRES
from sidecar.stores.lease import Lease, LeaseWatch


def row(seq: int, **more: object) -> Heartbeat:
    """A heartbeat of the one process that is watched: every 10 s, fence 120 s."""
    return Heartbeat(instance="a", incarnation="1", seq=seq, **more)


def see(census: Census, at: float, postgres: Heartbeat | None, dynamodb: Heartbeat | None = None) -> Presence:
    """One observation of both stores, answered a second after it was asked."""
    rows = {POSTGRES: [postgres] if postgres else [], DYNAMODB: [dynamodb] if dynamodb else []}
    (member,) = census.observe(rows, asked_at=at, answered_at=at + 1)
    return member.presence


def test_silent_after_three_heartbeats_and_gone_after_fence_and_margin() -> None:
    """Counted from the answer that showed the row first: 30 s silent, 150 s gone."""
    census = Census()
    assert see(census, 0, row(1)) is Presence.LIVE
    assert see(census, 30.9, row(1)) is Presence.LIVE
    assert see(census, 31, row(1)) is Presence.SILENT
    assert see(census, 150.9, row(1)) is Presence.SILENT
    assert see(census, 151, row(1)) is Presence.GONE
    assert see(census, 152, row(2)) is Presence.LIVE


def test_a_new_observer_waits_the_whole_time_itself() -> None:
    """A row that is years old by its own time stamp is live for an observer that has just come."""
    assert see(Census(), 1e9, row(1, at_us=0)) is Presence.LIVE


def test_a_heartbeat_in_either_store_is_a_sign_of_life() -> None:
    """The newer of two rows counts, wherever it is."""
    census = Census()
    see(census, 0, row(1))
    see(census, 100, row(1), row(2))
    assert see(census, 200, row(1), row(2)) is Presence.SILENT
    assert see(census, 251, row(1), row(2)) is Presence.GONE


def test_nobody_is_gone_while_a_store_does_not_answer() -> None:
    """It may be sending its heartbeats there."""
    census = Census()
    see(census, 0, row(1))
    (member,) = census.observe({POSTGRES: [row(1)]}, asked_at=10_000, answered_at=10_001)
    assert not census.complete
    assert member.presence is Presence.SILENT
    assert member.counts


def test_the_fence_of_the_one_observed_counts() -> None:
    """An instance configured with a longer fence is waited for longer."""
    census = Census()
    patient = row(1, fence_after_s=600.0)
    see(census, 0, patient)
    assert see(census, 700, patient) is Presence.SILENT
    assert see(census, 751, patient) is Presence.GONE


def test_one_that_said_it_stopped_does_not_count() -> None:
    """Drained is known at once."""
    census = Census()
    assert see(census, 0, row(1), row(2, state="drained")) is Presence.DRAINED
    assert not census.members[0].counts


def test_rows_are_forgotten_an_hour_after_they_stopped_counting() -> None:
    """And never one that still counts."""
    census = Census()
    see(census, 0, row(1))
    see(census, 3600, row(1))
    assert census.forgettable() == []
    see(census, 3601, row(1))
    assert [m.heartbeat.seq for m in census.forgettable()] == [1]
    see(census, 3602, row(2))
    assert census.forgettable() == []


@pytest.mark.parametrize("held", [None, Lease("me", 3, 30.0)])
def test_a_free_lease_and_ones_own_may_be_taken(held: Lease | None) -> None:
    """No waiting."""
    assert LeaseWatch().may_take("x", held, "me", 0.0)


def test_anothers_lease_may_be_taken_when_it_was_seen_unchanged_for_its_time() -> None:
    """By the watcher's own clock; a renewal begins the time anew."""
    watch = LeaseWatch()
    assert not watch.may_take("x", Lease("other", 1, 30.0), "me", 0.0)
    assert not watch.may_take("x", Lease("other", 2, 30.0), "me", 29.0)
    assert not watch.may_take("x", Lease("other", 2, 30.0), "me", 58.9)
    assert watch.may_take("x", Lease("other", 2, 30.0), "me", 59.0)


# --- one name, several processes --------------------------------------------------------------------------------------


class Watched:
    """An observer of processes of one name, each ``(incarnation, spool)`` with the number of its last heartbeat."""

    def __init__(self) -> None:
        self.census = Census()
        self.at = 0.0
        self.rows: dict[str, Heartbeat] = {}

    def beat(self, incarnation: str, spool: str, **more: object) -> None:
        known = self.rows.get(incarnation)
        seq = 1 if known is None else known.seq + 1
        self.rows[incarnation] = Heartbeat(instance="a", incarnation=incarnation, spool=spool, seq=seq, **more)

    def look(self, *beating: tuple[str, str]) -> list[str]:
        """Ten seconds later, after a heartbeat of each of these: who speaks for itself."""
        self.at += 10
        for incarnation, spool in beating:
            self.beat(incarnation, spool)
        rows = list(self.rows.values())
        seen = self.census.observe({POSTGRES: rows, DYNAMODB: rows}, asked_at=self.at, answered_at=self.at + 0.1)
        return [member.heartbeat.incarnation for member in current(seen)]

    @property
    def shared(self) -> list[str]:
        return list(shared_names(self.census.members))


def test_two_processes_at_work_under_one_name_are_told_and_both_are_asked() -> None:
    """Each with its own spool; whoever begins to look at both at once needs one heartbeat more of each."""
    for begun in (("1", "x"),), (("1", "x"), ("2", "y")):
        watched = Watched()
        watched.look(*begun)
        for _ in range(2):
            assert watched.look(("1", "x"), ("2", "y")) == ["1", "2"]
        assert watched.shared == ["a"]
        for _ in range(4):
            watched.look(("2", "y"))
        assert watched.shared == [], "the other one is silent"


def test_a_process_that_goes_on_with_the_spool_of_a_dead_one_is_alone() -> None:
    """Killed and started again, whatever an observer saw of the dead one: nothing is shared, it alone is asked."""
    for seen in (1, 5):
        watched = Watched()
        for _ in range(seen):
            watched.look(("1", "x"))
        for _ in range(20):
            assert watched.look(("2", "x")) == ["2"]
            assert watched.shared == []


def test_a_volume_that_was_lost_with_its_pod_is_not_forgotten() -> None:
    """The next pod of that name has an empty spool: what the first one had speaks for itself, and no name is shared."""
    watched = Watched()
    watched.look(("1", "x"))
    for _ in range(20):
        assert watched.look(("2", "y")) == ["1", "2"]
        assert watched.shared == []


def test_a_process_that_does_not_say_its_spool_is_succeeded_by_name() -> None:
    """Of an earlier version; two of them at work at once are told all the same."""
    watched = Watched()
    watched.look(("1", ""))
    assert watched.look(("2", "x")) == ["2"]
    twins = Watched()
    for _ in range(3):
        last = twins.look(("1", ""), ("2", ""))
    assert (last, twins.shared) == (["1", "2"], ["a"])


def test_other_names_are_other_instances() -> None:
    """On whatever spool they say."""
    rows = [Heartbeat(instance=name, incarnation="1", seq=1, spool="x") for name in "ab"]
    census = Census()
    seen = census.observe({POSTGRES: rows, DYNAMODB: rows}, asked_at=0, answered_at=1)
    assert list(current(seen)) == list(seen)
    assert shared_names(seen) == []

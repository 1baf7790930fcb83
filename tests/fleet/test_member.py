"""One instance: it joins by announcing first, works while it is heard, and fences itself when it is not."""

import pytest

from sidecar.errors import Busy, RetryClass, StoreError
from sidecar.fleet import FleetRecord
from sidecar.phase import DYNAMODB, POSTGRES, STORES, TABLE, Delivery, Phase
from tests.fleet.fakes import Fleet

DUAL = FleetRecord(1, Phase.DUAL_WRITE, "", "", 0)


async def born(fleet: Fleet, record: FleetRecord = DUAL) -> None:
    """Both stores hold the record."""
    for server in fleet.servers.values():
        server._record = record


async def test_a_fresh_instance_is_fenced_until_it_has_announced_itself_and_read(fleet: Fleet) -> None:
    """Heartbeat before record, in that order; then it works under the record."""
    await born(fleet)
    member = fleet.member()
    assert member.fenced
    assert member.policy is None
    await member.round(POSTGRES)
    assert fleet.stores[POSTGRES].calls == ["put_heartbeat", "read_record"]
    assert not member.fenced
    assert member.policy == TABLE[Phase.DUAL_WRITE]


async def test_without_a_record_it_stays_fenced(fleet: Fleet) -> None:
    """Nothing to apply: it accepts unresolved and refuses reads."""
    member = fleet.member()
    await fleet.rounds(member)
    with member.use() as use:
        assert use.policy is None
        assert use.valid
        with pytest.raises(Busy) as refused:
            use.confirm()
    assert refused.value.reason == "phase_unknown"


async def test_it_fences_itself_after_fence_after_without_a_heartbeat_anywhere(fleet: Fleet) -> None:
    """Both stores gone for 120 s by its own clock, and not a second earlier."""
    await born(fleet)
    member = fleet.member()
    await fleet.rounds(member)
    for store in fleet.stores.values():
        store.down = True
    fleet.clock.time += 119.9
    await fleet.rounds(member)
    assert not member.fenced
    fleet.clock.time += 0.1
    assert member.fenced


async def test_one_store_of_its_phase_is_enough(fleet: Fleet) -> None:
    """With PostgreSQL down for hours an instance of phase 2 goes on, reads included."""
    await born(fleet, FleetRecord(1, Phase.DUAL_WRITE_READ_DYNAMO, "", "", 0))
    member = fleet.member()
    await fleet.rounds(member)
    fleet.stores[POSTGRES].down = True
    for _ in range(400):
        fleet.clock.time += 10
        await fleet.rounds(member)
        with member.use() as use:
            assert use.confirm().reads_from == DYNAMODB
    assert "cannot be reached" in member.trouble[POSTGRES]


async def test_a_store_that_its_phase_does_not_write_does_not_count(fleet: Fleet) -> None:
    """In phase 0 only PostgreSQL holds off the fence, and DynamoDB is not even asked."""
    await born(fleet, FleetRecord(1, Phase.SQL_ONLY, "", "", 0))
    member = fleet.member()
    await fleet.rounds(member)
    fleet.stores[POSTGRES].down = True
    fleet.stores[DYNAMODB].calls.clear()
    fleet.clock.time += 60
    await fleet.rounds(member)
    assert fleet.stores[DYNAMODB].calls == []
    fleet.clock.time += 60
    await fleet.rounds(member)
    assert member.fenced


async def test_a_stopped_process_finds_itself_fenced_at_its_first_look(fleet: Fleet) -> None:
    """No timer is needed: what it does first after SIGSTOP and SIGCONT sees the fence."""
    await born(fleet)
    member = fleet.member()
    await fleet.rounds(member)
    fleet.clock.time += 3600
    with member.use() as use:
        assert use.policy is None


async def test_a_heartbeat_answered_after_the_lapse_does_not_revive_it(fleet: Fleet) -> None:
    """A late success is an announcement at most; the record is read before it works again, and it is the new one."""
    await born(fleet)
    member = fleet.member()
    await fleet.rounds(member)
    fleet.stores[POSTGRES].on_reply = lambda _m: setattr(fleet.clock, "time", fleet.clock.time + 121)
    fleet.clock.time += 10
    await member.round(POSTGRES)
    assert member.fenced
    fleet.stores[POSTGRES].on_reply = lambda _m: None
    await born(fleet, FleetRecord(3, Phase.DUAL_WRITE_READ_DYNAMO, "", "", 0))
    await member.round(POSTGRES)
    assert not member.fenced
    assert member.applied is not None
    assert member.applied.epoch == 3


async def test_the_fence_counts_from_the_start_of_the_heartbeat(fleet: Fleet) -> None:
    """What took 100 s to be answered holds for 20 s more."""
    await born(fleet)
    member = fleet.member()
    await fleet.rounds(member)
    slow = fleet.stores[POSTGRES]
    fleet.stores[DYNAMODB].down = True
    slow.on_reply = lambda method: method == "put_heartbeat" and setattr(fleet.clock, "time", fleet.clock.time + 100)
    await member.round(POSTGRES)
    fleet.clock.time += 19
    assert not member.fenced
    fleet.clock.time += 1
    assert member.fenced


async def test_what_was_stamped_before_a_lapse_is_not_valid_after_it(fleet: Fleet) -> None:
    """The stamp is to be taken back before the acknowledgement, also if the instance has joined again meanwhile."""
    await born(fleet)
    member = fleet.member()
    await fleet.rounds(member)
    with member.use() as use:
        assert use.valid
        fleet.clock.time += 121
        await fleet.rounds(member)
        assert not member.fenced
        assert not use.valid
        with pytest.raises(Busy):
            use.confirm()


async def test_it_never_applies_an_older_record(fleet: Fleet) -> None:
    """A copy that lags is read and ignored."""
    await born(fleet)
    newer = FleetRecord(2, Phase.DUAL_WRITE_READ_DYNAMO, "", "", 0, revision=2)
    fleet.servers[POSTGRES]._record = newer
    member = fleet.member()
    await member.round(POSTGRES)
    await member.round(DYNAMODB)
    assert member.applied == newer


async def test_an_epoch_is_claimed_when_older_requests_have_ended(fleet: Fleet) -> None:
    """The new policy is in force at once; the heartbeat says so only when nothing older is under way."""
    await born(fleet)
    member = fleet.member()
    await fleet.rounds(member)
    assert member.claimed == 1
    with member.use() as use:
        await born(fleet, FleetRecord(2, Phase.SQL_ONLY, "", "", 0, revision=1))
        await fleet.rounds(member)
        assert member.policy == TABLE[Phase.SQL_ONLY]
        assert use.policy == TABLE[Phase.DUAL_WRITE]
        assert member.claimed == 1
    await fleet.rounds(member)
    assert member.claimed == 2
    rows = await fleet.servers[POSTGRES].heartbeats()
    assert [row.epoch for row in rows] == [2]


async def test_an_epoch_is_not_claimed_before_on_applied_returned(fleet: Fleet) -> None:
    """The spool has no room: the policy turns, the claim waits, and the call is repeated until it succeeds."""
    await born(fleet)
    calls: list[int] = []

    async def strengthen(record: FleetRecord) -> None:
        calls.append(record.epoch)
        if len(calls) < 3:
            raise StoreError(POSTGRES, RetryClass.TRANSIENT, "no room")

    member = fleet.member(on_applied=strengthen)
    await member.round(POSTGRES)
    assert member.claimed == 0
    await fleet.rounds(member)
    assert member.claimed == 1
    assert calls == [1, 1, 1]


async def test_on_applied_is_called_after_every_fence(fleet: Fleet) -> None:
    """What was accepted unresolved is resolved once the instance knows the phase again, also if it is the same one."""
    await born(fleet)
    calls: list[int] = []

    async def resolve(record: FleetRecord) -> None:
        calls.append(record.epoch)

    member = fleet.member(on_applied=resolve)
    await fleet.rounds(member)
    fleet.clock.time += 121
    await fleet.rounds(member)
    assert calls == [1, 1]


async def test_while_a_phase_is_prepared_its_store_is_required_and_nothing_is_released(fleet: Fleet) -> None:
    """Phase 1 lets go of DynamoDB's backlog; phase 1 preparing 2 does not."""
    await born(fleet)
    member = fleet.member()
    await fleet.rounds(member)
    assert member.releasable == {DYNAMODB}
    await born(
        fleet,
        FleetRecord(2, Phase.DUAL_WRITE, "", "", 0, revision=1, preparing=Phase.DUAL_WRITE_READ_DYNAMO),
    )
    await fleet.rounds(member)
    assert member.releasable == frozenset()
    assert member.policy is not None
    assert member.policy.writes[DYNAMODB] is Delivery.REQUIRED
    assert member.policy.reads_from == POSTGRES


async def test_one_that_left_says_so_and_does_nothing_more(fleet: Fleet) -> None:
    """Its rows are drained in both stores; it is fenced for good."""
    await born(fleet)
    member = fleet.member()
    await fleet.rounds(member)
    await member.leave()
    await fleet.rounds(member)
    assert member.fenced
    for store in STORES:
        assert [row.state for row in await fleet.servers[store].heartbeats()] == ["drained"]

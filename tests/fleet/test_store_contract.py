"""The contract of ``sidecar.fleet_tables.FleetStore``: one line in ``STORES`` adds an implementation."""

import asyncio

import msgspec
import pytest

from sidecar.fleet import AuditEntry, FateLine, FleetRecord, FleetStore, GapLine, Heartbeat, Hold, MemoryFleetStore
from sidecar.phase import DYNAMODB, POSTGRES, Phase
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.postgres import PostgresStore
from tests.fleet.fakes import HandClock

STORES = ("memory", "postgres", "dynamodb")

FIRST = FleetRecord(1, Phase.SQL_ONLY, "a", "born", 5)
FULL = FleetRecord(
    2,
    Phase.DUAL_WRITE,
    "token 'ops'",
    "why; with 'quotes' and ümlauts",
    1_700_000_000_000_000,
    revision=7,
    preparing=Phase.DUAL_WRITE_READ_DYNAMO,
    settled=True,
    desired=Phase.DYNAMO_ONLY,
    phase_epoch=12,
    force="ticket 7",
)


@pytest.fixture
def memory_fleet() -> FleetStore:
    """The reference."""
    return MemoryFleetStore(POSTGRES, HandClock())


@pytest.fixture
def postgres_fleet(postgres_store: PostgresStore) -> FleetStore:
    """In a real server."""
    return postgres_store.fleet


@pytest.fixture
def dynamodb_fleet(dynamodb_store: DynamoDBStore) -> FleetStore:
    """Over HTTP."""
    return dynamodb_store.fleet


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> FleetStore:
    """An empty store."""
    found: FleetStore = request.getfixturevalue(f"{request.param}_fleet")
    return found


def beat(seq: int, incarnation: str = "1", **more: object) -> Heartbeat:
    """A heartbeat of instance ``a``."""
    return Heartbeat(instance="a", incarnation=incarnation, seq=seq, **more)


async def test_an_empty_store_has_nothing(store: FleetStore) -> None:
    """A table that was never written answers None and empty lists, not errors."""
    assert await store.read_record() is None
    assert list(await store.heartbeats()) == []
    assert list(await store.audits(10)) == []
    assert list(await store.gaps()) == []


async def test_a_record_comes_back_field_by_field(store: FleetStore) -> None:
    """Every field survives, text of any kind included."""
    assert await store.cas_record(None, FIRST)
    assert await store.cas_record(FIRST, FULL)
    assert await store.read_record() == FULL


async def test_a_write_that_compares_wrong_writes_nothing(store: FleetStore) -> None:
    """Another epoch, another revision, or a copy where none was expected: False, and the copy is as it was."""
    assert not await store.cas_record(FIRST, FULL)
    assert await store.cas_record(None, FIRST)
    assert not await store.cas_record(None, FULL)
    assert not await store.cas_record(msgspec.structs.replace(FIRST, revision=1), FULL)
    assert not await store.cas_record(msgspec.structs.replace(FIRST, epoch=2), FULL)
    assert await store.read_record() == FIRST


async def test_of_many_writers_one_wins(store: FleetStore) -> None:
    """Ten at once compare with the same record: exactly one is told True, and its record is the one that is there."""
    await store.cas_record(None, FIRST)
    news = [msgspec.structs.replace(FIRST, epoch=2, by=f"w{n}") for n in range(10)]
    won = await asyncio.gather(*(store.cas_record(FIRST, new) for new in news))
    assert won.count(True) == 1
    assert await store.read_record() == news[won.index(True)]


async def test_a_late_heartbeat_never_replaces_a_newer_one(store: FleetStore) -> None:
    """The row with the highest seq stays; another incarnation has its own row."""
    newer = beat(2, epoch=3, pending={DYNAMODB: 4}, oldest_pending_us={DYNAMODB: 9}, desired=Phase.DUAL_WRITE)
    await store.put_heartbeat(newer)
    await store.put_heartbeat(beat(1))
    await store.put_heartbeat(beat(2, state="drained"))
    await store.put_heartbeat(beat(1, "2"))
    assert sorted(await store.heartbeats(), key=lambda row: row.incarnation) == [newer, beat(1, "2")]


async def test_a_row_is_dropped_only_as_it_was_seen(store: FleetStore) -> None:
    """A heartbeat that came after the look survives the deletion."""
    await store.put_heartbeat(beat(2))
    await store.drop_heartbeat(("a", "1"), 1)
    await store.drop_heartbeat(("nobody", "1"), 1)
    assert list(await store.heartbeats()) == [beat(2)]
    await store.drop_heartbeat(("a", "1"), 2)
    assert list(await store.heartbeats()) == []


async def test_a_lease_has_one_holder_until_given_back(store: FleetStore) -> None:
    """The holder renews; another gets it only after it was given back by its holder; names are apart."""
    assert await store.acquire_lease("x", "a", 30.0)
    assert await store.acquire_lease("x", "a", 30.0)
    assert not await store.acquire_lease("x", "b", 30.0)
    assert await store.acquire_lease("y", "b", 30.0)
    await store.release_lease("x", "b")
    assert not await store.acquire_lease("x", "b", 30.0)
    await store.release_lease("x", "a")
    assert await store.acquire_lease("x", "b", 30.0)


async def test_who_holds_a_lease_is_found_with_its_heartbeat(store: FleetStore) -> None:
    """By ``instance/incarnation``, whatever is in the instance's name; nobody where nobody is."""
    beat = Heartbeat(instance="a/b", incarnation="1", seq=1, holds=(Hold("g", "3", "0", 7),))
    assert await store.leader("x") is None
    await store.acquire_lease("x", "a/b/1", 30.0)
    assert await store.leader("x") is None
    await store.put_heartbeat(Heartbeat(instance="a", incarnation="b/1", seq=1))
    await store.put_heartbeat(beat)
    assert await store.leader("x") == beat
    assert await store.leader("y") is None
    await store.acquire_lease("y", "no instance", 30.0)
    assert await store.leader("y") is None
    await store.release_lease("x", "a/b/1")
    assert await store.leader("x") is None


async def test_the_trail_keeps_every_line_once_newest_first(store: FleetStore) -> None:
    """A repeated append is one line; the outcome is a line of its own; evidence survives."""
    evidence = ({"gate": "g", "ok": "true", "observed": "0", "required": "0", "since_us": "1"},)
    intended = AuditEntry(
        id="1",
        outcome="intended",
        action="step",
        by="a",
        why="w",
        at_us=1,
        epoch=2,
        from_phase=Phase.SQL_ONLY,
        to_phase=Phase.DUAL_WRITE,
        forced=True,
        evidence=evidence,
    )
    done = msgspec.structs.replace(intended, outcome="done", at_us=2)
    for entry in (intended, intended, done):
        await store.append_audit(entry)
    assert list(await store.audits(10)) == [done, intended]
    assert list(await store.audits(1)) == [done]


async def test_the_trail_is_in_the_order_of_what_happened_whatever_the_ids(store: FleetStore) -> None:
    """Several changes of one epoch, then of the next: the newest lines come first, also where few are asked for."""
    plan = [(1, "z"), (1, "m"), (1, "a"), (2, "k"), (2, "b")]
    lines = [
        AuditEntry(id=name, outcome="done", action="wish", by="a", why="w", at_us=10 + n, epoch=epoch)
        for n, (epoch, name) in enumerate(plan)
    ]
    for line in lines:
        await store.append_audit(line)
    for limit in range(1, 6):
        assert list(await store.audits(limit)) == lines[::-1][:limit]


async def test_gap_lines_merge_by_the_larger_count(store: FleetStore) -> None:
    """Repeated and late lines change nothing, and closing what was seen does not hide what was opened since."""
    line = GapLine(store=DYNAMODB, kind="not_owed", hour=7, source="a", opened=5)
    other = msgspec.structs.replace(line, source="b", opened=1)
    await store.put_gaps([line, other])
    await store.put_gaps([msgspec.structs.replace(line, opened=3)])
    await store.put_gaps([msgspec.structs.replace(line, opened=5, closed=5), msgspec.structs.replace(line, opened=8)])
    assert sorted(await store.gaps(), key=lambda gap: gap.source) == [
        msgspec.structs.replace(line, opened=8, closed=5),
        other,
    ]
    await store.put_gaps([msgspec.structs.replace(line, opened=8, closed=8), msgspec.structs.replace(other, closed=1)])
    assert list(await store.gaps()) == []


ID = "0190a5d0-7c1e-7000-8000-0000000000aa"
FATE = FateLine(
    log_id=ID, store=DYNAMODB, state="dead_lettered", retry_class="permanent", by="pod-1", at_us=2**50, revision=3
)


async def test_the_last_word_on_a_record_stays(store: FleetStore) -> None:
    """A line is replaced by a higher revision alone, whatever the order; stores and instances have lines apart."""
    later = msgspec.structs.replace(FATE, state="discarded", at_us=1, revision=4)
    others = [
        msgspec.structs.replace(FATE, store=POSTGRES, retry_class="conflict"),
        msgspec.structs.replace(FATE, by="pod 2 #'\"ü", state="redriven"),
    ]
    await store.put_fates([])
    await store.put_fates([FATE, *others])
    await store.put_fates([FATE, later, msgspec.structs.replace(FATE, state="redriven")])
    await store.put_fates([FATE])
    assert sorted(await store.fates([ID]), key=lambda fate: fate.key) == sorted(
        [later, *others], key=lambda fate: fate.key
    )


async def test_fates_are_told_of_the_records_asked_for_and_no_others(store: FleetStore) -> None:
    """Ids of which nothing is known are left out; an id that is asked for twice is answered once."""
    lines = [msgspec.structs.replace(FATE, log_id=f"{ID[:-3]}{n:03d}") for n in range(130)]
    await store.put_fates(lines)
    assert list(await store.fates([])) == []
    asked = [line.log_id for line in lines[:120]]
    found = await store.fates([*asked, asked[0], "ffffffff-0000-4000-8000-000000000000"])
    assert sorted(line.log_id for line in found) == asked

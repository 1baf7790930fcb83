"""The write path on a real spool: dedup, obligations, refused records, waiting for the stores, closing."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import msgspec
import pytest

from sidecar.errors import Busy, ContentConflict, InvalidRecord, TooLarge
from sidecar.intake import DedupWindow, Standing
from sidecar.phase import TABLE, Phase
from sidecar.screening import Form
from sidecar.settings import Dedup, Settings
from sidecar.spool.types import Obligation
from tests.api.door import Door, open_door
from tests.test_screening import FixedClock

V4 = "3f2b8c1e-5a4d-4e6f-9a8b-7c6d5e4f3a2b"
OTHER = "11111111-5a4d-4e6f-9a8b-7c6d5e4f3a2b"


def own(log_id: str = V4, **fields: object) -> dict[str, object]:
    """A record with its own id and time."""
    return {"log_id": log_id, "log_timestamp": "2026-11-22T11:00:00Z", "service_name": "s", **fields}


def text(*records: object) -> bytes:
    """One record, or an array of several."""
    return json.dumps(records[0] if len(records) == 1 else records).encode()


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    """A running door."""
    async with open_door(tmp_path / "spool") as opened:
        yield opened


def owed(door: Door) -> tuple[int, int]:
    """Records owed to (postgres, dynamodb)."""
    return door.spool.counters("postgres").owed, door.spool.counters("dynamodb").owed


async def test_accepted_records_are_owed_to_the_phases_stores(door: Door) -> None:
    """The policy at the commit decides, phase by phase; a record stays owed when the phase changes."""
    expected = {
        Phase.SQL_ONLY: (1, 0),
        Phase.DUAL_WRITE: (2, 1),
        Phase.DUAL_WRITE_READ_DYNAMO: (3, 2),
        Phase.DYNAMO_ONLY: (3, 3),
    }
    for phase, counts in expected.items():
        door.phase = phase
        outcome = await door.intake.accept(text({"service_name": "s"}), Form.JSON)
        assert owed(door) == counts
        status = await door.spool.status(outcome.log_ids[0] or "")
        assert status is not None
        assert status.phase == phase
        assert status.required == TABLE[phase].required


def test_a_fenced_instance_leaves_the_obligation_open() -> None:
    """It does not know the fleet's phase, so it promises to nobody in particular yet."""
    policy = TABLE[Phase.DUAL_WRITE]
    assert Standing(policy, fenced=True).obligation == Obligation(1, frozenset(), unresolved=True)
    assert Standing(policy).obligation == Obligation(1, frozenset({"postgres"}), frozenset({"dynamodb"}))


async def test_a_fenced_instance_accepts(door: Door) -> None:
    """Its records are durable and owed to nobody until they are resolved."""
    door.fenced = True
    outcome = await door.intake.accept(text({"service_name": "s"}), Form.JSON, wait=0)
    assert not outcome.stored
    assert owed(door) == (0, 0)
    await door.spool.resolve(Standing(TABLE[Phase.SQL_ONLY]).obligation)
    assert owed(door) == (1, 0)


async def test_same_id_same_content_has_one_effect(door: Door) -> None:
    """A resend is answered as a duplicate and owed once."""
    first = await door.intake.accept(text(own()), Form.JSON)
    again = await door.intake.accept(text(own()), Form.JSON)
    assert (first.duplicates, again.duplicates) == ([], [0])
    assert again.log_ids == first.log_ids == [V4]
    assert owed(door) == (1, 1)
    assert door.metrics.registry.get_sample_value("sidecar_records_duplicate_total") == 1


async def test_same_id_other_content_is_a_conflict(door: Door) -> None:
    """The first wins; nothing of the second is stored."""
    await door.intake.accept(text(own()), Form.JSON)
    with pytest.raises(ContentConflict):
        await door.intake.accept(text(own(user_id="u")), Form.JSON)
    assert owed(door) == (1, 1)


async def test_conflicts_and_duplicates_within_one_batch(door: Door) -> None:
    """The first of an id wins; its equal is a duplicate, its unequal a refused record of status 409."""
    outcome = await door.intake.accept(
        text(own(), own(), own(user_id="u"), own(OTHER), {"service_name": "s"}), Form.JSON
    )
    assert outcome.duplicates == [1]
    assert [(one.index, one.field, one.status) for one in outcome.refused] == [(2, "log_id", 409)]
    assert [log_id is None for log_id in outcome.log_ids] == [False, False, True, False, False]
    assert owed(door) == (3, 3)


async def test_refused_records_are_listed_in_input_order(door: Door) -> None:
    """Conflicts, found last, stand among those that screening refused."""
    await door.intake.accept(text(own()), Form.JSON)
    outcome = await door.intake.accept(text({}, own(user_id="u"), {"x": 1}), Form.JSON)
    assert [one.index for one in outcome.refused] == [0, 1, 2]


async def test_the_window_survives_a_restart(tmp_path: Path) -> None:
    """Duplicates and conflicts are recognised after the spool was closed and opened again."""
    async with open_door(tmp_path) as door:
        await door.intake.accept(text(own()), Form.JSON)
        key = await door.intake.accept(text({"service_name": "s"}), Form.JSON, key="k")
    async with open_door(tmp_path) as door:
        assert (await door.intake.accept(text(own()), Form.JSON)).duplicates == [0]
        again = await door.intake.accept(text({"service_name": "s"}), Form.JSON, key="k")
        assert (again.duplicates, again.log_ids) == ([0], key.log_ids)
        with pytest.raises(ContentConflict):
            await door.intake.accept(text(own(user_id="u")), Form.JSON)
        assert owed(door) == (2, 2)


async def test_a_resend_during_the_first_commit_waits_for_it(door: Door) -> None:
    """Fifty concurrent sendings of one record have one effect, and each is answered."""
    outcomes = await asyncio.gather(*(door.intake.accept(text(own()), Form.JSON) for _ in range(50)))
    assert sorted(one.duplicates for one in outcomes) == [[]] + [[0]] * 49
    assert owed(door) == (1, 1)


async def test_concurrent_batches_that_overlap_do_not_lock_each_other(door: Door) -> None:
    """Batches that share ids in opposite orders all end, with one effect an id."""
    ids = [f"00000000-0000-4000-8000-{i:012d}" for i in range(1, 31)]
    batches = [ids, ids[::-1], ids[10:], ids[:20][::-1]] * 5
    outcomes = await asyncio.gather(*(door.intake.accept(text(*map(own, batch)), Form.JSON) for batch in batches))
    assert sum(len(one.log_ids) - len(one.duplicates) for one in outcomes) == 30
    assert owed(door) == (30, 30)


class _Full:
    """A spool whose first append finds no room, and only then works."""

    def __init__(self, door: Door, gate: asyncio.Event) -> None:
        self._spool = door.spool
        self._gate = gate
        self.refusals = 1

    def __getattr__(self, name: str) -> object:
        return getattr(self._spool, name)

    async def append(self, *arguments: object) -> object:
        if self.refusals:
            self.refusals -= 1
            await self._gate.wait()
            raise Busy("spool_full", "full", 1)
        return await self._spool.append(*arguments)  # type: ignore[arg-type]


async def test_a_resend_stands_in_for_a_first_that_failed(door: Door) -> None:
    """If the commit that it waited for is pushed back, the waiting resend is stored itself."""
    gate = asyncio.Event()
    door.intake._spool = _Full(door, gate)  # type: ignore[assignment]
    first = asyncio.create_task(door.intake.accept(text(own()), Form.JSON))
    while not door.intake.window.flying:
        await asyncio.sleep(0)
    second = asyncio.create_task(door.intake.accept(text(own()), Form.JSON))
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(Busy):
        await first
    assert (await second).duplicates == []
    assert owed(door) == (1, 1)
    assert not door.intake.window.flying


async def test_a_refused_append_leaves_no_trace(door: Door) -> None:
    """After a push-back the same records are accepted as new."""
    gate = asyncio.Event()
    gate.set()
    door.intake._spool = _Full(door, gate)  # type: ignore[assignment]
    with pytest.raises(Busy):
        await door.intake.accept(text(own(), own(OTHER)), Form.JSON)
    assert len(door.intake.window) == 0
    assert (await door.intake.accept(text(own(), own(OTHER)), Form.JSON)).duplicates == []


async def test_a_push_back_that_makes_room_is_tried_again_under_the_phase_of_then(door: Door) -> None:
    """Nobody is refused, and what the phase requires meanwhile is what the records are owed as."""
    gate = asyncio.Event()
    gate.set()
    door.intake._spool = _Full(door, gate)  # type: ignore[assignment]
    asked: list[str] = []

    async def make_room(busy: Busy) -> bool:
        asked.append(busy.reason)
        door.phase = Phase.DUAL_WRITE_READ_DYNAMO
        return True

    door.intake._make_room = make_room
    outcome = await door.intake.accept(text(own()), Form.JSON)
    assert asked == ["spool_full"]
    assert outcome.policy is TABLE[Phase.DUAL_WRITE_READ_DYNAMO]
    (log_id,) = outcome.log_ids
    status = await door.spool.status(log_id or "")
    assert status is not None
    assert status.required == {"postgres", "dynamodb"}


async def test_a_push_back_without_room_and_a_door_closed_meanwhile_are_the_answer(door: Door) -> None:
    """Nobody makes room: Busy as the spool said it. Room, but fail-closed by then: that Busy."""
    gate = asyncio.Event()
    gate.set()

    async def make_room(busy: Busy) -> bool:
        door.closed = Busy("fail_closed", "closed", 5)
        return True

    for room, reason in ((door.intake._make_room, "spool_full"), (make_room, "fail_closed")):
        door.intake._spool = _Full(door, gate)  # type: ignore[assignment]
        door.intake._make_room = room
        with pytest.raises(Busy) as raised:
            await door.intake.accept(text(own()), Form.JSON)
        assert raised.value.reason == reason
    assert owed(door) == (0, 0)


@pytest.mark.parametrize(
    ("body", "error"),
    [({"service_name": ""}, InvalidRecord), ({"service_name": "s", "request_data": "x" * 300_000}, TooLarge)],
)
async def test_a_single_records_refusal_is_the_requests(door: Door, body: object, error: type[Exception]) -> None:
    """Nothing is stored and nothing is kept of it; it is counted by its rule."""
    with pytest.raises(error):
        await door.intake.accept(text(body), Form.JSON)
    assert owed(door) == (0, 0)
    assert door.spool.dead_letter_counts() == {}
    counted = [
        sample.value
        for family in door.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "sidecar_records_refused_total"
    ]
    assert counted == [1]


async def test_refused_records_of_a_batch_are_kept(door: Door) -> None:
    """Good ones are stored, bad ones are dead letters of the door, as they were sent."""
    outcome = await door.intake.accept(b'[{"service_name":"s"},{"service_name":"s","bad":1},[]]', Form.JSON)
    assert owed(door) == (1, 1)
    assert [one.status for one in outcome.refused] == [422, 422]
    letters = await door.spool.dead_letters(store="door")
    assert [letter.raw for letter in letters] == [b'{"service_name":"s","bad":1}', b"[]"]


async def test_strict_stores_nothing_of_a_bad_batch(door: Door) -> None:
    """Neither records nor refusals; conflicts count as bad too; a good batch passes."""
    await door.intake.accept(text(own()), Form.JSON)
    for bad in ({}, own(user_id="u")):
        outcome = await door.intake.accept(text({"service_name": "s"}, bad, own(OTHER)), Form.JSON, strict=True)
        assert not outcome.committed
        assert [one.index for one in outcome.refused] == [1]
    assert owed(door) == (1, 1)
    assert door.spool.dead_letter_counts() == {}
    assert (await door.intake.accept(text(own(OTHER), own(OTHER)), Form.JSON, strict=True)).duplicates == [1]


async def test_waiting_ends_when_the_required_stores_have_it(door: Door) -> None:
    """In dual_write PostgreSQL alone is required: DynamoDB may lag."""
    waiting = asyncio.create_task(door.intake.accept(text({"service_name": "s"}), Form.JSON, wait=30))
    while not door.spool.counters("postgres").pending:
        await asyncio.sleep(0.001)
    await door.deliver("postgres")
    outcome = await waiting
    assert (outcome.waited, outcome.stored, dict(outcome.states)) == (True, True, {})


async def test_waiting_in_vain_says_which_store_is_behind(door: Door) -> None:
    """The records are durable; the states name every store owed."""
    door.phase = Phase.DUAL_WRITE_READ_DYNAMO
    waiting = asyncio.create_task(
        door.intake.accept(text({"service_name": "a"}, {"service_name": "b"}), Form.JSON, wait=0.3)
    )
    while not door.spool.counters("postgres").pending:
        await asyncio.sleep(0.001)
    await door.deliver("postgres")
    outcome = await waiting
    assert not outcome.stored
    behind = {"postgres": "delivered", "dynamodb": "pending"}
    assert dict(outcome.states) == {0: behind, 1: behind}


async def test_a_dead_letter_is_not_stored(door: Door) -> None:
    """Waiting ends when everything is settled; a record in the dead letters is not 'stored', its neighbours are."""
    waiting = asyncio.create_task(
        door.intake.accept(text({"service_name": "a"}, {"service_name": "bad"}), Form.JSON, wait=30)
    )
    while not door.spool.counters("postgres").pending:
        await asyncio.sleep(0.001)
    await door.deliver("postgres", refuse=["bad"])
    outcome = await waiting
    assert not outcome.stored
    assert {i: stores["postgres"] for i, stores in outcome.states.items()} == {1: "dead_lettered"}


async def test_a_duplicate_waits_for_the_first_ones_delivery(door: Door) -> None:
    """A resend that prefers to wait is answered by where its record stands."""
    await door.intake.accept(text(own()), Form.JSON)
    waiting = asyncio.create_task(door.intake.accept(text(own()), Form.JSON, wait=30))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not waiting.done()
    await door.deliver("postgres")
    outcome = await waiting
    assert (outcome.duplicates, outcome.stored) == ([0], True)


async def test_a_stopped_intake_accepts_nothing(door: Door) -> None:
    """Stopping and fail-closed are Busy with a time to come back, before the body is looked at."""
    door.closed = Busy("fail_closed", "postgres is down", 7)
    with pytest.raises(Busy, match="postgres is down"):
        await door.intake.accept(b"not even JSON", Form.JSON)
    door.closed = None
    door.intake.stop()
    with pytest.raises(Busy) as caught:
        await door.intake.accept(text({"service_name": "s"}), Form.JSON)
    assert caught.value.reason == "stopping"


async def test_a_long_screening_pauses_for_others(door: Door) -> None:
    """A body that needs the slow lane for thousands of records lets other tasks run in between."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(others())
    await door.intake.accept(b"[" + b",".join([b"{}"] * 5000) + b"]", Form.JSON, strict=True)
    task.cancel()
    assert turns > 30


async def test_an_empty_batch_commits_nothing(door: Door) -> None:
    """No record, no commit, an answer all the same."""
    outcome = await door.intake.accept(b"[]", Form.JSON, wait=0)
    assert (outcome.log_ids, outcome.batch, outcome.committed) == ([], True, True)
    assert owed(door) == (0, 0)


async def test_live_bounds_apply_to_the_next_request(door: Door) -> None:
    """The settings are asked for each request: a reload needs no restart."""
    body = text({"service_name": "s"}, {"service_name": "t"})
    assert len((await door.intake.accept(body, Form.JSON)).log_ids) == 2
    door.settings = msgspec.structs.replace(
        door.settings, ingest=msgspec.structs.replace(Settings().ingest, max_records=1)
    )
    with pytest.raises(TooLarge):
        await door.intake.accept(body, Form.JSON)


# ------------------------------------------------------------------------------------------------- the window alone


def _pairs(ids: Iterable[int]) -> dict[bytes, bytes]:
    return {i.to_bytes(16, "big"): b"c" * 16 for i in ids}


def _known(window: DedupWindow, ids: Iterable[int]) -> list[int]:
    return [i for i in ids if window.content(i.to_bytes(16, "big")) is not None]


async def test_the_window_forgets_by_age_and_by_number() -> None:
    """Ids leave after ``window`` seconds of the monotonic clock, or when ``max_ids`` newer ones came."""
    clock = FixedClock()
    window = DedupWindow(Dedup(max_ids=10, window=60), clock)
    window.remember(_pairs(range(5)))
    await clock.sleep(59)
    window.remember(_pairs(range(5, 10)))
    assert _known(window, range(20)) == list(range(10))
    await clock.sleep(2)
    await window.settled(())
    assert _known(window, range(20)) == list(range(5, 10))
    window.remember(_pairs(range(10, 16)))
    assert _known(window, range(20)) == list(range(10, 16))
    assert len(window) == 6


async def test_a_loaded_window_is_bounded_and_newest() -> None:
    """What the spool kept is taken over, oldest first, within the same bounds."""
    clock = FixedClock()
    window = DedupWindow(Dedup(max_ids=2500, window=60), clock)
    window.load(_pairs(range(5000)).items())
    assert _known(window, range(5000)) == list(range(3000, 5000))  # by groups of a thousand
    await clock.sleep(61)
    await window.settled(())
    assert len(window) == 0


async def test_no_window_means_no_memory() -> None:
    """max_ids 0 switches the window off; concurrent sendings are still told apart."""
    window = DedupWindow(Dedup(max_ids=0, window=60), FixedClock())
    claim = window.claim(_pairs([1]))
    assert window.flying
    claim.keep()
    assert (len(window), window.flying) == (0, {})


class _Counting:
    """The spool; counts how often a record's state is looked up."""

    def __init__(self, door: Door) -> None:
        self._spool = door.spool
        self.looks = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._spool, name)

    async def status(self, log_id: str) -> object:
        self.looks += 1
        return await self._spool.status(log_id)


async def test_waiting_for_many_known_records_looks_at_one_after_the_other(door: Door) -> None:
    """Once at each in the end, and while it waits at the first that is pending: others have the loop to themselves."""
    records = [own(f"{n:08x}-5a4d-4e6f-9a8b-7c6d5e4f3a2b") for n in range(200)]
    await door.intake.accept(text(*records), Form.JSON)
    door.intake._spool = counting = _Counting(door)  # type: ignore[assignment]
    again = await door.intake.accept(text(*records), Form.JSON, wait=0.5)
    assert (len(again.duplicates), len(again.states), again.stored) == (200, 200, False)
    assert counting.looks <= 200 + 0.5 / 0.05 + 1
    await door.deliver("postgres", "dynamodb")
    assert (await door.intake.accept(text(*records), Form.JSON, wait=20)).stored

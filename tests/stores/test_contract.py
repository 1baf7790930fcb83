"""The port's contract: what is true of every store, run on each of them (``sidecar.stores.base``).

A new store is one more name in ``STORES`` and one fixture ``<name>_store``. An index of DynamoDB answers a moment
late, so what goes through an index is awaited, never assumed.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar.errors import RetryClass, StoreError
from sidecar.record import LogRecord
from sidecar.stores.base import (
    ByApplication,
    ByCorrelation,
    ByService,
    CountQuery,
    ErrorsOn,
    HourFilter,
    Position,
    Query,
    ScanEntry,
    Store,
    entry_of,
)
from sidecar.stores.memory import MemoryStore
from tests.stores.records import BASE, DAY, FIRST_TIME, LAST_TIME, fresh, log_id, log_records, record, records

STORES = ("memory", "postgres", "adopted", "partitioned", "dynamodb")
CONVERGENCE = 10.0  # seconds
T = TypeVar("T")
HOUR = 3_600_000_000
drawn = settings(
    max_examples=20,
    deadline=None,
    # The store outlives the examples on purpose: their ids are fresh, so the examples do not meet.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture
def memory_store() -> MemoryStore:
    """The reference."""
    return MemoryStore()


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> Store:
    """Each store in turn, created and empty."""
    return request.getfixturevalue(f"{request.param}_store")


async def write(store: Store, batch: Sequence[LogRecord]) -> None:
    """Write in the store's own bounds and see every record taken."""
    size = store.limits.max_records
    for start in range(0, len(batch), size):
        result = await store.write(batch[start : start + size])
        assert list(result.failures) == []


async def awaited(ask: Callable[[], Awaitable[T]], expected: T) -> None:
    """Ask until the answer is the expected one; fails with the last answer."""
    deadline = time.monotonic() + CONVERGENCE
    while (seen := await ask()) != expected and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    assert seen == expected


async def entries(store: Store, start: int, end: int) -> list[ScanEntry]:
    """A whole scan."""
    return [entry async for entry in store.scan(start, end)]


async def streamed(
    store: Store, start: int, end: int, *, after: Position | None = None, hours: HourFilter | None = None
) -> list[LogRecord]:
    """A whole stream."""
    found: list[LogRecord] = []
    async for page in store.stream(start, end, after=after, hours=hours):
        assert page
        found += page
    return found


async def pages(store: Store, query: Query, limit: int) -> list[LogRecord]:
    """All pages of a query, one after the other."""
    found: list[LogRecord] = []
    before = None
    while page := await store.query(query, before=before, limit=limit):
        assert len(page) <= limit
        found += page
        before = Position(page[-1].log_timestamp, page[-1].log_id)
    return found


def newest_first(batch: Sequence[LogRecord]) -> list[LogRecord]:
    """The order of every answer."""
    return sorted(batch, key=lambda r: (r.log_timestamp, r.log_id), reverse=True)


class TestWriting:
    """What a write leaves behind."""

    @drawn
    @given(drawn_batch=st.lists(log_records(), min_size=1, max_size=8))
    async def test_every_field_comes_back_as_it_went_in(self, store: Store, drawn_batch: list[LogRecord]) -> None:
        """Thirteen fields, byte for byte: null is not empty, no bound is cut, no text is touched."""
        batch = fresh(drawn_batch)
        await write(store, batch)
        assert [await store.get(r.log_id) for r in batch] == batch

    async def test_the_first_and_the_last_instant_are_held(self, store: Store) -> None:
        """Microseconds from 0001-01-01 to 9999-12-31 come back by id and by a range of one instant."""
        edges = [record(1, log_timestamp=FIRST_TIME), record(2, log_timestamp=LAST_TIME)]
        await write(store, edges)
        for edge in edges:
            assert await store.get(edge.log_id) == edge
            query = ByService("orders", edge.log_timestamp, edge.log_timestamp)
            await awaited(lambda query=query: pages(store, query, 10), [edge])

    async def test_a_repetition_has_no_second_effect(self, store: Store) -> None:
        """The same batch twice, and once more overlapping new records: each is there once."""
        batch = records(20)
        await write(store, batch[:12])
        await write(store, batch[:12])
        await write(store, batch[6:])
        await awaited(lambda: entries(store, BASE, BASE + DAY), _scan_of(batch))

    async def test_concurrent_writers_of_the_same_records_both_succeed(self, store: Store) -> None:
        """Two sidecars that deliver one record are both told that it is stored, a deadlock repeated; stored once."""
        batch = records(10)

        async def delivered(part: Sequence[LogRecord]) -> None:
            while True:
                try:
                    return await write(store, part)
                except StoreError as error:  # opposite orders may deadlock: transient, so a shipper repeats it
                    if error.retry_class is not RetryClass.TRANSIENT:
                        raise

        await asyncio.gather(delivered(batch), delivered(batch[::-1]))
        await awaited(lambda: entries(store, BASE, BASE + DAY), _scan_of(batch))

    async def test_an_empty_batch_is_a_success(self, store: Store) -> None:
        """Nothing to do is done."""
        assert list((await store.write([])).failures) == []
        assert list(await store.put_if_absent([])) == []

    async def test_a_record_at_the_size_bound_is_held(self, store: Store) -> None:
        """350 KiB, the ceiling of ``ingest.max_record_bytes``, in text of several bytes per character."""
        big = record(1, request_data="\u00e9" * (350 * 512 - 512))
        await write(store, [big])
        assert await store.get(big.log_id) == big

    async def test_put_if_absent_says_who_stored_and_never_overwrites(self, store: Store) -> None:
        """True for the new ones, False for those that were there, whatever they hold; those stay as they were."""
        old = records(3)
        await write(store, old)
        other = [record(i, request_data="other", log_timestamp=BASE + i * 1_000_000) for i in range(5)]
        assert list(await store.put_if_absent(other)) == [False, False, False, True, True]
        assert [await store.get(log_id(i)) for i in range(5)] == old + other[3:]
        assert list(await store.put_if_absent(other)) == [False] * 5

    async def test_fill_says_of_each_record_whether_this_call_stored_it(self, store: Store) -> None:
        """As ``put_if_absent``: what was there stays, whatever it holds; an empty batch is a success."""
        old = records(3)
        await write(store, old)
        other = [record(i, request_data="other", log_timestamp=BASE + i * 1_000_000) for i in range(5)]
        result = await store.fill(other)
        assert (list(result.stored), list(result.failures)) == ([False, False, False, True, True], [])
        assert [await store.get(log_id(i)) for i in range(5)] == old + other[3:]
        assert list((await store.fill([])).stored) == []

    async def test_a_rehearsal_of_good_records_refuses_none_and_stores_none(self, store: Store) -> None:
        """New ids and ids that are there alike."""
        await write(store, [record(1)])
        assert list(await store.rehearse([*records(5), record(6, request_data="x" * 1000)])) == []
        assert list(await store.rehearse([])) == []
        assert [await store.get(log_id(i)) for i in range(7)] == [None, record(1), *[None] * 5]

    async def test_one_of_two_concurrent_fillers_stores_a_record(self, store: Store) -> None:
        """Exactly one is told True."""
        first, second = await asyncio.gather(
            store.put_if_absent([record(1, user_id="a")]), store.put_if_absent([record(1, user_id="b")])
        )
        assert sorted([*first, *second]) == [False, True]

    async def test_a_batch_over_the_bound_is_refused_whole(self, store: Store) -> None:
        """More records than ``limits`` allow: PERMANENT, which makes the caller bisect; nothing is stored."""
        batch = records(store.limits.max_records + 1)
        with pytest.raises(StoreError) as caught:
            await store.write(batch)
        assert caught.value.retry_class is RetryClass.PERMANENT
        assert await store.get(batch[0].log_id) is None


class TestReading:
    """What an answer holds, and in which order."""

    async def test_an_unknown_id_is_none(self, store: Store) -> None:
        """The store answered, and has none."""
        await write(store, [record(1)])
        assert await store.get(log_id(2)) is None

    @pytest.mark.parametrize(
        ("query", "matching"),
        [
            (ByApplication(7), {"application_id": 7}),
            (ByCorrelation("corr-1"), {"correlation_id": "corr-1"}),
            (ByService("orders", BASE, BASE + 2 * DAY), {"service_name": "orders"}),
            (ErrorsOn(BASE // DAY), {"is_success": False}),
        ],
        ids=lambda value: type(value).__name__ if not isinstance(value, dict) else "",
    )
    async def test_pages_are_newest_first_and_miss_nothing_among_equal_times(
        self, store: Store, query: Query, matching: dict[str, object]
    ) -> None:
        """Pages of any size give each record once, by (time, id) descending, though all share three instants."""
        batch = [record(i, log_timestamp=BASE + i % 3, **matching) for i in range(17)]
        others = {"application_id": None, "correlation_id": None, "service_name": "billing", "is_success": True}
        batch_of_others = [record(100 + i, log_timestamp=BASE + i, **others) for i in range(5)]
        await write(store, batch + batch_of_others)
        for limit in (1, 4, 50):
            await awaited(lambda limit=limit: pages(store, query, limit), newest_first(batch))

    async def test_both_ends_of_a_range_are_inclusive(self, store: Store) -> None:
        """A microsecond outside is out, the ends themselves are in, for records and for counts."""
        batch = [record(i, log_timestamp=BASE + i) for i in range(5)]
        await write(store, batch)
        query = ByService("orders", BASE + 1, BASE + 3)
        await awaited(lambda: pages(store, query, 10), newest_first(batch[1:4]))
        await awaited(lambda: store.count(CountQuery(BASE + 1, BASE + 3)), 3)

    async def test_a_range_over_midnight_is_one_answer(self, store: Store) -> None:
        """Two UTC days are one range."""
        batch = [record(i, log_timestamp=BASE + DAY + i - 3) for i in range(6)]
        await write(store, batch)
        await awaited(lambda: pages(store, ByService("orders", BASE, BASE + 2 * DAY), 4), newest_first(batch))

    async def test_failures_of_a_day_are_those_of_its_utc_hours(self, store: Store) -> None:
        """The first and the last microsecond of the day are in, the neighbours' are out."""
        times = (BASE - 1, BASE, BASE + DAY - 1, BASE + DAY)
        batch = [record(i, log_timestamp=us, is_success=False) for i, us in enumerate(times)]
        await write(store, batch)
        await awaited(lambda: pages(store, ErrorsOn(BASE // DAY), 10), newest_first(batch[1:3]))

    async def test_an_empty_text_is_not_null(self, store: Store) -> None:
        """A query for the empty correlation id finds it, and not the records without one."""
        batch = [record(1, correlation_id=""), record(2, correlation_id=None)]
        await write(store, batch)
        await awaited(lambda: pages(store, ByCorrelation(""), 10), batch[:1])

    async def test_counts_are_exact_by_service_and_outcome(self, store: Store) -> None:
        """Each filter alone and both together."""
        batch = [
            record(i, log_timestamp=BASE + i * HOUR, is_success=i % 3 != 0, service_name=("orders", "billing")[i % 2])
            for i in range(30)
        ]
        await write(store, batch)
        end = BASE + 29 * HOUR
        for service in (None, "orders", "billing", "nobody"):
            for success in (None, True, False):
                expected = sum(service in (None, r.service_name) and success in (None, r.is_success) for r in batch)
                query = CountQuery(BASE, end, service, success)
                await awaited(lambda query=query: store.count(query), expected)

    async def test_a_scan_is_ascending_with_the_digests_of_the_records(self, store: Store) -> None:
        """By (time, id), start inclusive and end exclusive, each digest that of the record as it was sent."""
        batch = [record(i, log_timestamp=BASE + i // 4, user_id=f"u{i}") for i in range(30)]
        await write(store, batch[::-1])
        await awaited(lambda: entries(store, BASE + 1, BASE + 5), _scan_of(batch[4:20]))

    async def test_a_scan_of_nothing_ends(self, store: Store) -> None:
        """An empty window has no entries."""
        await write(store, [record(1)])
        assert await entries(store, BASE - HOUR, BASE) == []

    async def test_a_stream_gives_whole_records_ascending_from_where_it_was_left(self, store: Store) -> None:
        """By (time, id), start inclusive, end exclusive; from any position on, exactly the rest; no empty page."""
        batch = [record(i, log_timestamp=BASE + i // 40, user_id=f"u{i}") for i in range(250)]
        await write(store, batch[::-1])
        await awaited(lambda: streamed(store, BASE + 1, BASE + 6), batch[40:240])
        for at in (39, 40, 41, 100, 239):
            left = batch[max(at + 1, 40) : 240]
            assert await streamed(store, BASE + 1, BASE + 6, after=_position(batch[at])) == left
        assert await streamed(store, BASE + 7, BASE + 8) == []

    async def test_a_stream_of_some_hours_gives_those_hours(self, store: Store) -> None:
        """Wanted hours with many and with no records, at both ends of a range that cuts hours."""
        batch = [record(i, log_timestamp=BASE + i * (HOUR // 4)) for i in range(60)]
        await write(store, batch)
        first = BASE // HOUR
        wanted = {first, first + 3, first + 4, first + 9, first + 40}
        start, end = BASE + 1, BASE + 10 * HOUR - HOUR // 4
        expected = [r for r in batch[1:39] if r.log_timestamp // HOUR in wanted]
        await awaited(lambda: streamed(store, start, end, hours=wanted.__contains__), expected)
        after = _position(expected[4])
        assert await streamed(store, start, end, after=after, hours=wanted.__contains__) == expected[5:]
        assert [entry async for entry in store.scan(start, end, hours=wanted.__contains__)] == _scan_of(expected)

    @settings(drawn, max_examples=8)
    @given(drawn_batch=st.lists(log_records(times=st.integers(BASE, BASE + 6)), min_size=1, max_size=12))
    async def test_every_store_gives_the_answer_of_the_reference(
        self, store: Store, drawn_batch: list[LogRecord]
    ) -> None:
        """Any records, each query that one of them answers to: same records, same order, as the store in memory."""
        batch = fresh(drawn_batch)
        reference = MemoryStore()
        await write(reference, batch)
        await write(store, batch)
        start, end = BASE, BASE + 6
        queries: set[Query] = {ErrorsOn(start // DAY)}
        for r in batch:
            queries.add(ByService(r.service_name, start, end))
            queries |= {ByApplication(r.application_id)} if r.application_id is not None else set()
            queries |= {ByCorrelation(r.correlation_id)} if r.correlation_id is not None else set()
        ids = {r.log_id for r in batch}
        for query in queries:

            async def mine(query: Query = query) -> list[LogRecord]:
                return [r for r in await pages(store, query, 100) if r.log_id in ids]

            await awaited(mine, await pages(reference, query, 100))


class TestLife:
    """Opening, creating, closing."""

    async def test_ping_passes_where_a_write_would(self, store: Store) -> None:
        """No error, and nothing is left behind."""
        await store.ping()
        assert await entries(store, BASE - DAY, BASE + DAY) == []

    async def test_create_again_does_nothing(self, store: Store) -> None:
        """All is there: the answer is empty, and what was written stays."""
        await write(store, [record(1)])
        assert list(await store.create()) == []
        assert await store.get(log_id(1)) == record(1)

    async def test_a_created_store_passes_its_own_check(self, store: Store) -> None:
        """What ``create`` makes is what ``check`` asks for."""
        checks = await store.check()
        assert checks
        assert [c for c in checks if not c.ok and not c.name.endswith("pitr")] == []

    async def test_close_twice_is_close(self, store: Store) -> None:
        """Idempotent, also right after work."""
        await write(store, records(3))
        await store.close()
        await store.close()


def _position(of: LogRecord) -> Position:
    return Position(of.log_timestamp, of.log_id)


def _scan_of(batch: Sequence[LogRecord]) -> list[ScanEntry]:
    ordered = newest_first(batch)[::-1]
    return [entry_of(r) for r in ordered]

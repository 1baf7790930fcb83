"""Reading through the indexes: order, pages, fan-out, bodies, expiry, counts and the ordered scan."""

import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.errors import RetryClass, StoreError
from sidecar.record import LogRecord
from sidecar.stores import dynamodb_scan, external_sort
from sidecar.stores.base import (
    ByApplication,
    ByCorrelation,
    ByService,
    CountQuery,
    ErrorsOn,
    Position,
    Query,
    ScanEntry,
    entry_of,
)
from sidecar.stores.dynamodb import DynamoDBStore
from tests.parts.dynamodb import DAY_US, NOON_US, newest_first, record, store_all
from tests.parts.fault_proxy import FaultProxy, Raw, Refuse, Unprocess

HOUR_US = DAY_US // 24


class FixedClock(SystemClock):
    """The machine's clocks, but for the wall's."""

    def __init__(self, now_us: int) -> None:
        self.now = now_us

    def now_us(self) -> int:
        """Where it stands."""
        return self.now


async def pages(store: DynamoDBStore, query: Query, limit: int) -> list[LogRecord]:
    """Everything, page by page."""
    found: list[LogRecord] = []
    before: Position | None = None
    while page := await store.query(query, before=before, limit=limit):
        assert len(page) <= limit
        found.extend(page)
        before = Position(page[-1].log_timestamp, page[-1].log_id)
    return found


def queries(proxy: FaultProxy) -> list[dict[str, Any]]:
    """The Query bodies that passed the proxy."""
    return [body for operation, body in proxy.bodies if operation == "Query"]


def spread(days: int, count: int, **changes: Any) -> list[LogRecord]:
    """Records at random times of the days up to NOON_US, some at equal times."""
    chance = random.Random(4711)
    times = [NOON_US - chance.randrange(days * DAY_US) for _ in range(count // 2)]
    return [record(log_timestamp=chance.choice(times), **changes) for _ in range(count)]


@pytest.mark.parametrize("limit", [1, 7, 100])
async def test_days_and_shards_merge_into_one_order(dynamodb_store: DynamoDBStore, limit: int) -> None:
    """Five days of four shards, pages of any size: each record once, newest first, equal times by id."""
    batch = spread(5, 60)
    await store_all(dynamodb_store, batch)
    query = ByService("orders", NOON_US - 5 * DAY_US, NOON_US)
    assert await pages(dynamodb_store, query, limit) == newest_first(batch)


async def test_a_range_of_millennia_finds_its_few_days(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """A scan tells which days there are; a service whose name begins the same is another one."""
    batch = [record(log_timestamp=time) for time in (-62_135_596_800_000_000, -1, 0, NOON_US, 253_402_300_799_999_999)]
    others = [record(service_name=name) for name in ("orders#2024-10-04", "orders#", "order")]
    await store_all(dynamodb_behind_proxy, [*batch, *others])
    query = ByService("orders", -(10**18), 10**18)
    assert await pages(dynamodb_behind_proxy, query, 10) == newest_first(batch)
    assert dynamodb_proxy.calls["Query"] < 100
    assert await dynamodb_behind_proxy.count(CountQuery(-(10**18), 10**18, "orders")) == 5


async def test_no_more_days_are_read_than_the_answer_needs(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """The newest day is enough: its four shards, one page each."""
    await store_all(dynamodb_behind_proxy, [record(log_timestamp=NOON_US - i) for i in range(20)])
    dynamodb_proxy.bodies.clear()
    await dynamodb_behind_proxy.query(ByService("orders", NOON_US - 30 * DAY_US, NOON_US), before=None, limit=10)
    asked = [body["ExpressionAttributeValues"][":p"]["S"] for body in queries(dynamodb_proxy)]
    assert {key.rpartition("#")[0] for key in asked} == {"S#orders#2024-10-04"}
    assert len(set(asked)) == 4


async def test_partitions_larger_than_a_page_of_the_service_are_read_to_the_end(
    dynamodb_proxy: FaultProxy, dynamodb_settings: settings.DynamoDB
) -> None:
    """The service ends a page at 1 MB, whatever was asked: the next one is asked for."""
    options = msgspec.structs.replace(dynamodb_settings, endpoint_url=dynamodb_proxy.url, read_in_flight=1)
    store = DynamoDBStore(options, clock=SystemClock())
    batch = [record(log_timestamp=NOON_US - n, request_data="x" * 20_000) for n in range(120)]
    await store_all(store, batch)
    assert await store.query(ByApplication(7), before=None, limit=500) == newest_first(batch)
    assert dynamodb_proxy.calls["Query"] > 1
    assert await store.count(CountQuery(NOON_US - 100, NOON_US)) == 101
    assert [entry async for entry in store.scan(0, NOON_US + 1)] == entries(batch)
    assert dynamodb_proxy.calls["Scan"] > 2
    await store.close()


@pytest.mark.parametrize(
    ("query", "changes"),
    [
        (ByApplication(7), {}),
        (ByApplication(-(2**63)), {"application_id": -(2**63)}),
        (ByCorrelation("c-1"), {}),
        (ByCorrelation(""), {"correlation_id": ""}),
        (ByCorrelation("C#\u00e9#1"), {"correlation_id": "C#\u00e9#1"}),
        (ErrorsOn(NOON_US // DAY_US), {"is_success": False}),
    ],
    ids=str,
)
async def test_each_index_gives_its_own_records(
    dynamodb_store: DynamoDBStore, query: Query, changes: dict[str, object]
) -> None:
    """Neither null nor another value is among them, whatever the key's text."""
    others = [
        record(application_id=None, correlation_id=None),
        record(application_id=8, correlation_id="C#", is_success=True),
        record(application_id=0, correlation_id="other", log_timestamp=NOON_US - DAY_US, is_success=False),
    ]
    batch = [record(log_timestamp=NOON_US - n * HOUR_US, **changes) for n in range(9)]
    await store_all(dynamodb_store, [*batch, *others])
    assert await pages(dynamodb_store, query, 4) == newest_first(batch)


async def test_bodies_that_were_not_processed_are_asked_for_again(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """The answer is whole, however small the parts in which the bodies come."""
    batch = spread(1, 30)
    await store_all(dynamodb_behind_proxy, batch)
    dynamodb_proxy.on("BatchGetItem", Unprocess(share=0.3, least=1))
    assert await dynamodb_behind_proxy.query(ByApplication(7), before=None, limit=30) == newest_first(batch)
    assert dynamodb_proxy.calls["BatchGetItem"] > 3


async def test_bodies_that_never_come_are_a_throttled_read(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """A bounded number of rounds, and never a short answer."""
    await store_all(dynamodb_behind_proxy, [record()])
    dynamodb_proxy.on("BatchGetItem", Unprocess(share=0))
    with pytest.raises(StoreError) as caught:
        await dynamodb_behind_proxy.query(ByApplication(7), before=None, limit=30)
    assert (caught.value.retry_class, caught.value.code) == (RetryClass.THROTTLE, "UnprocessedKeys")


async def test_one_failed_shard_fails_the_query(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """Never an answer with a hole in it."""
    await store_all(dynamodb_behind_proxy, spread(1, 20))
    for call in (
        dynamodb_behind_proxy.query(ByService("orders", NOON_US - DAY_US, NOON_US), before=None, limit=9),
        dynamodb_behind_proxy.count(CountQuery(NOON_US - DAY_US, NOON_US, "orders")),
    ):
        dynamodb_proxy.on("Query", None, None, Refuse(500, "InternalServerError"))
        with pytest.raises(StoreError) as caught:
            await call
        assert caught.value.retry_class is RetryClass.TRANSIENT
        dynamodb_proxy.clear()


async def test_a_failed_page_of_a_scan_fails_the_scan_before_its_first_entry(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """A validation never takes a failure for the end."""
    await store_all(dynamodb_behind_proxy, spread(1, 20))
    dynamodb_proxy.on("Scan", None, None, Refuse(400, "ThrottlingException"))
    with pytest.raises(StoreError):
        await anext(aiter(dynamodb_behind_proxy.scan(0, NOON_US + 1)))


async def test_a_hit_whose_body_was_deleted_fails_the_read(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """Read again, strongly consistent, and then said: the index is ahead, nothing is hidden."""
    batch = [record(), record()]
    await store_all(dynamodb_behind_proxy, batch)
    answer = {"Items": [{"gt": {"S": f"2024-10-04T12:00:00.000000Z#{name}"}} for name in ("gone", batch[0].log_id)]}
    dynamodb_proxy.on("Query", Raw(200, msgspec.json.encode({**answer, "Count": 2})))
    with pytest.raises(StoreError, match="names 1 records") as caught:
        await dynamodb_behind_proxy.query(ByApplication(7), before=None, limit=9)
    assert caught.value.retry_class is RetryClass.TRANSIENT
    asked = [body["RequestItems"] for operation, body in dynamodb_proxy.bodies if operation == "BatchGetItem"]
    assert [table["ConsistentRead"] for request in asked for table in request.values()] == [False, True]


async def test_a_body_that_a_replica_has_not_yet_is_found_by_the_second_read(
    dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> None:
    """The eventually consistent read missed it; the answer is whole."""
    batch = [record(), record()]
    await store_all(dynamodb_behind_proxy, batch)
    dynamodb_proxy.on("BatchGetItem", Raw(200, b'{"Responses": {}, "UnprocessedKeys": {}}'), None)
    assert await dynamodb_behind_proxy.query(ByApplication(7), before=None, limit=9) == newest_first(batch)


class TestExpiry:
    """With ``ttl_days`` a record is gone when its time has come, whatever the service has deleted."""

    NOW = NOON_US
    BATCH = (
        record(log_timestamp=NOW - 3 * DAY_US, is_success=False),  # expires at this very instant
        record(log_timestamp=NOW - 3 * DAY_US + 1, is_success=False),
        record(log_timestamp=NOW, is_success=False),
    )

    @pytest.fixture
    async def store(
        self, dynamodb_store: DynamoDBStore, dynamodb_settings: settings.DynamoDB
    ) -> AsyncIterator[DynamoDBStore]:
        """Three days, on a table that still has everything."""
        await store_all(dynamodb_store, self.BATCH)
        options = msgspec.structs.replace(dynamodb_settings, ttl_days=3)
        store = DynamoDBStore(options, clock=FixedClock(self.NOW))
        yield store
        await store.close()

    @pytest.mark.parametrize(
        "query",
        [
            ByApplication(7),
            ByCorrelation("c-1"),
            ByService("orders", NOW - 9 * DAY_US, NOW),
            ErrorsOn((NOW - 3 * DAY_US) // DAY_US),
        ],
        ids=str,
    )
    async def test_queries_hide_it(self, store: DynamoDBStore, query: Query) -> None:
        """In every index."""
        found = await pages(store, query, 2)
        assert found == [r for r in newest_first(self.BATCH[1:]) if r in found]
        assert self.BATCH[1] in found

    async def test_get_count_and_scan_hide_it(self, store: DynamoDBStore) -> None:
        """One rule for all reads."""
        assert [await store.get(r.log_id) for r in self.BATCH] == [None, *self.BATCH[1:]]
        start = self.NOW - 9 * DAY_US
        for service, success in ((None, None), ("orders", None), (None, False), ("orders", False)):
            assert await store.count(CountQuery(start, self.NOW, service, success)) == 2
        assert [entry.log_id async for entry in store.scan(start, self.NOW + 1)] == [r.log_id for r in self.BATCH[1:]]

    async def test_create_turns_the_services_own_expiry_on(self, store: DynamoDBStore) -> None:
        """By the attribute that items carry."""
        assert "time to live by expires_at" in await store.create()
        assert await store.create() == []
        assert {c.name: c.ok for c in await store.check()}["time to live"]


@pytest.mark.parametrize("service", [None, "orders"])
@pytest.mark.parametrize("success", [None, True, False])
@pytest.mark.parametrize(("start", "end"), [(NOON_US - 2 * DAY_US, NOON_US - DAY_US), (-(10**18), 10**18)])
async def test_counts_are_exact(
    dynamodb_store: DynamoDBStore, service: str | None, success: bool | None, start: int, end: int
) -> None:
    """All services or one, successes, failures or both, some days or all time."""
    batch = [*spread(4, 20), *spread(4, 20, is_success=False), *spread(4, 20, service_name="billing", is_success=False)]
    await store_all(dynamodb_store, batch)
    expected = [
        r
        for r in batch
        if start <= r.log_timestamp <= end
        and (service is None or r.service_name == service)
        and (success is None or r.is_success is success)
    ]
    assert await dynamodb_store.count(CountQuery(start, end, service, success)) == len(expected)


def entries(batch: Sequence[LogRecord]) -> list[ScanEntry]:
    """What a scan of these gives."""
    return sorted(entry_of(r) for r in batch)


@pytest.mark.parametrize(("run", "merge"), [(32_768, 64), (40, 64), (16, 3)])
async def test_a_scan_is_ordered_and_complete_in_bounded_memory(
    dynamodb_store: DynamoDBStore, monkeypatch: pytest.MonkeyPatch, run: int, merge: int
) -> None:
    """In memory, by sorted runs in files, and by runs of runs: the same entries, ascending, with their digests."""
    monkeypatch.setattr(external_sort, "RUN_ENTRIES", run)
    monkeypatch.setattr(external_sort, "MERGE_RUNS", merge)
    monkeypatch.setattr(dynamodb_scan, "CHUNK_ENTRIES", 7)
    monkeypatch.setattr(external_sort, "CHUNK_ENTRIES", 7)
    batch = [*spread(3, 200), *spread(3, 50, service_name="billing", is_success=False)]
    await store_all(dynamodb_store, batch)
    start, end = NOON_US - 2 * DAY_US, max(r.log_timestamp for r in batch)
    expected = [e for e in entries(batch) if start <= e.log_timestamp < end]
    assert [entry async for entry in dynamodb_store.scan(start, end)] == expected


async def test_a_range_that_does_not_fit_on_the_disk_is_answered_whole_by_reading_the_index_again(
    dynamodb_store: DynamoDBStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for 30 entries, 250 to sort: each once, ascending; and never more in files than was allowed."""
    monkeypatch.setattr(external_sort, "RUN_ENTRIES", 10)
    monkeypatch.setattr(dynamodb_scan, "CHUNK_ENTRIES", 7)
    monkeypatch.setattr(external_sort, "CHUNK_ENTRIES", 7)
    monkeypatch.setattr(external_sort.Sorter, "__init__", _small(external_sort.Sorter.__init__, 30))
    written, held = external_sort._write, []

    def write(entries: Any) -> Any:
        file = written(entries)
        held.append(file)
        sizes = [len(list(external_sort._read(f))) for f in held if not f.closed]
        for each in held:
            if not each.closed:
                each.seek(0)
        assert sum(sizes) <= 2.1 * 30
        return file

    monkeypatch.setattr(external_sort, "_write", write)
    batch = spread(3, 250)
    await store_all(dynamodb_store, batch)
    end = max(r.log_timestamp for r in batch) + 1
    found = [entry async for entry in dynamodb_store.scan(0, end)]
    assert found == entries(batch)
    assert len(held) > 25


def _small(init: Any, most: int) -> Any:
    def patched(self: Any, disk_bytes: int, floor: bytes) -> None:
        init(self, disk_bytes, floor)
        self._most = most

    return patched


async def test_a_rate_bounds_the_entries_that_are_read(dynamodb_store: DynamoDBStore) -> None:
    """Those of the index, wanted or not, by the store's clock."""
    await store_all(dynamodb_store, spread(1, 60))
    slept: list[float] = []

    class Noted(SystemClock):
        async def sleep(self, seconds: float) -> None:
            slept.append(seconds)

    dynamodb_store._enumeration._clock = Noted()
    dynamodb_store.pace(10.0)
    assert [entry async for entry in dynamodb_store.scan(0, 1)] == []
    assert sum(slept) > 4.0
    slept.clear()
    dynamodb_store.pace(0.0)
    assert [entry async for entry in dynamodb_store.scan(0, 1)] == []
    assert slept == []


async def test_where_a_rate_bounds_it_the_index_is_read_in_small_pages(
    dynamodb_store: DynamoDBStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more than so many entries in one call, and the same answer; without a rate a call takes what fits."""
    monkeypatch.setattr(dynamodb_scan, "_PACED_PAGE", 7)
    batch = spread(3, 100)
    await store_all(dynamodb_store, batch)
    pages: list[int] = []
    scan = dynamodb_store._pages.scan

    async def noted(*arguments: Any, **options: Any) -> Any:
        page = await scan(*arguments, **options)
        pages.append(page[2])
        return page

    monkeypatch.setattr(dynamodb_store._pages, "scan", noted)
    end = max(r.log_timestamp for r in batch) + 1
    for rate in (100_000.0, 0.0):
        pages.clear()
        dynamodb_store.pace(rate)
        assert [entry async for entry in dynamodb_store.scan(0, end)] == entries(batch)
        assert sum(pages) == len(batch)
        assert (max(pages) <= 7) is (rate > 0)


async def test_a_scan_that_cannot_write_its_files_is_a_store_error(
    dynamodb_store: DynamoDBStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full or missing TMPDIR is said, with nothing yielded."""
    monkeypatch.setattr(external_sort, "RUN_ENTRIES", 5)
    monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
    await store_all(dynamodb_store, spread(1, 30))
    with pytest.raises(StoreError, match="TMPDIR"):
        await anext(aiter(dynamodb_store.scan(0, NOON_US + 1)))


async def test_a_scan_left_early_leaves_nothing_open(
    dynamodb_store: DynamoDBStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are closed with it; warnings are errors here."""
    monkeypatch.setattr(external_sort, "RUN_ENTRIES", 5)
    batch = spread(1, 30)
    await store_all(dynamodb_store, batch)
    found = dynamodb_store.scan(0, NOON_US + 1)
    assert await anext(found) == entries(batch)[0]
    assert isinstance(found, AsyncGenerator)
    await found.aclose()

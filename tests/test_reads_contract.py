"""What reads need of every store beyond queries and counts, run on each: summaries, groups, estimates, samples."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sidecar.record import timestamp_text
from sidecar.stores.base import (
    ByApplication,
    ByCorrelation,
    ByService,
    CountQuery,
    ErrorsOn,
    Store,
    position_of,
    summary_of,
)
from sidecar.stores.postgres import PostgresStore
from tests.stores.records import BASE, DAY, fresh, log_records, record, records
from tests.stores.test_contract import awaited, drawn, memory_store, newest_first, store, write

__all__ = ["memory_store", "store"]  # fixtures


def day(record):
    return timestamp_text(record.log_timestamp)[:10]


@pytest.mark.parametrize(
    "query",
    [ByApplication(7), ByCorrelation("corr-1"), ByService("orders", BASE, BASE + 2 * DAY), ErrorsOn(BASE // DAY)],
)
async def test_summaries_are_the_records_of_the_query_cut_to_what_indexes_hold(store: Store, query):
    """Same order, same paging as the records themselves, also among equal times."""
    batch = [record(i, log_timestamp=BASE + i % 3, is_success=False, status_code=i or None) for i in range(9)]
    await write(store, batch)
    expected = [summary_of(r) for r in newest_first(batch)]
    await awaited(lambda: _list(store.summaries(query, before=None, limit=50)), expected)
    after = expected[3]
    rest = await store.summaries(query, before=position_of(after), limit=3)
    assert list(rest) == expected[4:7]


@hypothesis_settings(drawn, max_examples=6)
@given(batch=st.lists(log_records(times=st.integers(BASE, BASE + 3 * DAY)), min_size=1, max_size=10), data=st.data())
async def test_grouped_counts_are_those_of_the_records(store: Store, batch, data):
    """By day and by service, for any service and outcome; names with '#' and everything else included."""
    batch = fresh(batch)
    await write(store, batch)
    service = data.draw(st.sampled_from([r.service_name for r in batch]))
    query = CountQuery(BASE, BASE + 3 * DAY, service, data.draw(st.sampled_from([None, True, False])))
    counted = [r for r in batch if r.service_name == service and query.is_success in (None, r.is_success)]
    by_day = Counter(map(day, counted))

    async def mine() -> dict[str, int]:
        return dict(await store.count_by(query, "date"))

    found = await mine()  # examples share the store: another one may have the same service
    assert all(found.get(key, 0) >= number for key, number in by_day.items())
    assert sum(found.values()) == await store.count(query)
    assert dict(await store.count_by(query, "service")) == ({service: sum(found.values())} if found else {})


async def test_counts_over_all_services_group_by_service_and_by_day(store: Store):
    """Every record is in exactly one group, whatever its service's name."""
    names = ("orders", "a#2026-01-15#0", "#", "S#x#", "orders#", "é")
    batch = [
        record(i, log_timestamp=BASE + i * DAY // 10, service_name=names[i % 6], is_success=i % 4 > 0)
        for i in range(30)
    ]
    await write(store, batch)
    for outcome in (None, True, False):
        counted = [r for r in batch if outcome in (None, r.is_success)]
        query = CountQuery(BASE, BASE + 3 * DAY, None, outcome)
        await awaited(lambda q=query: _dict(store.count_by(q, "service")), Counter(r.service_name for r in counted))
        await awaited(lambda q=query: _dict(store.count_by(q, "date")), Counter(map(day, counted)))


async def test_an_estimate_is_a_number_that_says_how_it_was_made(store: Store):
    """For every filter, near or far, over no record and over some."""
    await write(store, records(40))
    for service in (None, "orders", "nobody"):
        for outcome in (None, True, False):
            estimate = await store.estimate(CountQuery(BASE, BASE + 40 * DAY, service, outcome))
            assert estimate.count >= 0
            assert len(estimate.method) > 10
    assert (await store.estimate(CountQuery(BASE, BASE))).count >= 0


async def test_an_estimate_of_an_even_spread_is_near(store: Store):
    """A service's thousand records: one shard of four, scaled, is within half of it (PostgreSQL: after ANALYZE)."""
    await write(store, [record(i, log_timestamp=BASE + i) for i in range(1000)])
    if isinstance(store, PostgresStore):
        await store._writers.run(lambda link: link.connection.execute("ANALYZE"))
    estimate = await store.estimate(CountQuery(BASE, BASE + DAY, "orders"))
    assert 500 <= estimate.count <= 1500


async def test_a_sample_is_of_records_that_are_there(store: Store):
    """Older than asked for, at most as many as asked for, and in the end one is found."""
    batch = records(30)
    await write(store, batch)
    found = []
    for _ in range(64):
        sample = await store.sample(before=BASE + 20 * 1_000_000, limit=5)
        assert len(sample) <= 5
        assert all(r in batch[:20] for r in sample)
        found += sample
    assert found


async def _list(ask):
    return list(await ask)


async def _dict(ask):
    return dict(await ask)

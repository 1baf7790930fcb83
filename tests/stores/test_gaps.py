"""The contract of ``sidecar.gaps.GapLedger``: the fleet's reference and both stores say the same."""

import asyncio

import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.errors import RetryClass, StoreError
from sidecar.fleet import MemoryFleetStore
from sidecar.gaps import GapLine, summed
from sidecar.phase import DYNAMODB, POSTGRES
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.postgres import PostgresStore
from tests.parts.fault_proxy import LoseReply
from tests.parts.postgres import connect

LINE = GapLine(store=DYNAMODB, kind="released", hour=484_000, source="pod-1/4f2a/17", opened=5)


@pytest.fixture(params=["memory", "postgres", "dynamodb"])
async def ledger(request, postgres: settings.Postgres, dynamodb_store: DynamoDBStore):
    """An empty ledger."""
    store = PostgresStore(postgres, clock=SystemClock())
    yield {
        "memory": MemoryFleetStore(POSTGRES, SystemClock()),
        "postgres": store.gap_ledger,
        "dynamodb": dynamodb_store.gap_ledger,
    }[request.param]
    await store.close()


def changed(**fields):
    """The line with other values."""
    return msgspec.structs.replace(LINE, **fields)


async def test_an_empty_ledger_has_no_gap(ledger):
    """A ledger that was never written answers an empty list; writing nothing is no error."""
    assert list(await ledger.gaps()) == []
    await ledger.put_gaps([])
    assert list(await ledger.gaps()) == []


async def test_a_line_comes_back_field_by_field_and_twice_is_once(ledger):
    """Text of any kind in the source, hours before 1970, both kinds of store; a repetition counts nothing."""
    lines = [
        LINE,
        changed(hour=-3, kind="history", source="fleet"),
        changed(store=POSTGRES, kind="not_owed", source="a#b'\"\\ü 1=1; --", opened=2**40, closed=1),
    ]
    for _ in range(2):
        await ledger.put_gaps(lines)
    assert sorted(await ledger.gaps(), key=lambda each: each.key) == sorted(lines, key=lambda each: each.key)


async def test_counts_only_grow_whatever_the_order(ledger):
    """A late line with a smaller count changes nothing; closing what was seen leaves what was opened since."""
    await ledger.put_gaps([changed(opened=7), changed(opened=3)])
    await ledger.put_gaps([changed(opened=2)])
    assert list(await ledger.gaps()) == [changed(opened=7)]
    await ledger.put_gaps([changed(opened=7, closed=7)])
    assert list(await ledger.gaps()) == []
    await ledger.put_gaps([changed(opened=9)])
    assert list(await ledger.gaps()) == [changed(opened=9, closed=7)]


async def test_writers_of_the_same_lines_at_once_end_with_the_larger_counts(ledger):
    """Ten writers, the lines in opposite orders: no deadlock, no lost count."""
    hours = range(484_000, 484_020)
    batches = [[changed(hour=hour, opened=n) for hour in (hours if n % 2 else reversed(hours))] for n in range(1, 11)]
    await asyncio.gather(*(ledger.put_gaps(batch) for batch in batches))
    assert sorted((line.hour, line.opened) for line in await ledger.gaps()) == [(hour, 10) for hour in hours]


async def test_more_lines_than_one_page_come_back_whole(dynamodb_store, dynamodb_settings):
    """Over 1 MB of items, so that DynamoDB answers in pages."""
    table = dynamodb_settings.fleet_table
    for start in range(0, 1200, 25):
        items = [
            {
                "pk": {"S": "gaps"},
                "sk": {"S": f"dynamodb#released#{n}#{'x' * 950}"},
                "opened": {"N": "1"},
                "closed": {"N": "0"},
            }
            for n in range(start, start + 25)
        ]
        body = {"RequestItems": {table: [{"PutRequest": {"Item": item}} for item in items]}}
        await dynamodb_store.wire.call("BatchWriteItem", msgspec.json.encode(body))
    assert [line.hour for line in sorted(await dynamodb_store.gap_ledger.gaps(), key=lambda line: line.hour)] == list(
        range(1200)
    )


async def test_a_lost_answer_is_repeated_without_a_second_count(dynamodb_behind_proxy, dynamodb_proxy):
    """Applied, the reply lost, written again: one line with its own count."""
    ledger = dynamodb_behind_proxy.gap_ledger
    dynamodb_proxy.on("UpdateItem", LoseReply(), times=1)
    with pytest.raises(StoreError) as raised:
        await ledger.put_gaps([LINE])
    assert raised.value.retry_class is RetryClass.TRANSIENT
    await ledger.put_gaps([LINE])
    assert list(await ledger.gaps()) == [LINE]


async def test_a_database_without_the_ledger_is_blocked_reported_and_mended_by_create(postgres: settings.Postgres):
    """What an earlier version created: BLOCKED with the code, a red check, and ``create`` adds the table."""
    admin = await connect(postgres)
    store = PostgresStore(postgres, clock=SystemClock())
    try:
        await admin.execute("DROP TABLE integration_logs_gaps")
        with pytest.raises(StoreError) as raised:
            await store.gap_ledger.put_gaps([LINE])
        assert (raised.value.retry_class, raised.value.code) == (RetryClass.BLOCKED, "42P01")
        assert not {check.name: check.ok for check in await store.check()}["postgres.gaps"]
        assert await store.create() == ["table public.integration_logs_gaps"]
        assert {check.name: check.ok for check in await store.check()}["postgres.gaps"]
        await store.gap_ledger.put_gaps([LINE])
    finally:
        await store.close()
        await admin.close()


def test_lines_of_several_ledgers_are_one_line_for_each_key():
    """What both stores know is not added up twice."""
    assert summed([LINE, changed(opened=4, closed=2), changed(hour=1)]) == [changed(closed=2), changed(hour=1)]

"""A DynamoDB that takes so many items a second: what it is offered, steadily and after an outage."""

import asyncio
import time

import pytest

from sidecar import retry
from sidecar.retry import State
from sidecar.stores.dynamodb import DynamoDBStore
from tests.parts.delivery import delivering, record
from tests.parts.fault_proxy import FaultProxy, Refuse
from tests.parts.sidecar import eventually

RATE = 200


async def test_the_offer_settles_at_the_stores_rate_and_starts_slowly_after_an_outage(
    tmp_path, dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
):
    """0.7 to 1.1 of the rate over four seconds, counted at the proxy; a tenth of it in the first second back.

    What is a long outage is scaled down: five seconds to one, so that 1.5 s stand for five minutes.
    """
    monkeypatch.setattr(retry, "_SHORT_OUTAGE", 1.0)
    proxy = dynamodb_proxy
    proxy.limit("BatchWriteItem", RATE)
    offered = proxy.items
    async with delivering(tmp_path, dynamodb_behind_proxy) as delivery:
        for start in range(0, 6000, 500):
            await delivery.accept([record(n) for n in range(start, start + 500)])
        await delivery.state(State.THROTTLED)

        async def settled() -> bool:
            began, before, taken = time.monotonic(), offered["BatchWriteItem"], proxy.applied["BatchWriteItem"]
            await asyncio.sleep(4)
            seconds = time.monotonic() - began
            counts = offered["BatchWriteItem"] - before, proxy.applied["BatchWriteItem"] - taken
            return all(0.7 * RATE <= count / seconds <= 1.1 * RATE for count in counts)

        await asyncio.sleep(5)
        await eventually(
            settled, seconds=10, what="it offers what the store takes"
        )  # on a machine that has time for it

        proxy.on("BatchWriteItem", Refuse(500, "InternalServerError"))
        await delivery.state(State.DOWN)
        await eventually(lambda: delivery.shipper.status().down_seconds > 1.5)
        calls, before = proxy.calls["BatchWriteItem"], offered["BatchWriteItem"]
        await asyncio.sleep(1)
        assert proxy.calls["BatchWriteItem"] - calls <= 60  # one probe at a time, and waits between them
        proxy.clear()
        proxy.limit("BatchWriteItem", RATE)
        applied, before = proxy.applied["BatchWriteItem"], offered["BatchWriteItem"]
        await eventually(lambda: proxy.applied["BatchWriteItem"] > applied, every=0.005)
        began = time.monotonic()
        await asyncio.sleep(1)
        slow = offered["BatchWriteItem"] - before
        assert slow <= 0.1 * RATE * max(1.0, time.monotonic() - began)
        assert not await delivery.dead()

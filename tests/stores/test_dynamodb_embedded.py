"""The local DynamoDB: starts, ends, and never outlives whoever started it."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import aioboto3
import msgspec
import pytest

from sidecar.clock import SystemClock
from sidecar.embedded import dynamodb as embedded
from sidecar.embedded.dynamodb import REGION, EmbeddedDynamoDB
from sidecar.embedded.postgres import EmbeddedError
from sidecar.stores.dynamodb import DynamoDBStore
from tests.parts.dynamodb import CREDENTIALS, record

STARTER = """
import asyncio, sys, time
from sidecar.embedded.dynamodb import EmbeddedDynamoDB
server = EmbeddedDynamoDB()
asyncio.run(server.start())
print(server.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any will do."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


def gone(pid: int) -> bool:
    """True when the process is no more, or waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def until_gone(pid: int) -> None:
    """Wait for it, 10 s at most."""
    deadline = time.monotonic() + 10
    while not gone(pid):
        assert time.monotonic() < deadline, "the server lives on"
        await asyncio.sleep(0.02)


async def test_it_serves_the_store_and_comes_back_empty_on_the_same_port() -> None:
    """A crash loses its data and keeps its address."""
    server = EmbeddedDynamoDB()
    await server.start()
    try:
        await server.start()  # idempotent
        port, value = server.port, record()
        store = DynamoDBStore(server.settings(), clock=SystemClock())
        await store.create()
        await store.write([value])
        assert await store.get(value.log_id) == value
        await store.close()
        server.kill()
        assert server.pid is None
        await server.start()
        assert server.port == port
        await store.create()
        assert await store.get(value.log_id) is None
        await store.close()
    finally:
        await server.stop()
    await server.stop()
    assert server.pid is None


async def test_it_dies_with_its_parent() -> None:
    """Even when that is killed with no chance to clean up."""
    parent = subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(await asyncio.to_thread(parent.stdout.readline))
    assert not gone(pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(timeout=5)
    parent.stdout.close()
    await until_gone(pid)


async def test_a_taken_port_is_an_error_with_the_childs_words(unused_tcp_port: int) -> None:
    """And leaves no process behind."""
    first, second = EmbeddedDynamoDB(unused_tcp_port), EmbeddedDynamoDB(unused_tcp_port)
    await first.start()
    try:
        with pytest.raises(EmbeddedError, match="in use"):
            await second.start()
        assert second.pid is None
    finally:
        await first.stop()


async def test_a_start_that_is_cancelled_or_too_slow_leaves_no_process() -> None:
    """Nobody else would end the child."""
    slow = EmbeddedDynamoDB(start_timeout=0)
    with pytest.raises(EmbeddedError):
        await slow.start()
    assert slow.pid is None
    server = EmbeddedDynamoDB()
    starting = asyncio.ensure_future(server.start())
    while not (pid := server.pid):
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await until_gone(pid)


def test_its_settings_need_nothing_else() -> None:
    """Region and endpoint are given; the rest is the default."""
    given = EmbeddedDynamoDB(8000).settings()
    assert (given.endpoint_url, given.region) == ("http://127.0.0.1:8000", "eu-west-1")
    assert msgspec.structs.replace(given, endpoint_url=None, region=None) == type(given)()


@pytest.mark.parametrize("one_at_a_time", [True, False], ids=["as it is", "control"])
async def test_of_conditional_writes_at_once_exactly_one_succeeds(
    monkeypatch: pytest.MonkeyPatch, one_at_a_time: bool
) -> None:
    """As in DynamoDB, wherever the server's threads take turns; without the lock more than one does."""
    code = "import sys; sys.setswitchinterval(1e-6)\n" + embedded._SERVE
    assert "with writes:" in code
    monkeypatch.setattr(embedded, "_SERVE", code if one_at_a_time else code.replace("with writes:", "if True:"))
    server = EmbeddedDynamoDB()
    await server.start()
    try:
        async with aioboto3.Session(region_name=REGION).client("dynamodb", endpoint_url=server.endpoint_url) as client:
            await client.create_table(
                TableName="once",
                KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
                AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
                BillingMode="PAY_PER_REQUEST",
            )

            async def put(name: str) -> int:
                try:
                    await client.put_item(
                        TableName="once", Item={"id": {"S": name}}, ConditionExpression="attribute_not_exists(id)"
                    )
                except client.exceptions.ConditionalCheckFailedException:
                    return 0
                return 1

            async def winners(n: int) -> int:
                return sum(await asyncio.gather(*(put(str(n)) for _ in range(4))))

            if one_at_a_time:
                assert {await winners(n) for n in range(100)} == {1}
            else:
                for n in range(5_000):
                    if await winners(n) > 1:
                        return
                pytest.fail("the race was not met: the test proves nothing")
    finally:
        await server.stop()

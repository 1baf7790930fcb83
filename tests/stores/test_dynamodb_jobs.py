"""Facts of the documents that long jobs keep in the fleet table: compare-and-set, by prefix, readable or an error."""

import pytest

from sidecar import settings
from sidecar.errors import RetryClass, StoreError
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.dynamodb_jobs import DynamoDBJobs
from tests.parts.fault_proxy import FaultProxy, LoseReply, Raw


@pytest.fixture
def jobs(dynamodb_store: DynamoDBStore, dynamodb_settings: settings.DynamoDB) -> DynamoDBJobs:
    """In a fleet table that is there."""
    return DynamoDBJobs(dynamodb_store.wire, dynamodb_settings)


async def test_a_document_is_replaced_only_by_who_knows_its_version(jobs: DynamoDBJobs) -> None:
    """The first write says 0, each later one the version that it saw; another one changes nothing."""
    assert await jobs.read("a/1") is None
    assert await jobs.write("a/1", b'{"n":1}', 0)
    assert not await jobs.write("a/1", b'{"n":2}', 0)
    assert await jobs.write("a/1", '{"n":"é"}'.encode(), 1)
    assert not await jobs.write("a/1", b'{"n":3}', 1)
    assert await jobs.read("a/1") == ('{"n":"é"}'.encode(), 2)


async def test_documents_are_found_by_the_beginning_of_their_key(jobs: DynamoDBJobs) -> None:
    """More than one page of them; nothing else of the fleet table."""
    for i in range(30):
        assert await jobs.write(f"copy/{i:02}", b"x" * 50_000, 0)
    assert await jobs.write("dry/1", b"y", 0)
    assert [key for key, _ in await jobs.all("copy/")] == [f"copy/{i:02}" for i in range(30)]
    assert await jobs.all("dry/") == [("dry/1", b"y")]
    assert await jobs.all("none") == []


async def test_a_lost_answer_is_transient_and_a_garbled_document_blocks(
    jobs: DynamoDBJobs, dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy, dynamodb_settings
) -> None:
    """A write that failed may have been done; what cannot be read is somebody's to mend."""
    seen = DynamoDBJobs(dynamodb_behind_proxy.wire, dynamodb_settings)
    dynamodb_proxy.on("PutItem", LoseReply(), None)
    with pytest.raises(StoreError) as caught:
        await seen.write("a", b"1", 0)
    assert caught.value.retry_class is RetryClass.TRANSIENT
    assert await jobs.read("a") == (b"1", 1)
    dynamodb_proxy.on("GetItem", Raw(200, b'{"Item":{"pk":{"S":"backfill"}}}'), Raw(200, b"{"))
    for expected in (RetryClass.BLOCKED, RetryClass.TRANSIENT):
        with pytest.raises(StoreError) as caught:
            await seen.read("a")
        assert caught.value.retry_class is expected

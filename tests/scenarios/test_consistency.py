"""Validation and repair from outside: real processes, real stores, harm done behind the sidecar."""

import asyncio
import json

import aioboto3

from tests.parts.fault_proxy import Refuse
from tests.scenarios.test_operator import _as_process, controlled
from tests.scenarios.test_reads import get, old
from tests.scenarios.test_write_path import post

DAY = "/api/migration/validate-consistency?startDate=2026-01-15&endDate=2026-01-15"
FAST = {"settle": "1s", "interval": "0s"}


async def job(sidecar, *words, code=0):
    """A command that minds signals, as a process of its own; its stdout."""
    words = [*words, "--config", str(sidecar.mount.directory / "config.yaml")]
    returned, out, err = await asyncio.to_thread(_as_process, words)
    assert returned == code, out + err
    return out


async def test_the_specifications_answer_of_a_clean_and_of_a_divergent_window(stand, http):
    """All five members, under the specification's names; one record less in DynamoDB is not consistent."""
    sidecar = await controlled(stand, validation=FAST).start()
    ids = (await post(http, sidecar, [old() for _ in range(60)]))["log_ids"]
    await sidecar.drained()
    status, report, _ = await get(http, sidecar, DAY)
    assert status == 200, report
    assert (report["is_consistent"], report["sql_record_count"], report["dynamo_db_record_count"]) == (True, 60, 60)
    assert report["discrepancies"] == []
    assert report["validation_duration"].startswith("00:00:0")
    session = aioboto3.Session(
        aws_access_key_id="test", aws_secret_access_key="test", region_name=stand.dynamodb.region
    )
    async with session.client("dynamodb", endpoint_url=stand.dynamodb.endpoint_url) as client:
        await client.delete_item(TableName=stand.dynamodb.table, Key={"log_id": {"S": ids[7]}})
    _, report, _ = await get(http, sidecar, DAY)
    assert (report["is_consistent"], report["outcome"]) == (False, "divergent")
    assert report["discrepancies"] == ["missing_in_dynamo: 1 records are in PostgreSQL and not in DynamoDB"]
    assert [e["log_id"] for e in report["examples"]] == [ids[7]]
    told = json.loads(await job(sidecar, "validate", "--start", "2026-01-15", "--end", "2026-01-15", code=1))
    assert (told["reasons"]["missing_in_dynamo"], told["warnings"]) == (1, [])
    stand.dynamo.on("Scan", Refuse(500, "InternalServerError"))
    status, document, _ = await get(http, sidecar, DAY)
    assert (status, document["error"]["store"]) == (503, "dynamodb")
    assert await job(sidecar, "validate", "--all", code=2) == ""
    stand.dynamo.clear()

"""Reads of a real process from real stores: across phase changes, outages, and what was done behind its back."""

import asyncio
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import aioboto3
import asyncpg
import pytest

from sidecar.api.openapi import UNDESCRIBED
from tests.parts.fault_proxy import Delay, Hang, Refuse
from tests.parts.sidecar import eventually
from tests.scenarios.test_write_path import body, post

OLD = "2026-01-15T12:00:00Z"
ROUTES = (
    "/logs?application_id=7",
    "/logs?application_id=7&view=summary",
    "/logs?correlation_id=c",
    "/logs?service_name=orders&start=2026-01-15T00:00:00Z&end=2026-01-16T00:00:00Z",
    "/logs/errors?date=2026-01-15",
    "/logs/count?start=2026-01-15T00:00:00Z&end=2026-01-16T00:00:00Z",
    "/logs/count?start=2026-01-15T00:00:00Z&end=2026-01-16T00:00:00Z&group_by=service",
    "/logs/count?start=2026-01-15T00:00:00Z&end=2026-01-16T00:00:00Z&service_name=orders&mode=estimate",
    "/logs/{log_id}",
)


def old(**fields) -> dict:
    """A failure of January that answers to every query, with an id of its own."""
    return {
        "log_id": str(uuid.uuid4()),
        "log_timestamp": OLD,
        "service_name": "orders",
        "application_id": 7,
        "correlation_id": "c",
        "is_success": False,
        **fields,
    }


async def get(http, sidecar, path):
    """Status, document, headers."""
    async with http.get(sidecar.url + path) as answer:
        return answer.status, json.loads(await answer.read()), answer.headers


async def turn(sidecar, phase):
    """Ask for a phase and wait until it is applied."""
    sidecar.configure(phase=phase, phase_force="a test of reads")

    async def applied():
        return (await sidecar.json("/status"))["phase"]["applied"] == phase

    await eventually(applied, what=phase)


async def sql(stand):
    """A connection beside the sidecar."""
    return await asyncpg.connect(
        host=stand.postgres.host,
        port=stand.postgres.port,
        user=stand.postgres.user,
        password=stand.postgres.password.reveal(),
        database=stand.postgres.database,
        ssl=False,
    )


async def test_thousands_of_records_are_paged_once_each_while_the_phase_goes_1_2_1(stand, http):
    """Equal timestamps everywhere, the store changes under the cursor twice: no id twice, none missing, in order."""
    # moto looks through all of its items for every page of an index: on a busy machine that takes its time.
    sidecar = await stand.sidecar(reads={"timeout": "60s"}, dynamodb={"read_timeout": "30s"}).start()
    sent = set()
    for start in range(0, 4_000, 1000):
        batch = [
            old(log_timestamp=f"2026-01-15T12:00:00.{n % 40:06d}Z", request_data="x" * 50)
            for n in range(start, start + 1000)
        ]
        sent |= set((await post(http, sidecar, batch))["log_ids"])
    await sidecar.drained(60)
    turns = {6: "dual_write_read_dynamo", 13: "dual_write"}
    found, served, cursor, pages = [], [], "", 0
    while cursor is not None:
        if pages in turns:
            await turn(sidecar, turns[pages])
        suffix = f"&cursor={cursor}" if cursor else ""
        status, page, headers = await get(http, sidecar, f"/logs?application_id=7&limit=200{suffix}")
        assert status == 200, page
        found += [(r["log_timestamp"], r["log_id"]) for r in page["records"]]
        served.append(headers["X-Served-By"])
        cursor, pages = page["next_cursor"], pages + 1
    assert len(found) == 4_000
    assert {log_id for _, log_id in found} == sent
    assert found == sorted(found, reverse=True)
    assert (served[0], served[8], served[-1]) == ("postgres", "dynamodb", "postgres")


@pytest.mark.parametrize("phase", ["dual_write", "dual_write_read_dynamo"])
async def test_with_its_store_down_every_read_is_503_with_the_reason_and_none_is_empty(stand, http, phase):
    """Refused connections or server errors; each read route; healed, each answers again."""
    sidecar = await stand.sidecar(phase=phase).start()
    log_id = (await post(http, sidecar, old()))["log_id"]
    await sidecar.drained()
    store = "postgres" if phase == "dual_write" else "dynamodb"
    for path in ROUTES:
        status, document, headers = await get(http, sidecar, path.format(log_id=log_id))
        assert (status, headers["X-Served-By"], headers["X-Phase"]) == (200, store, phase), document
        assert headers["X-Owed-Records"] == "0"
    if store == "postgres":
        await stand.sql.refuse()
    else:
        stand.dynamo.on("*", Refuse(500, "InternalServerError"))
    for path in ROUTES:
        status, document, _ = await get(http, sidecar, path.format(log_id=log_id))
        assert (status, document["error"]["store"]) == (503, store), document
        assert document["error"]["message"]
    await stand.sql.normal()
    stand.dynamo.clear()
    for path in ROUTES:

        async def answered(path=path):
            return (await get(http, sidecar, path.format(log_id=log_id)))[0] == 200

        await eventually(answered, what=path)


@pytest.mark.parametrize("phase", ["dual_write", "dual_write_read_dynamo"])
async def test_a_store_that_is_silent_is_504_in_time_and_ingest_goes_on(stand, http, phase):
    """A black hole: each read is given up by reads.timeout; meanwhile records are accepted."""
    sidecar = await stand.sidecar(phase=phase, reads={"timeout": "300ms"}).start()
    log_id = (await post(http, sidecar, old()))["log_id"]
    await sidecar.drained()
    if phase == "dual_write":
        stand.sql.blackhole()
    else:
        stand.dynamo.on("*", Hang())
    reads = asyncio.gather(*(get(http, sidecar, path.format(log_id=log_id)) for path in ROUTES[:4]))
    assert (await post(http, sidecar, [old() for _ in range(100)]))["accepted"] == 100
    for status, document, _ in await reads:
        assert (status, document["error"]["code"]) == (504, "store_timeout"), document
        assert "reads.timeout" in document["error"]["message"]
    await stand.sql.normal()
    stand.dynamo.clear()


async def test_each_mismatch_made_behind_the_sidecar_is_counted_in_its_class(stand, http):
    """Records deleted, added and changed in one store, a store that fails, one that dawdles, one that is late."""
    sidecar = await stand.sidecar(reads={"shadow_sample": 1.0, "shadow_probe": "0s"}).start()
    batch = [old(application_id=n, service_name=f"s-{n}", user_id="u") for n in range(6)]
    ids = (await post(http, sidecar, batch))["log_ids"]
    young = (await post(http, sidecar, {"service_name": "young", "application_id": 6}))["log_id"]
    gap = (await post(http, sidecar, old(application_id=8, log_timestamp="2026-01-14T12:30:00Z")))["log_id"]
    await sidecar.drained()

    connection = await sql(stand)
    session = aioboto3.Session(
        aws_access_key_id="test", aws_secret_access_key="test", region_name=stand.dynamodb.region
    )
    async with session.client("dynamodb", endpoint_url=stand.dynamodb.endpoint_url) as client:
        for gone in (ids[1], young, gap):
            await client.delete_item(TableName=stand.dynamodb.table, Key={"log_id": {"S": gone}})
    await connection.execute("DELETE FROM integration_logs WHERE log_id = $1", uuid.UUID(ids[2]))
    await connection.execute("UPDATE integration_logs SET user_id = 'CANARY-7' WHERE log_id = $1", uuid.UUID(ids[3]))
    await connection.execute(  # another sidecar has released records of that hour, after this one read the ledger
        "INSERT INTO integration_logs_gaps VALUES ('dynamodb', 'released', "
        "extract(epoch FROM timestamptz '2026-01-14 12:00Z')::bigint / 3600, 'pod-2', 1, 0)"
    )
    await connection.close()

    async def counted():
        metrics = await sidecar.metrics()
        key = 'sidecar_shadow_reads_total{pattern="application",result="'
        return {k[len(key) : -2]: v for k, v in metrics.items() if k.startswith(key)}

    async def is_counted(result):
        return (await counted()).get(result) == 1

    expected = {"match": 0, "missing": 1, "extra": 2, "field": 3, "in_flight": 6, "expected_gap": 8, "slow": 4}
    for result, application in expected.items():
        if result == "slow":
            stand.dynamo.on("Query", Delay(1.0))
        status, _, _ = await get(http, sidecar, f"/logs?application_id={application}")
        assert status == 200
        await eventually(lambda result=result: is_counted(result), what=(result, sidecar.tail()))
    stand.dynamo.clear()
    assert await counted() == dict.fromkeys(expected, 1.0)

    stand.dynamo.on("Query", Refuse(400, "ThrottlingException"))

    async def failed():  # the slow answer halved the share: ask until one is repeated
        await get(http, sidecar, "/logs?application_id=5")
        return "error" in await counted()

    await eventually(failed)
    status = (await sidecar.json("/status"))["shadow_reads"]
    seen = {m["result"]: m for m in status["last_mismatches"]}
    assert (seen["missing"]["missing"], seen["extra"]["extra"]) == ([ids[1]], [ids[2]])
    assert seen["field"]["changed"] == {ids[3]: {"user_id": "text of 8 / text of 1"}}
    assert status["sample_share"] <= 0.25
    assert "CANARY" not in json.dumps(await sidecar.json("/status")) + sidecar.log.read_text()


async def test_the_probe_compares_where_the_application_only_writes(stand, http):
    """No read was made, and yet comparisons are counted."""
    sidecar = await stand.sidecar(reads={"shadow_probe": "100ms"}).start()
    await post(http, sidecar, [old() for _ in range(10)])
    await sidecar.drained()

    async def probed():
        return (await sidecar.json("/status"))["shadow_reads"]["results"].get("match", 0) >= 3

    await eventually(probed)


async def test_memory_stays_flat_over_a_long_stream_of_pages(stand, http):
    """40,000 rows of a kilobyte, page by page: the process does not grow with what it has sent."""
    sidecar = await stand.sidecar(phase="sql_only", reads={"shadow_sample": 0.0}).start()
    connection = await sql(stand)
    await connection.execute(
        "INSERT INTO integration_logs (log_id, service_name, application_id, log_timestamp, request_data) "
        "SELECT gen_random_uuid(), 'orders', 7, timestamptz '2026-01-15' + (i / 3) * interval '1 microsecond', "
        "repeat('x', 1000) FROM generate_series(1, 40000) i"
    )
    await connection.close()

    def resident() -> float:
        status = Path(f"/proc/{sidecar.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    cursor, seen, warm = "", set(), 0.0
    while cursor is not None:
        suffix = f"&cursor={cursor}" if cursor else ""
        status, page, _ = await get(http, sidecar, f"/logs?application_id=7&limit=1000{suffix}")
        assert status == 200
        seen |= {r["log_id"] for r in page["records"]}
        cursor = page["next_cursor"]
        if len(seen) == 10_000:
            warm = resident()
    assert len(seen) == 40_000
    assert resident() - warm < 12, "MiB grown over 30 MB of payload"


@pytest.mark.timeout(240)
async def test_every_route_is_described_and_none_answers_5xx_to_generated_requests(stand, http, tmp_path):
    """The document of the running sidecar is whole, and schemathesis finds no defect behind it."""
    patient = {"read_timeout": "30s"}  # the emulator's, where two thousand requests and a shadow ask it
    sidecar = await stand.sidecar(reads={"shadow_sample": 0.1}, dynamodb=patient, validation={"interval": 0}).start()
    await post(http, sidecar, [body(n, log_timestamp=OLD) | {"log_id": str(uuid.uuid4())} for n in range(50)])
    await sidecar.drained()
    status, document, _ = await get(http, sidecar, "/openapi.json")
    assert status == 200
    lacking = [
        (path, method)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method != "parameters" and operation["summary"] == UNDESCRIBED
    ]
    assert lacking == []
    command = [
        *(str(Path(sys.executable).with_name("st")), "run", f"{sidecar.url}/openapi.json"),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", "15", "--seed", "20261122"),
        # Each answer of these compares the stores whole; test_consistency.py sends them what is hostile.
        *("--exclude-path-regex", "/api/migration/(validate-consistency|repair)$"),
        *(
            "--checks",
            "not_a_server_error,response_schema_conformance,content_type_conformance,status_code_conformance",
        ),
        *("--request-timeout", "60", "--no-color", "--warnings", "off", "--generation-database", "none"),
    ]
    run = await asyncio.to_thread(
        subprocess.run, command, cwd=tmp_path, capture_output=True, text=True, timeout=200, env=os.environ, check=False
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    async with http.get(f"{sidecar.ops}/metrics") as answer:
        text = await answer.text()
    answered = [line for line in text.splitlines() if line.startswith("sidecar_http_requests_total{")]
    fives = [line for line in answered if 'status="5' in line and "/readyz" not in line]  # red while it started
    assert len(answered) > 10
    assert fives == []

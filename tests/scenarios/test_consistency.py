"""Validation and repair from outside: real processes, real stores, harm done behind the sidecar."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime, timedelta

import aioboto3
import aiohttp
import pytest

from tests.parts import oracle
from tests.parts.fault_proxy import Hang, Refuse
from tests.parts.sidecar import ROOT, eventually
from tests.scenarios.test_operator import TOKEN, _as_process, controlled, forbid
from tests.scenarios.test_reads import get, old, sql
from tests.scenarios.test_write_path import post

SECONDS = float(os.environ.get("VALIDATION_SECONDS", "10"))
"""How long the validator runs under load; ``make ci-faults`` asks for 90."""
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
    assert json.loads(await job(sidecar, "validate", "--all", "--deep"))["sql_record_count"] == 60
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


async def test_what_a_job_found_is_in_the_metrics_of_a_sidecar_that_compares_nothing_itself(stand, http):
    """With the interval 0 too; else nobody could tell a nightly validation that works from one that does not."""
    sidecar = await controlled(stand, validation=FAST).start()
    await post(http, sidecar, [old() for _ in range(5)])
    await sidecar.drained()
    names = [f"sidecar_validation_last_{kind}_timestamp_seconds" for kind in ("success", "clean")]
    assert not set(names) & set(await sidecar.metrics())
    began = time.time()
    await job(sidecar, "validate", "--all")
    sidecar.kill()  # a running one looks once a minute
    await sidecar.start()

    async def told():
        metrics = await sidecar.metrics()
        return all(metrics.get(name, 0) >= began for name in names)

    await eventually(told, seconds=60, what="the time of the job's validation")


def loaded(n):
    """A record of now; every fifth is late, of yesterday, under an id that tells nothing of its age."""
    if n % 5:
        return {"service_name": f"s-{n % 7}", "request_data": "x" * 100}
    when = datetime.now(UTC) - timedelta(hours=24, seconds=n % 1000)
    return {"service_name": "late", "log_id": str(uuid.uuid4()), "log_timestamp": when.isoformat()}


async def write(http, sidecar, until, acked):
    """A client: small batches without end; one that was not answered is sent again as it was."""
    n = 0
    while time.monotonic() < until:
        batch = [loaded(n + i) for i in range(10)]
        n += len(batch)
        while True:
            try:
                async with http.post(f"{sidecar.url}/logs", json=batch) as answer:
                    if answer.status == 202:
                        acked.update((await answer.json())["log_ids"])
                        break
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.05)


async def trouble(stand, victim, until):
    """Both stores fail now and then, one sidecar is killed and starts again."""
    while time.monotonic() < until:
        stand.dynamo.on("BatchWriteItem", Refuse(500, "InternalServerError"))
        await asyncio.sleep(1.0)
        stand.dynamo.clear()
        victim.kill()
        victim.spawn()
        await victim.ready(60)
        await stand.sql.refuse()
        await asyncio.sleep(0.5)
        await stand.sql.normal()
        stand.dynamo.on("BatchWriteItem", Refuse(400, "ProvisionedThroughputExceededException"))
        await asyncio.sleep(1.0)
        stand.dynamo.clear()
        await asyncio.sleep(2.0)


def validated(*sidecars):
    """What the logs say of finished rounds."""
    return [event for sidecar in sidecars for event in sidecar.events() if event["event"] == "validated"]


async def at_rest(*sidecars):
    """Differences that the last validation found, of the instance that has the lease."""
    found = {}
    for sidecar in sidecars:
        for name, value in (await sidecar.metrics()).items():
            if name.startswith("sidecar_divergence_at_rest_records{") and value:
                found[name.split('"')[1]] = value
    return found


@pytest.mark.timeout(600 + int(SECONDS))
async def test_under_load_retries_restarts_and_a_second_sidecar_nothing_is_called_divergent_that_is_not(
    quick_stand, http
):
    """Zero false positives; then one record is taken away behind the sidecars: found in the next round, repaired."""
    stand = quick_stand  # the other one cannot be read whole twice a second under this load
    settings = {
        # Who is silent for longer is counted out, and what it holds is missing then: a start on a busy machine is not.
        "fleet": {"enabled": True, "heartbeat": "200ms", "fence_after": "20s"},
        "validation": {"interval": "500ms", "settle": "4s", "rate": 0},
    }
    one, two = (
        controlled(stand, "one", instance="one", **settings),
        controlled(stand, "two", instance="two", **settings),
    )
    for sidecar in (one, two):
        await sidecar.start()
    acked = set()
    until = time.monotonic() + SECONDS
    await asyncio.gather(*(write(http, s, until, acked) for s in (one, two)), trouble(stand, two, until))
    for sidecar in (one, two):
        await sidecar.drained(60)
    clean = len([e for e in validated(one, two) if e["outcome"] == "clean"])

    async def clean_again():
        return len([e for e in validated(one, two) if e["outcome"] == "clean"]) > clean + 1

    async def settled():
        return await at_rest(one, two) == {}

    await eventually(clean_again, seconds=240, what="two clean rounds")  # one takes as long as the machine is busy
    rounds = validated(one, two)
    assert len(rounds) >= 3
    assert [e for e in rounds if e["outcome"] not in ("clean", "undecided")] == []
    await eventually(settled, seconds=20, what="both say the same")
    oracle.assert_same(await stand.in_postgres(), await stand.in_dynamodb())
    oracle.assert_holds(await stand.in_dynamodb(), acked)

    lost = min(acked)
    connection = await sql(stand)
    await connection.execute("DELETE FROM integration_logs WHERE log_id = $1", uuid.UUID(lost))
    await connection.close()

    async def seen():
        return await at_rest(one, two) == {"missing_in_sql": 1}

    await eventually(seen, seconds=240, what="the lost record")
    told = json.loads(await job(one, "repair", "--start", "2020-01-01", "--why", "lost", "--apply"))
    assert told["repair"]["inserted"] == {"postgres": 1}

    await eventually(settled, seconds=240, what="clean after the repair")
    oracle.assert_same(await stand.in_postgres(), await stand.in_dynamodb())


async def test_a_comparison_that_is_stopped_could_not_check_and_another_goes_on_with_it(stand, http):
    """SIGTERM, then SIGKILL: never clean, exit 2 where there is one; the same run goes on, and is clean in the end."""
    sidecar = await controlled(stand, validation=FAST).start()
    await post(http, sidecar, [old() for _ in range(60)])
    await sidecar.drained()
    words = ["validate", "--start", "2026-01-15", "--end", "2026-01-15"]
    config = str(sidecar.mount.directory / "config.yaml")
    stand.dynamo.on("Scan", Hang())
    runs = []
    for number in (signal.SIGTERM, signal.SIGKILL):
        calls = stand.dynamo.calls["Scan"]
        process = subprocess.Popen(
            [sys.executable, "-m", "sidecar", *words, *(["--resume"] if runs else []), "--config", config],
            cwd=ROOT,
            env={**os.environ, **sidecar.environ},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        await eventually(lambda calls=calls: stand.dynamo.calls["Scan"] > calls, what="it reads")
        process.send_signal(number)
        out, err = await asyncio.to_thread(process.communicate, timeout=20)
        assert out == b""
        assert process.returncode == (2 if number == signal.SIGTERM else -number), err
        runs.append((await sidecar.json("/api/migration/validation"))["runs"][0])
        assert runs[-1]["outcome"] == ("stopped" if number == signal.SIGTERM else "running")
        assert not runs[-1]["is_consistent"]
    stand.dynamo.clear()
    told = json.loads(await job(sidecar, *words, "--resume"))
    assert {told["run"], *(run["run"] for run in runs)} == {told["run"]}
    assert (told["outcome"], told["sql_record_count"]) == ("clean", 60)


HOSTILE = (
    ("startDate", "yesterday"),
    ("startDate", ""),
    ("startDate", "2026-02-30"),
    ("startDate", "2026-01-15T25:00:00"),
    ("startDate", "1768435200"),
    ("endDate", "2026-01-15T12:00:00+25:00"),
    ("endDate", "'; DROP TABLE integration_logs; --"),
    ("endDate", "2026-01-15%00"),
    ("endDate", "9" * 5000),
    ("endDate", "\u0662\u0660\u0662\u0666-01-15"),
    ("startDate", "2026-01-16&endDate=2026-01-15"),
    ("deep", "1"),
    ("deep", "TRUE"),
    ("reveal", "yes"),
    ("examples", "-1"),
    ("examples", "1001"),
    ("examples", "\u0661"),
    ("examples", "9" * 400),
)


async def test_hostile_parameters_are_refused_by_name_and_reach_no_store(stand, http):
    """400 naming the parameter, and never its value; given twice, unknown; and values need the control token."""
    sidecar = await controlled(stand, validation=FAST).start()
    path = "/api/migration/validate-consistency"
    for name, value in HOSTILE:
        status, document, _ = await get(http, sidecar, f"{path}?{name}={value}")
        assert status == 400, (name, value, document)
        assert document["error"]["message"].startswith(f"{name}:"), (name, value, document)
        assert "DROP TABLE" not in document["error"]["message"]
    for query, word in (("startDate=2026-01-15&startDate=2026-01-15", "startDate"), ("start=2026-01-15", "startDate")):
        status, document, _ = await get(http, sidecar, f"{path}?{query}")
        assert (status, word in document["error"]["message"]) == (400, True)
    for query in ("startDate=0001-01-01&endDate=9999-12-31", "endDate=0001-01-01T00:00:00Z"):
        status, document, _ = await get(http, sidecar, f"{path}?{query}")
        assert (status, document.get("outcome")) == (200, "clean"), document
    status, _, _ = await get(http, sidecar, f"{path}?reveal=true")
    assert status == 401
    for route in ("repair", "validation/stop"):
        async with http.post(f"{sidecar.url}/api/migration/{route}", json={"reason": "x"}) as answer:
            assert answer.status == 401
    key = {"Authorization": f"Bearer {TOKEN}"}
    wrong = [{"reason": "x", name: value} for name in ("deep", "dry_run", "overwrite") for value in ("true", 1, None)]
    wrong += [{}, {"reason": " "}, {"reason": "x", "force": True}, {"reason": "x", "endDate": "soon"}, [], "x"]
    for body in wrong:
        async with http.post(f"{sidecar.url}/api/migration/repair", json=body, headers=key) as answer:
            assert answer.status == 400, body
    ids = [str(uuid.uuid4())] * 1001
    for given in ({"log_ids": ids}, {"log_ids": ["no uuid"]}):
        async with http.post(f"{sidecar.url}/api/control/whereabouts", json=given, headers=key) as answer:
            assert answer.status == 400
            assert (await answer.json())["error"]["message"].startswith("log_ids:")
    async with http.get(f"{sidecar.url}/api/control/audit", headers=key) as answer:
        trail = [line["what"] for line in (await answer.json())["audit"]]
    assert "POST /api/migration/repair" in trail


async def test_a_repair_through_the_api_is_deep_where_that_is_asked(stand, http):
    """An item that was edited behind its digest: believed by a fast one, seen and replaced by a deep one, once."""
    sidecar = await controlled(stand, validation=FAST).start()
    (log_id,) = (await post(http, sidecar, [old(user_id="as it was sent")]))["log_ids"]
    await sidecar.drained()
    session = aioboto3.Session(
        aws_access_key_id="test", aws_secret_access_key="test", region_name=stand.dynamodb.region
    )
    async with session.client("dynamodb", endpoint_url=stand.dynamodb.endpoint_url) as client:
        await client.update_item(
            TableName=stand.dynamodb.table,
            Key={"log_id": {"S": log_id}},
            UpdateExpression="SET user_id = :u",
            ExpressionAttributeValues={":u": {"S": "edited"}},
        )
    asked = {"reason": "edited by hand", "startDate": "2026-01-15", "endDate": "2026-01-15"}
    asked |= {"dry_run": False, "overwrite": True}

    async def repaired(**changes):
        key = {"Authorization": f"Bearer {TOKEN}"}
        async with http.post(f"{sidecar.url}/api/migration/repair", json=asked | changes, headers=key) as answer:
            told = await answer.json()
            assert answer.status == 200, told
            return told["report"]["mode"], told["report"]["reasons"]["field_mismatch"], told["repair"]["overwritten"]

    assert await repaired() == ("digests", 0, 0)
    assert await repaired(deep=True) == ("deep", 1, 1)
    assert await repaired(deep=True) == ("deep", 0, 0)
    assert (await stand.in_dynamodb())[log_id]["user_id"] == "as it was sent"


async def test_values_are_shown_to_who_has_the_token_and_only_after_it_was_audited(stand, http):
    """Redacted in every other report, in /metrics and in the log."""
    sidecar = await controlled(stand, validation=FAST).start()
    (log_id,) = (await post(http, sidecar, [old(user_id="CANARY-1")]))["log_ids"]
    await sidecar.drained()
    connection = await sql(stand)
    await connection.execute("UPDATE integration_logs SET user_id = 'CANARY-2' WHERE log_id = $1", uuid.UUID(log_id))
    await connection.close()
    key = {"Authorization": f"Bearer {TOKEN}"}
    status, report, _ = await get(http, sidecar, DAY)
    assert (status, report["reasons"]["field_mismatch"]) == (200, 1)
    assert (report["examples"][0]["fields"], "CANARY" in json.dumps(report)) == (["user_id"], False)
    async with http.get(f"{sidecar.url}{DAY}&reveal=true", headers=key) as answer:
        shown = (await answer.json())["examples"][0]["values"]
    assert shown == {"postgres": {"user_id": "CANARY-2"}, "dynamodb": {"user_id": "CANARY-1"}}
    async with http.get(f"{sidecar.url}/api/control/audit", headers=key) as answer:
        assert "values of differing records shown" in [line["why"] for line in (await answer.json())["audit"]]
    known = await sidecar.json("/api/migration/validation")
    assert [run["outcome"] for run in known["runs"]] == ["divergent"]
    async with http.get(f"{sidecar.ops}/metrics") as answer:
        text = await answer.text()
    assert 'sidecar_divergence_at_rest_records{class="field_mismatch"} 1.0' in text
    assert "CANARY" not in json.dumps(known) + text + sidecar.log.read_text()


async def test_another_pods_dead_letter_and_discard_explain_a_record_that_a_store_lacks(stand, http):
    """Through the tables: divergent as dead_letter, clean once an operator has given it up, also after its restart."""
    one, two = controlled(stand, "one", validation=FAST), controlled(stand, "two", validation=FAST)
    for sidecar in (one, two):
        await sidecar.start()
    await forbid(stand, "poison")
    (log_id,) = (await post(http, two, [old(service_name="poison")]))["log_ids"]
    await two.drained()

    async def reports(outcome, reason):
        _, report, _ = await get(http, one, DAY)
        return (report["outcome"], report["reasons"][reason]) == (outcome, 1)

    await eventually(lambda: reports("divergent", "dead_letter"), what="mirrored")
    assert json.loads(await job(two, "dead-letter", "ls", "--json"))["log_id"] == log_id
    await job(two, "dead-letter", "discard", "--id", log_id, "--why", "worth nothing")
    await eventually(lambda: reports("clean", "acknowledged"), what="discarded")
    two.terminate()
    await two.exit_code()
    await two.start()
    assert await reports("clean", "acknowledged")

"""Validation overtaken by something else: a lease that was lost, another validator, a redrive. Real processes."""

import asyncio
import json
import signal
import uuid

import aioboto3

from tests.parts import oracle
from tests.parts.fault_proxy import Hang, Refuse
from tests.parts.sidecar import eventually
from tests.scenarios.test_consistency import DAY, at_rest, job, validated
from tests.scenarios.test_operator import allow, command, controlled, forbid
from tests.scenarios.test_reads import get, old, sql
from tests.scenarios.test_write_path import post

# Who is silent for longer is counted out: longer than anybody is stopped here.
FLEET = {"enabled": True, "heartbeat": "200ms", "fence_after": "30s"}


def recent(number):
    """Records of now: those that the continuous validation compares each time."""
    return [{"service_name": f"s-{n % 7}", "user_id": "as it was sent"} for n in range(number)]


async def in_items(stand, deed):
    """Do something to DynamoDB's table behind the sidecars."""
    session = aioboto3.Session(aws_access_key_id="x", aws_secret_access_key="x", region_name=stand.dynamodb.region)
    async with session.client("dynamodb", endpoint_url=stand.dynamodb.endpoint_url) as client:
        await deed(client, stand.dynamodb.table)


async def lose_item(stand, *log_ids):
    """Delete items behind the sidecars."""

    async def delete(client, table):
        for log_id in log_ids:
            await client.delete_item(TableName=table, Key={"log_id": {"S": log_id}})

    await in_items(stand, delete)


async def runs(sidecar):
    """The last ones that anybody kept, newest first."""
    return (await sidecar.json("/api/migration/validation"))["runs"]


async def test_a_holder_of_the_lease_that_is_stopped_while_another_takes_over_says_nothing_when_it_wakes(
    quick_stand, http
):
    """SIGSTOP in the midst of a round, with records that it owes: nobody calls them missing, before or after SIGCONT.

    The stopped one leaves its round, and its line is no verdict; what is lost afterwards both say in the same words.
    """
    stand = quick_stand
    settings = {"fleet": FLEET, "validation": {"interval": "1500ms", "settle": "1s", "rate": 0}}
    one = await controlled(stand, "one", instance="one", **settings).start()
    ids = (await post(http, one, recent(40)))["log_ids"]
    await one.drained()
    await eventually(lambda: validated(one), what="one holds the lease")
    two = await controlled(stand, "two", instance="two", **settings).start()
    stand.dynamo.on("BatchWriteItem", Refuse(500, "InternalServerError"))
    ids += (await post(http, one, recent(20)))["log_ids"]

    async def owed():
        return len(await stand.in_postgres()) == len(ids)

    await eventually(owed, what="delivered to PostgreSQL, owed to DynamoDB")
    stand.dynamo.on("Scan", Hang())
    calls = stand.dynamo.calls["Scan"]
    await eventually(lambda: stand.dynamo.calls["Scan"] > calls, what="a round is under way")
    (under_way,) = [run for run in await runs(two) if run["outcome"] == "running"]
    one.process.send_signal(signal.SIGSTOP)
    try:
        assert validated(two) == []
        stand.dynamo.clear()
        await eventually(lambda: validated(two), seconds=60, what="two took over")
        taken = await runs(two)
    finally:
        one.process.send_signal(signal.SIGCONT)
    assert [run for run in taken if run["outcome"] == "divergent"] == []
    assert {run["run"]: run["outcome"] for run in taken}[under_way["run"]] == "running"
    await eventually(
        lambda: any(event["event"].startswith("a validation was left") for event in one.events()), what="it left"
    )
    finished = len(validated(one))
    await one.drained()
    await eventually(lambda: validated(two)[-1]["outcome"] == "clean", what="clean")
    (line,) = [run for run in await runs(one) if run["run"] == under_way["run"]]
    assert (line["outcome"], line["finished_at"]) == ("stopped", None)
    await lose_item(stand, ids[-1])

    async def told():
        return [await at_rest(sidecar) for sidecar in (one, two)] == [{"missing_in_dynamo": 1}] * 2

    await eventually(told, what="both say what was lost")
    assert len(validated(one)) == finished
    assert {event["outcome"] for event in validated(one, two)} <= {"clean", "undecided", "divergent"}
    assert [
        e for e in validated(one, two) if e["outcome"] == "divergent" and e.get("found_missing_in_dynamo") != 1
    ] == []


async def test_two_commands_and_the_sidecars_own_validation_at_once_each_report_exactly_what_is_wrong(
    quick_stand, http
):
    """Over the same window at the same time: the same set in each of them, and each a run of its own."""
    stand = quick_stand
    sidecar = await controlled(stand, fleet=FLEET, validation={"interval": "500ms", "settle": "1s", "rate": 0}).start()
    ids = (await post(http, sidecar, recent(200)))["log_ids"]
    await sidecar.drained()
    await lose_item(stand, *ids[:3])
    connection = await sql(stand)
    await connection.execute("DELETE FROM integration_logs WHERE log_id = ANY($1)", [uuid.UUID(i) for i in ids[3:5]])
    await connection.execute("UPDATE integration_logs SET user_id = 'x' WHERE log_id = $1", uuid.UUID(ids[5]))
    await connection.close()
    expected = dict.fromkeys(ids[:3], "missing_in_dynamo") | dict.fromkeys(ids[3:5], "missing_in_sql")
    expected[ids[5]] = "field_mismatch"
    begun = {run["run"] for run in await runs(sidecar)}  # before the harm, or in its midst

    async def others():
        return [run for run in await runs(sidecar) if run["run"] not in begun]

    await eventually(others, what="a round that began after it")
    words = ("validate", "--start", "2026-01-01", "--rate", "200")
    told = [json.loads(out) for out in await asyncio.gather(*(job(sidecar, *words, code=1) for _ in range(2)))]
    ids_of_commands = {report["run"] for report in told}
    assert len(ids_of_commands) == 2
    first, last = max(report["started_at"] for report in told), min(report["finished_at"] for report in told)
    assert first < last  # they were at it at once

    async def beside():
        """The sidecar's rounds while both were at it."""
        return [
            run
            for run in await others()
            if run["finished_at"] and run["started_at"] < last and run["finished_at"] > first
            if run["run"] not in ids_of_commands
        ]

    for report in (*told, *await eventually(beside, what="a round beside them")):
        assert {each["log_id"]: each["reason"] for each in report["examples"]} == expected, report
        assert (report["sql_record_count"], report["dynamo_db_record_count"]) == (198, 197)
    kept = {run["run"]: run for run in await runs(sidecar)}
    assert [kept[report["run"]]["reasons"] for report in told] == [report["reasons"] for report in told]


async def test_a_record_that_is_redriven_while_it_is_compared_is_never_called_missing(quick_stand, http):
    """In another pod, again and again, held between the two states: a dead letter or in flight. Then it is there."""
    stand = quick_stand
    settings = {"fleet": FLEET, "validation": {"interval": "0s", "settle": "1s"}}
    one, two = [await controlled(stand, name, instance=name, **settings).start() for name in ("one", "two")]
    await forbid(stand, "poison")
    await post(http, two, [old(service_name="poison")])
    found = []

    async def compare():
        status, report, _ = await get(http, one, DAY)
        assert status == 200, report
        found.append({reason: number for reason, number in report["reasons"].items() if number})
        return found[-1]

    async def turns():
        """Two times from dead to in motion and back, each time until a comparison has seen it."""
        for _ in range(2):
            await eventually(lambda: found[-1] == {"dead_letter": 1}, what=found)
            await command(two, "store", "pause", "postgres", "--why", "a test")
            await command(two, "dead-letter", "redrive", "--all")
            await eventually(lambda: found[-1] == {"in_flight": 1}, what=found)
            await command(two, "store", "resume", "postgres", "--why", "a test")

    await compare()
    turning = asyncio.create_task(turns())
    try:
        while not turning.done():
            await compare()
        await turning
    finally:
        turning.cancel()
    assert [each for each in found if each not in ({"dead_letter": 1}, {"in_flight": 1})] == []
    await allow(stand, "poison")
    await command(two, "dead-letter", "redrive", "--all")
    await two.drained()
    _, report, _ = await get(http, one, DAY)
    assert (report["outcome"], report["differences"], report["matched"]) == ("clean", 0, 1)
    oracle.assert_same(await stand.in_postgres(), await stand.in_dynamodb())

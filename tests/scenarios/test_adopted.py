"""A sidecar on the specification's own table, from before it is adopted to both stores being equal for new records."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.record import to_dict
from sidecar.stores.dynamodb import DynamoDBStore
from tests.parts.adopted import RELATION, SPECIFICATION, TABLE, old_rows
from tests.parts.fault_proxy import FaultProxy
from tests.parts.postgres import connect
from tests.parts.sidecar import Sidecar, eventually
from tests.parts.tcp_proxy import TcpProxy
from tests.scenarios.conftest import Stand
from tests.stores.records import BASE

ADOPT = {"table": TABLE, "adopt": {"enabled": True, "assume_zone": "UTC", "status_code_text": True}}
NAME = f"public.{TABLE}"


@pytest.fixture
async def loan_stand(
    tmp_path: Path, postgres_empty: settings.Postgres, dynamodb_settings: settings.DynamoDB
) -> AsyncIterator[Stand]:
    """The specification's database as it was before, an empty DynamoDB; nothing is adopted yet."""
    admin = await connect(postgres_empty)
    await admin.execute(SPECIFICATION)
    await admin.close()
    store = DynamoDBStore(dynamodb_settings, clock=SystemClock())
    await store.create()
    await store.close()
    assert dynamodb_settings.endpoint_url is not None
    postgres = msgspec.structs.replace(postgres_empty, table=TABLE)
    async with TcpProxy(postgres.host, postgres.port) as sql, FaultProxy(dynamodb_settings.endpoint_url) as dynamo:
        made = Stand(tmp_path, postgres, dynamodb_settings, sql, dynamo)
        try:
            yield made
        finally:
            for each in made.made:
                each.close()


async def cli(one: Sidecar, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A command of the operator, with the sidecar's own configuration."""
    return await one.command(*arguments)


async def post(http: aiohttp.ClientSession, one: Sidecar, **fields: Any) -> tuple[int, dict[str, Any]]:
    """One record of the specification's table; ``fields`` change it."""
    body = {"ServiceName": "CreditCheckService", "LogType": "Credit Check", "ApplicationId": 7, **fields}
    async with http.post(f"{one.url}/logs", json=body) as answer:
        return answer.status, await answer.json()


@pytest.mark.timeout(300)  # some ten processes, one after the other
async def test_a_table_is_adopted_under_a_running_sidecar(loan_stand: Stand, http: aiohttp.ClientSession) -> None:
    """Held until it is adopted, then delivered without a restart; old and new rows are one; poison is one record's."""
    admin = await connect(loan_stand.postgres)
    old = await old_rows(admin, BASE, 200)
    one = loan_stand.sidecar(
        postgres=ADOPT,
        retry={"delay": "100ms", "max_delay": "500ms", "probe_interval": "500ms", "fk_grace": "15s"},
        validation={"settle": "1s"},
    )
    beside = await cli(one, "init-stores")
    assert beside.returncode == 0, beside.stderr
    assert f"table {NAME}_gaps" in beside.stdout
    await one.start()

    status, accepted = await post(http, one, CorrelationId="new")
    assert status == 202

    async def blocked() -> bool:
        return "sidecar adopt --plan" in str((await one.json("/status"))["stores"]["postgres"])

    await eventually(blocked, what="the reason is in the status")

    planned, unconfirmed = await asyncio.gather(
        cli(one, "adopt", "--plan"), cli(one, "adopt", "--apply", "--confirm", TABLE)
    )
    assert planned.returncode == 1
    assert "about" in planned.stdout or "never analysed" in planned.stdout
    assert f'ALTER TABLE "public".{RELATION} ADD COLUMN "SidecarLogId" uuid;' in planned.stdout
    assert unconfirmed.returncode == 2
    assert f"allowed: {NAME}" in unconfirmed.stderr
    applied = await cli(one, "adopt", "--apply", "--confirm", NAME)
    assert applied.returncode == 0, applied.stderr
    assert applied.stderr.count("done: ") == 4
    await one.drained()

    # Old rows by their computed ids, and both kinds in one answer, newest first.
    found = await one.json(f"/logs/{old[1].log_id}")
    assert {name: found[name] for name in to_dict(old[1])} == to_dict(old[1])
    page = await one.json("/logs?application_id=7&limit=1000")
    ids = [r["log_id"] for r in page["records"]]
    expected = sorted((r.log_timestamp, r.log_id) for r in old if r.application_id == 7)
    assert ids == [accepted["log_id"], *(log_id for _, log_id in reversed(expected))]

    # The door is as narrow as the columns, once they were seen.
    for wrong in ({"CorrelationId": "c" * 51}, {"ProcessingTimeMs": 2**31}, {"LogId": old[0].log_id}):
        status, refused = await post(http, one, LogTimestamp="2026-01-01T00:00:00Z", **wrong)
        assert status == 422, refused

    # What a constraint refuses is that record's alone; a parent row that comes late is waited for.
    _, poison = await post(http, one, LogType="TEST")
    _, orphan = await post(http, one, ApplicationId=51)
    _, fine = await post(http, one, StatusCode=503, IsSuccess=False)

    async def settled() -> bool:
        status = await one.json("/status")
        return bool(status["stores"]["postgres"]["account"]["dead_lettered"]) and (await one.pending()) == 1

    await eventually(settled, what="one dead letter, and the orphan waits")
    await admin.execute('INSERT INTO "Applications" DEFAULT VALUES')
    await one.drained()
    rows = await admin.fetch(f'SELECT "SidecarLogId"::text AS id, "LogId", "StatusCode" FROM {RELATION}')
    new = {row["id"]: row for row in rows if row["id"] is not None}
    assert set(new) == {answer["log_id"] for answer in (accepted, orphan, fine)}
    assert new[fine["log_id"]]["StatusCode"] == "503"
    assert len(rows) == 203
    held = await loan_stand.in_dynamodb()
    assert set(held) == {answer["log_id"] for answer in (accepted, poison, orphan, fine)}
    for log_id in new:
        stored = await one.json(f"/logs/{log_id}")
        assert {name: stored[name] for name in held[log_id]} == held[log_id]

    # The application still writes the old way: its rows follow to DynamoDB, the history waits for the backfill.
    begun = "rows of old writers are copied from here on"
    await eventually(lambda: any(begun in str(event) for event in one.events()), what=begun)
    late = await old_rows(admin, BASE + 60_000_000, 30)

    async def followed() -> bool:
        return {r.log_id for r in late} <= set(await loan_stand.in_dynamodb())

    await eventually(followed, every=0.2, what="rows of old writers in DynamoDB")
    held = await loan_stand.in_dynamodb()
    assert not {r.log_id for r in old} & set(held)
    assert {name: held[late[3].log_id][name] for name in to_dict(late[3])} == to_dict(late[3])

    # History: named by validation, copied by the backfill, equal afterwards but for the dead letter.
    nothing_left, divergent = await asyncio.gather(cli(one, "adopt", "--plan"), cli(one, "validate", "--all"))
    assert nothing_left.returncode == 0, nothing_left.stdout
    assert divergent.returncode == 1, divergent.stderr
    assert "old_writer" in divergent.stdout
    copied = await cli(one, "backfill", "--from", "postgres", "--to", "dynamodb", "--rate", "none")
    assert copied.returncode == 0, copied.stderr + copied.stdout
    everything = await loan_stand.in_dynamodb()
    assert set(everything) == {r.log_id for r in (*old, *late)} | set(new) | {poison["log_id"]}
    after = json.loads((await cli(one, "validate", "--all")).stdout)
    assert [(d["log_id"], d["reason"]) for d in after["examples"]] == [(poison["log_id"], "dead_letter")]
    assert after["differences"] == 1

    # The bounds are remembered: a start without the database keeps the door as narrow.
    one.terminate()
    assert await one.exit_code() == 0
    await loan_stand.sql.refuse()
    await one.start()
    status, _ = await post(http, one, CorrelationId="c" * 51)
    assert status == 422
    await admin.close()

"""The rights that are given in steady state are enough for everything, and for nothing more."""

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.errors import StoreError
from sidecar.fleet_tables import AuditEntry, FateLine, FleetRecord, Heartbeat
from sidecar.gaps import GapLine
from sidecar.phase import DYNAMODB, Phase
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.postgres import PostgresStore
from tests.integration.k8s.iam import Guarded, Policy
from tests.integration.k8s.kubelet import Pod, config
from tests.integration.k8s.tools import ROOT
from tests.parts.dynamodb import record
from tests.parts.oracle import assert_same, read_dynamodb, read_postgres
from tests.parts.postgres import connect


@pytest.fixture
async def granted(postgres_server) -> AsyncIterator[settings.Postgres]:
    """The database ``logs`` after init-stores and grants.sql, as the role ``sidecar`` sees it."""
    admin = await connect(postgres_server.settings())
    try:
        await admin.execute("CREATE DATABASE logs STRATEGY = file_copy")
        owner = postgres_server.settings("logs")
        store = PostgresStore(owner, clock=SystemClock())
        await store.create()
        await store.close()
        inside = await connect(owner)
        await inside.execute((ROOT / "k8s" / "sql" / "grants.sql").read_text())
        await inside.execute("ALTER ROLE sidecar PASSWORD 'a-password'")
        await inside.close(timeout=5)
        yield msgspec.structs.replace(owner, user="sidecar", password=settings.Secret("a-password"))
        await admin.execute("DROP DATABASE logs WITH (FORCE)")
        await admin.execute("DROP ROLE sidecar")
    finally:
        await admin.close()


async def test_the_granted_role_passes_every_check_of_the_store(granted):
    """What the store asks of its tables before it is used."""
    store = PostgresStore(granted, clock=SystemClock())
    try:
        red = [check for check in await store.check() if not check.ok]
    finally:
        await store.close()
    assert red == []


async def test_the_granted_role_is_enough_for_the_fleet(granted):
    """Record, heartbeats and their end, lease, trail, gap and fate: each method of the port once, as the role."""
    store = PostgresStore(granted, clock=SystemClock())
    fleet = store.fleet
    first = FleetRecord(1, Phase.SQL_ONLY, "a", "born", 1)
    beat = Heartbeat(instance="a", incarnation="1", seq=1)
    line = AuditEntry(id="1", outcome="intended", action="create", by="a", why="w", at_us=1, epoch=1)
    gap = GapLine(store=DYNAMODB, kind="not_owed", hour=1, source="a", opened=1)
    fate = FateLine(
        log_id=str(uuid.uuid4()),
        store=DYNAMODB,
        state="discarded",
        retry_class="permanent",
        by="a",
        at_us=1,
        revision=1,
    )
    try:
        assert await fleet.cas_record(None, first)
        assert await fleet.cas_record(first, msgspec.structs.replace(first, epoch=2))
        for seq in (1, 2):
            await fleet.put_heartbeat(msgspec.structs.replace(beat, seq=seq))
        await fleet.drop_heartbeat(beat.key, 2)
        assert await fleet.heartbeats() == []
        assert await fleet.acquire_lease("x", "a", 1.0)
        await fleet.release_lease("x", "a")
        for _ in range(2):
            await fleet.append_audit(line)
            await fleet.put_gaps([gap])
            await fleet.put_fates([fate])
        assert (await fleet.audits(9), await fleet.gaps(), await fleet.fates([fate.log_id])) == ([line], [gap], [fate])
    finally:
        await store.close()


async def test_a_sidecar_delivers_with_the_granted_rights(granted, dynamodb_store, dynamodb_settings, tmp_path: Path):
    """Batches, single records, and a batch in which a record is there already."""
    pod = Pod(tmp_path / "pod")
    pod.apply(config("dual_write", granted, dynamodb_settings))
    known = str(uuid.uuid4())
    mine = {"service_name": "s", "log_id": known, "log_timestamp": "2026-01-01T00:00:00Z"}
    try:
        await pod.start()
        async with aiohttp.ClientSession() as session:
            for body in (mine, [{"service_name": "s"}] * 300):
                async with session.post(f"{pod.url}/logs", json=body) as answer:
                    assert answer.status == 202
            await pod.drained()
            other = Pod(tmp_path / "other")  # another pod: its own window knows nothing of the first
            other.apply(config("dual_write", granted, dynamodb_settings))
            try:
                await other.start()
                async with session.post(f"{other.url}/logs", json=[mine, *[{"service_name": "s"}] * 9]) as answer:
                    assert answer.status == 202
                await other.drained()
            finally:
                other.close()
    finally:
        pod.close()
    assert len(await read_postgres(granted)) == 310


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE integration_logs SET user_id = 'x'",
        "DELETE FROM integration_logs",
        "TRUNCATE integration_logs",
        "DROP TABLE integration_logs",
        "DELETE FROM integration_logs_gaps",
        "DELETE FROM integration_logs_fleet",
        "DELETE FROM integration_logs_leases",
        "DELETE FROM integration_logs_fates",
        "DELETE FROM integration_logs_audit",
        "UPDATE integration_logs_audit SET document = ''",
        "TRUNCATE integration_logs_heartbeats",
        "CREATE TABLE integration_logs_mine (a int)",
    ],
)
async def test_the_granted_role_can_change_and_remove_nothing(granted, statement):
    """PostgreSQL itself refuses."""
    connection = await connect(granted)
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    finally:
        await connection.close(timeout=5)


# --- DynamoDB ---------------------------------------------------------------------------------------------------------

HOUR = "2026-01-01T00:30:00Z"
DAY = "startDate=2026-01-01&endDate=2026-01-01"
READS = (
    "/logs?application_id=7",
    "/logs?service_name=s&start=2026-01-01T00:00:00Z&end=2026-01-02T00:00:00Z",
    "/logs?correlation_id=c",
    "/logs/errors?date=2026-01-01",
    "/logs/count?start=2026-01-01T00:00:00Z&end=2026-01-02T00:00:00Z&service_name=s",
    "/logs/count?start=2026-01-01T00:00:00Z&end=2026-01-02T00:00:00Z&group_by=service",
)


def sent(log_id: str) -> dict[str, Any]:
    """A record that is in every index."""
    return {
        "log_id": log_id,
        "log_timestamp": HOUR,
        "service_name": "s",
        "application_id": 7,
        "correlation_id": "c",
        "is_success": False,
    }


class Operator:
    """One pod's container: its configuration, and every command with it."""

    def __init__(self, base: Path, phase: str, pg: settings.Postgres, ddb: settings.DynamoDB, url: str) -> None:
        self.pod = Pod(base)
        self.token = base / "token"
        self.token.write_text("a token")
        more = f"control: {{token_file: '{self.token}'}}\nvalidation: {{interval: 0, settle: 1s}}"
        fleet = "fleet: {enabled: true, heartbeat: 1s, fence_after: 30s}"
        self.pod.apply(config(phase, pg, ddb, url=url, more=f"{more}\n{fleet if phase == 'dual_write' else ''}"))

    async def does(self, *words: str) -> None:
        """Run it; it must end with 0."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sidecar", *words, "--config", str(self.pod.volume.directory / "config.yaml")),
            env={**os.environ, **self.pod.environ},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output = (await process.communicate())[0].decode()
        assert process.returncode == 0, f"{words}\n{output}"

    async def asks(self, method: str, path: str, body: Any = None) -> Any:
        """One request with the token; it must succeed."""
        headers = {"Authorization": "Bearer a token"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.request(method, f"{self.pod.url}{path}", json=body) as answer,
        ):
            assert answer.status < 300, (path, await answer.text())
            return await answer.json()


async def test_every_command_works_with_the_rights_that_its_pod_is_given(
    granted, postgres_server, dynamodb_settings, tmp_path: Path
):
    """Of IAM and of PostgreSQL, both enforced: init-stores, pods, canary, reads, comparison, repair, both copies."""
    tables = (dynamodb_settings.table, dynamodb_settings.fleet_table)
    endpoint = dynamodb_settings.endpoint_url
    owner = postgres_server.settings("logs")
    async with (
        Guarded(endpoint, Policy("init-stores-policy.json", tables)) as init,
        Guarded(endpoint, Policy("sidecar-policy.json", tables)) as steady,
        Guarded(endpoint, Policy("backfill-policy.json", tables)) as copying,
    ):
        await Operator(tmp_path / "init", "sql_only", owner, dynamodb_settings, init.url).does("init-stores")
        pod = Operator(tmp_path / "pod", "dual_write", granted, dynamodb_settings, steady.url)
        reader = Operator(tmp_path / "reader", "dual_write_read_dynamo", granted, dynamodb_settings, steady.url)
        job = Operator(tmp_path / "job", "dual_write", granted, dynamodb_settings, copying.url)
        known = [str(uuid.uuid4()) for _ in range(40)]
        try:
            await asyncio.gather(pod.pod.start(), reader.pod.start())
            await pod.asks("POST", "/logs", [sent(log_id) for log_id in known])
            await pod.pod.drained()
            await pod.asks("POST", "/api/migration/test-dual-write")
            for path in (f"/logs/{known[0]}", *READS):
                await reader.asks("GET", path)
            validated = await pod.asks("GET", f"/api/migration/validate-consistency?{DAY}")
            assert validated["is_consistent"], validated
            await pod.does("validate", "--all", "--deep")
            await _lose_one_on_each_side(owner, dynamodb_settings, known)
            await pod.does("repair", "--all", "--apply", "--why", "a test")
            await _lose_one_on_each_side(owner, dynamodb_settings, known)
            back = ("--from", "dynamodb", "--to", "postgres", "--hours", "all")
            for words in (
                ("--from", "postgres", "--to", "dynamodb"),
                (*back, "--dry-run"),
                back,
                ("rate", "--rate", "5"),
            ):
                await job.does("backfill", *words)
        finally:
            pod.pod.close()
            reader.pod.close()
        await _forget_a_heartbeat(dynamodb_settings, steady)
        assert (init.denied, steady.denied, copying.denied) == ([], [], [])
    left, right = await read_postgres(granted), await read_dynamodb(dynamodb_settings, endpoint)
    assert set(left) == set(known)
    assert_same(left, right)


async def _lose_one_on_each_side(owner: settings.Postgres, ddb: settings.DynamoDB, known: list[str]) -> None:
    """As somebody does who may do everything."""
    connection = await connect(owner)
    try:
        await connection.execute("DELETE FROM integration_logs WHERE log_id = $1", uuid.UUID(known[0]))
    finally:
        await connection.close(timeout=5)
    store = DynamoDBStore(ddb, clock=SystemClock())
    try:
        async with store.wire.control() as client:
            await client.delete_item(TableName=ddb.table, Key={"log_id": {"S": known[1]}})
    finally:
        await store.close()


async def _forget_a_heartbeat(ddb: settings.DynamoDB, proxy: Guarded) -> None:
    """What the leader does with a row an hour after its process is gone."""
    store = DynamoDBStore(msgspec.structs.replace(ddb, endpoint_url=proxy.url), clock=SystemClock())
    beat = Heartbeat(instance="gone", incarnation="1", seq=1)
    try:
        await store.fleet.put_heartbeat(beat)
        await store.fleet.drop_heartbeat(beat.key, 1)
        assert "gone" not in {each.instance for each in await store.fleet.heartbeats()}
    finally:
        await store.close()


async def test_what_the_policy_lacks_is_refused(dynamodb_store, dynamodb_settings):
    """The guard above can say no: with the rights of init-stores nothing can be delivered."""
    tables = (dynamodb_settings.table, dynamodb_settings.fleet_table)
    async with Guarded(dynamodb_settings.endpoint_url, Policy("init-stores-policy.json", tables)) as proxy:
        store = DynamoDBStore(msgspec.structs.replace(dynamodb_settings, endpoint_url=proxy.url), clock=SystemClock())
        try:
            with pytest.raises(StoreError, match="AccessDenied"):
                await store.write([record()])
        finally:
            await store.close()
        assert proxy.denied


@pytest.mark.parametrize(
    ("operation", "body"),
    [
        (
            "DeleteItem",
            {"TableName": "integration_logs", "Key": {"log_id": {"S": "6b0b1c1e-0000-7000-8000-000000000000"}}},
        ),
        ("UpdateItem", {"TableName": "integration_logs", "Key": {"log_id": {"S": "canary#1"}}}),
        ("Scan", {"TableName": "integration_logs"}),
        ("Scan", {"TableName": "integration_logs", "IndexName": "errors"}),
        ("DeleteItem", {"TableName": "integration_logs_fleet", "Key": {"pk": {"S": "fleet"}, "sk": {"S": "record"}}}),
        ("PutItem", {"TableName": "somebody_elses", "Item": {"pk": {"S": "heartbeats"}}}),
        ("BatchWriteItem", {"RequestItems": {"integration_logs_fleet": []}}),
    ],
)
def test_the_steady_states_role_may_not(operation, body):
    """Each of these by itself; the same key or index that it may use is no excuse elsewhere."""
    assert not Policy("sidecar-policy.json").allows(operation, body)

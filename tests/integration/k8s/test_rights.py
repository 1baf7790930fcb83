"""The rights that are given in steady state are enough for everything, and for nothing more."""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import asyncpg
import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.fleet_tables import AuditEntry, FateLine, FleetRecord, Heartbeat
from sidecar.gaps import GapLine
from sidecar.phase import DYNAMODB, Phase
from sidecar.stores.postgres import PostgresStore
from tests.integration.k8s.kubelet import Pod, config
from tests.integration.k8s.tools import ROOT
from tests.parts.oracle import read_postgres
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

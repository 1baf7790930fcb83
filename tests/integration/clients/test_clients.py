"""Real clients through an outage, and with a malformed record in the middle: what each keeps arrives exactly once."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sidecar import settings
from tests.integration.clients.clients import CLIENTS, Run
from tests.parts import oracle
from tests.parts.sidecar import Sidecar, eventually
from tests.parts.tcp_proxy import TcpProxy

COUNT = 1_000
MUST_DROP = frozenset({"winston"})
"""Clients that by their own design keep nothing that was not answered with 200; docs/clients/winston.md says so."""
MAY_DROP = MUST_DROP | {"otel-javascript"}
"""And those whose tries this outage may use up, on a slow machine; docs/clients/opentelemetry.md says so."""
CURL = {
    "service_name": {"value": "curl"},
    "log_timestamp": {"from": "/when", "format": "epoch_ms"},
    "identity": "content",
}
TOKEN = "integration-token"


class Stand:
    """One sidecar whose PostgreSQL is behind a proxy, so that it can be made to answer 503."""

    def __init__(self, base: Path, postgres: settings.Postgres, dynamodb: settings.DynamoDB, sql: TcpProxy) -> None:
        self.base, self.postgres, self.dynamodb, self.sql = base, postgres, dynamodb, sql
        token = base / "token"
        token.write_text(TOKEN)
        self.sidecar = Sidecar(
            base / "sidecar",
            {
                "phase": "dual_write_read_dynamo",
                "continue_on_write_failure": False,
                "fail_closed_after": "100ms",
                "mappings": {"curl": CURL},
                "control": {"token_file": str(token)},
                "postgres": {
                    "host": "127.0.0.1",
                    "port": sql.port,
                    "user": postgres.user,
                    "database": postgres.database,
                    "password": postgres.password.reveal() if postgres.password else "",
                    "connect_timeout": "1s",
                    "command_timeout": "2s",
                },
                "dynamodb": {
                    "endpoint_url": dynamodb.endpoint_url,
                    "region": dynamodb.region,
                    "table": dynamodb.table,
                    "fleet_table": dynamodb.fleet_table,
                },
            },
        )

    async def run(self, *, count: int, pause: int, bad: int) -> dict[str, int]:
        """Run all clients side by side to their end; what each says that it has lost."""

        async def one(name: str) -> int:
            directory = self.base / name
            directory.mkdir()
            lost = await CLIENTS[name][0](Run(self.sidecar.app_port, count, pause, bad, directory))
            return int(lost)

        async with asyncio.TaskGroup() as group:
            tasks = {name: group.create_task(one(name)) for name in CLIENTS}
        return {name: task.result() for name, task in tasks.items()}

    async def arrived(self) -> dict[str, Counter[int]]:
        """How often each number of each client is in both stores, which are the same."""
        await self.sidecar.drained()
        sql = await oracle.read_postgres(self.postgres)
        assert self.dynamodb.endpoint_url is not None
        oracle.assert_same(sql, await oracle.read_dynamodb(self.dynamodb, self.dynamodb.endpoint_url))
        found: dict[str, Counter[int]] = {name: Counter() for name in CLIENTS}
        for record in sql.values():
            name = record["service_name"]
            found[name][CLIENTS[name][1](json.loads(record["request_data"]))] += 1
        return found

    async def refused(self) -> list[dict[str, Any]]:
        """The dead letters of the door."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.get(f"{self.sidecar.url}/api/control/dead-letters?store=door&limit=100") as answer,
        ):
            assert answer.status == 200, await answer.text()
            return list((await answer.json())["dead_letters"])

    async def answers(self, status: int) -> None:
        """Wait until a post is answered so."""
        async with aiohttp.ClientSession() as session:

            async def ask() -> bool:
                async with session.post(f"{self.sidecar.url}/v1/logs", json={}) as answer:
                    return answer.status == status

            await eventually(ask, every=0.1, what=f"answers {status}")


@pytest.fixture
async def stand(postgres, dynamodb_store, dynamodb_settings, tmp_path: Path) -> AsyncIterator[Stand]:
    """A sidecar that runs, with both stores."""
    async with TcpProxy(postgres.host, postgres.port) as sql:
        made = Stand(tmp_path, postgres, dynamodb_settings, sql)
        try:
            await made.sidecar.start()
            yield made
        finally:
            made.sidecar.close()


@pytest.mark.timeout(300)
async def test_what_each_client_keeps_through_an_outage_arrives_exactly_once(stand):
    """Killed for five seconds, then 503 for five: what is missing was given up by its client, and nothing is twice."""

    async def outage() -> None:
        await asyncio.sleep(3)
        await (
            stand.sql.refuse()
        )  # what is accepted now waits, so that the next start knows at once that the store is down
        await asyncio.sleep(0.05)
        stand.sidecar.kill()
        await asyncio.sleep(5)
        await stand.sidecar.start()
        await stand.answers(503)
        await asyncio.sleep(5)
        await stand.sql.normal()
        await stand.answers(200)

    lost, _ = await asyncio.gather(stand.run(count=COUNT, pause=14, bad=-1), outage())
    found = await stand.arrived()
    missing = {name: COUNT - len(numbers) for name, numbers in found.items()}
    assert missing == lost, "each says what it has lost, and nothing else is missing"
    assert {name: n for name, numbers in found.items() for n, count in numbers.items() if count > 1} == {}
    assert MUST_DROP <= {name for name, count in missing.items() if 0 < count < COUNT} <= MAY_DROP
    assert await stand.refused() == []


async def test_a_malformed_record_in_the_middle_stops_nobody(stand):
    """The rest of its batch arrives, the client comes to its end, and the bad record is in the list of dead letters."""
    await stand.run(count=100, pause=2, bad=50)
    expected = Counter(n for n in range(100) if n != 50)
    assert {name: numbers for name, numbers in (await stand.arrived()).items() if numbers != expected} == {}
    letters = await stand.refused()
    assert [letter["class"] for letter in letters] == ["refused"] * len(CLIENTS)

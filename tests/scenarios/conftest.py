"""A whole stand for the scenarios: real stores behind proxies that break on command, and real sidecar processes."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from benchmarks.table_dynamodb import TableServer
from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.stores.dynamodb import DynamoDBStore
from tests.parts import oracle
from tests.parts.dynamodb import CREDENTIALS
from tests.parts.fault_proxy import FaultProxy
from tests.parts.sidecar import Sidecar
from tests.parts.tcp_proxy import TcpProxy


@dataclass
class Stand:
    """PostgreSQL behind ``sql``, DynamoDB behind ``dynamo``; ``sidecar(...)`` makes processes that use them."""

    base: Path
    postgres: settings.Postgres
    dynamodb: settings.DynamoDB
    sql: TcpProxy
    dynamo: FaultProxy
    made: list[Sidecar] = field(default_factory=list)

    def sidecar(self, name: str = "one", **changes: Any) -> Sidecar:
        """A sidecar that is not started yet; ``changes`` are sections of its configuration."""
        password = self.postgres.password.reveal() if self.postgres.password else ""
        base: dict[str, Any] = {
            "postgres": {
                "host": "127.0.0.1",
                "port": self.sql.port,
                "user": self.postgres.user,
                "password": password,
                "database": self.postgres.database,
                "connect_timeout": "1s",
                "command_timeout": "2s",
            },
            "dynamodb": {
                "endpoint_url": self.dynamo.url,
                "region": self.dynamodb.region,
                "table": self.dynamodb.table,
                "fleet_table": self.dynamodb.fleet_table,
                "connect_timeout": "1s",
                "read_timeout": "2s",
            },
        }
        for key, value in changes.items():
            base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
        made = Sidecar(self.base / name, base)
        self.made.append(made)
        return made

    async def in_postgres(self) -> dict[str, dict[str, Any]]:
        """Everything, read directly."""
        return await oracle.read_postgres(self.postgres)

    async def in_dynamodb(self) -> dict[str, dict[str, Any]]:
        """Everything, read directly."""
        assert self.dynamodb.endpoint_url is not None
        return await oracle.read_dynamodb(self.dynamodb, self.dynamodb.endpoint_url)


@pytest.fixture
async def stand(
    tmp_path: Path, postgres: settings.Postgres, dynamodb_settings: settings.DynamoDB
) -> AsyncIterator[Stand]:
    """Created stores, proxies in normal order; ends every sidecar that the test started."""
    store = DynamoDBStore(dynamodb_settings, clock=SystemClock())
    await store.create()
    await store.close()
    assert dynamodb_settings.endpoint_url is not None
    async with (
        TcpProxy(postgres.host, postgres.port) as sql,
        FaultProxy(dynamodb_settings.endpoint_url) as dynamo,
    ):
        made = Stand(tmp_path, postgres, dynamodb_settings, sql, dynamo)
        with contextlib.ExitStack() as stack:
            yield made
            for each in made.made:
                stack.callback(each.close)


@pytest.fixture
async def quick_stand(
    tmp_path: Path, postgres: settings.Postgres, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Stand]:
    """The same with a DynamoDB that takes thousands of calls a second, for several sidecars at once."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    async with TableServer() as server:
        options = settings.DynamoDB(endpoint_url=server.url, region="eu-west-1")
        store = DynamoDBStore(options, clock=SystemClock())
        await store.create()
        await store.close()
        async with TcpProxy(postgres.host, postgres.port) as sql, FaultProxy(server.url) as dynamo:
            made = Stand(tmp_path, postgres, options, sql, dynamo)
            with contextlib.ExitStack() as stack:
                yield made
                for each in made.made:
                    stack.callback(each.close)


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client."""
    async with aiohttp.ClientSession() as session:
        yield session

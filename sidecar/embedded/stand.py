"""What ``sidecar demo`` runs on: both databases, the switch, a mounted configuration and a real ``sidecar serve``."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import yaml

from sidecar.clock import SystemClock
from sidecar.embedded.dynamodb import REGION, EmbeddedDynamoDB
from sidecar.embedded.postgres import EmbeddedPostgres
from sidecar.embedded.throttle import ThrottleSwitch
from sidecar.phase import DYNAMODB, POSTGRES, Phase, StoreName
from sidecar.settings import DynamoDB, Postgres
from sidecar.stores.base import Store
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.postgres import PostgresStore

_COMMAND_SECONDS: Final = 60.0
CREDENTIALS: Final = {
    "AWS_ACCESS_KEY_ID": "demo",
    "AWS_SECRET_ACCESS_KEY": "demo",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(slots=True)
class Stand:
    """All parts, running."""

    directory: Path
    postgres: EmbeddedPostgres
    switch: ThrottleSwitch
    client: aiohttp.ClientSession
    stores: dict[StoreName, Store]
    app: str
    document: dict[str, Any]
    mounts: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        """The file as the sidecar sees it, behind the link that is swapped."""
        return self.directory / "config" / "config.yaml"

    def mount(self, **changes: object) -> None:
        """Change the configuration as kubelet does: a new directory, and the link ``..data`` renamed to it."""
        self.document |= changes
        self.mounts += 1
        folder = self.config.parent
        fresh = folder / f"..{self.mounts}"
        fresh.mkdir(parents=True)
        (fresh / "config.yaml").write_text(yaml.safe_dump(self.document))
        (folder / "..data_tmp").symlink_to(fresh.name)
        (folder / "..data_tmp").rename(folder / "..data")
        if not self.config.is_symlink():
            self.config.symlink_to("..data/config.yaml")

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line against the running sidecar. Blocks."""
        return subprocess.run(  # noqa: S603  (our own program)
            [sys.executable, "-m", "sidecar", *arguments, "--config", str(self.config)],
            capture_output=True,
            text=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )

    async def status(self) -> dict[str, Any]:
        """GET /status."""
        async with self.client.get(f"{self.app}/status") as answer:
            found: dict[str, Any] = await answer.json(content_type=None)
            return found


@contextlib.asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Stand]:
    """Start everything in ``directory``; end it in the reverse order, whatever happens."""
    postgres = EmbeddedPostgres(directory / "postgres")
    dynamodb = EmbeddedDynamoDB()
    clock = SystemClock()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(postgres.stop)
        stack.push_async_callback(dynamodb.stop)
        await asyncio.gather(postgres.start(), dynamodb.start())
        switch = await stack.enter_async_context(ThrottleSwitch(dynamodb.endpoint_url))
        sql = PostgresStore(postgres.settings(), clock=clock)
        stack.push_async_callback(sql.close)
        dynamo = DynamoDBStore(DynamoDB(endpoint_url=dynamodb.endpoint_url, region=REGION), clock=clock)
        stack.push_async_callback(dynamo.close)
        await asyncio.gather(sql.create(), dynamo.create())
        client = await stack.enter_async_context(aiohttp.ClientSession())
        ports = _free_ports(2)
        stand = Stand(
            directory,
            postgres,
            switch,
            client,
            {POSTGRES: sql, DYNAMODB: dynamo},
            f"http://127.0.0.1:{ports[0]}",
            _document(directory, postgres.settings(), switch.url, ports),
        )
        stand.mount()
        stack.callback(_end, stand)
        _spawn(stand)
        yield stand


def _document(directory: Path, sql: Postgres, endpoint: str, ports: list[int]) -> dict[str, Any]:
    token = directory / "token"
    token.write_text(os.urandom(16).hex())
    token.chmod(0o600)
    return {
        "phase": Phase.SQL_ONLY.label,
        "listen": {"app": f"127.0.0.1:{ports[0]}", "ops": f"127.0.0.1:{ports[1]}"},
        "spool": {"directory": str(directory / "spool"), "allow_volatile": True, "cap_bytes": "128MiB"},
        "postgres": {
            "host": sql.host,
            "port": sql.port,
            "user": sql.user,
            "password_file": str(directory / "postgres" / "password"),
        },
        "dynamodb": {"endpoint_url": endpoint, "region": REGION},
        "control": {"token_file": str(token)},
        "retry": {"delay": "200ms", "max_delay": "1s"},
        "reload": {"poll": "200ms"},
        "phases": {"min_soak": 0, "min_quiet": 0},
        "drain": {"timeout": "10s", "stop_accepting_before": "200ms"},
    }


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _spawn(stand: Stand) -> None:
    with (stand.directory / "sidecar.log").open("ab") as log:
        stand.process = subprocess.Popen(  # noqa: S603  (our own program)
            [sys.executable, "-m", "sidecar", "serve", "--config", str(stand.config)],
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for us: the sidecar is stopped when nobody needs it any more
        )


def _end(stand: Stand) -> None:
    process = stand.process
    if process is None or process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(timeout=5)

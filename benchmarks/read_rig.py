"""Stores and one sidecar for the benchmarks of reads: PostgreSQL, a DynamoDB that replays, a process that serves."""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import yaml

from benchmarks.processes import Child, Cores, free_port, python
from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.embedded.dynamodb import EmbeddedDynamoDB
from sidecar.embedded.postgres import EmbeddedPostgres
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.postgres import PostgresStore

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_EC2_METADATA_DISABLED": "true"}


class ReadRig:
    """``config`` is the file that the sidecar watches; ``configure`` changes its ``reads`` section while it runs."""

    def __init__(self, directory: Path, postgres: EmbeddedPostgres, dynamodb: settings.DynamoDB) -> None:
        self.postgres = postgres
        self.sql = PostgresStore(postgres.settings(), clock=SystemClock())
        self.dynamo = DynamoDBStore(dynamodb, clock=SystemClock())
        self.port, self.ops_port = free_port(), free_port()
        self.config = directory / "config.yaml"
        where = postgres.settings()
        self.document: dict[str, Any] = {
            "phase": "dual_write",
            "listen": {"app": f"127.0.0.1:{self.port}", "ops": f"127.0.0.1:{self.ops_port}"},
            "spool": {"directory": str(directory / "spool"), "allow_volatile": True},
            "postgres": {
                "host": where.host,
                "port": where.port,
                "user": where.user,
                "password_file": str(postgres.directory / "password"),
            },
            "dynamodb": {"endpoint_url": dynamodb.endpoint_url, "region": dynamodb.region},
            "reload": {"poll": "100ms"},
        }
        self.child: Child | None = None

    def configure(self, **reads: Any) -> None:
        """Replace the ``reads`` section, whole."""
        self.document["reads"] = reads
        fresh = self.config.with_suffix(".new")
        fresh.write_text(yaml.safe_dump(self.document))
        fresh.rename(self.config)

    async def start(self, cores: frozenset[int]) -> None:
        """Start the sidecar; returns when it is ready."""
        argv = python("-m", "sidecar", "serve", "--config", str(self.config))
        self.child = Child("sidecar", argv, cores, self.config.with_suffix(".log"), env=CREDENTIALS)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(aiohttp.ClientError):
                async with aiohttp.request("GET", f"http://127.0.0.1:{self.ops_port}/readyz") as answer:
                    if answer.status == 200:
                        return
            time.sleep(0.05)
        raise SystemExit(self.config.with_suffix(".log").read_text()[-3000:])

    async def status(self) -> Any:
        """GET /status."""
        async with aiohttp.request("GET", f"http://127.0.0.1:{self.port}/status") as answer:
            return json.loads(await answer.read())


@contextlib.asynccontextmanager
async def read_rig() -> AsyncIterator[ReadRig]:
    """Everything started but the sidecar; everything ended afterwards."""
    os.environ.update(CREDENTIALS)
    with tempfile.TemporaryDirectory(prefix="sidecar-reads-") as name:
        directory = Path(name)
        directory.chmod(0o755)  # the server runs as nobody
        options = {"fsync": "off", "shared_buffers": "256MB", "max_wal_size": "4GB", "autovacuum": "off"}
        postgres, dynamodb = EmbeddedPostgres(directory / "postgres", options=options), EmbeddedDynamoDB()
        rig: ReadRig | None = None
        replay: Child | None = None
        try:
            await postgres.start()
            await dynamodb.start()
            argv = python("-m", "benchmarks.replay_dynamodb", dynamodb.endpoint_url)
            replay = Child("replay", argv, Cores.of_this_machine().others, directory / "replay.log", first_line=True)
            endpoint = f"http://127.0.0.1:{replay.announced['port']}"
            rig = ReadRig(directory, postgres, msgspec.structs.replace(dynamodb.settings(), endpoint_url=endpoint))
            await rig.sql.create()
            await rig.dynamo.create()
            yield rig
        finally:
            if rig is not None:
                if rig.child is not None:
                    rig.child.stop()
                await rig.sql.close()
                await rig.dynamo.close()
            if replay is not None:
                replay.stop()
            await dynamodb.stop()
            await postgres.stop()

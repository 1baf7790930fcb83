"""The door for tests: the real application on a real spool behind a real listener; stores are played by the test."""

import asyncio
import contextlib
import io
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry

from sidecar.api.body import Budget
from sidecar.api.guard import Guard
from sidecar.api.listener import Listener
from sidecar.api.parts import ApiParts, Found
from sidecar.api.server import build_app
from sidecar.api.tokens import TokenFile
from sidecar.clock import SystemClock
from sidecar.errors import Busy
from sidecar.intake import Intake, Standing
from sidecar.metrics import Metrics
from sidecar.phase import STORES, TABLE, Phase
from sidecar.record import LogRecord
from sidecar.screening import Minter
from sidecar.settings import MIB, Settings
from sidecar.settings import Spool as SpoolSettings
from sidecar.spool import Leftover, Spool

JSON = {"Content-Type": "application/json"}


@dataclass
class Door:
    """What a test holds of a running door; ``settings``, ``phase``, ``closed`` and ``records`` may be replaced."""

    spool: Spool
    intake: Intake
    metrics: Metrics
    settings: Settings
    phase: Phase = Phase.DUAL_WRITE
    fenced: bool = False
    closed: Busy | None = None
    records: dict[str, LogRecord] = field(default_factory=dict)
    failure: Exception | None = None
    listener: Listener = field(init=False)
    client: aiohttp.ClientSession = field(init=False)

    async def post(
        self, body: bytes | object, headers: Mapping[str, str] | None = None, query: str = ""
    ) -> tuple[int, dict[str, object], Mapping[str, str]]:
        """POST /logs; the status, the body as JSON, the headers."""
        data = io.BytesIO(body if isinstance(body, bytes) else msgspec.json.encode(body))
        async with self.client.post(
            f"{self.listener.url}/logs{query}", data=data, headers={**JSON, **(headers or {})}
        ) as r:
            return r.status, msgspec.json.decode(await r.read(), type=dict[str, object]), r.headers

    async def get(
        self, path: str, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, object], Mapping[str, str]]:
        """GET a path; the status, the body as JSON, the headers."""
        async with self.client.get(self.listener.url + path, headers=headers) as r:
            return r.status, msgspec.json.decode(await r.read(), type=dict[str, object]), r.headers

    async def deliver(self, *stores: str, refuse: Iterable[str] = ()) -> None:
        """Play the stores: settle everything that is pending; records of these services become dead letters."""
        bad = set(refuse)
        for store in stores:
            cursor = self.spool.cursor(store)
            while self.spool.counters(store).pending:
                for frame in await cursor.take(1000, MIB):
                    self.spool_settle(store, cursor, frame, bad)
                await asyncio.sleep(0)

    def spool_settle(self, store: str, cursor: object, frame: object, bad: set[str]) -> None:
        """Settle one frame; see ``deliver``."""
        dead = [
            Leftover(i, "dead_letter", "permanent", "refused by the test")
            for i, record in enumerate(frame.records)  # type: ignore[attr-defined]
            if record.service_name in bad
        ]
        cursor.settle(frame, dead)  # type: ignore[attr-defined]


@contextlib.asynccontextmanager
async def open_door(
    directory: Path,
    settings: Settings | None = None,
    routes: Iterable[web.RouteDef] = (),
    address: str | None = None,
    guard: Guard | None = None,
) -> AsyncIterator[Door]:
    """A running door whose spool is in ``directory``."""
    settings = settings or Settings()
    settings = msgspec.structs.replace(
        settings,
        spool=SpoolSettings(directory=str(directory), allow_volatile=True, ballast_bytes=0, cap_bytes=64 * MIB),
    )
    clock = SystemClock()
    metrics = Metrics(CollectorRegistry())
    spool = Spool.open(directory, settings.spool, settings.dedup, STORES, clock)
    intake = Intake(
        spool=spool,
        standing=lambda: Standing(TABLE[door.phase], door.fenced),
        settings=lambda: door.settings,
        minter=Minter(clock, os.urandom),
        clock=clock,
        metrics=metrics,
        closed=lambda: door.closed,
        dedup=settings.dedup,
    )
    intake.load(spool.window())
    door = Door(spool, intake, metrics, settings)

    async def get(log_id: str) -> Found:
        if door.failure is not None:
            raise door.failure
        return Found(door.records.get(log_id), "postgres", door.phase.label)

    parts = ApiParts(
        intake=intake,
        settings=lambda: door.settings,
        metrics=metrics,
        status=lambda: {"phase": door.phase.label},
        record_status=spool.status,
        get=get,
        read_token=TokenFile(lambda: door.settings.reads.token_file),
        budget=Budget(64 * MIB),
    )
    door.listener = Listener(build_app(parts, routes, guard), address or "127.0.0.1:0", settings.listen)
    await door.listener.start()
    try:
        async with aiohttp.ClientSession() as door.client:
            yield door
    finally:
        await door.listener.stop(1)
        await spool.close()

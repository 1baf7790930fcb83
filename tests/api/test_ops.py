"""The ops listener: metrics, liveness, readiness, health; nothing else."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sidecar.api.listener import Listener, split_address
from sidecar.api.parts import OpsParts, Readiness
from sidecar.api.server import build_ops
from sidecar.metrics import Metrics
from sidecar.settings import Listen


@dataclass
class Ops:
    url: str
    metrics: Metrics
    readiness: Readiness
    listener: Listener


@contextlib.asynccontextmanager
async def _running(**limits: int) -> AsyncIterator[tuple[Ops, aiohttp.ClientSession]]:
    metrics = Metrics(CollectorRegistry())
    parts = OpsParts(metrics.registry, lambda: ops.readiness, lambda: {"stores": {"postgres": "up"}})
    listener = Listener(build_ops(parts, metrics), "127.0.0.1:0", Listen(**limits), newest_gets_in=True)
    await listener.start()
    ops = Ops(listener.url, metrics, Readiness(ready=True), listener)
    try:
        async with aiohttp.ClientSession() as client:
            yield ops, client
    finally:
        await listener.stop(1)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/plain"),
        ("text/plain;version=0.0.4", "text/plain"),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5", "application/openmetrics-text"),
    ],
)
async def test_metrics_in_the_form_that_is_accepted(accept: str, kind: str) -> None:
    """Both forms parse and hold what was counted."""
    async with _running() as (ops, client):
        ops.metrics.records_accepted.labels("dual_write").inc(3)
        async with client.get(f"{ops.url}/metrics", headers={"Accept": accept}) as r:
            assert r.status == 200
            assert r.headers["Content-Type"].startswith(kind)
            text = await r.text()
    parse = parse_openmetrics if kind.startswith("application") else parse_text
    samples = {s.name: s.value for family in parse(text) for s in family.samples}
    assert samples["sidecar_records_accepted_total"] == 3


async def test_readiness_is_the_verdict() -> None:
    """200 when started and the spool writable, else 503 with the reasons; any Host may ask."""
    async with _running() as (ops, client):
        async with client.get(f"{ops.url}/readyz", headers={"Host": "10.1.2.3:9464"}) as r:
            assert (r.status, await r.json()) == (200, {"ready": True, "reasons": []})
        ops.readiness = Readiness(ready=False, reasons=("spool: failed",))
        async with client.get(f"{ops.url}/readyz") as r:
            assert (r.status, await r.json()) == (503, {"ready": False, "reasons": ["spool: failed"]})
        async with client.get(f"{ops.url}/livez") as r:
            assert (r.status, await r.json()) == (200, {"live": True})
        async with client.get(f"{ops.url}/healthz") as r:
            assert (r.status, await r.json()) == (200, {"stores": {"postgres": "up"}})


@pytest.mark.parametrize("path", ["/logs", "/status", "/api/migration", "/", "/metrics/x"])
async def test_nothing_else_is_reachable(path: str) -> None:
    """No control and no payload on the port that the pod network reaches."""
    async with _running() as (ops, client):
        async with client.get(ops.url + path) as r:
            assert r.status == 404
            assert (await r.json())["error"]["code"] == "not_found"
        async with client.post(ops.url + "/metrics") as r:
            assert r.status == 405


async def probe(ops: Ops, path: str = "/livez", *, source: str = "127.0.0.1") -> int:
    """A connection of its own from that address, as kubelet makes one for each probe; the status."""
    connector = aiohttp.TCPConnector(local_addr=(source, 0), force_close=True)
    async with (
        aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=20)) as client,
        client.get(f"{ops.url}{path}") as answer,
    ):
        await answer.read()
        return answer.status


async def crowd(ops: Ops, source: str, n: int, says: bytes = b"") -> list[asyncio.StreamWriter]:
    """Connections that are held open by one address."""
    host, port = split_address(ops.url.removeprefix("http://"))
    held = []
    for _ in range(n):
        _, writer = await asyncio.open_connection(host, port, local_addr=(source, 0), limit=1)
        writer.write(says)
        held.append(writer)
    return held


@pytest.mark.parametrize(
    "says",
    [b"", b"GET /metrics HTTP/1.1\r\nHost: x\r\n", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"],
    ids=["silent", "half a head", "answers that nobody reads"],
)
async def test_whoever_holds_every_connection_open_keeps_no_probe_out(says: bytes) -> None:
    """300 connections from one address, with the default bound of 256: every probe is answered, from there or not."""
    async with _running() as (ops, _client):
        held = await crowd(ops, "127.0.0.2", 300, says)
        while ops.listener.connections < Listen().max_connections:
            await asyncio.sleep(0.001)
        try:
            for path in ("/livez", "/readyz", "/metrics"):
                assert await probe(ops, path) == 200
                assert await probe(ops, path, source="127.0.0.2") == 200
            assert ops.listener.connections <= Listen().max_connections
        finally:
            for writer in held:
                writer.transport.abort()


async def test_a_crowd_costs_no_other_address_its_connection() -> None:
    """A scraper's connection that was there first, and idles, is the one that stays: the crowd cuts off its own."""
    async with _running(max_connections=8) as (ops, _client):
        reader, scraper = await asyncio.open_connection(*split_address(ops.url.removeprefix("http://")))
        held = await crowd(ops, "127.0.0.2", 40)
        assert await probe(ops, source="127.0.0.3") == 200
        scraper.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(20):
            assert b" 200 " in await reader.readline()
        for writer in (*held, scraper):
            writer.transport.abort()
        while ops.listener.connections:
            await asyncio.sleep(0.001)

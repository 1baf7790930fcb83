"""A pod's life: started before the application, stopped after it, cut short, and started again on the same volume."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.integration.k8s.kubelet import Pod, config
from tests.integration.k8s.test_manifests import sidecar_of
from tests.integration.k8s.tools import render
from tests.parts.fault_proxy import FaultProxy, Reset
from tests.parts.oracle import assert_holds, assert_same, read_dynamodb, read_postgres
from tests.parts.tcp_proxy import TcpProxy


class World:
    """One pod between an application and two stores that can be taken away."""

    def __init__(self, pod: Pod, pg: TcpProxy, ddb: FaultProxy, settings) -> None:
        self.pod, self.pg, self.ddb = pod, pg, ddb
        self.settings = settings
        self.acknowledged: set[str] = set()

    async def write(self, count: int) -> None:
        """The application writes; every answer must be 202."""
        async with aiohttp.ClientSession() as session:
            for n in range(count):
                async with session.post(
                    f"{self.pod.url}/logs", json={"service_name": "s", "user_id": str(n)}
                ) as answer:
                    assert answer.status == 202
                    body = await answer.json()
                    self.acknowledged.update(_ids(body))

    async def stores(self, *, up: bool) -> None:
        """Take both stores away, or give them back."""
        if up:
            await self.pg.normal()
            self.ddb.clear()
        else:
            await self.pg.refuse()
            self.ddb.on("*", Reset())

    async def assert_nothing_lost(self) -> None:
        """Both stores hold every acknowledged record, once, and the same ones."""
        pg, ddb = self.settings
        left, right = await read_postgres(pg), await read_dynamodb(ddb, ddb.endpoint_url)
        assert_holds(left, self.acknowledged)
        assert_same(left, right)


def _ids(body: dict) -> set[str]:
    return {r["log_id"] for r in body["results"]} if "results" in body else {body["log_id"]}


@pytest.fixture
async def world(postgres, dynamodb_proxy, dynamodb_settings, tmp_path: Path) -> AsyncIterator[World]:
    """A pod that is not started yet, in dual_write."""
    async with TcpProxy(postgres.host, postgres.port) as pg:
        pod = Pod(tmp_path / "pod")
        pod.apply(config("dual_write", postgres, dynamodb_settings, port=pg.port, url=dynamodb_proxy.url))
        try:
            yield World(pod, pg, dynamodb_proxy, (postgres, dynamodb_settings))
        finally:
            pod.close()


async def test_a_native_sidecar_takes_the_applications_last_lines_and_drains_after_it(world):
    """Ready first; the application writes and ends; SIGTERM: all is in both stores when the process ends with 0."""
    await world.pod.start()
    await world.write(50)
    world.pod.terminate()
    assert await world.pod.exit_code() == 0
    await world.assert_nothing_lost()


async def test_a_plain_container_goes_on_accepting_while_the_application_still_stops(world):
    """Before 1.29 both get SIGTERM together: what is written a second later is accepted and delivered."""
    await world.pod.start()
    await world.write(10)
    await world.stores(up=False)
    await world.write(10)
    world.pod.terminate()
    await asyncio.sleep(1)
    await world.write(30)
    await world.stores(up=True)
    assert await world.pod.exit_code() == 0
    await world.assert_nothing_lost()


def pre_stop(pod: Pod, *, grace: float, timeout: float) -> subprocess.Popen[bytes]:
    """The hook of the plain container as it is deployed, in the sidecar's environment, with durations of a test."""
    *shell, script = sidecar_of(render("overlays/pre-1.29"))["lifecycle"]["preStop"]["exec"]["command"]
    script, changed = re.subn(r"sleep \d+ (.*) --timeout \d+", rf"sleep {grace:g} \1 --timeout {timeout:g}", script)
    assert changed == 1, script
    # `sidecar` must be that of this environment, whatever else the PATH has.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"SIDECAR_CONFIG": str(pod.volume.directory / "config.yaml"), "PATH": path}
    return subprocess.Popen([*shell, script], env={**os.environ, **pod.environ, **own}, stderr=subprocess.PIPE)


async def test_the_hook_of_a_plain_container_ends_when_nothing_is_pending_any_more(world):
    """Both stores down and back: it succeeds, and everything that was accepted meanwhile is in both stores."""
    await world.pod.start()
    await world.stores(up=False)
    await world.write(50)
    hook = pre_stop(world.pod, grace=0, timeout=60)
    await world.write(50)
    assert hook.poll() is None
    await world.stores(up=True)
    _, told = await asyncio.to_thread(hook.communicate, timeout=90)
    assert hook.returncode == 0, told
    await world.assert_nothing_lost()
    world.pod.terminate()
    assert await world.pod.exit_code() == 0


async def test_the_hook_of_a_plain_container_fails_where_records_are_left(world):
    """Then kubelet makes an event of it; the records are still there for the drain."""
    await world.pod.start()
    await world.stores(up=False)
    await world.write(50)
    hook = pre_stop(world.pod, grace=0, timeout=0.5)
    _, told = await asyncio.to_thread(hook.communicate, timeout=90)
    assert hook.returncode == 1, told
    assert b"100 records are still pending" in told  # of 50, owed to two stores
    await world.stores(up=True)
    world.pod.terminate()
    assert await world.pod.exit_code() == 0
    await world.assert_nothing_lost()


async def test_a_grace_period_that_is_cut_short_loses_nothing(world):
    """SIGTERM with both stores down, SIGKILL a second later, a new container on the same volume: all there, once."""
    await world.pod.start()
    await world.write(20)
    await world.stores(up=False)
    await world.write(200)
    world.pod.terminate()
    await asyncio.sleep(1)
    await world.write(20)
    world.pod.kill()
    assert world.pod.process.returncode == -signal.SIGKILL
    await world.pod.start()
    await world.stores(up=True)
    await world.pod.drained()
    await world.assert_nothing_lost()


async def test_a_pod_that_is_deleted_with_its_emptydir_has_lost_what_it_had_not_delivered(world):
    """The control of the tests above, and the limit that the documents name: the same life, but a fresh volume."""
    await world.pod.start()
    await world.write(20)
    await world.pod.drained()
    await world.stores(up=False)
    await world.write(30)
    world.pod.kill()
    shutil.rmtree(world.pod.spool)
    await world.pod.start()
    await world.stores(up=True)
    await world.pod.drained()
    with pytest.raises(AssertionError, match="30"):
        await world.assert_nothing_lost()


async def test_a_stop_with_both_stores_down_ends_by_itself_and_the_next_start_delivers(world):
    """The drain gives up at its timeout, exit 0; what was left is told by the next run, and delivered by it."""
    await world.pod.start()
    await world.stores(up=False)
    await world.write(100)
    world.pod.terminate()
    assert await world.pod.exit_code() == 0
    await world.pod.start()
    left = (await world.pod.metrics())['sidecar_undelivered_at_exit{store="postgres"}']
    assert left == 100
    await world.stores(up=True)
    await world.pod.drained()
    await world.assert_nothing_lost()


async def test_a_container_that_is_killed_again_and_again_loses_nothing(world):
    """Five OOM kills in the middle of writing, each followed by a restart on the same volume."""
    await world.pod.start()
    for _ in range(5):
        await world.write(40)
        world.pod.kill()
        await world.pod.start()
    await world.pod.drained()
    await world.assert_nothing_lost()

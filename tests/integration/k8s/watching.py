"""A real Prometheus on five real sidecars, a script of faults, and what was seen: one run, recorded once.

Every duration of the rules is shortened by the generator that writes them; the durations of production are covered by
promtool in test_monitoring. The faults are made from outside, as life makes them.
"""

import asyncio
import itertools
import json
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

from k8s.monitoring import panels
from k8s.monitoring.promql import Scale
from tests.integration.k8s.kubelet import Pod, config, flip_a_bit, live_frames
from tests.integration.k8s.prometheus import Prometheus
from tests.integration.k8s.tools import tool
from tests.parts.fault_proxy import FaultProxy, Refuse, Reset
from tests.parts.sidecar import eventually
from tests.parts.tcp_proxy import TcpProxy

FLEET = "fleet: {enabled: true, heartbeat: 1s, fence_after: 15s}"
PATIENCE = 90.0  # seconds that anything may take on a busy machine; an ordinary run waits a few
SCALE = Scale(1 / 300, shortest_window=6)
STRACE = ("-f", "-qq", "-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:delay_exit=400000")


@dataclass
class Recording:
    """What the run showed."""

    fired: set[str] = field(default_factory=set)
    cleared: set[str] = field(default_factory=set)
    false_alarms: set[str] = field(default_factory=set)  # while nothing was wrong
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # each panel's expression -> its series
    identity: list[dict[str, Any]] = field(default_factory=list)
    metrics_text: str = ""
    dynamodb_operations: set[str] = field(default_factory=set)
    script: dict[str, str] = field(default_factory=dict)  # alert -> the fault that it was expected in


class Watch:
    """The run: pods, stores, faults, and Prometheus.

    The three pods of ``a`` follow their own files, so that each can be brought into any phase; the two of ``f`` are a
    fleet, which never lets that happen.
    """

    def __init__(self, base: Path, pg: Any, ddb: Any, pg_proxy: TcpProxy, ddb_proxy: FaultProxy) -> None:
        self.pg, self.ddb, self.pg_proxy, self.ddb_proxy = pg, ddb, pg_proxy, ddb_proxy
        self.pods = [Pod(base / f"pod-{n}") for n in range(3)]
        self.fleet = [Pod(base / f"fleet-{n}") for n in range(2)]
        self.prometheus = Prometheus(base / "prometheus", {"a": self.pods, "f": self.fleet}, SCALE)
        self._token = base / "token"
        self._token.write_text("a control token of this run")
        self.recording = Recording()
        self._session: aiohttp.ClientSession
        self._load: list[asyncio.Task[None]] = []

    def config(self, phase: str = "dual_write", more: str = "") -> str:
        """The configuration of all pods, leading through the proxies."""
        token = f"control: {{token_file: '{self._token}'}}"
        validation = "validation: {interval: 0, settle: 1s}"  # asked for, so that the run knows when
        more = f"reads: {{shadow_sample: 1, shadow_probe: 0}}\n{token}\n{validation}\n{more}"
        return config(phase, self.pg, self.ddb, port=self.pg_proxy.port, url=self.ddb_proxy.url, more=more)

    async def run(self) -> Recording:
        """The whole script."""
        began = time.time()
        async with aiohttp.ClientSession() as self._session:
            try:
                for pod in self.pods:
                    pod.apply(self.config())
                for pod in self.fleet:
                    pod.environ["HOSTNAME"] = pod.base.name  # as in a pod; one and the same file for both
                    pod.apply(self.config(more=FLEET))
                await asyncio.gather(*(pod.start() for pod in (*self.pods, *self.fleet)))
                await self.validated("clean")
                await self.prometheus.start()
                self._load = [asyncio.create_task(self._light_load(pod)) for pod in self.pods]
                await self._quiet()
                for fault, alerts in SCRIPT:
                    await self._play(fault, alerts)
                await self._quiet()
                await self._read_everything(began, time.time())
            finally:
                for task in self._load:
                    task.cancel()
                await asyncio.gather(*self._load, return_exceptions=True)
                await self.prometheus.stop()
                for pod in (*self.pods, *self.fleet):
                    pod.close()
        return self.recording

    async def _light_load(self, pod: Pod) -> None:
        """An application that writes a little and reads less; it bears a sidecar that is away."""
        for number in itertools.count():
            known = str(uuid.uuid4())
            records = [{"service_name": "light", "request_data": "x" * 200} for _ in range(4)]
            with suppress(aiohttp.ClientError, TimeoutError):
                await self.post(pod, [*records, {**_dated(known), "service_name": "light"}])
                if number % 4 == 0:
                    await self.read(pod, known)
            await asyncio.sleep(0.25)

    async def post(self, pod: Pod, body: Any) -> int:
        """The status of one POST."""
        wait = aiohttp.ClientTimeout(total=10)
        async with self._session.post(f"{pod.url}/logs", json=body, timeout=wait) as answer:
            await answer.read()
            return answer.status

    async def read(self, pod: Pod, log_id: str) -> int:
        """The status of reading one record."""
        wait = aiohttp.ClientTimeout(total=5)
        async with self._session.get(f"{pod.url}/logs/{log_id}", timeout=wait) as answer:
            await answer.read()
            return answer.status

    async def validated(self, outcome: str) -> None:
        """Validate what is two hours old, which no load of this run writes to, until it ends like this."""

        async def ends_so() -> bool:
            return await self._validate() == outcome

        await eventually(ends_so, seconds=PATIENCE, every=1, what=outcome)

    async def _validate(self) -> str:
        """How one validation ended."""
        now = datetime.now(UTC)
        window = {"startDate": f"{now - timedelta(hours=3):%FT%TZ}", "endDate": f"{now - timedelta(hours=1):%FT%TZ}"}
        wait = aiohttp.ClientTimeout(total=PATIENCE)
        path = f"{self.pods[0].url}/api/migration/validate-consistency"
        async with self._session.get(path, params=window, timeout=wait) as answer:
            body = await answer.json()
            return str(body.get("outcome", body))

    async def order(self, pod: Pod, path: str, body: Any) -> Any:
        """What an operator asks of one pod."""
        headers = {"Authorization": f"Bearer {self._token.read_text()}"}
        wait = aiohttp.ClientTimeout(total=PATIENCE)
        async with self._session.post(f"{pod.url}{path}", json=body, headers=headers, timeout=wait) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    async def _quiet(self) -> None:
        """Nothing is wrong: await six silent evaluations in a row; what never lets them come is a false alarm.

        With durations of a 300th a scrape that a busy machine delays by a second counts as five minutes of outage.
        So a single alert here says something about the machine; one that stays says something about the rules.
        """
        end = time.monotonic() + PATIENCE
        silent = 0
        while silent < 6 and not self.recording.false_alarms:
            await asyncio.sleep(1)
            firing = await self.prometheus.firing()
            silent = 0 if firing else silent + 1
            if time.monotonic() > end:
                self.recording.false_alarms |= firing

    async def _play(self, fault: Callable[["Watch"], Any], alerts: set[str]) -> None:
        """One fault: its alerts fire while it lasts and are silent after it."""
        name = fault.__name__.strip("_")
        self.recording.script |= dict.fromkeys(alerts, name)
        seen: set[str] = set()

        async def all_fired() -> bool:
            seen.update(await self.prometheus.firing())
            return alerts <= seen

        async def all_silent() -> bool:
            return not alerts & await self.prometheus.firing()

        async with fault(self):
            with suppress(AssertionError):  # what did not fire is in the recording, and fails its own test
                await eventually(all_fired, seconds=PATIENCE, every=0.2, what=f"{name}: {alerts}")
        self.recording.fired |= seen
        with suppress(AssertionError):
            await eventually(all_silent, seconds=PATIENCE, every=0.2, what=f"{name} over: {alerts}")
            self.recording.cleared |= alerts & seen

    async def _read_everything(self, began: float, ended: float) -> None:
        """Every panel's expression over the whole run, the identity at every scrape, and one page of metrics."""
        span = {"start": f"{began:.3f}", "end": f"{ended:.3f}", "step": "1"}
        for title, query in panels.queries():
            expression = query.expr
            for name in ("namespace", "app", "pod"):
                expression = expression.replace(f"${name}", ".*")
            expression = expression.replace(panels.RATE, "6s")
            answer = await self.prometheus.ask(expression, **span)
            self.recording.answers[query.expr] = answer
            if title == "Identity":
                self.recording.identity = answer
        async with self._session.get(f"{self.pods[0].ops}/metrics") as answer_:
            self.recording.metrics_text = await answer_.text()
        self.recording.dynamodb_operations = set(self.ddb_proxy.calls)


@asynccontextmanager
async def _dynamodb_is_down(w: Watch) -> AsyncIterator[None]:
    w.ddb_proxy.on("*", Reset())
    for n in range(12):
        assert await w.post(w.pods[n % 3], [{"service_name": "s"}] * 1000) == 202
    yield
    w.ddb_proxy.clear()


@asynccontextmanager
async def _dynamodb_throttles(w: Watch) -> AsyncIterator[None]:
    w.ddb_proxy.on("BatchWriteItem", Refuse(400, "ProvisionedThroughputExceededException"))
    yield
    w.ddb_proxy.clear()


@asynccontextmanager
async def _the_table_is_gone(w: Watch) -> AsyncIterator[None]:
    await _sql(w, f'ALTER TABLE "{w.pg.table}" RENAME TO away')
    yield
    await _sql(w, f'ALTER TABLE away RENAME TO "{w.pg.table}"')


@asynccontextmanager
async def _a_record_breaks_a_constraint(w: Watch) -> AsyncIterator[None]:
    await _sql(w, f'ALTER TABLE "{w.pg.table}" ADD CONSTRAINT no_599 CHECK (status_code <> 599)')
    assert await w.post(w.pods[2], [{"service_name": "s", "status_code": 599}, *[{"service_name": "s"}] * 20]) == 202
    yield
    await _sql(w, f'ALTER TABLE "{w.pg.table}" DROP CONSTRAINT no_599')
    redrive = {"select": {"all": True}, "reason": "the constraint is gone"}
    assert (await w.order(w.pods[2], "/api/control/dead-letters/redrive", redrive))["records"] == 1


@asynccontextmanager
async def _the_application_sends_nonsense(w: Watch) -> AsyncIterator[None]:
    assert await w.post(w.pods[0], {"service_name": ""}) == 422
    yield


@asynccontextmanager
async def _the_configuration_is_garbage(w: Watch) -> AsyncIterator[None]:
    w.pods[0].apply("phase: [")
    yield
    w.pods[0].apply(w.config())


@asynccontextmanager
async def _one_pod_has_not_seen_the_change(w: Watch) -> AsyncIterator[None]:
    for pod in w.pods[1:]:
        pod.apply(w.config("dual_write_read_dynamo"))
    yield
    for pod in w.pods:
        pod.apply(w.config())


@asynccontextmanager
async def _two_steps_at_once_are_asked_for(w: Watch) -> AsyncIterator[None]:
    for pod in w.pods:
        pod.apply(w.config("dynamo_only"))
    yield
    for pod in w.pods:
        pod.apply(w.config())


@asynccontextmanager
async def _one_pod_is_forced_two_steps_ahead(w: Watch) -> AsyncIterator[None]:
    w.pods[2].apply(w.config("dynamo_only", "phase_force: a scripted fault"))
    yield
    w.pods[2].apply(w.config("dual_write", "phase_force: back from a scripted fault"))
    await eventually(lambda: _in_phase(w.pods[2], "dual_write"), what="back in dual_write")
    w.pods[2].apply(w.config())


async def _in_phase(pod: Pod, phase: str) -> bool:
    return bool((await pod.json("/status"))["phase"]["applied"] == phase)


@asynccontextmanager
async def _a_container_is_killed(w: Watch) -> AsyncIterator[None]:
    w.pods[0].kill()
    yield
    await w.pods[0].start()


@asynccontextmanager
async def _an_instance_of_the_fleet_is_killed(w: Watch) -> AsyncIterator[None]:
    w.fleet[0].kill()
    yield
    await w.fleet[0].start()


@asynccontextmanager
async def _the_disk_flips_a_bit(w: Watch) -> AsyncIterator[None]:
    w.ddb_proxy.on("*", Reset())
    for _ in range(5):  # the log may just have begun anew; then it holds too little that counts
        for _ in range(20):
            await w.post(w.pods[1], [{"service_name": "s", "request_data": "y" * 500}] * 20)
        w.pods[1].kill()
        (log,) = w.pods[1].spool.glob("*-wal")
        frames = live_frames(log)
        if len(frames) > 8:
            break
        await w.pods[1].start()
    flip_a_bit(log, frames[len(frames) // 2] + 100)
    await w.pods[1].start()
    yield
    w.ddb_proxy.clear()


@asynccontextmanager
async def _both_stores_are_down_until_the_spool_is_full(w: Watch) -> AsyncIterator[None]:
    await w.pg_proxy.refuse()
    w.ddb_proxy.on("*", Reset())

    async def fill() -> None:
        while await w.post(w.pods[2], [{"service_name": "big", "request_data": "z" * 50_000}] * 10) == 202:
            await asyncio.sleep(0.4)

    filling = asyncio.create_task(fill())
    yield
    filling.cancel()
    await asyncio.gather(filling, return_exceptions=True)
    # DynamoDB first: where PostgreSQL alone is back, it confirms, and what DynamoDB still lacks may be released
    w.ddb_proxy.clear()
    await eventually(lambda: _nearly_delivered(w.pods[2], "dynamodb"), seconds=PATIENCE, every=0.2, what="dynamodb")
    await w.pg_proxy.normal()


async def _nearly_delivered(pod: Pod, store: str) -> bool:
    """All but what the light load has just written."""
    return bool((await pod.json("/status"))["stores"][store]["account"]["pending"] < 50)


@asynccontextmanager
async def _the_disk_is_slow(w: Watch) -> AsyncIterator[None]:
    assert w.pods[0].process
    strace = subprocess.Popen(
        [tool("strace"), *STRACE, "-p", str(w.pods[0].process.pid)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield
    strace.terminate()
    await asyncio.to_thread(strace.wait, 10)


@asynccontextmanager
async def _a_record_is_changed_behind_the_sidecars(w: Watch) -> AsyncIterator[None]:
    changed = str(uuid.uuid4())
    assert await w.post(w.pods[0], {**_dated(changed, hours=2), "service_name": "s"}) == 202
    await w.pods[0].drained(PATIENCE)
    await _sql(w, f"UPDATE \"{w.pg.table}\" SET user_id = 'somebody' WHERE log_id = '{changed}'")

    async def look() -> None:
        while True:
            assert await w.read(w.pods[0], changed) == 200
            await asyncio.sleep(0.5)

    looking = asyncio.create_task(look())
    await w.validated("divergent")
    yield
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    await _sql(w, f"UPDATE \"{w.pg.table}\" SET user_id = NULL WHERE log_id = '{changed}'")
    await w.validated("clean")


def _dated(log_id: str, hours: float = 0) -> dict[str, str]:
    """An id of the client's own needs a time of its own."""
    at = datetime.now(UTC) - timedelta(hours=hours)
    return {"log_id": log_id, "log_timestamp": at.isoformat()}


async def _sql(w: Watch, statement: str) -> None:
    """As the owner of the tables, beside the sidecars."""
    password = w.pg.password.reveal() if w.pg.password else None
    connection = await asyncpg.connect(
        host=w.pg.host, port=w.pg.port, user=w.pg.user, password=password, database=w.pg.database, ssl=False
    )
    try:
        await connection.execute(statement)
    finally:
        await connection.close(timeout=5)


SCRIPT: tuple[tuple[Callable[[Watch], Any], set[str]], ...] = (
    # first, while there is little to compare: the local DynamoDB is slow at reading a whole index
    (_a_record_is_changed_behind_the_sidecars, {"SidecarShadowMismatch", "SidecarValidationNotClean"}),
    (_dynamodb_is_down, {"SidecarPendingAge", "SidecarDivergenceAge", "SidecarDivergenceCount"}),
    (_dynamodb_throttles, {"SidecarThrottled"}),
    (_the_table_is_gone, {"SidecarStoreBlocked"}),
    (_a_record_breaks_a_constraint, {"SidecarDeadLetters"}),
    (_the_application_sends_nonsense, {"SidecarRecordsRefused"}),
    (_the_configuration_is_garbage, {"SidecarReloadFailed"}),
    (_one_pod_has_not_seen_the_change, {"SidecarMixedPhases", "SidecarConfigDiffers"}),
    (_two_steps_at_once_are_asked_for, {"SidecarPhaseHeld"}),
    (_one_pod_is_forced_two_steps_ahead, {"SidecarUnsafePhases", "SidecarForcedTransition"}),
    (_a_container_is_killed, {"SidecarDown"}),
    (_an_instance_of_the_fleet_is_killed, {"SidecarFleetSilent"}),
    (_the_disk_flips_a_bit, {"SidecarSpoolDamaged"}),
    (
        _both_stores_are_down_until_the_spool_is_full,
        {"SidecarSpoolFullSoon", "SidecarSpoolNearCap", "SidecarBackPressure"},
    ),
    (_the_disk_is_slow, {"SidecarSlowCommits"}),
)


def save(recording: Recording, path: Path) -> None:
    """For the picture in the docs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recording.answers))


async def watched(base: Path, pg: Any, ddb: Any) -> Recording:
    """One run against these stores, whose tables exist."""
    async with TcpProxy(pg.host, pg.port) as pg_proxy, FaultProxy(ddb.endpoint_url) as ddb_proxy:
        return await Watch(base, pg, ddb, pg_proxy, ddb_proxy).run()

"""A real Prometheus on real sidecars, a script of faults, and what was seen: one run, recorded once.

Every duration of the rules is shortened by the generator that writes them; the durations of production are covered by
promtool in test_monitoring. The faults are made from outside, as life makes them.

The run mostly waits, so several applications live through their faults at the same time. Each has pods, tables and
ways to the stores of its own, and every alert names its application: the fault of one is nothing to the others.
"""

import asyncio
import itertools
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

from k8s.monitoring import panels
from k8s.monitoring.promql import Scale
from tests.integration.k8s.kubelet import Pod, config
from tests.integration.k8s.prometheus import Prometheus
from tests.parts.fault_proxy import FaultProxy
from tests.parts.sidecar import eventually
from tests.parts.tcp_proxy import TcpProxy

PATIENCE = 120.0  # seconds that anything may take on a busy machine; an ordinary run waits a few
SCALE = Scale(1 / 300, shortest_window=6, longest=30)
READS = "reads: {shadow_sample: 1, shadow_probe: 0}"
VALIDATION = "validation: {interval: 0, settle: 1s}"  # asked for, so that the run knows when

Alarm = tuple[str, str]
"""An application and the name of an alert that fires there."""


@dataclass
class Recording:
    """What the run showed."""

    fired: set[str] = field(default_factory=set)
    cleared: set[str] = field(default_factory=set)
    false_alarms: set[Alarm] = field(default_factory=set)  # while nothing was wrong
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # each panel's expression -> its series
    identity: list[dict[str, Any]] = field(default_factory=list)  # of all but the one whose books are made wrong
    metrics_text: str = ""
    dynamodb_operations: set[str] = field(default_factory=set)
    script: dict[str, str] = field(default_factory=dict)  # alert -> the fault that it was expected in
    timeline: list[str] = field(default_factory=list)  # what took how long


class Application:
    """One application's pods between it and its stores, and what an operator and a client do there."""

    def __init__(self, base: Path, plan: "Plan", pg: Any, ddb: Any) -> None:
        self.plan, self.base, self.pg, self.ddb = plan, base, pg, ddb
        self.pods = [Pod(base / f"pod-{n}") for n in range(plan.pods)]
        for n, pod in enumerate(self.pods):
            pod.environ["HOSTNAME"] = f"{base.name}-{n}"  # as in a pod; one and the same file for all
            pod.module = plan.module
        self.pg_proxy = TcpProxy(self.pg.host, self.pg.port)
        self.ddb_proxy = FaultProxy(self.ddb.endpoint_url)
        self.token = self.base / "token"
        self.token.write_text("a control token of this run")
        self._session: aiohttp.ClientSession
        self._load: list[asyncio.Task[None]] = []

    # --- its life --------------------------------------------------------------------------------------------------

    async def init_stores(self) -> None:
        """What the Job does."""
        self.pods[0].apply(config(self.plan.phase, self.pg, self.ddb))
        await self.command(self.pods[0], "init-stores")

    async def start(self, stack: AsyncExitStack) -> None:
        """Ready, and ended with the stack."""
        await stack.enter_async_context(self.pg_proxy)
        await stack.enter_async_context(self.ddb_proxy)
        self._session = await stack.enter_async_context(aiohttp.ClientSession())
        for pod in self.pods:
            stack.callback(pod.close)
        for pod in self.pods:
            pod.apply(self.config())
        await asyncio.gather(*(pod.start() for pod in self.pods))
        stack.push_async_callback(self._stop_load)
        self._load = [asyncio.create_task(self._light_load(pod)) for pod in self.pods]

    async def _stop_load(self) -> None:
        for task in self._load:
            task.cancel()
        await asyncio.gather(*self._load, return_exceptions=True)

    def config(self, phase: str = "", more: str = "") -> str:
        """The configuration of its pods, leading through the proxies; its own phase where none is given."""
        more = "\n".join([READS, f"control: {{token_file: '{self.token}'}}", VALIDATION, self.plan.more, more])
        phase = phase or self.plan.phase
        return config(phase, self.pg, self.ddb, port=self.pg_proxy.port, url=self.ddb_proxy.url, more=more)

    async def _light_load(self, pod: Pod) -> None:
        """A client that writes a little and reads less; it bears a sidecar that is away."""
        for number in itertools.count():
            known = str(uuid.uuid4())
            records = [{"service_name": "light", "request_data": "x" * 200} for _ in range(4)]
            with suppress(aiohttp.ClientError, TimeoutError):
                await self.post(pod, [*records, {**dated(known), "service_name": "light"}])
                if number % 4 == 0:
                    await self.read(pod, known)
            await asyncio.sleep(0.5)

    # --- what is done there ----------------------------------------------------------------------------------------

    async def post(self, pod: Pod, body: Any) -> int:
        """The status of one POST."""
        wait = aiohttp.ClientTimeout(total=PATIENCE)
        async with self._session.post(f"{pod.url}/logs", json=body, timeout=wait) as answer:
            await answer.read()
            return answer.status

    async def read(self, pod: Pod, log_id: str) -> int:
        """The status of reading one record."""
        wait = aiohttp.ClientTimeout(total=PATIENCE)
        async with self._session.get(f"{pod.url}/logs/{log_id}", timeout=wait) as answer:
            await answer.read()
            return answer.status

    async def order(self, pod: Pod, path: str, body: Any) -> Any:
        """What an operator asks of one pod."""
        headers = {"Authorization": f"Bearer {self.token.read_text()}"}
        wait = aiohttp.ClientTimeout(total=PATIENCE)
        async with self._session.post(f"{pod.url}{path}", json=body, headers=headers, timeout=wait) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    async def validated(self, outcome: str) -> None:
        """Validate what is two hours old, which no load of this run writes to, until it ends like this."""

        async def ends_so() -> bool:
            return await self.validate() == outcome

        await eventually(ends_so, seconds=PATIENCE, every=1, what=outcome)

    async def validate(self) -> str:
        """How one validation ended."""
        now = datetime.now(UTC)
        window = {"startDate": f"{now - timedelta(hours=3):%FT%TZ}", "endDate": f"{now - timedelta(hours=1):%FT%TZ}"}
        wait = aiohttp.ClientTimeout(total=PATIENCE)
        path = f"{self.pods[0].url}/api/migration/validate-consistency"
        async with self._session.get(path, params=window, timeout=wait) as answer:
            body = await answer.json()
            return str(body.get("outcome", body))

    async def sql(self, statement: str) -> None:
        """As the owner of the tables, beside the sidecars."""
        password = self.pg.password.reveal() if self.pg.password else None
        connection = await asyncpg.connect(
            host=self.pg.host,
            port=self.pg.port,
            user=self.pg.user,
            password=password,
            database=self.pg.database,
            ssl=False,
        )
        try:
            await connection.execute(statement)
        finally:
            await connection.close(timeout=5)

    async def command(self, pod: Pod, *words: str) -> str:
        """What an operator runs in that pod; its output. It must end with 0."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sidecar", *words, "--config", str(pod.volume.directory / "config.yaml")),
            env={**os.environ, **pod.environ},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output = (await process.communicate())[0].decode()
        assert process.returncode == 0, output
        return output

    async def in_phase(self, pod: Pod, phase: str) -> None:
        """Await that it is applied there."""

        async def applied() -> bool:
            return bool((await pod.json("/status"))["phase"]["applied"] == phase)

        await eventually(applied, seconds=PATIENCE, what=phase)

    async def restart(self, pod: Pod) -> None:
        """Kill the container; the next one starts on the same volume."""
        pod.kill()
        await pod.start()


Fault = Callable[[Application], AbstractAsyncContextManager[None]]
Track = Sequence[tuple[Fault, set[str]]]
"""Faults of one application, one after the other, each with the alerts that it must raise."""


@dataclass(frozen=True)
class Plan:
    """One application of the run, and what it lives through."""

    tracks: Sequence[Track]  # all at once
    pods: int = 1
    phase: str = "dual_write"
    more: str = ""  # of its configuration
    module: str = "sidecar"  # that python runs
    compared: bool = True  # at the start and every now and then; False: only where a fault says so
    balanced: bool = True  # False: its books are made wrong


class Watch:
    """The run: applications, faults, and Prometheus."""

    def __init__(self, base: Path, applications: Mapping[str, Application]) -> None:
        self.applications = applications
        self.prometheus = Prometheus(base / "prometheus", {name: a.pods for name, a in applications.items()}, SCALE)
        self.recording = Recording()
        self._began = time.monotonic()
        # What was never compared is stale as soon as the shortened day is over.
        self._from_the_start = {(n, "SidecarValidationStale") for n, a in applications.items() if not a.plan.compared}

    async def run(self) -> Recording:
        """The whole script."""
        began = time.time()
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.prometheus.stop)
            await asyncio.gather(*(each.start(stack) for each in self.applications.values()))
            await asyncio.gather(*(each.validated("clean") for each in self._compared()))
            await self.prometheus.start()
            self._took("start")
            await self._quiet()
            async with asyncio.TaskGroup() as group:
                comparing = [group.create_task(self._compare_again_and_again(each)) for each in self._compared()]
                await asyncio.gather(
                    *(
                        group.create_task(self._follow(name, each, track))
                        for name, each in self.applications.items()
                        for track in each.plan.tracks
                    )
                )
                for task in comparing:
                    task.cancel()
            await self._quiet()
            await self._read_everything(began, time.time())
            self._took("answers")
        return self.recording

    def _compared(self) -> list[Application]:
        return [each for each in self.applications.values() if each.plan.compared]

    def _took(self, what: str, since: float | None = None) -> None:
        now = time.monotonic()
        self.recording.timeline.append(f"{now - self._began:6.1f} s  {what}{f': {now - since:.1f} s' if since else ''}")
        print(self.recording.timeline[-1], flush=True)

    async def _compare_again_and_again(self, application: Application) -> None:
        """As the sidecars do by themselves, but of what the load does not write to."""
        while True:
            await asyncio.sleep(60)  # of the 288 s after which it counts as stale
            with suppress(aiohttp.ClientError, TimeoutError):
                await application.validate()

    async def _quiet(self) -> None:
        """Nothing is wrong: await six silent evaluations in a row; what never lets them come is a false alarm.

        With durations of a 300th a scrape that a busy machine delays by a second counts as five minutes of outage.
        So a single alert here says something about the machine; one that stays says something about the rules.
        """
        end = time.monotonic() + PATIENCE
        silent = 0
        while silent < 6 and not self.recording.false_alarms:
            await asyncio.sleep(1)
            firing = await self.prometheus.firing() - self._from_the_start
            silent = 0 if firing else silent + 1
            if time.monotonic() > end:
                self.recording.false_alarms |= firing
        self._from_the_start = set()
        self._took("quiet")

    async def _follow(self, name: str, application: Application, track: Track) -> None:
        """Each fault: its alerts fire while it lasts and are silent after it."""
        for fault, alerts in track:
            began = time.monotonic()
            what = fault.__name__.strip("_")
            self.recording.script |= dict.fromkeys(alerts, what)
            expected = {(name, alert) for alert in alerts}
            seen: set[Alarm] = set()

            async def all_fired(seen: set[Alarm] = seen, expected: set[Alarm] = expected) -> bool:
                seen.update(expected & await self.prometheus.firing())
                return expected <= seen

            async def all_silent(expected: set[Alarm] = expected) -> bool:
                return not expected & await self.prometheus.firing()

            async with fault(application):
                with suppress(AssertionError):  # what did not fire is in the recording, and fails its own test
                    await eventually(all_fired, seconds=PATIENCE, every=0.25, what=f"{what}: {alerts}")
                self._took(f"{name}: {what}", began)
                ended = time.monotonic()
            self.recording.fired |= {alert for _, alert in seen}
            with suppress(AssertionError):
                await eventually(all_silent, seconds=PATIENCE, every=0.25, what=f"{what} over: {alerts}")
                self.recording.cleared |= {alert for _, alert in seen}
            self._took(f"{name}: {what} is over", ended)

    async def _read_everything(self, began: float, ended: float) -> None:
        """Every panel's expression over the whole run, the identity at every scrape, and one page of metrics."""
        span = {"start": f"{began:.3f}", "end": f"{ended:.3f}", "step": "1"}
        balanced = "|".join(name for name, each in self.applications.items() if each.plan.balanced)
        for title, query in panels.queries():
            expression = query.expr.replace(panels.RATE, "6s").replace("$namespace", ".*").replace("$pod", ".*")
            answer = await self.prometheus.ask(expression.replace("$app", ".*"), **span)
            self.recording.answers[query.expr] = answer
            if title == "Identity":
                self.recording.identity = await self.prometheus.ask(expression.replace("$app", balanced), **span)
        for each in self.applications.values():
            self.recording.dynamodb_operations |= set(each.ddb_proxy.calls)
        pod = next(iter(self.applications.values())).pods[0]
        async with aiohttp.ClientSession() as session, session.get(f"{pod.ops}/metrics") as page:
            self.recording.metrics_text = await page.text()


def dated(log_id: str, hours: float = 0) -> dict[str, str]:
    """An id of the client's own needs a time of its own."""
    at = datetime.now(UTC) - timedelta(hours=hours)
    return {"log_id": log_id, "log_timestamp": at.isoformat()}


def save(recording: Recording, path: Path) -> None:
    """For the picture in the docs; and, beside it, what took how long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recording.answers))
    path.with_suffix(".txt").write_text("\n".join([*recording.timeline, ""]))

"""A real Prometheus server with the generated rules, on the ops ports of real sidecars."""

import asyncio
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from k8s.monitoring.__main__ import rule_file
from k8s.monitoring.promql import Scale
from tests.integration.k8s.kubelet import Pod
from tests.integration.k8s.tools import tool
from tests.parts.sidecar import eventually, free_port


class Prometheus:
    """A server of its own that scrapes the pods of each application once a second."""

    def __init__(self, directory: Path, apps: Mapping[str, list[Pod]], scale: Scale) -> None:
        self.directory = directory
        self.url = f"http://127.0.0.1:{free_port()}"
        directory.mkdir()
        (directory / "rules.yaml").write_text(rule_file(scale))
        targets = [
            {"targets": [f"127.0.0.1:{pod.ops_port}"], "labels": {"namespace": "n", "app": app, "pod": f"{app}-{n}"}}
            for app, pods in apps.items()
            for n, pod in enumerate(pods)
        ]
        self._targets = len(targets)
        (directory / "prometheus.yml").write_text(
            yaml.safe_dump(
                {
                    "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
                    "rule_files": ["rules.yaml"],
                    "scrape_configs": [{"job_name": "hybrid-log-sidecar", "static_configs": targets}],
                }
            )
        )
        self.process: subprocess.Popen[bytes] | None = None
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Start it and wait until it answers."""
        with (self.directory / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    tool("prometheus"),
                    f"--config.file={self.directory}/prometheus.yml",
                    f"--storage.tsdb.path={self.directory}/data",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdout=log,
                stderr=log,
            )
        self._session = aiohttp.ClientSession()

        async def up() -> bool:
            with suppress(aiohttp.ClientError):
                return len(await self.ask("up == 1")) == self._targets
            return False

        await eventually(up, seconds=120, what="all targets scraped")

    async def stop(self) -> None:
        """End it."""
        if self._session:
            await self._session.close()
        if self.process:
            self.process.terminate()
            await asyncio.to_thread(self.process.wait, 60)

    async def ask(self, expression: str, **more: Any) -> list[dict[str, Any]]:
        """The result of an expression now, or over a range where ``start`` and ``end`` are given."""
        assert self._session
        path = "query_range" if "start" in more else "query"
        async with self._session.get(f"{self.url}/api/v1/{path}", params={"query": expression, **more}) as answer:
            body = await answer.json()
        assert body["status"] == "success", (expression, body)
        return list(body["data"]["result"])

    async def firing(self) -> set[tuple[str, str]]:
        """The alerts that fire now, each with its application."""
        found = await self.ask('ALERTS{alertstate="firing"}')
        return {(r["metric"]["app"], r["metric"]["alertname"]) for r in found}

"""A real sidecar process, started, asked, stopped and killed from outside, and kubelet's way of changing its files."""

import asyncio
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tests.parts.nursery import NURSERY, ROOT, Born

__all__ = ["ROOT", "Mount", "Sidecar", "eventually", "free_port"]


def free_port() -> int:
    """A port that nobody listens on now, below those that the kernel gives to outgoing connections.

    A process that is started again needs its port back: one of the kernel's own may meanwhile be somebody's
    connection, even that of a client which calls the absent process and reaches itself.
    """
    ports = random.SystemRandom()
    while True:
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", ports.randrange(10_240, 32_000)))
            except OSError:
                continue
            return int(s.getsockname()[1])


async def eventually(check, *, seconds: float = 20.0, every: float = 0.02, what: str = "") -> Any:
    """Await a condition: the first true value of ``check()`` (plain or coroutine function), or fail with the last."""
    end = time.monotonic() + seconds
    while True:
        value = check()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what or check}: {value!r}")
        await asyncio.sleep(every)


class Mount:
    """A mounted ConfigMap: every write is kubelet's AtomicWriter (new directory, ``..data_tmp``, rename)."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._n = 0

    def write(self, files: Mapping[str, str | bytes]) -> None:
        """Replace the whole content at once, as kubelet does."""
        self._n += 1
        fresh = self.directory / f"..2026_11_22_00_00_{self._n:02d}.{os.getpid()}"
        fresh.mkdir()
        for name, text in files.items():
            (fresh / name).write_bytes(text.encode() if isinstance(text, str) else text)
        old = (self.directory / "..data").readlink() if (self.directory / "..data").is_symlink() else None
        (self.directory / "..data_tmp").symlink_to(fresh.name)
        (self.directory / "..data_tmp").rename(self.directory / "..data")
        for name in files:
            link = self.directory / name
            if not link.is_symlink():
                link.symlink_to(Path("..data") / name)
        if old:
            for path in (self.directory / old).iterdir():
                path.unlink()
            (self.directory / old).rmdir()


class Sidecar:
    """One sidecar on its own spool, configuration mount and ports."""

    def __init__(self, base: Path, settings: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> None:
        self.base = base
        self.mount = Mount(base / "config")
        self.spool = base / "spool"
        self.app_port = free_port()
        self.ops_port = free_port()
        self.environ = dict(environ or {})
        self.module = "sidecar"  # that python runs
        self.afresh = False  # a Python of its own is started, as in a pod; else the nursery forks one, sooner ready
        self.process: subprocess.Popen[bytes] | Born | None = None
        self.log = base / "sidecar.log"
        self.settings: dict[str, Any] = {
            "phase": "dual_write",
            "listen": {"app": f"127.0.0.1:{self.app_port}", "ops": f"127.0.0.1:{self.ops_port}"},
            "retry": {"delay": "100ms", "max_delay": "500ms", "probe_interval": "500ms"},
            "reload": {"poll": "200ms"},
            "drain": {"timeout": "5s", "stop_accepting_before": "1s"},
        }
        for key, value in settings.items():
            if isinstance(value, Mapping):
                self.settings[key] = {**self.settings.get(key, {}), **value}
            else:
                self.settings[key] = value
        self.settings["spool"] = {
            "directory": str(self.spool),
            "allow_volatile": True,
            **self.settings.get("spool", {}),
        }
        self.configure()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.app_port}"

    @property
    def ops(self) -> str:
        return f"http://127.0.0.1:{self.ops_port}"

    def configure(self, **changes: Any) -> None:
        """Change top-level settings through the mount, as a ConfigMap edit does."""
        self.settings.update(changes)
        self.mount.write({"config.yaml": yaml.safe_dump(self.settings)})

    @property
    def config(self) -> str:
        """The path of its configuration."""
        return str(self.mount.directory / "config.yaml")

    async def command(self, *arguments: str, seconds: float = 60.0) -> "subprocess.CompletedProcess[str]":
        """A command of the product with this sidecar's configuration and environment, as a process of its own."""
        environ = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true", **self.environ}
        words = ["sidecar", *arguments, "--config", self.config]
        return await asyncio.to_thread(NURSERY.run, words, environ, seconds=seconds)

    def spawn(self) -> None:
        """Start the process; does not wait."""
        environ = {**os.environ, "AWS_EC2_METADATA_DISABLED": "true", **self.environ}
        words = [self.module, "serve", "--config", self.config]
        if not self.afresh:
            self.process = NURSERY.launch(words, environ, self.log)
            return
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=ROOT,
                env=environ,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    async def start(self) -> "Sidecar":
        """Start the process and wait until it is ready."""
        self.spawn()
        await self.ready()
        return self

    async def ready(self, seconds: float = 20.0) -> None:
        """Wait until ``/readyz`` says 200."""
        async with aiohttp.ClientSession() as session:

            async def ask() -> bool:
                assert self.process is not None
                if self.process.poll() is not None:
                    raise AssertionError(f"the sidecar exited with {self.process.returncode}:\n{self.tail()}")
                try:
                    async with session.get(f"{self.ops}/readyz") as answer:
                        return answer.status == 200
                except aiohttp.ClientError:
                    return False

            await eventually(ask, seconds=seconds, what="ready")

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text()[-6000:] if self.log.exists() else ""

    def events(self) -> list[dict[str, Any]]:
        """Its log, line by line; every line must be JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.strip()]

    async def json(self, path: str, *, ops: bool = False) -> Any:
        """GET a JSON document."""
        async with (
            aiohttp.ClientSession() as session,
            session.get((self.ops if ops else self.url) + path) as answer,
        ):
            return await answer.json(content_type=None)

    async def metrics(self) -> dict[str, float]:
        """Every sample of ``/metrics``: ``name{labels}`` -> value, as printed."""
        async with aiohttp.ClientSession() as session, session.get(f"{self.ops}/metrics") as answer:
            text = await answer.text()
        samples = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                samples[name] = float(value)
        return samples

    async def pending(self) -> float:
        """Records pending in all stores together."""
        return sum(v for k, v in (await self.metrics()).items() if k.startswith("sidecar_store_pending_records{"))

    async def drained(self, seconds: float = 30.0) -> None:
        """Wait until nothing is pending, however slow the machine is; fail where that comes no nearer for so long."""
        least, since = math.inf, time.monotonic()
        while pending := await self.pending():
            if pending < least:
                least, since = pending, time.monotonic()
            assert time.monotonic() - since < seconds, f"not one less within {seconds} s: {pending} are pending"
            await asyncio.sleep(0.02)

    def kill(self) -> None:
        """Kill it as the kernel does: no handler runs."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def terminate(self) -> None:
        """SIGTERM; does not wait."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    async def exit_code(self, seconds: float = 30.0) -> int:
        """Wait for the process's end."""
        assert self.process is not None
        await eventually(lambda: self.process.poll() is not None, seconds=seconds, what="exit")
        return self.process.returncode

    def close(self) -> None:
        """End it however it is."""
        if self.process is not None and self.process.poll() is None:
            self.kill()

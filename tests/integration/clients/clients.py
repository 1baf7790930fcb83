"""The clients: how each is started, and where the number of a record stands in what the sidecar made of it.

Every client writes ``count`` records numbered from 0, one each ``pause`` milliseconds, that numbered ``bad`` (if any)
malformed, ends when it has nothing more to send, and returns how many it told the application to be lost.
"""

import asyncio
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
NODE = ROOT / ".run" / "clients-node"
PYTHON = ROOT / ".run" / "clients-python" / "bin" / "python"
INSTALL = "run tests/integration/clients/install"


def tool(name: str) -> str:
    """The path of a command; fails the test where it is missing."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    assert found, f"{name} is missing: {INSTALL}"
    return found


@dataclass(frozen=True)
class Run:
    """What a client is asked for; ``directory`` is its own."""

    port: int
    count: int
    pause: int
    bad: int
    directory: Path

    @property
    def arguments(self) -> tuple[str, ...]:
        """For a client that is a program of ours around a library of theirs."""
        return tuple(map(str, (self.port, self.count, self.pause, self.bad)))


async def _program(*command: str, cwd: Path) -> bytes:
    """Run a program to its end; what it printed."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "NODE_"))}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 100)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, f"{command}: {out[-2000:]!r} {err[-4000:]!r}"
    return out


async def _javascript(name: str, run: Run) -> bytes:
    assert NODE.exists(), f"the JavaScript clients are missing: {INSTALL}"
    script = run.directory / name  # beside node_modules, because a module is looked for from where it is imported
    shutil.copy(HERE / "node" / name, script)
    (run.directory / "node_modules").symlink_to(NODE / "node_modules")
    return await _program(tool("node"), str(script), *run.arguments, cwd=run.directory)


async def winston(run: Run) -> int:
    """Winston's Http transport in batches of 20; it reports a failed batch once and drops it."""
    out = await _javascript("winston.mjs", run)
    return 20 * len(json.loads(out.splitlines()[-1]))


async def pino(run: Run) -> int:
    """Pino with pino-http-send, 60 tries a second apart."""
    await _javascript("pino.mjs", run)
    return 0


async def otel_javascript(run: Run) -> int:
    """The OpenTelemetry SDK for JavaScript, OTLP/JSON; it gives a batch up after five tries, in about 13 s."""
    out = await _javascript("otel.mjs", run)
    return int(out.splitlines()[-1])


async def otel_python(run: Run) -> int:
    """The OpenTelemetry SDK for Python, OTLP/protobuf."""
    assert PYTHON.exists(), f"the Python clients are missing: {INSTALL}"
    await _program(str(PYTHON), str(HERE / "python" / "otel.py"), *run.arguments, cwd=run.directory)
    return 0


async def syslog_ng(run: Run) -> int:
    """syslog-ng with a disk buffer, fed through its socket in RFC 5424; the bad record is of the year 2999."""
    config = (HERE / "syslog-ng.conf").read_text()
    config = config.replace("@DIRECTORY@", str(run.directory)).replace("@PORT@", str(run.port))
    (run.directory / "syslog-ng.conf").write_text(config)
    files = ("-f", "syslog-ng.conf", "-R", "persist", "-p", "pid", "-c", "control")
    with (run.directory / "errors").open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *(tool("syslog-ng"), "--foreground", "--no-caps", *files),
            cwd=run.directory,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=errors,
        )
    try:
        async with asyncio.timeout(20):
            while not (run.directory / "log.sock").exists():
                assert process.returncode is None, (run.directory / "errors").read_text()
                await asyncio.sleep(0.05)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(run.directory / "log.sock"))
            for n in range(run.count):
                time = "2999-01-01T00:00:00Z" if n == run.bad else "-"
                sock.sendall(f"<14>1 {time} host syslog-ng 7 - - record {n}\n".encode())
                await asyncio.sleep(run.pause / 1000)
        async with asyncio.timeout(60):
            while await _syslog_ng_queued(run) or await _syslog_ng_processed(run) < run.count:
                await asyncio.sleep(0.2)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), 20)
    return 0


async def _syslog_ng_statistics(run: Run) -> Mapping[str, int]:
    """The statistics of the destination."""
    out = await _program(tool("syslog-ng-ctl"), "stats", "-c", "control", cwd=run.directory)
    rows = [line.split(";") for line in out.decode().splitlines() if line.startswith("dst.http;")]
    return {row[4]: int(row[5]) for row in rows}


async def _syslog_ng_queued(run: Run) -> int:
    return (await _syslog_ng_statistics(run)).get("queued", 1)


async def _syslog_ng_processed(run: Run) -> int:
    return (await _syslog_ng_statistics(run)).get("processed", 0)


async def curl(run: Run) -> int:
    """Curl with NDJSON files of 50 lines, repeated by its own --retry; a mapping of the configuration."""
    for start in range(0, run.count, 50):
        lines = [
            json.dumps({"when": 1_795_000_000_000 + n, "n": n, "text": "x"}) if n != run.bad else '{"n":'
            for n in range(start, min(start + 50, run.count))
        ]
        (run.directory / "lines").write_text("\n".join(lines))
        await _program(
            *(tool("curl"), "-sS", "--fail", "--retry", "60", "--retry-delay", "1", "--retry-all-errors"),
            *("-H", "Content-Type: application/x-ndjson", "--data-binary", "@lines"),
            f"http://127.0.0.1:{run.port}/ingest/curl",
            cwd=run.directory,
        )
        await asyncio.sleep(50 * run.pause / 1000)
    return 0


# -- clients that cannot be installed here: their recorded requests, with their documented reaction to each answer


async def _replayed(
    run: Run, name: str, batch: Callable[[list[dict[str, Any]]], bytes], kind: str, keep: Callable[[int], bool]
) -> int:
    """Post batches of 50 events as ``name`` does; ``keep(status)``: the same batch again (0: no answer)."""
    template = _TEMPLATES[name]
    async with aiohttp.ClientSession() as session:
        for start in range(0, run.count, 50):
            events = [template(n, n == run.bad) for n in range(start, min(start + 50, run.count))]
            body = batch(events)
            status = 0
            while keep(status):
                try:
                    async with session.post(
                        f"http://127.0.0.1:{run.port}/ingest/{name}", data=body, headers={"Content-Type": kind}
                    ) as answer:
                        status = answer.status
                except aiohttp.ClientError:
                    status = 0
                if keep(status):
                    await asyncio.sleep(0.5)
            assert status == 200, f"{name} takes {status} for the end of the batch"
            await asyncio.sleep(50 * run.pause / 1000)
    return 0


def _serilog(n: int, bad: bool) -> dict[str, Any]:
    time = "never" if bad else f"2026-11-22T18:24:52.{n:07d}+01:00"
    return {
        "Timestamp": time,
        "Level": "Information",
        "MessageTemplate": "record {N}",
        "RenderedMessage": f"record {n}",
        "Properties": {"N": n, "Application": "serilog"},
    }


def _fluent_bit(n: int, bad: bool) -> dict[str, Any]:
    return {"date": "never" if bad else 1795368292 + n / 1e6, "log": "record", "n": n, "service": "fluent-bit"}


def _vector(n: int, bad: bool) -> dict[str, Any]:
    time = "never" if bad else f"2026-11-22T17:24:52.{n:09d}Z"
    return {"message": "record", "n": n, "service": "vector", "timestamp": time}


_TEMPLATES: Mapping[str, Callable[[int, bool], dict[str, Any]]] = {
    "serilog": _serilog,
    "fluent-bit": _fluent_bit,
    "vector": _vector,
}


def _array(events: list[dict[str, Any]]) -> bytes:
    return json.dumps(events, separators=(",", ":")).encode()


def _lines(events: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(event, separators=(",", ":")) for event in events).encode()


async def serilog(run: Run) -> int:
    """Serilog.Sinks.Http: any answer but 2xx, and the same batch again, for ever."""
    return await _replayed(run, "serilog", _array, "application/json", lambda status: not 200 <= status < 300)


def _shipper_keeps(status: int) -> bool:
    return status in (0, 408, 429) or status >= 500


async def fluent_bit(run: Run) -> int:
    """Fluent Bit's http output: 408, 429 and 5xx again, other 4xx and all above 205 dropped."""
    return await _replayed(run, "fluent-bit", _array, "application/json", _shipper_keeps)


async def vector(run: Run) -> int:
    """Vector's http sink, lines without a last newline: 408, 429 and 5xx again, other 4xx dropped."""
    return await _replayed(run, "vector", _lines, "application/x-ndjson", _shipper_keeps)


Client = Callable[[Run], Any]

CLIENTS: Mapping[str, tuple[Client, Callable[[dict[str, Any]], int]]] = {
    "winston": (winston, lambda rest: rest["n"]),
    "pino": (pino, lambda rest: rest["n"]),
    "otel-javascript": (otel_javascript, lambda rest: rest["attributes"]["n"]),
    "otel-python": (otel_python, lambda rest: rest["attributes"]["n"]),
    "syslog-ng": (syslog_ng, lambda rest: int(rest["MESSAGE"].split()[1])),
    "curl": (curl, lambda rest: rest["n"]),
    "serilog": (serilog, lambda rest: rest["Properties"]["N"]),
    "fluent-bit": (fluent_bit, lambda rest: rest["n"]),
    "vector": (vector, lambda rest: rest["n"]),
}
"""Its name, which is the service of its records -> the client, and the number of a record from its request_data."""

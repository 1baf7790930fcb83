"""``python -m benchmarks.backfill --rows 200000``: what backfill and validation cost, also to live traffic.

1. **There**: N rows of history in PostgreSQL (30 days of them), an empty DynamoDB that keeps and counts
   (``table_dynamodb``), one process of ``sidecar backfill`` without a bound on its rate: records/s, its highest
   resident memory, write and read units a million rows as the service counts them. The memory after a tenth of the
   rows stands beside it: flat means that they are about equal.
2. **Again**: the same once more, everything is there: what idempotence costs.
3. **Back**: PostgreSQL emptied, all of it copied back.
4. **Validate**: ``sidecar validate --all`` without a bound on its rate, fast (through the index) and deep (every item):
   the same figures, a record being one that both stores hold.
5. **Beside live traffic**: a sidecar in ``dual_write`` under an open load, alone, then beside each of

   * ``backfill`` and ``validation``: the commands at their default rates, on the same two stores, as a Job does it on a
     node of its own: not on the sidecar's core,
   * ``backfill in the pod`` and ``validation in the pod``: the same on the sidecar's core, as ``kubectl exec`` does it,
   * ``own validation, reading`` and ``own validation, comparing``: by the sidecar itself, as it does every hour, while
     it reads DynamoDB's index and while it walks through both stores;

   the answers' p99, and the ratios (to be at most 1.3). As in ``cases`` the generator is a real-time process, so that
   what else needs its core does not show as the sidecar's tail; how late it was all the same stands beside (``lag``).

One JSON object on stdout; progress on stderr. Meant for a quiet machine with two cores: one for what is measured (the
command in 1 to 4, the sidecar in 5), one for everything else. ``--skip beside`` and the like leave parts out where
there is no time for all.
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import yaml

from benchmarks.database import Database
from benchmarks.processes import Child, Cores, free_port, python, wait_until
from benchmarks.records import record
from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.operator.backfill_arguments import DEFAULT_RATE
from sidecar.record import LogRecord
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.postgres import PostgresStore

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_EC2_METADATA_DISABLED": "true"}
DAYS = 30
LIVE_RATE = 500
RATIO = 1.3


def history(start: int, number: int, total: int) -> list[LogRecord]:
    """Rows ``start`` .. ``start + number`` of ``total``, evenly over the days before today."""
    first = (int(time.time()) // 86_400 - DAYS) * 86_400_000_000
    made = []
    for i in range(start, start + number):
        fields = record(i % 1024)
        us = first + i * DAYS * 86_400_000_000 // total
        key = uuid.UUID(int=((us // 1000) << 80) | (7 << 76) | ((i & 0xFFF) << 64) | (2 << 62) | i)
        made.append(
            LogRecord(
                str(key),
                fields.get("application_id"),
                fields.get("log_type", "INFO"),
                fields["service_name"],
                _text(fields.get("request_data")),
                _text(fields.get("response_data")),
                fields.get("status_code"),
                fields.get("is_success", True),
                fields.get("error_message"),
                fields.get("processing_time_ms"),
                us,
                fields.get("correlation_id"),
                fields.get("user_id"),
            )
        )
    return made


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


class Bench:
    """Both stores, a configuration, and processes on it."""

    def __init__(self, directory: Path, cores: Cores) -> None:
        self.directory = directory
        self.cores = cores
        self.database = Database(directory / "pg", cores.others, directory / "postgres.log")
        self.table: Child | None = None
        self.ports = [free_port(), free_port()]
        self.config = directory / "config.yaml"

    def start(self) -> None:
        self.database.create()
        self.database.start()
        server = python("-m", "benchmarks.table_dynamodb")
        self.table = Child("dynamodb", server, self.cores.others, self.directory / "dynamodb.log", first_line=True)
        self.config.write_text(
            yaml.safe_dump(
                {
                    "phase": "dual_write",
                    "listen": {"app": f"127.0.0.1:{self.ports[0]}", "ops": f"127.0.0.1:{self.ports[1]}"},
                    "spool": {"directory": str(self.directory / "spool"), "allow_volatile": True},
                    "postgres": {"host": "127.0.0.1", "port": self.database.port, "user": "postgres"},
                    "dynamodb": {"endpoint_url": self.endpoint, "region": "eu-west-1"},
                    "validation": {"interval": "0s"},  # what is measured beside the load is started here
                }
            )
        )

    @property
    def endpoint(self) -> str:
        assert self.table is not None
        return f"http://127.0.0.1:{self.table.announced['port']}"

    def stats(self) -> Any:
        """The far side's counts."""
        assert self.table is not None
        with urllib.request.urlopen(f"http://127.0.0.1:{self.table.announced['control']}/stats") as answer:
            return json.loads(answer.read())

    def stop(self) -> None:
        if self.table is not None:
            self.table.stop()
        self.database.stop()

    def postgres(self) -> PostgresStore:
        where = settings.Postgres(host="127.0.0.1", port=self.database.port, user="postgres")
        return PostgresStore(where, clock=SystemClock())

    async def create(self) -> None:
        sql = self.postgres()
        dynamo = DynamoDBStore(settings.DynamoDB(endpoint_url=self.endpoint, region="eu-west-1"), clock=SystemClock())
        try:
            await sql.create()
            await dynamo.create()
        finally:
            await sql.close()
            await dynamo.close()

    async def fill(self, start: int, number: int, total: int) -> None:
        sql = self.postgres()
        try:
            for at in range(start, start + number, 1000):
                await sql.write(history(at, min(1000, start + number - at), total))
        finally:
            await sql.close()

    def backfill(self, *arguments: str) -> dict[str, Any]:
        """Run one to its end."""
        told, figures = self.command("looked_at", "backfill", *arguments, "--json")
        return {"copied": told.get("copied"), **figures}

    def validate(self, *arguments: str) -> dict[str, Any]:
        """Compare everything, as fast as it goes."""
        told, figures = self.command("sql_record_count", "validate", "--all", "--rate", "0", *arguments)
        return {"outcome": told.get("outcome"), **figures}

    def command(self, counted: str, *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run one process to its end; what it told, how long it took, its memory, and the units it cost.

        ``counted`` is the member of its answer that says how many records it was about.
        """
        before = self.stats()
        out = self.directory / "told.json"
        begun = time.monotonic()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        with out.open("wb") as sink, (self.directory / "backfill.log").open("ab") as log:
            argv = python("-m", "sidecar", *arguments, "--config", str(self.config))
            process = subprocess.Popen(
                ["taskset", "-c", ",".join(map(str, sorted(self.cores.under_test))), *argv],
                stdout=sink,
                stderr=log,
                env={**os.environ, **CREDENTIALS},
            )
            peak = 0.0
            while process.poll() is None:
                peak = max(peak, _peak(process.pid))
                time.sleep(0.05)
        seconds = time.monotonic() - begun
        cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_seconds = cpu.ru_utime + cpu.ru_stime - used.ru_utime - used.ru_stime
        after = self.stats()
        told = json.loads(out.read_text() or "{}")
        rows = max(1, told.get(counted, 0))
        return told, {
            "exit": process.returncode,
            "records": told.get(counted),
            "seconds": round(seconds, 2),
            "records_per_second": round(rows / seconds),
            "cpu_seconds_per_million": round(cpu_seconds * 1e6 / rows, 1),
            "peak_mib": round(peak, 1),
            "write_units_per_million": round((after["write_units"] - before["write_units"]) * 1e6 / rows),
            "read_units_per_million": round((after["read_units"] - before["read_units"]) * 1e6 / rows),
        }

    def live(self, seconds: float) -> dict[str, float]:
        """An open load: the percentiles of its answers, and how late the generator was, milliseconds."""
        load = python("-m", "benchmarks.load", "--realtime", "--port", str(self.ports[0]))
        load += ["--rate", str(LIVE_RATE), "--seconds", str(seconds), "--connections", "32"]
        done = subprocess.run(
            ["taskset", "-c", ",".join(map(str, sorted(self.cores.others))), *load],
            stdout=subprocess.PIPE,
            check=True,
        )
        told = json.loads(done.stdout)
        refused = {status: n for status, n in told["statuses"].items() if not status.startswith("2")}
        assert told["complete"], "not every request was answered"
        assert not refused, refused
        return {**told["latency_ms"], "generator_lag_p99": told["lag_ms"]["p99"]}


def _peak(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


COMMANDS = {
    "backfill": (b": copy\n", ["backfill", "--from", "postgres", "--to", "dynamodb", "--restart"]),
    "validation": (b"compared", ["validate", "--all"]),
}
"""Name -> what its log says once it is at work, and what stands after ``sidecar``."""


def beside(bench: Bench, seconds: float, rounds: int) -> dict[str, Any]:
    """The p99 of live answers alone and beside each of what the module names, in turns; the median of each."""
    serve = python("-m", "sidecar", "serve", "--config", str(bench.config))
    child = Child("sidecar", serve, bench.cores.under_test, bench.directory / "sidecar.log", env=CREDENTIALS)
    figures: dict[str, list[dict[str, float]]] = {}
    try:
        ready = f"http://127.0.0.1:{bench.ports[1]}/readyz"
        wait_until("ready", lambda: _answers(ready), 60, child, step=0.1)
        bench.live(2.0)
        for _ in range(rounds):
            figures.setdefault("alone", []).append(bench.live(seconds))
            for where, cores in (("", bench.cores.others), (" in the pod", bench.cores.under_test)):
                for name in COMMANDS:
                    say(f"beside: {name}{where}")
                    found = _beside_command(bench, name, cores, seconds)
                    figures.setdefault(f"{name}{where}", []).append(found)
            say("beside: own validation")
            for name, found in _beside_own(bench, seconds).items():
                figures.setdefault(f"own validation, {name}", []).append(found)
    finally:
        child.stop()
    p99, lag = (
        {name: statistics.median(each[key] for each in found) for name, found in figures.items()}
        for key in ("p99", "generator_lag_p99")
    )
    ratios = {name: round(p99[name] / p99["alone"], 2) for name in p99 if name != "alone"}
    return {
        "live_rate": LIVE_RATE,
        "backfill_rate": DEFAULT_RATE,
        "validation_rate": settings.Validation().rate,
        "p99_ms": p99,
        "generator_lag_p99_ms": lag,
        "rounds": figures,
        "ratios": ratios,
        "bar": RATIO,
        "reached": max(ratios.values()) <= RATIO,
    }


def _beside_command(bench: Bench, name: str, cores: frozenset[int], seconds: float) -> dict[str, float]:
    """The load while a command is at work on these cores, to its end."""
    begun, argv = COMMANDS[name]
    log = bench.directory / "beside.log"
    log.write_bytes(b"")
    job = Child(name, python("-m", "sidecar", *argv, "--config", str(bench.config)), cores, log, env=CREDENTIALS)
    try:
        wait_until(f"{name} is at work", lambda: begun in log.read_bytes(), 600, job)
        found = bench.live(seconds)
        if not job.alive():
            say(f"{name} ended before the load did: more rows are needed")
        return found
    finally:
        job.stop()


def _beside_own(bench: Bench, seconds: float) -> dict[str, dict[str, float]]:
    """The load while the sidecar itself compares everything, at the rate that it always has, in its two stages."""
    asked = f"http://127.0.0.1:{bench.ports[0]}/api/migration/validate-consistency?startDate=2000-01-01"
    told: list[Any] = []

    def ask() -> None:
        with urllib.request.urlopen(asked, timeout=600) as answer:
            told.append(json.loads(answer.read()))

    asking = threading.Thread(target=ask)
    before = bench.stats()["read_units"]
    asking.start()
    wait_until("it reads", lambda: bench.stats()["read_units"] > before, 60)
    found = {"reading": bench.live(seconds)}
    seen = [-1.0]

    def rests() -> bool:
        """Whether nothing was read of DynamoDB between two looks: the index has been read."""
        seen.append(bench.stats()["read_units"])
        return seen[-1] == seen[-2]

    wait_until("the index is read", rests, 600, step=1.0)
    if not asking.is_alive():
        say("the sidecar's own validation ended before the second load: more rows are needed")
    found["comparing"] = bench.live(seconds)
    asking.join()
    assert told, "the sidecar's own validation failed"
    return found


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load, beside something and alone")
    parser.add_argument("--rounds", type=int, default=3, help="of all of them, in turns")
    parser.add_argument("--skip", action="append", default=[], choices=("again", "back", "validate", "beside"))
    arguments = parser.parse_args()
    rows = arguments.rows
    result: dict[str, Any] = {"rows": rows}
    os.environ.update(CREDENTIALS)
    with tempfile.TemporaryDirectory(prefix="bench-backfill-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        bench = Bench(directory, Cores.of_this_machine())
        try:
            bench.start()
            asyncio.run(bench.create())
            there = ("--from", "postgres", "--to", "dynamodb", "--rate", "none")
            asyncio.run(bench.fill(0, rows // 10, rows))
            say("a tenth of the rows")
            result["a tenth"] = bench.backfill(*there)
            asyncio.run(bench.fill(rows // 10, rows - rows // 10, rows))
            say("there")
            result["there"] = bench.backfill(*there)
            assert bench.stats()["distinct"] == rows, "not every row is in DynamoDB"
            if "again" not in arguments.skip:
                say("again")
                result["again"] = bench.backfill(*there)
            if "validate" not in arguments.skip:
                say("validate")
                result["validate"] = bench.validate()
                result["validate deep"] = bench.validate("--deep")
            if "back" not in arguments.skip:
                say("back")
                asyncio.run(bench.database.execute("postgres", "TRUNCATE integration_logs"))
                result["back"] = bench.backfill(
                    "--from", "dynamodb", "--to", "postgres", "--hours", "all", "--rate", "none"
                )
                number = asyncio.run(bench.database.execute("postgres", "SELECT count(*) FROM integration_logs"))
                assert number == rows, f"{number} rows came back"
            if "beside" not in arguments.skip:
                say("beside live traffic")
                # History that DynamoDB lacks again, enough for every round at the default rate.
                needed = int(DEFAULT_RATE * (arguments.seconds + 10) * arguments.rounds * 2)
                asyncio.run(bench.fill(rows, needed, rows))
                result["beside"] = beside(bench, arguments.seconds, arguments.rounds)
        finally:
            bench.stop()
    json.dump(result, sys.stdout, indent=1)
    print()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

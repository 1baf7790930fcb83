"""The bench itself: both stores, the system under test on its core, and the counts that everything must agree with."""

import asyncio
import http.client
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import yaml

from benchmarks import peer
from benchmarks.database import Database
from benchmarks.processes import REPOSITORY, Child, Cores, free_port, pinned, python, reachable, wait_until

AWS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark", "AWS_REGION": "us-east-1"}
TABLE = "integration_logs"
DATABASES = {"sidecar": "sidecar", "baseline": "baseline", "peer": peer.DATABASE}
Json = dict[str, Any]


def ask(port: int, method: str, path: str, body: Any = None, timeout: float = 10.0) -> tuple[int, bytes]:
    """One HTTP exchange on loopback."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


class Canned:
    """The canned DynamoDB in its own process."""

    def __init__(self, cores: frozenset[int], scratch: Path) -> None:
        argv = python("-m", "benchmarks.canned_dynamodb")
        self.child = Child("canned_dynamodb", argv, cores, scratch / "canned_dynamodb.log", first_line=True)
        self.url = f"http://127.0.0.1:{self.child.announced['port']}"
        self.control_port: int = self.child.announced["control_port"]

    def behave(self, **wanted: Any) -> None:
        """See ``canned_dynamodb.Behaviour``; raises RuntimeError where it does not know a key."""
        status, text = ask(self.control_port, "POST", "/control", wanted)
        if status != 200:
            raise RuntimeError(f"canned DynamoDB: {text!r}")

    def reset(self) -> None:
        self.behave(mode="normal", latency=0.0, unprocessed=0.0, items_per_second=0.0)
        ask(self.control_port, "POST", "/reset")

    def stats(self) -> Json:
        stats: Json = json.loads(ask(self.control_port, "GET", "/stats")[1])
        return stats


class System:
    """What is measured: a process with a POST endpoint."""

    path = "/logs"
    database = ""
    writes: frozenset[str] = frozenset({"postgres", "dynamodb"})

    def __init__(self, name: str, child: Child, port: int) -> None:
        self.name = name
        self.child = child
        self.port = port
        self.ready_seconds = 0.0


class Sidecar(System):
    """The product, started as in production: ``python -m sidecar serve --config FILE``."""

    database = DATABASES["sidecar"]

    def __init__(self, child: Child, port: int, *, ops_port: int, config: Path, spool: Path, phase: str) -> None:
        super().__init__("sidecar", child, port)
        self.ops_port = ops_port
        self.config = config
        self.spool = spool
        writes = {"sql_only": {"postgres"}, "dynamo_only": {"dynamodb"}}
        self.writes = frozenset(writes.get(phase, {"postgres", "dynamodb"}))

    def pending(self) -> dict[str, int]:
        """``sidecar_store_pending_records`` by store."""
        lines = ask(self.ops_port, "GET", "/metrics")[1].decode().splitlines()
        prefix = 'sidecar_store_pending_records{store="'
        return {
            line[len(prefix) : line.index('"', len(prefix))]: int(float(line.rsplit(" ", 1)[1]))
            for line in lines
            if line.startswith(prefix)
        }


class Baseline(System):
    """One of the naive servers; both live in one process, the path chooses."""

    database = DATABASES["baseline"]

    def __init__(self, name: str, child: Child, port: int) -> None:
        super().__init__(name, child, port)
        self.path = f"/{name}"


class Peer(System):
    """Fluent Bit (``peer``): PostgreSQL alone."""

    database = peer.DATABASE
    writes = frozenset({"postgres"})


class Rig:
    """Starts and ends everything; a context manager. ``peer`` is Fluent Bit's program, where there is one."""

    def __init__(self, scratch: Path, peer: str | None = None) -> None:
        self.scratch = scratch
        self.peer_program = peer
        self.cores = Cores.of_this_machine()
        self.systems: list[System] = []
        self._prepared: set[str] = set()

    def __enter__(self) -> Self:
        self.scratch.mkdir(parents=True, exist_ok=True)
        for log in self.scratch.glob("*.log"):
            log.unlink()
        os.sched_setaffinity(0, self.cores.others)
        self.postgres = Database(self.scratch / "postgres", self.cores.others, self.scratch / "postgres.log")
        self.postgres.create()
        self.postgres.start()
        self.dynamodb = Canned(self.cores.others, self.scratch)
        for name in DATABASES.values():
            asyncio.run(self.postgres.execute("postgres", f"CREATE DATABASE {name}"))
        return self

    def __exit__(self, *_: object) -> None:
        for system in list(self.systems):
            self.end(system, signal.SIGKILL)
        self.dynamodb.child.stop()
        self.postgres.stop()

    # -- systems

    def configuration(self, phase: str, port: int, ops_port: int, spool: Path, cap: int) -> Json:
        """Defaults, but for addresses, the phase, the cap where a case needs a large backlog, and a shorter cap of
        the back-off, so that a drain is timed and not the wait before it."""
        return {
            "phase": phase,
            "listen": {"app": f"127.0.0.1:{port}", "ops": f"127.0.0.1:{ops_port}"},
            "spool": {"directory": str(spool), "cap_bytes": cap},
            "postgres": {"port": self.postgres.port, "database": DATABASES["sidecar"], "user": "postgres"},
            "dynamodb": {"endpoint_url": self.dynamodb.url, "region": "us-east-1", "table": TABLE},
            "retry": {"max_delay": 2},
            "logging": {"level": "warning"},
        }

    def sidecar(self, phase: str = "dual_write", cap: int = 2**30, changes: Json | None = None) -> Sidecar:
        """A fresh sidecar on a fresh spool, ready."""
        port = ops_port = free_port()
        while ops_port == port:  # the kernel may give the same one twice
            ops_port = free_port()
        spool = self.scratch / "spool"
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir(mode=0o700)
        document = self.configuration(phase, port, ops_port, spool, cap)
        for section, values in (changes or {}).items():
            document[section] = document.get(section, {}) | values if isinstance(values, dict) else values
        config = self.scratch / "config.yaml"
        config.write_text(yaml.safe_dump(document))
        if "sidecar" not in self._prepared:
            self._init_stores(document)
            self._prepared.add("sidecar")
        self.reset(DATABASES["sidecar"])
        child = self._serve(config)
        system = Sidecar(child, port, ops_port=ops_port, config=config, spool=spool, phase=phase)
        self.systems.append(system)
        system.ready_seconds = self.until_ready(system)
        return system

    def restart(self, system: Sidecar, how: signal.Signals) -> float:
        """End it, start it again on the same spool; seconds until it is ready."""
        system.child.stop(how)
        system.child = self._serve(system.config)
        return self.until_ready(system)

    def _serve(self, config: Path) -> Child:
        argv = python("-m", "sidecar", "serve", "--config", str(config))
        return Child("sidecar", argv, self.cores.under_test, self.scratch / "sidecar.log", env=AWS)

    def _init_stores(self, document: Json) -> None:
        config = self.scratch / "init.yaml"
        config.write_text(yaml.safe_dump(document | {"phase": "dual_write"}))
        argv = python("-m", "sidecar", "init-stores", "--config", str(config))
        done = subprocess.run(argv, cwd=REPOSITORY, env=os.environ | AWS, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"init-stores: {done.returncode}\n{done.stdout}{done.stderr}")

    def until_ready(self, system: Sidecar, seconds: float = 60.0) -> float:
        def ready() -> bool:
            try:
                return ask(system.ops_port, "GET", "/readyz", timeout=1)[0] == 200
            except OSError:
                return False

        return wait_until("readyz", ready, seconds, system.child)

    def baseline(self, name: str) -> Baseline:
        port = free_port()
        argv = python("-m", "benchmarks.baselines", "--port", str(port))
        argv += ["--dsn", self.postgres.dsn(DATABASES["baseline"]), "--dynamodb", self.dynamodb.url]
        child = Child(name, argv, self.cores.under_test, self.scratch / f"{name}.log", env=AWS)
        system = Baseline(name, child, port)
        self.systems.append(system)
        wait_until(name, lambda: reachable(port), 30, child)
        self.reset(DATABASES["baseline"])
        return system

    def peer(self) -> Peer:
        """Fluent Bit on an empty buffer. Raises RuntimeError where its program cannot be had."""
        if self.peer_program is None:
            raise RuntimeError("the peer's program is missing")
        port = free_port()
        asyncio.run(self.postgres.execute(peer.DATABASE, peer.table(TABLE)))
        file = peer.configuration(self.scratch, port=port, postgres=self.postgres.port, table=TABLE)
        argv = [self.peer_program, "-c", str(file)]
        child = Child(peer.NAME, argv, self.cores.under_test, self.scratch / "peer.log")
        system = Peer(peer.NAME, child, port)
        self.systems.append(system)
        wait_until(peer.NAME, lambda: reachable(port), 30, child)
        self.reset(peer.DATABASE)
        return system

    def start(self, name: str, phase: str) -> System:
        """``sidecar``, ``sidecar in PHASE``, ``fluent-bit``, or a baseline."""
        kind, _, other = name.partition(" in ")
        if kind == "sidecar":
            return self.sidecar(other or phase)
        return self.peer() if name == peer.NAME else self.baseline(name)

    def end(self, system: System, how: signal.Signals = signal.SIGTERM) -> int:
        self.systems.remove(system)
        return system.child.stop(how)

    # -- stores

    def restore(self) -> None:
        """Both stores up again, whatever a broken-off case left behind."""
        self.postgres.resume()
        if self.postgres.child is None or not self.postgres.child.alive():
            self.postgres.start()
        self.dynamodb.reset()

    def reset(self, database: str) -> None:
        """Both stores empty, PostgreSQL's dirty pages written, so that every run starts alike."""
        self.dynamodb.reset()
        asyncio.run(self.postgres.execute(database, f"TRUNCATE {TABLE}", "CHECKPOINT"))

    def rows(self, database: str) -> int:
        return int(asyncio.run(self.postgres.execute(database, f"SELECT count(*) FROM {TABLE}")))

    def landed(self, system: System) -> dict[str, int]:
        """Distinct records in each store that the phase writes, counted in the stores themselves."""
        counts = {}
        if "dynamodb" in system.writes:
            counts["dynamodb"] = int(self.dynamodb.stats()["distinct"])
        if "postgres" in system.writes:
            counts["postgres"] = self.rows(system.database)
        return counts

    def until_landed(self, system: System, expected: int, seconds: float) -> float:
        """Wait until every store holds exactly ``expected``; returns the wall-clock time at which it was seen.

        Raises AssertionError where a store holds more, or too few when the time is up: then the run is void.
        """
        limit = time.monotonic() + seconds
        while "dynamodb" in system.writes and int(self.dynamodb.stats()["distinct"]) < expected:
            if time.monotonic() > limit:
                break
            time.sleep(0.02)
        while True:
            begun = time.monotonic()
            counts = self.landed(system)
            seen = time.time()
            if all(count == expected for count in counts.values()):
                return seen
            late = time.monotonic() > limit
            if late or any(count > expected for count in counts.values()):
                raise AssertionError(f"{system.name}: acknowledged {expected}, stored {counts}\n{system.child.tail()}")
            time.sleep(max(0.02, 3 * (time.monotonic() - begun)))  # counting must not become the load

    # -- load

    def load(self, system: System, *, realtime: bool = False, **options: Any) -> Json:
        """Run the load generator; ``options`` are its arguments with underscores. Raises where it did not complete."""
        argv = python("-m", "benchmarks.load", "--port", str(system.port), "--path", system.path)
        for key, value in options.items():
            argv += [f"--{key.replace('_', '-')}", str(value)]
        if realtime:
            argv.append("--realtime")
        with pinned(self.cores.others):
            done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"load generator:\n{done.stderr}\n{system.child.tail()}")
        result: Json = json.loads(done.stdout)
        if not result["complete"]:
            raise RuntimeError(f"{system.name}: answers outstanding after the load: {result['statuses']}")
        return result

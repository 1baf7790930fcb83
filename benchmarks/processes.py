"""Child processes: started on chosen cores, measured from /proc, ended without a rest."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TICK = os.sysconf("SC_CLK_TCK")
REPOSITORY = Path(__file__).resolve().parent.parent
STOP_SECONDS = 40.0


@dataclass(frozen=True)
class Cores:
    """Who runs where: the system under test alone on one core, all that drives or receives on the others."""

    under_test: frozenset[int]
    others: frozenset[int]

    @classmethod
    def of_this_machine(cls) -> "Cores":
        """The last core for the system under test (interrupts prefer the first). Raises SystemExit on one core."""
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            raise SystemExit("the benchmark needs two cores: one for the sidecar, one for everything else")
        return cls(frozenset(cores[-1:]), frozenset(cores[:-1]))


@contextlib.contextmanager
def pinned(cores: frozenset[int]) -> Iterator[None]:
    """Children started inside inherit these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Child:
    """One process under our hand."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        cores: frozenset[int],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        first_line: bool = False,
    ) -> None:
        self.name = name
        self.log = log
        with pinned(cores), log.open("ab") as sink:
            self.popen = subprocess.Popen(
                argv,
                cwd=REPOSITORY if user is None else "/",
                env=os.environ | dict(env or {}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if first_line else sink,
                stderr=sink,
                user=user,
                group=None,
                start_new_session=True,
            )
        self.announced: dict[str, Any] = {}
        if first_line:
            assert self.popen.stdout is not None
            self.announced = json.loads(self.popen.stdout.readline() or b"{}")

    @property
    def pid(self) -> int:
        return self.popen.pid

    def alive(self) -> bool:
        return self.popen.poll() is None

    def cpu_seconds(self) -> float:
        """User and system time of all its threads, living and ended, in seconds (granularity 10 ms)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def memory(self) -> dict[str, float]:
        """Resident MiB now and at its highest."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        values = dict(line.split(":", 1) for line in status.splitlines())
        return {
            "rss_mib": int(values["VmRSS"].split()[0]) / 1024,
            "peak_mib": int(values["VmHWM"].split()[0]) / 1024,
            "anonymous_mib": int(values["RssAnon"].split()[0]) / 1024,
        }

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it; SIGKILL after ``STOP_SECONDS``. Returns the exit code."""
        if self.alive():
            self.popen.send_signal(how)
            try:
                self.popen.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()
        if self.popen.stdout is not None:
            self.popen.stdout.close()
        return self.popen.returncode

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def wait_until(what: str, check: Any, seconds: float, child: Child | None = None, step: float = 0.01) -> float:
    """Poll ``check`` until it is true; returns the seconds that it took. Raises TimeoutError, with the child's log."""
    begun = time.monotonic()
    while not check():
        if child is not None and not child.alive():
            raise RuntimeError(f"{child.name} ended with {child.popen.returncode}:\n{child.tail()}")
        if time.monotonic() - begun > seconds:
            raise TimeoutError(f"{what}: not within {seconds} s" + (f"\n{child.tail()}" if child else ""))
        time.sleep(step)
    return time.monotonic() - begun


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``, from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended while we looked
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def reachable(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0

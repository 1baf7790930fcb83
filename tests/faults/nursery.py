"""Sidecars without the second that their imports take: a process that has them forks one whenever it is asked.

What is forked is a process of its own, with its own configuration, environment, log and exit code; it has only not read
its modules from the disk again. Rounds of a row that kills and starts cost a third. What has to be another program's
child (strace, prlimit, faketime) is started in the usual way.

The nursery is asked in JSON, one line a question: ``launch`` gives a process id, ``poll`` an exit code or null.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.parts.sidecar import ROOT

MODULE: Final = "tests.faults.nursery"


class Born:
    """A forked process, used as a ``subprocess.Popen`` is."""

    def __init__(self, nursery: "Nursery", pid: int) -> None:
        self._nursery = nursery
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code (minus the signal's number), None while it runs."""
        if self.returncode is None:
            self.returncode = self._nursery.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"{MODULE} {self.pid}", timeout or 0)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended: its process id is its own until its end was asked for."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Nursery:
    """The process that forks, started at the first question."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def launch(self, words: Sequence[str], environ: Mapping[str, str], log: Path) -> Born:
        """Run ``python -m`` these words (a module of ``MODULES`` first), its output appended to a file."""
        return Born(self, self.ask(launch=list(words), environ=dict(environ), log=str(log)))

    def ask(self, **question: Any) -> Any:
        """One question and its answer."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End it; those that it forked live on."""
        if self._process is not None:
            with self._process:  # closes its input, and waits
                self._process = None


def _children() -> Iterator[dict[str, Any]]:
    """Answer questions; in each child that is forked, give what it is to run, and end."""
    for line in sys.stdin:
        question = json.loads(line)
        if "launch" in question:
            pid = os.fork()
            if pid == 0:
                yield question
                return
            answer: int | None = pid
        else:
            ended, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        print(json.dumps(answer), flush=True)


def _become(question: Mapping[str, Any]) -> int:
    """In the child: be what ``python -m`` makes of the words."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(question["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(log)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (the old one has read ahead)
    os.environ.clear()
    os.environ.update(question["environ"])
    module, *sys.argv = question["launch"]
    sys.argv.insert(0, module)
    signal.set_wakeup_fd(-1)
    from sidecar.__main__ import main as plain
    from tests.faults.sabotaged import main as sabotaged

    return sabotaged() if module == "tests.faults.sabotaged" else plain()


def main() -> int:
    """Import, then answer until the input ends."""
    for name in ("sidecar.app.serve", "sidecar.app.observe", "tests.faults.sabotaged"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    with contextlib.suppress(KeyboardInterrupt):
        for question in _children():
            return _become(question)
    return 0


if __name__ == "__main__":
    sys.exit(main())

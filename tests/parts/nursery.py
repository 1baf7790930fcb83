"""Sidecars without the second that their imports take: a process that has them forks one whenever it is asked.

What is forked is a process of its own, with its own configuration, environment, output and exit code; it has only not
read its modules from the disk again. Tests that kill and start cost a third, and a command costs what it does. What has
to be another program's child (strace, prlimit, faketime), or is about the start itself, is started in the usual way.

The nursery is asked in JSON, one line a question: ``launch`` gives a process id, ``poll`` an exit code or null. Its
children live on when it ends, as those of the test that asked would.
"""

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
MODULE: Final = "tests.parts.nursery"
IMPORTED: Final = (
    "sidecar.__main__",
    "sidecar.app.serve",
    "sidecar.app.observe",
    "sidecar.operator.adopt",
    "sidecar.operator.backfill",
    "sidecar.operator.clear",
    "sidecar.operator.commands",
    "sidecar.operator.drain",
    "sidecar.operator.fleet",
    "sidecar.operator.phase",
    "sidecar.operator.validate",
    "sidecar.operator.wait",
)
"""What its children have already: all that ``serve`` and the commands import when they run."""


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
    """The process that forks, started at the first question; may be asked by several threads."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._one_at_a_time = threading.Lock()

    def launch(self, words: Sequence[str], environ: Mapping[str, str], log: Path, errors: Path | None = None) -> Born:
        """Run ``python -m`` these words, its output appended to ``log``, stderr to ``errors`` where that is given."""
        question = {"launch": list(words), "environ": dict(environ), "out": str(log), "err": str(errors or log)}
        return Born(self, self.ask(**question))

    def run(
        self, words: Sequence[str], environ: Mapping[str, str], *, seconds: float = 60.0
    ) -> "subprocess.CompletedProcess[str]":
        """The same to its end, as ``subprocess.run`` with its output captured; one that does not end is killed.

        Raises subprocess.TimeoutExpired.
        """
        with tempfile.TemporaryDirectory() as directory:
            out, err = Path(directory, "out"), Path(directory, "err")
            process = self.launch(words, environ, out, err)
            try:
                code = process.wait(seconds)
            except BaseException:
                process.send_signal(signal.SIGKILL)
                process.wait(10)
                raise
            return subprocess.CompletedProcess(list(words), code, out.read_text(), err.read_text())

    def ask(self, **question: Any) -> Any:
        """One question and its answer."""
        with self._one_at_a_time:
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


NURSERY: Final = Nursery()
"""That of this process; ``tests/conftest.py`` closes it."""


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
    out, err = (os.open(question[name], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644) for name in ("out", "err"))
    for source, target in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
        os.close(source)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (the old one has read ahead)
    os.environ.clear()
    os.environ.update(question["environ"])
    name, *sys.argv = question["launch"]
    sys.argv.insert(0, name)
    signal.set_wakeup_fd(-1)
    found = importlib.util.find_spec(name)
    assert found is not None
    package = found.submodule_search_locations is not None
    code: int = importlib.import_module(f"{name}.__main__" if package else name).main()
    return code


def main() -> int:
    """Import, then answer until the input ends."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    with contextlib.suppress(KeyboardInterrupt):
        for question in _children():
            return _become(question)
    return 0


if __name__ == "__main__":
    sys.exit(main())

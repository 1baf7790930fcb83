"""A private PostgreSQL as a child process, for ``sidecar dev`` and the tests; never in the production image.

Layout below ``data_dir``::

    pgdata/      the cluster; kept over restarts. Made as pgdata.new and renamed, so half an initdb is never used
    programs/    a copy of the wheel's programs, only where ``nobody`` cannot read them in place
    password     the superuser's password, mode 0600, made once at random
    server.log   the server's own log

Invariants:

* No shell, and no wait without a deadline.
* The server dies with us, however we die: a launcher between us and it asks the kernel for SIGINT (PostgreSQL's fast
  shutdown) at the death of its parent. The request is made *after* the switch of user, because the kernel drops it at
  every change of credentials, and the parent is compared afterwards, in case it died in between. The kernel means the
  *thread* that started the child, so ``start`` starts it in the event loop's own thread. A preexec_fn would do, but is
  unsafe beside other threads. Where there is no such call (macOS) an orphan is found by the next start, which says so.
* fsync is on unless ``options`` say otherwise.

Failure at each stage: no programs or an unreachable directory -> ConfigError; initdb or the server gives up ->
EmbeddedError with the last lines of its log; shared memory or the port still held after a kill -9 -> tried again.
"""

import asyncio
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from sidecar.embedded import postgres_programs as programs_of
from sidecar.errors import ConfigError, SidecarError
from sidecar.settings import Postgres, Secret

HOST: Final = "127.0.0.1"
USER: Final = "postgres"
_POLL: Final = 0.01  # seconds between two looks
_INITDB_SECONDS: Final = 60.0
_STOP_STEPS: Final = ((signal.SIGINT, 15.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0))  # fast, immediate, kill
_LOG_TAIL: Final = 2_000  # characters
_READY_LINE: Final = 7  # of postmaster.pid, counted from 0
_PASSING: Final = ("shared memory", "in use", "lock file", "starting up")  # what a kill -9 leaves for some seconds
_LAUNCH: Final = """
import ctypes, os, signal, sys
parent, uid, gid, program, *arguments = sys.argv[1:]
if uid:
    os.setgroups([])
    os.setgid(int(gid))
    os.setuid(int(uid))
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGINT), 0, 0, 0)
    if os.getppid() != int(parent):
        sys.exit("the parent is gone")
os.umask(0o077)
os.execv(program, [program, *arguments])
"""


class EmbeddedError(SidecarError):
    """The embedded server could not be made or started; the text carries the end of its log."""


class EmbeddedPostgres:
    """The life of one server process. Not bound to an event loop: each call may come from another one.

    Args:
        data_dir: kept over restarts; made where missing. As root every directory above must be open to ``nobody``.
        port: TCP port on 127.0.0.1; 0 takes a free one at the first start and keeps it.
        options: server settings passed as ``-c name=value``, for example ``{"max_connections": "30"}``.
        start_timeout: seconds until ``start`` gives up.
    """

    def __init__(
        self,
        data_dir: Path,
        port: int = 0,
        *,
        options: Mapping[str, str] | None = None,
        start_timeout: float = 30.0,
    ) -> None:
        self._directory = data_dir.resolve()  # the server starts in it, so a relative path would lead elsewhere
        self._port = port
        self._options = dict(options or {})
        self._start_timeout = start_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._account = programs_of.account()

    @property
    def port(self) -> int:
        """The port in use; 0 before the first start where none was given."""
        return self._port

    @property
    def pid(self) -> int | None:
        """Process id of the running server, else None."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def directory(self) -> Path:
        """Where everything of this server lies."""
        return self._directory

    @property
    def log_path(self) -> Path:
        """The server's own log."""
        return self._directory / "server.log"

    @property
    def _cluster(self) -> Path:
        return self._directory / "pgdata"

    def settings(self, database: str = "postgres") -> Postgres:
        """How the store reaches this server, as its superuser."""
        password = Secret((self._directory / "password").read_text().strip())
        return Postgres(host=HOST, port=self._port, database=database, user=USER, password=password)

    async def start(self) -> None:
        """Make the cluster where missing, start the server, return when it takes connections; idempotent.

        Raises:
            ConfigError: no programs, or a data directory that ``nobody`` cannot reach.
            EmbeddedError: initdb or the server gave up, or took longer than ``start_timeout``.
        """
        if self.pid is not None:
            return
        deadline = time.monotonic() + self._start_timeout
        programs = self._prepare()
        await self._initdb(programs)
        said = ""
        while True:
            if self._port == 0:
                self._port = _free_port()
            mark = self.log_path.stat().st_size if self.log_path.exists() else 0
            self._spawn(programs)
            try:
                ready = await self._ready(deadline)
            except BaseException:  # cancelled while waiting: nobody else would end the child
                self._reap(signal.SIGQUIT)
                raise
            if ready:
                return
            said = self._log_since(mark) or said
            if time.monotonic() > deadline or not any(word in said for word in _PASSING):
                raise EmbeddedError(f"PostgreSQL did not start: {said or 'it said nothing'}")
            await asyncio.sleep(0.2)

    async def stop(self) -> None:
        """Fast shutdown (SIGINT), then immediate, then SIGKILL; the data stays. Idempotent, at most 25 s."""
        process = self._process
        if process is None:
            return
        for number, seconds in _STOP_STEPS:
            if process.poll() is not None:
                break
            process.send_signal(number)
            await _exited(process, seconds)
        self._process = None

    def kill(self) -> None:
        """End the server as kill -9 does, a crash to its clients; ``start`` brings it back."""
        self._reap(signal.SIGKILL)

    def _reap(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(number)
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=5)

    def _prepare(self) -> programs_of.Programs:
        self._directory.mkdir(parents=True, exist_ok=True)
        who = self._account
        if who is not None:
            if not programs_of.reachable_directory(self._directory / "pgdata", who):
                raise ConfigError(
                    "data_dir",
                    seen=str(self._directory),
                    allowed="a directory below ones that everybody may enter: as root the server runs as nobody",
                    hint="choose another place, or run as an ordinary user",
                )
            os.chown(self._directory, who.uid, who.gid)
        password = self._directory / "password"
        if not password.exists():
            descriptor = os.open(password, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_urlsafe(24))
            self._give(password)
        return programs_of.readable_for(programs_of.find(os.environ), who, self._directory / "programs")

    def _give(self, path: Path) -> None:
        if self._account is not None:
            os.chown(path, self._account.uid, self._account.gid)

    async def _initdb(self, programs: programs_of.Programs) -> None:
        if self._cluster.exists():
            return
        new = self._directory / "pgdata.new"
        shutil.rmtree(new, ignore_errors=True)
        process = self._launch(
            programs.path("initdb"),
            (
                *("--pgdata", str(new), "--username", USER, "--locale=C", "--encoding=UTF8"),
                *("--auth=scram-sha-256", "--pwfile", str(self._directory / "password")),
                "--no-instructions",
                *(("--no-sync",) if self._options.get("fsync") == "off" else ()),
            ),
        )
        try:
            done = await _exited(process, _INITDB_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(timeout=5)
        if not done or process.returncode != 0:
            raise EmbeddedError(f"initdb failed: {self._log_since(0)}")
        new.rename(self._cluster)

    def _spawn(self, programs: programs_of.Programs) -> None:
        (self._cluster / "postmaster.opts").unlink(missing_ok=True)
        options = {
            "listen_addresses": HOST,
            "unix_socket_directories": "",  # TCP alone: a socket's path may be too long
            "timezone": "UTC",
            "log_timezone": "UTC",
            **self._options,
        }
        settings = [text for name, value in options.items() for text in ("-c", f"{name}={value}")]
        self._process = self._launch(
            programs.path("postgres"), ("-D", str(self._cluster), "-p", str(self._port), *settings)
        )

    def _launch(self, program: Path, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
        who = self._account
        ids = ("", "") if who is None else (str(who.uid), str(who.gid))
        with self.log_path.open("ab") as log:
            return subprocess.Popen(  # noqa: S603  (a program that we looked up, no shell, our own arguments)
                [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *ids, str(program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                env={"LC_ALL": "C", "TZ": "UTC", "PATH": os.defpath},
                start_new_session=True,  # Ctrl-C is for us: we stop the server when nobody needs it any more
            )

    async def _ready(self, deadline: float) -> bool:
        """True once the server takes connections, False where it gave up; at the deadline it is ended."""
        process = self._process
        assert process is not None  # noqa: S101  (_spawn ran)
        while process.poll() is None:
            if time.monotonic() > deadline:
                self._reap(signal.SIGQUIT)
                return False
            if self._says_ready(process.pid):
                return True
            await asyncio.sleep(_POLL)
        self._process = None
        return False

    def _says_ready(self, pid: int) -> bool:
        try:
            lines = (self._cluster / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > _READY_LINE and lines[0] == str(pid) and lines[_READY_LINE].strip() == "ready"

    def _log_since(self, mark: int) -> str:
        with self.log_path.open("rb") as log:
            log.seek(mark)
            return log.read().decode(errors="replace")[-_LOG_TAIL:].strip()


async def _exited(process: subprocess.Popen[bytes], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL)
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port

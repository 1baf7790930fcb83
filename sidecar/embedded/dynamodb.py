"""A local DynamoDB as a child process, for ``sidecar dev`` and the tests; never in the production image.

It is moto's server: everything in memory, gone when it ends. It knows no throttling, and neither the 25 items of a
batch nor the exact size of an item: the store checks those itself.

Invariants:

* It listens on 127.0.0.1 alone, and needs no network, no root and no directory.
* Writes are applied one at a time: moto looks at a condition and then writes, and of two conditional writes at once
  both would succeed.
* No wait without a deadline; no shell.
* It dies with us, however we die: the child asks the kernel for SIGKILL at the death of its parent and then compares
  the parent, in case it died in between. The kernel means the *thread* that started the child, so ``start`` starts it
  in the event loop's own thread. Where there is no such call (macOS) an orphan stays until it is ended by hand.

Failure at each stage: moto not installed, the port taken -> EmbeddedError with the end of what the child said.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from typing import IO, Final

from sidecar import settings
from sidecar.embedded.postgres import EmbeddedError

HOST: Final = "127.0.0.1"
REGION: Final = "eu-west-1"  # any will do: the tables of each region are apart
_POLL: Final = 0.01  # seconds between two looks
_STOP_SECONDS: Final = 5.0
_SAID: Final = 2_000  # characters of the child's last words
_SERVE: Final = """
import ctypes, io, logging, os, signal, sys, threading
parent, host, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent is gone")
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_request(self, *arguments):
        pass
moto = DomainDispatcherApplication(create_backend_app)
writes = threading.Lock()
def application(environ, start_response):
    operation = environ.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2]
    length = environ.get("CONTENT_LENGTH")
    if not length or not operation.startswith(("PutItem", "UpdateItem", "DeleteItem", "BatchWrite", "Transact")):
        return moto(environ, start_response)
    environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(int(length)))  # a slow client holds up nobody
    with writes:
        return moto(environ, start_response)
server = make_server(host, port, application, threaded=True, request_handler=Quiet)
os.write(1, b"%d\\n" % server.server_address[1])
server.serve_forever()
"""


class EmbeddedDynamoDB:
    """The life of one server process. Not bound to an event loop: each call may come from another one.

    Args:
        port: TCP port on 127.0.0.1; 0 takes a free one at the first start and keeps it.
        start_timeout: seconds until ``start`` gives up.
    """

    def __init__(self, port: int = 0, *, start_timeout: float = 30.0) -> None:
        self._port = port
        self._start_timeout = start_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None

    @property
    def port(self) -> int:
        """The port in use; 0 before the first start where none was given."""
        return self._port

    @property
    def pid(self) -> int | None:
        """Process id of the running server, else None."""
        return self._process.pid if self._process is not None and self._alive() else None

    @property
    def endpoint_url(self) -> str:
        """Where it answers, e.g. ``http://127.0.0.1:8000``."""
        return f"http://{HOST}:{self._port}"

    def settings(self) -> settings.DynamoDB:
        """How the store reaches this server; any credentials will do, but there must be some."""
        return settings.DynamoDB(endpoint_url=self.endpoint_url, region=REGION)

    async def start(self) -> None:
        """Start the server, return when it takes connections; idempotent. Raises EmbeddedError."""
        if self._alive():
            return
        self.kill()  # what is left of one that ended by itself
        deadline = time.monotonic() + self._start_timeout
        self._spawn()
        try:
            await self._ready(deadline)
        except BaseException:  # cancelled while waiting: nobody else would end the child
            self.kill()
            raise

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL; idempotent, at most 10 s. Its data is gone."""
        process = self._process
        if process is not None:
            process.terminate()
            deadline = time.monotonic() + _STOP_SECONDS
            while process.poll() is None and time.monotonic() < deadline:  # noqa: ASYNC110  (a child has no event)
                await asyncio.sleep(_POLL)
        self.kill()

    def kill(self) -> None:
        """End the server as kill -9 does, a crash to its clients; ``start`` brings it back, empty."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(timeout=_STOP_SECONDS)
            if process.stdout is not None:
                process.stdout.close()
        said, self._said = self._said, None
        if said is not None:
            said.close()

    async def _ready(self, deadline: float) -> None:
        while not self._listens():
            if not self._alive() or time.monotonic() > deadline:
                raise EmbeddedError(f"the local DynamoDB did not start: {self._last_words()}")
            await asyncio.sleep(_POLL)

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _spawn(self) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (kept for its last words; kill() closes it)
        self._process = subprocess.Popen(  # noqa: S603  (our own interpreter and code, no shell)
            [sys.executable, "-c", _SERVE, str(os.getpid()), HOST, str(self._port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            start_new_session=True,  # Ctrl-C is for us: we stop the server when nobody needs it any more
        )
        if self._process.stdout is not None:
            os.set_blocking(self._process.stdout.fileno(), False)

    def _listens(self) -> bool:
        """True once the child has said its port."""
        process = self._process
        if process is None or process.stdout is None:
            return False
        line = process.stdout.read()
        if not line:
            return False
        self._port = int(line)
        return True

    def _last_words(self) -> str:
        if self._said is None:
            return "it said nothing"
        self._said.seek(0)
        return self._said.read().decode(errors="replace")[-_SAID:].strip() or "it said nothing"

"""The HTTP client of the command line: standard library only, so that it works in the smallest container.

It speaks to the application listener (TCP or unix socket) with a Host that the sidecar takes for its own, sends who
calls (``X-Actor``, for the audit trail, unproved) and never follows anywhere. An answer that is not 2xx becomes the
error of the tree that it was; a connection that breaks in the middle of a stream is an error, never a short export.
"""

import contextlib
import getpass
import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlencode

from sidecar.errors import BadRequest, Busy, Forbidden, NotFound, SidecarError, SidecarUnreachable, Unauthorized
from sidecar.settings import Secret

_CONNECT: Final = 2.0  # seconds
_ANSWER: Final = 60.0  # seconds between two pieces of an answer
_PIECE: Final = 64 * 1024  # bytes
_NO_REASON: Final = "no reason given"
_LOCAL: Final = frozenset({"0.0.0.0", "[::]", "::", ""})  # noqa: S104  (an address to listen on; we dial the loopback)
_ERRORS: Final[Mapping[int, type[SidecarError]]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    413: BadRequest,
    415: BadRequest,
}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a sidecar listens: host and port, or the path of a unix socket."""

    host: str = "127.0.0.1"
    port: int = 0
    path: str = ""

    @classmethod
    def of_listen(cls, listen: str) -> "Address":
        """From the setting ``listen.app`` or from ``http://host:port``."""
        text = listen.removeprefix("http://").rstrip("/")
        if text.startswith("unix:"):
            return cls(path=text.removeprefix("unix:"))
        host, colon, port = text.rpartition(":")
        if not colon or not port.isdigit():
            raise BadRequest(f"address: {listen!r} is not host:port, http://host:port or unix:/path")
        return cls(host="127.0.0.1" if host in _LOCAL else host, port=int(port))

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"{self.host}:{self.port}"


class Refused(BadRequest):
    """The request was understood and refused as things are (409); ``document`` is the whole answer."""

    def __init__(self, message: str, document: dict[str, Any]) -> None:
        self.document = document
        super().__init__(message)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_CONNECT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_CONNECT)
        self.sock.connect(self._path)


class Client:
    """Asks one sidecar; a connection per request."""

    def __init__(self, address: Address, token: Secret | None = None) -> None:
        """``token`` None: only what needs none."""
        self.address = address
        self._token = token

    def get(self, path: str, **query: object) -> dict[str, Any]:
        """A JSON document. Raises SidecarUnreachable, or the error that was answered."""
        return self._document("GET", _with(path, query), None)

    def post(self, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        """Likewise, sending JSON."""
        return self._document("POST", path, body)

    def lines(self, path: str, **query: object) -> Iterator[dict[str, Any]]:
        """An NDJSON stream, whole or an error."""
        with self._answer("GET", _with(path, query), None) as answer, self._breaks():
            rest = b""
            while piece := answer.read(_PIECE):  # and not readline, which takes a missing last chunk for the end
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    yield json.loads(line)
            if rest or answer.length:  # half a line, or fewer bytes than announced
                raise http.client.IncompleteRead(rest)

    def _document(self, method: str, path: str, body: Mapping[str, object] | None) -> dict[str, Any]:
        with self._answer(method, path, body) as answer, self._breaks():
            found: dict[str, Any] = json.loads(answer.read())
            return found

    @contextlib.contextmanager
    def _answer(self, method: str, path: str, body: Mapping[str, object] | None) -> Iterator[http.client.HTTPResponse]:
        address = self.address
        connection = (
            _UnixConnection(address.path)
            if address.path
            else http.client.HTTPConnection(address.host, address.port, timeout=_CONNECT)
        )
        headers = {"X-Actor": actor(), "Connection": "close"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token.reveal()}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        with contextlib.closing(connection):
            with self._breaks():
                connection.connect()
                connection.sock.settimeout(_ANSWER)
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                answer = connection.getresponse()
                if answer.status >= 300:  # noqa: PLR2004  (no redirect is followed)
                    raise _error(answer.status, answer.read())
            yield answer

    @contextlib.contextmanager
    def _breaks(self) -> Iterator[None]:
        """A broken connection is named as what it is."""
        try:
            yield
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            told = getattr(error, "strerror", None) or type(error).__name__
            raise SidecarUnreachable(f"the sidecar at {self.address} gave no whole answer: {told}") from error


def actor() -> str:
    """Who calls, as the audit trail shows it."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user often has no name
        user = "unknown user"
    return f"{user}@{socket.gethostname()}"


def _with(path: str, query: Mapping[str, object]) -> str:
    given = {name: value for name, value in query.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def _error(status: int, body: bytes) -> SidecarError:
    try:
        message = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = _NO_REASON
    if status == 409:  # noqa: PLR2004  (as below)
        return Refused(message, json.loads(body) if message != _NO_REASON else {"error": {}})
    if status in _ERRORS:
        return _ERRORS[status](message)
    return Busy("control", f"the sidecar answered {status}: {message}", 1)

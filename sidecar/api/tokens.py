"""Bearer tokens from a mounted file: re-read when it changes, compared in constant time.

No file configured means what the caller decides: reads are open then, mutations are off.
"""

import hmac
import logging
import os
from collections.abc import Callable
from typing import Final

from aiohttp import web

from sidecar.errors import Unauthorized
from sidecar.settings import Secret

_logger: Final = logging.getLogger("sidecar.api")
_LONGEST: Final = 4096  # bytes of a token file


class TokenFile:
    """The token in a file. ``path`` is asked each time, because the setting may be reloaded."""

    def __init__(self, path: Callable[[], str | None]) -> None:
        self._path = path
        self._read_as: tuple[str, int, int, int] | None = None
        self._token: Secret | None = None

    @property
    def configured(self) -> bool:
        """Whether a file is named."""
        return self._path() is not None

    @property
    def name(self) -> str:
        """The file's own name, for the audit trail; "" where none is named."""
        return os.path.basename(self._path() or "")  # noqa: PTH119  (a text in, a text out)

    def check(self, request: web.BaseRequest) -> None:
        """Raises Unauthorized unless the request bears the token; an unreadable or empty file lets nobody in."""
        given = request.headers.get("Authorization", "")
        scheme, _, token = given.partition(" ")
        expected = self._expected()
        if expected is None:
            raise Unauthorized("no token can be read from the configured token file; mend the mount")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            token.strip().encode("utf-8", "surrogateescape"), expected.reveal().encode()
        ):
            raise Unauthorized(
                "Authorization: a bearer token is required, and this is not the one; send Bearer <token>"
            )

    def _expected(self) -> Secret | None:
        path = self._path()
        if path is None:
            return None
        try:
            stat = os.stat(path)  # noqa: PTH116  (follows the mount's symlinks; one call, no object)
            read_as = (path, stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if read_as != self._read_as:
                with open(path, encoding="utf-8") as file:  # noqa: PTH123  (as above)
                    text = file.read(_LONGEST).strip()
                self._token = Secret(text) if text else None
                self._read_as = read_as
        except (OSError, UnicodeDecodeError) as error:
            _logger.error("token file cannot be read: %s", type(error).__name__)  # noqa: TRY400  (no trace is needed)
            self._read_as = None
            return None
        return self._token

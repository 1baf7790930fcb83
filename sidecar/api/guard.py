"""Who may change anything, or see payloads an operator exports: the bearer token, and a line about everybody who tried.

* No token file configured: 403, the routes are off, not open. Wrong or missing token: 401. Foreign Host: 403.
* Every attempt to change something and every look at payloads is in the audit trail before it has any effect.
* Refused attempts are in the audit trail too, at most 20 at once and then one in ten minutes: the trail is never cut,
  and whoever can reach the listener must not be able to fill the disk, in a year either (some 10 MB). What was left out
  is counted in the next line.

The trail names the token's file, the peer, and who the caller says to be (``X-Actor``, unproved, 64 characters).
"""

from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

from sidecar.api.tokens import TokenFile
from sidecar.clock import Clock
from sidecar.errors import BadRequest, Forbidden, Unauthorized

GUARDED: Final = ("/api/",)
"""Paths whose refusals are audited even where the Host is foreign, so that no handler is reached."""
_AT_ONCE: Final = 20.0
_EVERY: Final = 600.0  # seconds
_ACTOR_LENGTH: Final = 64

Audit = Callable[[str, str, str, str], Awaitable[None]]
"""who, what, why, evidence: returns when the line is durable."""


class Guard:
    """Admits callers with the token; one per application."""

    def __init__(self, token: TokenFile, audit: Audit, clock: Clock) -> None:
        """``token`` is the control token's file."""
        self._token = token
        self._audit = audit
        self._clock = clock
        self._room = _AT_ONCE
        self._filled_at = clock.monotonic()
        self._left_out = 0

    async def admit(self, request: web.Request) -> str:
        """Who it is, for the audit trail.

        Raises:
            Forbidden: mutations are off.
            Unauthorized: no token, or another one.
        """
        try:
            if not self._token.configured:
                raise Forbidden(
                    "control is off: no control.token_file is configured; mount a token and name its file there"
                )
            self._token.check(request)
        except BadRequest as error:
            await self.refused(request, error)
            raise
        return f"token {self._token.name} from {_peer(request)}{_actor(request)}"

    async def admitted(self, request: web.Request, why: str, evidence: str = "") -> str:
        """As ``admit``, and the attempt is in the audit trail when it returns."""
        who = await self.admit(request)
        await self.note(who, request, why, evidence)
        return who

    async def note(self, who: str, request: web.Request, why: str, evidence: str) -> None:
        """Put what an admitted caller asked for into the audit trail."""
        await self._audit(who, _what(request), why, evidence)

    async def refused(self, request: web.Request, error: BadRequest) -> None:
        """Put a refused attempt into the audit trail, unless there were too many lately."""
        now = self._clock.monotonic()
        self._room = min(_AT_ONCE, self._room + (now - self._filled_at) / _EVERY)
        self._filled_at = now
        if self._room < 1:
            self._left_out += 1
            return
        self._room -= 1
        evidence = f"refused: {type(error).__name__}"
        if self._left_out:
            evidence += f"; {self._left_out} more refused since the last line"
            self._left_out = 0
        kind = "wrong or missing token" if isinstance(error, Unauthorized) else "not allowed"
        await self._audit(f"{_peer(request)}{_actor(request)}", _what(request), kind, evidence)


def _what(request: web.Request) -> str:
    """Method and route: never the path as sent, which may hold anything."""
    resource = request.match_info.route.resource
    return f"{request.method} {resource.canonical if resource is not None else 'unknown route'}"


def _peer(request: web.Request) -> str:
    return request.remote or "unix socket"


def _actor(request: web.Request) -> str:
    claimed = request.headers.get("X-Actor", "")
    shown = "".join(c for c in claimed if c.isprintable())[:_ACTOR_LENGTH]
    return f" as {shown}" if shown else ""

"""``/api/migration``: whether the stores hold the same records, and what to do about it.

::

    GET  /api/migration/validate-consistency   ?startDate= &endDate= &deep= &examples= &reveal=   compare a window now
    GET  /api/migration/validation                                                    what is known: runs and days
    POST /api/migration/validation/stop        {"reason"}                             stop what this sidecar compares
    POST /api/migration/repair                 {"startDate", "endDate", "reason", "deep", "dry_run", "overwrite"}
    POST /api/control/whereabouts              {"log_ids"}                            what this sidecar knows of records

The window is start <= log_timestamp <= end; without dates the last 24 hours; a date without an offset is UTC (the
specification's clients send none). The answer comes when the comparison has ended: for windows of many millions of
records use ``sidecar validate``, which shows how far it is. One at a time: a second one is answered 503.

A report names ids and fields; values (``reveal``) need the control token and are audited before they are read. The rest
needs the token of reads, where there is one. An error of a store is an error of the request, never a report.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import msgspec
from aiohttp import web

from sidecar.api.body import Budget
from sidecar.api.document import read_document
from sidecar.api.errors import answer
from sidecar.api.guard import Guard
from sidecar.api.parts import PARTS
from sidecar.consistency import Known, Window
from sidecar.errors import BadRequest
from sidecar.phase import StoreName
from sidecar.screening.identity import canonical
from sidecar.screening.timestamps import EARLIEST, LATEST, Timestamps

_DAY_US: Final = 86_400_000_000
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)
_LOCAL: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?", re.ASCII)
_SHAPE: Final = "a date or a time such as 2026-11-22, 2026-11-22T17:24:52 (UTC) or 2026-11-22T17:24:52Z"
_MOST_EXAMPLES: Final = 1_000
_MOST_IDS: Final = 1_000
_MOST_BODY: Final = 64 * 1024  # bytes
_PATIENCE: Final = 10.0  # seconds for a body
_LONGEST_REASON: Final = 500
_BOOLEANS: Final = {"true": True, "false": False}
_B = TypeVar("_B", bound=msgspec.Struct)
_Handler = Callable[[web.Request], Awaitable[web.Response]]


@dataclass(frozen=True, slots=True)
class Asked:
    """A validation that was asked for."""

    window: Window
    deep: bool = False
    examples: int = 100
    reveal: bool = False
    by: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A repair that was asked for."""

    window: Window
    deep: bool
    dry_run: bool
    overwrite: bool
    by: str
    why: str


class Service(Protocol):
    """What does it (``sidecar.app.consistency``). ``validate`` and ``repair`` raise Busy where one is under way."""

    def now_us(self) -> int:
        """Wall clock, microseconds."""
        ...

    async def validate(self, asked: Asked) -> Mapping[str, object]:
        """The report. Raises StoreError."""
        ...

    async def known(self) -> Mapping[str, object]:
        """The last runs, what the days add up to, and what is under way. Raises StoreError."""
        ...

    async def stop(self) -> bool:
        """Stop what is under way here; whether there was anything."""
        ...

    async def repair(self, wanted: Wanted) -> Mapping[str, object]:
        """What was done, or would be. Raises StoreError."""
        ...

    async def whereabouts(self, log_ids: Sequence[str]) -> Mapping[str, Mapping[StoreName, Known]]:
        """What this sidecar's spool knows."""
        ...


class _Reason(msgspec.Struct, forbid_unknown_fields=True):
    reason: str


class _Ids(msgspec.Struct, forbid_unknown_fields=True):
    log_ids: list[str]


class _Repair(msgspec.Struct, forbid_unknown_fields=True):
    reason: str
    startDate: str | None = None  # noqa: N815  (the specification's spelling, as in the query)
    endDate: str | None = None  # noqa: N815  (as above)
    deep: bool = False
    dry_run: bool = True
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Consistency:
    """The routes."""

    service: Service
    guard: Guard
    budget: Budget

    def routes(self) -> Sequence[web.RouteDef]:
        """All of them."""
        return (
            web.get("/api/migration/validate-consistency", self._validate),
            web.get("/api/migration/validation", self._known),
            web.post("/api/migration/validation/stop", self._attempt(self._stop)),
            web.post("/api/migration/repair", self._attempt(self._repair)),
            web.post("/api/control/whereabouts", self._attempt(self._whereabouts)),
        )

    def _attempt(self, handle: Callable[[web.Request, str], Awaitable[web.Response]]) -> _Handler:
        async def handler(request: web.Request) -> web.Response:
            who = await self.guard.admit(request)
            try:
                return await handle(request, who)
            except BadRequest as error:
                await self.guard.note(who, request, "not understood", f"refused: {type(error).__name__}")
                raise

        return handler

    async def _validate(self, request: web.Request) -> web.Response:
        given = _parameters(request, ("startDate", "endDate", "deep", "examples", "reveal"))
        reveal = _truth(given, "reveal")
        by = "api"
        if reveal:
            by = await self.guard.admitted(request, "values of differing records shown")
        else:
            _check_token(request)
        asked = Asked(
            window=_window(given, self.service.now_us()),
            deep=_truth(given, "deep"),
            examples=_number(given, "examples", default=100, most=_MOST_EXAMPLES),
            reveal=reveal,
            by=by,
        )
        return answer(200, await self.service.validate(asked), {"Cache-Control": "no-store"})

    async def _known(self, request: web.Request) -> web.Response:
        _check_token(request)
        _parameters(request, ())
        return answer(200, await self.service.known(), {"Cache-Control": "no-store"})

    async def _stop(self, request: web.Request, who: str) -> web.Response:
        body = await self._body(request, _Reason)
        await self.guard.note(who, request, _why(body.reason), "")
        return answer(200, {"stopped": await self.service.stop()})

    async def _repair(self, request: web.Request, who: str) -> web.Response:
        body = await self._body(request, _Repair)
        given = {n: t for n, t in (("startDate", body.startDate), ("endDate", body.endDate)) if t is not None}
        wanted = Wanted(
            _window(given, self.service.now_us()),
            deep=body.deep,
            dry_run=body.dry_run,
            overwrite=body.overwrite,
            by=who,
            why=_why(body.reason),
        )
        evidence = f"{given} deep={body.deep} dry_run={body.dry_run} overwrite={body.overwrite}"
        await self.guard.note(who, request, wanted.why, evidence)
        return answer(200, await self.service.repair(wanted), {"Cache-Control": "no-store"})

    async def _whereabouts(self, request: web.Request, _who: str) -> web.Response:
        body = await self._body(request, _Ids)
        if len(body.log_ids) > _MOST_IDS:
            raise BadRequest(f"log_ids: {len(body.log_ids)} of them, allowed are {_MOST_IDS}; send several")
        try:
            wanted = [canonical(text) for text in body.log_ids]
        except ValueError as error:
            raise BadRequest(f"log_ids: {error}") from None
        return answer(200, {"records": await self.service.whereabouts(wanted)})

    async def _body(self, request: web.Request, kind: type[_B]) -> _B:
        return await read_document(request, kind, limit=_MOST_BODY, patience=_PATIENCE, budget=self.budget)


def parse_bound(name: str, text: str, *, end: bool) -> int:
    """``startDate`` or ``endDate`` as microseconds since the epoch; a date alone is its first, or last, instant.

    Raises:
        BadRequest: names the parameter.
    """
    whole_day = bool(_DATE.fullmatch(text))
    if whole_day:
        text += "T00:00:00Z"
    elif _LOCAL.fullmatch(text):
        text += "Z"
    try:
        found = Timestamps().parse(text)
    except ValueError as error:
        raise BadRequest(f"{name}: {error}; write {_SHAPE}; in a query string write + as %2B") from None
    if not end:
        return found
    # The end of a window is the instant after its last one, and the calendar has none after LATEST.
    return min(found + _DAY_US - 1 if whole_day else found, LATEST - 1)


def day_before(end: int) -> int:
    """Where a window of the last 24 hours begins."""
    return max(end - _DAY_US, EARLIEST)


def _window(given: Mapping[str, str], now_us: int) -> Window:
    """Both ends inclusive, as the specification compares; the last 24 hours where none is given."""
    end = parse_bound("endDate", given["endDate"], end=True) + 1 if "endDate" in given else now_us
    start = parse_bound("startDate", given["startDate"], end=False) if "startDate" in given else day_before(end)
    if start >= end:
        name = "startDate" if "startDate" in given else "endDate"
        raise BadRequest(f"{name}: the window is empty; startDate must not be after endDate")
    return Window(start, end)


def _check_token(request: web.Request) -> None:
    token = request.app[PARTS].read_token
    if token.configured:
        token.check(request)


def _parameters(request: web.Request, allowed: Sequence[str]) -> Mapping[str, str]:
    for name in request.query:
        if name not in allowed:
            raise BadRequest(f"query: a parameter that is not known here; allowed are {', '.join(allowed) or 'none'}")
        if len(request.query.getall(name)) > 1:
            raise BadRequest(f"{name}: given more than once; give it once")
    return request.query


def _truth(given: Mapping[str, str], name: str) -> bool:
    value = given.get(name, "false")
    if value not in _BOOLEANS:
        raise BadRequest(f"{name}: allowed are true and false")
    return _BOOLEANS[value]


def _number(given: Mapping[str, str], name: str, *, default: int, most: int) -> int:
    text = given.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most)) and int(text) <= most):
        raise BadRequest(f"{name}: allowed are whole numbers from 0 to {most}")
    return int(text)


def _why(reason: str) -> str:
    if not reason.strip() or len(reason) > _LONGEST_REASON:
        raise BadRequest(f"reason: a text of 1 to {_LONGEST_REASON} characters; say why, the audit trail keeps it")
    return reason.strip()

"""``/api/control``: what an operator may do to a running sidecar, and see of it. Every route needs the control token.

::

    POST /api/control/stores/{store}/pause    {"reason"}                            delivery to one store stops
    POST /api/control/stores/{store}/resume   {"reason"}                            ... and goes on
    POST /api/control/stores/{store}/rate     {"reason", "records_per_second"}      at most so many; null: no bound
    GET  /api/control/dead-letters            ?store= &reason= &after= &limit= &payload=true
    POST /api/control/dead-letters/redrive    {"select", "reason"}                  tried again now
    POST /api/control/dead-letters/discard    {"select", "reason"}                  given up for good
    GET  /api/control/dead-letters/export     ?store= &reason=                      NDJSON, with the records
    GET  /api/control/spool                   ?after= &limit=                       accounts, and frames that wait
    GET  /api/control/spool/export            ?log_id=                              NDJSON, records that wait
    GET  /api/control/spool/verify                                                  every checksum of the file
    GET  /api/control/audit                   ?limit=                               newest first

``select`` is ``{"log_ids": [...], "store": ..., "reason": ..., "all": true}``: what is given must hold; nothing given
is an error, because "all" should be said. In it, as in the queries, ``reason`` is the dead letter's class; the
``reason`` beside it is the operator's own, and goes to the audit trail.

Bodies are JSON objects of the exact types, with no other member. Listings without payload are not audited; whatever
shows a record's payload or changes anything is, before it happens (see ``guard``). Exports are read in small steps, so
that neither memory nor a commit depends on their size; one that fails in the middle is cut off, never ended in order.
"""

import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Final, Protocol, TypeVar

import msgspec
from aiohttp import web

from sidecar.api.body import Budget
from sidecar.api.document import read_document
from sidecar.api.errors import answer
from sidecar.api.guard import Guard
from sidecar.dead_letter import DeadLetters, Selection, check_names
from sidecar.errors import BadRequest, ConfigError, NotFound, SidecarError
from sidecar.phase import STORES
from sidecar.screening.identity import canonical
from sidecar.spool import AuditLine, Counters, SpoolState, documents, view
from sidecar.steering import FASTEST, SLOWEST, Orders, Steering
from sidecar.steering import document as orders_document

log = logging.getLogger(__name__)

_MOST_BODY: Final = 256 * 1024  # bytes: a thousand ids are 40 KB
_PATIENCE: Final = 10.0  # seconds for it
_MOST_IDS: Final = 1_000
_LONGEST_REASON: Final = 500
_MOST_LISTED: Final = 1_000
_MOST_WITH_PAYLOAD: Final = 32  # 11 MiB at the worst
_NDJSON: Final = "application/x-ndjson"
_CHECKED: Final = tuple(field.name for field in fields(view.Checked))
_T = TypeVar("_T")
_B = TypeVar("_B", bound=msgspec.Struct)
_Handler = Callable[[web.Request], Awaitable[web.Response]]


class SpoolPort(Protocol):
    """What the routes need of the spool (``sidecar.spool.Spool``)."""

    def flush_now(self) -> None:
        """Let whatever is read next know what is settled."""
        ...

    async def read(self, run: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run a query in the database thread."""
        ...

    def counters(self, store: str) -> Counters:
        """The durable account."""
        ...

    def state(self) -> SpoolState:
        """How full it is."""
        ...

    def dead_letter_counts(self) -> Mapping[tuple[str, str], int]:
        """By store and class."""
        ...

    async def audit_trail(self, limit: int = 100) -> Sequence[AuditLine]:
        """The newest lines."""
        ...


class _Reason(msgspec.Struct, forbid_unknown_fields=True):
    reason: str


class _Rate(msgspec.Struct, forbid_unknown_fields=True):
    reason: str
    records_per_second: float | None


class _Select(msgspec.Struct, forbid_unknown_fields=True):
    log_ids: list[str] = []
    store: str | None = None
    reason: str | None = None
    all: bool = False


class _Change(msgspec.Struct, forbid_unknown_fields=True):
    reason: str
    select: _Select


@dataclass(frozen=True, slots=True)
class Control:
    """The parts behind the routes."""

    spool: SpoolPort
    letters: DeadLetters
    steering: Steering
    guard: Guard
    budget: Budget

    def routes(self) -> Sequence[web.RouteDef]:
        """All of them."""
        return (
            web.post("/api/control/stores/{store}/pause", self._attempt(self._pause)),
            web.post("/api/control/stores/{store}/resume", self._attempt(self._resume)),
            web.post("/api/control/stores/{store}/rate", self._attempt(self._rate)),
            web.get("/api/control/dead-letters", self._list_letters),
            web.post("/api/control/dead-letters/redrive", self._attempt(self._redrive)),
            web.post("/api/control/dead-letters/discard", self._attempt(self._discard)),
            web.get("/api/control/dead-letters/export", self._export_letters),
            web.get("/api/control/spool", self._list_spool),
            web.get("/api/control/spool/export", self._export_spool),
            web.get("/api/control/spool/verify", self._verify),
            web.get("/api/control/audit", self._audit),
        )

    def _attempt(self, handle: Callable[[web.Request, str], Awaitable[web.Response]]) -> _Handler:
        """Admit, handle, and put what is wrong with a request into the audit trail too."""

        async def handler(request: web.Request) -> web.Response:
            who = await self.guard.admit(request)
            try:
                return await handle(request, who)
            except BadRequest as error:
                await self.guard.note(who, request, "not understood", f"refused: {type(error).__name__}")
                raise

        return handler

    # --- stores ----------------------------------------------------------------------------------------------------

    async def _pause(self, request: web.Request, who: str) -> web.Response:
        body = await self._body(request, _Reason)
        return self._ordered(request, await self.steering.pause(_store(request), by=who, reason=_why(body.reason)))

    async def _resume(self, request: web.Request, who: str) -> web.Response:
        body = await self._body(request, _Reason)
        return self._ordered(request, await self.steering.resume(_store(request), by=who, reason=_why(body.reason)))

    async def _rate(self, request: web.Request, who: str) -> web.Response:
        body = await self._body(request, _Rate)
        rate = body.records_per_second
        if rate is not None and not SLOWEST <= rate <= FASTEST:
            raise BadRequest(
                f"records_per_second: allowed are {SLOWEST:g} to {FASTEST:g}, or null for no bound; to stop, pause"
            )
        return self._ordered(request, await self.steering.rate(_store(request), rate, by=who, reason=_why(body.reason)))

    def _ordered(self, request: web.Request, orders: Orders) -> web.Response:
        return answer(200, {"store": _store(request), "orders": orders_document(orders)})

    # --- dead letters ----------------------------------------------------------------------------------------------

    async def _list_letters(self, request: web.Request) -> web.Response:
        given = _letters_query(request, "after", "limit", "payload")
        payload = _truth(given, "payload")
        most = _MOST_WITH_PAYLOAD if payload else _MOST_LISTED
        limit = _number(given, "limit", default=min(100, most), least=1, most=most)
        if payload:
            await self.guard.admitted(request, "payload shown", _listed(given))
        else:
            await self.guard.admit(request)
        page: list[dict[str, object]] = []
        after = _number(given, "after", default=0, least=0, most=2**62)
        store, retry_class = given.get("store"), given.get("reason")
        while len(page) < limit:  # in small steps: each reads the bodies too
            step = min(limit - len(page), _MOST_WITH_PAYLOAD)
            found = await self.letters.page(store=store, retry_class=retry_class, after=after, limit=step)
            page += [documents.letter(letter, payload=payload) for letter in found]
            after = found[-1].key if found else after
            if len(found) < step:
                return answer(200, {"dead_letters": page, "next_after": None})
        return answer(200, {"dead_letters": page, "next_after": after})

    async def _redrive(self, request: web.Request, who: str) -> web.Response:
        return await self._change(request, who, self.letters.redrive)

    async def _discard(self, request: web.Request, who: str) -> web.Response:
        return await self._change(request, who, self.letters.discard)

    async def _change(self, request: web.Request, who: str, change: Callable[..., Awaitable[int]]) -> web.Response:
        body = await self._body(request, _Change)
        chosen = _selection(body.select)
        why = _why(body.reason)
        evidence = f"select: {msgspec.json.encode(body.select).decode()[:_LONGEST_REASON]}"
        await self.guard.note(who, request, why, evidence)
        return answer(200, {"records": await change(chosen, who=who, reason=why)})

    async def _export_letters(self, request: web.Request) -> web.StreamResponse:
        given = _letters_query(request)
        await self.guard.admitted(request, "payload exported", _listed(given))
        found = self.letters.every(store=given.get("store"), retry_class=given.get("reason"))
        return await _stream(request, (documents.letter(letter, payload=True) async for letter in found))

    # --- spool -----------------------------------------------------------------------------------------------------

    async def _list_spool(self, request: web.Request) -> web.Response:
        await self.guard.admit(request)
        given = _query(request, "after", "limit")
        limit = _number(given, "limit", default=100, least=1, most=_MOST_LISTED)
        after: int | None = _number(given, "after", default=0, least=0, most=2**62)
        self.spool.flush_now()
        found: list[dict[str, object]] = []
        while after is not None and len(found) < limit:
            step = partial(view.frames, after=after, limit=limit - len(found))
            lines, after = await self.spool.read(step)
            found += [documents.frame(line) for line in lines]
        letters = self.spool.dead_letter_counts()
        return answer(
            200,
            {
                "stores": {store: asdict(self.spool.counters(store)) for store in STORES},
                "dead_letters": [{"store": s, "reason": kind, "records": n} for (s, kind), n in letters.items()],
                "state": asdict(self.spool.state()),
                "frames": found,
                "next_after": after,
            },
        )

    async def _export_spool(self, request: web.Request) -> web.StreamResponse:
        given = _query(request, "log_id")
        log_id = bytes.fromhex(_id(given["log_id"]).replace("-", "")) if "log_id" in given else None
        await self.guard.admitted(request, "payload exported", _listed(given))
        return await _stream(request, self._owed(log_id))

    async def _owed(self, log_id: bytes | None) -> AsyncIterator[dict[str, object]]:
        at: view.Position | None = view.START
        self.spool.flush_now()
        while at is not None:
            found, at = await self.spool.read(partial(view.owed, at=at, log_id=log_id))
            for item in found:
                yield documents.held(item)

    async def _verify(self, request: web.Request) -> web.Response:
        await self.guard.admit(request)
        _query(request)
        total = view.Checked()
        at: view.Position | None = view.START
        self.spool.flush_now()
        while at is not None:
            part, at = await self.spool.read(partial(view.check, at=at))
            for name in _CHECKED:
                setattr(total, name, getattr(total, name) + getattr(part, name))
        return answer(200, {**asdict(total), "problems": total.problems})

    async def _audit(self, request: web.Request) -> web.Response:
        await self.guard.admit(request)
        given = _query(request, "limit")
        lines = await self.spool.audit_trail(_number(given, "limit", default=100, least=1, most=_MOST_LISTED))
        return answer(200, {"audit": [documents.audit_line(line) for line in lines]})

    # --- bodies ----------------------------------------------------------------------------------------------------

    async def _body(self, request: web.Request, kind: type[_B]) -> _B:
        return await read_document(request, kind, limit=_MOST_BODY, patience=_PATIENCE, budget=self.budget)


async def _stream(request: web.Request, lines: AsyncIterator[Mapping[str, object]]) -> web.StreamResponse:
    """NDJSON in chunks; an error after the first byte breaks the connection off, so that nobody takes it for whole."""
    response = web.StreamResponse(headers={"Content-Type": _NDJSON, "Cache-Control": "no-store"})
    await response.prepare(request)
    try:
        async for line in lines:
            await response.write(msgspec.json.encode(line) + b"\n")
    except SidecarError as error:
        log.error("an export was broken off", extra={"what": str(error)})  # noqa: TRY400  (its text says all)
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("an export was broken off") from error
    await response.write_eof()
    return response


def _store(request: web.Request) -> str:
    store = request.match_info["store"]
    if store not in STORES:
        raise NotFound(f"store: not one of {', '.join(STORES)}")
    return store


def _why(reason: str) -> str:
    if not reason.strip() or len(reason) > _LONGEST_REASON:
        raise BadRequest(f"reason: a text of 1 to {_LONGEST_REASON} characters; say why, the audit trail keeps it")
    return reason.strip()


def _selection(select: _Select) -> Selection:
    if len(select.log_ids) > _MOST_IDS:
        raise BadRequest(f"select.log_ids: {len(select.log_ids)} of them, allowed are {_MOST_IDS}; send several")
    chosen = Selection(tuple(map(_id, select.log_ids)), select.store, select.reason, select.all)
    try:
        chosen.check()
    except ConfigError as error:
        raise BadRequest(f"select: {error}") from None
    return chosen


def _id(text: str) -> str:
    try:
        return canonical(text)
    except ValueError as error:
        raise BadRequest(f"log_id: {error}") from None


def _query(request: web.Request, *allowed: str) -> Mapping[str, str]:
    for name in request.query:
        if name not in allowed:
            raise BadRequest(f"query: a parameter that is not known here; allowed are {', '.join(allowed) or 'none'}")
        if len(request.query.getall(name)) > 1:
            raise BadRequest(f"{name}: given more than once; give it once")
    return request.query


def _letters_query(request: web.Request, *more: str) -> Mapping[str, str]:
    given = _query(request, "store", "reason", *more)
    try:
        check_names(given.get("store"), given.get("reason"))
    except ConfigError as error:
        raise BadRequest(f"query: {error}") from None
    return given


def _number(given: Mapping[str, str], name: str, *, default: int, least: int, most: int) -> int:
    text = given.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):  # noqa: PLR2004  (digits of 64 bits)
        raise BadRequest(f"{name}: allowed are whole numbers from {least} to {most}")
    return int(text)


def _truth(given: Mapping[str, str], name: str) -> bool:
    value = given.get(name, "false")
    if value not in ("true", "false"):
        raise BadRequest(f"{name}: allowed are true and false")
    return value == "true"


def _listed(given: Mapping[str, str]) -> str:
    """The query for the audit trail: names are known, values cut."""
    return " ".join(f"{name}={value[:64]}" for name, value in given.items())

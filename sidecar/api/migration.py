"""``/api/migration``: the specification's control routes (L454-518), guarded, with evidence instead of promises.

::

    GET  /api/migration                          where it stands, what holds it, who decides
    GET  /api/migration/fleet                    every instance with phase, epoch, lag, dead letters, state
    GET  /api/migration/history   ?limit=        every change and refused request: who, what, why, when, evidence
    POST /api/migration/enable-dual-write        sql_only -> dual_write
    POST /api/migration/switch-to-dynamo-reads   dual_write -> dual_write_read_dynamo
    POST /api/migration/disable-sql-writes       dual_write_read_dynamo -> dynamo_only
    POST /api/migration/rollback                 one step back, or to the phase in "to"
    POST /api/migration/test-dual-write          the canary: written, read back, compared, taken back

A POST needs the control token and a Host of this machine; each attempt is in the audit trail before anything else
happens. Its body may be empty, or ``{"reason", "force", "to"}``: ``reason`` is kept, ``force`` is the reason for which
red gates are overridden (loud, recorded, never skips a step), ``to`` is for rollback alone. ``?dry_run=true`` looks at
the same gates and changes nothing.

ANSWERS. 409 ``gates_failed``: nothing was asked for; ``failed`` names each gate with what was observed and what is
required. 200: the phase is in force on this instance. 202: it was asked for and comes when every instance and gate
allows it, or, where ``phase_authority`` is ``file``, nothing was changed and ``patch`` is the command that asks.
"""

import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import msgspec
from aiohttp import web

from sidecar.api.body import Budget, encoding_of, read_body
from sidecar.api.errors import JSON, answer, error_answer
from sidecar.api.guard import Guard
from sidecar.errors import BadRequest, ConfigError, MalformedBody, UnsupportedMedia
from sidecar.fleet import Finding
from sidecar.phase import Phase, parse_phase
from sidecar.plan import Asked, PhaseControl, Plan, Wanted
from sidecar.record import timestamp_text

_MOST_BODY: Final = 16 * 1024  # bytes
_PATIENCE: Final = 10.0  # seconds for it
_LONGEST_REASON: Final = 500
_MOST_LISTED: Final = 1_000
_DIGITS: Final = 19  # of a number worth reading: int() itself fails beyond some thousand
_NO_REASON: Final = "no reason given"

STEPS: Final[Mapping[str, tuple[Phase, Phase]]] = MappingProxyType(
    {
        "enable-dual-write": (Phase.SQL_ONLY, Phase.DUAL_WRITE),
        "switch-to-dynamo-reads": (Phase.DUAL_WRITE, Phase.DUAL_WRITE_READ_DYNAMO),
        "disable-sql-writes": (Phase.DUAL_WRITE_READ_DYNAMO, Phase.DYNAMO_ONLY),
    }
)
"""The specification's steps forward by route."""


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    reason: str = ""
    force: str | None = None
    to: str | int | None = None


@dataclass(frozen=True, slots=True)
class Migration:
    """The parts behind the routes."""

    control: PhaseControl
    guard: Guard
    budget: Budget
    now_us: Callable[[], int]

    def routes(self) -> Sequence[web.RouteDef]:
        """All of them."""
        steps = [web.post(f"/api/migration/{name}", self._forward(*step)) for name, step in STEPS.items()]
        return (
            *steps,
            web.post("/api/migration/rollback", self._rollback),
            web.post("/api/migration/test-dual-write", self._canary),
            web.get("/api/migration", self._state),
            web.get("/api/migration/fleet", self._fleet),
            web.get("/api/migration/history", self._history),
        )

    # --- looking ---------------------------------------------------------------------------------------------------

    async def _state(self, request: web.Request) -> web.Response:
        _query(request)
        return answer(200, self.control.state())

    async def _fleet(self, request: web.Request) -> web.Response:
        _query(request)
        return answer(200, await self.control.fleet())

    async def _history(self, request: web.Request) -> web.Response:
        given = _query(request, "limit")
        text = given.get("limit", "100")
        if not text.isascii() or not text.isdigit() or len(text) > _DIGITS or not 1 <= int(text) <= _MOST_LISTED:
            raise BadRequest(f"limit: allowed are 1 to {_MOST_LISTED}")
        return answer(200, {"history": await self.control.history(int(text))})

    # --- asking ----------------------------------------------------------------------------------------------------

    def _forward(self, source: Phase, target: Phase) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handler(request: web.Request) -> web.Response:
            who, body, dry_run = await self._admitted(request)
            if body.to is not None:
                raise BadRequest("to: only a rollback takes it; this route has its own phase")
            plan = await self.control.plan(target)
            if plan.applied not in (source, target):
                plan = self._refusal(
                    plan,
                    "adjacent_step",
                    plan.applied.label,
                    f"{source.label}: one step at a time, each from the one before",
                )
            return await self._decide(plan, _wanted(target, who, body), dry_run=dry_run)

        return handler

    async def _rollback(self, request: web.Request) -> web.Response:
        who, body, dry_run = await self._admitted(request)
        now = await self.control.plan(None)
        target = _phase(body.to) if body.to is not None else Phase(max(now.applied - 1, Phase.SQL_ONLY))
        plan = await self.control.plan(target)
        if target >= plan.applied:
            plan = self._refusal(plan, "earlier_phase", plan.applied.label, "a phase before the one that is in force")
        return await self._decide(plan, _wanted(target, who, body), dry_run=dry_run)

    async def _decide(self, plan: Plan, wanted: Wanted, *, dry_run: bool) -> web.Response:
        document = _document(plan, self.control.authority, dry_run=dry_run)
        if dry_run:
            return answer(200, {**document, "applied": plan.applied == plan.target, "green": not plan.failed})
        impossible = [f for f in plan.failed if f.gate in _NOT_FORCED]
        if plan.failed and (wanted.force is None or impossible):
            await self.control.refused(wanted, plan)
            names = ", ".join(finding.gate for finding in plan.failed)
            message = f"{names}: not as required; nothing was changed"
            failed = [_finding(finding) for finding in plan.failed]
            return error_answer(409, "gates_failed", message, failed=failed, plan=document)
        asked = await self.control.request(wanted, plan)
        overridden = [finding.gate for finding in plan.failed]
        return answer(200 if asked.applied else 202, document | _outcome(asked, wanted) | {"overridden": overridden})

    def _refusal(self, plan: Plan, gate: str, observed: str, required: str) -> Plan:
        """The same way, which may not be taken."""
        finding = Finding(gate, False, observed, required, self.now_us())
        return Plan(plan.applied, plan.desired, plan.target, plan.epoch, plan.steps, (finding,), plan.waits)

    async def _canary(self, request: web.Request) -> web.Response:
        _, _, dry_run = await self._admitted(request)
        if dry_run:
            raise BadRequest("dry_run: the canary leaves nothing behind; run it")
        outcomes = await self.control.canary()
        stores = {
            outcome.store: {"ok": not outcome.problem, "problem": outcome.problem, "seconds": round(outcome.seconds, 6)}
            for outcome in outcomes
        }
        good = all(not outcome.problem for outcome in outcomes)
        return answer(200 if good else 409, {"success": good, "stores": stores})

    async def _admitted(self, request: web.Request) -> tuple[str, _Body, bool]:
        """Who, what and whether it is a rehearsal; in the audit trail when it returns. Raises BadRequest."""
        who = await self.guard.admit(request)
        try:
            dry_run = _truth(_query(request, "dry_run"), "dry_run")
            body = await self._body(request)
        except BadRequest as error:
            await self.guard.note(who, request, "not understood", f"refused: {type(error).__name__}")
            raise
        forced = f"force: {body.force}" if body.force is not None else ""
        await self.guard.note(who, request, body.reason or _NO_REASON, "dry run" if dry_run else forced)
        return who, body, dry_run

    async def _body(self, request: web.Request) -> _Body:
        if not request.can_read_body:
            return _Body()
        coding = encoding_of(request)
        raw = await read_body(request, coding, limit=_MOST_BODY, patience=_PATIENCE, budget=self.budget)
        if not raw.strip():
            return _Body()
        if request.content_type != JSON:
            raise UnsupportedMedia(f"Content-Type: allowed is {JSON}, or no body")
        try:
            body = msgspec.json.decode(raw, type=_Body)
        except msgspec.ValidationError as error:
            raise BadRequest(f"body: {error}") from None
        except msgspec.DecodeError as error:
            raise MalformedBody(f"body: not JSON ({error}); send one object, or nothing") from None
        for name, text in (("reason", body.reason), ("force", body.force)):
            if text is not None and (len(text) > _LONGEST_REASON or (name == "force" and not text.strip())):
                raise BadRequest(f"{name}: a text of 1 to {_LONGEST_REASON} characters; the audit trail keeps it")
        return body


_NOT_FORCED: Final = frozenset({"adjacent_step", "earlier_phase"})
"""What no reason overrides: the order of the steps."""


def _wanted(target: Phase, who: str, body: _Body) -> Wanted:
    return Wanted(target, who, body.reason.strip() or body.force or _NO_REASON, body.force, uuid.uuid4().hex)


def _outcome(asked: Asked, wanted: Wanted) -> dict[str, object]:
    found: dict[str, object] = {
        "applied": asked.applied,
        "desired": asked.desired.label,
        "evidence_id": wanted.evidence_id,
    }
    return found if asked.patch is None else found | {"patch": asked.patch}


def _document(plan: Plan, authority: str, *, dry_run: bool) -> dict[str, object]:
    return {
        "dry_run": dry_run,
        "from": plan.applied.label,
        "to": plan.target.label,
        "desired": plan.desired.label,
        "epoch": plan.epoch,
        "authority": authority,
        "steps": [{"from": s.source.label, "to": s.target.label, "gates": s.gates} for s in plan.steps],
        "gates": [_finding(finding) for finding in plan.findings],
        "waits": [_finding(finding) for finding in plan.waits],
    }


def _finding(finding: Finding) -> dict[str, object]:
    return {
        "gate": finding.gate,
        "ok": finding.ok,
        "observed": finding.observed,
        "required": finding.required,
        "since": timestamp_text(finding.since_us),
    }


def _phase(value: str | int) -> Phase:
    try:
        return parse_phase(value, "to")
    except ConfigError as error:
        raise BadRequest(str(error)) from None


def _truth(given: Mapping[str, str], name: str) -> bool:
    text = given.get(name, "false")
    if text not in ("true", "false"):
        raise BadRequest(f"{name}: allowed are true and false")
    return text == "true"


def _query(request: web.Request, *allowed: str) -> Mapping[str, str]:
    """The parameters, each known and at most once."""
    given: dict[str, str] = {}
    for name, value in request.query.items():
        if name not in allowed or name in given:
            raise BadRequest(
                f"query: a parameter is unknown or given twice; allowed are {', '.join(allowed) or 'none'}"
            )
        given[name] = value
    return given

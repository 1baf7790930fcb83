"""POST /ingest/{mapping}: what log shippers and loggers send as they are -> records, by a mapping of the configuration.

THE ANSWER is for clients that cannot mend an event and react to the status alone:

* 200 as soon as everything that could be read is durable, with what became of the events. Winston takes any other
  2xx for a failure, Fluent Bit 207 and above. A refused event is kept as a ``refused`` dead letter and is in
  ``errors``; it never makes the answer an error, because Serilog resends such a batch for ever and others drop it.
* 503 with Retry-After: nothing stored, send again (all of them but Winston do).
* 4xx: the body as a whole cannot be read, so nothing of it was stored.
"""

import asyncio
from typing import Final

from aiohttp import web

from sidecar.api.body import encoding_of, read_body
from sidecar.api.errors import answer
from sidecar.api.ingest import form_of, preferred_wait
from sidecar.api.parts import PARTS, ApiParts
from sidecar.declared_mapping import DeclaredMapping, Mappings
from sidecar.errors import BadRequest, NotFound
from sidecar.intake import Outcome
from sidecar.mapping import OTLP, READY_MADE, CompiledMapping, Mapped, compile_mapping
from sidecar.mapping.split import split
from sidecar.screening import Form

_SHOWN: Final = 100  # errors of one answer
_UNTYPED: Final = frozenset({"", "text/plain"})
"""What clients put on JSON and on lines of it that have no better type: the first character tells which it is."""


class Compiled:
    """The mappings in force: compiled when first asked for, again when the configuration's have changed."""

    def __init__(self) -> None:
        self._declared: Mappings | None = None
        self._ready: dict[str, CompiledMapping] = {}

    def get(self, name: str, declared: Mappings) -> CompiledMapping:
        """The mapping of that name.

        Raises:
            NotFound: neither configured nor ready-made; names those that are.
        """
        if declared is not self._declared:
            self._declared, self._ready = declared, {}
        found = self._ready.get(name)
        if found is None:
            mine = declared.get(name)
            base = READY_MADE.get(name if mine is None or mine.extends is None else mine.extends)
            if mine is None and base is None:
                known = ", ".join(sorted({*READY_MADE, *declared} - {OTLP}))
                raise NotFound(f"no mapping of that name; there are {known} (mappings in the configuration adds more)")
            found = self._ready[name] = compile_mapping(name, mine or DeclaredMapping(), base)
        return found


COMPILED: web.AppKey[Compiled] = web.AppKey("compiled_mappings", Compiled)


async def post_events(request: web.Request) -> web.Response:
    """Accept a body of events; 200 only after fsync."""
    parts = request.app[PARTS]
    parts.intake.check_open()
    settings = parts.settings()
    name = request.match_info["mapping"]
    if name == OTLP:
        raise NotFound("no mapping of that name for events; OTLP is sent to POST /v1/logs")
    mapping = request.app[COMPILED].get(name, settings.mappings)
    lines = _is_lines(request.headers.get("Content-Type"))
    if request.query_string or "Idempotency-Key" in request.headers:
        raise BadRequest(
            "neither parameters nor an Idempotency-Key are read here: the mapping makes the ids (identity)"
        )
    body = await read_body(
        request,
        encoding_of(request),
        limit=settings.ingest.max_body_bytes,
        patience=settings.listen.body_timeout,
        budget=parts.budget,
    )
    if lines is None:
        lines = body.lstrip(b" \t\r\n")[:1] != b"["
    bodies = split(body, lines=lines, around=mapping.events, most=settings.ingest.max_records)
    mapped = Mapped()
    for _ in mapping.steps(bodies.pieces, bodies.envelope, mapped):
        await asyncio.sleep(0)
    return answer(200, described(await accept(request, parts, mapped)))


async def accept(request: web.Request, parts: ApiParts, mapped: Mapped) -> Outcome:
    """Hand the mapped events to intake, with the wait that the request prefers."""
    wait = preferred_wait(request.headers.getall("Prefer", ()), parts.settings().ingest)
    return await parts.intake.accept_mapped(mapped, wait=wait)


def _is_lines(content_type: str | None) -> bool | None:
    """Whether a body of this type is lines; None: its first character tells. Raises UnsupportedMedia."""
    media = (content_type or "").partition(";")[0].strip().lower()
    return None if media in _UNTYPED else form_of(content_type) is Form.LINES


def described(outcome: Outcome) -> dict[str, object]:
    """What became of the events; ids are left out, because no client of this route asked for any."""
    accepted = sum(log_id is not None for log_id in outcome.log_ids)
    payload: dict[str, object] = {
        "accepted": accepted,
        "duplicates": len(outcome.duplicates),
        "refused": len(outcome.refused),
        "status": "stored" if outcome.stored and accepted else "accepted",
        "phase": outcome.policy.phase.label,
    }
    if outcome.refused:
        payload["errors"] = [
            {"index": one.index, "field": one.field, "reason": one.reason, "status": one.status}
            for one in outcome.refused[:_SHOWN]
        ]
    return payload

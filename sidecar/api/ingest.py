"""POST /logs: what the client sent and prefers -> intake -> what each answer means (semantics, section 3)."""

import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from aiohttp import web

from sidecar.api.body import encoding_of, read_body
from sidecar.api.errors import answer
from sidecar.api.parts import PARTS, ApiParts
from sidecar.errors import BadRequest, MalformedBody, UnsupportedMedia
from sidecar.intake import Outcome
from sidecar.phase import Policy
from sidecar.screening import Form, Refused, check_key
from sidecar.settings import Ingest

_FORMS: Final = {
    "application/json": Form.JSON,
    "application/x-ndjson": Form.LINES,
    "application/ndjson": Form.LINES,
    "application/jsonl": Form.LINES,
}
_WAIT: Final = re.compile(r'(?:^|,)\s*wait\s*=\s*"?([0-9]+)"?\s*(?=[,;]|$)', re.IGNORECASE)
_BOOLEANS: Final = {"true": True, "1": True, "false": False, "0": False}


async def post_logs(request: web.Request) -> web.Response:
    """Accept one record or a batch; 202 only after fsync."""
    parts = request.app[PARTS]
    parts.intake.check_open()
    settings = parts.settings()
    headers = request.headers
    form = form_of(headers.get("Content-Type"))
    key = headers.get("Idempotency-Key")
    if key is not None:
        check_key(key)
        if len(headers.getall("Idempotency-Key")) > 1:
            raise MalformedBody("Idempotency-Key: given more than once, so the ids would be a guess; give it once")
    strict = bool(request.query_string) and _strict(request)
    wait = preferred_wait(headers.getall("Prefer", ()), settings.ingest)
    body = await read_body(
        request,
        encoding_of(request),
        limit=settings.ingest.max_body_bytes,
        patience=settings.listen.body_timeout,
        budget=parts.budget,
    )
    return answer(*await accept(parts, body, form, key=key, strict=strict, wait=wait))


class Words(NamedTuple):
    """An answer before it is rendered."""

    status: int
    payload: Mapping[str, object]
    headers: Mapping[str, str]


async def accept(
    parts: ApiParts,
    body: bytes,
    form: Form,
    *,
    key: str | None = None,
    strict: bool = False,
    wait: float | None = None,
) -> Words:
    """Hand a whole body to intake and word what became of it. Raises what ``Intake.accept`` raises."""
    if wait is None:
        wait = preferred_wait((), parts.settings().ingest)
    outcome = await parts.intake.accept(body, form, key=key, strict=strict, wait=wait)
    return _batch(outcome, wait) if outcome.batch else _single(outcome, wait)


def form_of(content_type: str | None) -> Form:
    """How to read a body of this Content-Type; none is JSON.

    Raises:
        UnsupportedMedia: another type, or a charset other than UTF-8.
    """
    if content_type is None or content_type == "application/json":
        return Form.JSON
    media, *parameters = content_type.split(";")
    form = _FORMS.get(media.strip().lower())
    if form is None:
        raise UnsupportedMedia(
            "Content-Type: allowed are application/json and application/x-ndjson; name one of them or none"
        )
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset" and value.strip().strip('"').lower() not in ("utf-8", "utf8"):
            raise UnsupportedMedia("Content-Type: the only charset read here is utf-8; send UTF-8")
    return form


def _strict(request: web.Request) -> bool:
    value = request.query.get("strict", "false")
    if value.lower() not in _BOOLEANS:
        raise BadRequest("strict: allowed are true and false")
    return _BOOLEANS[value.lower()]


def preferred_wait(prefer: list[str] | tuple[()], ingest: Ingest) -> float | None:
    """Seconds to wait for the stores; RFC 7240 has a preference that cannot be read ignored."""
    for value in prefer:
        match = _WAIT.search(value)
        if match is not None:
            return min(float(match[1]), ingest.max_wait)
    return ingest.max_wait if ingest.ack == "stores" else None


def _applied(wait: float | None) -> dict[str, str]:
    return {} if wait is None else {"Preference-Applied": f"wait={wait:g}"}


def accepted(
    log_id: str | None, correlation_id: str | None, policy: Policy, *, stored: bool = False, duplicate: bool = False
) -> dict[str, object]:
    """The answer to a single record."""
    payload: dict[str, object] = {
        "log_id": log_id,
        "status": "stored" if stored else "accepted",
        "duplicate": duplicate,
        "phase": policy.phase.label,
    }
    if correlation_id is not None:
        payload["correlation_id"] = correlation_id
    return payload


def _single(outcome: Outcome, wait: float | None) -> Words:
    payload = accepted(
        outcome.log_ids[0],
        outcome.correlation_id,
        outcome.policy,
        stored=outcome.stored,
        duplicate=bool(outcome.duplicates),
    )
    if outcome.states:
        payload["stores"] = outcome.states[0]
    return Words(201 if outcome.stored else 202, payload, _applied(wait))


def _batch(outcome: Outcome, wait: float | None) -> Words:
    errors = [_error(one) for one in outcome.refused]
    if not outcome.committed:
        message = f"{len(errors)} records were refused and strict=true was asked for, so nothing was stored; mend them"
        return Words(422, {"error": {"code": "batch_refused", "message": message, "errors": errors}}, {})
    accepted = sum(log_id is not None for log_id in outcome.log_ids)
    stored = outcome.stored and accepted > 0
    payload: dict[str, object] = {
        "accepted": accepted,
        "status": "stored" if stored else "accepted",
        "duplicates": outcome.duplicates,
        "log_ids": outcome.log_ids,
        "phase": outcome.policy.phase.label,
    }
    if outcome.states:
        payload["unsettled"] = [
            {"index": index, "log_id": outcome.log_ids[index], "stores": stores}
            for index, stores in sorted(outcome.states.items())
        ]
    if errors:
        payload["errors"] = errors
    return Words(207 if errors else 201 if stored else 202, payload, _applied(wait))


def _error(refused: Refused) -> dict[str, object]:
    return {
        "index": refused.index,
        "field": refused.field,
        "reason": refused.reason,
        "status": refused.status,
    }

"""GET /logs/{log_id}, GET /logs/{log_id}/status, GET /status."""

from aiohttp import web

from sidecar.api.errors import answer, error_answer
from sidecar.api.parts import PARTS, ApiParts
from sidecar.errors import BadRequest, Forbidden
from sidecar.phase import Phase
from sidecar.record import timestamp_text, to_dict
from sidecar.screening.identity import canonical


def _log_id(request: web.Request) -> str:
    try:
        return canonical(request.match_info["log_id"])
    except ValueError as error:
        raise BadRequest(f"log_id: {error}") from None


def _may_read(request: web.Request, parts: ApiParts) -> None:
    if parts.read_token.configured:
        parts.read_token.check(request)


async def get_log(request: web.Request) -> web.Response:
    """One record by id from the store that the phase reads from; strongly consistent."""
    parts = request.app[PARTS]
    _may_read(request, parts)
    log_id = _log_id(request)
    found = await parts.get(log_id)
    headers = {"X-Served-By": found.served_by, "X-Phase": found.phase, "X-Consistency": found.consistency}
    if found.owed is not None:
        headers["X-Owed-Records"] = str(found.owed)
    if found.record is None:
        return error_answer(
            404,
            "not_found",
            f"{found.served_by} has no record with this log_id; it may still be on its way, see its /status",
            headers,
        )
    services = parts.settings().reads.services
    if services is not None and found.record.service_name not in services:
        raise Forbidden("service_name: this record's service is not in reads.services")
    return answer(200, to_dict(found.record), headers)


async def get_log_status(request: web.Request) -> web.Response:
    """Where one record stands per store it is owed to, while it is in local retention."""
    parts = request.app[PARTS]
    _may_read(request, parts)
    status = await parts.record_status(_log_id(request))
    if status is None:
        return error_answer(
            404,
            "not_in_local_retention",
            "this sidecar holds nothing on it: never accepted here, or settled everywhere and trimmed; ask the store",
        )
    return answer(
        200,
        {
            "log_id": status.log_id,
            "accepted_at": timestamp_text(status.accepted_us),
            "phase": Phase(status.phase).label,
            "stores": status.stores,
            "required": sorted(status.required),
        },
    )


async def get_status(request: web.Request) -> web.Response:
    """The sidecar's own state; no payload, no secret."""
    return answer(200, request.app[PARTS].status())

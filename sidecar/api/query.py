"""GET /logs, /logs/errors, /logs/count: the query string read strictly, the answer and its headers.

Every parameter is known, given once, and in the one form allowed: a misspelt filter that was passed over would answer
more than was asked for. What is within bounds is for ``sidecar.reads`` to say.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from types import MappingProxyType
from typing import Any, Final, Literal, cast

import msgspec
from aiohttp import web

from sidecar.api import openapi
from sidecar.api.errors import answer
from sidecar.api.parts import PARTS
from sidecar.errors import BadRequest
from sidecar.reads import Answer, Reads
from sidecar.record import LogRecord, timestamp_text, to_dict
from sidecar.screening.timestamps import Timestamps
from sidecar.stores.base import (
    ByApplication,
    ByCorrelation,
    ByService,
    CountGroup,
    CountQuery,
    ErrorsOn,
    Query,
    Summary,
)

_PAGE: Final = frozenset({"limit", "cursor", "view"})
_RANGE: Final = frozenset({"start", "end"})
_COUNT: Final = _RANGE | {"service_name", "is_success", "group_by", "mode"}
_KEYS: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "application_id": _PAGE | {"application_id"},
        "service_name": _PAGE | _RANGE | {"service_name"},
        "correlation_id": _PAGE | {"correlation_id"},
    }
)
"""Which filter goes with which parameters; exactly one filter is given."""
_INTEGER: Final = re.compile(r"-?[0-9]{1,19}", re.ASCII)
_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)
_INT64: Final = 2**63
_TEXT_LENGTH: Final = 100
_EPOCH_DAY: Final = date(1970, 1, 1).toordinal()
_BOOLEANS: Final = MappingProxyType({"true": True, "false": False})

Parameters = Mapping[str, str]


def routes(reads: Reads) -> Sequence[web.RouteDef]:
    """The read routes and GET /openapi.json; put them before any route that matches ``/logs/{log_id}``."""
    handlers = _Handlers(reads)
    return (
        web.get("/logs", handlers.get_logs),
        web.get("/logs/errors", handlers.get_errors),
        web.get("/logs/count", handlers.get_count),
        web.get("/openapi.json", openapi.get_openapi),
    )


class _Handlers:
    """Handlers of the read routes."""

    def __init__(self, reads: Reads) -> None:
        self._reads = reads

    async def get_logs(self, request: web.Request) -> web.Response:
        """One page of an application's, a service's or a correlation's records."""
        _check_token(request)
        given = _parameters(request, frozenset().union(*_KEYS.values()))
        filters = [name for name in _KEYS if name in given]
        if len(filters) != 1:
            raise BadRequest(
                "query: give one of application_id, correlation_id, or service_name with start and end;"
                f" seen {len(filters)} of them"
            )
        (name,) = filters
        surplus = given.keys() - _KEYS[name]
        if surplus:
            raise BadRequest(f"{min(surplus)}: does not go with {name}; allowed are {_listed(_KEYS[name])}")
        return await self._page(_FILTERS[name](given), given)

    async def get_errors(self, request: web.Request) -> web.Response:
        """One page of the failures of a UTC day."""
        _check_token(request)
        given = _parameters(request, _PAGE | {"date"})
        return await self._page(ErrorsOn(_day(given)), given)

    async def get_count(self, request: web.Request) -> web.Response:
        """How many, of a range of time."""
        _check_token(request)
        given = _parameters(request, _COUNT)
        service = _text(given, "service_name", least=1) if "service_name" in given else None
        success = _choice(given, "is_success", _BOOLEANS) if "is_success" in given else None
        query = CountQuery(*_range(given), service, success)
        mode = _choice(given, "mode", {"exact": "exact", "estimate": "estimate"}, default="exact")
        group = _choice(given, "group_by", {"date": "date", "service": "service", "": None}, default="")
        said: dict[str, object] = {"start": timestamp_text(query.start), "end": timestamp_text(query.end)}
        if mode == "estimate":
            if group is not None:
                raise BadRequest("group_by: does not go with mode=estimate; leave one of them out")
            about, as_of = await self._reads.estimate(query)
            said |= {"count": about.value.count, "exact": False, "mode": mode, "as_of": timestamp_text(as_of)}
            said["method"] = about.value.method
            return answer(200, said, headers_of(about))
        found = await self._reads.count(query, cast("CountGroup | None", group))
        numbers = found.value
        said |= {"count": numbers.count, "exact": True, "mode": mode, "as_of": timestamp_text(numbers.as_of)}
        if numbers.groups is not None:
            said["groups"] = [{group: key, "count": number} for key, number in sorted(numbers.groups.items())]
        return answer(200, said, headers_of(found))

    async def _page(self, query: Query, given: Parameters) -> web.Response:
        found = await self._reads.page(
            query,
            cursor_text=given.get("cursor"),
            limit=_integer(given, "limit") if "limit" in given else None,
            view=cast(
                "Literal['full', 'summary']",
                _choice(given, "view", {"full": "full", "summary": "summary"}, default="full"),
            ),
        )
        page = found.value
        records = [shown(entry) for entry in page.entries]
        return answer(200, {"records": records, "next_cursor": page.next_cursor}, headers_of(found))


def shown(entry: LogRecord | Summary) -> dict[str, Any]:
    """The JSON shape of a record or a summary."""
    if isinstance(entry, LogRecord):
        return to_dict(entry)
    return {**msgspec.structs.asdict(entry), "log_timestamp": timestamp_text(entry.log_timestamp)}


def headers_of(found: Answer[Any]) -> dict[str, str]:
    """Who served it, in which phase, how consistent, and how many records this sidecar still owes to that store."""
    return {
        "X-Served-By": found.served_by,
        "X-Phase": found.policy.phase.label,
        "X-Consistency": found.consistency,
        "X-Owed-Records": str(found.owed),
    }


def _check_token(request: web.Request) -> None:
    token = request.app[PARTS].read_token
    if token.configured:
        token.check(request)


def _parameters(request: web.Request, allowed: frozenset[str]) -> Parameters:
    given = request.query
    for name in given:
        if name not in allowed:
            raise BadRequest(f"query: a parameter that is not known here; allowed are {_listed(allowed)}")
        if len(given.getall(name)) > 1:
            raise BadRequest(f"{name}: given more than once; give it once")
    return given


def _listed(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))


def _text(given: Parameters, name: str, *, least: int) -> str:
    value = given[name]
    if not least <= len(value) <= _TEXT_LENGTH:
        raise BadRequest(f"{name}: {len(value)} characters, allowed are {least} to {_TEXT_LENGTH}")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRequest(f"{name}: holds a NUL or a lone surrogate, which no record holds; send text in UTF-8")
    return value


def _integer(given: Parameters, name: str) -> int:
    if not _INTEGER.fullmatch(given[name]) or not -_INT64 <= (value := int(given[name])) < _INT64:
        raise BadRequest(f"{name}: not a whole number of 64 bits; write decimal digits")
    return value


def _choice(given: Parameters, name: str, table: Mapping[str, Any], default: str | None = None) -> Any:
    value = given.get(name, default)
    if value is None or value not in table or (name in given and not value):
        raise BadRequest(f"{name}: allowed are {', '.join(key for key in table if key)}")
    return table[value]


def _range(given: Parameters) -> tuple[int, int]:
    """``start`` and ``end``, both inclusive, microseconds since the epoch."""
    found = []
    for name in ("start", "end"):
        if name not in given:
            raise BadRequest(f"{name}: missing; give start and end, both inclusive, e.g. 2026-11-22T17:24:52Z")
        text = given[name]
        try:
            found.append(Timestamps().parse(text))
        except ValueError as error:
            plus = "; in a query string write + as %2B" if _lost_plus(text) else ""
            raise BadRequest(f"{name}: {error}{plus}") from None
    return found[0], found[1]


def _lost_plus(text: str) -> bool:
    """Whether the + of an offset came as a blank, as query strings have it."""
    return len(text) > len("2026-11-22T17:24:52") and text[-6:-5] == " "


def _day(given: Parameters) -> int:
    """``date`` as days since the epoch."""
    text = given.get("date", "")
    try:
        if not _DATE.fullmatch(text):
            raise ValueError  # noqa: TRY301  (one refusal for every way to be no date)
        return date.fromisoformat(text).toordinal() - _EPOCH_DAY
    except ValueError:
        raise BadRequest("date: required, a UTC day written YYYY-MM-DD, e.g. 2026-11-22") from None


_FILTERS: Final[Mapping[str, Callable[[Parameters], Query]]] = MappingProxyType(
    {
        "application_id": lambda given: ByApplication(_integer(given, "application_id")),
        "correlation_id": lambda given: ByCorrelation(_text(given, "correlation_id", least=0)),
        "service_name": lambda given: ByService(_text(given, "service_name", least=1), *_range(given)),
    }
)

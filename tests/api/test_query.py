"""The read routes: what is asked must be exact, what is answered says where it came from, a failure says so."""

from urllib.parse import urlencode

import msgspec
import pytest

from sidecar.api import query
from sidecar.errors import RetryClass, StoreError
from sidecar.phase import STORES, Phase
from sidecar.record import to_dict
from sidecar.settings import Settings
from sidecar.stores.base import summary_of
from tests.api.door import open_door
from tests.parts.reads import ReadsStand
from tests.stores.records import BASE, record

DAY_RANGE = {"start": "2026-01-15T00:00:00Z", "end": "2026-01-16T01:00:00+01:00"}
ROUTES = {
    "application": "/logs?application_id=7",
    "service": "/logs?" + urlencode({"service_name": "orders", **DAY_RANGE}),
    "correlation": "/logs?correlation_id=corr-1",
    "errors": "/logs/errors?date=2026-01-15",
    "count": "/logs/count?" + urlencode(DAY_RANGE),
    "estimate": "/logs/count?" + urlencode({**DAY_RANGE, "mode": "estimate"}),
    "summary": "/logs?application_id=7&view=summary",
}


@pytest.fixture
async def stand():
    """Reads over memory, no shadow."""
    stand = ReadsStand()
    stand.configure(shadow_sample=0.0)
    return stand


@pytest.fixture
async def door(tmp_path, stand):
    """A running application with the read routes."""
    async with open_door(tmp_path, Settings(), query.routes(stand.reads)) as door:
        yield door


def failures(number=5):
    """Failures with every key, a second apart."""
    return [record(i, log_timestamp=BASE + i * 1_000_000, is_success=False, status_code=500) for i in range(number)]


@pytest.mark.parametrize("route", ["application", "service", "correlation", "errors"])
async def test_a_page_is_newest_first_with_a_cursor_until_there_is_no_more(door, stand, route):
    """Two pages of three and two; the shape is {records, next_cursor}; each field as stored."""
    await stand.write(failures())
    status, first, _ = await door.get(f"{ROUTES[route]}&limit=3")
    assert (status, list(first)) == (200, ["records", "next_cursor"])
    assert first["records"] == [to_dict(r) for r in failures()[:1:-1]]
    _, second, _ = await door.get(f"{ROUTES[route]}&limit=3&cursor={first['next_cursor']}")
    assert second == {"records": [to_dict(r) for r in failures()[1::-1]], "next_cursor": None}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("phase", list(Phase))
async def test_every_answer_says_who_served_it(door, stand, route, phase):
    """X-Served-By, X-Phase, X-Consistency, X-Owed-Records."""
    stand.phase, stand.pending = phase, {"postgres": 3, "dynamodb": 4}
    serving = ("postgres", "postgres", "dynamodb", "dynamodb")[phase]
    status, _, headers = await door.get(ROUTES[route])
    assert status == 200
    said = {name: headers[f"X-{name}"] for name in ("Served-By", "Phase", "Consistency", "Owed-Records")}
    assert said == {
        "Served-By": serving,
        "Phase": phase.label,
        "Consistency": "strong",
        "Owed-Records": str(stand.pending[serving]),
    }


async def test_a_summary_has_the_six_fields_of_the_indexes(door, stand):
    """No payload, no service; the same order."""
    await stand.write(failures(2))
    _, page, _ = await door.get(ROUTES["summary"])
    expected = [msgspec.structs.asdict(summary_of(r)) for r in failures(2)[::-1]]
    for each, r in zip(expected, failures(2)[::-1], strict=True):
        each["log_timestamp"] = to_dict(r)["log_timestamp"]
    assert page["records"] == expected


async def test_counts_say_that_they_are_exact_and_as_of_when(door, stand):
    """The number, the range as understood, as_of; groups by date and by service."""
    await stand.write([*failures(3), record(9, service_name="billing")])
    _, count, _ = await door.get(ROUTES["count"])
    assert (count["count"], count["exact"], count["mode"]) == (4, True, "exact")
    assert (count["start"], count["end"]) == ("2026-01-15T00:00:00.000000Z", "2026-01-16T00:00:00.000000Z")
    assert count["as_of"] > "2026"
    _, count, _ = await door.get(ROUTES["count"] + "&group_by=service")
    assert count["groups"] == [{"service": "billing", "count": 1}, {"service": "orders", "count": 3}]
    _, count, _ = await door.get(ROUTES["count"] + "&group_by=date&is_success=false&service_name=orders")
    assert (count["count"], count["groups"]) == (3, [{"date": "2026-01-15", "count": 3}])


async def test_an_estimate_says_that_it_is_one_and_how_it_was_made(door, stand):
    """Exact is false; as_of and method say of when it is and what it is worth."""
    await stand.write(failures(3))
    _, found, _ = await door.get(ROUTES["estimate"])
    assert (found["count"], found["exact"], found["mode"]) == (3, False, "estimate")
    assert found["method"] == "counted in memory"
    assert found["as_of"] > "2026"


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/logs", "one of application_id, correlation_id, or service_name"),
        ("/logs?application_id=7&correlation_id=c", "seen 2"),
        ("/logs?limit=3", "seen 0"),
        ("/logs?application_id=7&limt=3", "allowed are application_id"),
        ("/logs?application_id=7&start=2026-01-15T00:00:00Z", "start: does not go with application_id"),
        ("/logs?application_id=7&application_id=7", "application_id: given more than once"),
        ("/logs?application_id=seven", "application_id: not a whole number"),
        ("/logs?application_id=9223372036854775808", "application_id: not a whole number of 64 bits"),
        ("/logs?application_id=%D9%A7", "application_id: not a whole number"),
        ("/logs?application_id=" + "9" * 5000, "application_id: not a whole number"),
        ("/logs?application_id=", "application_id: not a whole number"),
        ("/logs?application_id=7&limit=0", "limit: allowed are 1 to 1000"),
        ("/logs?application_id=7&limit=x", "limit: not a whole number"),
        ("/logs?application_id=7&view=short", "view: allowed are full, summary"),
        ("/logs?application_id=7&view=", "view: allowed are full, summary"),
        ("/logs?application_id=7&cursor=abc", "cursor: not one of ours"),
        ("/logs?application_id=7&cursor=", "cursor: not one of ours"),
        ("/logs?correlation_id=" + "c" * 101, "correlation_id: 101 characters"),
        ("/logs?correlation_id=a%00b", "correlation_id: holds a NUL"),
        ("/logs?service_name=orders", "start: missing"),
        ("/logs?service_name=orders&start=2026-01-15T00:00:00Z", "end: missing"),
        ("/logs?service_name=orders&start=2026-01-15T00:00:00&end=2026-01-16T00:00:00Z", "start: "),
        ("/logs?service_name=orders&start=2026-01-15T00:00:00%2B25:00&end=2026-01-16T00:00:00Z", "offset"),
        ("/logs?service_name=orders&start=2026-01-15T00:00:00+02:00&end=2026-01-16T00:00:00Z", "write + as %2B"),
        ("/logs?service_name=orders&start=2026-01-16T00:00:00Z&end=2026-01-15T00:00:00Z", "start: after end"),
        ("/logs?service_name=orders&start=2026-01-01T00:00:00Z&end=2026-03-01T00:00:00Z", "reads.max_days"),
        ("/logs?service_name=&start=2026-01-15T00:00:00Z&end=2026-01-15T00:00:00Z", "service_name: 0 characters"),
        ("/logs/errors", "date: required"),
        ("/logs/errors?date=2026-02-30", "date: required, a UTC day"),
        ("/logs/errors?date=2026-W01-1", "date: required, a UTC day"),
        ("/logs/errors?date=20260101", "date: required, a UTC day"),
        ("/logs/errors?date=2026-01-15&service_name=x", "allowed are cursor, date, limit, view"),
        ("/logs/count", "start: missing"),
        (ROUTES["count"] + "&is_success=yes", "is_success: allowed are true, false"),
        (ROUTES["count"] + "&group_by=hour", "group_by: allowed are date, service"),
        (ROUTES["count"] + "&mode=fast", "mode: allowed are exact, estimate"),
        (ROUTES["estimate"] + "&group_by=date", "group_by: does not go with mode=estimate"),
        ("/logs/count?start=2026-01-01T00:00:00Z&end=2026-03-01T00:00:00Z", "reads.count_max_days"),
    ],
)
async def test_what_is_asked_wrongly_is_told_and_no_store_is_asked(door, stand, path, named):
    """400 with the parameter and what is allowed."""
    status, body, _ = await door.get(path)
    assert status == 400
    assert named in body["error"]["message"]
    assert not any(stand.stores[name].calls for name in STORES)


async def test_a_refusal_does_not_repeat_what_was_sent(door):
    """No value of the query comes back in the answer, nor an unknown parameter's name."""
    for path in ("/logs?CANARY=1", "/logs?application_id=CANARY", "/logs?application_id=7&view=CANARY"):
        status, body, _ = await door.get(path)
        assert status == 400
        assert "CANARY" not in body["error"]["message"]


async def test_a_cursor_of_another_query_is_refused(door, stand):
    """400, also where only the range differs."""
    await stand.write(failures())
    _, page, _ = await door.get("/logs?application_id=7&limit=1")
    status, body, _ = await door.get(f"/logs?application_id=8&cursor={page['next_cursor']}")
    assert (status, body["error"]["code"]) == (400, "bad_request")
    assert "another query" in body["error"]["message"]


async def test_the_empty_correlation_id_is_a_correlation_id(door, stand):
    """It finds records with an empty one and not those without one."""
    await stand.write([record(1, correlation_id=""), record(2, correlation_id=None)])
    _, page, _ = await door.get("/logs?correlation_id=")
    assert [r["correlation_id"] for r in page["records"]] == [""]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("phase", [Phase.DUAL_WRITE, Phase.DYNAMO_ONLY])
async def test_a_store_that_is_down_is_503_with_store_and_reason(door, stand, route, phase):
    """Never 200, never an empty list."""
    stand.phase = phase
    serving = ("postgres", "postgres", "dynamodb", "dynamodb")[phase]
    stand.stores[serving].down()
    status, body, headers = await door.get(ROUTES[route])
    assert status == 503
    error = body["error"]
    assert (error["code"], error["store"], error["message"]) == ("store_unavailable", serving, "planted by the test")
    assert int(headers["Retry-After"]) >= 1
    assert "records" not in body


@pytest.mark.parametrize("route", ROUTES)
async def test_a_store_that_is_silent_is_504_with_store_and_setting(door, stand, route):
    """The answer names reads.timeout."""
    stand.configure(timeout=0.05)
    stand.stores["postgres"].gate.clear()
    status, body, _ = await door.get(ROUTES[route])
    assert status == 504
    assert body["error"]["store"] == "postgres"
    assert "reads.timeout" in body["error"]["message"]


async def test_a_store_that_throttles_says_when_to_come_again(door, stand):
    """503 with Retry-After."""
    stand.stores["postgres"].failure = StoreError("postgres", RetryClass.THROTTLE, "slow down")
    status, _, headers = await door.get(ROUTES["errors"])
    assert (status, headers["Retry-After"]) == (503, "1")


@pytest.mark.parametrize("route", ROUTES)
async def test_reads_need_the_token_where_one_is_configured(door, stand, route, tmp_path):
    """401 without it and with a wrong one; the right one reads; no store is asked before."""
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    door.settings = msgspec.structs.replace(
        door.settings, reads=msgspec.structs.replace(door.settings.reads, token_file=str(token))
    )
    for headers in (None, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
        status, _, answered = await door.get(ROUTES[route], headers)
        assert (status, answered["WWW-Authenticate"]) == (401, "Bearer")
    assert not stand.stores["postgres"].calls
    status, _, _ = await door.get(ROUTES[route], {"Authorization": "Bearer s3cret"})
    assert status == 200


async def test_a_service_that_is_not_allowed_is_403(door, stand):
    """Named by the setting."""
    stand.configure(services=("billing",))
    for path in (ROUTES["service"], ROUTES["count"] + "&service_name=orders"):
        status, body, _ = await door.get(path)
        assert (status, body["error"]["code"]) == (403, "forbidden")
        assert "reads.services" in body["error"]["message"]


async def test_too_many_reads_are_503_busy(door, stand):
    """The code says that it is the reads, not the store."""
    stand.configure(in_flight=1, waiting=0)
    stand.stores["postgres"].gate.clear()
    import asyncio

    from tests.parts.sidecar import eventually

    first = asyncio.create_task(door.get(ROUTES["errors"]))
    await eventually(lambda: stand.stores["postgres"].calls)
    status, body, headers = await door.get(ROUTES["errors"])
    assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "reads_busy", "1")
    stand.stores["postgres"].gate.set()
    assert (await first)[0] == 200

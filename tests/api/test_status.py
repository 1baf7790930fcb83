"""GET /logs/{log_id}, GET /logs/{log_id}/status, GET /status; read tokens; the app's routes and Host names."""

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from aiohttp import UnixConnector, web
from aiohttp.client import ClientSession

from sidecar.api.listener import Listener, split_address
from sidecar.errors import ConfigError, RetryClass, StoreError
from sidecar.record import LogRecord
from sidecar.settings import Listen, Reads, Settings
from tests.api.door import Door, open_door

RECORD = LogRecord(
    "3f2b8c1e-5a4d-4e6f-9a8b-7c6d5e4f3a2b", 7, "INFO", "s", '{"a":1}', None, 200, True, None, 5, 0, "c", ""
)


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    """A running door."""

    async def surprise(request: web.Request) -> web.Response:
        raise KeyError(request.query["value"])

    async def errors(_: web.Request) -> web.Response:
        return web.json_response({"route": "errors"})

    routes = [web.get("/surprise", surprise), web.get("/logs/errors", errors)]
    async with open_door(tmp_path / "spool", routes=routes) as opened:
        yield opened


def code(payload: dict[str, object]) -> object:
    """The error's code."""
    error = payload["error"]
    assert isinstance(error, dict)
    return error["code"]


async def test_a_record_by_id(door: Door) -> None:
    """Thirteen fields, null and empty apart, and who served it how."""
    door.records[RECORD.log_id] = RECORD
    status, payload, headers = await door.get(f"/logs/{RECORD.log_id.upper()}")
    assert status == 200
    assert payload["log_timestamp"] == "1970-01-01T00:00:00.000000Z"
    assert (payload["request_data"], payload["response_data"], payload["user_id"]) == ('{"a":1}', None, "")
    assert len(payload) == 13
    assert (headers["X-Served-By"], headers["X-Phase"], headers["X-Consistency"]) == (
        "postgres",
        "dual_write",
        "strong",
    )


async def test_a_record_that_the_store_does_not_have_is_404(door: Door) -> None:
    """The store answered and has none; the answer still says who."""
    status, payload, headers = await door.get(f"/logs/{RECORD.log_id}")
    assert (status, code(payload), headers["X-Served-By"]) == (404, "not_found", "postgres")


@pytest.mark.parametrize(
    ("failure", "status", "retry"),
    [
        (StoreError("postgres", RetryClass.TRANSIENT, "connection refused", "08006"), 503, True),
        (StoreError("postgres", RetryClass.TRANSIENT, "no answer in time", "timeout"), 504, True),
        (StoreError("dynamodb", RetryClass.BLOCKED, "access denied", "AccessDeniedException"), 503, False),
    ],
)
async def test_a_failed_read_is_never_empty(door: Door, failure: StoreError, status: int, retry: bool) -> None:
    """503 or 504 with the store and the reason; Retry-After where trying again can help."""
    door.failure = failure
    got, payload, headers = await door.get(f"/logs/{RECORD.log_id}")
    error = payload["error"]
    assert isinstance(error, dict)
    assert (got, error["store"], error["message"]) == (status, failure.store, failure.reason)
    assert ("Retry-After" in headers) is retry


@pytest.mark.parametrize(
    "path", ["/logs/x", "/logs/x/status", "/logs/00000000-0000-0000-0000-000000000000", "/logs/%00"]
)
async def test_an_id_that_is_none_is_400(door: Door, path: str) -> None:
    """Refused before any store is asked."""
    status, payload, _ = await door.get(path)
    assert (status, code(payload)) == (400, "bad_request")


async def test_the_status_of_a_record_follows_its_delivery(door: Door) -> None:
    """Pending, then delivered, store by store; required names whom the phase requires."""
    _, posted, _ = await door.post({"service_name": "s"})
    path = f"/logs/{posted['log_id']}/status"
    status, payload, _ = await door.get(path)
    assert status == 200
    assert payload["stores"] == {"postgres": "pending", "dynamodb": "pending"}
    assert (payload["required"], payload["phase"], payload["log_id"]) == (["postgres"], "dual_write", posted["log_id"])
    await door.deliver("dynamodb")
    assert (await door.get(path))[1]["stores"] == {"postgres": "pending", "dynamodb": "delivered"}


async def test_an_unknown_record_is_not_in_local_retention(door: Door) -> None:
    """Never 'delivered' from absence."""
    status, payload, _ = await door.get(f"/logs/{RECORD.log_id}/status")
    assert (status, code(payload)) == (404, "not_in_local_retention")


async def test_status_is_what_the_app_says(door: Door) -> None:
    """GET /status passes it on."""
    assert (await door.get("/status"))[:2] == (200, {"phase": "dual_write"})


async def test_named_routes_come_before_ids(door: Door) -> None:
    """/logs/errors is a route of the query part, not a record called errors."""
    assert (await door.get("/logs/errors"))[1] == {"route": "errors"}


async def test_a_defect_is_500_without_detail(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    """Type and place are logged; the message of the exception, which may quote a record, is nowhere."""
    with caplog.at_level(logging.ERROR):
        status, payload, _ = await door.get("/surprise?value=canary-4711")
    assert (status, code(payload)) == (500, "internal")
    assert "KeyError" in caplog.text
    assert "surprise" in caplog.text
    assert "canary-4711" not in caplog.text + str(payload)


async def test_reads_need_the_token_where_one_is_configured(door: Door, tmp_path: Path) -> None:
    """Missing, wrong, other scheme: 401 with a challenge; the right one passes; a changed file counts at once."""
    token = tmp_path / "token"
    token.write_text("right\n")
    door.settings = msgspec.structs.replace(door.settings, reads=Reads(token_file=str(token)))
    door.records[RECORD.log_id] = RECORD
    path = f"/logs/{RECORD.log_id}"
    for value in (None, "", "Bearer", "Bearer wrong", "Basic right", "right", "Bearer right2", "Bearer \udcff"):
        headers = {} if value is None else {"Authorization": value}
        status, payload, answered = await door.get(path, headers)
        assert (status, code(payload), answered["WWW-Authenticate"]) == (401, "unauthorized", "Bearer")
        assert (await door.get(path + "/status", headers))[0] == 401
    assert (await door.get(path, {"Authorization": "bearer right"}))[0] == 200
    token.write_text("changed, and longer")
    assert (await door.get(path, {"Authorization": "Bearer right"}))[0] == 401
    assert (await door.get(path, {"Authorization": "Bearer changed, and longer"}))[0] == 200
    for lost in ("", None):
        if lost is None:
            token.unlink()
        else:
            token.write_text(lost)
        assert (await door.get(path, {"Authorization": "Bearer changed, and longer"}))[0] == 401
        assert (await door.get(path, {"Authorization": "Bearer "}))[0] == 401
    assert (await door.post({"service_name": "s"}))[0] == 202


async def test_services_outside_the_allow_list_are_forbidden(door: Door) -> None:
    """reads.services is applied to the record that was found."""
    door.records[RECORD.log_id] = RECORD
    for services, status in ((("other",), 403), (("s",), 200), (None, 200)):
        door.settings = msgspec.structs.replace(door.settings, reads=Reads(services=services))
        assert (await door.get(f"/logs/{RECORD.log_id}"))[0] == status


async def test_a_unix_socket_has_no_host_check(tmp_path: Path) -> None:
    """Whoever can open the socket is here; its mode keeps others out; it is gone after stopping."""
    path = tmp_path / "s.sock"
    settings = Settings(listen=Listen(app=f"unix:{path}"))
    async with open_door(tmp_path / "spool", settings, address=f"unix:{path}") as door:
        assert path.stat().st_mode & 0o777 == 0o660
        async with (
            ClientSession(connector=UnixConnector(str(path))) as client,
            client.post("http://anything.example/logs", json={"service_name": "s"}) as r,
        ):
            assert r.status == 202
        assert door.listener.url == f"unix:{path}"
    assert not path.exists()


async def test_configured_host_names_are_accepted(tmp_path: Path) -> None:
    """listen.hosts and the listen address's own host; 0.0.0.0 is nobody's name."""
    settings = Settings(listen=Listen(app="0.0.0.0:0", hosts=("Logs.Internal",)))
    async with open_door(tmp_path / "spool", settings) as door:
        for host, status in (("logs.internal", 202), ("LOGS.internal:80", 202), ("0.0.0.0", 403), ("x.internal", 403)):
            assert (await door.post({"service_name": "s"}, {"Host": host}))[0] == status


async def test_an_address_in_use_is_named(door: Door) -> None:
    """Starting on a taken port says which, and what to do."""
    second = Listener(web.Application(), door.listener.url.removeprefix("http://"), Listen())
    with pytest.raises(ConfigError, match="free"):
        await second.start()
    await second.stop(0)


@pytest.mark.parametrize("address", ["", "8080", "host", "host:", "host:x", "host:65536", "host:-1", "host:٣"])
def test_an_address_needs_host_and_port(address: str) -> None:
    """Refused with what is allowed."""
    with pytest.raises(ConfigError, match="host:port"):
        split_address(address)


def test_addresses() -> None:
    """Names, IPv4, IPv6 in brackets."""
    assert split_address("localhost:1") == ("localhost", 1)
    assert split_address("[::1]:8080") == ("::1", 8080)

"""POST /ingest/{mapping} and POST /v1/logs: answers that each client understands, on a real spool and listener."""

import asyncio
import gzip
import json
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import (
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
)

from sidecar.config import interpret
from sidecar.errors import Busy
from sidecar.mapping import READY_MADE, otlp_protobuf
from sidecar.settings import Ingest, Settings
from tests.api.door import Door, open_door

CORPUS = Path(__file__).parents[1] / "corpus" / "clients"
JSON = "application/json"
LINES = "application/x-ndjson"
PROTOBUF = "application/x-protobuf"


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    """A running door."""
    async with open_door(tmp_path / "spool") as opened:
        yield opened


async def post(
    door: Door, path: str, body: object, kind: str | None = JSON, **headers: str
) -> tuple[int, bytes, Mapping[str, str]]:
    """POST a body; the status, the answer's body, its headers."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": kind, **headers} if kind else headers
    skip = () if kind else ("Content-Type",)
    async with door.client.post(door.listener.url + path, data=data, headers=headers, skip_auto_headers=skip) as answer:
        return answer.status, await answer.read(), answer.headers


async def stored(door: Door) -> list:
    """Every record in the spool."""
    frames = await door.spool.cursor("postgres").take(1000, 10**8)
    return [record for frame in frames for record in frame.records]


async def refused(door: Door) -> list[tuple[str, str, bytes]]:
    """Every dead letter of the door: class, field, source."""
    letters = await door.spool.dead_letters(store="door")
    return [(one.retry_class, one.code, one.raw) for one in letters]


def sample(name: str, default: float | None = None, **labels: str):
    """A metric's value."""
    return lambda door: door.metrics.registry.get_sample_value(f"sidecar_{name}", labels) or default


async def test_a_batch_with_a_bad_event_is_200_and_the_bad_one_a_dead_letter(door: Door) -> None:
    """Serilog's array: the neighbours are stored in order, the bad one is kept as it came and named in the answer."""
    good, other = json.loads((CORPUS / "serilog.json").read_bytes())[:2]
    bad = {**good, "Timestamp": "never"}
    status, answer, headers = await post(door, "/ingest/serilog", [good, bad, other])
    payload = json.loads(answer)
    assert (status, headers["Content-Type"], headers["Server"]) == (200, JSON, "sidecar")
    assert (payload["accepted"], payload["refused"], payload["duplicates"]) == (2, 1, 0)
    assert [(each["index"], each["field"]) for each in payload["errors"]] == [(1, "log_timestamp")]
    assert [record.log_type for record in await stored(door)] == ["INFO", "ERROR"]
    assert await refused(door) == [("refused", "log_timestamp", json.dumps(bad).encode())]
    assert sample("records_refused_total", reason="timestamp")(door) == 1


async def test_the_doors_own_refusals_keep_the_event_and_its_place(door: Door) -> None:
    """Too large, too far ahead, too deep: refused by screening, with the event as it was sent and not as mapped."""
    large = {"date": 1795368292.1, "log": "x" * 300_000}
    ahead = {"date": 99999999999, "log": "later"}
    deep = b'{"date":1795368292.2,"log":' + b"[" * 100 + b"]" * 100 + b"}"
    fine = {"date": 1795368292.3, "log": "fine"}
    body = b"\n".join([json.dumps(large).encode(), json.dumps(ahead).encode(), deep, json.dumps(fine).encode()])
    status, answer, _ = await post(door, "/ingest/fluent-bit", body, LINES)
    payload = json.loads(answer)
    assert (status, payload["accepted"]) == (200, 1)
    assert [(each["index"], each["status"]) for each in payload["errors"]] == [(0, 413), (1, 422), (2, 422)]
    assert [raw for _, _, raw in await refused(door)] == [json.dumps(large).encode(), json.dumps(ahead).encode(), deep]


async def test_an_event_that_only_the_slow_lane_can_read_harms_nobody(door: Door) -> None:
    """Half a surrogate pair and a NUL in texts that stay: stored byte for byte; in a text that a field wants: left."""
    odd = b'{"time":1795368292123,"name":"billing","level":50,"msg":"\\ud83d","nul":"\\u0000"}'
    body = b'{"logs":[{"time":1795368292124,"name":"a"},%b,{"time":1795368292125,"name":"b"}]}' % odd
    status, answer, _ = await post(door, "/ingest/pino", body)
    assert (status, json.loads(answer)["accepted"]) == (200, 3)
    first, second, third = await stored(door)
    assert (first.service_name, third.service_name) == ("a", "b")
    assert (second.service_name, second.error_message) == ("billing", None)
    assert second.request_data == '{"level":50,"msg":"\\ud83d","nul":"\\u0000"}'


async def test_a_resend_is_recognised_by_its_content(door: Door) -> None:
    """The whole batch again, then parts of it in another order: one effect, and said so."""
    body = json.loads((CORPUS / "fluent-bit.json").read_bytes())
    await post(door, "/ingest/fluent-bit", body)
    again = json.loads((await post(door, "/ingest/fluent-bit", body))[1])
    assert (again["accepted"], again["duplicates"]) == (2, 2)
    await post(door, "/ingest/fluent-bit", b"\n".join(json.dumps(each).encode() for each in body[::-1]), LINES)
    assert door.spool.counters("postgres").owed == 2
    recorded = (CORPUS / "fluent-bit.json").read_bytes()
    await post(door, "/ingest/fluent-bit", recorded)
    assert door.spool.counters("postgres").owed == 4, "other bytes: Python's spaces are not Fluent Bit's"


@pytest.mark.parametrize(
    ("name", "file", "kind", "count"),
    [
        ("serilog", "serilog.json", JSON, 3),
        ("serilog", "serilog-events.json", JSON, 1),
        ("fluent-bit", "fluent-bit.ndjson", LINES, 2),
        ("vector", "vector.ndjson", LINES, 2),
        ("vector", "vector.ndjson", "text/plain", 2),
        ("vector", "vector.json", None, 1),
        ("winston", "winston.json", JSON, 2),
        ("pino", "pino.json", "application/json; charset=utf-8", 2),
        ("syslog-ng", "syslog-ng.ndjson", None, 2),
    ],
)
async def test_recorded_bodies_are_stored_plain_gzipped_and_chunked(door: Door, name, file, kind, count) -> None:
    """As each client sends them; a body without a type is told by its first character."""
    body = (CORPUS / file).read_bytes()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    minted = name == "winston"  # each sending is a new record
    for repeated, (data, more) in enumerate(((body, {}), (gzip.compress(body), {"Content-Encoding": "gzip"}))):
        status, answer, _ = await post(door, f"/ingest/{name}", data, kind, **more)
        assert (status, json.loads(answer)["accepted"]) == (200, count)
        assert json.loads(answer)["duplicates"] == (count if repeated and not minted else 0)
    headers = {"Content-Type": kind or "text/plain"}
    async with door.client.post(f"{door.listener.url}/ingest/{name}", data=chunks(), headers=headers) as chunked:
        assert (chunked.status, (await chunked.json())["accepted"]) == (200, count)
    assert await refused(door) == []


async def test_push_back_is_503_with_retry_after_on_both_routes(door: Door) -> None:
    """Nothing is stored; OTLP's exporter reads a google.rpc.Status in its own encoding."""
    door.closed = Busy("fail_closed", "postgres is down", 7)
    for path, kind in (("/ingest/pino", JSON), ("/v1/logs", JSON), ("/v1/logs", PROTOBUF)):
        status, answer, headers = await post(door, path, b"{}", kind)
        assert (status, headers["Retry-After"], headers["Content-Type"]) == (503, "7", kind)
        assert b"postgres is down" in answer
        if path == "/v1/logs":
            assert (answer[:2] == b"\x08\x0e") if kind == PROTOBUF else (json.loads(answer)["code"] == 14)


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "headers"),
    [
        ("/ingest/nope", b"[]", JSON, 404, {}),
        ("/ingest/otlp", b"[]", JSON, 404, {}),
        ("/ingest/pino", b"[", JSON, 400, {}),
        ("/ingest/pino", b"5", JSON, 400, {}),
        ("/ingest/pino", b"[{}]", "application/xml", 415, {}),
        ("/ingest/pino", b"[{}]", "application/x-www-form-urlencoded", 415, {}),
        ("/ingest/pino", b"[{}]", JSON, 415, {"Content-Encoding": "zstd"}),
        ("/ingest/pino", b"[{}]", JSON, 400, {"Content-Encoding": "gzip"}),
        ("/ingest/pino", b"[{}]", JSON, 400, {"Idempotency-Key": "k"}),
        ("/ingest/pino?strict=true", b"[{}]", JSON, 400, {}),
        ("/v1/logs", b"[]", JSON, 400, {}),
        ("/v1/logs", b"\xff\xff", PROTOBUF, 400, {}),
        ("/v1/logs", b"{}", "text/plain", 415, {}),
        ("/v1/logs", b"{}", JSON, 415, {"Content-Encoding": "br"}),
    ],
)
async def test_what_cannot_be_read_is_a_clear_4xx(door: Door, *, path, body, kind, status, headers) -> None:
    """And nothing of it is stored or kept."""
    found, answer, sent = await post(door, path, body, kind, **headers)
    assert found == status
    assert len(answer) > 20
    assert sent["Content-Type"] == (PROTOBUF if kind == PROTOBUF else JSON)
    assert door.spool.counters("postgres").owed == 0
    assert await refused(door) == []


async def test_bounds_hold_on_both_routes(tmp_path: Path) -> None:
    """Body size and number of events: 413, in OTLP's case as a Status."""
    limits = Ingest(max_body_bytes=4096, max_records=3, max_record_bytes=1024)
    async with open_door(tmp_path, Settings(ingest=limits)) as door:
        logs = {"resourceLogs": [{"scopeLogs": [{"logRecords": [{}] * 4}]}]}
        for path, many in (("/ingest/pino", [{}] * 4), ("/v1/logs", logs)):
            assert (await post(door, path, many))[0] == 413
            assert (await post(door, path, b" " * 5000))[0] == 413
        assert door.spool.counters("postgres").owed == 0


def request(*bodies: str, nanos: int = 1_795_368_292_123_456_789) -> ExportLogsServiceRequest:
    """An OTLP request with one record for each body."""
    made = ExportLogsServiceRequest()
    logs = made.resource_logs.add()
    logs.resource.attributes.add(key="service.name").value.string_value = "billing"
    for number, body in enumerate(bodies):
        logs.scope_logs.add().log_records.add(time_unix_nano=nanos + number).body.string_value = body
    return made


async def test_otlp_is_answered_in_its_own_encoding(door: Door) -> None:
    """All good: an empty response; a refused record: counted, said, kept; both encodings."""
    status, answer, headers = await post(door, "/v1/logs", request("a", "b").SerializeToString(), PROTOBUF)
    assert (status, answer, headers["Content-Type"]) == (200, b"", PROTOBUF)
    mixed = request("c", "x" * 300_000, "d")
    status, answer, _ = await post(door, "/v1/logs", mixed.SerializeToString(), PROTOBUF)
    partial = ExportLogsServiceResponse.FromString(answer).partial_success
    assert (status, partial.rejected_log_records) == (200, 1)
    assert partial.error_message.startswith("record 1: record: larger than")
    status, answer, headers = await post(door, "/v1/logs", (CORPUS / "otlp.json").read_bytes())
    assert (status, json.loads(answer), headers["Content-Type"]) == (200, {}, JSON)
    bad = {"resourceLogs": [{"scopeLogs": [{"logRecords": [{"timeUnixNano": "soon"}, 5]}]}]}
    partial_json = json.loads((await post(door, "/v1/logs", bad))[1])["partialSuccess"]
    assert partial_json["rejectedLogRecords"] == "2"
    assert [record.service_name for record in await stored(door)] == ["billing"] * 6
    kept = await refused(door)
    assert [code for _, code, _ in kept] == ["record", "log_timestamp", "record"]
    assert json.loads(kept[0][2])["resource"] == {"attributes": {"service.name": "billing"}}


async def test_an_otlp_resend_has_no_second_effect(door: Door) -> None:
    """The exporter's retry after a lost answer, in either encoding."""
    body = request("a", "a", "b").SerializeToString()
    for _ in range(2):
        await post(door, "/v1/logs", body, PROTOBUF)
        await post(door, "/v1/logs", (CORPUS / "otlp.json").read_bytes())
    assert door.spool.counters("postgres").owed == 5


async def test_without_the_extra_protobuf_is_415_with_what_to_install(door: Door, monkeypatch) -> None:
    """The product starts and OTLP/JSON works; the answer is readable for an exporter that sends protobuf."""
    monkeypatch.setitem(sys.modules, "opentelemetry.proto.collector.logs.v1.logs_service_pb2", None)
    otlp_protobuf._request.cache_clear()
    try:
        status, answer, headers = await post(door, "/v1/logs", request("a").SerializeToString(), PROTOBUF)
        assert (status, headers["Content-Type"]) == (415, PROTOBUF)
        assert b"pip install 'hybrid-log-sidecar[otlp]'" in answer
        assert (await post(door, "/v1/logs", (CORPUS / "otlp.json").read_bytes()))[0] == 200
    finally:
        otlp_protobuf._request.cache_clear()


async def test_the_product_starts_without_the_extra() -> None:
    """Nothing of it is imported before a request in protobuf comes."""
    code = "import sys, sidecar.__main__, sidecar.app.serve; print([m for m in sys.modules if 'opentelemetry' in m])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert (await asyncio.wait_for(process.communicate(), 60))[0].strip() == b"[]"


async def test_a_changed_configuration_changes_the_mapping(door: Door) -> None:
    """From the next request on: a new mapping, a changed ready-made one, and OTLP's."""
    assert (await post(door, "/ingest/mine", [{}]))[0] == 404
    assert (await post(door, "/ingest/pino", []))[0] == 200  # in use before the change
    text = (
        "mappings:\n  mine: {service_name: {value: billing}}\n  otlp: {service_name: /resource/attributes/host.name}\n"
        "  pino: {correlation_id: /hostname}"
    )
    changed = interpret(text.encode(), "config.yaml", {}).settings.mappings
    door.settings = msgspec.structs.replace(door.settings, mappings=changed)
    assert (await post(door, "/ingest/mine", [{"a": 1}]))[0] == 200
    await post(door, "/ingest/pino", (CORPUS / "pino.json").read_bytes())
    await post(door, "/v1/logs", (CORPUS / "otlp.json").read_bytes())
    seen = [(record.service_name, record.correlation_id) for record in await stored(door)]
    assert seen[:3] == [("billing", None), ("billing", "h"), ("billing", "h")]
    assert {service for service, _ in seen[3:]} == {"h"}


async def test_a_request_may_wait_for_the_stores(door: Door) -> None:
    """Prefer: wait as at POST /logs; the status stays 200, the body says that they have it."""
    waiting = asyncio.ensure_future(post(door, "/ingest/pino", [{"msg": "m"}], Prefer="wait=10"))
    while door.spool.counters("postgres").owed == 0:
        await asyncio.sleep(0)
    await door.deliver("postgres", "dynamodb")
    status, answer, _ = await waiting
    assert (status, json.loads(answer)["status"]) == (200, "stored")


bodies = st.one_of(
    st.binary(max_size=100),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(
                st.sampled_from(
                    [
                        "level",
                        "time",
                        "date",
                        "logs",
                        "resourceLogs",
                        "scopeLogs",
                        "logRecords",
                        "body",
                        "attributes",
                        "@t",
                    ]
                ),
                inner,
                max_size=4,
            ),
        ),
        max_leaves=20,
    ).map(lambda value: json.dumps(value).encode()),
)


async def test_no_body_makes_a_500_and_none_is_lost(tmp_path: Path) -> None:
    """Anything, to every route, in every type: 200 or 4xx; what was accepted is owed, what was refused is kept."""
    async with open_door(tmp_path / "spool") as door:
        loop = asyncio.get_running_loop()
        routes = [f"/ingest/{name}" for name in READY_MADE if name != "otlp"] + ["/v1/logs"]
        counted = {"accepted": 0, "refused": 0, "requests": 0}

        async def send(path: str, body: bytes, kind: str) -> None:
            status, answer, _ = await post(door, path, body, kind)
            counted["requests"] += 1
            assert status == 200 or 400 <= status < 500, (status, answer)
            if status == 200 and path != "/v1/logs":
                payload = json.loads(answer)
                counted["accepted"] += payload["accepted"] - payload["duplicates"]
                counted["refused"] += payload["refused"]

        @given(st.sampled_from(routes), bodies, st.sampled_from([JSON, LINES, "text/plain", PROTOBUF]))
        @hypothesis_settings(suppress_health_check=list(HealthCheck), deadline=None, max_examples=300)
        def fuzz(path: str, body: bytes, kind: str) -> None:
            asyncio.run_coroutine_threadsafe(send(path, body, kind), loop).result(30)

        await asyncio.to_thread(fuzz)
        assert counted["requests"] >= 100
        assert door.spool.counters("postgres").owed >= counted["accepted"] > 0
        assert len(await refused(door)) >= min(counted["refused"], 1)

"""POST /logs: shapes, answers, preferences, errors; on a real spool behind a real listener."""

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from sidecar.errors import Busy
from sidecar.phase import Phase
from sidecar.screening import derive_ids
from sidecar.settings import Ingest, Settings
from tests.api.door import JSON, Door, open_door

RECORD = {"service_name": "s"}
OWN = {"log_id": "3f2b8c1e-5a4d-4e6f-9a8b-7c6d5e4f3a2b", "log_timestamp": "2026-11-22T11:00:00Z", "service_name": "s"}


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    """A running door."""
    async with open_door(tmp_path / "spool") as opened:
        yield opened


def error(payload: dict[str, object]) -> dict[str, object]:
    """The one shape that errors have."""
    assert list(payload) == ["error"]
    inner = payload["error"]
    assert isinstance(inner, dict)
    assert inner["code"]
    assert inner["message"]
    return inner


async def test_a_single_record(door: Door) -> None:
    """202 with its id, its phase, its correlation id; Server without a version."""
    status, payload, headers = await door.post({**OWN, "correlation_id": "c-1"})
    assert status == 202
    assert payload == {
        "log_id": OWN["log_id"],
        "status": "accepted",
        "duplicate": False,
        "phase": "dual_write",
        "correlation_id": "c-1",
    }
    assert headers["Server"] == "sidecar"
    assert headers["Content-Type"] == "application/json"
    assert (await door.post({**OWN, "correlation_id": "c-1"}))[1]["duplicate"] is True
    assert door.spool.counters("postgres").owed == 1


@pytest.mark.parametrize(
    ("body", "content_type", "count"),
    [
        (json.dumps([RECORD, RECORD]).encode(), "application/json", 2),
        (json.dumps({"logs": [RECORD, RECORD]}).encode(), "application/json; charset=utf-8", 2),
        (b'{"service_name":"a"}\n\n{"service_name":"b"}', "application/x-ndjson", 2),
        (b'{"ServiceName":"a"}\r\n{"serviceName":"b"}\r\n', 'application/jsonl; charset="UTF-8"', 2),
        (b"[]", "Application/JSON", 0),
        (b'{"logs":[]}', "application/json", 0),
    ],
)
async def test_a_batch(door: Door, body: bytes, content_type: str, count: int) -> None:
    """202 with the ids in input order; an empty batch is accepted as such."""
    status, payload, _ = await door.post(body, {"Content-Type": content_type})
    assert status == 202
    ids = payload["log_ids"]
    assert isinstance(ids, list)
    assert len(set(ids)) == payload["accepted"] == count
    assert payload["duplicates"] == []
    assert "errors" not in payload
    assert door.spool.counters("postgres").owed == count


async def test_a_missing_content_type_is_json(door: Door) -> None:
    """Nothing said means JSON."""
    async with door.client.post(
        f"{door.listener.url}/logs", data=b'{"service_name":"s"}', skip_auto_headers=["Content-Type"]
    ) as r:
        assert r.status == 202


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/xml",
        "application/x-www-form-urlencoded",
        "application/json; charset=latin-1",
        "json",
        "*/*",
        ";",
    ],
)
async def test_another_media_type_is_415(door: Door, content_type: str) -> None:
    """What is not read here is named, with what is."""
    status, payload, _ = await door.post(b"{}", {"Content-Type": content_type})
    assert (status, error(payload)["code"]) == (415, "unsupported_media")


async def test_a_batch_with_refused_records_is_207(door: Door) -> None:
    """The good ones are stored; errors carry index, field, reason, status; ids are null where refused."""
    await door.post(OWN)
    status, payload, _ = await door.post(
        [RECORD, {}, {**OWN, "user_id": "u"}, {**RECORD, "request_data": "x" * 300_000}, OWN]
    )
    assert status == 207
    assert payload["accepted"] == 2
    assert payload["duplicates"] == [4]
    errors = payload["errors"]
    assert isinstance(errors, list)
    assert [(e["index"], e["field"], e["status"]) for e in errors] == [
        (1, "service_name", 422),
        (2, "log_id", 409),
        (3, "record", 413),
    ]
    assert all(e["reason"] for e in errors)
    ids = payload["log_ids"]
    assert isinstance(ids, list)
    assert [one is None for one in ids] == [False, True, True, True, False]


async def test_a_batch_of_bad_records_only_is_207_too(door: Door) -> None:
    """Clients that resend a whole batch on any other status would do so for ever."""
    status, payload, _ = await door.post([{}, []])
    assert (status, payload["accepted"]) == (207, 0)


@pytest.mark.parametrize("query", ["?strict=true", "?strict=1", "?x=y&strict=TRUE"])
async def test_strict_is_422_and_nothing_stored(door: Door, query: str) -> None:
    """All errors are listed, no record is stored."""
    status, payload, _ = await door.post([RECORD, {}, RECORD, {"x": 1}], query=query)
    assert status == 422
    errors = error(payload)["errors"]
    assert isinstance(errors, list)
    assert [e["index"] for e in errors] == [1, 3]
    assert door.spool.counters("postgres").owed == 0
    assert (await door.post([RECORD], query=query))[0] == 202


async def test_strict_is_a_boolean(door: Door) -> None:
    """Anything else is refused rather than taken for no."""
    status, payload, _ = await door.post([RECORD], query="?strict=yes")
    assert status == 400
    assert "strict" in str(error(payload)["message"])


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "malformed_body"),
        (b"{", 400, "malformed_body"),
        (b'{"service_name":"\xff"}', 400, "malformed_body"),
        (b"5", 422, "invalid_record"),
        (b"{}", 422, "invalid_record"),
        (b'{"service_name":"s","application_id":true}', 422, "invalid_record"),
        (b'{"service_name":"s","request_data":"%s"}' % (b"x" * 300_000), 413, "too_large"),
        (b"[%s]" % b",".join([b'{"service_name":"s"}'] * 10_001), 413, "too_large"),
        (b'{"service_name":"s","request_data":%s%s}' % (b"[" * 3000, b"]" * 3000), 422, "invalid_record"),
        (b"[" * 200_000, 400, "malformed_body"),
        (b"x" * (10 * 1024 * 1024 + 1), 413, "too_large"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_a_refused_request_names_the_reason(door: Door, body: bytes, status: int, code: str) -> None:
    """Nothing is stored, and the next good request is accepted."""
    got, payload, _ = await door.post(body)
    assert (got, error(payload)["code"]) == (status, code)
    assert door.spool.counters("postgres").owed == 0
    assert (await door.post(RECORD))[0] == 202


async def test_an_invalid_record_names_the_field(door: Door) -> None:
    """The field stands apart, for programs."""
    _, payload, _ = await door.post({**RECORD, "status_code": 1.5})
    assert error(payload)["field"] == "status_code"


async def test_a_conflict_is_409(door: Door) -> None:
    """Same id, other content."""
    await door.post(OWN)
    status, payload, _ = await door.post({**OWN, "service_name": "t"})
    assert (status, error(payload)["code"]) == (409, "content_conflict")


async def test_push_back_is_503_with_a_time(door: Door) -> None:
    """Busy carries Retry-After, in whole seconds, at least one."""
    door.closed = Busy("fail_closed", "postgres is down for longer than fail_closed_after", 0)
    status, payload, headers = await door.post(RECORD)
    assert (status, error(payload)["code"], headers["Retry-After"]) == (503, "fail_closed", "1")


async def test_an_idempotency_key_makes_the_ids(door: Door) -> None:
    """A function of key and index; a resend is a duplicate, other content a conflict."""
    key = {"Idempotency-Key": "order-7"}
    status, payload, _ = await door.post([RECORD, RECORD], key)
    assert (status, payload["log_ids"]) == (202, derive_ids("order-7", range(2)))
    again = (await door.post([RECORD, RECORD], key))[1]
    assert (again["log_ids"], again["duplicates"]) == (payload["log_ids"], [0, 1])
    other = await door.post([RECORD, {"service_name": "other"}], key)
    assert (other[0], other[1]["accepted"]) == (207, 1)
    assert door.spool.counters("postgres").owed == 2


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "caf\u00e9"])
async def test_an_unusable_key_is_400(door: Door, key: str) -> None:
    """Also for a request that would be good otherwise."""
    status, payload, _ = await door.post(RECORD, {"Idempotency-Key": key})
    assert status == 400
    assert "Idempotency-Key" in str(error(payload)["message"])


async def test_a_key_beside_an_own_id_is_refused(door: Door) -> None:
    """Two identities for one record: 422, naming log_id."""
    status, payload, _ = await door.post(OWN, {"Idempotency-Key": "k"})
    assert (status, error(payload)["field"]) == (422, "log_id")


@pytest.mark.parametrize("body", [RECORD, [RECORD, RECORD]])
async def test_prefer_wait_answers_201_when_required_stores_have_it(door: Door, body: object) -> None:
    """201, status stored, and the preference is said to be applied."""
    waiting = asyncio.create_task(door.post(body, {"Prefer": "respond-async, wait=20"}))
    while not door.spool.counters("postgres").pending:
        await asyncio.sleep(0.001)
    await door.deliver("postgres")
    status, payload, headers = await waiting
    assert (status, payload["status"], headers["Preference-Applied"]) == (201, "stored", "wait=20")


async def test_prefer_wait_in_vain_is_202_with_states(door: Door) -> None:
    """Durable, do not resend: the state of each store says why it is not 201."""
    status, payload, headers = await door.post(RECORD, {"Prefer": "wait=0"})
    assert (status, payload["status"], headers["Preference-Applied"]) == (202, "accepted", "wait=0")
    assert payload["stores"] == {"postgres": "pending", "dynamodb": "pending"}
    status, payload, _ = await door.post([RECORD], {"Prefer": 'WAIT = "0"'})
    assert status == 202
    assert payload["unsettled"] == [
        {"index": 0, "log_id": payload["log_ids"][0], "stores": {"postgres": "pending", "dynamodb": "pending"}}  # type: ignore[index]
    ]


@pytest.mark.parametrize("prefer", ["wait", "wait=", "wait=-1", "wait=1.5", "wait=x", "return=minimal", "nowait=3", ""])
async def test_a_preference_that_cannot_be_read_is_ignored(door: Door, prefer: str) -> None:
    """As RFC 7240 has it."""
    status, _, headers = await door.post(RECORD, {"Prefer": prefer})
    assert status == 202
    assert "Preference-Applied" not in headers


async def test_the_wait_is_capped(door: Door) -> None:
    """No client holds a connection for longer than ingest.max_wait."""
    door.settings = msgspec.structs.replace(door.settings, ingest=Ingest(max_wait=0.05))
    for wish in ("999999999", "9" * 1000):
        _, _, headers = await door.post(RECORD, {"Prefer": f"wait={wish}"})
        assert headers["Preference-Applied"] == "wait=0.05"


async def test_ack_stores_waits_without_being_asked(door: Door) -> None:
    """ingest.ack: stores makes every request wait max_wait; a client's own wait is kept."""
    door.settings = msgspec.structs.replace(door.settings, ingest=Ingest(ack="stores", max_wait=0.05))
    status, payload, headers = await door.post(RECORD)
    assert (status, headers["Preference-Applied"]) == (202, "wait=0.05")
    assert payload["stores"]
    assert (await door.post(RECORD, {"Prefer": "wait=0"}))[2]["Preference-Applied"] == "wait=0"


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("down", [(), ("postgres",), ("dynamodb",)])
async def test_the_answer_by_phase_and_outage(door: Door, phase: Phase, down: tuple[str, ...]) -> None:
    """201 exactly where every store that the phase requires has it; 202 else; durable either way."""
    door.phase = phase
    required = {
        Phase.SQL_ONLY: {"postgres"},
        Phase.DUAL_WRITE: {"postgres"},
        Phase.DUAL_WRITE_READ_DYNAMO: {"postgres", "dynamodb"},
        Phase.DYNAMO_ONLY: {"dynamodb"},
    }[phase]
    reachable = required.isdisjoint(down)
    waiting = asyncio.create_task(door.post(RECORD, {"Prefer": f"wait={20 if reachable else 0}"}))
    while not door.spool.state().bytes_used or not any(door.spool.counters(s).owed for s in ("postgres", "dynamodb")):
        await asyncio.sleep(0.001)
    await door.deliver(*({"postgres", "dynamodb"} - set(down)))
    status, payload, _ = await waiting
    assert status == (201 if reachable else 202)
    assert payload["phase"] == phase.label
    assert (await door.post(RECORD))[0] == 202


@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "deflate", "raw deflate", "identity", "GZIP"])
async def test_compressed_bodies(door: Door, coding: str) -> None:
    """gzip, deflate with or without zlib's header, identity."""
    body = json.dumps([RECORD] * 500).encode()
    raw = zlib.compressobj(wbits=-15)
    packed = {
        "deflate": zlib.compress(body),
        "raw deflate": raw.compress(body) + raw.flush(),
        "identity": body,
    }.get(coding, gzip.compress(body))
    status, payload, _ = await door.post(packed, {"Content-Encoding": coding.removeprefix("raw ")})
    assert (status, payload["accepted"]) == (202, 500)


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "identity, gzip", "snappy", "compress", "none"])
async def test_an_unknown_encoding_is_415(door: Door, coding: str) -> None:
    """Never taken for plain."""
    status, payload, _ = await door.post(b'{"service_name":"s"}', {"Content-Encoding": coding})
    assert (status, error(payload)["code"]) == (415, "unsupported_media")


async def test_settings_bounds_are_the_requests(door: Door) -> None:
    """max_body_bytes counts inflated bytes, alike for plain, gzip and chunked bodies."""
    door.settings = msgspec.structs.replace(door.settings, ingest=Ingest(max_body_bytes=2000))
    small = json.dumps([RECORD] * 80).encode()
    large = json.dumps([RECORD] * 81 + ["x" * 300]).encode()
    assert len(small) < 2000 < len(large)

    async def chunks(data: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(data), 100):
            yield data[start : start + 100]

    for body, expected in ((small, 202), (large, 413)):
        for headers, data in (({}, body), ({"Content-Encoding": "gzip"}, gzip.compress(body))):
            assert (await door.post(data, headers))[0] == expected
            async with door.client.post(
                f"{door.listener.url}/logs", data=chunks(data), headers={**JSON, **headers}
            ) as r:
                assert r.status == expected


async def test_answers_are_counted_by_route_and_status(door: Door) -> None:
    """Routes as templates, never as sent, so that the labels stay few."""
    await door.post(RECORD)
    await door.post(b"{")
    await door.get("/logs/3f2b8c1e-5a4d-4e6f-9a8b-7c6d5e4f3a2b/status")
    await door.get("/nothing/here")
    value = door.metrics.registry.get_sample_value
    name = "sidecar_http_requests_total"
    assert value(name, {"route": "/logs", "status": "202"}) == 1
    assert value(name, {"route": "/logs", "status": "400"}) == 1
    assert value(name, {"route": "/logs/{log_id}/status", "status": "404"}) == 1
    assert value(name, {"route": "other", "status": "404"}) == 1
    assert value("sidecar_records_accepted_total", {"phase": "dual_write"}) == 1


async def test_no_value_of_a_record_reaches_an_answer_or_the_log(door: Door, caplog: pytest.LogCaptureFixture) -> None:
    """A canary in every field, of every wrong kind, is in no error, metric or log line."""
    caplog.set_level("DEBUG")
    canary = "canary-4711"
    fields = [
        "log_id",
        "application_id",
        "log_type",
        "request_data",
        "status_code",
        "is_success",
        "log_timestamp",
        "user_id",
    ]
    for field in fields:
        for value in (canary, [canary], canary * 30_000, f"\0{canary}"):
            for body in ({**RECORD, field: value}, [{**RECORD, field: value}]):
                _, payload, _ = await door.post(body)
                assert canary not in json.dumps(payload)
    await door.post(b'{"service_name":"s","request_data":"' + canary.encode())
    samples = [sample for family in door.metrics.registry.collect() for sample in family.samples]
    assert canary not in repr(samples)
    assert canary not in caplog.text


async def test_default_settings_are_those_of_the_semantics() -> None:
    """10 MiB inflated, 10,000 records, 256 KiB a record, depth 64, a day ahead, 30 s of waiting."""
    ingest = Settings().ingest
    assert (ingest.max_body_bytes, ingest.max_records, ingest.max_record_bytes) == (10 << 20, 10_000, 256 << 10)
    assert (ingest.max_depth, ingest.max_future, ingest.max_wait, ingest.ack) == (64, 86_400, 30, "durable")

"""What each client sends, as recorded from it or from its documentation, becomes the records that its page promises."""

import json
from pathlib import Path

import pytest

from sidecar.mapping import OTLP, READY_MADE, Mapped, compile_mapping
from sidecar.mapping.split import split

CORPUS = Path(__file__).parents[1] / "corpus" / "clients"


def records(name: str, file: str) -> list[dict]:
    """The records that a ready-made mapping makes of a recorded body."""
    mapping = compile_mapping(name, READY_MADE[name], None)
    body = (CORPUS / file).read_bytes()
    bodies = split(body, lines=file.endswith(".ndjson"), around=mapping.events, most=100)
    mapped = Mapped()
    for _ in mapping.steps(bodies.pieces, bodies.envelope, mapped):
        pass
    assert mapped.refused == []
    return [json.loads(text) for text in mapped.texts]


SEEN = {
    ("serilog", "serilog.json", 0): (
        "CreditCheckService",
        "INFO",
        True,
        "2026-11-22T17:24:52.123456Z",
        "c-1",
        None,
    ),
    ("serilog", "serilog.json", 1): (
        "CreditCheckService",
        "ERROR",
        False,
        "2026-11-22T17:24:53.000000Z",
        None,
        "System",
    ),
    ("serilog", "serilog.json", 2): (
        "unknown_service",
        "TRACE",
        True,
        "2026-11-22T17:24:53.500000Z",
        None,
        None,
    ),
    ("serilog", "serilog-events.json", 0): (
        "CreditCheckService",
        "WARNING",
        True,
        "2026-11-22T17:24:52.123456Z",
        None,
        None,
    ),
    ("serilog", "serilog-compact.json", 0): (
        "CreditCheckService",
        None,
        True,
        "2026-11-22T17:24:52.123456Z",
        "c-9",
        None,
    ),
    ("serilog", "serilog-compact.json", 1): (
        "unknown_service",
        "FATAL",
        False,
        "2026-11-22T17:24:52.200000Z",
        "0af7",
        "System",
    ),
    ("fluent-bit", "fluent-bit.json", 0): (
        "billing-api",
        "INFO",
        True,
        "2026-11-22T17:24:52.123456Z",
        None,
        None,
    ),
    ("fluent-bit", "fluent-bit.json", 1): (
        "billing",
        "ERROR",
        False,
        "2026-11-22T17:24:53.500000Z",
        "c-2",
        "no answer",
    ),
    ("fluent-bit", "fluent-bit.ndjson", 1): (
        "billing",
        None,
        True,
        "2026-11-22T17:24:53.123456Z",
        None,
        None,
    ),
    ("vector", "vector.ndjson", 0): (
        "billing",
        "INFO",
        True,
        "2026-11-22T17:24:52.123456Z",
        None,
        None,
    ),
    ("vector", "vector.ndjson", 1): (
        "billing",
        "FATAL",
        False,
        "2026-11-22T17:24:53.000000Z",
        None,
        "failed",
    ),
    ("vector", "vector.json", 0): (
        "billing",
        "WARNING",
        True,
        "2026-11-22T17:24:52.123456Z",
        None,
        None,
    ),
    ("winston", "winston.json", 0): (
        "billing",
        "INFO",
        True,
        "2026-11-22T17:24:52.123000Z",
        "r-1",
        None,
    ),
    ("winston", "winston.json", 1): (
        "billing",
        "ERROR",
        False,
        "2026-11-22T17:24:53.123000Z",
        None,
        "Error: failed",
    ),
    ("pino", "pino.json", 0): (
        "billing",
        "INFO",
        True,
        "2026-11-22T17:24:52.123000Z",
        "req-1",
        None,
    ),
    ("pino", "pino.json", 1): (
        "billing",
        "ERROR",
        False,
        "2026-11-22T17:24:52.124000Z",
        None,
        "no answer",
    ),
    ("syslog-ng", "syslog-ng.ndjson", 0): (
        "billing",
        "INFO",
        True,
        "2026-11-22T17:24:52.123456Z",
        None,
        None,
    ),
    ("syslog-ng", "syslog-ng.ndjson", 1): (
        "billing",
        "FATAL",
        False,
        "2026-11-22T17:24:53.123456Z",
        None,
        "failed",
    ),
}
"""Mapping, recorded file, place -> service_name, log_type, is_success, log_timestamp, correlation_id, error_message."""


@pytest.mark.parametrize(("name", "file", "index"), SEEN)
def test_a_recorded_event_becomes_its_record(name, file, index):
    """Service, level, success, time, correlation and error are read where the client writes them."""
    record = records(name, file)[index]
    service, log_type, success, time, correlation, error = SEEN[name, file, index]
    assert record["service_name"] == service
    assert record.get("log_type") == log_type
    assert record["is_success"] is success
    assert record["log_timestamp"] == time
    assert (record.get("correlation_id") or "").startswith(correlation or "")
    assert ("correlation_id" in record) == (correlation is not None)
    assert (record.get("error_message") or "").startswith(error or "")
    assert ("error_message" in record) == (error is not None)
    assert ("log_id" in record) == (name != "winston")


def test_numbers_that_loggers_write_are_read_and_kept():
    """Serilog's 12.5 ms and pino's status: the field holds what it can, request_data the rest, source text and all."""
    text = records("serilog", "serilog.json")[0]
    assert (text["processing_time_ms"], text["user_id"]) == (12, "42")
    assert text["request_data"]["Properties"] == {"Amount": 125000.50, "Elapsed": 12.5, "UserId": 42}
    assert text["request_data"]["Level"] == "Information"
    pino = records("pino", "pino.json")[0]
    assert (pino["status_code"], pino["processing_time_ms"]) == (200, 12)
    assert "res" not in pino["request_data"]
    assert pino["request_data"]["level"] == 30
    assert records("serilog", "serilog.json")[1]["status_code"] == 504


@pytest.mark.parametrize("name", sorted(READY_MADE))
def test_every_ready_made_mapping_compiles_and_has_a_page(name):
    """Nobody has to configure one before it works, and each has its page of examples."""
    compile_mapping(name, READY_MADE[name], None)
    page = CORPUS.parents[2] / "docs" / "clients" / f"{'opentelemetry' if name == OTLP else name}.md"
    assert page.exists()

"""OTLP's two encodings give the same events; nothing of a request is lost on the way."""

import base64
import contextlib
import copy
import json
from pathlib import Path

import msgspec
import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.logs.v1 import logs_pb2

from sidecar.errors import MalformedBody
from sidecar.mapping import OTLP, READY_MADE, compile_mapping, otlp_json, otlp_protobuf

RECORDED = (Path(__file__).parents[1] / "corpus" / "clients" / "otlp.json").read_bytes()


def in_protobuf(body: bytes) -> bytes:
    """The same request in protobuf; ids are hexadecimal in OTLP/JSON and base64 in protobuf's own."""
    document = json.loads(body)
    for resource_logs in document["resourceLogs"]:
        for scope_logs in resource_logs["scopeLogs"]:
            for record in scope_logs["logRecords"]:
                for name in ("traceId", "spanId"):
                    if name in record:
                        record[name] = base64.b64encode(bytes.fromhex(record[name])).decode()
    return json_format.ParseDict(document, ExportLogsServiceRequest()).SerializeToString()


def record(event) -> dict:
    """The record that the mapping otlp makes of an event, as plain values."""
    mapping = compile_mapping(OTLP, READY_MADE[OTLP], None)
    return json.loads(msgspec.json.encode(mapping.record(copy.copy(event))[0]))


def both(body: bytes) -> tuple[list[dict], list[dict]]:
    """The records by way of JSON, and by way of protobuf."""
    left = [record(event) for event in otlp_json.events(body, pytest.fail)]
    return left, [record(event) for event in otlp_protobuf.events(in_protobuf(body), pytest.fail)]


def test_the_defaults_of_the_mapping():
    """Service, severity, trace id, status and time reach their fields; all else is JSON in request_data."""
    for first, second in both(RECORDED):
        rest = first.pop("request_data")
        assert first == {
            "service_name": "billing",
            "log_type": "ERROR",
            "is_success": False,
            "error_message": "no answer",
            "status_code": 504,
            "log_timestamp": "2026-11-22T17:24:52.123456Z",
            "correlation_id": "0af7651916cd43dd8448eb211c80319c",
        }
        assert rest["timeUnixNano"] == "1795368292123456789", "its nanoseconds are in no field"
        assert rest["attributes"]["retries"] == 3
        assert rest["attributes"]["tags"] == ["a", 1.5, {"k": True}]
        assert rest["attributes"]["raw"] == {"bytesValue": "AAE="}
        assert rest["resource"]["attributes"] == {"host.name": "h"}
        assert rest["scope"] == {"name": "app", "version": "1"}
        assert (rest["body"], rest["flags"], rest["spanId"]) == ("no answer", 1, "b7ad6b7169203331")
        assert rest["resourceSchemaUrl"] == "https://opentelemetry.io/schemas/1.30.0"
        assert (second["log_type"], second["is_success"]) == ("INFO", True)
        assert second["request_data"]["body"] == {"amount": 1.1}
        assert "timeUnixNano" not in second["request_data"]


def test_records_of_one_resource_do_not_share_what_is_taken_out_of_them():
    """The second record still finds the service that the first one's field took."""
    for found in both(RECORDED):
        assert [each["service_name"] for each in found] == ["billing", "billing"]


values = st.recursive(
    st.one_of(
        st.text(st.characters(codec="utf-8"), max_size=8).map(lambda v: {"stringValue": v}),
        st.integers(-(2**63), 2**63 - 1).map(lambda v: {"intValue": str(v)}),
        st.booleans().map(lambda v: {"boolValue": v}),
        st.floats(allow_nan=False, allow_infinity=False).map(lambda v: {"doubleValue": v}),
        st.binary(max_size=5).map(lambda v: {"bytesValue": base64.b64encode(v).decode()}),
        st.just({}),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda v: {"arrayValue": {"values": v}}),
        st.lists(
            st.fixed_dictionaries({"key": st.text("abc", min_size=1, max_size=2), "value": inner}), max_size=3
        ).map(lambda v: {"kvlistValue": {"values": v}}),
    ),
    max_leaves=6,
)
attributes = st.lists(
    st.fixed_dictionaries({"key": st.text("abc.", min_size=1, max_size=4), "value": values}),
    max_size=4,
    unique_by=lambda pair: pair["key"],
)


@hypothesis_settings(deadline=None)
@given(body=values, given_attributes=attributes, severity=st.integers(0, 24), nanos=st.integers(1, 2**62))
def test_both_encodings_of_any_record_become_the_same(body, given_attributes, severity, nanos):
    """Whatever the attributes and the body hold, the two decoders agree on the record."""
    log = {"timeUnixNano": str(nanos), "body": body, "attributes": given_attributes, "severityNumber": severity}
    request = {"resourceLogs": [{"scopeLogs": [{"logRecords": [log]}]}]}
    left, right = both(json.dumps(request).encode())
    for found in (left[0], right[0]):
        found.setdefault("request_data", {})
        for name in ("attributes", "body"):  # an empty list and an empty value have no sign of their own in protobuf
            if not found["request_data"].get(name):
                found["request_data"].pop(name, None)
    assert left == right


def test_fields_that_the_library_does_not_know_are_kept_encoded():
    """A newer exporter's field: the record's whole encoding stands in request_data, and the answer warns."""
    request = ExportLogsServiceRequest()
    logs = request.resource_logs.add().scope_logs.add()
    logs.log_records.add().body.string_value = "known"
    future = logs_pb2.LogRecord()
    future.MergeFromString(b"\xa2\x06\x03new")  # field 100
    future.body.string_value = "future"
    logs.log_records.add().CopyFrom(future)
    warnings: list[str] = []
    first, second = otlp_protobuf.events(request.SerializeToString(), warnings.append)
    assert "unknownFields" not in first
    assert b"new" in base64.b64decode(str(second["unknownFields"]))
    assert second["body"] == "future"
    assert len(warnings) == 1
    request.MergeFromString(b"\xa2\x06\x03top")  # of the request itself: then every record has it
    for event in otlp_protobuf.events(request.SerializeToString(), warnings.append):
        assert b"top" in base64.b64decode(str(event["unknownFields"]))


def test_this_version_of_the_protocol_has_no_field_that_is_passed_over():
    """A newer opentelemetry-proto brings fields: this list is the reminder to read them."""
    assert {f.name for f in logs_pb2.ResourceLogs.DESCRIPTOR.fields} <= {"resource", "scope_logs", "schema_url"}
    assert {f.name for f in logs_pb2.ScopeLogs.DESCRIPTOR.fields} <= {"scope", "log_records", "schema_url"}
    assert {f.name for f in logs_pb2.LogRecord.DESCRIPTOR.fields} <= {
        *("time_unix_nano", "observed_time_unix_nano", "severity_number", "severity_text", "body", "attributes"),
        *("dropped_attributes_count", "flags", "trace_id", "span_id", "event_name"),
    }
    assert {f.name for f in common_pb2.KeyValue.DESCRIPTOR.fields} <= {"key", "value", "key_strindex"}


def test_unusual_values_stay_as_they_came():
    """A kind of value that is not known, a name that stands twice, an unknown member: all in request_data."""
    log = (
        b'{"attributes":[{"key":"a","value":{"newKind":1}}],"body":{"stringValue":"b"},"newMember":[1.10],'
        b'"severityText":"Notice"}'
    )
    twice = b'{"attributes":[{"key":"a","value":{"intValue":1}},{"key":"a","value":{"intValue":2}}]}'
    body = b'{"newest":3,"resourceLogs":[{"new":1,"scopeLogs":[{"newer":2,"logRecords":[%b,%b]}]}]}' % (log, twice)
    first, second = (record(event)["request_data"] for event in otlp_json.events(body, pytest.fail))
    assert first["attributes"] == [{"key": "a", "value": {"newKind": 1}}]
    assert first["newMember"] == [1.1]
    assert (first["resourceLogs"], first["scopeLogs"]) == ({"new": 1}, {"newer": 2})
    assert first["request"] == second["request"] == {"newest": 3}
    assert len(second["attributes"]) == 2


def test_lone_surrogates_of_a_javascript_exporter_are_replaced_and_said():
    """Half an emoji, as a cut text in JavaScript has it: U+FFFD in its place; pairs and escaped backslashes stay."""
    text = b'"a\\ud83d \\\\ud83d \\ud83d\\ude00"'
    body = b'{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"body":{"stringValue":%b}}]}]}]}' % text
    warnings: list[str] = []
    (event,) = otlp_json.events(body, warnings.append)
    assert event["body"] == "a\ufffd \\ud83d \U0001f600"
    assert warnings == [otlp_json.SURROGATES]


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"5", b"[]", b'{"resource_logs":[]}', b'{"resourceLogs":5}', b'{"resourceLogs":[5]}', b"\xff"),
        *(b'{"resourceLogs":[{"scopeLogs":{}}]}', b'{"resourceLogs":[{"scopeLogs":[{"logRecords":5}]}]}'),
        *(b'{"resourceLogs":[{"resource":5}]}', b'{"resourceLogs":[' + b"[" * 100_000),
        b'{"resourceLogs":[],"resourceLogs":[]}',
    ],
)  # fmt: skip
def test_a_body_that_is_no_request_is_malformed(body):
    """And nothing else: no other error leaves the decoder."""
    with pytest.raises(MalformedBody):
        list(otlp_json.events(body, lambda _: None))


@hypothesis_settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_malformed(body):
    """Both decoders, on anything."""
    for read in (otlp_json.events, otlp_protobuf.events):
        with contextlib.suppress(MalformedBody):
            list(read(body, lambda _: None))


def test_a_value_nested_to_the_parsers_bound_is_kept():
    """What is deeper than it is looked through stays encoded; no recursion error leaves the decoder."""
    value = common_pb2.AnyValue(string_value="deep")
    for _ in range(30):
        value = common_pb2.AnyValue(array_value=common_pb2.ArrayValue(values=[value]))
    request = ExportLogsServiceRequest()
    request.resource_logs.add().scope_logs.add().log_records.add().body.CopyFrom(value)
    (event,) = otlp_protobuf.events(request.SerializeToString(), pytest.fail)
    assert json.dumps(event["body"]).count("[") == 30

"""The mapping language: which value reaches which field, and that nothing of an event is lost."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sidecar.config import interpret
from sidecar.declared_mapping import DeclaredMapping, FieldSource
from sidecar.errors import MalformedBody, TooLarge
from sidecar.mapping import READY_MADE, CompiledMapping, Mapped, compile_mapping
from sidecar.mapping.source import pointer
from sidecar.mapping.split import split
from sidecar.mapping.times import TimeReader
from sidecar.screening.schema import Refusal

NOW = "2026-11-22T17:24:52.123456Z"


def mapping(text: str, name: str = "m") -> CompiledMapping:
    """The mapping that these lines of configuration declare."""
    lines = "\n".join(f"    {line}" for line in text.splitlines())
    declared = interpret(f"mappings:\n  {name}:\n{lines}\n".encode(), "config.yaml", {}).settings.mappings[name]
    return compile_mapping(name, declared, READY_MADE.get(declared.extends or name))


def run(compiled: CompiledMapping, *events: object, envelope: bytes = b"") -> Mapped:
    """Map events, given as values or as source texts."""
    mapped = Mapped()
    pieces = [e if isinstance(e, bytes) else json.dumps(e, separators=(",", ":")).encode() for e in events]
    for _ in compiled.steps(pieces, envelope, mapped):
        pass
    return mapped


def one(compiled: CompiledMapping, event: object, envelope: bytes = b"") -> dict:
    """The record of one event."""
    mapped = run(compiled, event, envelope=envelope)
    assert mapped.refused == []
    return json.loads(mapped.texts[0])


def test_paths_constants_and_defaults():
    """The first path whose value fits wins, then the default; a constant needs no path."""
    compiled = mapping(
        "service_name: {value: billing}\napplication_id: {value: 7}\n"
        "user_id: {from: [/a/b, /c], default: nobody}\nresponse_data: /answer\nis_success: /ok"
    )
    record = one(compiled, {"c": "u", "a": {"b": None}, "answer": {"x": [1]}, "ok": False})
    assert (record["service_name"], record["application_id"], record["user_id"]) == ("billing", 7, "u")
    assert (record["response_data"], record["is_success"]) == ({"x": [1]}, False)
    assert record["request_data"] == {"a": {"b": None}}
    assert one(compiled, {"a": {"b": "deep"}})["user_id"] == "deep"
    assert one(compiled, {})["user_id"] == "nobody"
    assert "request_data" not in one(compiled, {})


@pytest.mark.parametrize(
    ("field", "value", "read", "stays"),
    [
        ("user_id", "u", "u", False),
        ("user_id", 42, "42", True),
        ("user_id", 1.5, "1.5", True),
        ("user_id", True, "true", True),
        ("user_id", "x" * 100, "x" * 100, False),
        ("user_id", "x" * 101, None, True),
        ("user_id", "", None, True),
        ("user_id", "a\0b", None, True),
        ("user_id", {"id": 1}, None, True),
        ("application_id", 7, 7, False),
        ("application_id", "7", 7, True),
        ("application_id", 2**63, None, True),
        ("application_id", 7.5, None, True),
        ("application_id", True, None, True),
        ("application_id", "seven", None, True),
        ("status_code", 2**31, None, True),
        ("processing_time_ms", 12.7, 12, True),
        ("processing_time_ms", -3, -3, False),
        ("processing_time_ms", 1e300, None, True),
        ("is_success", False, False, False),
        ("is_success", "False", False, True),
        ("is_success", 1, None, True),
        ("log_id", "3F2B8C1E-5A4D-4E6F-9A8B-7C6D5E4F3A2B", "3f2b8c1e-5a4d-4e6f-9a8b-7c6d5e4f3a2b", True),
        ("log_id", "none", None, True),
        ("response_data", [1], [1], False),
        ("response_data", "text", "text", False),
    ],
)
def test_a_value_that_does_not_fit_stays_and_so_does_one_that_is_converted(field, value, read, stays):
    """A field never holds half a value: what it does not hold exactly is in request_data as it came."""
    record = one(mapping(f"{field}: /v"), {"v": value})
    assert record.get(field) == read
    assert ("request_data" in record) == stays
    if stays:
        assert record["request_data"] == {"v": value}


def test_values_that_stay_keep_their_source_text():
    """Numbers as written, repeated inner keys, lone surrogates: byte for byte."""
    event = b'{"n":1.10,"o":{"a":1,"a":2, "z" : 1e2},"s":"\\ud83d","big":123456789012345678901234567890}'
    (text,) = run(mapping("user_id: /u"), event).texts
    assert event in text


def test_a_level_becomes_log_type_and_success():
    """Names without regard to case, numbers, ranges; an unknown text is the log_type, an unknown number stays."""
    compiled = mapping("level:\n  from: /l\n  names: {Warn: WARNING, 10-19: TRACE, 50: ERROR}\n  failure: [error, BAD]")
    seen = {}
    for value in ("warn", "WARN", 12, "15", 50, "BAD", 99, None, "x" * 51, {"l": 1}):
        record = one(compiled, {"l": value})
        seen[str(value)[:4]] = (record.get("log_type"), record["is_success"])
    assert seen == {
        "warn": ("WARNING", True),
        "WARN": ("WARNING", True),
        "12": ("TRACE", True),
        "15": ("TRACE", True),
        "50": ("ERROR", False),
        "BAD": ("BAD", False),
        "99": (None, True),
        "None": (None, True),
        "xxxx": (None, True),
        "{'l'": (None, True),
    }


def test_paths_of_their_own_go_before_the_level():
    """A stated log_type or is_success is not overruled by the level, a constant log_type is."""
    level = "level: {from: /l, names: {e: ERROR}, failure: [ERROR]}\n"
    assert one(mapping(f"{level}is_success: /ok"), {"l": "e", "ok": True})["is_success"] is True
    assert one(mapping(f"{level}log_type: /t"), {"l": "e", "t": "AUDIT"})["log_type"] == "AUDIT"
    assert one(mapping(f"{level}log_type: {{value: AUDIT}}"), {"l": "e"})["log_type"] == "ERROR"
    assert one(mapping(f"{level}log_type: {{value: AUDIT}}"), {})["log_type"] == "AUDIT"


def test_what_only_a_failure_fills_stays_in_request_data_too():
    """error_message with when: failure is a copy, so that the message is found in one place in every record."""
    compiled = mapping("level: {from: /l, failure: [E]}\nerror_message: {from: [/x, /m], when: failure}")
    assert one(compiled, {"l": "E", "m": "boom"}) == {
        "log_type": "E",
        "is_success": False,
        "error_message": "boom",
        "request_data": {"m": "boom"},
    }
    assert "error_message" not in one(compiled, {"l": "I", "m": "fine"})


def test_an_extended_mapping_is_changed_field_by_field():
    """What is not stated is the ready-made one's; null takes away; a ready-made name changes that mapping."""
    compiled = mapping("service_name: {value: billing}\nuser_id: null\nlevel: {failure: [FATAL]}", name="pino")
    record = one(compiled, {"time": 1795368292123, "level": 50, "name": "other", "userId": "u", "msg": "m"})
    assert (record["service_name"], record["log_type"], record["is_success"]) == ("billing", "ERROR", True)
    assert record["request_data"] == {"level": 50, "name": "other", "userId": "u", "msg": "m"}
    own = mapping("extends: pino\nidentity: minted", name="own")
    assert "log_id" not in one(own, {"time": 1795368292123})


def test_members_beside_the_array_of_events_are_in_every_event():
    """An envelope's members can be mapped, and are not lost where they are not."""
    compiled = mapping("events: [records]\nservice_name: /envelope/service")
    bodies = split(b'{"service":"s","v":1,"records":[{"a":1},{"a":2}]}', lines=False, around=compiled.events, most=9)
    assert bodies.pieces == [b'{"a":1}', b'{"a":2}']
    for piece in bodies.pieces:
        record = one(compiled, piece, bodies.envelope)
        assert record["service_name"] == "s"
        assert record["request_data"]["envelope"] == {"v": 1}


def test_of_equal_names_the_first_is_read_and_the_event_is_kept_whole():
    """Fluent Bit's own date stands before the application's; nobody's is lost."""
    event = b'{"date":1795368292,"level":"info", "date":"2020-01-01T00:00:00Z"}'
    (text,) = run(mapping("user_id: null", name="fluent-bit"), event).texts
    assert b'"log_timestamp":"2026-11-22T17:24:52.000000Z"' in text
    assert b'"request_data":' + event in text
    (beside,) = run(mapping("user_id: /u"), event, envelope=b'{"v":1}').texts
    assert b'"request_data":{"event":' + event + b',"envelope":{"v":1}}' in beside


# -- identity


def ids(mapped: Mapped) -> list[str]:
    """The log_id of each record."""
    return [json.loads(text)["log_id"] for text in mapped.texts]


def test_the_identity_of_an_event_is_its_content():
    """The same bytes have the same id however they are batched; other bytes and other mappings have another."""
    compiled = mapping("identity: content\nlog_timestamp: /t")
    first, second = {"t": NOW, "n": 1}, {"t": NOW, "n": 2}
    together = ids(run(compiled, first, second))
    assert together == ids(run(compiled, first)) + ids(run(compiled, second))
    assert len(set(together)) == 2
    assert all(each[14] == "8" and each[19] in "89ab" for each in together)
    other = mapping("identity: content\nlog_timestamp: /t", name="other")
    assert ids(run(other, first)) != ids(run(compiled, first))


def test_derived_ids_lie_together_in_an_index_by_time():
    """The time's milliseconds come first, as in the ids that the sidecar mints."""
    compiled = mapping("identity: content\nlog_timestamp: {from: /t, format: epoch_ms}")
    made = ids(run(compiled, *({"t": 1_795_368_292_000 + n, "x": n * 7919 % 100} for n in range(100))))
    assert made == sorted(made)
    assert made[0].replace("-", "").startswith(f"{1_795_368_292_000:012x}")
    assert ids(run(compiled, {"t": -1}, {"t": 250_000_000_000_000}))[0].startswith("ffffffff-ffff-8")


def test_equal_events_of_one_request_are_told_apart_and_stay_so_when_it_is_sent_again():
    """Two equal lines are two records; a resend in parts gives the same ids, never a third."""
    compiled = mapping("identity: content\nlog_timestamp: /t")
    event = {"t": NOW}
    sent = ids(run(compiled, event, event, event))
    assert len(set(sent)) == 3
    assert ids(run(compiled, event, event, event)) == sent
    assert ids(run(compiled, event, event)) == sent[:2]


def test_an_event_without_a_time_of_its_own_is_not_identified_by_content():
    """Equal texts without a time are too likely two events."""
    assert "log_id" not in one(mapping("identity: content\nlog_timestamp: /t"), {"n": 1})


def test_an_id_in_the_event_goes_before_its_content():
    """And an id that is none is left where it is."""
    compiled = mapping("identity: content\nlog_timestamp: /t\nlog_id: /id")
    own = "3f2b8c1e-5a4d-4e6f-9a8b-7c6d5e4f3a2b"
    assert one(compiled, {"t": NOW, "id": own})["log_id"] == own
    assert one(compiled, {"t": NOW, "id": "none"})["request_data"] == {"id": "none"}


# -- time


@pytest.mark.parametrize(
    ("formats", "source", "moment", "exact"),
    [
        (("iso",), '"2026-11-22T17:24:52.123456Z"', 1_795_368_292_123_456, True),
        (("iso",), '"2026-11-22T18:24:52.1234567+01:00"', 1_795_368_292_123_456, False),
        (("iso",), '"2026-11-22T17:24:52.1234567Z"', 1_795_368_292_123_456, False),
        (("iso", "epoch_s"), '"2026-11-22T17:24:52Z"', 1_795_368_292_000_000, True),
        (("iso", "epoch_s"), "1795368292", 1_795_368_292_000_000, True),
        (("epoch_s",), "1795368292.123456", 1_795_368_292_123_456, True),
        (("epoch_s",), "1795368292.1234567", 1_795_368_292_123_456, False),
        (("epoch_s",), "1.795368292e9", 1_795_368_292_000_000, True),
        (("epoch_s",), "-0.5", -500_000, True),
        (("epoch_s",), "-0.0000005", -1, False),
        (("epoch_ms",), "1795368292123", 1_795_368_292_123_000, True),
        (("epoch_ms",), "1795368292123.5", 1_795_368_292_123_500, True),
        (("epoch_us",), '"1795368292123456"', 1_795_368_292_123_456, True),
        (("epoch_ns",), '"1795368292123456789"', 1_795_368_292_123_456, False),
        (("epoch_ns",), "1795368292123456000", 1_795_368_292_123_456, True),
    ],
)
def test_times(formats, source, moment, exact):
    """Every format, exactly, and whether the source says more than microseconds in UTC do."""
    assert TimeReader(formats).read(msgspec.Raw(source.encode())) == (moment, exact)


@pytest.mark.parametrize(
    ("formats", "source"),
    [
        *(
            (("iso",), text)
            for text in ('"yesterday"', '"2026-11-22T17:24:52"', "1795368292", "true", "{}", '"\\ud83d"')
        ),
        *((("epoch_ns",), text) for text in ('"2026-11-22T17:24:52Z"', "1e99", "99999999999999999999999999", "[1]")),
        (("epoch_s",), "1795368292123"),
    ],
)
def test_a_time_that_cannot_be_read_is_refused(formats, source):
    """The one value that is: a wrong time would make queries by time answer wrongly."""
    with pytest.raises(Refusal):
        TimeReader(formats).read(msgspec.Raw(source.encode()))
    refused = run(CompiledMapping("m", _timed(formats)), b'{"t":%b}' % source.encode()).refused
    assert [each.field for each in refused] == ["log_timestamp"]


def _timed(formats):
    return DeclaredMapping(fields=(("log_timestamp", FieldSource(("/t",), formats=formats)),))


@hypothesis_settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["2026-11-22T17:24:52", "2026-11-22T17:24:53", "2026-02-30T00:00:00", "0001-01-01T00:00:00"]
            ),
            st.text("0123456789\u0663.+-Z:", max_size=9),
            st.sampled_from(["Z", "z", "+00:00", "+01:00", "-05:30", "+24:00", "", "+"]),
        ),
        max_size=6,
    )
)
def test_a_time_reads_the_same_whether_its_second_was_met_before_or_not(given_texts):
    """The reader remembers seconds; what it says is what reading each text afresh says."""
    reader = TimeReader(("iso",))
    for second, fraction, offset in given_texts * 2:
        text = f"{second}.{fraction}{offset}"
        try:
            expected = TimeReader(("iso",)).read(text)
        except Refusal:
            expected = None
        try:
            found = reader.read(text)
        except Refusal:
            found = None
        assert found == expected


def test_an_offset_can_be_declared_for_texts_without_one():
    """.NET's DateTime without a kind; a text with its own offset keeps that."""
    reader = TimeReader(("iso",), "+01:00")
    assert reader.read("2026-11-22T18:24:52.123") == (1_795_368_292_123_000, False)
    assert reader.read("2026-11-22T17:24:52.123Z") == (1_795_368_292_123_000, True)


# -- bodies


def test_a_broken_event_is_one_broken_event():
    """In an array by its brackets, among lines by its line; its neighbours are mapped, its source is kept."""
    compiled = mapping("user_id: /u")
    array = b'[{"u":"a"},{"u":nan},5,{"u":"\xff"},{"u":"z"}]'
    lines = b'{"u":"a"}\n{"u":nan}\n5\n\n{"u":"\xff"}\n{"u":"z"}'
    for body, is_lines in ((array, False), (lines, True)):
        mapped = run(compiled, *split(body, lines=is_lines, around=(), most=99).pieces)
        assert (mapped.total, mapped.indexes) == (5, [0, 4])
        assert [(each.index, each.raw) for each in mapped.refused] == [
            *((1, b'{"u":nan}'), (2, b"5"), (3, b'{"u":"\xff"}')),
        ]


@pytest.mark.parametrize("body", [b"", b"5", b'"a"', b"[{]", b'[{"a":1}', b"{", b'{"a":1}x', b"\xff", b"[" * 200_000])
def test_a_body_whose_shape_cannot_be_told_is_malformed(body):
    """Then nothing of it is taken."""
    with pytest.raises(MalformedBody):
        split(body, lines=False, around=("events",), most=99)


def test_events_are_counted_before_they_are_mapped():
    """In every shape."""
    for body, lines in ((b"[1,2,3]", False), (b"1\n2\n3", True), (b'{"events":[1,2,3]}', False)):
        with pytest.raises(TooLarge):
            split(body, lines=lines, around=("events",), most=2)


def test_an_event_nested_without_end_is_refused_alone():
    """No recursion error, and its neighbours are mapped."""
    deep = b'{"a":' * 3000 + b"1" + b"}" * 3000
    mapped = run(mapping("user_id: /a/a/a"), b'{"u":1}', deep, b'{"u":2}')
    assert mapped.indexes == [0, 2]
    assert [each.index for each in mapped.refused] == [1]


def test_pointers():
    """RFC 6901 through objects; anything else says what is allowed."""
    assert pointer("/a~1b/~0c/") == ("a/b", "~c", "")
    for text in ("", "a", "a.b", "/a~2", "/x" * 17, "/" + "x" * 300):
        with pytest.raises(ValueError, match="JSON Pointer"):
            pointer(text)


def test_a_large_envelope_is_opened_although_a_text_in_it_holds_half_a_surrogate_pair():
    """JavaScript writes such texts; the other thousands of events of the request are none the worse."""
    events = b",".join(b'{"n":%d,"text":"%b"}' % (n, b"x" * 1000) for n in range(4000))
    body = b'{"logs":[%b,{"n":4000,"text":"\\ud83d"}]}' % events
    bodies = split(body, lines=False, around=("logs",), most=10_000)
    mapped = run(mapping("user_id: /n"), *bodies.pieces)
    assert (len(mapped.texts), mapped.refused) == (4001, [])
    assert b'{"n":4000,"text":"\\ud83d"}' in mapped.texts[-1]


# -- properties

names = st.sampled_from(["a", "b", "t", "level", "x/y", "é"])
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.just("7"),
)
objects = st.recursive(
    st.dictionaries(names, leaves, max_size=4),
    lambda inner: st.dictionaries(names, st.one_of(leaves, inner, st.lists(inner, max_size=2)), max_size=4),
    max_leaves=10,
)
FIELDS_OF = (
    "user_id",
    "application_id",
    "processing_time_ms",
    "is_success",
    "response_data",
    "error_message",
    "log_id",
)
paths = st.lists(names, min_size=1, max_size=3).map(
    lambda tokens: "".join("/" + each.replace("~", "~0").replace("/", "~1") for each in tokens)
)


@given(event=objects, chosen=st.dictionaries(st.sampled_from(FIELDS_OF), st.lists(paths, min_size=1, max_size=2)))
@hypothesis_settings(deadline=None)
def test_nothing_of_an_event_is_lost(event, chosen):
    """Every value of the event is in request_data at its own place, or in a field that was taken from there."""
    fields = tuple((field, FieldSource(tuple(sources))) for field, sources in chosen.items())
    record = one(CompiledMapping("m", DeclaredMapping(fields=fields)), event)
    rest = record.get("request_data", {})
    held = {
        pointer(source): record[field]
        for field, sources in chosen.items()
        for source in sources
        if field in record and _at(event, pointer(source)) == record[field]
    }
    for path, value in _leaves(event):
        in_a_field = any(path[: len(source)] == source for source in held)
        assert in_a_field or _at(rest, path) == value, path


def test_a_payload_is_whole_although_another_field_takes_a_member_of_it():
    """In either order."""
    for order in ("response_data: /o\nuser_id: /o/u", "user_id: /o/u\nresponse_data: /o"):
        record = one(mapping(order), {"o": {"u": "x", "n": 1}})
        assert (record["user_id"], record["response_data"]) == ("x", {"u": "x", "n": 1})
        assert "request_data" not in record


def _at(value, path):
    """What stands at a path; a value of its own where nothing does."""
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return _at
        value = value[name]
    return value


def _leaves(value, path=()):
    """Every value that is no object, with its path; empty objects hold nothing."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, (*path, name))
    else:
        yield path, value


@given(st.lists(st.one_of(st.binary(max_size=40), objects.map(lambda o: json.dumps(o).encode())), max_size=5))
@hypothesis_settings(deadline=None)
@pytest.mark.parametrize("name", sorted(READY_MADE))
def test_any_bytes_are_mapped_or_refused_one_by_one(name, pieces):
    """Each event is a record or a refusal at its own place; nothing is raised."""
    mapped = run(compile_mapping(name, READY_MADE[name], None), *pieces)
    assert sorted([*mapped.indexes, *(each.index for each in mapped.refused)]) == list(range(len(pieces)))
    for text in mapped.texts:
        text.decode()

"""The door's judgement: what is taken, what is refused and why, and that both lanes agree on everything."""

import json
import os
import re
import tracemalloc
import uuid
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from sidecar.errors import InvalidRecord, MalformedBody, TooLarge
from sidecar.record import FIELDS, decode, encode, timestamp_text, to_dict
from sidecar.screening import Form, Minter, Refused, Rule, Screened, Screener, check_key, derive_ids, shapes
from sidecar.screening.identity import canonical, version7_time
from sidecar.screening.schema import SPELLINGS, Refusal, camel, pascal
from sidecar.screening.timestamps import Timestamps
from sidecar.settings import Ingest
from tests.corpus import JsonText, RecordText, json_texts, record_texts

MORE = 10 if "FAULTS_LONG" in os.environ else 1  # make faults looks at more

NOW_US = 1_795_348_800_000_000  # 2026-11-22T12:00:00Z
INGEST = Ingest()
_SPELLS: list[Callable[[str], str]] = [str, camel, pascal]
V4 = "3f2b8c1e-5a4d-4e6f-9a8b-7c6d5e4f3a2b"


class FixedClock:
    """A clock that stands where the test puts it."""

    def __init__(self, now_us: int = NOW_US) -> None:
        self.us = now_us

    def now_us(self) -> int:
        return self.us

    def monotonic(self) -> float:
        return self.us / 1_000_000

    async def sleep(self, seconds: float) -> None:
        self.us += int(seconds * 1_000_000)


def new_screener(**columns: int) -> Screener:
    """A screener whose clock stands at NOW_US."""
    clock = FixedClock()
    return Screener(clock, Minter(clock, os.urandom), columns)


def screen(body: bytes, form: Form = Form.JSON, ingest: Ingest = INGEST, key: str | None = None) -> Screened:
    """What becomes of a body."""
    return new_screener().screen(body, form, ingest, key)


def name(case: JsonText | RecordText) -> str:
    """How a case is shown."""
    return case.name


# ------------------------------------------------------------------------------------------------- JSON as such


@pytest.mark.parametrize("case", json_texts("reject"), ids=name)
def test_a_body_that_is_not_json_is_malformed(case: JsonText) -> None:
    """Nothing that RFC 8259 refuses is taken as a body."""
    with pytest.raises(MalformedBody):
        screen(case.text)


@pytest.mark.parametrize("case", json_texts("accept", "surrogate", "deep"), ids=name)
def test_a_body_that_is_json_is_judged_by_the_schema_only(case: JsonText) -> None:
    """What RFC 8259 allows parses; then the schema may refuse it, by name."""
    if case.text.strip(b" \t\r\n")[:1] in (b"[", b"{"):
        result = screen(case.text)
        assert result.total == len(result.records) + len(result.refused)
    else:
        with pytest.raises(InvalidRecord, match="neither an object nor an array"):
            screen(case.text)


@pytest.mark.parametrize("case", json_texts("reject"), ids=name)
def test_a_payload_that_is_not_json_is_malformed(case: JsonText) -> None:
    """The same texts as a field's value never get through."""
    with pytest.raises(MalformedBody):
        screen(b'{"service_name":"s","request_data":' + case.text + b"}")


@pytest.mark.parametrize("case", json_texts("accept"), ids=name)
def test_a_payload_keeps_its_source_text(case: JsonText) -> None:
    """A JSON value given as payload is stored byte for byte; a string is its decoded text; null is null."""
    result = screen(b'[{"service_name":"s","response_data": ' + case.text + b"}]")
    source = case.text.strip(b" \t\r\n")
    expected = source.decode()
    if source.startswith(b'"') or source == b"null":
        expected = json.loads(source)
    assert [one.reason for one in result.refused] == []
    assert result.records[0].response_data == expected


@pytest.mark.parametrize("case", json_texts("surrogate"), ids=name)
def test_a_lone_surrogate_is_refused_as_text_and_kept_as_source(case: JsonText) -> None:
    """Only a decoded text cannot hold it: the source text of a JSON payload is plain ASCII. Neighbours are kept."""
    good = b'{"service_name":"good"}'
    bad = b'{"service_name":"s","request_data":' + case.text + b"}"
    result = screen(b"[" + good + b" , " + bad + b"\n," + good + b"]")
    if case.text.startswith(b'"'):
        assert [(one.index, one.field, one.rule) for one in result.refused] == [(1, "request_data", Rule.CHARACTER)]
        assert result.refused[0].raw == bad
        assert [one.service_name for one in result.records] == ["good", "good"]
    else:
        assert result.refused == []
        assert result.records[1].request_data == case.text.decode()


@pytest.mark.parametrize("case", json_texts("deep"), ids=name)
def test_nesting_however_deep_is_that_records_refusal(case: JsonText) -> None:
    """A record nested too deep, also deeper than the parser follows, is refused alone; its neighbours are kept."""
    good = b'{"service_name":"good"}'
    bad = b'{"service_name":"s","request_data":' + case.text + b"}"
    for body in (b"[" + good + b"," + bad + b"," + good + b"]", b'{"logs":[' + good + b"," + bad + b"," + good + b"]}"):
        result = screen(body)
        assert [(one.index, one.rule) for one in result.refused] == [(1, Rule.DEPTH)]
        assert len(result.records) == 2
    alone = screen(bad)
    assert [one.rule for one in alone.refused] == [Rule.DEPTH]


LINES = [case for case in json_texts("reject") if b"\n" not in case.text and case.text.strip(b" \t\r")]


@pytest.mark.parametrize("case", LINES, ids=name)
def test_a_bad_line_is_one_refused_record(case: JsonText) -> None:
    """In NDJSON a line that is not JSON costs its own record only."""
    good = b'{"service_name":"good"}'
    result = screen(b"\n".join((good, b"", case.text, b"  \r", good)), Form.LINES)
    assert [(one.index, one.raw) for one in result.refused] == [(1, case.text.strip(b" \t\r"))]
    assert result.refused[0].rule in {Rule.MALFORMED, Rule.DEPTH}  # the parser cannot follow 100,000 brackets
    assert list(result.indexes) == [0, 2]


@pytest.mark.parametrize("case", json_texts("accept"), ids=name)
def test_a_good_line_keeps_its_payload(case: JsonText) -> None:
    """NDJSON and JSON store the same."""
    text = re.sub(rb"[\r\n]", b" ", case.text)
    record = b'{"service_name":"s","request_data":' + text + b"}"
    lines = screen(record + b"\r\n" + record, Form.LINES)
    array = screen(b"[" + record + b"]")
    assert lines.refused == []
    assert {one.request_data for one in lines.records} == {array.records[0].request_data}


# ------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("case", record_texts(), ids=name)
@pytest.mark.parametrize("around", [b"%s", b"[%s]", b' [ %s\t,{"service_name":"n"}] ', b'{"logs": [%s] }'])
def test_a_record_is_taken_or_refused_by_field_and_rule(case: RecordText, around: bytes) -> None:
    """The corpus of records, alone, in arrays and in the envelope: the verdict does not depend on the company."""
    body = around % case.text
    if around == b"%s" and not case.text.startswith(b"{"):
        with pytest.raises(InvalidRecord) if not case.text.startswith(b"[") else _nothing():
            screen(body)
        return
    result = screen(body)
    if case.refused is not None:
        assert [(one.index, one.field, one.rule) for one in result.refused] == [(0, case.refused, Rule(str(case.rule)))]
        assert result.refused[0].raw.strip() == case.text.strip()
        return
    assert [one.reason for one in result.refused] == []
    record = result.records[0]
    for field, value in case.stored.items():
        assert getattr(record, field) == value, field
        assert type(getattr(record, field)) is type(value), field
    assert decode(result.encoded[0]) == record


class _nothing:  # noqa: N801  (a context that expects nothing)
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_no_refusal_quotes_a_value() -> None:
    """The reason of a refusal names fields, kinds and bounds, never what the record holds."""
    canary = "canary-4711"
    for field in FIELDS:
        for value in (canary, [canary], {canary: canary}, canary * 3000, "\0" + canary):
            result = screen(json.dumps({"service_name": "s", field: value} | {field: value}).encode())
            assert canary not in "".join(one.reason + one.field for one in result.refused)


def test_a_record_larger_than_allowed_is_413() -> None:
    """The stored form counts, to the byte; a neighbour of the right size is kept."""
    ingest = Ingest(max_record_bytes=2048)
    overhead = len(screen(b'{"service_name":"s","request_data":"%s"}' % (b"a" * 1000)).encoded[0]) - 1000
    fits = b'{"service_name":"s","request_data":"%s"}' % (b"a" * (2048 - overhead))
    over = b'{"service_name":"s","request_data":"%s"}' % (b"a" * (2049 - overhead))
    result = screen(b"[" + fits + b"," + over + b"]", ingest=ingest)
    assert len(result.encoded[0]) == 2048
    assert [(one.index, one.rule, one.status) for one in result.refused] == [(1, Rule.TOO_LARGE, 413)]


@pytest.mark.parametrize(
    "payload", [b"[" + b"[]," * 400_000 + b"[]]", b'["' + b'","' * 400_000 + b'"]', b"1" * 900_000]
)
def test_an_oversized_payload_is_refused_without_walking_it(payload: bytes) -> None:
    """A payload of a million brackets or strings is too large, whatever it holds."""
    result = screen(b'{"service_name":"s","request_data":' + payload + b"}")
    assert [one.status for one in result.refused] == [413]


def test_more_records_than_allowed_is_too_large_as_a_whole() -> None:
    """The number of records is a bound of the request, also for records that are nothing."""
    ingest = Ingest(max_records=10)
    record = b'{"service_name":"s"}'
    assert len(screen(b"[" + b",".join([record] * 10) + b"]", ingest=ingest).records) == 10
    for element, form in ((record, Form.JSON), (b"1", Form.JSON), (b"{}", Form.JSON), (record, Form.LINES)):
        glue = b"\n" if form is Form.LINES else b","
        text = glue.join([element] * 11)
        with pytest.raises(TooLarge):
            screen(text if form is Form.LINES else b"[" + text + b"]", form, ingest)
    with pytest.raises(TooLarge):
        screen(b"[" + b"1," * 2_000_000 + b"1]")


@pytest.mark.parametrize(
    ("body", "batch", "total"),
    [
        (b"[]", True, 0),
        (b" [ ] ", True, 0),
        (b'{"logs":[]}', True, 0),
        (b'{"Logs" : [ {"service_name":"s"} ] }', True, 1),
        (b'\n{ "logs"\t:[{"ServiceName":"s"},{"serviceName":"s"}]}\r\n', True, 2),
        (b'{"\\u006cogs":[{"service_name":"s"}]}', True, 1),
        (b'{"service_name":"s"}', False, 1),
    ],
)
def test_the_shapes_of_a_body(body: bytes, batch: bool, total: int) -> None:
    """One object; an array; an envelope with one member, logs."""
    result = screen(body)
    assert (result.batch, result.total, len(result.records)) == (batch, total, total)


@pytest.mark.parametrize(
    "body",
    [
        b'{"logs":[],"x":[1]}',
        b'{"logs":[{"service_name":"s"}],"logs":[{"service_name":"s"}]}',
        b'{"logs":{}}',
        b'{"logs":null}',
        b'{"logs":"[]"}',
        b'{"logs":[1],"x":{}}',
    ],
)
def test_an_envelope_holds_one_array_and_nothing_else(body: bytes) -> None:
    """Anything beside logs is refused as a whole: nobody can tell what was meant."""
    with pytest.raises(InvalidRecord) as caught:
        screen(body)
    assert caught.value.field == "logs"


def test_blank_lines_have_no_index() -> None:
    """NDJSON: empty lines are skipped, a last newline is not needed, CRLF is a line end."""
    record = b'{"service_name":"s"}'
    result = screen(b"\n\n" + record + b"\r\n \t\n" + record, Form.LINES)
    assert (result.batch, result.total, list(result.indexes)) == (True, 2, [0, 1])
    assert screen(b"", Form.LINES).total == 0


@settings(max_examples=300)
@given(st.lists(st.sampled_from([b"\n", b"\r", b" ", b"\t", b"a", b'{"b": 1}', b"\x0b", b"\r\n"])).map(b"".join))
def test_lines_are_what_stands_between_line_feeds_without_white_space_and_blank_ones(body: bytes) -> None:
    """However many blank ones there are, and wherever."""
    assert list(shapes.lines(body)) == [s for line in body.split(b"\n") if (s := line.strip(b" \t\r"))]


@pytest.mark.parametrize("line", [b"", b" \t\r", b"1"])
def test_a_body_of_millions_of_lines_costs_no_memory_beside_its_own(line: bytes) -> None:
    """Blank ones are passed over, too many are refused before they are cut out."""
    body = (line + b"\n") * (4_000_000 // (len(line) + 1))
    tracemalloc.start()
    try:
        if line == b"1":
            with pytest.raises(TooLarge):
                screen(body, Form.LINES)
        else:
            assert screen(body, Form.LINES).total == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000  # of 10,000 lines at most; a list of all of them takes 16 MB and more


def test_a_payload_of_surrogate_escapes_alone_is_kept_as_it_was_sent() -> None:
    """Lone, paired, in capitals, behind an escaped backslash, beside escapes of D000 that are none."""
    payload = r'["\ud800", "\uD800\uDFFF", "\\ud800", "\ud7ff", "\uDC00x", "\\\udfff"]'
    body = b'{"service_name": "s", "request_data": ' + payload.encode() + b"}"
    assert screen(body).records[0].request_data == payload
    for bad in (rb"\udz00", rb"\ud8", rb"\uDxyz"):
        with pytest.raises(MalformedBody):
            screen(b'{"service_name": "s", "request_data": ["' + bad + b'"]}')


def test_lines_do_not_join() -> None:
    """A record may not run over two lines, nor two records share one, even where the numbers would add up."""
    result = screen(b'{"service_name":"a"\n}\n{"service_name":"b"},{"service_name":"c"}', Form.LINES)
    assert [one.rule for one in result.refused] == [Rule.MALFORMED] * 3


def test_the_mapped_columns_width_counts_where_it_is_smaller() -> None:
    """An adopted table's narrower column bounds the text; a wider one does not widen ours."""
    screener = new_screener(service_name=3, user_id=1000, error_message=2, request_data=4)
    for text, field in (
        (b'{"service_name":"abcd"}', "service_name"),
        (b'{"service_name":"s","user_id":"%s"}' % (b"u" * 101), "user_id"),
        (b'{"service_name":"s","error_message":"abc"}', "error_message"),
        (b'{"service_name":"s","request_data":"abcde"}', "request_data"),
        (b'{"service_name":"s","request_data":[1,2]}', "request_data"),
    ):
        result = screener.screen(text, Form.JSON, INGEST)
        assert [(one.field, one.rule) for one in result.refused] == [(field, Rule.LENGTH)]
    assert screener.screen(b'{"service_name":"abc","request_data":[1]}', Form.JSON, INGEST).refused == []


@pytest.mark.parametrize("field", ["application_id", "status_code", "processing_time_ms"])
@pytest.mark.parametrize("lane", ["fast", "slow"])
def test_the_mapped_columns_range_counts_where_it_is_narrower(field: str, lane: str) -> None:
    """Both lanes: the ends of the range and null are let in, the next numbers are refused by the field's name."""
    screener = new_screener()
    screener.narrow({}, {field: (-10, 20)}, "")
    bounds = screener.bounds(INGEST)
    for number, allowed in ((b"-11", False), (b"-10", True), (b"null", True), (b"20", True), (b"21", False)):
        text = b'{"service_name":"s","%s":%s}' % (field.encode(), number)
        if lane == "slow":
            try:
                screener.exactly(text, bounds, None, 0)
                refused = []
            except Refusal as error:
                refused = [(error.field, error.rule)]
        else:
            refused = [(one.field, one.rule) for one in screener.screen(text, Form.JSON, INGEST).refused]
            assert (screener.whole(text, Form.JSON, bounds, 1, None) is not None) is allowed
        assert refused == ([] if allowed else [(field, Rule.RANGE)])


def test_a_clients_id_is_no_computed_id_of_the_adopted_table() -> None:
    """It would name a row that the database has numbered, or will; another table's are ids like any other."""
    screener = new_screener()
    screener.narrow({}, {}, "51deca70-0001-8000-")
    text = b'{"service_name":"s","log_timestamp":"2026-01-01T00:00:00Z","log_id":"%s"}'
    refused = screener.screen(text % b"51DECA70-0001-8000-a000-00000000002a", Form.JSON, INGEST).refused
    assert [(one.field, one.rule) for one in refused] == [("log_id", Rule.LOG_ID)]
    assert screener.screen(text % b"51deca70-0002-8000-a000-00000000002a", Form.JSON, INGEST).refused == []


def test_every_spelling_has_one_field() -> None:
    """Snake, camel and Pascal names of the thirteen fields, and no two fields share one."""
    assert {SPELLINGS[spell(field)] for field in FIELDS for spell in _SPELLS} == set(FIELDS)
    assert SPELLINGS["processingTimeMs"] == SPELLINGS["ProcessingTimeMs"] == "processing_time_ms"


# ------------------------------------------------------------------------------------------------- both lanes agree

_text = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["", "a", "\0", '"', '":', "\\", '\\"', "x" * 51, "y" * 101, "1", "null", "é", "😀", "{", "]"]
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=8,
)
_ids = st.uuids().map(str) | st.sampled_from(
    [V4.upper(), "{" + V4 + "}", "", "x", "0199c3a2-7d00-7abc-8def-0123456789ab"]
)
_times = st.datetimes().map(lambda d: d.isoformat() + "Z") | st.sampled_from(
    ["2026-11-22T11:00:00Z", "2026-11-22T11:00:00.1234567+01:00", "2026-11-22T11:00:00", "2026-11-22", "", "now"]
)
_values = {
    "log_id": _ids,
    "log_timestamp": _times,
    "service_name": _text,
    "log_type": _text,
    "is_success": st.booleans(),
    "status_code": st.integers(-(2**31) - 1, 2**31),
    "application_id": st.integers(-(2**63) - 1, 2**63),
    "processing_time_ms": st.integers(-(2**63) - 1, 2**63),
    "request_data": _json,
    "response_data": _json,
    "error_message": _text,
    "correlation_id": _text,
    "user_id": _text,
}


@st.composite
def _members(draw: st.DrawFn) -> bytes:
    """A record's text: fields in any order, spelling, spacing; sometimes wrong, twice, null, unknown."""
    spell = draw(st.sampled_from(_SPELLS))
    fields = draw(st.lists(st.sampled_from(FIELDS), max_size=8, unique=True))
    if draw(st.integers(0, 9)):
        fields = ["service_name", *(f for f in fields if f != "service_name")]
    if not draw(st.integers(0, 9)) and fields:
        fields.append(draw(st.sampled_from(fields)))
    ascii_only = draw(st.booleans())
    parts = []
    for field in fields:
        odd = not draw(st.integers(0, 14))
        value = draw(st.one_of(st.none(), _json) if odd else _values[field])
        key = (spell if draw(st.integers(0, 19)) else draw(st.sampled_from(_SPELLS)))(field)
        before, after = draw(st.sampled_from([("", ""), ("", " "), (" ", ""), ("\n", "\t")]))
        parts.append(f"{json.dumps(key)}{before}:{after}{json.dumps(value, ensure_ascii=ascii_only)}")
    if not draw(st.integers(0, 19)):
        parts.append('"other":1')
    comma = draw(st.sampled_from([",", ", ", ",\n  "]))
    return ("{" + comma.join(parts) + "}").encode("utf-8", "surrogatepass")


def _verdict(screener: Screener, text: bytes, key: str | None) -> tuple[object, ...]:
    """The slow lane's verdict on one record."""
    try:
        record, data, content = screener.exactly(text, screener.bounds(INGEST), key, 0)
    except Refusal as why:
        return ("refused", why.field, why.rule)
    return ("taken", to_dict(record) | {"log_id": None if content is None else record.log_id}, content, data[:1])


@settings(max_examples=300 * MORE, deadline=None)
@given(_members(), st.sampled_from([None, None, None, "key"]))
@example(b'{"service_name":"s","user_id":"a","user_id" :"a","error_message":"\\":"}', None)
@example(b'{"service_name":"\\"","user_id":"a","user_id":null}', None)
def test_the_fast_lane_says_what_the_slow_lane_says(text: bytes, key: str | None) -> None:
    """On random records both lanes take the same with the same fields and digest, or refuse the same field."""
    screener = new_screener()
    slow = _verdict(screener, text, key)
    result = screener.screen(text, Form.JSON, INGEST, key)
    if result.refused:
        quick: tuple[object, ...] = ("refused", result.refused[0].field, result.refused[0].rule)
    else:
        record, content = result.records[0], result.contents[0]
        fields = to_dict(record) | {"log_id": None if content is None else record.log_id}
        quick = ("taken", fields, content, result.encoded[0][:1])
    assert quick == slow


@settings(max_examples=100 * MORE, deadline=None)
@given(st.lists(_members(), max_size=6))
def test_a_batch_is_the_sum_of_its_records(texts: list[bytes]) -> None:
    """Arrays, envelopes and lines give each record the verdict that it gets alone."""
    screener = new_screener()
    alone = [screener.screen(text, Form.JSON, INGEST) for text in texts]
    expected = [one.refused[0].rule if one.refused else one.contents[0] for one in alone]
    flat = [re.sub(rb"\s*\n\s*", b" ", text) for text in texts]
    for result in (
        screener.screen(b"[" + b",".join(texts) + b"]", Form.JSON, INGEST),
        screener.screen(b'{"logs":[' + b",".join(texts) + b"]}", Form.JSON, INGEST),
        screener.screen(b"\n".join(flat), Form.LINES, INGEST),
    ):
        got: list[object] = [None] * len(texts)
        for index, content in zip(result.indexes, result.contents, strict=True):
            got[index] = content
        for refused in result.refused:
            got[refused.index] = refused.rule
        assert got == expected


@settings(max_examples=150 * MORE, deadline=None)
@given(
    st.lists(_members() | st.sampled_from([b'{"service_name":"s"}', b'{"service_name":"t","user_id":"u"}']), min_size=1)
)
@example([b'{"service_name":"s","user_id":"a","user_id":"b"}', b'{"service_name":"s"}'])
@example([b'{"service_name":"s"},{"service_name":"t"', b"}"])
@example([b'[{"service_name":"s"}]', b'{"service_name":"s"}'])
def test_singles_together_are_what_each_is_alone(texts: list[bytes]) -> None:
    """Screened together only if each alone is taken, and then with the same fields, contents and ids of its own."""
    screener = new_screener()
    together = screener.singles(texts, screener.bounds(INGEST))
    if together is None:
        return
    assert [len(column) for column in together] == [len(texts)] * 3
    minted = set()
    for text, record, data, content in zip(texts, *together, strict=True):
        alone = screener.screen(text, Form.JSON, INGEST)
        assert not alone.refused
        assert alone.contents == [content]
        if content is None:
            minted.add(record.log_id)
        mine = {"log_id": None} if content is None else {}
        assert to_dict(record) | mine == to_dict(alone.records[0]) | mine
        assert decode(data) == record
    assert len(minted) == together[2].count(None)


def test_plain_singles_are_screened_together() -> None:
    """Good records in any one spelling are: the fast path exists."""
    screener = new_screener()
    for text in (b'{"service_name":"s","user_id":"u"}', b'{"serviceName":"s"}', b'{"ServiceName":"s"}'):
        assert screener.singles([text] * 3, screener.bounds(INGEST)) is not None


@settings(max_examples=100 * MORE, deadline=None)
@given(_json, st.sampled_from([None, 1, "\t"]), st.booleans(), st.integers(0, 3))
def test_payloads_are_byte_exact(value: object, indent: int | str | None, ascii_only: bool, place: int) -> None:
    """Whatever JSON value is given as a payload, its source text is what is stored."""
    source = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    record = f'{{"request_data" :\n{source}\t,"service_name":"s"}}'
    body = ",".join(['{"service_name":"n"}'] * place + [record])
    result = screen(f"[{body}]".encode())
    expected = value if value is None or isinstance(value, str) else source
    if isinstance(value, str) and "\0" in value:
        assert result.refused[0].rule is Rule.CHARACTER
    else:
        assert result.records[place].request_data == expected


@settings(max_examples=300 * MORE, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda s: s.encode("utf-8", "surrogatepass")))
def test_no_bytes_raise_anything_unforeseen(body: bytes) -> None:
    """Any bytes give a verdict or one of the three errors of the contract."""
    for form in Form:
        for text in (body, b'{"service_name":"s","request_data":' + body + b"}", b'[{"service_name":' + body + b"}]"):
            try:
                result = screen(text, form)
            except (MalformedBody, InvalidRecord, TooLarge):
                continue
            assert len(result.records) + len(result.refused) == result.total


# ------------------------------------------------------------------------------------------------- content


def content(text: str, key: str | None = None) -> bytes | None:
    """The content digest of one record."""
    return screen(text.encode(), key=key).contents[0]


def own(**fields: object) -> str:
    """A record with its own id and time."""
    return json.dumps({"log_id": V4, "log_timestamp": "2026-11-22T11:00:00Z", "service_name": "s"} | fields)


def test_content_is_compared_in_canonical_form() -> None:
    """Spelling, order, time zone, a 7th digit and the UUID's case do not make other content."""
    first = content(own())
    assert first is not None
    assert len(first) == 16
    assert content(own(log_id=V4.upper())) == first
    assert content(own(log_timestamp="2026-11-22T12:00:00+01:00")) == first
    assert content(own(log_timestamp="2026-11-22T11:00:00.0000009Z")) == first
    assert content(f'{{"ServiceName":"s","LogTimestamp":"2026-11-22T11:00:00Z","LogId":"{V4}"}}') == first
    assert content(own(user_id=None)) == first


@pytest.mark.parametrize(
    "change",
    [
        {"service_name": "t"},
        {"user_id": ""},
        {"request_data": {"a": 1}},
        {"is_success": False},
        {"is_success": True},
        {"log_type": "INFO"},
        {"log_timestamp": "2026-11-22T11:00:00.000001Z"},
        {"application_id": 0},
    ],
)
def test_content_differs_with_every_field_sent(change: dict[str, object]) -> None:
    """Also where a field is sent with its default's value: content is what was sent, before defaults."""
    assert content(own(**change)) != content(own())


def test_a_defaulted_time_is_not_content() -> None:
    """Two sendings under one Idempotency-Key are the same content although the default time has moved."""
    clock = FixedClock()
    screener = Screener(clock, Minter(clock, os.urandom))
    first = screener.screen(b'{"service_name":"s"}', Form.JSON, INGEST, "k")
    clock.us += 5_000_000
    again = screener.screen(b'{"service_name":"s"}', Form.JSON, INGEST, "k")
    assert first.contents == again.contents
    assert first.records[0].log_id == again.records[0].log_id
    assert again.records[0].log_timestamp - first.records[0].log_timestamp == 5_000_000


def test_minted_ids_have_no_content() -> None:
    """Nothing is compared under an id that nobody else can know."""
    assert screen(b'[{"service_name":"s"},{"service_name":"s"}]').contents == [None, None]


# ------------------------------------------------------------------------------------------------- identity


def test_minted_ids_only_rise() -> None:
    """Within a batch, from batch to batch, within one millisecond, and when the clock steps back two days."""
    clock = FixedClock()
    minter = Minter(clock, os.urandom)
    ids = []
    for step in (0, 0, 1, 999, 1, -172_800_000_000, 0, 5_000, 400_000_000_000):
        clock.us += step
        ids += minter.batch(7)
    assert ids == sorted(set(ids))
    assert all(uuid.UUID(one).version == 7 and uuid.UUID(one).variant == uuid.RFC_4122 for one in ids)
    assert canonical(ids[0]) == ids[0]
    assert version7_time(ids[0]) == NOW_US // 1000 * 1000


def test_minting_carries_over_its_digits() -> None:
    """With the largest random steps the last group runs over, then the tail, then the millisecond: still rising."""
    clock = FixedClock()
    minter = Minter(clock, lambda n: b"\xff" * n)
    ids = minter.batch(200_000)
    minter._high, minter._low = (1 << 26) - 1, (1 << 48) - 5  # (the rarest carry cannot be reached by drawing)
    ids += minter.batch(3)
    assert ids == sorted(set(ids))
    assert {uuid.UUID(one).version for one in ids} == {7}


def test_derived_ids_are_a_function_of_key_and_index() -> None:
    """The same for ever (this very value), different for every key and index, version 8."""
    assert derive_ids("order-1", range(3))[1:] == derive_ids("order-1", (1, 2))
    assert derive_ids("order-1", (0,)) == ["04419285-0b48-88ff-b0a8-1f4691125d5c"]
    many = {one for key in ("a", "a1", "a11", "1a") for one in derive_ids(key, range(200))}
    assert len(many) == 800
    assert {uuid.UUID(one).version for one in many} == {8}


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "a\n", "é", "\x7f", "\0"])
def test_an_unusable_key_is_refused(key: str) -> None:
    """An Idempotency-Key has 1 to 255 visible ASCII characters."""
    with pytest.raises(MalformedBody, match="Idempotency-Key"):
        check_key(key)
    assert check_key("x" * 255) == "x" * 255


def test_a_key_and_an_own_id_exclude_each_other() -> None:
    """The record with its own id is refused, not the request."""
    result = screen(f'[{own()},{{"service_name":"s"}}]'.encode(), key="k")
    assert [(one.index, one.field) for one in result.refused] == [(0, "log_id")]
    assert [one.log_id for one in result.records] == derive_ids("k", (1,))


def test_refused_records_do_not_shift_derived_ids() -> None:
    """The index counts the input's records, refused ones included."""
    result = screen(b'[{"service_name":"a"},{},{"service_name":"b"}]', key="k")
    assert [one.log_id for one in result.records] == derive_ids("k", (0, 2))


@given(st.uuids())
def test_every_usual_spelling_of_a_uuid_is_one_id(value: uuid.UUID) -> None:
    """Case, braces, parentheses, urn:uuid: and missing hyphens are spellings."""
    text = str(value)
    if value.int == 0:
        return
    for spelling in (text, text.upper(), f"{{{text}}}", f"({text})", value.urn, value.hex, value.hex.upper()):
        assert canonical(spelling) == text


# ------------------------------------------------------------------------------------------------- timestamps


@given(st.datetimes(), st.integers(-1439, 1439), st.integers(0, 9))
def test_a_timestamp_is_the_instant_it_names(moment: object, offset: int, digits: int) -> None:
    """Any instant, any offset, any number of digits: exact to the microsecond, digits beyond the sixth cut."""
    from datetime import UTC, datetime, timedelta, timezone

    assert isinstance(moment, datetime)
    zone = timezone(timedelta(minutes=offset))
    fraction = f"{moment.microsecond:06d}789"[:digits]
    text = moment.strftime("%Y").rjust(4, "0") + moment.strftime("-%m-%dT%H:%M:%S")
    text += (
        "." + fraction if fraction else ""
    ) + f"{'-' if offset < 0 else '+'}{abs(offset) // 60:02d}:{abs(offset) % 60:02d}"
    kept = int(fraction[:6].ljust(6, "0")) if fraction else 0
    exact = moment.replace(microsecond=kept, tzinfo=zone)
    stamps = Timestamps()
    try:
        expected = exact.astimezone(UTC)
    except OverflowError:
        with pytest.raises(ValueError, match="years 0001 to 9999"):
            stamps.parse(text)
        return
    for _ in range(2):  # the second time from what was remembered
        got = stamps.parse(text)
        assert timestamp_text(got) == expected.strftime("%Y").rjust(4, "0") + expected.strftime("-%m-%dT%H:%M:%S.%fZ")


def test_remembered_seconds_are_bounded() -> None:
    """A client that sends a different second each time does not fill the memory."""
    stamps = Timestamps()
    for second in range(10_000):
        stamps.parse(f"2026-11-{1 + second // 3600:02d}T00:{second // 60 % 60:02d}:{second % 60:02d}Z")
    assert len(stamps.seconds) <= 4096


def test_a_remembered_second_does_not_loosen_the_form() -> None:
    """After a good timestamp, the same second in a bad form is still refused."""
    stamps = Timestamps()
    stamps.parse("2026-11-22T11:00:00.5Z")
    for text in ("", ".Z", ".5", ".5z5Z", ".-5Z", ".\u0665Z", ".5ZZ", " Z", "Z ", ".²Z", "+1Z", "x5Z"):
        with pytest.raises(ValueError, match="RFC 3339"):
            stamps.parse("2026-11-22T11:00:00" + text)
        body = json.dumps(
            [
                {"service_name": "s", "log_timestamp": t}
                for t in ("2026-11-22T11:00:00.5Z", "2026-11-22T11:00:00" + text)
            ]
        )
        assert [one.rule for one in screen(body.encode()).refused] == [Rule.TIMESTAMP]


def test_stored_form_is_the_records_own() -> None:
    """What screening hands to the spool is record.encode of each record."""
    result = screen(b'[{"service_name":"s","request_data":{"a":1}},{"service_name":"t"}]')
    assert result.encoded == [encode(one) for one in result.records]


def test_refused_carries_its_status() -> None:
    """413 for too large, 409 for a conflict, 422 for the rest."""
    assert {
        rule.value: Refused(0, "f", rule, "r", b"").status
        for rule in Rule
        if rule in (Rule.TOO_LARGE, Rule.CONFLICT, Rule.TYPE)
    } == {
        "too_large": 413,
        "conflict": 409,
        "type": 422,
    }

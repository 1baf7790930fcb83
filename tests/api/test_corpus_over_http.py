"""The corpus of bad input over HTTP: each text as a body, as a field's value and as an NDJSON line, each record alone.

Whatever comes in: an answer that is not a 5xx, an error body that names no value, and a next good request that is
accepted. One door serves all cases, so that what one of them breaks the next one sees.
"""

import json
import re
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from sidecar.settings import MIB
from tests.api.door import Door, open_door
from tests.corpus import JsonText, RecordText, json_texts, record_texts

pytestmark = pytest.mark.asyncio(loop_scope="module")
GOOD = b'{"service_name":"good"}'
LINES = {"Content-Type": "application/x-ndjson"}
ALL = json_texts("accept", "reject", "surrogate", "deep")

FIXED = {"time: more than a day ahead", "defaults"}  # judged by the clock that test_screening holds still
RECORDS = [case for case in record_texts() if case.name not in FIXED]


def name(case: JsonText | RecordText) -> str:
    """How a case is shown."""
    return case.name


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Door]:
    """One running door for all cases."""
    async with open_door(tmp_path_factory.mktemp("door") / "spool") as opened:
        yield opened


async def records(door: Door) -> list:
    """What was accepted since the last look, oldest first; the spool is empty afterwards."""
    found = []
    for store in ("dynamodb", "postgres"):
        found = []
        while door.spool.counters(store).pending:
            for frame in await door.spool.cursor(store).take(10_000, 64 * MIB):
                found += frame.records
                door.spool.cursor(store).settle(frame)
    return found


async def still_well(door: Door) -> None:
    """The next good request is accepted."""
    status, _, _ = await door.post(GOOD)
    assert status == 202


@pytest.mark.parametrize("case", ALL, ids=name)
async def test_a_text_as_a_body_is_refused_or_judged_by_the_schema(door: Door, case: JsonText) -> None:
    """Not JSON: 400. JSON: the schema's verdict, 202, 207, 413 or 422. Never a 5xx."""
    status, document, _ = await door.post(case.text)
    assert status == 400 if case.verdict == "reject" else status in {202, 207, 400, 413, 422}, document
    if status == 400 and case.verdict != "reject":
        assert case.verdict == "deep"
    await still_well(door)
    await records(door)


@pytest.mark.parametrize("case", ALL, ids=name)
async def test_a_text_as_a_fields_value_is_refused_or_kept_byte_for_byte(door: Door, case: JsonText) -> None:
    """Not JSON: 400. JSON: what the spool then holds is the source text, a string's value, or null."""
    await records(door)
    status, document, _ = await door.post(b'{"service_name":"s","request_data":' + case.text + b"}")
    if case.verdict == "reject":
        assert status == 400, document
    elif case.verdict == "deep":
        assert status in {400, 422}, document
    elif case.verdict == "surrogate" and case.text.startswith(b'"'):
        assert status == 422, document
    else:
        assert status == 202, document
        source = case.text.strip(b" \t\r\n")
        plain = source.startswith(b'"') or source == b"null"
        expected = json.loads(source) if plain else source.decode()
        assert [one.request_data for one in await records(door)] == [expected]
    await still_well(door)


@pytest.mark.parametrize("case", ALL, ids=name)
async def test_a_text_as_a_line_costs_no_neighbour(door: Door, case: JsonText) -> None:
    """NDJSON: a line that cannot be taken is refused by its index; the good lines around it are stored."""
    await records(door)
    line = re.sub(rb"[\r\n]", b" ", case.text)
    status, document, _ = await door.post(b"\n".join((GOOD, line, GOOD)), LINES)
    assert status in {202, 207}, document
    stored = [one.service_name for one in await records(door)]
    assert stored.count("good") >= 2
    if line.strip() and case.verdict == "reject" and b"\n" not in case.text and b"\r" not in case.text:
        assert [error["index"] for error in document["errors"]] == [1]
        assert len(stored) == 2


@pytest.mark.parametrize("case", RECORDS, ids=name)
async def test_a_record_is_taken_or_refused_by_its_field(door: Door, case: RecordText) -> None:
    """Refused: 413 or 422 with the field, and nothing stored. Taken: 202 and the fields as they are stored."""
    await records(door)
    status, document, _ = await door.post(b"[" + case.text + b"]")
    if case.refused is not None:
        assert status == 207, document
        assert [(e["index"], e["field"]) for e in document["errors"]] == [(0, case.refused)]
        assert await records(door) == []
    elif case.text.startswith(b"{"):
        assert status == 202, document
        found = await records(door)
        for field, value in case.stored.items() if found else ():  # an id of an earlier case is a duplicate
            assert getattr(found[0], field) == value, field
    await still_well(door)

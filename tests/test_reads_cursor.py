"""The cursor: what it carries, and what is told from one of ours."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import BadRequest
from sidecar.reads import cursor
from sidecar.screening.timestamps import EARLIEST, LATEST
from sidecar.stores.base import ByApplication, ByCorrelation, ByService, ErrorsOn, Position

POSITIONS = st.builds(Position, st.integers(EARLIEST, LATEST), st.uuids().map(str))
QUERIES = st.one_of(
    st.builds(ByApplication, st.integers(-(2**63), 2**63 - 1)),
    st.builds(ByCorrelation, st.text(max_size=100)),
    st.builds(ByService, st.text(min_size=1, max_size=100), st.integers(0, 9), st.integers(0, 9)),
    st.builds(ErrorsOn, st.integers(-700_000, 2_900_000)),
)
HERE = Position(1_700_000_000_000_000, "018bcfe5-6800-7000-8000-000000000001")


@given(query=QUERIES, position=POSITIONS)
def test_a_cursor_gives_the_position_back(query, position):
    """Any position of any query goes through the text unchanged, and the text is safe in a URL."""
    text = cursor.encode(query, position)
    assert cursor.decode(query, text) == position
    assert len(text) == 44
    assert set(text) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


@given(one=QUERIES, other=QUERIES, position=POSITIONS)
def test_a_cursor_of_another_query_is_refused(one, other, position):
    """It goes with the query that it came from and with no other."""
    text = cursor.encode(one, position)
    if one == other:
        assert cursor.decode(other, text) == position
    else:
        with pytest.raises(BadRequest, match=r"^cursor: "):
            cursor.decode(other, text)


def test_one_application_is_not_one_correlation():
    """Queries of different kinds with the same value are different queries."""
    with pytest.raises(BadRequest):
        cursor.decode(ByCorrelation("7"), cursor.encode(ByApplication(7), HERE))


@given(index=st.integers(0, 263))
def test_any_damaged_bit_is_seen(index):
    """A cursor with one bit flipped is refused, whichever bit."""
    raw = bytearray(base64.urlsafe_b64decode(cursor.encode(ErrorsOn(1), HERE)))
    raw[index // 8] ^= 1 << index % 8
    with pytest.raises(BadRequest, match=r"^cursor: "):
        cursor.decode(ErrorsOn(1), base64.urlsafe_b64encode(raw).decode())


@given(text=st.text(max_size=60))
def test_any_other_text_is_refused_as_the_clients_fault(text):
    """Nothing but BadRequest comes of text that is no cursor."""
    with pytest.raises(BadRequest, match=r"^cursor: "):
        cursor.decode(ErrorsOn(1), text)


def test_another_version_says_so():
    """A cursor of a later sidecar is told from a damaged one."""
    raw = bytearray(base64.urlsafe_b64decode(cursor.encode(ErrorsOn(1), HERE)))
    raw[0] = 2
    with pytest.raises(BadRequest, match="another version"):
        cursor.decode(ErrorsOn(1), base64.urlsafe_b64encode(raw).decode())


@pytest.mark.parametrize("us", [EARLIEST - 1, LATEST + 1, 2**63 - 1, -(2**63)])
def test_a_forged_instant_that_no_store_holds_is_refused(us):
    """A well-made cursor beyond the years 1 to 9999 does not reach a store."""
    with pytest.raises(BadRequest):
        cursor.decode(ErrorsOn(1), cursor.encode(ErrorsOn(1), Position(us, HERE.log_id)))

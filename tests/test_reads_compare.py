"""The comparison of two answers: each class of difference, and what a page's end does not say."""

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.reads.compare import Differences, Outcome, compare
from sidecar.reads.questions import Result
from tests.stores.records import log_id, record, records

BATCH = records(10)[::-1]  # newest first


def page(entries, *, complete=False):
    """A page of full records."""
    return Result(tuple(entries), complete=complete)


def test_equal_answers_have_no_difference():
    """The same records in the same order: nothing to say."""
    assert compare(page(BATCH), page(BATCH)) == Differences()
    assert compare(page(BATCH), page(BATCH)).outcome is Outcome.MATCH


@pytest.mark.parametrize("index", [0, 4, 9])
def test_a_record_that_the_other_lacks_is_missing(index):
    """One record less there is ``missing`` by its id, wherever it stood."""
    other = BATCH[:index] + BATCH[index + 1 :]
    found = compare(page(BATCH, complete=True), page(other, complete=True))
    assert (found.outcome, list(found.missing), dict(found.extra)) == (Outcome.MISSING, [BATCH[index].log_id], {})


def test_a_missing_record_is_not_also_an_extra_one_at_the_bottom_of_a_full_page():
    """The other store's page reaches further down; what lies below our end is not compared."""
    found = compare(page(BATCH[:5]), page(BATCH[1:6]))
    assert (list(found.missing), dict(found.extra)) == ([BATCH[0].log_id], {})


def test_a_record_that_only_the_other_has_is_extra():
    """And what that pushes off the end of its page is not missing."""
    found = compare(page(BATCH[1:6]), page(BATCH[:5]))
    assert (found.outcome, list(found.extra), dict(found.missing)) == (Outcome.EXTRA, [BATCH[0].log_id], {})


def test_a_complete_answer_is_compared_to_the_very_end():
    """An answer that ended by itself vouches for everything below its last record."""
    found = compare(page(BATCH, complete=True), page(BATCH[:7], complete=True))
    assert set(found.missing) == {r.log_id for r in BATCH[7:]}


def test_other_content_is_a_field_named_without_its_values():
    """Fields are named; both sides are described by kind and length alone."""
    other = [msgspec.structs.replace(BATCH[0], user_id="CANARY", request_data=None), *BATCH[1:]]
    found = compare(page(BATCH), page(other))
    assert found.outcome is Outcome.FIELD
    assert found.changed == {
        BATCH[0].log_id: {"user_id": "null / text of 6", "request_data": f"text of {len(BATCH[0].request_data)} / null"}
    }
    assert "CANARY" not in repr(found)


def test_the_same_records_in_another_order_is_order():
    """No record differs, only the sequence."""
    other = [BATCH[1], BATCH[0], *BATCH[2:]]
    found = compare(page(BATCH), page(other))
    assert found.outcome is Outcome.ORDER
    assert found == Differences(disordered=True)


def test_one_against_nothing():
    """By id: a record here and none there is missing, and the reverse extra."""
    one, none = Result((record(1),)), Result()
    assert compare(one, none).outcome is Outcome.MISSING
    assert compare(none, one).outcome is Outcome.EXTRA
    assert list(compare(none, one).extra) == [log_id(1)]


def test_counts_are_compared_by_group():
    """A group with fewer there is missing by how many, one with more is extra."""
    found = compare(Result(totals={"a": 3, "b": 1}), Result(totals={"a": 1, "c": 2}))
    assert (found.missing, found.extra) == ({"a": 2, "b": 1}, {"c": 2})
    assert compare(Result(totals={"": 5}), Result(totals={"": 5})) == Differences()


@given(
    lost=st.sets(st.integers(0, 39)),
    limit=st.integers(1, 45),
    seed=st.integers(),
)
def test_what_a_store_lost_is_found_exactly_as_far_as_both_pages_reach(lost, limit, seed):
    """Any subset lost, any page size: missing is the lost ones above both ends, and nothing is extra."""
    everything = records(40)[::-1]
    random.Random(seed).shuffle(everything)
    everything.sort(key=lambda r: r.log_timestamp, reverse=True)
    kept = [r for i, r in enumerate(everything) if i not in lost]
    served = Result(tuple(everything[:limit]), complete=len(everything) < limit)
    other = Result(tuple(kept[:limit]), complete=len(kept) < limit)
    expected = {r.log_id for i, r in enumerate(everything) if i in lost and i < limit}
    found = compare(served, other)
    assert set(found.missing) == expected
    assert not found.extra

"""The interval set behaves as a set of numbers."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from sidecar.spool.intervals import Intervals

ranges = st.lists(
    st.tuples(st.booleans(), st.integers(0, 60), st.integers(-2, 8)).map(lambda t: (t[0], t[1], t[1] + t[2])),
    max_size=30,
)


@given(ranges)
def test_intervals_are_a_set_of_numbers(changes):
    """Adding and removing ranges in any order gives what a set gives, in disjoint intervals that do not touch."""
    intervals, model = Intervals(), set()
    for add, lo, hi in changes:
        if add:
            intervals.add(lo, hi)
            model |= set(range(lo, hi + 1))
        else:
            intervals.remove(lo, hi)
            model -= set(range(lo, hi + 1))
        pairs = list(intervals)
        assert {n for lo, hi in pairs for n in range(lo, hi + 1)} == model
        assert all(a[1] + 1 < b[0] for a, b in itertools.pairwise(pairs))
    for n in range(75):
        assert intervals.covers(n) == (n in model)
        assert intervals.next_uncovered(n) == next(k for k in range(n, 200) if k not in model)
        assert intervals.next_covered(n) == min((k for k in model if k >= n), default=None)
    assert intervals.highest == max(model, default=-1)


@given(ranges)
def test_packed_intervals_come_back(changes):
    """Unpack is the inverse of pack."""
    intervals = Intervals(*((lo, hi) for _, lo, hi in changes))
    assert list(Intervals.unpack(intervals.pack())) == list(intervals)

"""The window of records under way: nothing appears, nothing disappears, no chunk breaks a limit."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.backlog import Backlog, Load, count, cut, records_of, singles
from sidecar.record import LogRecord
from sidecar.stores.base import WriteLimits


def record(n: int) -> LogRecord:
    """A record that is told from others by its id."""
    return LogRecord(f"id-{n}", None, "INFO", "svc", None, None, None, True, None, None, n, None, None)


def load(ids: list[int], size: int = 100) -> Load:
    """A load of records with these ids."""
    return Load([record(i) for i in ids], [size] * len(ids), len(ids))


def backlog(max_records: int = 25, max_bytes: int = 10_000) -> Backlog:
    """A backlog for a store with these limits."""
    return Backlog(WriteLimits(max_records, max_bytes, 4), max_records=1_000, max_bytes=10**7)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=40), min_size=1, max_size=10),
    st.integers(1, 30),
    st.integers(1, 900),
    st.data(),
)
def test_every_record_is_handed_out_until_it_is_decided_and_then_never_again(groups, max_records, size, data):
    """Any mix of loads, sizes, twins, returns and bisections ends with every load decided exactly once."""
    queue = backlog(max_records, 2_000)
    loads = [load(ids, size) for ids in groups]
    for item in loads:
        queue.add(item, 0.0)
    decided: list[Load] = []
    handed = 0
    while queue.ready:
        handed += 1
        assert handed < 10_000
        chunk = queue.next_chunk(data.draw(st.integers(1, 40)), 0.0)
        ids = [r.log_id for r in records_of(chunk)]
        assert ids
        assert len(set(ids)) == len(ids)
        assert len(ids) <= max(max_records, 40)
        assert len(ids) == 1 or size * len(ids) <= 2_000
        action = data.draw(st.sampled_from(["done", "done", "done", "front", "behind", "bisect"]))
        if action == "bisect" and len(ids) > 1 and handed < 200:
            queue.bisect(chunk)
        elif action in {"front", "behind"} and handed < 200:
            queue.give_back(chunk, 0.0, front=action == "front")
        else:
            decided += [p.load for p in chunk if queue.decided(p.load, len(p))]
    assert sorted(map(id, decided)) == sorted(map(id, loads))
    assert queue.has_room
    assert queue._held == queue._held_bytes == queue._queued == 0


def test_a_record_over_the_byte_limit_goes_alone():
    """One huge record is still sent, by itself."""
    queue = backlog(max_bytes=500)
    queue.add(load([1, 2, 3], size=400), 0.0)
    queue.add(load([4], size=900), 0.0)
    assert [len(queue.next_chunk(25, 0.0)) for _ in range(4)] == [1, 1, 1, 1]


def test_a_chunk_joins_frames_up_to_the_limit_of_records():
    """Sixty frames of one record make chunks of 25, 25 and 10."""
    queue = backlog()
    for i in range(60):
        queue.add(load([i]), 0.0)
    assert [count(queue.next_chunk(25, 0.0)) for _ in range(3)] == [25, 25, 10]


def test_room_ends_at_the_window_and_returns_when_records_are_decided():
    """Memory is bounded: no more is asked for while the window is full."""
    queue = Backlog(WriteLimits(25, 10_000, 4), max_records=50, max_bytes=10**6)
    first = load(list(range(50)))
    queue.add(first, 0.0)
    assert not queue.has_room
    for piece in singles(queue.next_chunk(25, 0.0) + queue.next_chunk(25, 0.0)):
        queue.decided(piece.load, 1)
    assert queue.has_room


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 200))
def test_a_cut_loses_nothing_and_keeps_the_order(lengths, n):
    """cut(chunk, n) = the first n records and the rest."""
    queue = backlog(max_records=200, max_bytes=10**9)
    start = 0
    for length in lengths:
        queue.add(load(list(range(start, start + length))), 0.0)
        start += length
    chunk = queue.next_chunk(200, 0.0)
    left, right = cut(chunk, n)
    assert count(left) == min(n, start)
    joined = [r.log_timestamp for part in (left, right) if part for r in records_of(part)]
    assert joined == list(range(start))

"""Reads over the store in memory: bounds, pages, allow-list, failures, slots."""

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.errors import BadRequest, Busy, Forbidden, RetryClass, StoreError
from sidecar.phase import STORES, Phase
from sidecar.reads import Reads
from sidecar.reads.questions import PageOf, weight
from sidecar.stores.base import ByApplication, ByCorrelation, ByService, CountQuery, ErrorsOn
from sidecar.stores.memory import MemoryStore
from tests.parts.reads import Breakable, ReadsStand
from tests.parts.sidecar import eventually
from tests.stores.records import BASE, DAY, log_id, record, records

APPLICATION = ByApplication(7)
WEEK = ByService("orders", BASE, BASE + 7 * DAY)
ASKED = (APPLICATION, ByCorrelation("corr-1"), WEEK, ErrorsOn(BASE // DAY))


async def pages(reads: Reads, query, **asked):
    """Every page, one after the other."""
    found, after = [], None
    while True:
        page = (await reads.page(query, cursor_text=after, **asked)).value
        found.append(page)
        after = page.next_cursor
        if after is None:
            return found


def newest_first(batch):
    """The order of every answer."""
    return sorted(batch, key=lambda r: (r.log_timestamp, r.log_id), reverse=True)


@pytest.mark.parametrize("phase", list(Phase))
async def test_a_read_is_served_by_the_store_that_the_phase_names_and_by_no_other(phase):
    """The phase decides; the answer says who, in which phase, how consistent, and how far behind."""
    stand = ReadsStand(phase=phase, pending={"postgres": 3, "dynamodb": 5})
    stand.configure(shadow_sample=0.0)
    serving = ("postgres", "postgres", "dynamodb", "dynamodb")[phase]
    await stand.write([record(1, is_success=False)])
    for store in stand.stores.values():
        store.calls.clear()
    answers = [await stand.reads.page(query) for query in ASKED]
    answers += [await stand.reads.get(log_id(1)), await stand.reads.count(CountQuery(BASE, BASE + DAY))]
    for answer in answers:
        assert (answer.served_by, answer.policy.phase) == (serving, phase)
        assert answer.owed == stand.pending[serving]
    assert {name: bool(store.calls) for name, store in stand.stores.items()} == {
        name: name == serving for name in STORES
    }


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 3000), max_size=40),
    limit=st.integers(1, 45),
    view=st.sampled_from(["full", "summary"]),
    allowed=st.none() | st.just(("orders",)),
)
async def test_pages_of_any_size_are_the_whole_answer_cut_up(sizes, limit, view, allowed):
    """With equal times, large records and others' records between: each visible one once, in order, no page too big."""
    stand = ReadsStand()
    stand.configure(max_page_bytes=65_536, services=allowed)
    batch = [
        record(
            i, log_timestamp=BASE + i // 5, request_data="x" * size * 30, service_name=("orders", "billing")[i % 3 == 1]
        )
        for i, size in enumerate(sizes)
    ]
    await stand.write(batch)
    expected = [r.log_id for r in newest_first(batch) if allowed is None or r.service_name in allowed]
    found = await pages(stand.reads, APPLICATION, limit=limit, view=view)
    assert [e.log_id for page in found for e in page.entries] == expected
    for page in found:
        assert len(page.entries) <= limit
        if view == "full":
            assert sum(map(weight, page.entries)) <= 65_536 or len(page.entries) == 1


async def test_a_cursor_never_names_a_record_of_a_service_that_is_not_allowed():
    """Also where such records stand at the end of a page: the position is that of a record that was shown."""
    stand = ReadsStand()
    stand.configure(services=("orders",))
    batch = [record(i, log_timestamp=BASE + i, service_name=("orders", "billing")[i % 2]) for i in range(40)]
    await stand.write(batch)
    visible = {r.log_id for r in batch if r.service_name == "orders"}
    from sidecar.reads import cursor

    for page in await pages(stand.reads, APPLICATION, limit=3):
        if page.next_cursor:
            assert cursor.decode(APPLICATION, page.next_cursor).log_id in visible


async def test_hundreds_of_records_that_are_not_allowed_are_passed_over():
    """Chunk after chunk of other services' records, before and after the visible ones: all visible ones, each once."""
    stand = ReadsStand()
    stand.configure(services=("orders",))
    batch = [
        record(i, log_timestamp=BASE + i // 7, service_name="orders" if 300 <= i < 320 else "billing")
        for i in range(700)
    ]
    await stand.write(batch, "postgres")
    found = await pages(stand.reads, APPLICATION, limit=8)
    assert [[int(e.log_id[-3:], 16) for e in page.entries] for page in found] == [
        list(range(319, 311, -1)),
        list(range(311, 303, -1)),
        list(range(303, 299, -1)),
    ]


async def test_the_allow_list_holds_on_every_route():
    """By id, by service, counts and estimates: another service's records are refused or left out, never shown."""
    stand = ReadsStand()
    stand.configure(services=("orders",))
    foreign, own = record(1, service_name="billing", is_success=False), record(2, is_success=False)
    await stand.write([foreign, own])
    reads = stand.reads
    for refused in (
        reads.get(foreign.log_id),
        reads.page(ByService("billing", BASE, BASE)),
        reads.count(CountQuery(BASE, BASE, "billing")),
        reads.estimate(CountQuery(BASE, BASE, "billing")),
        reads.estimate(CountQuery(BASE, BASE)),
    ):
        with pytest.raises(Forbidden, match=r"reads\.services"):
            await refused
    for query in ASKED:
        assert [e.log_id for e in (await reads.page(query)).value.entries] == [own.log_id]
    assert (await reads.get(own.log_id)).value == own
    total = await reads.count(CountQuery(BASE, BASE))
    assert (total.value.count, total.value.groups) == (1, None)
    assert (await reads.count(CountQuery(BASE, BASE), "service")).value.groups == {"orders": 1}
    assert (await reads.count(CountQuery(BASE, BASE), "date")).value.groups == {"2026-01-15": 1}


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        (lambda r: r.page(ByService("s", BASE, BASE + 31 * DAY + 1)), r"31 days after start \(reads\.max_days\)"),
        (lambda r: r.page(ByService("s", BASE + 1, BASE)), r"start: after end"),
        (lambda r: r.page(APPLICATION, limit=0), r"limit: allowed are 1 to 1000 \(reads\.max_limit\)"),
        (lambda r: r.page(APPLICATION, limit=1001), r"limit: allowed are 1 to 1000 \(reads\.max_limit\)"),
        (lambda r: r.page(APPLICATION, cursor_text="x"), r"cursor: "),
        (lambda r: r.count(CountQuery(BASE, BASE + 31 * DAY + 1)), r"31 days after start \(reads\.count_max_days\)"),
        (lambda r: r.count(CountQuery(BASE + 1, BASE)), r"start: after end"),
        (lambda r: r.estimate(CountQuery(BASE, BASE + 3661 * DAY)), r"3660 days"),
    ],
)
async def test_a_broken_bound_is_named_and_no_store_is_asked(ask, named):
    """Too wide, too many, backwards, foreign: refused before anything is read."""
    stand = ReadsStand()
    with pytest.raises(BadRequest, match=named):
        await ask(stand.reads)
    assert not any(store.calls for store in stand.stores.values())


async def test_the_widest_range_is_allowed():
    """Exactly the bound passes."""
    stand = ReadsStand()
    await stand.reads.page(ByService("s", BASE, BASE + 31 * DAY))
    await stand.reads.count(CountQuery(BASE, BASE + 31 * DAY))


ALL_READS = (
    lambda r: r.get(log_id(1)),
    *(lambda r, q=query: r.page(q) for query in ASKED),
    lambda r: r.page(APPLICATION, view="summary"),
    lambda r: r.count(CountQuery(BASE, BASE)),
    lambda r: r.count(CountQuery(BASE, BASE), "service"),
    lambda r: r.estimate(CountQuery(BASE, BASE)),
)


@pytest.mark.parametrize("ask", ALL_READS)
async def test_a_store_that_fails_is_an_error_with_its_reason_and_never_an_empty_answer(ask):
    """Each kind of read: the store's own error comes through as it is."""
    stand = ReadsStand()
    stand.stores["postgres"].down(RetryClass.BLOCKED, "42P01")
    with pytest.raises(StoreError) as caught:
        await ask(stand.reads)
    assert (caught.value.store, caught.value.reason, caught.value.code) == ("postgres", "planted by the test", "42P01")


@pytest.mark.parametrize("ask", ALL_READS)
async def test_a_store_that_says_nothing_is_given_up_in_time(ask):
    """Silence is a timeout that names store and setting."""
    stand = ReadsStand()
    stand.configure(timeout=0.05)
    stand.stores["postgres"].gate.clear()
    with pytest.raises(StoreError, match=r"reads\.timeout") as caught:
        await ask(stand.reads)
    assert (caught.value.store, caught.value.code) == ("postgres", "timeout")


async def test_a_failure_in_the_middle_of_a_page_fails_the_page():
    """What was read before is not given out as if it were all."""
    stand = ReadsStand()
    await stand.write(records(150))
    postgres = stand.stores["postgres"]

    def fail_second(name, answer):
        if postgres.calls.count("query") == 2:
            raise StoreError("postgres", RetryClass.TRANSIENT, "lost")
        return answer

    postgres.twist = fail_second
    with pytest.raises(StoreError, match="lost"):
        await stand.reads.page(APPLICATION, limit=150)


async def test_reads_under_way_and_waiting_are_bounded():
    """As many as in_flight ask the store, as many as waiting wait, one more is told to come again; all end."""
    stand = ReadsStand()
    stand.configure(in_flight=2, waiting=3, timeout=5.0)
    postgres = stand.stores["postgres"]
    postgres.gate.clear()
    tasks = [asyncio.create_task(stand.reads.get(log_id(i))) for i in range(5)]
    await eventually(lambda: len(postgres.calls) == 2)
    with pytest.raises(Busy, match=r"reads\.waiting") as caught:
        await stand.reads.get(log_id(9))
    assert caught.value.reason == "reads_busy"
    tasks[3].cancel()  # one that waits
    tasks[0].cancel()  # one under way: its slot goes on
    await eventually(lambda: len(postgres.calls) == 3)
    postgres.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(r, asyncio.CancelledError) for r in results] == [True, False, False, True, False]
    assert stand.reads._slots.running == 0


async def test_a_slot_given_to_a_read_that_was_cancelled_in_the_same_instant_goes_on():
    """Handed over and cancelled before it ran: the slot is not lost."""
    stand = ReadsStand()
    stand.configure(in_flight=1)
    slots = stand.reads._slots

    async def hold():
        async with slots.slot():
            await asyncio.sleep(0)

    async with slots.slot():
        waiter = asyncio.create_task(hold())
        await asyncio.sleep(0)
    waiter.cancel()  # the slot is its own already, but it has not run
    await asyncio.gather(waiter, return_exceptions=True)
    assert waiter.cancelled()
    await asyncio.wait_for(hold(), 5)
    assert slots.running == 0


async def test_a_read_that_gets_no_slot_in_time_is_busy_not_a_timeout_of_the_store():
    """The store is not blamed for a queue of ours."""
    stand = ReadsStand()
    stand.configure(in_flight=1, timeout=0.1)
    stand.stores["postgres"].gate.clear()
    first = asyncio.create_task(stand.reads.get(log_id(1)))
    await eventually(lambda: stand.stores["postgres"].calls == ["get"])
    stand.configure(in_flight=1, timeout=0.02)
    with pytest.raises(Busy, match="slot"):
        await stand.reads.get(log_id(2))
    with pytest.raises(StoreError):
        await first


@pytest.mark.parametrize("moment", ["before", "while"])
async def test_an_instance_that_does_not_know_its_phase_answers_nothing(moment):
    """Fenced before the question, or while it was asked: Busy, and what was read is not given out."""
    stand = ReadsStand()

    class Use:
        def confirm(self):
            if moment == "before" or stand.stores["postgres"].calls:
                raise Busy("phase_unknown", "fenced", 5)
            from sidecar.phase import TABLE

            return TABLE[Phase.DUAL_WRITE]

    reads = Reads(
        {"postgres": stand.stores["postgres"]},
        lambda: contextlib.nullcontext(Use()),
        lambda: stand.settings,
        owed=lambda _store: 0,
        clock=stand.clock,
        metrics=stand.metrics,
    )
    with pytest.raises(Busy, match="fenced"):
        await reads.get(log_id(1))
    assert stand.stores["postgres"].calls == ([] if moment == "before" else ["get"])


async def test_the_number_of_store_calls_of_a_page_follows_the_records_and_not_the_service():
    """A default page of small records is one call; large records are asked for in small chunks."""
    stand = ReadsStand()
    await stand.write([record(i, log_timestamp=BASE + i) for i in range(200)], "postgres")
    postgres = stand.stores["postgres"]
    postgres.calls.clear()
    await stand.reads.page(APPLICATION)
    assert postgres.calls == ["query"]
    asked = []
    big = Breakable(MemoryStore())
    await big.write([record(i, log_timestamp=BASE + i, request_data="x" * 100_000) for i in range(200)])
    big.twist = lambda _name, answer: asked.append(len(answer)) or answer
    page = await PageOf(APPLICATION, None, 1000, 4 * 1024 * 1024).ask(big)
    assert len(page.entries) == 41
    assert asked[0] == 100
    assert not page.complete


async def test_read_seconds_are_observed_by_pattern_and_store_also_of_failures():
    """The histogram counts every read that reached a store."""
    stand = ReadsStand()
    await stand.reads.page(WEEK)
    stand.stores["postgres"].down()
    with pytest.raises(StoreError):
        await stand.reads.page(WEEK)
    labels = {"pattern": "service", "store": "postgres"}
    assert stand.metrics.registry.get_sample_value("sidecar_read_seconds_count", labels) == 2

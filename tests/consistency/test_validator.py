"""The validator on stores in memory: exactly what was injected, every reason, and never clean by mistake."""

import asyncio
import random

import msgspec
import pytest

from sidecar.consistency import DIVERGENT, Options, Reason, Rules, Settled, Window, document
from sidecar.consistency import validator as module
from sidecar.consistency.explain import PART, Known
from sidecar.errors import RetryClass, StoreError
from sidecar.gaps import GapLine
from sidecar.phase import STORES
from sidecar.verdicts import DAY_US
from tests.consistency.stand import WINDOW, ConsistencyStand, Told, harm, harm_memory, population
from tests.parts.reads import Breakable
from tests.stores.records import BASE, DAY, log_id, record, records

HOUR = BASE // 3_600_000_000


@pytest.mark.parametrize("deep", [False, True])
async def test_the_report_is_the_injected_set_over_a_hundred_seeds(deep, monkeypatch):
    """Deleted, added, edited, swapped, moved behind the sidecar, in either store: nothing more, nothing less."""
    monkeypatch.setattr(module, "_STEP", 7)  # many steps, as with millions of records
    kinds = set()
    for seed in range(100):
        rng = random.Random(seed)
        stand = ConsistencyStand()
        held = population(rng, rng.randrange(20, 120))
        await stand.write(held)
        done = harm(rng, held)
        expected = done.deep if deep else done.expected
        for name in STORES:
            harm_memory(stand.stores[name], done.deeds[name])
        line = await stand.run(deep=deep)
        assert stand.found() == expected, seed
        assert line.outcome == ("divergent" if expected else "clean")
        assert {d.log_id: d.fields for d in stand.seen if d.keys} == {
            i: (done.keys[i],) for i in done.keys if i in expected
        }
        assert sum(line.reasons.values()) == len(expected)
        kinds |= set(expected.values())
        for example in line.examples:
            assert expected[example.log_id] == example.reason
    assert kinds == {"missing_in_sql", "missing_in_dynamo", "field_mismatch"}


async def test_equal_stores_are_clean_and_counted():
    """Also where thousands share one instant, and where a store has none at all."""
    stand = ConsistencyStand()
    await stand.write(population(random.Random(1), 500) + [record(1000 + n) for n in range(3000)])
    line = await stand.run()
    assert (line.outcome, line.sql_records, line.dynamo_records, line.matched) == ("clean", 3500, 3500, 3500)
    assert (await ConsistencyStand().run()).outcome == "clean"


async def test_counts_alone_would_have_called_the_swap_consistent():
    """The control of the specification's own check: equal counts, and yet divergent."""
    stand = ConsistencyStand()
    await stand.write(records(10))
    harm_memory(stand.stores["dynamodb"], [("delete", record(3, log_timestamp=BASE)), ("put", record(99))])
    line = await stand.run()
    assert line.sql_records == line.dynamo_records
    assert stand.found() == {log_id(3): "missing_in_dynamo", log_id(99): "missing_in_sql"}


async def test_one_missing_record_of_a_million_is_not_within_any_tolerance():
    """The tolerance is 0, whatever the number."""
    stand = ConsistencyStand()
    await stand.write(records(5000))
    harm_memory(stand.stores["postgres"], [("delete", record(4321))])
    line = await stand.run(window=Window(BASE, BASE + DAY))
    assert (line.outcome, line.reasons) == ("divergent", {"missing_in_sql": 1})


async def test_a_limit_of_examples_never_limits_the_comparison():
    """One is shown, all are counted, and the report says that it was cut."""
    stand = ConsistencyStand()
    await stand.write(records(50), "postgres")
    line = await stand.run(examples=1)
    told = document(line)
    assert (len(told["examples"]), told["differences"], told["examples_cut"]) == (1, 50, True)
    assert line.reasons == {"missing_in_dynamo": 50}


async def test_the_window_holds_its_first_instant_and_not_its_end():
    """Start <= log_timestamp < end."""
    stand = ConsistencyStand()
    await stand.write([record(1, log_timestamp=BASE), record(2, log_timestamp=BASE + DAY)], "postgres")
    await stand.run(Window(BASE, BASE + DAY))
    assert stand.found() == {log_id(1): "missing_in_dynamo"}
    await stand.run(Window(BASE + 1, BASE + DAY + 1))
    assert stand.found() == {log_id(2): "missing_in_dynamo"}


@pytest.mark.parametrize("store", STORES)
async def test_a_changed_time_is_one_mismatch_also_where_one_side_lies_outside_the_window(store):
    """Not one missing and one extra; and the day in which it was found is not clean."""
    stand = ConsistencyStand()
    await stand.write(records(3))
    far = msgspec.structs.replace(record(1), log_timestamp=BASE - 40 * DAY)
    harm_memory(stand.stores[store], [("put", far)])
    await stand.run()
    assert stand.found() == {log_id(1): "field_mismatch"}
    assert stand.seen[0].fields == ("log_timestamp",)
    (first, *_) = await stand.ledger.days()
    assert (first.day, first.reasons) == (BASE // DAY_US, {"field_mismatch": 1})


async def test_a_difference_names_fields_and_shows_no_value_unless_asked():
    """Redacted by default; revealed: the values that differ alone."""
    stand = ConsistencyStand()
    await stand.write([record(1, user_id="CANARY-1", correlation_id="CANARY-0")])
    harm_memory(stand.stores["dynamodb"], [("put", record(1, user_id="CANARY-2", correlation_id="CANARY-0"))])
    line = await stand.run()
    assert b"CANARY" not in msgspec.json.encode(document(line))
    assert line.examples[0].fields == ("user_id",)
    line = await stand.run(reveal=True)
    assert line.examples[0].values == {"postgres": {"user_id": "CANARY-1"}, "dynamodb": {"user_id": "CANARY-2"}}


# --- reasons ---------------------------------------------------------------------------------------------------------


async def one_missing(store="dynamodb", known=None, **changed):
    """A record that one store lacks, and what the sidecars say of it."""
    told = Told()
    stand = ConsistencyStand(whereabouts=told)
    await stand.write([*records(4), record(9, **changed)])
    harm_memory(stand.stores[store], [("delete", record(9))])
    if known is not None:
        told.known[log_id(9)] = {store: known}
    return stand, told


@pytest.mark.parametrize(
    ("fate", "reason", "outcome"),
    [
        ("pending", "in_flight", "undecided"),
        ("deferred", "in_flight", "undecided"),
        ("dead_lettered", "dead_letter", "divergent"),
        ("discarded", "acknowledged", "clean"),
        ("released", "expected_gap", "clean"),
        ("delivered", "missing_in_dynamo", "divergent"),
        ("quarantined", "missing_in_dynamo", "divergent"),
    ],
)
async def test_what_a_sidecar_knows_of_a_missing_record_is_its_reason(fate, reason, outcome):
    """Each fate; "delivered" explains nothing: somebody took it away."""
    stand, _ = await one_missing(known=Known(fate, "permanent"))
    line = await stand.run()
    assert (stand.found(), line.outcome) == ({log_id(9): reason}, outcome)


async def test_what_is_known_of_one_store_says_nothing_of_the_other():
    """A dead letter for PostgreSQL does not explain that DynamoDB lacks the record."""
    stand, told = await one_missing()
    told.known[log_id(9)] = {"postgres": Known("discarded")}
    assert (await stand.run()).outcome == "divergent"


async def test_a_silent_sidecar_makes_it_unknown_and_never_clean_or_missing():
    """It may hold the record; a difference in content is one all the same."""
    stand, told = await one_missing()
    told.settled = Settled(asked=("pod-1",), silent=("pod-2",), knows_all=True)
    line = await stand.run()
    assert (stand.found(), line.outcome) == ({log_id(9): "in_flight_unknown"}, "undecided")
    assert "pod-2" in line.examples[0].detail


async def test_a_sidecar_that_is_behind_explains_for_that_store_alone():
    """It owes records to DynamoDB: one that PostgreSQL lacks is missing."""
    stand, told = await one_missing()
    harm_memory(stand.stores["postgres"], [("delete", record(2))])
    told.settled = Settled(asked=("pod-1", "pod-2"), behind=frozenset({"dynamodb"}), knows_all=True)
    await stand.run()
    assert stand.found() == {log_id(9): "in_flight", log_id(2): "missing_in_sql"}


async def test_open_gaps_explain_as_many_records_of_an_hour_as_they_count_and_no_more():
    """Three are missing, the ledger knows of two: one is lost. Another hour, and the other store, are not explained."""
    stand, _ = await one_missing(log_timestamp=BASE + 2 * 3_600_000_000)
    harm_memory(stand.stores["dynamodb"], [("delete", record(n)) for n in range(3)])
    harm_memory(stand.stores["postgres"], [("delete", record(3))])
    stand.lines = [
        GapLine(store="dynamodb", kind="released", hour=HOUR, source="pod-1", opened=3, closed=2),
        GapLine(store="dynamodb", kind="history", hour=HOUR, source="fleet", opened=1),
        GapLine(store="postgres", kind="not_owed", hour=HOUR + 2, source="fleet", opened=5),
    ]
    line = await stand.run()
    assert line.reasons == {"expected_gap": 2, "missing_in_dynamo": 2, "missing_in_sql": 1}
    line = await stand.run(trust_gaps=False)
    assert line.reasons == {"missing_in_dynamo": 4, "missing_in_sql": 1}


async def test_a_gap_of_history_explains_without_a_look_and_no_more_than_it_counts():
    """Millions before a backfill cost no read each; one more than the ledger knows is looked at, and missing."""
    stand, _ = await one_missing(log_timestamp=BASE)
    harm_memory(stand.stores["dynamodb"], [("delete", record(n)) for n in range(4)])
    stand.lines = [GapLine(store="dynamodb", kind="history", hour=HOUR, source="fleet", opened=4)]
    looked, get = [], stand.stores["dynamodb"].get

    async def counted(wanted):
        looked.append(wanted)
        return await get(wanted)

    stand.stores["dynamodb"].get = counted
    line = await stand.run()
    assert line.reasons == {"expected_gap": 4, "missing_in_dynamo": 1}
    assert len(set(looked)) == 1


async def test_what_retention_removed_is_expired_and_one_microsecond_later_is_missing():
    """The bound is exact, and of the store that lacks the record."""
    stand, _ = await one_missing(log_timestamp=BASE + 100)
    stand.rules = Rules(kept_from_us={"dynamodb": lambda: BASE + 101})
    assert (await stand.run()).reasons == {"expired": 1}
    stand.rules = Rules(kept_from_us={"dynamodb": lambda: BASE + 100, "postgres": lambda: BASE + DAY})
    assert (await stand.run()).reasons == {"missing_in_dynamo": 1}


async def test_two_records_under_one_id_are_a_conflict_until_an_operator_gives_one_up():
    """The dead letter of the store that refused the second content is the evidence."""
    told = Told()
    stand = ConsistencyStand(whereabouts=told)
    await stand.write([record(1)])
    harm_memory(stand.stores["dynamodb"], [("put", record(1, user_id="other"))])
    for known, reason in (
        (Known("dead_lettered", "conflict"), "id_conflict"),
        (Known("discarded", "conflict"), "acknowledged"),
        (Known("dead_lettered", "permanent"), "field_mismatch"),
    ):
        told.known[log_id(1)] = {"postgres": known}
        await stand.run()
        assert stand.found() == {log_id(1): reason}


async def test_a_row_that_no_sidecar_wrote_is_an_old_writers_until_it_is_copied():
    """Its id was computed from the table's key."""
    stand = ConsistencyStand()
    old = record(1, log_id="51deca70-0001-8000-a000-00000000002a")
    await stand.write([old], "postgres")
    line = await stand.run()
    assert (stand.found(), line.outcome) == ({old.log_id: "old_writer"}, "divergent")
    await stand.write([old], "dynamodb")
    assert (await stand.run()).outcome == "clean"


async def test_every_reason_is_either_divergent_or_undecided_or_expected_and_worded():
    """No reason falls through: what is not listed as harmless is divergent."""
    assert {
        Reason.MISSING_IN_SQL,
        Reason.MISSING_IN_DYNAMO,
        Reason.FIELD_MISMATCH,
        Reason.ID_CONFLICT,
        Reason.DEAD_LETTER,
        Reason.OLD_WRITER,
        Reason.FOREIGN_WRITER,
    } == DIVERGENT


async def test_thousands_of_differences_are_all_counted_and_never_all_in_memory(monkeypatch):
    """Each is given out once, a few at a time; a hundred are shown, and the report says that it is not all."""
    monkeypatch.setattr(module, "_CANDIDATES", 2_000)
    monkeypatch.setattr(module, "_STEP", 500)
    stand = ConsistencyStand(whereabouts=Told())
    held = [record(n, log_timestamp=BASE + n) for n in range(5_000)]
    await stand.write(held, "postgres")
    await stand.write(held[::5], "dynamodb")
    sizes, lost = [], {r.log_id for n, r in enumerate(held) if n % 5}

    async def found(differences):
        sizes.append(len(differences))
        lost.difference_update(d.log_id for d in differences)

    line = await stand.validator.run(WINDOW, Options(), found=found)
    assert (sum(sizes), lost, max(sizes) <= PART) == (4_000, set(), True)
    assert (line.reasons, line.sql_records, line.dynamo_records, line.matched) == (
        *({"missing_in_dynamo": 4_000}, 5_000, 1_000, 1_000),
    )
    told = document(line)
    assert (len(told["examples"]), told["examples_cut"], told["differences"]) == (100, True, 4_000)


@pytest.mark.parametrize("rate", [0, 10_000])
async def test_a_comparison_lets_others_have_the_event_loop_every_few_entries(rate):
    """It runs in a live sidecar: whoever waits for an answer waits for a step, not for a page of a store."""
    stand = ConsistencyStand()
    await stand.write([record(n, log_timestamp=BASE + n) for n in range(3_000)])
    taken = 0

    def counting(scan):
        async def counted(*arguments, **options):
            nonlocal taken
            async for entry in scan(*arguments, **options):
                taken += 1
                yield entry

        return counted

    for name in STORES:
        stand.stores[name].scan = counting(stand.stores[name].scan)
    steps = []

    async def other():
        while True:
            before = taken
            await asyncio.sleep(0)
            steps.append(taken - before)

    waiting = asyncio.create_task(other())
    assert (await stand.run(rate=rate)).matched == 3_000
    waiting.cancel()
    assert sum(steps) > 5_000
    assert max(steps) <= module._STEP + 4


async def test_a_rate_is_kept_evenly_and_what_was_missed_is_not_made_up_for_in_a_burst():
    """After a minute in which a store gave nothing: a tenth of a second's worth at once, then the rate."""
    stand = ConsistencyStand()
    pace = module._Pace(1_000, stand.clock)
    stand.clock.slept += 60.0
    waits = []
    for _ in range(10):
        before = stand.clock.slept
        await pace.took(50)
        waits.append(stand.clock.slept - before)
    assert waits[0] == 0
    assert 0.3 < sum(waits) <= 0.4


# --- records in motion -----------------------------------------------------------------------------------------------


async def test_a_record_that_arrives_while_it_is_looked_at_is_no_difference():
    """Not there for the scan, there once the sidecars had settled."""
    told = Told()
    stand = ConsistencyStand(whereabouts=told)
    await stand.write(records(5), "postgres")

    async def arrive():
        await stand.write(records(5), "dynamodb")

    told.on_settle = arrive
    line = await stand.run()
    assert (line.outcome, stand.seen, line.sql_records, line.dynamo_records) == ("clean", [], 5, 0)


async def test_with_nobody_to_ask_a_difference_must_last_before_it_is_one():
    """It comes late, within the time to settle: no difference. After that time: one."""
    for arrives_after, expected in ((20.0, {}), (40.0, {log_id(0): "missing_in_dynamo"})):
        stand = ConsistencyStand(rules=Rules(settle=30.0))
        await stand.write(records(1), "postgres")
        reads = stand.stores["dynamodb"].get
        began = stand.clock.monotonic()

        async def get(wanted, reads=reads, began=began, stand=stand, arrives_after=arrives_after):
            if stand.clock.monotonic() - began > arrives_after:
                await stand.write(records(1), "dynamodb")
            return await reads(wanted)

        stand.stores["dynamodb"].get = get
        await stand.run()
        assert stand.found() == expected


async def test_with_nobody_to_ask_a_young_record_may_be_on_its_way():
    """Younger than max_lag: undecided, never missing; where all sidecars were asked it is missing at once."""
    stand = ConsistencyStand()
    young = record(1, log_timestamp=stand.clock.now_us() - 1_000_000)
    window = Window(young.log_timestamp, young.log_timestamp + 1)
    await stand.write([young], "postgres")
    assert (await stand.run(window)).reasons == {"in_flight": 1}
    asked = ConsistencyStand(whereabouts=Told(), stores=stand.stores)
    assert (await asked.run(window)).reasons == {"missing_in_dynamo": 1}


# --- failing, stopping, going on -------------------------------------------------------------------------------------


async def test_a_gap_that_is_filled_and_closed_while_it_is_looked_at_leaves_nothing_missing():
    """The record was not there for the look, and the gap not for the ledger: it arrived between the two."""
    stand = ConsistencyStand(whereabouts=Told())
    await stand.write(records(3), "postgres")
    await stand.write(records(2), "dynamodb")
    lost = next(r for r in records(3) if r not in records(2))
    line = GapLine(store="dynamodb", kind="released", hour=lost.log_timestamp // 3_600_000_000, source="x", opened=1)
    stand.lines = [line]
    looked, get = [], stand.stores["dynamodb"].examine

    async def examine(wanted):
        looked.append(wanted)
        return await get(wanted)

    async def gaps():
        if looked:  # a backfill stores the record, and closes the gap
            await stand.write([lost], "dynamodb")
            stand.lines = []
        return stand.lines

    stand.stores["dynamodb"].examine, stand.validator._gaps = examine, gaps
    assert (await stand.run()).outcome == "clean"
    assert lost.log_id in looked


@pytest.mark.parametrize("held_up", ["settling", "looking"])
async def test_a_dead_letter_that_is_mirrored_late_explains_however_long_somebody_was_held_up(held_up):
    """Two seconds after its sidecar had settled; who was stopped in the midst looks again before it speaks."""
    told = Told()
    told.settled = Settled(asked=("a", "b"), knows_all=True)
    stand = ConsistencyStand(whereabouts=told)
    await stand.write([record(1)], "postgres")
    known, get, mirrored = told.fates, stand.stores["dynamodb"].examine, []

    async def settle():
        if held_up == "settling":
            stand.clock.slept += 30.0
        mirrored.append(stand.clock.monotonic() + 2.0)

    async def examine(wanted):
        if held_up == "looking" and len(mirrored) == 1:
            mirrored.append(0.0)
            stand.clock.slept += 300.0
        return await get(wanted)

    async def fates(log_ids):
        if stand.clock.monotonic() > mirrored[0]:
            told.known = {record(1).log_id: {"dynamodb": Known("dead_lettered", "permanent")}}
        return await known(log_ids)

    told.on_settle, told.fates, stand.stores["dynamodb"].examine = settle, fates, examine
    await stand.run()
    assert stand.found() == {record(1).log_id: "dead_letter"}


@pytest.mark.parametrize("broken", STORES)
@pytest.mark.parametrize("call", ["scan", "get", "gaps", "ledger"])
async def test_an_error_is_never_consistent(broken, call):
    """Whatever fails, the run fails with it, and its line says so."""
    stand = ConsistencyStand()
    await stand.write(records(3))
    harm_memory(stand.stores["dynamodb"], [("delete", record(1))])
    error = StoreError(broken, RetryClass.TRANSIENT, "planted")

    async def fail(*_args, **_kwargs):
        raise error

    async def scan(*_args):
        raise error
        yield

    if call == "gaps":
        stand.validator._gaps = fail
    elif call == "ledger":
        stand.ledger.put_days = fail
    else:
        setattr(stand.stores[broken], call, scan if call == "scan" else fail)
    with pytest.raises(StoreError):
        await stand.run()
    (line,) = await stand.ledger.runs(1)
    assert (line.outcome, line.finished_us, line.error) == ("failed", None, str(error))
    assert document(line)["is_consistent"] is False


@pytest.mark.parametrize("call", ["scan", "get", "put_run", "put_days"])
async def test_a_failure_that_passes_costs_time_and_changes_nothing(call, monkeypatch):
    """A lost connection now and then: the same counts, reasons and verdicts, each difference once."""
    monkeypatch.setattr(module, "_STEP", 5)
    monkeypatch.setattr(module, "_STRETCH", 0.0)
    rng = random.Random(11)
    held = population(rng, 60)
    done = harm(rng, held)
    deeds, expected = done.deeds, done.expected
    stand = ConsistencyStand()
    await stand.write(held)
    for name in STORES:
        harm_memory(stand.stores[name], deeds[name])
    target = stand.stores["dynamodb"] if call in ("scan", "get") else stand.ledger
    whole, calls = getattr(target, call), 0

    async def get(*args):
        nonlocal calls
        calls += 1
        if calls % 3 == 1:
            raise StoreError("dynamodb", RetryClass.TRANSIENT, "planted")
        return await whole(*args)

    async def scan(*args):
        nonlocal calls
        calls += 1
        entries = 0
        async for entry in whole(*args):
            entries += 1
            if calls % 4 and entries == 12:
                raise StoreError("dynamodb", RetryClass.THROTTLE, "planted")
            yield entry

    setattr(target, call, scan if call == "scan" else get)
    line = await stand.run()
    assert calls > 2
    assert stand.found() == expected
    assert sum(line.reasons.values()) == len(expected)
    held_now = [r for r in stand.stores["postgres"]._records.values() if BASE <= r.log_timestamp < WINDOW.end_us]
    assert sum(d.sql_records for d in await stand.ledger.days()) == line.sql_records == len(held_now)


async def test_a_stopped_run_goes_on_where_it_stopped_and_comes_to_the_same(monkeypatch):
    """Stopped after each checkpoint and resumed: counts, reasons, verdicts and examples as of one run."""
    monkeypatch.setattr(module, "_STEP", 5)
    monkeypatch.setattr(module, "_STRETCH", 0.0)
    rng = random.Random(7)
    held = population(rng, 150)
    done = harm(rng, held)
    deeds, expected = done.deeds, done.expected
    stands = [ConsistencyStand() for _ in range(2)]
    for stand in stands:
        await stand.write(held)
        for name in STORES:
            harm_memory(stand.stores[name], deeds[name])
    whole, cut = stands
    once = await whole.run()
    line, stops, ends = None, 0, 0

    class Stop(Exception):
        pass

    while line is None:
        kept = 0
        keep = cut.ledger.put_run

        async def put_run(each, keep=keep):
            nonlocal kept, ends
            await keep(each)
            kept += 1
            ends += each.finished_us is not None
            if kept == 3 and ends < 2:  # once also where the last line was written and nobody heard of it
                raise Stop

        cut.ledger.put_run = put_run
        resume = await cut.validator.resumable(WINDOW)
        try:
            line = await cut.run(resume=resume)
        except Stop:
            stops += 1
        cut.ledger.put_run = keep
    assert stops > 10
    assert (line.sql_records, line.dynamo_records, line.matched, line.reasons) == (
        *(once.sql_records, once.dynamo_records, once.matched, once.reasons),
    )
    assert sum(line.reasons.values()) == len(expected)
    assert line.examples == once.examples
    verdicts = [[(d.day, d.reasons, d.sql_records, d.dynamo_records) for d in await s.ledger.days()] for s in stands]
    assert verdicts[0] == verdicts[1]
    assert await cut.validator.resumable(WINDOW) is None


async def test_a_cancelled_run_says_that_it_was_stopped():
    """Not failed, not clean; and it can be resumed."""
    stand = ConsistencyStand(stores={name: Breakable(ConsistencyStand().stores[name]) for name in STORES})
    await stand.write(records(5), "postgres")
    stand.stores["dynamodb"].gate.clear()
    task = asyncio.create_task(stand.run())
    for _ in range(50):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    (line,) = await stand.ledger.runs(1)
    assert line.outcome == "stopped"
    assert (await stand.validator.resumable()).id == line.id


async def test_a_run_that_is_cancelled_does_not_wait_for_a_ledger_that_hangs(monkeypatch):
    """A sidecar that stops has seconds, not minutes; the test would hang without the bound."""
    monkeypatch.setattr(module, "_LAST_WORDS", 0.05)
    stand = ConsistencyStand(stores={name: Breakable(ConsistencyStand().stores[name]) for name in STORES})
    await stand.write(records(5), "postgres")
    stand.stores["dynamodb"].gate.clear()
    task = asyncio.create_task(stand.run())
    for _ in range(50):
        await asyncio.sleep(0)

    async def hang(_line):
        await asyncio.Event().wait()

    stand.ledger.put_run = hang
    task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(outcome, asyncio.CancelledError)


async def test_days_have_verdicts_where_the_window_covers_them_from_their_first_instant():
    """A day that began before the window has none; one that is not over is not whole; an empty day is clean."""
    stand = ConsistencyStand()
    await stand.write(records(3))
    await stand.run(Window(BASE - DAY // 2, BASE + 2 * DAY + 5))
    first = BASE // DAY_US
    assert [(d.day, d.whole, d.sql_records) for d in await stand.ledger.days()] == [
        *((first, True, 3), (first + 1, True, 0), (first + 2, False, 0)),
    ]


async def test_a_run_over_everything_finds_out_which_days_there_are():
    """From the first record on, and no verdict for days without one."""
    stand = ConsistencyStand()
    await stand.write([record(1, log_timestamp=BASE - 900 * DAY), record(2, log_timestamp=BASE)])
    line = await stand.run(Window.all_until(BASE + DAY))
    assert (line.outcome, line.sql_records) == ("clean", 2)
    assert [d.day for d in await stand.ledger.days()] == [BASE // DAY_US - 900, BASE // DAY_US]


async def test_a_rate_is_kept():
    """So many records a second, measured on the clock that is handed in."""
    stand = ConsistencyStand()
    await stand.write(records(20_000))
    began = stand.clock.slept
    await stand.run(Window(BASE, BASE + DAY), rate=10_000.0)
    assert 2.0 < stand.clock.slept - began < 5.0
    assert Options().rate == 0.0

"""The validator and repair on real PostgreSQL and DynamoDB: harm done behind them, found exactly, mended exactly."""

import itertools
import random

import msgspec
import pytest

from sidecar.clock import SystemClock
from sidecar.consistency import Options, Rules, Window
from sidecar.consistency.repair import Repair
from sidecar.phase import DYNAMODB, POSTGRES, STORES
from sidecar.record import timestamp_text
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.verdicts import DAY_US, MemoryLedger
from tests.consistency.stand import WINDOW, ConsistencyStand, Told, harm, population
from tests.parts.dynamodb import store_all
from tests.stores.records import BASE, DAY, log_id, record, records


class Hands:
    """Does harm in both stores, beside the sidecar."""

    def __init__(self, stand, admin, dynamodb_settings):
        self.stand = stand
        self.admin = admin
        self.table = dynamodb_settings.table

    async def do(self, deeds):
        """Carry out what ``harm`` thought of."""
        for verb, each in deeds[POSTGRES]:
            await self.admin.execute("DELETE FROM integration_logs WHERE log_id = $1", each.log_id)
            if verb == "put":
                result = await self.stand.stores[POSTGRES].write([each])
                assert not result.failures
        for verb, each in deeds[DYNAMODB]:
            key, changes, value = verb.partition("=")
            if verb == "put":
                await store_all(self.stand.stores[DYNAMODB], [each])
            elif changes:
                await self.set(
                    each.log_id,
                    **{key: {"B": value.encode()} if key == "h" else {"S": value}} if value else {key: None},
                )
            else:
                async with self.stand.stores[DYNAMODB].wire.control() as client:
                    await client.delete_item(TableName=self.table, Key={"log_id": {"S": each.log_id}})

    async def set(self, which, **values):
        """Change attributes of an item (by number or id) without touching the others; None removes."""
        which = which if isinstance(which, str) else log_id(which)
        async with self.stand.stores[DYNAMODB].wire.control() as client:
            for name, value in values.items():
                update = (
                    {"UpdateExpression": "REMOVE #n"}
                    if value is None
                    else {
                        "UpdateExpression": "SET #n = :v",
                        "ExpressionAttributeValues": {":v": value},
                    }
                )
                await client.update_item(
                    TableName=self.table,
                    Key={"log_id": {"S": which}},
                    ExpressionAttributeNames={"#n": name},
                    **update,
                )

    async def items(self):
        """Every item as it is stored: log_id -> item."""
        async with self.stand.stores[DYNAMODB].wire.control() as client:
            answer = await client.scan(TableName=self.table, ConsistentRead=True)
        return {item["log_id"]["S"]: item for item in answer["Items"]}


@pytest.fixture
async def hands(postgres_store, dynamodb_store, postgres_admin, dynamodb_settings):
    """Both stores, empty."""
    stand = ConsistencyStand(
        stores={POSTGRES: postgres_store, DYNAMODB: dynamodb_store}, whereabouts=Told(), ledger=dynamodb_store.verdicts
    )
    return Hands(stand, postgres_admin, dynamodb_settings)


def repairing(stand, *, dry_run=False, overwrite=False, kept_from=None):
    """A repair over the stand's stores."""
    kept = kept_from or {}
    return Repair(
        stand.stores,
        stand.stores[DYNAMODB].replace,
        lambda store: kept.get(store, -(2**62)),
        stand.ledger,
        clock=stand.clock,
        dry_run=dry_run,
        overwrite=overwrite,
    )


async def mended(stand, *, deep=False, **options):
    """Validate and repair; what was done."""
    repair = repairing(stand, **options)
    await stand.validator.run(WINDOW, options_of(deep=deep), found=repair.mend)
    return repair.result


def options_of(*, deep=False):
    """As repair runs."""
    return Options(by="a test", deep=deep)


@pytest.mark.parametrize("seed", range(5))
async def test_the_report_is_the_injected_set_and_repair_mends_what_was_lost(hands, seed):
    """Both modes; then what is missing is inserted, what differs overwritten, and a second run mends nothing."""
    stand, rng = hands.stand, random.Random(seed)
    held = population(rng, 150)
    await stand.write(held)
    before = await hands.items()
    harmed = harm(rng, held)
    await hands.do(harmed.deeds)
    for deep, expected in ((False, harmed.expected), (True, harmed.deep)):
        line = await stand.run(deep=deep)
        assert stand.found() == expected
        assert line.outcome == ("divergent" if expected else "clean")
        wrong = {d.log_id: d.fields for d in stand.seen if d.keys}
        assert wrong == {i: (key,) for i, key in harmed.keys.items() if i in expected}
    done = await mended(stand, deep=True)
    different = {i for i, reason in expected.items() if reason == "field_mismatch"}
    assert sum(done.inserted.values()) == len(expected) - len(different)
    assert (done.refused_total, done.already_there) == (0, 0)
    assert done.left == ({"field_mismatch": len(different)} if different else {})
    await stand.run(deep=True)
    assert stand.found() == dict.fromkeys(different, "field_mismatch")
    overwritten = await mended(stand, deep=True, overwrite=True)
    assert (overwritten.overwritten, overwritten.changed_meanwhile) == (len(different), 0)
    for deep in (False, True):
        line = await stand.run(deep=deep)
        assert (line.outcome, stand.seen) == ("clean", [])
    items = await hands.items()
    assert {i: items[i] for i in harmed.keys} == {i: before[i] for i in harmed.keys}
    again = await mended(stand, deep=True, overwrite=True)
    assert again.document() == {**again.document(), "inserted": {}, "overwritten": 0, "left": {}}


async def test_a_repaired_item_is_the_live_paths_item_byte_by_byte(hands):
    """Every attribute, keys of the indexes and digest included."""
    stand = hands.stand
    await stand.write([record(n, request_data='{"b": 1.10, "a": "\\u0000"}', user_id="") for n in range(3)])
    before = await hands.items()
    await hands.do({POSTGRES: [], DYNAMODB: [("delete", record(1))]})
    await mended(stand)
    assert await hands.items() == before


async def test_a_field_changed_without_its_digest_is_found_by_deep_alone(hands):
    """The index still says what it said: the fast mode believes it, and the documentation says so."""
    await hands.stand.write(records(5))
    await hands.set(2, user_id={"S": "somebody else"})
    assert (await hands.stand.run()).outcome == "clean"
    assert (await hands.stand.run(deep=True)).outcome == "divergent"
    assert hands.stand.found() == {log_id(2): "field_mismatch"}
    assert hands.stand.seen[0].fields == ("user_id", "h")  # the item was changed, not the row: its digest tells
    repair = repairing(hands.stand, overwrite=True)
    await hands.stand.validator.run(WINDOW, Options(deep=True), found=repair.mend)
    assert repair.result.overwritten == 1
    assert (await hands.stand.run(deep=True)).outcome == "clean"


async def test_items_that_no_sidecar_wrote_are_named_as_such(hands):
    """One whose digest is not that of its fields, and one that lacks fields that every record has."""
    await hands.stand.write(records(2))
    await store_all(hands.stand.stores[DYNAMODB], [record(7), record(8)])
    await hands.set(7, h={"B": b"sixteen bytes..."})
    await hands.set(8, log_type=None)
    await hands.set(1, log_timestamp={"S": "no time"})
    await store_all(hands.stand.stores[DYNAMODB], [record(9)])
    await hands.set(9, h={"S": "no binary"}, status_code={"S": "no number"})
    foreign = dict.fromkeys((log_id(n) for n in (7, 8, 9)), "foreign_writer")
    for deep in (False, True):
        line = await hands.stand.run(deep=deep)
        assert hands.stand.found() == foreign | ({log_id(1): "foreign_writer"} if deep else {})
        assert line.outcome == "divergent"
    assert (await mended(hands.stand)).left == {"foreign_writer": 3}


async def test_one_item_is_one_difference_wherever_its_keys_put_it(hands):
    """Its time changed behind its keys, or its sort key alone: found once, in the middle of others, in both modes."""
    stand = hands.stand
    await stand.write([record(n, log_timestamp=BASE + n * 1_000_000) for n in range(40)])
    await hands.set(3, log_timestamp={"S": timestamp_text(BASE + 2 * DAY)})
    await hands.set(5, gt={"S": f"{timestamp_text(BASE + 20_500_000)}#{log_id(5)}"})
    await hands.set(7, gt={"S": f"{timestamp_text(BASE + 30_000_000)}#{log_id(30)}"})
    await hands.set(9, gt={"S": "2026-01-16 no time"})
    await stand.run()
    assert stand.found() == {log_id(n): "field_mismatch" for n in (5, 7, 9)}
    line = await stand.run(deep=True)
    assert {d.log_id: d.fields for d in stand.seen} == {
        log_id(3): ("log_timestamp", "h", "gt", "gs"),
        **{log_id(n): ("gt",) for n in (5, 7, 9)},
    }
    assert (line.sql_records, line.dynamo_records) == (40, 40)
    lone = record(50, log_timestamp=BASE + 1)
    await store_all(stand.stores[DYNAMODB], [lone])
    await hands.set(50, gt={"S": f"{timestamp_text(BASE + 30_000_000)}#{log_id(31)}"})
    for deep in (False, True):
        await stand.run(deep=deep)
        assert stand.found()[log_id(50)] == "missing_in_sql"


@pytest.mark.parametrize("deep", [False, True])
async def test_a_window_has_its_first_instant_and_not_its_end_and_each_record_counts_for_its_own_day(hands, deep):
    """On the borders of window, day and hour, to the microsecond: counted by day, missing if inside, unseen if not."""
    stand, hour = hands.stand, 3_600_000_000
    start, end = BASE - hour, BASE + 2 * DAY + 1
    midnight = BASE // DAY_US * DAY_US + DAY_US
    times = (start - 1, start, midnight - 1, midnight, midnight + hour - 1, midnight + hour, end - 1, end, end + hour)
    batch = [record(n, log_timestamp=us) for n, us in enumerate(times)]
    await stand.write(batch)
    line = await stand.run(Window(start, end), deep=deep)
    assert (line.outcome, line.sql_records, line.dynamo_records) == ("clean", 6, 6)
    await stand.run(Window(midnight, midnight + DAY_US), deep=deep)
    (day,) = [d for d in await stand.ledger.days() if d.day == midnight // DAY_US]
    inside = [r for r in batch if midnight <= r.log_timestamp < midnight + DAY_US]
    assert (day.whole, day.sql_records, day.dynamo_records) == (True, len(inside), len(inside))
    await hands.do({POSTGRES: [("delete", r) for r in batch[::2]], DYNAMODB: [("delete", r) for r in batch[1::2]]})
    await stand.run(Window(start, end), deep=deep)
    assert stand.found() == {
        r.log_id: "missing_in_dynamo" if n % 2 else "missing_in_sql" for n, r in enumerate(batch) if 1 <= n <= 6
    }


async def test_a_record_in_another_shard_that_readers_look_into_is_no_difference(hands):
    """Every query finds it; a shard beyond them would hide it (control)."""
    stand = hands.stand
    await stand.write(records(3))
    head, _, shard = (await hands.items())[log_id(1)]["gs"]["S"].rpartition("#")
    for beside in range(4):  # the schedule's number
        await hands.set(1, gs={"S": f"{head}#{beside}"})
        assert ((await stand.run(deep=True)).outcome, int(shard) in range(4)) == ("clean", True)
    for deep, wrong in itertools.product((False, True), ("4", "00", "-1", "", "9" * 900)):
        await hands.set(1, gs={"S": f"{head}#{wrong}"})
        assert (await stand.run(deep=deep)).outcome == "divergent"


async def test_an_item_whose_keys_are_wrong_is_not_overwritten_once_it_has_changed(hands):
    """A live write came in between: other content is not replaced, and the run says so."""
    stand = hands.stand
    await stand.write(records(3))
    await hands.set(1, gc=None)
    repair = repairing(stand, overwrite=True)

    async def found(differences):
        await store_all(stand.stores[DYNAMODB], [record(1, user_id="the live one")])
        await repair.mend(differences)

    await stand.validator.run(WINDOW, options_of(deep=True), found=found)
    assert (repair.result.overwritten, repair.result.changed_meanwhile) == (0, 1)
    assert (await stand.stores[DYNAMODB].get(log_id(1))).user_id == "the live one"


async def test_a_dry_run_changes_nothing_and_says_what_would_be_refused(hands):
    """PostgreSQL rehearses: a constraint refuses one of the records that it lacks."""
    stand = hands.stand
    await store_all(stand.stores[DYNAMODB], [record(1), record(2, service_name="forbidden")])
    await hands.admin.execute("ALTER TABLE integration_logs ADD CHECK (service_name <> 'forbidden')")
    done = await mended(stand, dry_run=True)
    assert (dict(done.inserted), [r["log_id"] for r in done.refused]) == ({POSTGRES: 1}, [log_id(2)])
    assert await stand.stores[POSTGRES].get(log_id(1)) is None
    done = await mended(stand)
    assert (dict(done.inserted), [r["log_id"] for r in done.refused]) == ({POSTGRES: 1}, [log_id(2)])
    assert await stand.stores[POSTGRES].get(log_id(1)) == record(1)


@pytest.mark.parametrize("lacking", STORES)
async def test_a_live_write_between_the_comparison_and_the_repair_stays(hands, lacking):
    """Whatever it wrote: the repair finds the id there and leaves it; with a plain put it would be lost (control)."""
    stand = hands.stand
    other = DYNAMODB if lacking == POSTGRES else POSTGRES
    await stand.write(records(3), other)
    live = record(1, log_timestamp=BASE + 1_000_000, user_id="the live one")
    repair = repairing(stand)

    async def found(differences):
        await stand.write([live], lacking)
        await repair.mend(differences)

    await stand.validator.run(WINDOW, options_of(), found=found)
    assert (repair.result.inserted[lacking], repair.result.already_there) == (2, 1)
    assert await stand.stores[lacking].get(live.log_id) == live
    if lacking == DYNAMODB:  # the control: DynamoDB's put replaces
        await store_all(stand.stores[DYNAMODB], [records(3)[1]])
        assert await stand.stores[DYNAMODB].get(live.log_id) != live


async def test_an_overwrite_spares_an_item_that_changed_since_it_was_compared(hands):
    """The condition is what was compared; PostgreSQL's row is never updated."""
    stand = hands.stand
    await stand.write([record(1, user_id="sql")], POSTGRES)
    await stand.write([record(1, user_id="dynamo")], DYNAMODB)
    repair = repairing(stand, overwrite=True)

    async def found(differences):
        await stand.write([record(1, user_id="live")], DYNAMODB)
        await repair.mend(differences)

    await stand.validator.run(WINDOW, options_of(), found=found)
    assert (repair.result.overwritten, repair.result.changed_meanwhile) == (0, 1)
    assert (await stand.stores[DYNAMODB].get(log_id(1))).user_id == "live"
    assert (await mended(stand, overwrite=True)).overwritten == 1
    held = [await stand.stores[name].get(log_id(1)) for name in STORES]
    assert [r.user_id for r in held] == ["sql", "sql"]


async def test_what_retention_removed_is_expired_and_never_inserted_again(
    postgres_store, dynamodb_store, dynamodb_settings
):
    """DynamoDB hides it before the service deletes it; a repair leaves it, also what would expire meanwhile."""
    options = msgspec.structs.replace(dynamodb_settings, ttl_days=10)
    expiring = DynamoDBStore(options, clock=SystemClock())
    stand = ConsistencyStand(stores={POSTGRES: postgres_store, DYNAMODB: expiring}, whereabouts=Told())
    now = SystemClock().now_us()
    day = 86_400_000_000
    held = [record(n, log_timestamp=now - age * day) for n, age in enumerate((11, 30, 9, 5))]
    stand.rules = Rules(kept_from_us={DYNAMODB: lambda: now - 10 * day})
    window = Window(now - 40 * day, now)
    try:
        await stand.write(held)
        line = await stand.run(window)
        assert (line.reasons, line.outcome) == ({"expired": 2}, "clean")
        await stand.write([record(9, log_timestamp=now - 9 * day)], POSTGRES)
        repair = repairing(stand, kept_from={DYNAMODB: now - 8 * day})
        await stand.validator.run(window, options_of(), found=repair.mend)
        assert (repair.result.expired, dict(repair.result.inserted)) == (1, {})
    finally:
        await expiring.close()


async def test_the_days_that_a_repair_writes_to_are_noted_before(hands):
    """So that their verdicts are stale, also where the process ends in between."""
    stand = hands.stand
    stand.ledger = MemoryLedger()
    await stand.write(records(3), POSTGRES)
    repair = repairing(stand)
    order = []
    note, fill = stand.ledger.note_writes, stand.stores[DYNAMODB].fill

    async def note_writes(days):
        order.append("noted")
        await note(days)

    async def filled(batch):
        order.append("filled")
        return await fill(batch)

    stand.ledger.note_writes = note_writes
    stand.stores[DYNAMODB].fill = filled
    await stand.validator.run(WINDOW, options_of(), found=repair.mend)
    assert order == ["noted", "filled"]
    assert list(await stand.ledger.writes()) == [BASE // 86_400_000_000]

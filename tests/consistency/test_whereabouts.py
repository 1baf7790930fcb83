"""Who is asked: the own spool frame by frame, the fleet by heartbeats, and what comes of both together."""

import itertools
import uuid
from types import SimpleNamespace

import pytest

from sidecar.app.consistency import ask_others
from sidecar.clock import SystemClock
from sidecar.consistency import Fleet, Known, Nobody, OwnSpool, Settled, Together, fates_of_spool
from sidecar.consistency.mirror import Mirror
from sidecar.errors import RetryClass, StoreError
from sidecar.fleet_tables import FateLine, Heartbeat
from sidecar.phase import DYNAMODB, POSTGRES, STORES
from sidecar.record import encode
from sidecar.settings import MIB, Dedup, Settings
from sidecar.settings import Fleet as FleetSettings
from sidecar.settings import Spool as SpoolSettings
from sidecar.spool import Leftover, Obligation, Spool, view
from tests.consistency.stand import ConsistencyStand, Told
from tests.parts.reads import PausableClock
from tests.stores.records import record

BOTH = Obligation(2, frozenset(STORES))
OPTIONS = SpoolSettings(allow_volatile=True, ballast_bytes=0, cap_bytes=64 * MIB)


@pytest.fixture
async def spool(tmp_path):
    """An empty one."""
    opened = Spool.open(tmp_path, OPTIONS, Dedup(), STORES, SystemClock())
    yield opened
    await opened.close()


async def append(spool, *numbers, obligation=BOTH):
    """One frame; the ids."""
    batch = [record(n, log_id=str(uuid.UUID(int=n + 1))) for n in numbers]
    await spool.append(batch, [encode(r) for r in batch], obligation)
    return [r.log_id for r in batch]


async def test_the_own_spool_knows_what_is_pending_deferred_dead_and_discarded_for_each_store(spool):
    """And says nothing of what was delivered, or never here."""
    ids = await append(spool, 1, 2, 3, 4)
    assert await fates_of_spool(spool, ids) == {i: {s: Known("pending") for s in STORES} for i in ids}
    left = [
        Leftover(0, "dead_letter", "conflict", "other content"),
        Leftover(1, "deferred", "unknown", "?", due_us=2**60),
        Leftover(2, "dead_letter", "permanent", "refused"),
    ]
    (frame,) = await spool.cursor(POSTGRES).take(1000, MIB)
    spool.cursor(POSTGRES).settle(frame, left)
    (frame,) = await spool.cursor(DYNAMODB).take(1000, MIB)
    spool.cursor(DYNAMODB).settle(frame)
    keys = [letter.key for letter in await spool.dead_letters(retry_class="permanent")]
    assert await spool.discard(keys, who="a test", reason="given up") == 1
    never = str(uuid.uuid4())
    assert await fates_of_spool(spool, [*ids, never]) == {
        ids[0]: {POSTGRES: Known("dead_lettered", "conflict")},
        ids[1]: {POSTGRES: Known("deferred", "unknown")},
        ids[2]: {POSTGRES: Known("discarded", "permanent")},
    }


async def test_a_record_is_found_in_any_step_and_one_that_is_undecided_is_pending_everywhere(spool, monkeypatch):
    """The spool is read in steps, here of ten frames; a fenced instance's record is owed to be decided."""
    monkeypatch.setattr(view, "_HEADERS", 10)
    batch = [record(n, log_id=str(uuid.UUID(int=n + 1))) for n in range(35)]
    for each in batch:
        await spool.append([each], [encode(each)], BOTH)
    (undecided,) = await append(spool, 9000, obligation=Obligation(1, frozenset(), unresolved=True))
    found = await fates_of_spool(spool, [batch[-1].log_id, batch[0].log_id, undecided])
    assert found == {i: {s: Known("pending") for s in STORES} for i in (batch[-1].log_id, batch[0].log_id, undecided)}


async def test_settling_waits_for_what_was_accepted_before_and_not_for_what_comes_after(spool):
    """And for no longer than it may."""
    clock = PausableClock()
    await append(spool, 1)
    own = OwnSpool(spool, "pod-1", clock)
    assert await own.settle(5.0) == Settled(asked=("pod-1",))
    assert 4.5 < clock.slept < 6.0
    for store in STORES:
        (frame,) = await spool.cursor(store).take(1000, MIB)
        spool.cursor(store).settle(frame)
    clock.slept = 0.0
    await own.settle(5.0)
    assert clock.slept == 0.0


class Tables:
    """Heartbeats as the test writes them; each look is one of a list, the last one again and again."""

    def __init__(self, *looks):
        self.looks = list(looks)
        self.silent = []
        self.lines = []

    async def heartbeats(self):
        rows = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        return rows, self.silent

    async def fates(self, log_ids):
        return [line for line in self.lines if line.log_id in log_ids]


def beat(instance, seq, at_us=0, **oldest):
    """One heartbeat of a pod."""
    return Heartbeat(instance=instance, incarnation="x", seq=seq, at_us=at_us, oldest_pending_us=oldest)


def asked(*looks, **attributes):
    """A fleet with these looks."""
    tables = Tables(*looks)
    for name, value in attributes.items():
        setattr(tables, name, value)
    return Fleet(tables.heartbeats, tables.fates, clock=PausableClock()), tables


async def test_a_sidecar_has_settled_when_a_later_heartbeat_says_so_of_everything_before_its_bound():
    """The bound is by its own clock, from a heartbeat that was written after the question."""
    fleet, tables = asked(
        [beat("a", 1, at_us=100, dynamodb=50)],
        [beat("a", 2, at_us=200, dynamodb=50)],  # may have been on its way when we asked
        [beat("a", 3, at_us=300, dynamodb=50)],  # the bound: 300
        [beat("a", 4, at_us=400, dynamodb=290)],
        [beat("a", 5, at_us=500, dynamodb=450)],
    )
    found = await fleet.settle(30.0)
    assert found == Settled(asked=("a",), knows_all=True)
    assert len(tables.looks) == 1


async def test_a_sidecar_that_stays_behind_names_its_store_and_a_silent_one_is_named():
    """Neither is taken for settled."""
    beats = [[beat("a", n, at_us=n * 100, dynamodb=50), beat("dead", 7, at_us=1)] for n in range(1, 80)]
    fleet, _ = asked(*beats)
    found = await fleet.settle(10.0)
    assert (found.behind, found.silent, found.knows_all) == (frozenset({DYNAMODB}), ("dead",), True)
    fleet, _ = asked(*[[beat("a", n, at_us=n)] for n in range(1, 80)], silent=["pod-9"])
    assert (await fleet.settle(10.0)).silent == ("pod-9",)


async def test_a_command_waits_until_a_killed_process_is_counted_out_and_no_longer():
    """It has just begun to look: the row that a killed process left looks alive to it for a while."""
    looks = [[beat("a", n, at_us=n), *([beat("dead", 7)] if n < 140 else [])] for n in range(1, 145)]
    fleet, _ = asked(*looks)
    fleet._newcomer = True
    assert (await fleet.settle(10.0)).silent == ()
    assert 130 < fleet._clock.slept < 145
    fleet, _ = asked(*[[beat("a", n, at_us=n), beat("dead", 7)] for n in range(1, 400)])
    fleet._newcomer = True
    assert (await fleet.settle(10.0)).silent == ("dead",)
    assert fleet._clock.slept < 180


async def test_without_other_sidecars_nothing_is_waited_for():
    """Nobody counts: everything is known."""
    fleet, _ = asked([])
    assert await fleet.settle(10.0) == Settled(knows_all=True)


async def test_mirrored_dead_letters_are_known_and_redriven_ones_are_not():
    """Another pod's dead letter explains; a line of what was given to the store again does not."""
    line = {"retry_class": "permanent", "by": "pod-2", "at_us": 1, "revision": 1}
    fleet, _ = asked(
        [],
        lines=[
            FateLine(log_id="a", store=DYNAMODB, state="dead_lettered", **line),
            FateLine(log_id="b", store=POSTGRES, state="discarded", **line),
            FateLine(log_id="c", store=POSTGRES, state="redriven", **line),
        ],
    )
    assert await fleet.fates(["a", "b", "c", "d"]) == {
        "a": {DYNAMODB: Known("dead_lettered", "permanent")},
        "b": {POSTGRES: Known("discarded", "permanent")},
    }


@pytest.mark.parametrize(("twin", "asked", "behind"), [("another", ("a", "b"), {DYNAMODB}), ("own", ("b",), set())])
async def test_another_process_under_the_own_name_is_asked_like_any_other(twin, asked, behind):
    """Two pods were given one ``instance``, or a volume was lost and the name lives on: what each owes is its own."""
    looks = itertools.count(1)

    class Table:
        async def heartbeats(self):
            seq = next(looks)

            def row(spool, incarnation, instance="a", **oldest):
                parts = {"spool": spool, "incarnation": incarnation, "interval_s": 0.01, "seq": seq, "at_us": seq * 100}
                return Heartbeat(instance=instance, oldest_pending_us=oldest, **parts)

            before = {"spool": "own", "incarnation": "0", "seq": 7, "at_us": 1, "oldest_pending_us": {POSTGRES: 1}}
            return [
                row("own", "1", postgres=1),
                Heartbeat(instance="a", **before),  # of this spool, before its restart
                row(twin, "2", dynamodb=1),
                row("theirs", "3", instance="b"),
            ]

    async def none(_log_ids):
        return []

    table = Table()
    table.fates = none
    stores = {name: SimpleNamespace(fleet=table) for name in STORES}
    settings = Settings(fleet=FleetSettings(enabled=True, heartbeat=0.1))
    found = await ask_others(stores, settings, ("a", lambda: "own"), PausableClock()).settle(0.5)
    assert found == Settled(asked=asked, behind=frozenset(behind), knows_all=True)


async def test_a_record_that_was_redriven_after_its_sidecar_was_heard_last_is_on_its_way():
    """By that sidecar's own clock; what it redrove before is part of what it said. Of one that is gone: nothing."""
    line = {"store": POSTGRES, "state": "redriven", "retry_class": "permanent", "revision": 1}
    fleet, _ = asked(
        *[[beat("a", n, at_us=n * 100)] for n in range(1, 4)],
        lines=[
            FateLine(log_id="before", by="a", at_us=300, **line),
            FateLine(log_id="after", by="a", at_us=301, **line),
            FateLine(log_id="gone", by="b", at_us=999, **line),
        ],
    )
    await fleet.settle(30.0)
    assert await fleet.fates(["before", "after", "gone"]) == {"after": {POSTGRES: Known("pending", "permanent")}}


async def test_together_who_comes_later_knows_better_and_any_doubt_stays():
    """The own spool overrules the mirror; silence and lag of any are those of all."""
    first, second = Told(), Told()
    first.settled = Settled(asked=("a",), silent=("b",), knows_all=True)
    second.settled = Settled(asked=("c",), behind=frozenset({DYNAMODB}), warnings=("w",))
    first.known = {"x": {POSTGRES: Known("dead_lettered"), DYNAMODB: Known("discarded")}}
    second.known = {"x": {POSTGRES: Known("pending")}}
    both = Together(first, second)
    assert await both.fates(["x"]) == {"x": {POSTGRES: Known("pending"), DYNAMODB: Known("discarded")}}
    assert await both.settle(1.0) == Settled(
        asked=("a", "c"), silent=("b",), behind=frozenset({DYNAMODB}), knows_all=True, warnings=("w",)
    )


async def test_nobody_says_so_in_the_report():
    """A job beside no sidecar knows nothing, and warns of it."""
    assert (await Nobody().settle(5.0)).warnings
    assert not (await Nobody().settle(5.0)).knows_all


# --- the mirror ------------------------------------------------------------------------------------------------------


class Kept:
    """The tables, as they keep lines; ``broken`` makes them refuse."""

    def __init__(self):
        self.lines = {}
        self.calls = 0
        self.broken = False

    async def put_fates(self, lines):
        self.calls += 1
        if self.broken:
            raise StoreError("dynamodb", RetryClass.TRANSIENT, "away")
        for line in lines:
            known = self.lines.get(line.key)
            if known is None or known.revision < line.revision:
                self.lines[line.key] = line

    def states(self):
        return {(line.log_id, line.store): line.state for line in self.lines.values()}


async def test_every_dead_letter_and_discard_has_a_line_and_what_is_redriven_says_so(spool):
    """Written once, again only where something changed; a failure writes it the next time; no payload anywhere."""
    tables = Kept()
    mirror = Mirror(spool, tables, due=lambda: True, instance="pod-1", clock=SystemClock())
    assert await mirror.step() == 0
    ids = await append(spool, 1, 2, 3)
    (frame,) = await spool.cursor(DYNAMODB).take(1000, MIB)
    dead = [Leftover(n, "dead_letter", kind, "refused") for n, kind in enumerate(("permanent", "conflict", "unknown"))]
    spool.cursor(DYNAMODB).settle(frame, dead)
    tables.broken = True
    with pytest.raises(StoreError):
        await mirror.step()
    tables.broken = False
    assert await mirror.step() == 3
    assert tables.states() == {(i, DYNAMODB): "dead_lettered" for i in ids}
    calls = tables.calls
    assert await mirror.step() == 0
    assert tables.calls == calls
    await spool.discard(store=DYNAMODB, retry_class="permanent", who="a test", reason="worth nothing")
    await spool.redrive(store=DYNAMODB, retry_class="unknown")
    assert await mirror.step() == 2
    assert [tables.states()[i, DYNAMODB] for i in ids] == ["discarded", "dead_lettered", "redriven"]
    assert {line.by for line in tables.lines.values()} == {"pod-1"}
    again = Mirror(spool, tables, due=lambda: True, instance="pod-1", clock=SystemClock())
    assert await again.step() == 2  # a restart writes what it finds


async def test_another_sidecars_line_explains_and_is_awaited_for_a_moment():
    """Its dead letter is on its way into the tables when the record is found missing."""
    told = Told()
    told.settled = Settled(asked=("a", "b"), knows_all=True)
    stand = ConsistencyStand(whereabouts=told)
    await stand.write([record(1)], POSTGRES)
    began, whole = stand.clock.monotonic(), told.fates

    async def fates(log_ids):
        if stand.clock.monotonic() - began > 2.0:
            told.known = {record(1).log_id: {DYNAMODB: Known("dead_lettered", "permanent")}}
        return await whole(log_ids)

    told.fates = fates
    await stand.run()
    assert stand.found() == {record(1).log_id: "dead_letter"}

"""Facts of the guard before DynamoDB's records are thrown away: each reason alone refuses, with nothing done."""

from collections.abc import Sequence

import msgspec
import pytest

from sidecar.backfill.checkpoint import Checkpoint
from sidecar.backfill.clearing import Asked, NotCleared, Stand, clear
from sidecar.backfill.comparison import Comparison
from sidecar.backfill.evidence import Copies
from sidecar.backfill.job import Job
from sidecar.fleet_tables import AuditEntry, FleetRecord
from sidecar.phase import DYNAMODB, POSTGRES, Phase
from sidecar.stores.base import HOUR_US
from sidecar.stores.memory import MemoryStore
from sidecar.verdicts import DAY_US, MemoryLedger
from tests.backfill.fakes import Jobs, Time
from tests.backfill.test_parts import Ledger, line
from tests.stores.records import BASE, record

HOUR = BASE // HOUR_US
GOOD = Asked("logs", "me", "rebuild")


class Fleet:
    """The part of a fleet's tables that is asked."""

    def __init__(self) -> None:
        self.record: FleetRecord | None = None
        self.trail: list[AuditEntry] = []

    async def read_record(self) -> FleetRecord | None:
        return self.record

    async def append_audit(self, entry: AuditEntry) -> None:
        self.trail.append(entry)


class World:
    """Both stores with the same two records, phase 1, no gap; ``done`` says what was done."""

    def __init__(self) -> None:
        self.time = Time(BASE + 50 * HOUR_US)
        self.postgres, self.dynamodb = MemoryStore(POSTGRES), MemoryStore(DYNAMODB)
        self.ledgers = {POSTGRES: Ledger(), DYNAMODB: Ledger()}
        self.fleets = {POSTGRES: Fleet(), DYNAMODB: Fleet()}
        self.jobs = Jobs()
        self.verdicts = MemoryLedger()
        self.wished = Phase.DUAL_WRITE
        self.done: list[str] = []

    @property
    def postgres_days(self) -> set[int]:
        return {r.log_timestamp // DAY_US for r in self.postgres._records.values()}

    async def filled(self) -> "World":
        for store in (self.postgres, self.dynamodb):
            await store.write([record(1), record(2, log_timestamp=BASE + HOUR_US)])
        return self

    async def recreate(self) -> Sequence[str]:
        assert [e.outcome for f in self.fleets.values() for e in f.trail] == ["intended", "intended"]
        assert {each.hour for each in await self.ledgers[POSTGRES].gaps()} >= {HOUR, HOUR + 1}
        assert self.postgres_days <= (await self.verdicts.writes()).keys()
        self.done.append("recreated")
        return ["table logs deleted"]

    async def clear(self, asked: Asked = GOOD) -> None:
        stand = Stand(
            table="logs",
            wished=self.wished,
            postgres=self.postgres,
            ledgers=dict(self.ledgers),
            fleets=dict(self.fleets),  # type: ignore[arg-type]  # what is asked of them
            only_in_dynamodb=Comparison(self.dynamodb, self.postgres, settle_us=1, now_us=self.time.now_us),
            jobs=self.jobs,
            verdicts=self.verdicts,
            recreate=self.recreate,
            clock=self.time,
        )
        await clear(stand, asked, self.done.append)


def fleet_record(phase: Phase, preparing: Phase | None = None) -> FleetRecord:
    """A copy of the fleet's record."""
    return FleetRecord(epoch=4, phase=phase, by="x", why="y", at_us=0, preparing=preparing)


async def refusal(world: World, asked: Asked = GOOD) -> str:
    """Why not; nothing was done, and nobody was told that it would be."""
    with pytest.raises(NotCleared) as caught:
        await world.clear(asked)
    assert world.done == []
    assert [each for fleet in world.fleets.values() for each in fleet.trail] == []
    assert [each for each in await world.ledgers[POSTGRES].gaps() if each.store == DYNAMODB] == []
    assert await world.verdicts.writes() == {}
    return str(caught.value)


async def test_without_the_tables_name_or_a_reason_it_is_refused() -> None:
    """Typed out, not taken from the configuration."""
    world = await World().filled()
    assert "'log'" in await refusal(world, Asked("log", "me", "why"))
    assert "--why" in await refusal(world, Asked("logs", "me", " "))


@pytest.mark.parametrize("phase", [Phase.DUAL_WRITE_READ_DYNAMO, Phase.DYNAMO_ONLY], ids=lambda p: p.label)
async def test_in_a_phase_that_needs_dynamodb_it_is_refused(phase: Phase) -> None:
    """Whoever says so: the configuration, one copy of the fleet's record, or what that one prepares."""
    world = await World().filled()
    world.wished = phase
    assert "the configuration asks for" in await refusal(world)
    for keeper in (POSTGRES, DYNAMODB):
        world = await World().filled()
        world.fleets[keeper].record = fleet_record(phase)
        assert f"record in {keeper} says" in await refusal(world)
        world.fleets[keeper].record = fleet_record(Phase.DUAL_WRITE, preparing=phase)
        assert f"record in {keeper} prepares" in await refusal(world)


@pytest.mark.parametrize("keeper", [POSTGRES, DYNAMODB])
async def test_with_an_open_gap_of_postgresql_it_is_refused(keeper) -> None:
    """In either ledger; DynamoDB's own gaps are no reason."""
    world = await World().filled()
    await world.ledgers[keeper].put_gaps([line(3, 7, store=POSTGRES)])
    assert "lacks 7 records" in await refusal(world)


async def test_with_a_record_that_dynamodb_alone_holds_it_is_refused() -> None:
    """Whatever phase and ledger say; another content under the same id likewise."""
    world = await World().filled()
    await world.dynamodb.write([record(3)])
    assert "1 records are in DynamoDB alone" in await refusal(world)
    world = await World().filled()
    await world.postgres.write([record(4)])
    await world.dynamodb.write([record(4, user_id="other")])
    assert "1 records differ" in await refusal(world)


async def test_cleared_it_has_gaps_a_trail_and_no_job_that_says_otherwise() -> None:
    """Gap lines before the deletion, for each hour of PostgreSQL's and for now; jobs begin anew; all is audited."""
    world = await World().filled()
    await world.ledgers[POSTGRES].put_gaps([line(HOUR)])
    old = Checkpoint(run="r", stage="done", finished_us=1, looked_at=2, below=7)
    there, back = Job(POSTGRES, DYNAMODB).key, Job(DYNAMODB, POSTGRES).key
    for key in (there, back):
        world.jobs.kept[key] = (msgspec.json.encode(old), 3)
    world.fleets[POSTGRES].record = fleet_record(Phase.DUAL_WRITE)
    await world.clear()
    assert "recreated" not in world.done[0]
    hours = {each.hour for each in await world.ledgers[POSTGRES].gaps()}
    assert {HOUR, HOUR + 1, HOUR + 49, HOUR + 50, HOUR + 51} <= hours
    for fleet in world.fleets.values():
        assert [(e.outcome, e.by, e.why, e.epoch) for e in fleet.trail] == [
            ("intended", "me", "rebuild", 4),
            ("done", "me", "rebuild", 4),
        ]
    found = await Copies(world.jobs).copy(DYNAMODB)
    assert found is not None
    assert found.left == 2  # known to be missing again
    ended = msgspec.json.decode(world.jobs.kept[there][0], type=Checkpoint)
    assert (ended.stage, ended.below) == ("done", 0)
    assert world.jobs.kept[back][0] == msgspec.json.encode(old)

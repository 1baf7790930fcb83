"""What a phase demands of records on disk: owed to more, decided at last; and the ledger of what is not owed."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import pytest

from sidecar.clock import SystemClock
from sidecar.errors import RetryClass, StoreError
from sidecar.fleet import MemoryFleetStore
from sidecar.fleet.clock import BootClock
from sidecar.gaps import GapLine
from sidecar.not_owed import Accounted, NotOwed
from sidecar.obligations import Obligations, obligation_of
from sidecar.phase import DYNAMODB, POSTGRES, STORES, TABLE, Phase, Policy
from sidecar.record import encode
from sidecar.settings import MIB
from sidecar.spool import Frame, Spool
from tests.spool.harness import DYNAMO, FENCED, HOUR_US, SQL_ONLY, records, spool_at

HOUR = 1_700_000_000_000_000 // HOUR_US


class Use:
    """A hold whose validity the test sets."""

    def __init__(self, policy: Policy | None) -> None:
        self.policy = policy
        self.valid = True
        self.open = False

    def __enter__(self) -> Self:
        self.open = True
        return self

    def __exit__(self, *_exception: object) -> None:
        self.open = False


class Ledger(MemoryFleetStore):
    """The reference, with a switch and a count of calls."""

    down = False
    calls = 0

    async def put_gaps(self, lines):
        self.calls += 1
        if self.down:
            raise StoreError(self.name, RetryClass.TRANSIENT, "cannot be reached")
        await super().put_gaps(lines)


class Quick(SystemClock):
    """Sleeps a moment whatever it is asked for."""

    def __init__(self) -> None:
        self.slept = 0

    async def sleep(self, seconds: float) -> None:
        self.slept += 1
        await asyncio.sleep(0)


class Stand:
    """A real spool, ledgers in memory, and a policy that the test sets."""

    def __init__(self, spool: Spool) -> None:
        self.spool = spool
        self.clock = Quick()
        self.instance = "a"
        self.ledgers = {store: Ledger(store, self.clock) for store in STORES}
        self.policy: Policy | None = TABLE[Phase.SQL_ONLY]
        self.uses: list[Use] = []
        self.obligations = Obligations(spool)
        self.not_owed = self.fresh()

    def fresh(self) -> NotOwed:
        """As after a restart."""
        self.not_owed = NotOwed(
            self.spool,
            ledgers=self.ledgers,
            uses=self._use,
            undecided=self.obligations.undecided,
            instance=self.instance,
            clock=self.clock,
        )
        self.source = Accounted(self.not_owed)
        return self.not_owed

    def _use(self) -> Use:
        self.uses.append(Use(self.policy))
        return self.uses[-1]

    async def accept(self, n: int, obligation=SQL_ONLY, **kwargs: int) -> None:
        made = records(n, **kwargs)
        await self.spool.append(made, [encode(record) for record in made], obligation)

    async def take(self, store: str = POSTGRES) -> Frame:
        async with asyncio.timeout(10):
            (frame,) = await self.source.cursor(store).take(1000, MIB)
        return frame

    async def lines(self, store: str = POSTGRES) -> dict[tuple[str, int], int]:
        """(store that misses, hour) -> open records in this store's ledger."""
        return {(line.store, line.hour): line.open for line in await self.ledgers[store].gaps()}

    def owed(self) -> tuple[int, int]:
        return self.spool.counters(POSTGRES).owed, self.spool.counters(DYNAMODB).owed


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Stand]:
    """An empty one."""
    async with spool_at(tmp_path) as spool:
        yield Stand(spool)


# --- obligations -----------------------------------------------------------------------------------------------------


async def test_what_waits_when_a_phase_begins_is_owed_to_its_stores_too(stand):
    """Phase 0's pending records get a copy for DynamoDB, phase 3's for PostgreSQL; doing it again adds nothing."""
    await stand.accept(3)
    for _ in range(2):
        await stand.obligations.apply(TABLE[Phase.DUAL_WRITE])
        assert stand.owed() == (3, 3)
    await stand.accept(2, DYNAMO)
    for _ in range(2):
        await stand.obligations.apply(TABLE[Phase.DUAL_WRITE_READ_DYNAMO])
        assert stand.owed() == (5, 5)
    await stand.obligations.apply(TABLE[Phase.SQL_ONLY])
    assert stand.owed() == (5, 5)


async def test_a_long_backlog_is_copied_step_by_step_and_only_where_it_must_be(stand):
    """More frames than one look takes, of two phases in turn: exactly those of phase 0 get a copy, once."""
    for _ in range(12):
        await asyncio.gather(*(stand.accept(1, size=20_000) for _ in range(50)))
        await stand.accept(3, obligation_of(TABLE[Phase.DUAL_WRITE]), size=100_000)
    assert stand.owed() == (636, 36)
    for _ in range(2):
        await stand.obligations.apply(TABLE[Phase.DUAL_WRITE])
        assert stand.owed() == (636, 636)
    await stand.accept(5)
    await stand.obligations.apply(TABLE[Phase.DUAL_WRITE])
    assert stand.owed() == (641, 641)


async def test_what_is_settled_is_not_copied(stand):
    """It has its line in the ledger instead."""
    await stand.accept(3)
    frame = await stand.take()
    stand.source.cursor(POSTGRES).settle(frame)
    await stand.obligations.apply(TABLE[Phase.DUAL_WRITE])
    assert stand.owed() == (3, 0)
    assert await stand.lines() == {(DYNAMODB, HOUR): 3}


async def test_what_was_undecided_is_owed_to_the_phase(stand):
    """A fenced instance's records, once."""
    await stand.accept(4, FENCED)
    assert stand.owed() == (0, 0)
    await stand.obligations.apply(TABLE[Phase.DUAL_WRITE])
    await stand.obligations.apply(TABLE[Phase.DYNAMO_ONLY])
    assert stand.owed() == (4, 4)


# --- the ledger ------------------------------------------------------------------------------------------------------


async def test_the_line_is_there_before_the_record_is_handed_out(stand):
    """By UTC hour of log_timestamp, in the ledger of the store that is shipped to."""
    await stand.accept(3)
    await stand.accept(2, at_us=1_700_000_000_000_000 + 5 * HOUR_US)
    async with asyncio.timeout(10):
        await stand.source.cursor(POSTGRES).take(1000, MIB)
    assert await stand.lines() == {(DYNAMODB, HOUR): 3, (DYNAMODB, HOUR + 5): 2}
    assert await stand.lines(DYNAMODB) == {}


async def test_without_its_line_no_record_is_handed_out(stand):
    """The ledger cannot be written: the reason is shown, nothing is shipped; then both end."""
    await stand.accept(3)
    stand.ledgers[POSTGRES].down = True
    taking = asyncio.create_task(stand.take())
    async with asyncio.timeout(10):
        while not stand.not_owed.trouble:
            await asyncio.sleep(0)
    assert not taking.done()
    assert stand.not_owed.trouble == {POSTGRES: "postgres: cannot be reached"}
    assert "gap ledger: postgres: cannot be reached" in stand.not_owed.waits[POSTGRES].reason
    stand.ledgers[POSTGRES].down = False
    assert len((await taking).records) == 3
    assert (stand.not_owed.trouble, stand.not_owed.waits) == ({}, {})


async def test_a_wait_that_goes_on_for_another_reason_began_when_it_began(stand):
    """Behind the fence, then for the ledger: told all the time, and since when it was first."""
    await stand.accept(1)
    stand.policy = None
    stand.ledgers[POSTGRES].down = True
    taking = asyncio.create_task(stand.take())
    async with asyncio.timeout(10):
        while not stand.not_owed.waits:
            await asyncio.sleep(0)
        first = stand.not_owed.waits[POSTGRES]
        assert "joined the fleet" in first.reason
        stand.policy = TABLE[Phase.SQL_ONLY]
        while not stand.not_owed.trouble:
            await asyncio.sleep(0)
    assert stand.not_owed.waits[POSTGRES].since == first.since
    assert "gap ledger" in stand.not_owed.waits[POSTGRES].reason
    stand.ledgers[POSTGRES].down = False
    await taking
    assert stand.not_owed.waits == {}


async def test_what_every_store_is_owed_needs_no_line_and_no_use(stand):
    """The dual phases cost nothing."""
    await stand.accept(3, obligation_of(TABLE[Phase.DUAL_WRITE]))
    stand.ledgers[POSTGRES].down = True
    stand.policy = None
    assert len((await stand.take()).records) == 3
    assert (stand.uses, stand.ledgers[POSTGRES].calls) == ([], 0)


async def test_a_busy_hour_costs_few_lines_and_counts_at_most_a_tenth_too_much(stand):
    """300 batches of one record: some fifty calls, never too low on the way."""
    for n in range(1, 301):
        await stand.accept(1)
        stand.source.cursor(POSTGRES).settle(await stand.take())
        if n in (1, 9, 10, 100, 300):
            (counted,) = (await stand.lines()).values()
            assert n <= counted <= n + n // 10
    assert stand.ledgers[POSTGRES].calls < 60


async def test_the_head_start_ends_with_the_phase(stand):
    """A line that was closed in the next phase is open again when a late record of the old one is shipped."""
    await stand.accept(50)
    stand.source.cursor(POSTGRES).settle(await stand.take())
    (line,) = await stand.ledgers[POSTGRES].gaps()
    assert line.opened == 55
    closed = GapLine(store=DYNAMODB, kind="not_owed", hour=line.hour, source=line.source, opened=55, closed=55)
    await stand.ledgers[POSTGRES].put_gaps([closed])
    await stand.accept(1)
    stand.policy = TABLE[Phase.DUAL_WRITE]
    stand.source.cursor(POSTGRES).settle(await stand.take())
    assert await stand.lines() == {(DYNAMODB, HOUR): 1}


async def test_after_a_restart_the_count_goes_on_where_it_was(stand):
    """Never below what was shipped: the source is the same, the head start is taken as used."""
    await stand.accept(50)
    stand.source.cursor(POSTGRES).settle(await stand.take())
    stand.fresh()
    await stand.accept(1)
    stand.source.cursor(POSTGRES).settle(await stand.take())
    (line,) = await stand.ledgers[POSTGRES].gaps()
    assert 51 <= line.opened <= 62


async def test_whoever_goes_on_with_a_spool_counts_under_its_first_name(stand):
    """A drain on another machine adds to the pod's line instead of counting beside it."""
    await stand.accept(50)
    stand.source.cursor(POSTGRES).settle(await stand.take())
    stand.instance = "elsewhere"
    stand.fresh()
    await stand.accept(30)
    await stand.take()
    assert len(await stand.ledgers[POSTGRES].gaps()) == 1


async def test_lines_are_copied_to_the_ledger_that_the_next_phase_asks(stand):
    """Phase 3's lines about PostgreSQL are in PostgreSQL's own ledger once it decides again."""
    stand.policy = TABLE[Phase.DYNAMO_ONLY]
    await stand.accept(4, DYNAMO)
    stand.source.cursor(DYNAMODB).settle(await stand.take(DYNAMODB))
    assert await stand.lines() == {}
    await stand.not_owed.republish(TABLE[Phase.DUAL_WRITE_READ_DYNAMO])
    assert await stand.lines() == await stand.lines(DYNAMODB) == {(POSTGRES, HOUR): 4}


async def test_a_fenced_instance_ships_nothing_that_one_store_alone_is_owed(stand):
    """It waits until it knows the phase again."""
    await stand.accept(2)
    stand.policy = None
    taking = asyncio.create_task(stand.take())
    async with asyncio.timeout(10):
        while stand.clock.slept < 3:
            await asyncio.sleep(0)
    assert (taking.done(), stand.ledgers[POSTGRES].calls) == (False, 0)
    stand.policy = TABLE[Phase.SQL_ONLY]
    await taking
    assert [use.open for use in stand.uses[-2:]] == [False, True]


async def test_the_use_lasts_from_the_line_to_the_confirmation(stand):
    """So the fleet's next epoch waits for it; it ends with its last frame."""
    await stand.accept(2)
    frame = await stand.take()
    assert stand.uses[-1].open
    stand.source.cursor(POSTGRES).settle(frame)
    assert not stand.uses[-1].open


async def test_records_shipped_under_an_outdated_policy_are_owed_once_more(stand):
    """Somebody may have closed their gap meanwhile: they are undecided again before the frame is settled."""
    await stand.accept(2)
    frame = await stand.take()
    stand.uses[-1].valid = False
    stand.source.cursor(POSTGRES).settle(frame)
    async with asyncio.timeout(10):
        while stand.uses[-1].open:
            await asyncio.sleep(0)
    assert stand.spool.counters(POSTGRES).delivered == 2
    assert await stand.spool.resolve(obligation_of(TABLE[Phase.DUAL_WRITE_READ_DYNAMO])) == 2
    assert stand.owed() == (4, 2)


async def test_a_consumer_that_dies_gives_back_frames_and_uses(stand):
    """A restarted shipper gets them again, with a use of its own."""
    await stand.accept(2)
    await stand.take()
    stand.source.take_back(POSTGRES)
    assert not stand.uses[-1].open
    assert len((await stand.take()).records) == 2
    assert stand.uses[-1].open


# --- the fence -------------------------------------------------------------------------------------------------------


def test_the_fences_clock_counts_suspended_time():
    """It is CLOCK_BOOTTIME, which only ever runs ahead of the ordinary one."""
    clock = BootClock()
    first = clock.monotonic()
    assert first >= SystemClock().monotonic() - 1
    assert clock.monotonic() >= first

"""Rows of old writers on their way to the other store: none missed, none twice, whatever fails in between."""

from collections.abc import Sequence

import asyncpg
import pytest

from sidecar import settings
from sidecar.app.old_rows import OldRowsCopy
from sidecar.clock import SystemClock
from sidecar.errors import RetryClass, StoreError
from sidecar.phase import TABLE, Phase
from sidecar.record import LogRecord
from sidecar.stores.base import CountQuery, FillResult
from sidecar.stores.memory import MemoryStore
from sidecar.stores.postgres import PostgresStore
from sidecar.verdicts import DAY_US, MemoryLedger, WrittenDays
from tests.parts.adopted import RELATION, old_rows
from tests.parts.postgres import connect
from tests.stores.records import BASE, DAY, record


class Target(MemoryStore):
    """A store that throttles, and refuses one user's records as data, when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.throttled_at: int | None = None

    async def fill(self, batch: Sequence[LogRecord]) -> FillResult:
        self.calls += 1
        if self.calls == self.throttled_at:
            raise StoreError("dynamodb", RetryClass.THROTTLE, "slower")
        if any(r.user_id == "refused" for r in batch):
            raise StoreError("dynamodb", RetryClass.PERMANENT, "one of them")
        return await super().fill(batch)


@pytest.fixture
def target() -> Target:
    """Where they go."""
    return Target()


def copy_to(
    target: MemoryStore,
    store: PostgresStore,
    *,
    phase: Phase = Phase.DUAL_WRITE,
    holder: str = "a",
    ledger: MemoryLedger | None = None,
) -> OldRowsCopy:
    """A copier of one instance."""
    assert store.old_rows is not None
    days = WrittenDays(ledger or MemoryLedger(), SystemClock())
    return OldRowsCopy(
        store.old_rows, target, store.fleet, days, policy=lambda: TABLE[phase], holder=holder, clock=SystemClock()
    )


async def count(store: MemoryStore) -> int:
    """How many there are."""
    return await store.count(CountQuery(BASE - DAY, BASE + DAY))


async def test_only_what_comes_after_the_beginning_is_copied(
    target: Target, specified_store: PostgresStore, application: asyncpg.Connection
) -> None:
    """History is the backfill's; the sidecar's own rows are delivered; each row of an old writer comes once."""
    await old_rows(application, BASE, 20)
    copy = copy_to(target, specified_store)
    assert await copy.round() == 0
    late = await old_rows(application, BASE + 1_000_000, 250)
    await specified_store.write([record(1, log_type="External API", application_id=None)])
    assert await copy.round() == 250
    assert await copy.round() == 0
    assert [await target.get(r.log_id) for r in late] == late
    assert await count(target) == 250


async def test_the_days_of_copied_rows_are_noted_before_they_are_put(
    target: Target, specified_store: PostgresStore, application: asyncpg.Connection
) -> None:
    """Also where the round breaks off then: a verdict from before is overtaken."""
    ledger = MemoryLedger()
    copy = copy_to(target, specified_store, ledger=ledger)
    await copy.round()
    assert await ledger.writes() == {}
    await old_rows(application, BASE - 40 * DAY, 5)
    target.throttled_at = target.calls + 1
    with pytest.raises(StoreError, match="slower"):
        await copy.round()
    assert list(await ledger.writes()) == [(BASE - 40 * DAY) // DAY_US]


async def test_a_phase_that_owes_dynamodb_nothing_begins_nothing(
    target: Target, specified_store: PostgresStore, application: asyncpg.Connection
) -> None:
    """In sql_only all rows are history."""
    assert specified_store.old_rows is not None
    assert await copy_to(target, specified_store, phase=Phase.SQL_ONLY).round() == 0
    assert await specified_store.old_rows.copied() is None


async def test_a_round_that_breaks_off_is_repeated_and_a_restart_goes_on(
    target: Target, specified: settings.Postgres, specified_store: PostgresStore, application: asyncpg.Connection
) -> None:
    """A throttle in the middle, then another process: every row is there, those that were there already stay."""
    copy = copy_to(target, specified_store)
    await copy.round()
    late = await old_rows(application, BASE, 250)
    target.throttled_at = 2
    with pytest.raises(StoreError, match="slower"):
        await copy.round()
    assert await count(target) == 100
    other = PostgresStore(specified, clock=SystemClock())
    assert await copy_to(target, other).round() == 150
    await other.close()
    assert [await target.get(r.log_id) for r in late] == late


async def test_one_instance_of_the_fleet_copies(
    target: Target, specified_store: PostgresStore, application: asyncpg.Connection
) -> None:
    """While one holds the lease another does nothing."""
    await copy_to(target, specified_store, holder="a").round()
    await old_rows(application, BASE, 5)
    assert await copy_to(target, specified_store, holder="b").round() == 0
    assert await copy_to(target, specified_store, holder="a").round() == 5


async def test_a_row_that_commits_late_is_copied_by_a_later_round(
    target: Target, specified: settings.Postgres, specified_store: PostgresStore, application: asyncpg.Connection
) -> None:
    """Between rounds of one copier, and across its restart."""
    copy = copy_to(target, specified_store)
    await copy.round()
    slow = await connect(specified)
    transaction = slow.transaction()
    await transaction.start()
    early = await old_rows(slow, BASE, 1)
    await old_rows(application, BASE + 1, 4)
    assert await copy.round() == 4
    assert await copy.round() == 0
    await transaction.commit()
    await slow.close()
    assert await copy_to(target, specified_store).round() == 1
    assert await target.get(early[0].log_id) == early[0]


async def test_what_the_other_store_refuses_holds_up_nobody(
    target: Target, specified_store: PostgresStore, application: asyncpg.Connection
) -> None:
    """One record that cannot be stored there: its neighbours are, and the next round goes on behind it."""
    copy = copy_to(target, specified_store)
    await copy.round()
    await old_rows(application, BASE, 20)
    await application.execute(f"""UPDATE {RELATION} SET "UserId" = 'refused' WHERE "LogId" = 7""")
    assert await copy.round() == 19
    await old_rows(application, BASE, 3)
    assert await copy.round() == 3

"""The tail of an adopted table: no row of an old writer is ever missed, whatever the order of the commits."""

import asyncio
import random

import asyncpg
import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.errors import RetryClass, StoreError
from sidecar.record import LogRecord
from sidecar.stores.postgres import PostgresStore
from sidecar.stores.postgres_tail import Bound
from tests.parts.adopted import IDS, RELATION
from tests.parts.postgres import connect
from tests.stores.records import BASE, record

_INSERT = (
    f"""INSERT INTO {RELATION} ("LogType", "ServiceName", "IsSuccess") VALUES ('External API', 's', true) """
    'RETURNING "LogId"'
)


async def old_row(connection: asyncpg.Connection) -> str:
    """One row as the application writes it; its computed id."""
    return IDS.of(await connection.fetchval(_INSERT))


class Copy:
    """What a copier does: looks, reads from its bound, keeps the new one."""

    def __init__(self, store: PostgresStore, bound: Bound) -> None:
        assert store.old_rows is not None
        self.rows = store.old_rows
        self.bound = bound
        self.seen: set[str] = set()

    async def look(self) -> list[str]:
        """One round; the ids that it read."""
        upto = await self.rows.advance(self.bound)
        found = [r.log_id async for page in self.rows.rows(self.bound, upto) for r in page]
        self.seen.update(found)
        self.bound = msgspec.json.decode(msgspec.json.encode(upto), type=Bound)  # as a restart would find it
        return found


@pytest.fixture
async def copy(specified_store: PostgresStore) -> Copy:
    """A copier at the beginning."""
    assert specified_store.old_rows is not None
    return Copy(specified_store, await specified_store.old_rows.begin(patience=5))


async def test_a_row_that_was_inserted_early_and_committed_late_is_found(
    copy: Copy, specified: settings.Postgres, application: asyncpg.Connection
) -> None:
    """It is found although rows with higher keys were read before; the naive rule, the highest key seen, misses it."""
    late = await connect(specified)
    transaction = late.transaction()
    await transaction.start()
    early = await old_row(late)
    others = [await old_row(application) for _ in range(3)]
    assert await copy.look() == others
    naive = max(IDS.key(log_id) or 0 for log_id in copy.seen)
    await transaction.commit()
    await late.close()
    assert await copy.look() == [early, *others]
    missed = await application.fetchval(f'SELECT count(*) FROM {RELATION} WHERE "LogId" > {naive}')
    assert missed == 0, "the control: the naive rule looks above the highest key, and the row is not there"
    assert await copy.look() == []
    assert copy.bound.floor == copy.bound.high


async def test_the_overlap_lasts_as_long_as_the_oldest_writer(
    copy: Copy, specified: settings.Postgres, application: asyncpg.Connection
) -> None:
    """Two long transactions, one begun after the other: the bound stays where the older began, then the younger."""
    before = await old_row(application)
    await copy.look()
    older, younger = await connect(specified), await connect(specified)
    first, second = older.transaction(), younger.transaction()
    await first.start()
    ids = [await old_row(older)]
    between = [await old_row(application) for _ in range(2)]
    await copy.look()
    assert copy.bound.floor == IDS.key(before)
    await second.start()
    ids.append(await old_row(younger))
    await copy.look()
    assert copy.bound.floor == IDS.key(before)
    await first.commit()
    assert ids[0] in await copy.look()
    assert copy.bound.floor == IDS.key(between[-1])
    await second.commit()
    assert ids[1] in await copy.look()
    await older.close()
    await younger.close()


async def test_a_prepared_transaction_is_not_forgotten(
    copy: Copy, specified: settings.Postgres, application: asyncpg.Connection
) -> None:
    """It changes its name when it is prepared, and its rows may come much later."""
    preparing = await connect(specified)
    await preparing.execute("BEGIN")
    early = await old_row(preparing)
    await copy.look()
    others = [await old_row(application)]
    await copy.look()
    await preparing.execute("PREPARE TRANSACTION 'later'")
    await preparing.close()
    assert early not in await copy.look()
    assert early not in await copy.look()
    await application.execute("COMMIT PREPARED 'later'")
    assert await copy.look() == [early, *others]


async def test_what_the_sidecar_wrote_is_not_in_the_tail(
    copy: Copy, specified_store: PostgresStore, application: asyncpg.Connection
) -> None:
    """Its rows have their own ids and are on their way to both stores; only old writers' are read."""
    mine = record(1, log_type="External API", application_id=None)
    assert not (await specified_store.write([mine])).failures
    theirs = await old_row(application)
    assert await copy.look() == [theirs]


async def test_a_beginning_waits_for_those_who_are_writing(
    specified_store: PostgresStore, specified: settings.Postgres, application: asyncpg.Connection
) -> None:
    """History that is read after it has every row up to the bound; whoever does not end in time is an error."""
    rows = specified_store.old_rows
    assert rows is not None
    first = await old_row(application)
    transaction = application.transaction()
    await transaction.start()
    early = await old_row(application)
    with pytest.raises(StoreError, match="1 transactions that write") as caught:
        await rows.begin(patience=0.3)
    assert caught.value.retry_class is RetryClass.TRANSIENT
    beginning = asyncio.create_task(rows.begin(patience=20))
    other = await connect(specified)
    await asyncio.sleep(0)  # the first look may come before or after the next line: both are right
    later = other.transaction()
    await later.start()
    held = await old_row(other)
    assert not beginning.done()
    await transaction.commit()
    await later.commit()
    copy = Copy(specified_store, await beginning)
    assert copy.bound.floor == IDS.key(first)
    assert await copy.look() == [early, held]
    await other.close()


async def test_nothing_is_missed_whatever_the_order(
    specified: settings.Postgres, specified_store: PostgresStore
) -> None:
    """Random writers with open transactions, some rolled back, looks in between: every committed row is read."""
    assert specified_store.old_rows is not None
    rng = random.Random(7)
    copy = Copy(specified_store, await specified_store.old_rows.begin(patience=5))
    connections = [await connect(specified) for _ in range(5)]
    open_rows: dict[int, tuple[asyncpg.transaction.Transaction, list[str]]] = {}
    committed: set[str] = set()
    for _ in range(250):
        at = rng.randrange(len(connections))
        chance = rng.random()
        if chance < 0.2:
            await copy.look()
        elif at not in open_rows:
            transaction = connections[at].transaction()
            await transaction.start()
            open_rows[at] = (transaction, [await old_row(connections[at])])
        elif chance < 0.7:
            open_rows[at][1].append(await old_row(connections[at]))
        else:
            transaction, ids = open_rows.pop(at)
            if chance < 0.95:
                await transaction.commit()
                committed.update(ids)
            else:
                await transaction.rollback()
    for transaction, ids in open_rows.values():
        await transaction.commit()
        committed.update(ids)
    await copy.look()
    assert copy.seen == committed
    for connection in connections:
        await connection.close()


async def test_pages_of_the_tail_are_whole(copy: Copy, application: asyncpg.Connection) -> None:
    """More rows than a page holds come in ascending order, each once."""
    await application.execute(
        f"""INSERT INTO {RELATION} ("LogType", "ServiceName", "IsSuccess")
        SELECT 'External API', 's', true FROM generate_series(1, 2500)"""
    )
    found = await copy.look()
    assert len(found) == len(set(found)) == 2500
    assert found == sorted(found)


class TestWatch:
    """How long there were no old writers."""

    async def test_a_row_of_an_old_writer_is_seen_and_then_quiet_lasts(
        self, specified_store: PostgresStore, application: asyncpg.Connection
    ) -> None:
        """Nobody at first; then its time; the sidecar's own rows and looks change nothing."""
        rows = specified_store.old_rows
        assert rows is not None
        first = await rows.old_writers()
        assert first.last_seen_us is None
        await specified_store.write([record(1, log_type="External API", application_id=None)])
        assert await rows.old_writers() == first
        await old_row(application)
        seen = await rows.old_writers()
        assert seen.watched_since_us == first.watched_since_us
        assert seen.last_seen_us is not None
        assert seen.last_seen_us > first.watched_since_us
        assert await rows.old_writers() == seen

    async def test_the_answer_survives_restarts_and_is_the_fleets(
        self, specified: settings.Postgres, specified_store: PostgresStore, application: asyncpg.Connection
    ) -> None:
        """Another instance goes on where the first looked: what was written while nobody looked is seen."""
        assert specified_store.old_rows is not None
        first = await specified_store.old_rows.old_writers()
        await old_row(application)
        other = PostgresStore(specified, clock=SystemClock())
        assert other.old_rows is not None
        both = await asyncio.gather(other.old_rows.old_writers(), specified_store.old_rows.old_writers())
        await other.close()
        assert {answer.watched_since_us for answer in both} == {first.watched_since_us}
        assert len({answer.last_seen_us for answer in both}) == 1
        assert both[0].last_seen_us is not None

    async def test_an_open_transaction_is_no_quiet_and_neither_is_its_commit(
        self, specified_store: PostgresStore, application: asyncpg.Connection
    ) -> None:
        """While it writes, every look is a sign of life; the row that it commits below later keys is one too."""
        rows = specified_store.old_rows
        assert rows is not None
        await rows.old_writers()
        transaction = application.transaction()
        await transaction.start()
        await old_row(application)
        await specified_store.write([record(1, log_type="External API", application_id=None, log_timestamp=BASE)])
        during = [(await rows.old_writers()).last_seen_us for _ in range(2)]
        assert None not in during
        assert during[0] < during[1]  # type: ignore[operator]  # seen above
        await transaction.commit()
        after = await rows.old_writers()
        assert after.last_seen_us is not None
        assert after.last_seen_us > during[1]  # type: ignore[operator]  # as above
        assert await rows.old_writers() == after


async def test_old_records_are_read_as_they_are(copy: Copy, application: asyncpg.Connection) -> None:
    """The tail's records are those that a read by id gives."""
    log_id = await old_row(application)
    upto = await copy.rows.advance(copy.bound)
    pages = [page async for page in copy.rows.rows(copy.bound, upto)]
    expected = LogRecord(log_id, None, "External API", "s", None, None, None, True, None, None, 0, None, None)
    (found,) = pages[0]
    assert found == msgspec.structs.replace(expected, log_timestamp=found.log_timestamp)

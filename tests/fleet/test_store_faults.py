"""The fleet's tables in the two real stores when the network, the clock or the tables are not as they should be."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import asyncpg
import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.errors import RetryClass, StoreError
from sidecar.fleet import AuditEntry, FateLine, FleetRecord, FleetStore, GapLine, Heartbeat, build_fleet_stores
from sidecar.phase import DYNAMODB, POSTGRES, Phase
from sidecar.stores.dynamodb import DynamoDBStore
from sidecar.stores.postgres import PostgresStore
from tests.parts.fault_proxy import FaultProxy, Hang, LoseReply
from tests.parts.postgres import TRUSTED
from tests.parts.postgres_relay import Relay
from tests.parts.sidecar import eventually
from tests.stores.records import record

MARK = "the-write-that-is-lost"
FIRST = FleetRecord(1, Phase.SQL_ONLY, "a", "born", 5)
SECOND = FleetRecord(2, Phase.SQL_ONLY, "a", MARK, 5, revision=1)
BEAT = Heartbeat(instance="a", incarnation="1", seq=1, version=MARK)
LINE = AuditEntry(id="1", outcome="intended", action="step", by="a", why=MARK, at_us=1, epoch=2)
GAP = GapLine(store=DYNAMODB, kind="not_owed", hour=7, source=MARK, opened=5)
FATE = FateLine(
    log_id="0190a5d0-7c1e-7000-8000-0000000000aa",
    store=DYNAMODB,
    state="dead_lettered",
    retry_class="permanent",
    by=MARK,
    at_us=1,
    revision=1,
)
CALLS: dict[str, Callable[[FleetStore], Awaitable[object]]] = {
    "read_record": lambda fleet: fleet.read_record(),
    "cas_record": lambda fleet: fleet.cas_record(FIRST, SECOND),
    "put_heartbeat": lambda fleet: fleet.put_heartbeat(BEAT),
    "heartbeats": lambda fleet: fleet.heartbeats(),
    "drop_heartbeat": lambda fleet: fleet.drop_heartbeat(BEAT.key, 1),
    "acquire_lease": lambda fleet: fleet.acquire_lease("x", "a", 30.0),
    "release_lease": lambda fleet: fleet.release_lease("x", "a"),
    "leader": lambda fleet: fleet.leader("x"),
    "append_audit": lambda fleet: fleet.append_audit(LINE),
    "audits": lambda fleet: fleet.audits(9),
    "put_gaps": lambda fleet: fleet.put_gaps([GAP]),
    "gaps": lambda fleet: fleet.gaps(),
    "put_fates": lambda fleet: fleet.put_fates([FATE]),
    "fates": lambda fleet: fleet.fates([FATE.log_id]),
}

ENDS = ("fleet", "heartbeats", "leases", "audit", "fates", "gaps")  # of the tables' names


@dataclass
class Network:
    """A store's fleet tables seen directly and through something that does harm."""

    direct: FleetStore
    through: FleetStore
    lose_next_write: Callable[[], None]  # applied; the answer never comes
    hang: Callable[[], None]


@pytest.fixture
async def postgres_network(postgres: settings.Postgres, postgres_admin: asyncpg.Connection) -> AsyncIterator[Network]:
    """PostgreSQL behind a relay that knows where messages begin."""
    async with Relay(postgres.port) as relay:
        options = msgspec.structs.replace(postgres, port=relay.port, command_timeout=0.5, connect_timeout=0.5)
        direct, through = PostgresStore(postgres, clock=SystemClock()), PostgresStore(options, clock=SystemClock())
        for call in CALLS.values():  # afterwards a message is the statement itself, not the question what it is like
            await call(through.fleet)
        await postgres_admin.execute("".join(f"DELETE FROM integration_logs_{end};" for end in ENDS))

        def lose() -> None:
            relay.swallow = True

        def hang() -> None:
            relay.frozen = True

        yield Network(direct.fleet, through.fleet, lose, hang)
        relay.frozen = False
        await through.close()
        await direct.close()


@pytest.fixture
async def dynamodb_network(
    dynamodb_store: DynamoDBStore, dynamodb_behind_proxy: DynamoDBStore, dynamodb_proxy: FaultProxy
) -> Network:
    """DynamoDB behind a proxy."""

    def lose() -> None:
        dynamodb_proxy.on("PutItem", LoseReply(), times=1)
        dynamodb_proxy.on("UpdateItem", LoseReply(), times=1)
        dynamodb_proxy.on("DeleteItem", LoseReply(), times=1)

    return Network(
        dynamodb_store.fleet, dynamodb_behind_proxy.fleet, lose, lambda: dynamodb_proxy.on("*", Hang(), times=50)
    )


@pytest.fixture(params=["postgres", "dynamodb"])
def network(request: pytest.FixtureRequest) -> Network:
    """Each of the two."""
    found: Network = request.getfixturevalue(f"{request.param}_network")
    return found


async def test_a_lost_answer_of_a_compare_and_set_is_retried_safely(network: Network) -> None:
    """Applied, and nobody knows: TRANSIENT; the retry says False, and the record read then is the writer's own."""
    assert await network.direct.cas_record(None, FIRST)
    network.lose_next_write()
    with pytest.raises(StoreError) as raised:
        await network.through.cas_record(FIRST, SECOND)
    assert raised.value.retry_class is RetryClass.TRANSIENT
    assert not await network.through.cas_record(FIRST, SECOND)
    assert await network.through.read_record() == SECOND


@pytest.mark.parametrize(
    ("write", "read", "once"),
    [
        ("put_heartbeat", "heartbeats", [BEAT]),
        ("append_audit", "audits", [LINE]),
        ("put_gaps", "gaps", [GAP]),
        ("put_fates", "fates", [FATE]),
        ("acquire_lease", "acquire_lease", True),
    ],
)
async def test_a_lost_answer_is_repeated_without_a_second_effect(
    network: Network, write: str, read: str, once: object
) -> None:
    """The write was applied, is written again, and is there once."""
    network.lose_next_write()
    with pytest.raises(StoreError) as raised:
        await CALLS[write](network.through)
    assert raised.value.retry_class is RetryClass.TRANSIENT
    assert await CALLS[read](network.direct) == once
    await CALLS[write](network.through)
    assert await CALLS[read](network.direct) == once


async def test_what_was_removed_or_given_back_stays_so_when_repeated(network: Network) -> None:
    """The answers of a deletion and of a release are lost; the next heartbeat and the next holder are left alone."""
    await network.direct.put_heartbeat(BEAT)
    await network.direct.acquire_lease("x", "a", 30.0)
    for call, meanwhile in (
        ("drop_heartbeat", network.direct.put_heartbeat(msgspec.structs.replace(BEAT, seq=2))),
        ("release_lease", network.direct.acquire_lease("x", "b", 30.0)),
    ):
        network.lose_next_write()
        with pytest.raises(StoreError):
            await CALLS[call](network.through)
        await meanwhile
        await CALLS[call](network.through)
    assert [beat.seq for beat in await network.direct.heartbeats()] == [2]
    assert not await network.direct.acquire_lease("x", "a", 30.0)


async def test_a_store_that_hangs_fails_every_call_in_its_own_time(network: Network) -> None:
    """All at once, nothing answers: each ends with a StoreError, none waits for ever, and none harms another."""
    network.hang()
    async with asyncio.timeout(30):
        outcomes = await asyncio.gather(*(call(network.through) for call in CALLS.values()), return_exceptions=True)
    classes = {name: getattr(outcome, "retry_class", outcome) for name, outcome in zip(CALLS, outcomes, strict=True)}
    assert set(classes.values()) <= {RetryClass.TRANSIENT, RetryClass.THROTTLE}, classes


@pytest.fixture(params=["postgres", "dynamodb"])
async def pair(
    request: pytest.FixtureRequest,
    postgres: settings.Postgres,
    dynamodb_store: DynamoDBStore,
    dynamodb_settings: settings.DynamoDB,
) -> AsyncIterator[tuple[FleetStore, FleetStore]]:
    """Two instances' sights of one store."""
    stores: tuple[PostgresStore | DynamoDBStore, ...]
    if request.param == "postgres":
        stores = PostgresStore(postgres, clock=SystemClock()), PostgresStore(postgres, clock=SystemClock())
    else:
        stores = dynamodb_store, DynamoDBStore(dynamodb_settings, clock=SystemClock())
    yield stores[0].fleet, stores[1].fleet
    for store in stores:
        await store.close()


async def test_of_two_writers_exactly_one_wins_every_time(pair: tuple[FleetStore, FleetStore]) -> None:
    """Fifty rounds from two instances, the first on the empty table: one True, and the winner's record is there."""
    present: FleetRecord | None = None
    for epoch in range(1, 51):
        news = [FleetRecord(epoch, Phase.DUAL_WRITE, by, "w", 1) for by in ("a", "b")]
        won = await asyncio.gather(*(fleet.cas_record(present, new) for fleet, new in zip(pair, news, strict=True)))
        assert sorted(won) == [False, True]
        present = news[won.index(True)]
        assert [await fleet.read_record() for fleet in pair] == [present, present]


async def test_of_two_takers_exactly_one_leads(pair: tuple[FleetStore, FleetStore]) -> None:
    """Of a lease that nobody has, and of one that was given back, whoever asks at the same time."""
    for _ in range(10):
        took = await asyncio.gather(*(fleet.acquire_lease("x", by, 30.0) for fleet, by in zip(pair, "ab", strict=True)))
        assert sorted(took) == [False, True]
        leader = took.index(True)
        await pair[leader].release_lease("x", "ab"[leader])


async def refusals(fleet: FleetStore) -> dict[str, tuple[RetryClass, str]]:
    """The methods that fail, each with its class and code."""
    refused = {}
    for name, call in CALLS.items():
        try:
            await call(fleet)
        except StoreError as error:
            refused[name] = error.retry_class, error.code
    return refused


class TestPostgres:
    """What only a server with tables, locks and a clock has."""

    async def test_a_lease_runs_out_by_the_servers_clock(self, postgres_store: PostgresStore) -> None:
        """Without a word of its holder."""
        fleet = postgres_store.fleet
        assert await fleet.acquire_lease("x", "a", 0.05)
        await eventually(lambda: fleet.acquire_lease("x", "b", 30.0))
        assert not await fleet.acquire_lease("x", "a", 30.0)

    async def test_a_lease_outlives_no_clock_that_was_set_back(
        self, postgres_store: PostgresStore, postgres_admin: asyncpg.Connection
    ) -> None:
        """It would run for a day, though it was taken for half a minute: it is free."""
        fleet = postgres_store.fleet
        await fleet.acquire_lease("x", "a", 30.0)
        await postgres_admin.execute("UPDATE integration_logs_leases SET until = until + interval '1 day'")
        assert await fleet.acquire_lease("x", "b", 30.0)
        assert not await fleet.acquire_lease("x", "a", 30.0)

    async def test_who_does_not_lead_writes_nothing_and_waits_for_no_lock(
        self, postgres_store: PostgresStore, postgres_admin: asyncpg.Connection
    ) -> None:
        """Somebody has the row locked; a follower's look is answered all the same, and leaves no lock on it."""
        fleet = postgres_store.fleet
        await fleet.acquire_lease("x", "a", 30.0)
        before = await postgres_admin.fetchval("SELECT xmax::text FROM integration_logs_leases")
        async with postgres_admin.transaction():
            await postgres_admin.execute("SELECT FROM integration_logs_leases FOR UPDATE")
            assert not await fleet.acquire_lease("x", "b", 30.0)
            marked = await postgres_admin.fetchval("SELECT xmax::text FROM integration_logs_leases")
        assert not await fleet.acquire_lease("x", "b", 30.0)
        assert await postgres_admin.fetchval("SELECT xmax::text FROM integration_logs_leases") == marked != before

    async def test_heartbeats_pass_while_the_table_of_records_is_locked(
        self, postgres_store: PostgresStore, postgres_admin: asyncpg.Connection
    ) -> None:
        """Every connection for records waits for the lock; the fleet's does not wait for them."""
        async with postgres_admin.transaction():
            await postgres_admin.execute("LOCK TABLE integration_logs IN ACCESS EXCLUSIVE MODE")
            waiting = [
                asyncio.create_task(call)
                for n in range(3)
                for call in (postgres_store.write([record(n)]), postgres_store.get(record(n).log_id))
            ]
            await eventually(
                lambda: postgres_admin.fetchval(
                    "SELECT count(*) = 4 FROM pg_locks WHERE NOT granted AND relation = 'integration_logs'::regclass"
                )
            )
            await postgres_store.fleet.put_heartbeat(BEAT)
            assert await postgres_store.fleet.read_record() is None
            assert not any(task.done() for task in waiting)
        await asyncio.gather(*waiting)

    async def test_everything_works_through_a_transaction_pooler(self, postgres: settings.Postgres) -> None:
        """Every method twice, the server connection changing after each transaction."""
        async with Relay(postgres.port, backends=2) as pool:
            options = msgspec.structs.replace(postgres, port=pool.port, user=TRUSTED, password=None, pgbouncer=True)
            store = PostgresStore(options, clock=SystemClock())
            for _ in range(2):
                for call in CALLS.values():
                    await call(store.fleet)
            assert await store.fleet.cas_record(None, FIRST)
            assert await store.fleet.cas_record(FIRST, SECOND)
            assert await store.fleet.read_record() == SECOND
            await store.close()

    @pytest.mark.parametrize("end", ENDS)
    async def test_a_database_of_an_earlier_version_is_told_mended_and_then_used(
        self, postgres_store: PostgresStore, postgres_admin: asyncpg.Connection, end: str
    ) -> None:
        """Without one of the tables: there is no record, the rest is BLOCKED, ``check`` is red, ``create`` mends it."""
        await postgres_admin.execute(f"DROP TABLE integration_logs_{end}")
        fleet = postgres_store.fleet
        assert await refusals(fleet) == dict.fromkeys(USERS[end], (RetryClass.BLOCKED, "42P01"))
        assert [check.name for check in await postgres_store.check() if not check.ok]
        assert list(await postgres_store.create()) == [f"table public.integration_logs_{end}"]
        for call in CALLS.values():
            await call(fleet)

    async def test_a_value_that_is_not_ours_is_blocked_and_not_shown(
        self, postgres_store: PostgresStore, postgres_admin: asyncpg.Connection
    ) -> None:
        """Neither skipped nor guessed at."""
        fleet = postgres_store.fleet
        await fleet.cas_record(None, FIRST)
        await fleet.put_fates([FATE])
        await postgres_admin.execute('UPDATE integration_logs_fleet SET document = \'{"epoch": "planted"}\'')
        await postgres_admin.execute("UPDATE integration_logs_fates SET state = 'planted'")
        for name in ("read_record", "fates"):
            with pytest.raises(StoreError) as raised:
                await CALLS[name](fleet)
            assert raised.value.retry_class is RetryClass.BLOCKED
            assert "planted" not in str(raised.value)


USERS = {
    "fleet": {"cas_record"},
    "heartbeats": {"put_heartbeat", "heartbeats", "drop_heartbeat", "leader"},
    "leases": {"acquire_lease", "release_lease", "leader"},
    "audit": {"append_audit", "audits"},
    "fates": {"put_fates", "fates"},
    "gaps": {"put_gaps", "gaps"},
}


class LateClock(SystemClock):
    """The machine's clock, some seconds on."""

    late = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.late


class TestDynamoDB:
    """What only a service without a clock, of pages and of items has."""

    async def test_a_lease_is_taken_over_by_who_has_watched_it_for_its_time(
        self, dynamodb_store: DynamoDBStore, dynamodb_settings: settings.DynamoDB
    ) -> None:
        """Renewed, it begins anew; unchanged for its whole time, it is free, and its holder finds it gone."""
        clock = LateClock()
        watcher = DynamoDBStore(dynamodb_settings, clock=clock)
        holder = dynamodb_store.fleet
        assert await holder.acquire_lease("x", "a", 1000.0)
        assert not await watcher.fleet.acquire_lease("x", "b", 1000.0)
        clock.late += 1001.0
        assert await holder.acquire_lease("x", "a", 1000.0)
        assert not await watcher.fleet.acquire_lease("x", "b", 1000.0)
        clock.late += 900.0
        assert not await watcher.fleet.acquire_lease("x", "b", 1000.0)
        clock.late += 101.0
        assert await watcher.fleet.acquire_lease("x", "b", 1000.0)
        assert not await holder.acquire_lease("x", "a", 1000.0)
        await watcher.close()

    async def test_more_than_a_page_comes_back_whole(self, dynamodb_store: DynamoDBStore) -> None:
        """Over 1 MB of heartbeats and of trail, so that the service answers in pages."""
        fleet = dynamodb_store.fleet
        beats = [msgspec.structs.replace(BEAT, incarnation=str(n), version="x" * 90_000) for n in range(13)]
        lines = [msgspec.structs.replace(LINE, id=str(n), epoch=n, why="x" * 90_000) for n in range(13)]
        for beat, line in zip(beats, lines, strict=True):
            await fleet.put_heartbeat(beat)
            await fleet.append_audit(line)
        assert sorted(await fleet.heartbeats(), key=lambda each: int(each.incarnation)) == beats
        assert list(await fleet.audits(100)) == lines[::-1]
        assert list(await fleet.audits(2)) == lines[:-3:-1]

    async def test_without_the_fleet_table_there_is_no_record_and_everything_else_is_blocked(
        self, dynamodb_settings: settings.DynamoDB
    ) -> None:
        """In phase 0 the table need not exist; a store that lost its heartbeats is not one in which nobody lives."""
        store = DynamoDBStore(dynamodb_settings, clock=SystemClock())
        refused = await refusals(store.fleet)
        await store.close()
        assert refused == dict.fromkeys(set(CALLS) - {"read_record"}, (RetryClass.BLOCKED, "ResourceNotFoundException"))

    @pytest.mark.parametrize(
        ("key", "call"),
        [
            (("fleet", "record"), "read_record"),
            (("heartbeats", "x"), "heartbeats"),
            (("leases", "x"), "acquire_lease"),
            (("audit", "x"), "audits"),
            ((f"fates#{FATE.log_id}", "planted"), "fates"),
        ],
    )
    async def test_an_item_that_is_not_ours_is_blocked_and_not_shown(
        self, dynamodb_store: DynamoDBStore, dynamodb_settings: settings.DynamoDB, key: tuple[str, str], call: str
    ) -> None:
        """Neither skipped nor guessed at."""
        item = {"pk": {"S": key[0]}, "sk": {"S": key[1]}, "document": {"S": "planted"}}
        body = msgspec.json.encode({"TableName": dynamodb_settings.fleet_table, "Item": item})
        await dynamodb_store.wire.call("PutItem", body)
        with pytest.raises(StoreError) as raised:
            await CALLS[call](dynamodb_store.fleet)
        assert raised.value.retry_class is RetryClass.BLOCKED
        assert "planted" not in str(raised.value)


async def test_the_fleet_has_the_tables_of_each_store(
    postgres_store: PostgresStore, dynamodb_store: DynamoDBStore
) -> None:
    """By the store's name, each its own; and the gap ledger is the one that deliveries write."""
    stores = build_fleet_stores({POSTGRES: postgres_store, DYNAMODB: dynamodb_store})
    for name, store in ((POSTGRES, postgres_store), (DYNAMODB, dynamodb_store)):
        assert stores[name].name == name
        await store.gap_ledger.put_gaps([GAP])
        assert list(await stores[name].gaps()) == [GAP]

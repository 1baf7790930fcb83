"""The few connections: how many, how long, how secret, and what a bad network does to them."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.errors import RetryClass, StoreError
from sidecar.record import LogRecord
from sidecar.stores import postgres_connections
from sidecar.stores.base import ByService, CountQuery
from sidecar.stores.postgres import PostgresStore
from tests.parts.certificates import authority_file, server_context
from tests.parts.postgres import TRUSTED
from tests.parts.postgres_relay import Relay
from tests.stores.records import BASE, DAY, log_id, record, records

TABLE = "integration_logs"
OURS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'hybrid-log-sidecar' AND datname = $1"
QUERY = ByService("orders", BASE, BASE + DAY)


class SteppedClock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.time = 0.0
        self._moved = asyncio.Condition()

    def now_us(self) -> int:
        return BASE

    def monotonic(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        until = self.time + seconds
        async with self._moved:
            await self._moved.wait_for(lambda: self.time >= until)

    async def step(self, seconds: float) -> None:
        async with self._moved:
            self.time += seconds
            self._moved.notify_all()


@pytest.fixture
async def ours(postgres: settings.Postgres, postgres_admin: asyncpg.Connection) -> Any:
    """Awaits a number of connections of the store's at the server."""

    async def awaited(number: int) -> None:
        async with asyncio.timeout(10):
            while await postgres_admin.fetchval(OURS, postgres.database) != number:
                await asyncio.sleep(0.01)

    return awaited


def bounded(options: settings.Postgres, **changed: Any) -> settings.Postgres:
    """Short bounds, so that what must end soon does."""
    return msgspec.structs.replace(options, **({"connect_timeout": 0.4, "command_timeout": 0.4} | changed))


async def failure(work: Any) -> StoreError:
    """The StoreError of a call that must end by itself."""
    async with asyncio.timeout(15):
        with pytest.raises(StoreError) as caught:
            await work
    return caught.value


class TestNumber:
    """How many are open, and when."""

    async def test_none_is_open_before_the_first_call_and_two_kinds_after(
        self, postgres_store: PostgresStore, ours: Any
    ) -> None:
        """Lazy: a write opens one to write, a read one to read."""
        await ours(0)
        await postgres_store.write([record(1)])
        await ours(1)
        await postgres_store.get(log_id(1))
        await ours(2)

    async def test_many_calls_at_once_share_two_and_two(self, postgres_store: PostgresStore, ours: Any) -> None:
        """Thirty writes and thirty reads: all succeed, over at most four connections."""
        writes = [postgres_store.write([record(i)]) for i in range(30)]
        reads = [postgres_store.query(QUERY, before=None, limit=5) for _ in range(30)]
        await asyncio.gather(*writes, *reads)
        await ours(4)
        assert await postgres_store.count(CountQuery(BASE, BASE)) == 30

    async def test_idle_connections_are_closed_and_work_opens_new_ones(
        self, postgres: settings.Postgres, ours: Any
    ) -> None:
        """After ``idle_close`` by the clock, not sooner; then the store works as before."""
        clock = SteppedClock()
        store = PostgresStore(msgspec.structs.replace(postgres, idle_close=60), clock=clock)
        await asyncio.gather(*(store.write([record(i)]) for i in range(4)))
        await store.get(log_id(0))
        await ours(3)
        await clock.step(59)
        await store.get(log_id(0))
        await clock.step(2)
        await ours(1)  # the reader was in use two seconds ago
        await clock.step(60)
        await ours(0)
        assert await store.get(log_id(0)) == record(0)
        await ours(1)
        await store.close()
        await ours(0)

    async def test_waiting_for_a_connection_is_bounded_and_a_throttle(
        self, postgres: settings.Postgres, postgres_admin: asyncpg.Connection
    ) -> None:
        """Both at work on a locked table: the third caller is told to slow down."""
        store = PostgresStore(bounded(postgres, command_timeout=20), clock=SystemClock())
        async with postgres_admin.transaction():
            await postgres_admin.execute(f"LOCK TABLE {TABLE} IN SHARE MODE")
            busy = [asyncio.create_task(store.write([record(i)])) for i in range(2)]
            while await postgres_admin.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted") < 2:
                await asyncio.sleep(0.01)
            assert (await failure(store.write([record(3)]))).retry_class is RetryClass.THROTTLE
        await asyncio.gather(*busy)
        await store.close()

    async def test_close_ends_what_is_at_work(
        self, postgres: settings.Postgres, postgres_admin: asyncpg.Connection, ours: Any
    ) -> None:
        """Bounded in time whatever the server does; the caller at work hears TRANSIENT, later callers too."""
        store = PostgresStore(postgres, clock=SystemClock())
        async with postgres_admin.transaction():
            await postgres_admin.execute(f"LOCK TABLE {TABLE} IN SHARE MODE")
            busy = asyncio.create_task(store.write([record(1)]))
            while not await postgres_admin.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)
            async with asyncio.timeout(10):
                await store.close()
            assert (await failure(busy)).retry_class is RetryClass.TRANSIENT
        assert (await failure(store.ping())).retry_class is RetryClass.TRANSIENT
        await ours(0)


class TestCancelling:
    """Who gives up tells the server."""

    @pytest.mark.parametrize("how", ["timeout", "cancelled"])
    async def test_a_command_that_is_given_up_ends_at_the_server_too(
        self, postgres: settings.Postgres, postgres_admin: asyncpg.Connection, ours: Any, how: str
    ) -> None:
        """No backend waits on for a caller that left, and the next call finds the store in order."""
        seconds = {"timeout": 0.4, "cancelled": 20}[how]
        store = PostgresStore(msgspec.structs.replace(postgres, command_timeout=seconds), clock=SystemClock())
        async with postgres_admin.transaction():
            await postgres_admin.execute(f"LOCK TABLE {TABLE} IN SHARE MODE")
            writing = asyncio.create_task(store.write([record(1)]))
            if how == "cancelled":
                while not await postgres_admin.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                    await asyncio.sleep(0.01)
                writing.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await writing
            else:
                assert (await failure(writing)).retry_class is RetryClass.TRANSIENT
            async with asyncio.timeout(10):  # while the lock is still held
                while await postgres_admin.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                    await asyncio.sleep(0.01)
        assert list((await store.write([record(1)])).failures) == []
        await store.close()
        await ours(0)

    async def test_the_server_bounds_a_command_whose_caller_is_gone(
        self, postgres: settings.Postgres, postgres_admin: asyncpg.Connection
    ) -> None:
        """``statement_timeout`` a little above ours; an administrator's shorter one stands."""
        asked = "SELECT current_setting('statement_timeout')"
        for theirs, expected in (("0", "31s"), ("10s", "10s"), ("10min", "31s")):
            await postgres_admin.execute(f"ALTER DATABASE \"{postgres.database}\" SET statement_timeout = '{theirs}'")
            store = PostgresStore(postgres, clock=SystemClock())
            assert await store._writers.run(lambda link: link.connection.fetchval(asked)) == expected
            await store.close()

    async def test_a_commit_is_on_the_servers_disk_before_it_is_confirmed(
        self, postgres: settings.Postgres, postgres_admin: asyncpg.Connection
    ) -> None:
        """``synchronous_commit = off`` is raised; what is stronger than ``on`` is left alone."""
        asked = "SELECT current_setting('synchronous_commit')"
        for pooled in (False, True):
            for theirs, expected in (("off", "on"), ("remote_apply", "remote_apply"), ("local", "local")):
                await postgres_admin.execute(f'ALTER DATABASE "{postgres.database}" SET synchronous_commit = {theirs}')
                store = PostgresStore(msgspec.structs.replace(postgres, pgbouncer=pooled), clock=SystemClock())
                assert await store._writers.run(lambda link: link.connection.fetchval(asked)) == expected
                await store.close()


class TestBadNetwork:
    """Nothing waits for ever."""

    @pytest.mark.parametrize("listening", ["accepts and says nothing", "does not even accept"])
    async def test_a_black_hole_while_connecting_is_transient_in_bounded_time(
        self, postgres: settings.Postgres, listening: str
    ) -> None:
        """Every call ends by ``connect_timeout``."""
        with socket.create_server(("127.0.0.1", 0), backlog=0) as hole:
            fillers = []
            if listening == "does not even accept":  # a full backlog drops what comes
                for _ in range(4):
                    filler = socket.socket()
                    filler.setblocking(False)
                    filler.connect_ex(hole.getsockname())
                    fillers.append(filler)
            store = PostgresStore(bounded(postgres, port=hole.getsockname()[1]), clock=SystemClock())
            for work in (store.write([record(1)]), store.get(log_id(1)), store.ping()):
                assert (await failure(work)).retry_class is RetryClass.TRANSIENT
            await store.close()
            for filler in fillers:
                filler.close()

    async def test_a_black_hole_at_work_is_transient_and_closing_is_bounded(self, postgres: settings.Postgres) -> None:
        """The network dies between two commands: the call ends by ``command_timeout``, and close ends too."""
        async with Relay(postgres.port) as relay:
            store = PostgresStore(bounded(postgres, port=relay.port), clock=SystemClock())
            await store.write([record(1)])
            await store.get(log_id(1))
            relay.frozen = True
            assert (await failure(store.write([record(2)]))).retry_class is RetryClass.TRANSIENT
            async with asyncio.timeout(15):
                await store.close()

    async def test_a_network_that_returns_finds_the_store_ready(self, postgres: settings.Postgres) -> None:
        """Connections that failed are not used again."""
        async with Relay(postgres.port) as relay:
            store = PostgresStore(bounded(postgres, port=relay.port), clock=SystemClock())
            await store.write([record(1)])
            relay.frozen = True
            await failure(store.write([record(2)]))
            relay.frozen = False
            assert list((await store.write([record(2)])).failures) == []
            await store.close()
            assert relay.accepted == 2


class TestSecrets:
    """Passwords and certificates."""

    async def test_the_password_file_is_read_for_every_connection(
        self, postgres: settings.Postgres, postgres_admin: asyncpg.Connection, tmp_path: Path
    ) -> None:
        """A token that was rotated while the sidecar runs is used by the next connection, a final newline ignored."""
        await postgres_admin.execute("DROP ROLE IF EXISTS rotating; CREATE ROLE rotating LOGIN PASSWORD 'first'")
        await postgres_admin.execute(f"GRANT SELECT, INSERT ON {TABLE} TO rotating")
        file = tmp_path / "password"
        file.write_text("first\n")
        clock = SteppedClock()
        options = msgspec.structs.replace(postgres, user="rotating", password=None, password_file=str(file))
        store = PostgresStore(options, clock=clock)
        await store.ping()
        await postgres_admin.execute("ALTER ROLE rotating PASSWORD 'second'")
        await store.ping()  # the open connection goes on
        await clock.step(61)
        file.write_text("second\n")
        await store.get(log_id(1))
        await store.close()
        await postgres_admin.execute("DROP OWNED BY rotating; DROP ROLE rotating")

    @pytest.mark.parametrize("setting", ["password_file", "sslrootcert"])
    async def test_a_file_that_cannot_be_read_blocks_and_is_named(
        self, postgres: settings.Postgres, tmp_path: Path, setting: str
    ) -> None:
        """An error of configuration, not of the network."""
        missing = {setting: str(tmp_path / "missing"), "sslmode": "verify-full"}
        store = PostgresStore(msgspec.structs.replace(postgres, **missing), clock=SystemClock())
        error = await failure(store.ping())
        assert error.retry_class is RetryClass.BLOCKED
        assert f"postgres.{setting}" in error.reason

    @pytest.mark.parametrize(
        ("host", "sslmode", "expected"),
        [
            ("127.0.0.1", None, None),
            ("127.8.8.8", None, None),
            ("localhost", None, None),
            ("::1", None, None),
            ("/var/run/postgresql", None, None),
            ("db.internal", None, (True, ssl.CERT_REQUIRED)),
            ("10.0.0.7", None, (True, ssl.CERT_REQUIRED)),
            ("localhost.evil.example", None, (True, ssl.CERT_REQUIRED)),
            ("127.0.0.1.evil.example", None, (True, ssl.CERT_REQUIRED)),
            ("127.0.0.1", "verify-full", (True, ssl.CERT_REQUIRED)),
            ("db.internal", "verify-ca", (False, ssl.CERT_REQUIRED)),
            ("db.internal", "require", (False, ssl.CERT_NONE)),
            ("db.internal", "disable", None),
        ],
    )
    def test_off_this_machine_the_server_must_prove_itself(
        self, host: str, sslmode: Any, expected: tuple[bool, ssl.VerifyMode] | None
    ) -> None:
        """verify-full unless a setting says otherwise; the weaker modes mean what libpq means by them."""
        context = postgres_connections._tls(settings.Postgres(host=host, sslmode=sslmode))
        seen = (context.check_hostname, context.verify_mode) if isinstance(context, ssl.SSLContext) else None
        assert seen == expected


class TestTls:
    """A server with a certificate, played by the relay."""

    @pytest.mark.parametrize(
        ("name", "sslmode", "ours", "passes"),
        [
            ("localhost", "verify-full", True, True),
            ("localhost", "verify-full", False, False),
            ("elsewhere", "verify-full", True, False),
            ("elsewhere", "verify-ca", True, True),
            ("elsewhere", "verify-ca", False, False),
            ("elsewhere", "require", False, True),
        ],
    )
    async def test_a_certificate_is_judged_as_the_mode_says(
        self, postgres: settings.Postgres, tmp_path: Path, name: str, sslmode: Any, *, ours: bool, passes: bool
    ) -> None:
        """Signed by our authority or not, for the host's name or not: let in, or BLOCKED before any password."""
        authority = authority_file(tmp_path, "ours")
        other = authority_file(tmp_path, "other")
        served = server_context(tmp_path, authority, name)
        async with Relay(postgres.port, tls=served) as relay:
            changed = {"sslmode": sslmode, "sslrootcert": str((authority if ours else other).certificate)}
            options = msgspec.structs.replace(postgres, host="localhost", port=relay.port, **changed)
            store = PostgresStore(options, clock=SystemClock())
            if passes:
                await store.write([record(1)])
                assert await store.get(log_id(1)) == record(1)
            else:
                error = await failure(store.write([record(1)]))
                assert error.retry_class is RetryClass.BLOCKED
                assert "certificate" in error.reason
                assert relay.accepted == 0
            await store.close()


class TestTransactionPooling:
    """pgbouncer in transaction mode, by a relay that changes the server connection after every transaction."""

    @pytest.fixture
    async def pool(self, postgres: settings.Postgres) -> AsyncIterator[Relay]:
        async with Relay(postgres.port, backends=2) as relay:
            yield relay

    @pytest.fixture
    async def pooled(self, postgres: settings.Postgres, pool: Relay) -> AsyncIterator[PostgresStore]:
        options = msgspec.structs.replace(postgres, port=pool.port, user=TRUSTED, password=None, pgbouncer=True)
        store = PostgresStore(options, clock=SystemClock())
        yield store
        await store.close()

    async def test_everything_works_over_changing_servers(
        self, pooled: PostgresStore, pool: Relay, postgres_admin: asyncpg.Connection
    ) -> None:
        """Each call several times: no statement and no setting is looked for where it is not."""
        await postgres_admin.execute(f"DROP INDEX {TABLE}_time_idx")
        assert list(await pooled.create()) == [f"index {TABLE}_time_idx"]
        for round_ in range(3):
            batch = records(4, service_name=f"s{round_}")
            batch = [msgspec.structs.replace(r, log_id=log_id(10 * round_ + i)) for i, r in enumerate(batch)]
            assert list((await pooled.write(batch[:2])).failures) == []
            result = await pooled.write([*batch, record(10 * round_, user_id="other")][1:])
            assert [f.retry_class for f in result.failures] == [RetryClass.CONFLICT]
            assert list(await pooled.put_if_absent(batch)) == [False] * 4
            query = ByService(f"s{round_}", BASE, BASE + DAY)
            assert await pooled.query(query, before=None, limit=9) == batch[::-1]
            assert await pooled.get(batch[0].log_id) == batch[0]
            assert await pooled.count(CountQuery(BASE, BASE + DAY)) == 4 * (round_ + 1)
            assert len([e async for e in pooled.scan(BASE, BASE + DAY)]) == 4 * (round_ + 1)
            await pooled.ping()
            assert all(c.ok for c in await pooled.check())
        assert pool.switches > 30

    async def test_a_refused_batch_leaves_the_pooled_connection_usable(
        self, pooled: PostgresStore, pool: Relay
    ) -> None:
        """The transaction is rolled back on the server that it ran on."""
        await pooled.write([record(1)])
        bad: LogRecord = record(2, log_type="x" * 51)
        assert (await failure(pooled.write([bad]))).retry_class is RetryClass.PERMANENT
        assert list((await pooled.write([record(3)])).failures) == []
        assert pool.accepted == 1

    async def test_without_the_setting_it_is_blocked_and_says_what_to_set(
        self, postgres: settings.Postgres, pool: Relay
    ) -> None:
        """The control: prepared statements do not survive such a pool, and the reason names the remedy."""
        options = msgspec.structs.replace(postgres, port=pool.port, user=TRUSTED, password=None)
        store = PostgresStore(options, clock=SystemClock())
        reasons = []
        for number in range(6):
            try:
                await store.get(log_id(number))
            except StoreError as error:
                reasons.append((error.retry_class, "postgres.pgbouncer" in error.reason))
        await store.close()
        assert (RetryClass.BLOCKED, True) in reasons

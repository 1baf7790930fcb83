"""A few connections to PostgreSQL, opened when first needed and closed when idle.

Invariants:

* At most ``size`` connections are open or being opened.
* A connection is used again only where its conversation is known to be at rest: an error other than the server's
  plain answer, a cancellation or an open transaction ends it at once, without waiting for the far side.
* The password file is read for every new connection (IAM tokens live 15 minutes).
* With a transaction pooler (``pgbouncer``) each piece of work is one transaction and no prepared statement outlives
  it, so that its messages reach one server connection.
* No wait without a bound: connecting by ``connect_timeout``, waiting for a free connection by the same, a command by
  ``command_timeout``, closing by ``CLOSE_SECONDS``.

Every error leaves as StoreError, raised outside of the handler so that the driver's (whose text quotes values) is not
even its context.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import asyncpg

from sidecar.clock import Clock
from sidecar.errors import RetryClass, StoreError
from sidecar.phase import POSTGRES
from sidecar.settings import Postgres
from sidecar.stores.postgres_errors import spends_connection, translate

APPLICATION: Final = "hybrid-log-sidecar"
CLOSE_SECONDS: Final = 2.0
PG_EPOCH_US: Final = 946_684_800_000_000
"""2000-01-01 in microseconds since 1970: what PostgreSQL counts a timestamptz from."""

T = TypeVar("T")
Connection = asyncpg.Connection


@dataclass(frozen=True, slots=True)
class Link:
    """An open connection and what was found when it was opened."""

    connection: Connection
    copies: bool  # COPY into the table has the effect of an insert: a plain table, no trigger, rule or policy
    raise_durability: bool  # the server's default would confirm a commit before it is on its disk


class Connections:
    """Up to ``size`` connections for one kind of work.

    Args:
        options: where to and how.
        relation: the quoted table, looked at when a connection opens.
        size: upper bound.
        clock: for ``idle_close``.
    """

    def __init__(self, options: Postgres, *, relation: str, size: int, clock: Clock) -> None:
        self._options = options
        self._relation = relation
        self._clock = clock
        self._free = asyncio.Semaphore(size)
        self._idle: list[tuple[Link, float]] = []  # the longest idle first; taken from the end
        self._used: set[Link] = set()
        self._closer: asyncio.Task[None] | None = None
        self._closed = False

    async def run(self, work: Callable[[Link], Awaitable[T]]) -> T:
        """Do ``work`` with a connection of its own; in one transaction where a pooler stands between.

        Raises:
            StoreError: whatever went wrong, translated.
        """
        failure = await self._acquire()
        if failure is not None:
            raise failure
        try:
            outcome = await self._run(work)
        finally:
            self._free.release()
        if isinstance(outcome, StoreError):
            raise outcome
        return outcome

    async def close(self) -> None:
        """End all connections, those at work too; at most ``CLOSE_SECONDS`` for those at rest. Idempotent."""
        self._closed = True
        closer, self._closer = self._closer, None
        if closer is not None:
            closer.cancel()
            await asyncio.wait((closer,))
        for link in self._used:
            link.connection.terminate()
        idle, self._idle = self._idle, []
        await asyncio.gather(*(_part(link) for link, _ in idle))

    async def _acquire(self) -> StoreError | None:
        if self._closed:
            return StoreError(POSTGRES, RetryClass.TRANSIENT, "this store is closed")
        try:
            async with asyncio.timeout(self._options.connect_timeout):
                await self._free.acquire()
        except TimeoutError:
            return StoreError(POSTGRES, RetryClass.THROTTLE, "all connections of this sidecar are at work")
        return None

    async def _run(self, work: Callable[[Link], Awaitable[T]]) -> T | StoreError:
        link = self._reuse()
        if link is None:
            opened = await self._open()
            if isinstance(opened, StoreError):
                return opened
            link = opened
        self._used.add(link)
        try:
            if self._options.pgbouncer:
                async with link.connection.transaction():
                    if link.raise_durability:
                        await link.connection.execute("SET LOCAL synchronous_commit = on")
                    outcome = await work(link)
            else:
                outcome = await work(link)
        except BaseException as error:
            # Everything, a cancellation too, decides whether the connection lives on.
            self._put_back(link, spent=spends_connection(error))
            if not isinstance(error, Exception):
                raise
            return error if isinstance(error, StoreError) else translate(error)
        self._put_back(link, spent=False)
        return outcome

    def _reuse(self) -> Link | None:
        while self._idle:
            link, _ = self._idle.pop()
            if not link.connection.is_closed():
                return link
            link.connection.terminate()
        return None

    def _put_back(self, link: Link, *, spent: bool) -> None:
        self._used.discard(link)
        connection = link.connection
        if spent or self._closed or connection.is_closed() or connection.is_in_transaction():
            connection.terminate()
            return
        self._idle.append((link, self._clock.monotonic()))
        if self._closer is None or self._closer.done():
            self._closer = asyncio.create_task(self._close_idle(), name="postgres-idle-close")

    async def _close_idle(self) -> None:
        while self._idle:
            link, since = self._idle[0]
            left = since + self._options.idle_close - self._clock.monotonic()
            if left > 0:
                await self._clock.sleep(left)
                continue
            del self._idle[0]
            await _part(link)

    async def _open(self) -> Link | StoreError:
        options = self._options
        try:
            password, tls = _password(options), _tls(options)
        except (OSError, ValueError) as error:  # ssl's errors are OSErrors
            return StoreError(
                POSTGRES,
                RetryClass.BLOCKED,
                f"postgres.password_file or postgres.sslrootcert cannot be used ({type(error).__name__})",
            )
        connection: Connection | None = None
        try:
            connection = await asyncpg.connect(
                host=options.host,
                port=options.port,
                user=options.user,
                database=options.database,
                password=password,
                ssl=tls,
                timeout=options.connect_timeout,
                command_timeout=options.command_timeout,
                statement_cache_size=0 if options.pgbouncer else 100,
                max_cached_statement_lifetime=0,  # for ever: a handful of statements
                server_settings={"application_name": APPLICATION},
            )
            # A timestamptz is an int64 of microseconds on the wire: as a plain number it costs no datetime objects.
            await connection.set_builtin_type_codec(
                "timestamptz", schema="pg_catalog", codec_name="int8", format="binary"
            )
            async with connection.transaction(readonly=True):
                found = await connection.fetchrow(_PROBE, self._relation)
            weak = found is not None and found["weak"]
            if weak and not options.pgbouncer:
                await connection.execute("SET synchronous_commit = on")
            return Link(connection, found is not None and found["copies"], weak)
        except BaseException as error:
            # Everything, a cancellation too, ends the half-open connection.
            if connection is not None:
                connection.terminate()
            if not isinstance(error, Exception):
                raise
            return translate(error, connecting=True)


def unique_on_log_id(relation: str) -> str:
    """An SQL condition: the table with the oid ``relation`` (an expression) has a unique index fit for ON CONFLICT."""
    return f"""EXISTS (
        SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = {relation} AND i.indisunique AND i.indisvalid AND i.indimmediate
          AND i.indnkeyatts = 1 AND i.indpred IS NULL AND a.attname = 'log_id')"""


_PROBE: Final = f"""
SELECT current_setting('synchronous_commit') = 'off' AS weak,
       coalesce(c.relkind IN ('r', 'p')
           AND NOT row_security_active(c.oid)
           AND NOT EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = c.oid AND NOT g.tgisinternal)
           AND NOT EXISTS (SELECT FROM pg_rewrite w WHERE w.ev_class = c.oid)
           AND {unique_on_log_id("c.oid")}, false) AS copies
FROM (SELECT to_regclass($1) AS oid) t LEFT JOIN pg_class c ON c.oid = t.oid
"""


async def _part(link: Link) -> None:
    """Say goodbye, or hang up after ``CLOSE_SECONDS``."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await link.connection.close()
    except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
        pass  # the far side does not answer; nothing of ours is lost with a connection at rest
    finally:
        link.connection.terminate()


def _password(options: Postgres) -> str | None:
    if options.password_file is not None:
        return Path(options.password_file).read_text(encoding="utf-8").strip()
    return None if options.password is None else options.password.reveal()


def _tls(options: Postgres) -> ssl.SSLContext | bool:
    """What ``sslmode`` means: without one, verify-full wherever the way may leave this machine."""
    mode = options.sslmode or ("disable" if _on_this_machine(options.host) else "verify-full")
    if mode == "disable":
        return False
    context = ssl.create_default_context(cafile=options.sslrootcert)
    if mode != "verify-full":
        context.check_hostname = False
    if mode == "require":
        context.verify_mode = ssl.CERT_NONE
    return context


def _on_this_machine(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith(("/", "127."))

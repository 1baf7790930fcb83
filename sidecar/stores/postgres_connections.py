"""A few connections to PostgreSQL, opened when first needed and closed when idle.

Invariants:

* At most ``size`` connections are open or being opened, besides those that are being given up.
* A connection is used again only where its conversation is known to be at rest: an error other than the server's
  plain answer, a cancellation or an open transaction ends it. After a timeout or a cancellation the server is asked to
  cancel the command, in the background; where it does not hear that, ``statement_timeout`` ends it, so that commands
  that wait for a lock do not pile up.
* The password file is read for every new connection (IAM tokens live 15 minutes).
* With a transaction pooler (``pgbouncer``) each piece of work is one transaction and no prepared statement outlives
  it, so that its messages reach one server connection.
* A server that would confirm commits before they are on its disk (``synchronous_commit = off``) is told not to.
* No wait without a bound: connecting by ``connect_timeout``, waiting for a free connection by the same, a command by
  ``command_timeout``, closing by ``CLOSE_SECONDS``.

Every error leaves as StoreError, raised outside of the handler so that the driver's (whose text quotes values) is not
even its context.
"""

import asyncio
import ipaddress
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
from sidecar.stores.identifiers import is_plain
from sidecar.stores.postgres_errors import spends_connection, translate

APPLICATION: Final = "hybrid-log-sidecar"
CLOSE_SECONDS: Final = 2.0
_GRACE_MS: Final = 1_000  # the server's bound lies above ours: who gives up first knows why
PG_EPOCH_US: Final = 946_684_800_000_000
"""2000-01-01 in microseconds since 1970: what PostgreSQL counts a timestamptz from."""

T = TypeVar("T")
Connection = asyncpg.Connection
Fitness = Callable[[Connection], Awaitable[str | None]]


@dataclass(frozen=True, slots=True)
class Link:
    """An open connection and what was found when it was opened."""

    connection: Connection
    seen: bool  # the table was there; a connection from before it is not kept, for what it knows is nothing
    copies: bool  # COPY into the table has the effect of an insert: a plain table, no trigger, rule or policy
    unique: tuple[str, ...]  # of a partitioned table: the columns of the unique index that begins with the id's
    settings: tuple[str, ...]  # what is to be set here, ``name = value``


class Connections:
    """Up to ``size`` connections for one kind of work.

    Args:
        options: where to and how.
        relation: the quoted table, looked at when a connection opens.
        size: upper bound.
        clock: for ``idle_close``.
        fit: looks at the table of each new connection; what it returns is why nothing is done there.
    """

    def __init__(
        self, options: Postgres, *, relation: str, size: int, clock: Clock, fit: Fitness | None = None
    ) -> None:
        self._options = options
        self._fit = fit
        self._relation = relation
        self._adopt = options.adopt
        self._clock = clock
        self._free = asyncio.Semaphore(size)
        self._idle: list[tuple[Link, float]] = []  # the longest idle first; taken from the end
        self._used: set[Link] = set()
        self._partings: set[asyncio.Task[None]] = set()
        self._closer: asyncio.Task[None] | None = None
        self._closed = False

    async def run(self, work: Callable[[Link], Awaitable[T]], *, whole: bool = True) -> T:
        """Do ``work`` with a connection of its own.

        Args:
            work: what to do.
            whole: with a pooler, in one transaction; False for work that makes its own.

        Raises:
            StoreError: whatever went wrong, translated.
        """
        failure = await self._acquire()
        if failure is not None:
            raise failure
        try:
            outcome = await self._run(work, whole=whole)
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
        await asyncio.gather(*(_part(link) for link, _ in idle), *self._partings)

    async def _acquire(self) -> StoreError | None:
        if self._closed:
            return StoreError(POSTGRES, RetryClass.TRANSIENT, "this store is closed")
        try:
            async with asyncio.timeout(self._options.connect_timeout):
                await self._free.acquire()
        except TimeoutError:
            return StoreError(POSTGRES, RetryClass.THROTTLE, "all connections of this sidecar are at work")
        return None

    async def _run(self, work: Callable[[Link], Awaitable[T]], *, whole: bool) -> T | StoreError:
        link = self._reuse()
        if link is None:
            opened = await self._open()
            if isinstance(opened, StoreError):
                return opened
            link = opened
        self._used.add(link)
        try:
            if whole and self._options.pgbouncer:
                outcome = await _in_transaction(link, work)
            else:
                outcome = await work(link)
        except BaseException as error:
            # Everything, a cancellation too, decides whether the connection lives on.
            self._put_back(link, error)
            if not isinstance(error, Exception):
                raise
            return error if isinstance(error, StoreError) else translate(error)
        self._put_back(link, None)
        return outcome

    def _reuse(self) -> Link | None:
        while self._idle:
            link, _ = self._idle.pop()
            if not link.connection.is_closed():
                return link
            link.connection.terminate()
        return None

    def _put_back(self, link: Link, error: BaseException | None) -> None:
        self._used.discard(link)
        connection = link.connection
        if not connection.is_closed() and isinstance(error, (TimeoutError, asyncio.CancelledError)):
            # The driver sends the request to cancel by a connection of its own: give it a moment.
            parting = asyncio.create_task(_part(link), name="postgres-part")
            self._partings.add(parting)
            parting.add_done_callback(self._partings.discard)
        elif (
            self._closed
            or not link.seen
            or connection.is_closed()
            or connection.is_in_transaction()
            or (error is not None and spends_connection(error))
        ):
            connection.terminate()
        else:
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
            async with asyncio.timeout(options.connect_timeout):
                link = await self._look(connection)
                trouble = await self._fitness(link)
        except BaseException as error:
            # Everything, a cancellation too, ends the half-open connection.
            if connection is not None:
                connection.terminate()
            if not isinstance(error, Exception):
                raise
            return translate(error, connecting=True)
        if trouble is None:
            return link
        connection.terminate()
        return StoreError(POSTGRES, RetryClass.BLOCKED, trouble)

    async def _fitness(self, link: Link) -> str | None:
        fit = self._fit
        if fit is None:
            return None

        async def ask(link: Link) -> str | None:
            return await fit(link.connection)

        return await (_in_transaction(link, ask) if self._options.pgbouncer else ask(link))

    async def _look(self, connection: Connection) -> Link:
        """Make a fresh connection ready, and see what the table is like."""
        # A timestamptz is an int64 of microseconds on the wire: as a plain number it costs no datetime objects.
        await connection.set_builtin_type_codec("timestamptz", schema="pg_catalog", codec_name="int8", format="binary")
        if self._adopt.enabled and self._adopt.assume_zone is not None:  # the same int64, of times without a zone
            await connection.set_builtin_type_codec(
                "timestamp", schema="pg_catalog", codec_name="int8", format="binary"
            )
        longest = int(self._options.command_timeout * 1000) + _GRACE_MS
        id_column = self._adopt.log_id if self._adopt.enabled else "log_id"

        async def look(link: Link) -> asyncpg.Record | None:
            return await link.connection.fetchrow(_PROBE, self._relation, longest, id_column, self._adopt.enabled)

        link = Link(connection, seen=False, copies=False, unique=(), settings=())
        found = await (_in_transaction(link, look) if self._options.pgbouncer else look(link))
        if found is None:
            return link
        wanted = []
        if found["weak"]:
            wanted.append("synchronous_commit = on")
        if found["patient"]:
            wanted.append(f"statement_timeout = {longest}")
        if wanted and not self._options.pgbouncer:
            await connection.execute("; ".join(f"SET {each}" for each in wanted))
        unique = tuple(found["unique_columns"] or ())
        if not all(map(is_plain, unique)):
            unique = ()  # a name that is not ours to write into a statement
        return Link(connection, found["seen"], found["copies"], unique, tuple(wanted))


async def _in_transaction(link: Link, work: Callable[[Link], Awaitable[T]]) -> T:
    """One transaction; where it fails in any way but the server's answer, its end is the connection's."""
    transaction = link.connection.transaction()
    await transaction.start()
    if link.settings:
        await link.connection.execute("; ".join(f"SET LOCAL {each}" for each in link.settings))
    try:
        outcome = await work(link)
    except asyncpg.PostgresError as error:
        if not spends_connection(error) and not link.connection.is_closed():
            await transaction.rollback()
        raise
    await transaction.commit()
    return outcome


def unique_on(relation: str, column: str, adopted: str = "false") -> str:
    """An SQL condition: the table with this oid has a unique index on this column, fit for ON CONFLICT.

    All are expressions. An adopted table's index may leave out the rows without an id.
    """
    return f"""EXISTS (
        SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = {relation} AND i.indisunique AND i.indisvalid AND i.indimmediate
          AND i.indnkeyatts = 1 AND a.attname = {column} AND (i.indpred IS NULL
              OR {adopted} AND pg_get_expr(i.indpred, i.indrelid) = format('(%I IS NOT NULL)', a.attname)))"""


_PROBE: Final = f"""
SELECT current_setting('synchronous_commit') = 'off' AS weak,
       (SELECT setting::bigint NOT BETWEEN 1 AND $2 FROM pg_settings WHERE name = 'statement_timeout') AS patient,
       c.oid IS NOT NULL AS seen,
       coalesce(c.relkind IN ('r', 'p')
           AND NOT row_security_active(c.oid)
           AND NOT EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = c.oid AND NOT g.tgisinternal)
           AND NOT EXISTS (SELECT FROM pg_rewrite w WHERE w.ev_class = c.oid)
           AND {unique_on("c.oid", "$3", "$4::boolean")}, false) AS copies,
       (SELECT array(
            SELECT a.attname::text FROM unnest(i.indkey::int2[]) WITH ORDINALITY k(number, place)
            JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number ORDER BY k.place)
        FROM pg_index i JOIN pg_attribute f ON f.attrelid = i.indrelid AND f.attnum = i.indkey[0]
        WHERE i.indrelid = c.oid AND c.relkind = 'p' AND f.attname = $3 AND i.indnkeyatts > 1
          AND i.indisunique AND i.indisvalid AND i.indimmediate
        ORDER BY i.indexrelid LIMIT 1) AS unique_columns
FROM (SELECT to_regclass($1) AS oid) t LEFT JOIN pg_class c ON c.oid = t.oid
"""


async def _part(link: Link) -> None:
    """Say goodbye, or hang up after ``CLOSE_SECONDS``."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await link.connection.close()
    except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
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
    if host == "localhost" or host.startswith("/"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, which may lead anywhere

"""A real PostgreSQL for the tests: one server for the whole run, a database of its own for every test that asks.

The server is the product's own ``EmbeddedPostgres``. It belongs to no event loop, so a session fixture may start it
with ``asyncio.run`` while every test has a loop of its own. fsync is off here: what is tested against this server is
the sidecar, whose own durability rests on its spool.
"""

import asyncio
import itertools
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Final

import asyncpg
import pytest

from sidecar import settings
from sidecar.clock import SystemClock
from sidecar.embedded.postgres import EmbeddedPostgres
from sidecar.stores.postgres import PostgresStore

_OPTIONS: Final = {
    "max_connections": "40",
    "shared_buffers": "32MB",
    "fsync": "off",
    "full_page_writes": "off",
    "deadlock_timeout": "100ms",
    "max_prepared_transactions": "4",
}
TRUSTED: Final = "trusted"
"""A role of the server that needs no password."""
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres_directory() -> Iterator[Path]:
    """A directory that the account ``nobody`` can reach, unlike pytest's own."""
    directory = Path(tempfile.mkdtemp(prefix="sidecar-pg-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def postgres_server(postgres_directory: Path) -> Iterator[EmbeddedPostgres]:
    """One running server for the whole run."""
    server = EmbeddedPostgres(postgres_directory / "server", options=_OPTIONS)
    asyncio.run(server.start())
    asyncio.run(_trust(server))
    yield server
    asyncio.run(server.stop())


async def _trust(server: EmbeddedPostgres) -> None:
    """A superuser that needs no password: a relay that pools connections cannot repeat a client's log-in."""
    rules = server.directory / "pgdata" / "pg_hba.conf"
    rules.write_text(f"host all {TRUSTED} 127.0.0.1/32 trust\n{rules.read_text()}")
    admin = await connect(server.settings())
    try:
        await admin.execute(f"CREATE ROLE {TRUSTED} SUPERUSER LOGIN")
        await admin.execute("SELECT pg_reload_conf()")
    finally:
        await admin.close()


async def connect(options: settings.Postgres) -> "asyncpg.Connection":
    """A connection beside the store: for looking at what it did, and for doing harm."""
    return await asyncpg.connect(
        host=options.host,
        port=options.port,
        user=options.user,
        password=options.password.reveal() if options.password else None,
        database=options.database,
        ssl=False,
        timeout=10,
        command_timeout=30,
    )


@pytest.fixture
async def postgres_empty(postgres_server: EmbeddedPostgres) -> AsyncIterator[settings.Postgres]:
    """Settings of a fresh database without any table."""
    name = f"test_{next(_numbers)}"
    admin = await connect(postgres_server.settings())
    try:
        # Copying the template file by file is the fast way for a database this small.
        await admin.execute(f'CREATE DATABASE "{name}" STRATEGY = file_copy')
        yield postgres_server.settings(name)
        await admin.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
    finally:
        await admin.close()


@pytest.fixture
async def postgres(postgres_empty: settings.Postgres) -> settings.Postgres:
    """Settings of a fresh database with the created table."""
    store = PostgresStore(postgres_empty, clock=SystemClock())
    await store.create()
    await store.close()
    return postgres_empty


@pytest.fixture
async def postgres_store(postgres: settings.Postgres) -> AsyncIterator[PostgresStore]:
    """A store on a fresh database with the created table."""
    store = PostgresStore(postgres, clock=SystemClock())
    yield store
    await store.close()


@pytest.fixture
async def postgres_admin(postgres: settings.Postgres) -> AsyncIterator["asyncpg.Connection"]:
    """A superuser's connection to the database of ``postgres``."""
    connection = await connect(postgres)
    yield connection
    await connection.close(timeout=5)

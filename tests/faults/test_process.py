"""F20 to F25: the clock jumps, memory and descriptors run out, clients are hostile, signals come, a twin appears."""

import asyncio
import contextlib
import gzip
import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.client import Client
from tests.faults.process import ended, launch, start, tool
from tests.faults.test_stores import heal, refuse, until_retried
from tests.faults.verdict import drained, felt, guilty, judge, require
from tests.parts.sidecar import Sidecar, eventually, free_port
from tests.parts.tcp_proxy import reset

LIBFAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
JUMPS = {"-2 d": "-2d", "+10 y": "+3650d", "1970": "@1970-01-02 00:00:00"}
EPOCH = {"log_timestamp": "1970-01-01T00:00:00.000000Z"}


async def clock_jump(row, stand, jump: str, without: str = "") -> None:
    """The wall clock jumps while a store is down and retries are waited for, and back."""
    assert Path(LIBFAKETIME).exists(), "faketime is missing; .ci/run installs it"
    step = stand.base / "faketime"
    step.write_text("+0\n")
    environ = {
        "LD_PRELOAD": LIBFAKETIME,
        "FAKETIME_TIMESTAMP_FILE": str(step),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_NO_CACHE": "1",
    }
    # Long pauses between two tries, so that a jump falls into one of them and not into a try.
    sidecar = stand.sidecar(phase="dual_write_read_dynamo", retry={"delay": "1s", "max_delay": "2s"})
    client = Client(row, sidecar.url)
    await start(sidecar, without=without, environ=environ)
    async with client.session() as session:
        first = client.records(5, **EPOCH)
        assert await client.send(session, first) == 202
        await refuse(stand, "postgres")
        for to in (jump, "+0"):
            row.note("clock", to=to)
            assert await client.send(session, client.records(20, **EPOCH)) == 202
            await until_retried(sidecar, "postgres")
            step.write_text(f"{to}\n")
            assert await client.send(session, client.records(20, **EPOCH)) == 202
            async with session.post(f"{sidecar.url}/logs", json=first) as answer:
                again = await answer.json()
            require("forgot", again["duplicates"] != list(range(5)) and again, "a resend within the window is known")
            await heal(stand)
            await drained(sidecar, 20)
            await refuse(stand, "postgres")
        await heal(stand)
    await judge(client.history, stand, sidecar)
    client.history.close()


@pytest.mark.root
@pytest.mark.parametrize("jump", JUMPS)
async def test_f20_a_jump_of_the_wall_clock_changes_no_retry_and_no_window(begin, stand, jump):
    """F20: retries go on at their pace, resends are recognised, everything arrives; and back again."""
    await clock_jump(begin("F20"), stand, JUMPS[jump])


@pytest.mark.root
async def test_f20_control_intervals_by_the_wall_clock_are_found_guilty(begin, stand):
    """The control: after a jump back, what waits for a time waits for two days."""
    with guilty("stuck", "forgot"):
        await clock_jump(begin("F20"), stand, "-2d", "wall_clock_intervals")


@contextlib.contextmanager
def memory_limit(size: int):
    """A memory cgroup; yields its directory."""
    group = Path(f"/sys/fs/cgroup/memory/sidecar-{os.getpid()}")
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(size))
        yield group
    finally:

        def gone() -> bool:
            try:
                group.rmdir()
            except OSError:
                return False
            return True

        end = time.monotonic() + 10
        while not gone() and time.monotonic() < end:
            time.sleep(0.05)


async def backlog(row, stand, records: int, cache: int, size: int) -> None:
    """PostgreSQL down, a backlog larger than the memory allowed (128 MiB), then up."""
    sidecar = stand.sidecar(phase="sql_only", spool={"tail_cache_bytes": cache})
    client = Client(row, sidecar.url, size=size)
    with memory_limit(128 << 20) as group, contextlib.closing(sidecar):
        await refuse(stand, "postgres")
        words = [tool("sh"), "-c", f'echo $$ > {group}/tasks && exec "$@"', "sh"]
        await start(sidecar, under=words)
        async with client.session() as session:
            for _ in range(records // 1000):
                status = await client.send(session, client.records(1000))
                if status is None:
                    break
        row.note("memory", peak=int((group / "memory.max_usage_in_bytes").read_text()))
        await heal(stand)
        with contextlib.suppress(OSError):  # killed meanwhile
            await drained(sidecar)
        killed = sidecar.process.poll()
        if killed is not None:
            assert killed == -signal.SIGKILL
            await start(sidecar)  # outside: what the kernel killed has lost nothing
            await drained(sidecar)
        await judge(client.history, stand, sidecar)
        client.history.close()
    require("killed", killed, "by the kernel, for its memory")


@pytest.mark.root
async def test_f21_a_backlog_larger_than_memory_stays_on_disk(begin, stand):
    """F21: 128 MiB, PostgreSQL down, 200,000 records of 0.5 to 1.5 KB: never killed, all delivered afterwards."""
    row = begin("F21")
    await backlog(row, stand, 1000 * row.rounds, 8 << 20, 1_000)


@pytest.mark.root
async def test_f21_control_a_backlog_in_memory_is_killed_and_still_loses_nothing(begin, stand):
    """The control: a cache without a bound is killed for its memory; what was acknowledged is delivered."""
    row = begin("F21")
    with guilty("killed"):
        await backlog(row, stand, 60_000, 1 << 30, 4_000)


@contextlib.asynccontextmanager
async def crowd(port: int, size: int):
    """So many connections that say nothing."""
    writers = []
    try:
        with contextlib.suppress(OSError):  # the sidecar is full, or gone
            for _ in range(size):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writers.append(writer)
        yield
    finally:
        for writer in writers:
            reset(writer.transport)
        await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


BOMB = gzip.compress(b"[" * (64 << 20), 9)
HOSTILE = (
    b"POST /logs HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s"
    % (len(BOMB), BOMB),
    b"POST /logs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 400000\r\n\r\n" + b"[" * 400_000,
    b"POST /logs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n",
    b"POST /logs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + b"ffffff\r\n" + b"x" * 100_000,
    b"GET /logs/x HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50,
    b"\x16\x03\x01" * 1000,
)


async def hostile(row, stand, ingest: dict, without: str = "") -> None:
    """Idle, slow, huge, deep and bombing clients, and beside them one that only wants to log."""
    sidecar = stand.sidecar(phase="dual_write_read_dynamo", ingest=ingest, listen={"max_connections": 1_100})
    await start(sidecar, without=without)
    async with Client(row, sidecar.url, workers=1, pause=0.01) as client:
        await client.acked(20)
        status = Path(f"/proc/{sidecar.process.pid}/status")

        def peak() -> int:
            return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")))

        before = peak()

        async def attack(data: bytes) -> None:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.app_port)
                try:
                    writer.write(data)
                    await asyncio.wait_for(reader.read(200), 5)
                except TimeoutError:
                    pass
                finally:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()

        answered = client.history.statuses[202]
        async with crowd(sidecar.app_port, 1_000):
            for _ in range(3):
                await asyncio.gather(*(attack(data) for data in HOSTILE for _ in range(4)))
            await client.acked(100)
        grown = (peak() - before) // 1024
        row.note("hostile", grown_mib=grown)
        require("memory", grown > 100 and grown, "MiB more than before")
        require("refused", {s: n for s, n in client.history.statuses.items() if s != 202}, "the honest client was told")
        require("refused", client.history.broken, "requests of the honest client broke")
        assert client.history.statuses[202] > answered + 10
        await client.stop()
        await drained(sidecar)
        await felt(sidecar, "http_requests_total", 'status="413"')
        await judge(client.history, stand, sidecar)


async def test_f22_hostile_clients_cost_bounded_memory_and_nobody_elses_records(begin, stand):
    """F22: 1,000 idle, and slow, huge, deep, pipelined and bombing ones: less than 100 MiB, the honest one sees 202."""
    await hostile(begin("F22"), stand, {})


async def test_f22_control_bodies_without_a_bound_are_found_guilty(begin, stand):
    """The control: without the budget for all bodies together and with a limit of 512 MiB the bombs take memory."""
    with guilty("memory"):
        await hostile(begin("F22"), stand, {"max_body_bytes": "512MiB"}, "no_budget")


async def signals(row, stand, rounds: int, without: str = "") -> None:
    """SIGTERM under load with a store down; again; SIGKILL when the grace time is over."""
    sidecar = stand.sidecar(
        phase="dual_write_read_dynamo", drain={"timeout": "600ms", "stop_accepting_before": "200ms"}
    )
    async with Client(row, sidecar.url, workers=2) as client:
        for n in range(rounds):
            await start(sidecar, without=without)
            await refuse(stand, row.rng.choice(("postgres", "dynamodb")))
            await client.acked(20)
            how = ("once", "twice", "killed")[n % 3]
            row.note("SIGTERM", how=how)
            sidecar.terminate()
            if how == "twice":
                await asyncio.sleep(row.rng.uniform(0, 0.3))
                with contextlib.suppress(ProcessLookupError):
                    sidecar.terminate()
            if how == "killed":
                await asyncio.sleep(row.rng.uniform(0, 0.8))
                sidecar.kill()
            else:
                code = await ended(sidecar)
                require("exit", code, "a graceful stop has exit code 0")
            await heal(stand)
        await client.stop()
        await start(sidecar)
        await drained(sidecar)
        await judge(client.history, stand, sidecar)


async def test_f23_sigterm_with_a_store_down_twice_or_followed_by_sigkill_loses_nothing(begin, stand):
    """F23: exit code 0 in time, or killed: what was acknowledged is on disk and delivered later."""
    row = begin("F23")
    await signals(row, stand, row.rounds)


async def test_f23_control_a_stop_that_clears_its_directory_is_found_guilty(begin, stand):
    """The control: files are deleted on the way out."""
    with guilty("lost"):
        await signals(begin("F23"), stand, 1, "forgets_at_exit")


async def twins(row, stand, without: str = "") -> None:
    """A second sidecar is started on the spool of a running one."""
    one = stand.sidecar(phase="dual_write_read_dynamo")
    two = Sidecar(
        stand.base / "two",
        {**one.settings, "listen": {"app": f"127.0.0.1:{free_port()}", "ops": f"127.0.0.1:{free_port()}"}},
    )
    stand.made.append(two)
    async with Client(row, one.url, workers=2) as client:
        await start(one, without=without)
        for _ in range(row.rounds):
            await client.acked(20)
            launch(two, without=without)

            def served() -> bool:
                return '"ready"' in two.tail() or two.process.poll() is not None

            await eventually(served, seconds=60, what="the second one")
            require("two", two.process.poll() != 3, f"the second must end with exit code 3: {two.process.poll()}")
            assert "in use by another sidecar" in two.tail()
        await client.acked(20)
        await client.stop()
        await drained(one)
        await judge(client.history, stand, one)


async def test_f24_a_second_sidecar_on_one_spool_is_refused(begin, stand):
    """F24: exit code 3 with one line; the first goes on."""
    await twins(begin("F24"), stand)


async def test_f24_control_without_locks_two_run_on_one_spool(begin, stand):
    """The control: no lock, and the second one starts."""
    with guilty("two"):
        await twins(begin("F24"), stand, "no_lock")


async def few_descriptors(row, stand, without: str = "") -> None:
    """64 descriptors, and more clients than that."""
    sidecar = stand.sidecar(phase="dual_write_read_dynamo")
    async with Client(row, sidecar.url, workers=2, pause=0.01) as client:
        await start(sidecar, without=without, under=[tool("prlimit"), "--nofile=64"])
        for _ in range(row.rounds):
            await client.acked(20)
            await refuse(stand, "postgres")  # its connections cannot be opened again
            await until_retried(sidecar, "postgres")
            async with crowd(sidecar.app_port, 120):
                fds = Path(f"/proc/{sidecar.process.pid}/fd")

                def exhausted(fds=fds) -> bool:
                    return sidecar.process.poll() is not None or len(list(fds.iterdir())) >= 63

                await eventually(exhausted, what="no descriptor left")
                await stand.sql.normal()
                await asyncio.sleep(0.5)
                require("stopped", sidecar.process.poll(), "no descriptor left is no reason to stop")
        await client.acked(20)
        await client.stop()
        await drained(sidecar)
        await judge(client.history, stand, sidecar)


async def test_f25_without_descriptors_it_waits_and_recovers_by_itself(begin, stand):
    """F25: clients that have a connection are served; when the crowd has gone all is delivered, without a restart."""
    await few_descriptors(begin("F25"), stand)


async def test_f25_control_a_commit_that_needs_a_descriptor_is_found_guilty(begin, stand):
    """The control: a spool that opens a file for each commit stops."""
    with guilty("stopped"):
        await few_descriptors(begin("F25"), stand, "opens_a_file_per_commit")

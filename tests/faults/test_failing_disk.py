"""F7 to F10: a disk that answers with errors, writes wrong, hangs, or may not be written."""

import asyncio
import os
import shutil
import time

import pytest

from tests.faults import disk as disks
from tests.faults.client import Client
from tests.faults.disk import spool_on
from tests.faults.process import command, ended, injected, launch, start, tool
from tests.faults.verdict import guilty, judge, require
from tests.parts.sidecar import eventually

pytestmark = pytest.mark.root

FAILS = (
    # call, error, among the first so many, whether it must stop the sidecar
    ("fdatasync", "EIO", 20, True),
    ("pwrite64", "EIO", 60, True),
    ("pread64", "EIO", 20, True),
    ("fdatasync", "ENOSPC", 20, True),  # a flush that failed is a failed flush, whatever its reason
    ("pwrite64", "ENOSPC", 60, False),  # a full disk is no failure
)


async def error_rounds(row, stand, rounds: int, without: str = "") -> None:
    """The k-th call of one kind fails, once or from then on; EIO stops the sidecar, a full disk does not."""
    sidecar = stand.sidecar(spool={"checkpoint_bytes": 262_144, "tail_cache_bytes": 0}, phase="dual_write_read_dynamo")
    files = [sidecar.spool / name for name in ("spool.db", "spool.db-wal")]
    position = sidecar.spool / "position"
    trace = stand.base / "trace"
    hits = 0
    async with Client(row, sidecar.url, size=4_000) as client:
        for n in range(rounds):
            call, errno, most, stops = FAILS[n % len(FAILS)]
            first = row.rng.randint(1, most)
            again = row.rng.choice(("", "+" if stops else f"..{first + 5}"))  # a full disk gets room again
            rule = f"{call}:error={errno}:when={first}{again}"
            if without:  # what must cost records whatever is drawn: each flush fails but for the first ones
                call, errno, stops, rule = "fdatasync", "EIO", True, "fdatasync:error=EIO:when=8+"
            row.note("failing call", rule=rule)
            async with injected(
                sidecar, [*files, position] if stops else files, rule, trace=trace, without=without
            ) as ready:
                before = len(client.history.acked)

                def over(before=before, full=not stops) -> bool:
                    if sidecar.process.poll() is not None or len(client.history.acked) > before + 300:
                        return True
                    return full and "INJECTED" in trace.read_text()

                if ready:
                    await eventually(over, seconds=30, what=f"the end of {rule}")
                hit = "INJECTED" in trace.read_text()
                hits += hit
                if hit and stops and not without:
                    code = await ended(sidecar, 10)
                    require("serves on", code != 4, f"{rule} must stop the sidecar with exit code 4, not {code}")
                if ready and not stops and not without:
                    await client.acked(20)
                    require("stopped", sidecar.process.poll(), f"{rule} is no reason to stop")
        await client.stop()
        await start(sidecar)
        await sidecar.drained(60)
        assert hits >= rounds // 2, f"only {hits} of {rounds} faults were injected"
        await judge(client.history, stand, sidecar)


async def test_f7_a_failing_call_stops_the_sidecar_and_loses_nothing(begin, stand):
    """F7: EIO of write, fsync or read: exit code 4, nothing more acknowledged; ENOSPC: it goes on; all recovered."""
    row = begin("F7")
    await error_rounds(row, stand, row.rounds)


async def test_f7_control_ignored_errors_are_found_guilty(begin, stand):
    """The control: a commit that failed is answered as if it had not."""
    row = begin("F7")
    with guilty("lost"):
        await error_rounds(row, stand, 2, "ignored_errors")


async def outgrown(row, stand, base, without: str = "") -> None:
    """The file system believes in room that its device does not have: write-back fails, and fsync says so once."""
    await command("mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", base)
    try:
        with disks.made(base, 64 * disks.MIB) as disk:
            await stand.sql.refuse()
            sidecar = stand.sidecar(spool=spool_on(disk), phase="dual_write_read_dynamo")
            async with Client(row, sidecar.url, size=20_000) as client:
                await start(sidecar, without=without)
                if without:
                    await client.acked(2_000)
                    sidecar.kill()
                else:
                    code = await ended(sidecar, 60)
                    require(
                        "serves on", code != 4, f"a failed fsync must stop the sidecar with exit code 4, not {code}"
                    )
                await client.stop()
                await asyncio.to_thread(disk.unmount)
                await command("mount", "-o", "remount,size=128m", base)
                await asyncio.to_thread(disk.mount)
                await stand.sql.normal()
                await start(sidecar)
                await sidecar.drained(60)
                await judge(client.history, stand, sidecar)
    finally:
        await command("umount", "--lazy", base)


async def test_f8_a_disk_that_fails_on_write_back_stops_the_sidecar_and_loses_nothing(begin, stand, tmp_path):
    """F8: a real EIO of fsync: exit code 4; on a mended device everything acknowledged is there."""
    row = begin("F8")
    (tmp_path / "short").mkdir()
    await outgrown(row, stand, tmp_path / "short")


async def test_f8_control_a_failed_fsync_that_is_ignored_is_found_guilty(begin, stand, tmp_path):
    """The control: the kernel reports the failure once; who goes on after it has lost what it acknowledged."""
    row = begin("F8")
    (tmp_path / "short").mkdir()
    with guilty("lost"):
        await outgrown(row, stand, tmp_path / "short", "ignored_errors")


async def slow_flushes(row, stand, seconds: float, when: str, without: str = "") -> None:
    """No answer comes before its flush returned; health answers meanwhile; all arrives."""
    sidecar = stand.sidecar(phase="dual_write_read_dynamo")
    files = [sidecar.spool / name for name in ("spool.db", "spool.db-wal")]
    rule = f"fdatasync:delay_exit={int(seconds * 1e6)}:when={when}"
    row.note("slow flush", rule=rule)
    workers = 4
    async with (
        injected(sidecar, files, rule, trace=stand.base / "trace", without=without) as ready,
        Client(row, sidecar.url, workers=workers, batch=1, patience=120) as client,
    ):
        assert ready
        if when == "5+":
            began, answers = time.monotonic(), client.history.statuses[202]
            await client.acked(3 * workers, 60)
            while time.monotonic() < began + 2 * seconds:
                assert (await sidecar.metrics())["sidecar_spool_capacity_bytes"]
                await asyncio.sleep(0.05)
            possible = workers * ((time.monotonic() - began) / seconds + 1)
            given = client.history.statuses[202] - answers
            require("early", given > possible and given, f"answers, where flushes allow {possible:.0f}")
        else:
            await client.acked(200, 120)
        await client.stop()
        await sidecar.drained(60)
        await judge(client.history, stand, sidecar)


@pytest.mark.parametrize(("seconds", "when"), [(0.01, "5+"), (1.0, "5+"), (30.0, "20")], ids=["10 ms", "1 s", "hang"])
async def test_f9_a_slow_disk_delays_answers_and_nothing_else(begin, stand, seconds, when):
    """F9: every flush 10 ms or 1 s late, or one that hangs: no 2xx ahead of it, metrics answer, nothing is lost."""
    await slow_flushes(begin("F9"), stand, seconds, when)


async def test_f9_control_an_answer_that_does_not_wait_for_the_flush_is_found_guilty(begin, stand):
    """The control: answers come faster than flushes return."""
    with guilty("early"):
        await slow_flushes(begin("F9"), stand, 1.0, "5+", "ack_before_commit")


async def turned_read_only(row, stand, disk, without: str = "") -> None:
    """The file system goes read-only, as ext4 does by itself after an error."""
    sidecar = stand.sidecar(spool=spool_on(disk), phase="dual_write_read_dynamo")
    async with Client(row, sidecar.url) as client:
        await start(sidecar, without=without)
        await client.acked(100)
        row.note("read-only")
        client.history.counting = bool(without)
        await command("mount", "-o", "remount,abort", disk.point)
        if without:
            await client.acked(100)
            sidecar.kill()
        else:
            code = await ended(sidecar, 10)
            require(
                "serves on", code != 4, f"a read-only file system must stop the sidecar with exit code 4, not {code}"
            )
        await disk.power_on()
        client.history.counting = True
        await start(sidecar)
        await client.acked(10)
        await client.stop()
        await sidecar.drained(60)
        await judge(client.history, stand, sidecar)


async def test_f10_a_file_system_that_turns_read_only_stops_the_sidecar(begin, stand, disk):
    """F10: exit code 4; mounted again, everything acknowledged before is there."""
    await turned_read_only(begin("F10"), stand, disk)


async def test_f10_control_going_on_without_a_disk_is_found_guilty(begin, stand, disk):
    """The control: commits that fail are answered as done."""
    with guilty("lost"):
        await turned_read_only(begin("F10"), stand, disk, "ignored_errors")


async def test_f10_a_directory_of_somebody_else_is_refused_with_one_line(begin, stand):
    """F10: wrong owner: exit code 3; with the owner mended it starts, and where directory and parents are missing."""
    begin("F10")
    sidecar = stand.sidecar(spool={"directory": str(stand.base / "not" / "there")})
    spool = stand.base / "not" / "there"
    powerless = [tool("setpriv"), "--inh-caps=-all", "--bounding-set=-all"]  # root without the right to everything
    spool.mkdir(parents=True, mode=0o700)
    os.chown(spool, 65534, 65534)
    launch(sidecar, under=powerless)
    assert await ended(sidecar) == 3
    refusal = sidecar.tail().splitlines()[-1]
    assert refusal.startswith("sidecar: spool.directory: "), refusal
    assert "Traceback" not in sidecar.tail()
    os.chown(spool, 0, 0)
    await start(sidecar, under=powerless)
    sidecar.kill()
    shutil.rmtree(spool.parent)
    await start(sidecar, under=powerless)
    assert spool.stat().st_mode & 0o777 == 0o700

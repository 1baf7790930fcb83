"""F3, F4: the power goes: unsynced pages are lost, the journal is replayed; ext4's shutdown ioctl on a loop device."""

import asyncio
import re
import shutil
from pathlib import Path

import pytest

from tests.faults.client import Client
from tests.faults.disk import spool_on
from tests.faults.process import ended, launch, start, tool
from tests.faults.verdict import drained, guilty, judge, require
from tests.parts.sidecar import eventually

pytestmark = pytest.mark.root


async def cut_rounds(row, stand, disk, rounds: int, without: str = "") -> None:
    """Cut while ingesting and draining, power on, start on what is left; at the end everything is judged."""
    sidecar = stand.sidecar(spool=spool_on(disk, checkpoint_bytes=262_144), phase="dual_write_read_dynamo")
    async with Client(row, sidecar.url) as client:
        for n in range(rounds):
            client.history.counting = True
            await start(sidecar, without=without)
            await client.acked(20)
            await asyncio.sleep(row.rng.uniform(0, 0.2))
            row.note("power cut", n=n)
            client.history.counting = False  # no await from here to the cut: what was not read yet was not promised
            disk.cut()
            if n % 3 == 0 and not without:
                require("serves on", await ended(sidecar, 10) != 4, "a disk that fails must stop the sidecar, exit 4")
            else:
                sidecar.kill()
            await disk.power_on()
        await client.stop()
        await start(sidecar)
        await sidecar.drained(60)
        await judge(client.history, stand, sidecar)


async def test_f3_a_power_cut_loses_nothing_that_was_acknowledged(begin, stand, disk):
    """F3: what the client had read before the cut is in both stores, once; others in both or none."""
    row = begin("F3")
    await cut_rounds(row, stand, disk, row.rounds)


async def test_f3_control_without_fsync_records_are_lost(begin, stand, disk):
    """The control: synchronous=OFF, and the same test finds losses."""
    row = begin("F3")
    with guilty("lost"):
        await cut_rounds(row, stand, disk, 4, "synchronous_off")


async def until(row, sidecar, spool: Path, moment: str, without: str) -> None:
    """Start the sidecar and await the moment in its life."""
    repaired = len(list(spool.glob("quarantine-*/spool.db")))
    if moment in {"checkpoint", "shutdown"}:
        await start(sidecar, without=without)
    else:
        if moment == "rebuild":
            (spool / "repair").touch()
        elif moment == "recovery":
            (spool / "spool.db-wal.kept").unlink()  # a start names the log a second time before it opens it
        launch(sidecar, without=without)
    match moment:
        case "first start":
            await eventually((spool / "lock").exists, seconds=60, every=0.001)
            await asyncio.sleep(row.rng.uniform(0, 0.05))
        case "checkpoint":
            size = (spool / "spool.db").stat().st_size
            await eventually(lambda: (spool / "spool.db").stat().st_size > size, seconds=60, every=0.001)
        case "recovery":
            await eventually((spool / "spool.db-wal.kept").exists, seconds=60, every=0.001)
            await asyncio.sleep(row.rng.uniform(0, 0.05))
        case "rebuild":

            def rebuilding() -> bool:
                aside = len(list(spool.glob("quarantine-*/spool.db")))
                return (spool / "spool.db.rebuilt").exists() or aside > repaired

            await eventually(rebuilding, seconds=60, every=0.001)
            await asyncio.sleep(row.rng.uniform(0, 0.02))
        case "shutdown":
            stops = sidecar.log.read_text().count('"stopping"')
            sidecar.terminate()
            await eventually(lambda: sidecar.log.read_text().count('"stopping"') > stops, every=0.001)
            await asyncio.sleep(row.rng.uniform(0, 1.2))


async def at_moment(row, stand, disk, moment: str, *, rounds: int, without: str = "") -> None:
    """Power cuts at a moment of the spool's life; acknowledged before and after each, everything is judged."""
    sidecar = stand.sidecar(spool=spool_on(disk, checkpoint_bytes=262_144), phase="dual_write_read_dynamo")
    spool = disk.point / "spool"
    async with Client(row, sidecar.url) as client:
        for n in range(rounds):
            if moment != "first start":  # something is in the files
                await start(sidecar, without=without)
                await client.acked(50)
                sidecar.kill()
            elif n:
                shutil.rmtree(spool)
            await until(row, sidecar, spool, moment, without)
            row.note("power cut", moment=moment, n=n)
            client.history.counting = False
            disk.cut()
            sidecar.kill()
            await disk.power_on()
            client.history.counting = True
            await start(sidecar)
            await client.acked(10)
            await client.stop()
            await drained(sidecar, 60)
            if n < rounds - 1:
                sidecar.kill()
                client.go()
        # Files that were made anew know only of their own records.
        await judge(client.history, stand, sidecar if moment != "first start" or rounds == 1 else None)


@pytest.mark.parametrize("moment", ["first start", "checkpoint", "recovery", "rebuild", "shutdown"])
async def test_f4_a_power_cut_at_a_chosen_moment_loses_nothing(begin, stand, disk, moment):
    """F4: while files are made, while the log is copied, in a start after a kill, while it is rebuilt, or stops."""
    row = begin("F4")
    await at_moment(row, stand, disk, moment, rounds=row.rounds)


async def test_f4_control_a_power_cut_at_a_checkpoint_without_fsync_is_found_guilty(begin, stand, disk):
    """The control: the log is copied without a flush between, the file is found short of what was acknowledged."""
    row = begin("F4")
    with guilty("lost", "half"):
        await at_moment(row, stand, disk, "checkpoint", rounds=1, without="synchronous_off")


CREATED = re.compile(r'openat\(.*"(?P<path>[^"]+)", [A-Z_|]*O_CREAT[A-Z_|]*.*= \d+')
FLUSHED = re.compile(r"fsync\(\d+<(?P<path>[^>]+)>\)\s*= 0")


async def first_answer(row, stand, disk, without: str = "") -> None:
    """From the first start to the first 202, by strace: which new names were flushed with their directory by then.

    ext4 writes the entry with the file, so no power cut on it shows a missing flush; another file system would.
    """
    trace = stand.base / "trace"
    sidecar = stand.sidecar(spool=spool_on(disk, ballast_bytes=1 << 20))
    calls = "trace=openat,fsync,write,writev,sendto,sendmsg"
    under = [tool("strace"), "-f", "-D", "-y", "-qq", "-s", "40", "--seccomp-bpf", "-e", calls, "-o", str(trace)]
    await start(sidecar, under=under, without=without)
    async with Client(row, sidecar.url, workers=1) as client:
        await client.acked(5)
        await client.stop()
    sidecar.kill()
    spool = str(disk.point / "spool")
    unflushed: set[str] = set()
    created = 0
    answered = False
    for line in trace.read_text(errors="replace").splitlines():
        if made := CREATED.search(line):
            if made["path"].startswith(spool + "/"):
                unflushed.add(made["path"])
                created += 1
        elif flushed := FLUSHED.search(line):
            unflushed = {path for path in unflushed if str(Path(path).parent) != flushed["path"]}
        elif "HTTP/1.1 202" in line:
            answered = True
            break
    assert answered, "no answer in the trace: the test sees nothing"
    assert created >= 3, "no file in the trace: the test sees nothing"
    require("name", unflushed, "new files whose names were not flushed before the first 202")


async def test_f4_the_names_of_new_files_are_flushed_before_the_first_answer(begin, stand, disk):
    """F4: each file of the spool is created, then its directory is flushed, then somebody is answered."""
    await first_answer(begin("F4"), stand, disk)


async def test_f4_control_names_that_are_not_flushed_are_found_guilty(begin, stand, disk):
    """The control: the directory is never flushed."""
    with guilty("name"):
        await first_answer(begin("F4"), stand, disk, "no_directory_sync")

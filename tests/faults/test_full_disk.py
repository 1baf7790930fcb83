"""A file system that is truly full: a small ext4 on a loop device under a real sidecar's spool. Needs root."""

import asyncio
import io
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.client import Client
from tests.faults.process import start
from tests.faults.verdict import drained, guilty, judge, require
from tests.parts import oracle
from tests.parts.account import watching
from tests.parts.sidecar import eventually
from tests.scenarios.conftest import http, stand  # noqa: F401  (the stand of the scenarios, as fixtures)

pytestmark = pytest.mark.root
MIB = 1024 * 1024
BATCH = [{"service_name": "svc", "request_data": "x" * 20_000} for _ in range(20)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted ext4 of 64 MiB without a reserve for root."""
    image, mount = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    mount.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def fill(filler: Path) -> int:
    """Write until the file system takes nothing more; bytes written."""
    written = 0
    with filler.open("ab", buffering=0) as file:
        for size in (MIB, 4096, 512):
            try:
                while True:
                    written += file.write(b"\xaa" * size)
            except OSError as error:
                assert error.errno == 28  # noqa: PT017  (ENOSPC: anything else is another test's)
        os.fsync(file.fileno())
    return written


async def offer(session, sidecar) -> tuple[int, dict[str, str], dict]:
    """One batch of 400 KB."""
    body = io.BytesIO(json.dumps(BATCH).encode())
    async with session.post(f"{sidecar.url}/logs", data=body, headers={"Content-Type": "application/json"}) as answer:
        return answer.status, dict(answer.headers), json.loads(await answer.text())


async def test_f6_a_full_file_system_pushes_back_drains_and_recovers_by_itself(begin, small_disk, stand, http):  # noqa: F811
    """F6: full under load: 503 disk_full, ready, reads and drains go on; space back: 202 by itself, nothing lost."""
    begin("F6")
    options = {"directory": str(small_disk / "spool"), "allow_volatile": False, "ballast_bytes": 8 * MIB}
    await stand.sql.refuse()
    sidecar = await stand.sidecar(spool=options, phase="dual_write_read_dynamo").start()
    acked: set[str] = set()
    filler = small_disk / "filler"

    async def take(wanted: int) -> bool:
        status, headers, document = await offer(http, sidecar)
        if status == 202:
            acked.update(document["log_ids"])
        else:
            assert status == 503, document
            assert document["error"]["code"] == "disk_full"
            assert 1 <= int(headers["Retry-After"]) <= 60
        return status == wanted

    async with watching(sidecar) as scrapes:
        for _ in range(20):
            assert await take(202)
        load = asyncio.create_task(eventually(lambda: take(503), what="push-back"))
        await asyncio.to_thread(fill, filler)
        await load
        await asyncio.to_thread(fill, filler)  # the ballast's room too
        assert not await take(202)
        assert (await sidecar.metrics())['sidecar_backpressure_active{reason="disk_full"}'] == 1
        async with http.get(f"{sidecar.ops}/readyz") as ready:
            assert ready.status == 200
        one = next(iter(acked))
        await eventually(lambda: found(sidecar, one), what="a read")
        await stand.sql.normal()
        await sidecar.drained(60)
        assert sidecar.process is not None
        assert sidecar.process.poll() is None
        filler.unlink()
        await eventually(lambda: take(202), what="open again")
        await sidecar.drained(60)
    assert scrapes.seen > 20
    sql, dynamo = await stand.in_postgres(), await stand.in_dynamodb()
    assert sql.keys() == acked
    oracle.assert_same(sql, dynamo)
    sidecar.terminate()
    assert await sidecar.exit_code() == 0


async def slowly_full(row, stand, disk: Path, rounds: int, without: str = "") -> None:  # noqa: F811
    """The records themselves fill the file system; a filler takes and gives back the rest at random."""
    sidecar = stand.sidecar(spool={"directory": str(disk / "spool"), "ballast_bytes": 4 * MIB}, phase="sql_only")
    await start(sidecar, without=without)
    await stand.sql.refuse()
    filler = disk / "filler"
    async with Client(row, sidecar.url, workers=2, size=20_000) as client:
        for _ in range(rounds):
            refused = client.history.statuses[503]
            if without:
                await asyncio.to_thread(fill, filler)
                await client.acked(200)
                sidecar.kill()
                await asyncio.to_thread(fill, filler)
                filler.unlink()
                await start(sidecar)
            else:
                await eventually(lambda n=refused: client.history.statuses[503] > n, seconds=60, what="push-back")
                await stand.sql.normal()
                await asyncio.sleep(row.rng.uniform(0, 0.3))
                await asyncio.to_thread(fill, filler)
                await asyncio.sleep(row.rng.uniform(0, 0.3))
                filler.unlink()
                await client.acked(20)
                await stand.sql.refuse()
        await client.stop()
        await stand.sql.normal()
        await drained(sidecar)
        require("stopped", sidecar.process.poll(), "a full disk is no reason to stop")
        await judge(client.history, stand, sidecar)


async def test_f6_a_disk_filled_by_the_records_themselves_loses_nothing(begin, small_disk, stand):  # noqa: F811
    """F6: slowly full, drained, suddenly full, free again: 503 and 202 in turn, everything acknowledged arrives."""
    row = begin("F6")
    await slowly_full(row, stand, small_disk, row.rounds)


async def test_f6_control_answers_that_ignore_a_full_disk_are_found_guilty(begin, small_disk, stand):  # noqa: F811
    """The control: a commit that found no room is answered as done."""
    with guilty("lost"):
        await slowly_full(begin("F6"), stand, small_disk, 1, "no_admission,ignored_errors")


async def found(sidecar, log_id: str) -> bool:
    """Whether a read by id answers with the record."""
    return (await sidecar.json(f"/logs/{log_id}")).get("log_id") == log_id

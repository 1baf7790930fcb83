"""The name by which a fleet tells two spools under one instance apart."""

import asyncio
from typing import Never

from sidecar.app.parts import drawn_name, named_apart, spool_name
from sidecar.clock import SystemClock
from sidecar.fleet.memory import MemoryFleetStore
from sidecar.phase import POSTGRES
from tests.spool.harness import open_spool


async def test_a_spool_keeps_the_name_that_it_drew(tmp_path):
    """Drawn at the first start, the same after a restart, another one for another volume."""
    names = []
    for directory in (tmp_path / "one", tmp_path / "one", tmp_path / "two"):
        spool = open_spool(directory)
        try:
            names.append(await drawn_name(spool))
            assert spool_name(spool) == names[-1]
        finally:
            await spool.close()
    assert names[0] == names[1] != names[2]


async def test_two_spools_under_one_instance_hold_a_lease_apart_and_a_restart_takes_its_own_again(tmp_path):
    """The second waits for the first's time to run out; the first, started again, need not."""
    fleet = MemoryFleetStore(POSTGRES, SystemClock())
    got = []
    for directory in (tmp_path / "one", tmp_path / "two", tmp_path / "one"):
        spool = open_spool(directory)
        try:
            await drawn_name(spool)
            got.append(await fleet.acquire_lease("validation", named_apart("pod", spool), 30))
        finally:
            await spool.close()
    assert got == [True, False, True]


async def test_a_disk_without_room_for_a_name_keeps_no_start_waiting():
    """It goes by none then, so that it can drain; the next start has one."""

    class Full:
        def meta(self, key: str) -> None:
            """Nothing yet."""

        async def set_meta(self, key: str, value: str) -> Never:
            """There is no room, and nobody delivers so far."""
            await asyncio.Event().wait()
            raise AssertionError

    assert await drawn_name(Full(), patience=0.01) == ""

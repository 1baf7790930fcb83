"""F26: everything at once, on a schedule drawn from the seed, for seconds in CI and for minutes in a long run."""

import asyncio
import contextlib
import time

import pytest

from tests.faults import rows
from tests.faults.client import Client
from tests.faults.disk import spool_on
from tests.faults.process import start
from tests.faults.test_full_disk import fill
from tests.faults.test_phases import PHASES, phase
from tests.faults.test_stores import heal, refusals
from tests.faults.verdict import drained, guilty, judge
from tests.parts.fault_proxy import Hang, LoseReply, Refuse
from tests.parts.sidecar import eventually

pytestmark = [pytest.mark.root, pytest.mark.timeout(6000)]


class Storm:
    """The faults of the schedule; each leaves a line in the history."""

    def __init__(self, row, stand, *, disk, sidecar, client, without: str) -> None:
        self.row, self.stand, self.disk, self.sidecar, self.client = row, stand, disk, sidecar, client
        self.without = without
        self.at = 1

    async def kill(self) -> None:
        self.sidecar.kill()
        await start(self.sidecar, without=self.without)

    async def cut(self) -> None:
        self.client.history.counting = False
        self.disk.cut()
        self.sidecar.kill()
        await self.disk.power_on()
        self.client.history.counting = True
        await start(self.sidecar, without=self.without)

    async def full(self) -> None:
        filler = self.disk.point / "filler"
        with contextlib.suppress(OSError):
            await asyncio.to_thread(fill, filler)
        await asyncio.sleep(self.row.rng.uniform(0, 1))
        filler.unlink()
        self.disk.sync()  # or the next power cut brings the file back, and the disk stays full for ever

    async def sql_down(self) -> None:
        await self.stand.sql.refuse()
        await asyncio.sleep(self.row.rng.uniform(0, 2))
        await self.stand.sql.normal()

    async def sql_hole(self) -> None:
        self.stand.sql.blackhole()
        await asyncio.sleep(self.row.rng.uniform(0, 3))
        await self.stand.sql.normal()

    async def sql_lost(self) -> None:
        self.stand.sql.lose_reply(b"service-")
        await asyncio.sleep(0.2)

    async def sql_reset(self) -> None:
        self.stand.sql.kill_all()

    async def dynamo_down(self) -> None:
        self.stand.dynamo.on("*", self.row.rng.choice((Refuse(500, "InternalServerError"), Hang())))
        await asyncio.sleep(self.row.rng.uniform(0, 2))
        self.stand.dynamo.clear()

    async def dynamo_lost(self) -> None:
        self.stand.dynamo.on("BatchWriteItem", LoseReply(), times=3)

    async def dynamo_refuses(self) -> None:
        self.stand.dynamo.on("BatchWriteItem", *refusals(self.row.rng, 5))

    async def change_phase(self) -> None:
        self.at = min(max(self.at + self.row.rng.choice((-1, 1)), 0), 3)
        await phase(self.sidecar, PHASES[self.at])


async def storm(row, stand, disk, seconds: float, without: str = "") -> None:
    """One fault after the other, some while others last; then all is healed and judged."""
    options = spool_on(disk, checkpoint_bytes=262_144, ballast_bytes=4 << 20)
    sidecar = stand.sidecar(
        spool=options,
        phase=PHASES[1],
        phase_force="fault matrix",
        reload={"poll": "50ms"},
        retry={"max_delay": "200ms"},
    )
    async with Client(row, sidecar.url, workers=3, pause=0.1) as client:
        await start(sidecar, without=without)
        weather = Storm(row, stand, disk=disk, sidecar=sidecar, client=client, without=without)
        names = sorted(name for name in vars(Storm) if not name.startswith("_"))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            name = row.rng.choice(names)
            row.note(name)
            await getattr(weather, name)()
            await asyncio.sleep(row.rng.uniform(0, 0.3))
        row.note("healed")
        await heal(stand)
        await eventually(
            lambda n=client.history.statuses[202]: client.history.statuses[202] > n,
            seconds=120,
            what="a 202 at the end",
        )
        if without:
            client.history.counting = False
            disk.cut()
            sidecar.kill()
            await disk.power_on()
            await start(sidecar)
        await client.stop()
        await drained(sidecar, 120)
        await judge(client.history, stand, sidecar)
    print(f"acknowledged {len(client.history.acked)}, sent {len(client.history.sent)}, {client.history.statuses}")


@pytest.mark.timeout(900 if not rows.is_long() else 9000)
async def test_f26_everything_at_once_loses_nothing(begin, stand, disk):
    """F26: kills, power cuts, a full disk, stores down, lost replies, throttling, phase changes: all as promised."""
    row = begin("F26")
    await storm(row, stand, disk, row.rounds)


async def test_f26_control_without_fsync_the_storm_is_survived_with_losses(begin, stand, disk):
    """The control: the same weather, synchronous=OFF, ending with a power cut."""
    with guilty("lost", "half"):
        await storm(begin("F26"), stand, disk, 5, "synchronous_off")

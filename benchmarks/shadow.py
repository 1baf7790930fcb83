"""What shadow reads cost the reads that are served: p99 with them on over p99 with them off, in interleaved pairs.

::

    .venv/bin/python -m benchmarks.shadow [--pairs 9] [--seconds 6] [--rate 150] [--sample 0.01]

One sidecar in dual_write over a real PostgreSQL and a DynamoDB that replays its answers. An open loop asks at a fixed
rate, each read timed from the instant at which it was due; the share is switched by the configuration file while it
runs, off and on in turn, the order within a pair changing. Bar: the median of the pairs' ratios <= 1.15.
"""

import argparse
import asyncio
import math
import os
import statistics
import time

import aiohttp

from benchmarks.processes import Cores
from benchmarks.read_rig import ReadRig, read_rig
from sidecar.record import LogRecord
from sidecar.stores.base import ByApplication, ByCorrelation, ByService, ErrorsOn, Query

BAR = 1.15
RECORDS = 2_000
IDS = 200  # asked for by id
NOON_US = 20_000 * 86_400_000_000 + 43_200_000_000


def records() -> list[LogRecord]:
    return [
        LogRecord(
            f"00000000-0000-7000-8000-{n:012d}", n % 50, "INFO", f"service-{n % 5}", "x" * 200, "y" * 200, 200,
            n % 20 != 0, None, 12, NOON_US + n * 1000, f"c-{n % 100}", "u",
        )
        for n in range(RECORDS)
    ]  # fmt: skip


def paths(n: int) -> str:
    """Every pattern in its turn."""
    return (
        f"/logs?application_id={n % 50}&limit=20",
        f"/logs?correlation_id=c-{n % 100}&limit=20",
        f"/logs?service_name=service-{n % 5}&start=2024-10-04T00:00:00Z&end=2024-10-05T00:00:00Z&limit=20",
        "/logs/errors?date=2024-10-04&limit=20",
        f"/logs/00000000-0000-7000-8000-{n % IDS:012d}",
    )[n % 5]


async def warm(rig: ReadRig) -> None:
    """Ask DynamoDB everything once, so that it can be replayed."""
    day = NOON_US // 86_400_000_000 * 86_400_000_000
    queries: list[Query] = [ByApplication(n) for n in range(50)]
    queries += [ByCorrelation(f"c-{n}") for n in range(100)]
    queries += [ByService(f"service-{n}", day, day + 86_400_000_000) for n in range(5)]
    for query in (*queries, ErrorsOn(day // 86_400_000_000)):
        await rig.dynamo.query(query, before=None, limit=20)
    for n in range(IDS):
        await rig.dynamo.get(f"00000000-0000-7000-8000-{n:012d}")


async def measure(rig: ReadRig, seconds: float, rate: float) -> list[float]:
    """Latencies in seconds, each from the instant at which the read was due."""
    latencies: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=32)) as session:

        async def one(n: int, due: float) -> None:
            async with session.get(f"http://127.0.0.1:{rig.port}{paths(n)}") as answer:
                await answer.read()
                if answer.status != 200:
                    raise SystemExit(f"{answer.status} for {paths(n)}")
            latencies.append(time.perf_counter() - due)

        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for n in range(int(seconds * rate)):
                due = started + n / rate
                delay = due - time.perf_counter()
                if delay > 0:
                    await asyncio.sleep(delay)
                group.create_task(one(n, due))
    return latencies


def p99(latencies: list[float]) -> float:
    ordered = sorted(latencies)
    return ordered[math.ceil(len(ordered) * 0.99) - 1]


async def switch(rig: ReadRig, sample: float) -> None:
    rig.configure(shadow_sample=sample, shadow_probe=0.0)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        shown = (await rig.status())["shadow_reads"]["sample_share"]
        if (shown > 0) == (sample > 0):
            return
        await asyncio.sleep(0.05)
    raise SystemExit(f"the sidecar did not take the sample of {sample}")


async def run(pairs: int, seconds: float, rate: float, sample: float) -> int:
    cores = Cores.of_this_machine()
    async with read_rig() as rig:
        batch = records()
        for start in range(0, RECORDS, 25):
            await rig.dynamo.write(batch[start : start + 25])
        for start in range(0, RECORDS, 1000):
            await rig.sql.write(batch[start : start + 1000])
        await warm(rig)
        rig.configure(shadow_sample=0.0, shadow_probe=0.0)
        os.sched_setaffinity(0, cores.others)
        await rig.start(cores.under_test)
        await measure(rig, 2.0, rate)
        ratios = []
        for pair in range(pairs):
            found = {}
            for on in (pair % 2 == 0, pair % 2 == 1):
                await switch(rig, sample if on else 0.0)
                await measure(rig, 0.5, rate)
                found[on] = p99(await measure(rig, seconds, rate))
            ratios.append(found[True] / found[False])
            print(f"pair {pair + 1}: off {found[False] * 1e3:.2f} ms  on {found[True] * 1e3:.2f} ms  {ratios[-1]:.3f}")
        shadow = (await rig.status())["shadow_reads"]
        print(f"compared {shadow['results']}, skipped {shadow['skipped']}, share now {shadow['sample_share']:.4f}")
        median = statistics.median(ratios)
        print(f"median of {pairs} pairs at a sample of {sample}: {median:.3f} (bar {BAR})")
        return 0 if median <= BAR else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rate", type=float, default=150.0, help="reads per second")
    parser.add_argument("--sample", type=float, default=0.01, help="reads.shadow_sample while on")
    chosen = parser.parse_args()
    raise SystemExit(asyncio.run(run(chosen.pairs, chosen.seconds, chosen.rate, chosen.sample)))

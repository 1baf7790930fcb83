"""Longer stories than one load: a store that fails, a backlog of millions, a restart on top of it, an idle night."""

import contextlib
import signal
import statistics
import threading
import time
from collections.abc import Callable
from typing import Self

from benchmarks.cases import Row, judged, medians, most
from benchmarks.rig import Rig, Sidecar

PROBE_RATE = 2_000  # records per second, one per POST


# -- one store stalled or down ------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[Callable[[Rig], None], Callable[[Rig], None]]] = {
    "dynamodb stalled": (lambda rig: rig.dynamodb.behave(mode="stall"), lambda rig: rig.dynamodb.behave(mode="normal")),
    "dynamodb down": (lambda rig: rig.dynamodb.behave(mode="refuse"), lambda rig: rig.dynamodb.behave(mode="normal")),
    "postgres stalled": (lambda rig: rig.postgres.stall(), lambda rig: rig.postgres.resume()),
    "postgres down": (lambda rig: rig.postgres.stop(), lambda rig: rig.postgres.start()),
}


def probe(rig: Rig, system: Sidecar, seconds: float, stream: int) -> Row:
    """Open loop, one per POST: what an application notices."""
    load = rig.load(system, realtime=True, connections=64, seconds=seconds, rate=PROBE_RATE, per_post=1, stream=stream)
    refused = {status: n for status, n in load["statuses"].items() if status != "202"}
    return {
        "acked": load["acked"],
        "p50_ms": load["latency_ms"]["p50"],
        "p99_ms": load["latency_ms"]["p99"],
        "p99.9_ms": load["latency_ms"]["p99.9"],
        "max_ms": load["latency_ms"]["max"],
        "generator_lag_p99_ms": load["lag_ms"]["p99"],
        "refused": refused,
    }


def outage(rig: Rig, fault: str, seconds: float, rounds: int) -> Row:
    """Healthy, broken, healthy, ... in turn on one sidecar; the broken store is healed and everything counted."""
    breaking, healing = FAULTS[fault]
    healthy: list[Row] = []
    broken: list[Row] = []
    system = rig.sidecar()
    total = int(probe(rig, system, 1.0, 0)["acked"])  # warm
    for turn in range(rounds):
        healthy.append(probe(rig, system, seconds, 1 + 2 * turn))
        total += healthy[-1]["acked"]
        rig.until_landed(system, total, 60)
        breaking(rig)
        try:
            time.sleep(0.5)
            broken.append(probe(rig, system, seconds, 2 + 2 * turn))
        finally:
            healing(rig)
        total += broken[-1]["acked"]
        rig.until_landed(system, total, 120)
    rig.end(system)
    row = {f"healthy_{key}": value for key, value in medians(healthy).items()} | medians(broken)
    pairs = zip(healthy, broken, strict=True)
    row["times_healthy"] = statistics.median(down["p99_ms"] / up["p99_ms"] for up, down in pairs)
    bars = judged((most("times_healthy", 1.2, 1.0),), row)
    return {"case": fault, "rows": {"sidecar": row}, "runs": [*healthy, *broken], "bars": bars}


# -- backlog --------------------------------------------------------------------------------------------------------


class Sampler:
    """Four times a second: what waits for DynamoDB, what DynamoDB holds, the sidecar's memory and CPU."""

    def __init__(self, rig: Rig, system: Sidecar) -> None:
        self.rig, self.system = rig, system
        self.points: list[Row] = []
        self.begun = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def now(self) -> float:
        return time.monotonic() - self.begun

    def _run(self) -> None:
        while not self._stop.wait(0.25):
            with contextlib.suppress(OSError, KeyError):  # it is being restarted
                self.points.append(
                    {
                        "at": self.now(),
                        "pending": self.system.pending().get("dynamodb", 0),
                        "stored": self.rig.dynamodb.stats()["distinct"],
                        "rss_mib": self.system.child.memory()["rss_mib"],
                    }
                )


def backlog(rig: Rig, stages: tuple[int, ...]) -> Row:
    """DynamoDB down, the backlog grown in stages, probed at each; kill -9 and start on top; then the drain.

    Everything that the bars ask of a large backlog comes from this one run: the answer's latency and the memory at
    each stage, the time from start to ready, the time and the evenness of the drain.
    """
    system = rig.sidecar(cap=max(2**30, stages[-1] * 1500))
    row: Row = {"rss_at_start_mib": system.child.memory()["rss_mib"], "ready_empty_seconds": system.ready_seconds}
    total = int(probe(rig, system, 1.0, 0)["acked"])
    rig.until_landed(system, total, 30)
    runs: list[Row] = []
    marks: list[tuple[float, str]] = []
    with Sampler(rig, system) as sampler:
        rig.dynamodb.behave(mode="refuse")
        marks.append((sampler.now(), "DynamoDB down"))
        pending = 0
        for n, stage in enumerate(stages):
            if stage > pending:
                filled = rig.load(
                    system, connections=4, seconds=600, per_post=100, records=stage - pending, stream=10 + 2 * n
                )
                pending += filled["acked"]
            settle(rig, system, total + pending)
            seen = probe(rig, system, 3.0, 11 + 2 * n)
            pending += seen["acked"]
            runs.append(seen | {"stage": stage, "pending": pending} | system.child.memory())
        row |= {"pending": pending, "rss_pending_mib": runs[-1]["rss_mib"]}
        total += pending
        marks.append((sampler.now(), "kill -9, start"))
        row["ready_pending_seconds"] = rig.restart(system, signal.SIGKILL)
        row["rss_after_start_mib"] = system.child.memory()["rss_mib"]
        healed_at, healed = sampler.now(), time.time()
        marks.append((healed_at, "DynamoDB back"))
        cpu = system.child.cpu_seconds()
        rig.dynamodb.behave(mode="normal")
        row["back_to_landed_seconds"] = rig.until_landed(system, total, 600) - healed
        row["drain_cpu_s_per_million"] = (system.child.cpu_seconds() - cpu) / pending * 1e6
        time.sleep(0.5)
    row |= evenness([p for p in sampler.points if p["at"] >= healed_at], total)
    row |= {"rss_end_mib": system.child.memory()["rss_mib"], "peak_mib": system.child.memory()["peak_mib"]}
    row["p99_growth"] = runs[-1]["p99_ms"] / runs[0]["p99_ms"]
    rig.end(system)
    bars = judged(
        (
            most("rss_pending_mib", 100, 70),
            most("drain_seconds", 30 * max(1.0, stages[-1] / 1_000_000)),  # of each million
            *((most("ready_pending_seconds", 2),) if stages[-1] <= 1_000_000 else ()),
            most("p99_growth", 1.2),
            most("drain_unevenness", 1.2),
            most("rss_at_start_mib", 80),
        ),
        row,
    )
    case = f"backlog of {stages[-1]:,}"
    return {
        "case": case,
        "rows": {"sidecar": row},
        "runs": runs,
        "bars": bars,
        "series": sampler.points,
        "marks": marks,
    }


def settle(rig: Rig, system: Sidecar, rows: int) -> None:
    """Until PostgreSQL has it all: the probe must see a backlog for one store, not the rush hour of the other."""
    limit = time.monotonic() + 120
    while rig.rows(system.database) < rows and time.monotonic() < limit:
        time.sleep(0.3)


def evenness(points: list[Row], total: int) -> Row:
    """From the first delivery to the last: seconds, rate, and the fastest quarter over the slowest.

    The slow start that spares a recovering store is part of the seconds, and no part of the evenness: quarters are of
    what was delivered after the first fifth.
    """
    first = points[0]["stored"] if points else 0
    moving = [p for p in points if first + (total - first) / 5 < p["stored"] < total]
    done = [p["at"] for p in points if p["stored"] >= total]
    if len(moving) < 8 or not done:
        return {"drain_seconds": 0.0, "drain_unevenness": 1.0, "drain_per_second": 0.0}
    begun = max(p["at"] for p in points if p["stored"] == first)
    size = len(moving) // 4
    rates = []
    for quarter in range(4):
        a, b = moving[quarter * size], moving[(quarter + 1) * size - 1]
        rates.append((b["stored"] - a["stored"]) / (b["at"] - a["at"]))
    return {
        "drain_seconds": done[0] - begun,
        "drain_per_second": (total - first) / (done[0] - begun),
        "drain_unevenness": max(rates) / min(rates),
        "drain_rates_by_quarter": rates,
    }


# -- idle -------------------------------------------------------------------------------------------------------------


def idle(rig: Rig, seconds: float) -> Row:
    """What a pod that nobody writes to costs."""
    system = rig.sidecar()
    at_start = system.child.memory()["rss_mib"]
    time.sleep(2)
    before, begun = system.child.cpu_seconds(), time.monotonic()
    time.sleep(seconds)
    share = (system.child.cpu_seconds() - before) / (time.monotonic() - begun) * 100
    row = {"idle_cpu_percent": share, "rss_at_start_mib": at_start, "ready_empty_seconds": system.ready_seconds}
    rig.end(system)
    bars = judged((most("idle_cpu_percent", 1), most("rss_at_start_mib", 80)), row)
    return {"case": "idle", "rows": {"sidecar": row}, "runs": [row], "bars": bars}

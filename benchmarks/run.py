"""``python -m benchmarks.run``: everything, or a part; prints a table, writes JSON (see README.md)."""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg

from benchmarks import ceilings, peer, scenarios
from benchmarks.cases import CASES, PEER_CASES, SWEEP, Case, Row, measure, run_case
from benchmarks.processes import REPOSITORY
from benchmarks.records import Shape
from benchmarks.report import introduction, machine, markdown, pictures
from benchmarks.rig import Rig

RESULTS = REPOSITORY / "benchmarks" / "results"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
Job = Callable[[Rig], Row]


def sweep(rig: Rig, seconds: float, rates: tuple[int, ...]) -> Row:
    """Latency by rate for the picture; the careful baseline beside us."""
    lines: dict[str, list[Row]] = {"sidecar": [], "careful": []}
    for rate in rates:
        for name, points in lines.items():
            if name != "sidecar" and points and points[-1]["p99_ms"] > 1_000:
                continue  # past its capacity an open loop measures only how long it was run
            system = rig.start(name, "dual_write")
            points.append({"rate": rate} | measure(rig, system, Case(name, Shape(1), 128, rate=rate), seconds))
            rig.end(system)
    return {"case": "latency by rate", "rows": {"sidecar": {}}, "runs": [], "bars": [], "sweep": lines}


def jobs(*, quick: bool, with_peer: bool) -> dict[str, Job]:
    """Name -> what to do; quick ones take about five minutes together, all of them about half an hour."""
    seconds, rounds = (2.5, 1) if quick else (5.0, 3)
    table: dict[str, Job] = {
        case.name: partial(run_case, case=case, seconds=seconds, rounds=rounds)
        for case in (*CASES, *(PEER_CASES if with_peer else ()))
        if case.quick or not quick
    }
    for fault in scenarios.FAULTS:
        table[fault] = partial(scenarios.outage, fault=fault, seconds=seconds, rounds=rounds)
    table["idle"] = partial(scenarios.idle, seconds=5 if quick else 30)
    if quick:
        table["backlog"] = partial(scenarios.backlog, stages=(10_000, 200_000))
    else:
        table["backlog of 1 M"] = partial(scenarios.backlog, stages=(10_000, 100_000, 1_000_000))
        table["backlog of 3 M"] = partial(scenarios.backlog, stages=(10_000, 1_000_000, 3_000_000))
        table["latency by rate"] = partial(sweep, seconds=4.0, rates=SWEEP)
    return table


def chosen(table: dict[str, Job], only: list[str]) -> dict[str, Job]:
    """Those whose name contains one of the words; SystemExit where a word matches none."""
    for word in only:
        if not any(word in name for name in table):
            raise SystemExit(f"--only {word!r}: no such case; there are: " + "; ".join(table))
    return {name: job for name, job in table.items() if not only or any(word in name for word in only)}


def publish(document: Row) -> None:
    """Pictures into docs/, tables into the README between its two marks."""
    for file, text in pictures(document["results"]).items():
        (REPOSITORY / "docs" / file).write_text(text)
    readme = REPOSITORY / "benchmarks" / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{BEGIN}\n{introduction(document)}\n\n{markdown(document['results'])}{END}{after}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the sidecar beside the naive baselines, on this machine, now")
    parser.add_argument("--quick", action="store_true", help="one round, short loads: a look, not a result")
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="cases whose name contains WORD")
    parser.add_argument("--json", type=Path, default=RESULTS / "latest.json")
    parser.add_argument("--scratch", type=Path, default=REPOSITORY / ".run" / "bench", help="on a real disk")
    parser.add_argument("--no-ceilings", action="store_true", help="do not measure the instruments first")
    parser.add_argument("--peer", metavar="PROGRAM", help="Fluent Bit's program (else FLUENT_BIT, else from the PATH)")
    parser.add_argument("--publish", action="store_true", help="write pictures into docs/, results into the README")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    program = peer.program(given.peer)
    if program is None:
        print(f"{peer.NAME} is not on the PATH: the sidecar is not measured beside it (--peer)", file=sys.stderr)
    table = chosen(jobs(quick=given.quick, with_peer=program is not None), given.only)
    results: list[Row] = []
    voids: list[str] = []
    with Rig(given.scratch.resolve(), program) as rig:
        ceiling = {} if given.no_ceilings else ceilings.all_ceilings(rig.cores, rig.scratch)
        for name, job in table.items():
            begun = time.monotonic()
            print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
            try:
                results.append(job(rig))
            except (
                AssertionError,
                RuntimeError,
                OSError,
                asyncpg.PostgresError,
            ) as error:  # a void case must not void the others
                voids.append(f"{name}: {error}")
                for system in list(rig.systems):
                    rig.end(system, signal.SIGKILL)
                rig.restore()
            print(f"{time.monotonic() - begun:.0f} s", file=sys.stderr)
    document: dict[str, Any] = {
        "machine": machine(),
        "quick": given.quick,
        "ceilings": ceiling,
        "results": results,
        "void": voids,
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(document, indent=1))
    print(markdown(results))
    for text in voids:
        print(f"VOID {text}")
    if given.publish:
        publish(document)
    return 1 if voids else 0


if __name__ == "__main__":
    sys.exit(main())

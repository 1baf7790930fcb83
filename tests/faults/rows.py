"""The rows: what is broken, how often in CI and how often in a long run; the seed, and what a run leaves behind."""

import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

LONG: Final = "FAULTS_LONG"
SEED: Final = "FAULTS_SEED"
KEPT: Final = Path(__file__).resolve().parents[2] / ".run" / "faults"


@dataclass(frozen=True)
class Fault:
    """One row: ``ci`` and ``long`` are rounds, points, cases or examples, as the row's test says."""

    what: str
    ci: int
    long: int


ROWS: Final[Mapping[str, Fault]] = {
    "F1": Fault("kill -9 at random while ingesting and draining", 30, 500),
    "F2": Fault("kill at each system call of commit, checkpoint and delete", 40, 600),
    "F3": Fault("power cut", 30, 300),
    "F4": Fault("power cut at first start, checkpoint, recovery, rebuild, shutdown", 3, 50),
    "F5": Fault("torn, zeroed, flipped, missing, foreign files under a stopped spool", 200, 5_000),
    "F6": Fault("full file system, slow and sudden, then room again", 3, 30),
    "F7": Fault("EIO and ENOSPC on the k-th write, fsync, read", 48, 500),
    "F8": Fault("a disk that really fails on write-back", 1, 1),
    "F9": Fault("slow disk: 10 ms, 1 s, a hang", 3, 3),
    "F10": Fault("read-only file system, wrong owner, missing directory", 3, 3),
    "F11": Fault("a store refuses connections for hours", 3, 20),
    "F12": Fault("a store in a black hole, stopped, or slow", 3, 6),
    "F13": Fault("request done, reply lost", 60, 2_000),
    "F14": Fault("reply cut, connection reset", 20, 200),
    "F15": Fault("throttling, unprocessed items, server errors, expired credentials", 24, 200),
    "F16": Fault("a poisoned record first, in the middle, last", 3, 3),
    "F17": Fault("one store down through a phase change and back", 12, 120),
    "F18": Fault("kill during a phase change", 8, 100),
    "F19": Fault("garbage as configuration", 40, 40),
    "F20": Fault("wall clock -2 d, +10 y, 1970", 3, 3),
    "F21": Fault("memory limit with a backlog of so many thousands; killed for memory", 200, 200),
    "F22": Fault("hostile clients beside an honest one", 1, 1),
    "F23": Fault("SIGTERM under load with a store down, twice, then SIGKILL", 8, 100),
    "F24": Fault("two sidecars on one spool", 1, 3),
    "F25": Fault("no file descriptors left", 1, 3),
    "F26": Fault("everything at once, seconds of it", 45, 3_600),
}


def is_long() -> bool:
    """Whether the long counts are asked for."""
    return os.environ.get(LONG, "") not in {"", "0"}


@dataclass
class Row:
    """One row while it runs."""

    name: str
    rounds: int
    seed: int
    rng: random.Random
    history: Path

    def some(self, share: float) -> int:
        """A share of the rounds, at least one: for controls and for parts of a row."""
        return max(1, round(self.rounds * share))

    def note(self, what: str, **details: Any) -> None:
        """A line in the history: what was broken, when in the order of things."""
        with self.history.open("a") as file:
            file.write(json.dumps({"fault": what, **details}) + "\n")


def begin(name: str, test: str) -> Row:
    """A row's seed, random numbers and history; ``test`` tells its tests apart."""
    fault = ROWS[name]
    seed = int(os.environ.get(SEED) or random.SystemRandom().randrange(1 << 32))
    KEPT.mkdir(parents=True, exist_ok=True)
    history = KEPT / f"{name}-{test}.jsonl"
    history.write_text(json.dumps({"row": name, "test": test, "seed": seed}) + "\n")
    print(f"{name} {test}: seed {seed} (again: {SEED}={seed}), history {history}")
    return Row(name, fault.long if is_long() else fault.ci, seed, random.Random(f"{seed} {test}"), history)

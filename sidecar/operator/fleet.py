"""``sidecar fleet``: every instance with its phase, epoch, lag and state, as the sidecar that is asked reads it now.

EXIT CODES. 0: every instance that counts has sent its heartbeat and applied the fleet's epoch. 1: one has not, is
fenced, or a store could not be read.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from typing import Any, Final

from sidecar.config import load
from sidecar.operator.commands import client_of, table

_EXIT_NO: Final = 1
_HEAD: Final = ("INSTANCE", "STATE", "PHASE", "EPOCH", "PENDING", "OLDEST", "DEAD", "VERSION", "HEARTBEAT")


def fleet(args: argparse.Namespace) -> int:
    """Print the table. Raises SidecarError."""
    found = client_of(args, load(args.config, os.environ).settings).get("/api/migration/fleet")
    if args.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        record = found.get("record")
        if record is not None:
            sys.stdout.write(f"record: epoch {record['epoch']}, {record['phase']}, desired {record['desired']}\n\n")
        table(_HEAD, [_row(each) for each in found["instances"]])
    for store, why in found["unreachable"].items():
        sys.stderr.write(f"sidecar fleet: {store} was not read: {why}\n")
    return _EXIT_NO if found["unreachable"] or not all(map(_well, found["instances"])) else 0


def _well(instance: Mapping[str, Any]) -> bool:
    if not instance.get("counts", True):
        return True
    return instance["state"] == "live" and not instance.get("fenced", False)


def _row(instance: Mapping[str, Any]) -> list[object]:
    ages = instance.get("oldest_pending_age_seconds", {})
    return [
        instance["instance"],
        instance["state"] + (" (fenced)" if instance.get("fenced") else " (leads)" if instance.get("leads") else ""),
        instance["phase"],
        instance["epoch"],
        sum(instance["pending"].values()),
        f"{max(ages.values()):.0f} s" if ages else "",
        sum(instance["dead_letters"].values()),
        instance.get("version", ""),
        instance.get("heartbeat_at", ""),
    ]

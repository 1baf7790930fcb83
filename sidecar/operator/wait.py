"""``sidecar wait``: until nothing is pending, for a preStop hook or a script. Needs no token: it reads ``/status``.

Empty means that no store is owed anything at the moment of one answer, and that no record of a fenced instance waits
for the fleet's phase; dead letters do not count, they wait for an operator. Where no sidecar runs, nobody delivers:
then the files say whether it is empty, and waiting ends at once.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

from sidecar.config import load
from sidecar.errors import SidecarUnreachable
from sidecar.operator.access import Stopped
from sidecar.operator.client import Client
from sidecar.operator.commands import client_of
from sidecar.operator.progress import Progress

_POLL: Final = 0.2  # seconds


def wait(args: argparse.Namespace) -> int:
    """0: empty; 1: not empty in time, or nobody is there to deliver. Raises SidecarUnreachable for ``--url``."""
    settings = load(args.config, os.environ).settings
    client = client_of(args, settings)
    if args.spool or not (args.url or _status(client) is not None):
        return _of_files(Stopped(Path(args.spool or settings.spool.directory), settings))
    return _of_sidecar(client, args.timeout)


def _status(client: Client) -> dict[str, Any] | None:
    try:
        return client.get("/status")
    except SidecarUnreachable:
        return None


def _of_sidecar(client: Client, timeout: float | None) -> int:
    end = None if timeout is None else time.monotonic() + timeout
    progress = Progress("delivered")
    first: int | None = None
    try:
        while True:
            status = client.get("/status")
            stores, undecided = status["stores"], status["spool"]["undecided_records"]
            left = undecided + sum(store["account"]["pending"] for store in stores.values())
            delivered = sum(store["account"]["delivered"] for store in stores.values())
            first = delivered if first is None else first
            if not left:
                return 0
            progress.show(delivered - first, left, _states(stores, undecided))
            if end is not None and time.monotonic() >= end:
                progress.close()
                sys.stderr.write(f"sidecar wait: {left} records are still pending after {timeout:g} s\n")
                return 1
            time.sleep(_POLL)
    finally:
        progress.close()


def _states(stores: dict[str, Any], undecided: int) -> str:
    """The stores that are not simply up, and what waits for the fleet's phase."""
    found = [
        f"{name} {store['state']}" + (f" ({store['reason']})" if store["reason"] else "")
        for name, store in stores.items()
        if store["state"] != "up" and store["account"]["pending"]
    ]
    if undecided:
        found.append(f"{undecided} undecided: this instance has lost touch with the fleet")
    return "; ".join(found)


def _of_files(stopped: Stopped) -> int:
    undecided = sum(frame["records"] for frame in stopped.frames() if frame.get("undecided"))
    left = undecided + sum(row["pending"] for row in stopped.accounts())
    if not left:
        return 0
    sys.stderr.write(
        f"sidecar wait: no sidecar runs, and {left} records are pending in {stopped.where};"
        " start it, or use sidecar drain\n"
    )
    return 1

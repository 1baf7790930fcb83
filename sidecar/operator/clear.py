"""``sidecar clear-dynamodb``: throws DynamoDB's records away, so that a backfill makes them again; guarded.

A sidecar that runs here is asked for its phase too: without a fleet, what it applies stands nowhere else.
"""

import argparse
import os
import sys

from sidecar import jsonlog
from sidecar.app.clearing import clear_dynamodb
from sidecar.backfill.clearing import Asked, NotCleared
from sidecar.config import load
from sidecar.errors import SidecarUnreachable
from sidecar.operator.client import Address, Client, actor
from sidecar.phase import DYNAMODB, POSTGRES, TABLE, parse_phase
from sidecar.settings import Settings


async def run(args: argparse.Namespace) -> int:
    """The verb. Raises ConfigError, NotCleared, StoreError."""
    settings = load(args.config, os.environ).settings
    jsonlog.configure("error" if sys.stderr.isatty() else settings.logging.level)
    _ask_the_running_one(settings)
    await clear_dynamodb(settings, Asked(args.table, actor(), args.why), _say)
    _say("now: sidecar backfill --from postgres --to dynamodb")
    return 0


def _ask_the_running_one(settings: Settings) -> None:
    client = Client(Address.of_listen(settings.listen.app))
    try:
        status = client.get("/status")
    except SidecarUnreachable:
        return
    applied = TABLE[parse_phase(status["phase"]["applied"], "/status")]
    if applied.reads_from == DYNAMODB or POSTGRES not in applied.required:
        raise NotCleared([f"the sidecar at {client.address} is in phase {applied.phase.label}"])


def _say(text: str) -> None:
    sys.stderr.write(f"sidecar clear-dynamodb: {text}\n")
    sys.stderr.flush()

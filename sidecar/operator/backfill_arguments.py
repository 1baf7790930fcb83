"""What stands after ``sidecar backfill`` and ``sidecar clear-dynamodb``; light, as ``arguments`` is."""

import argparse
from typing import Final

from sidecar.operator.arguments import with_config, with_priority

DEFAULT_RATE: Final = 1_000.0
_STORES: Final = ("postgres", "dynamodb")
_ACTIONS: Final = ("run", "status", "pause", "resume", "rate")


def for_backfill(parser: argparse.ArgumentParser) -> None:
    """Backfill run | status | pause | resume | rate."""
    with_config(parser)
    parser.add_argument(
        "action",
        nargs="?",
        choices=_ACTIONS,
        default="run",
        help="run (default): copy; status: every job and shard; pause, resume, rate: of all processes at work",
    )
    parser.add_argument("--from", dest="source", choices=_STORES, help="the store to copy from")
    parser.add_argument("--to", dest="destination", choices=_STORES, help="the store to fill")
    parser.add_argument("--start", metavar="TIME", help="log_timestamp from; a UTC day or an instant with offset")
    parser.add_argument("--end", metavar="TIME", help="log_timestamp below; likewise")
    parser.add_argument(
        "--hours",
        choices=("gaps", "all"),
        help="gaps: hours with an open gap of the destination (default into postgres); all: the default otherwise",
    )
    shard = parser.add_mutually_exclusive_group()
    shard.add_argument("--shard", metavar="I/N", help="this process's part, 0/N to N-1/N; default: everything")
    shard.add_argument("--shards", metavar="N", type=int, help="the part that JOB_COMPLETION_INDEX names, of N")
    parser.add_argument(
        "--rate", metavar="R|none", help=f"records/s of this process at most; default {DEFAULT_RATE:g}; none: no bound"
    )
    parser.add_argument(
        "--capacity",
        metavar="U",
        type=float,
        help="DynamoDB's write units/s of this process at most; default: no bound",
    )
    parser.add_argument("--dry-run", action="store_true", help="survey: what is missing, what would be refused")
    parser.add_argument("--skip-refused", action="store_true", help="copy although some records would be refused")
    parser.add_argument("--restart", action="store_true", help="forget how far an unfinished run came")
    parser.add_argument("--ops", metavar="HOST:PORT", help="listen there for /metrics")
    parser.add_argument("--json", action="store_true", help="the outcome as one JSON object")
    parser.add_argument("--why", metavar="TEXT", default="", help="shown to whoever asks why it is paused")
    with_priority(parser)


def for_clear(parser: argparse.ArgumentParser) -> None:
    """Clear-dynamodb."""
    with_config(parser)
    parser.add_argument("--table", metavar="NAME", required=True, help="the table's name, typed out")
    parser.add_argument("--why", metavar="TEXT", required=True, help="kept in the audit trail")

"""What stands after ``validate`` and ``repair``; light, because every start of the program builds it."""

import argparse

from sidecar.operator.arguments import with_config, with_priority


def _window(parser: argparse.ArgumentParser) -> None:
    with_config(parser)
    parser.add_argument("--start", metavar="TIME", help="first log_timestamp; a time without an offset is UTC")
    parser.add_argument("--end", metavar="TIME", help="last log_timestamp, inclusive; default: now")
    parser.add_argument("--all", action="store_true", help="everything up to now, and not the last 24 hours")
    parser.add_argument(
        "--deep", action="store_true", help="read and hash DynamoDB's items; else its digests are believed"
    )
    parser.add_argument("--rate", metavar="N", type=float, help="records of either store a second; 0: no bound")
    parser.add_argument("--examples", metavar="N", type=int, default=100, help="differences shown; default: 100")
    parser.add_argument(
        "--url", metavar="URL", help="the sidecar that is asked what it still owes; default: listen.app"
    )
    parser.add_argument("--token-file", metavar="PATH", help="control token for that; default: control.token_file")
    with_priority(parser)


def for_validate(parser: argparse.ArgumentParser) -> None:
    """Validate."""
    _window(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the last run that did not finish")
    parser.add_argument("--reveal", action="store_true", help="show the values that differ; say --why")
    parser.add_argument("--why", metavar="TEXT", default="", help="kept with the run")


def for_repair(parser: argparse.ArgumentParser) -> None:
    """Repair."""
    _window(parser)
    parser.add_argument("--apply", action="store_true", help="do it; else a dry run")
    parser.add_argument("--overwrite", action="store_true", help="also replace DynamoDB's side of a field_mismatch")
    parser.add_argument("--why", metavar="TEXT", default="", help="kept with the run; needed with --apply")

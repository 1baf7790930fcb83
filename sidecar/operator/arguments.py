"""What stands after the operator's verbs; light, because every start of the program builds it."""

import argparse
import os
from collections.abc import Sequence
from typing import Final

from sidecar.config import DEFAULT_PATH
from sidecar.operator.priority import PRIORITIES, VARIABLE

_STORES: Final = ("postgres", "dynamodb")


def with_config(parser: argparse.ArgumentParser) -> None:
    """--config, as every verb that reads the configuration has it."""
    parser.add_argument(
        "--config",
        metavar="PATH",
        default=os.environ.get("SIDECAR_CONFIG") or DEFAULT_PATH,
        help="configuration file; default: $SIDECAR_CONFIG or " + DEFAULT_PATH,
    )


def with_priority(parser: argparse.ArgumentParser) -> None:
    """--priority, as every verb that works for long beside a sidecar has it."""
    parser.add_argument(
        "--priority",
        choices=PRIORITIES,
        default=os.environ.get(VARIABLE) or PRIORITIES[0],
        help="low: only the CPU time that nobody beside it wants, for a live sidecar's sake; normal: as any process;"
        " default: $SIDECAR_PRIORITY or low",
    )


def _where(parser: argparse.ArgumentParser) -> None:
    with_config(parser)
    parser.add_argument("--url", metavar="URL", help="the sidecar's application listener; default: listen.app")
    parser.add_argument("--token-file", metavar="PATH", help="control token; default: control.token_file")
    parser.add_argument("--spool", metavar="DIR", help="act on this directory's files, whatever runs elsewhere")


def _why(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--why", metavar="TEXT", required=required, default="", help="kept in the audit trail")


def _chosen(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", metavar="STORE", help="of this store alone; door: refused before it was accepted")
    parser.add_argument("--reason", metavar="CLASS", help="of this class alone: permanent, conflict, unknown, refused")


def _selected(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--id", metavar="LOG_ID", action="append", default=[], help="this record; may be repeated")
    _chosen(parser)
    parser.add_argument("--all", action="store_true", help="all of them")


def _verbs(
    parser: argparse.ArgumentParser, rows: Sequence[tuple[str, str]], dest: str = "verb"
) -> dict[str, argparse.ArgumentParser]:
    subparsers = parser.add_subparsers(metavar="WHAT", required=True, dest=dest)
    made = {}
    for name, summary in rows:
        made[name] = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        _where(made[name])
    return made


def for_spool(parser: argparse.ArgumentParser) -> None:
    """Spool ls | cat | verify | export."""
    made = _verbs(
        parser,
        (
            ("ls", "accounts, and the frames that somebody is still owed; no payload"),
            ("cat", "one record that is still owed, with its payload"),
            ("verify", "every checksum; exit 1 where something is damaged"),
            ("export", "every record that is still owed, as NDJSON"),
        ),
    )
    made["ls"].add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    made["cat"].add_argument("log_id", metavar="LOG_ID")


def for_dead_letter(parser: argparse.ArgumentParser) -> None:
    """Dead-letter ls | redrive | discard | export."""
    made = _verbs(
        parser,
        (
            ("ls", "the dead letters, oldest first; no payload"),
            ("redrive", "try them again, now; each keeps its attempts and first error"),
            ("discard", "give them up for good"),
            ("export", "all of them with their records, as NDJSON"),
        ),
    )
    made["ls"].add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    for name in ("ls", "export"):
        _chosen(made[name])
    for name in ("redrive", "discard"):
        _selected(made[name])
        _why(made[name], required=name == "discard")


def for_store(parser: argparse.ArgumentParser) -> None:
    """Store pause | resume | rate."""
    made = _verbs(
        parser,
        (
            ("pause", "stop delivery to a store; accepting goes on; kept over restarts"),
            ("resume", "go on; asks a blocked or failing store at once"),
            ("rate", "deliver at most so many records a second; kept over restarts"),
        ),
    )
    for name, sub in made.items():
        sub.add_argument("store", choices=_STORES)
        if name == "rate":
            sub.add_argument("records_per_second", metavar="NUMBER|none", help="none: no bound")
        _why(sub, required=True)


def for_adopt(parser: argparse.ArgumentParser) -> None:
    """Adopt."""
    with_config(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="print what would be done, as SQL; this is the default")
    what.add_argument("--apply", action="store_true", help="print it, and do it once the table's name was confirmed")
    parser.add_argument("--confirm", metavar="SCHEMA.TABLE", help="for --apply where nobody can be asked")
    parser.add_argument(
        "--without-read-indexes", action="store_true", help="leave out the indexes that only make reads cheap"
    )


def for_wait(parser: argparse.ArgumentParser) -> None:
    """Wait."""
    _where(parser)
    parser.add_argument("--timeout", metavar="SECONDS", type=float, help="give up after so long; default: never")


def for_drain(parser: argparse.ArgumentParser) -> None:
    """Drain."""
    with_config(parser)
    parser.add_argument("--spool", metavar="DIR", required=True, help="the orphaned spool")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, help="give up after so long; default: never")
    parser.add_argument(
        "--phase", metavar="PHASE", help="the phase of records that no phase was decided for (a fenced instance's)"
    )

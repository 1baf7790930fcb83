"""What stands after ``sidecar phase`` and ``sidecar fleet``; light, because every start of the program builds it."""

import argparse

from sidecar.operator.arguments import with_config

PHASES = ("sql_only", "dual_write", "dual_write_read_dynamo", "dynamo_only")


def _where(parser: argparse.ArgumentParser) -> None:
    with_config(parser)
    parser.add_argument("--url", metavar="URL", help="the sidecar's application listener; default: listen.app")
    parser.add_argument("--token-file", metavar="PATH", help="control token; default: control.token_file")
    parser.add_argument("--json", action="store_true", help="the sidecar's own answer")


def _asking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--why", metavar="TEXT", required=True, help="kept in the trail")
    parser.add_argument("--force", metavar="REASON", help="override red gates, for this reason: loud, recorded")
    parser.add_argument(
        "--wait", metavar="SECONDS", type=float, default=0.0, help="for the phase to be in force; default: do not"
    )


def for_phase(parser: argparse.ArgumentParser) -> None:
    """Phase show | plan | set | rollback."""
    rows = (
        ("show", "where the migration stands, and what holds it; exit 1 where something does"),
        ("plan", "the steps to a phase and what the next one's gates say; exit 1 where one is red"),
        ("set", "ask for the next phase, or an earlier one"),
        ("rollback", "ask for the phase before"),
    )
    subparsers = parser.add_subparsers(metavar="WHAT", required=True, dest="verb")
    made = {}
    for name, summary in rows:
        made[name] = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        _where(made[name])
    made["plan"].add_argument("phase", metavar="PHASE", choices=PHASES, help=", ".join(PHASES))
    made["set"].add_argument("phase", metavar="PHASE", choices=PHASES, help=", ".join(PHASES))
    made["rollback"].add_argument("--to", metavar="PHASE", choices=PHASES, help="default: one step back")
    for name in ("set", "rollback"):
        _asking(made[name])


def for_fleet(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``sidecar fleet``."""
    _where(parser)

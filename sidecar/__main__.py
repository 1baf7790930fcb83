"""The command line: one table of verbs, exit codes that a script can rely on, errors in one line.

EXIT CODES

====  =====================================================================================================
0     done; for ``serve`` also a graceful stop
1     the verb ran and its answer is no (a divergence was found, a check failed, ``wait`` and ``drain``: records or dead
      letters are left, ``backfill``: records are refused or still missing, or it was told to stop,
      ``dead-letter`` by id: there is none, ``demo``: the proof failed, ``adopt --plan``: something is to be done)
2     the command line or the configuration is wrong, or a running sidecar refused the request: nothing was done
3     the spool is refused: held by another sidecar, on a volatile file system, of a newer schema
4     the spool failed: EIO or a failed fsync; a restart recovers
5     a store, or the running sidecar that was asked, could not be reached or refused
70    a defect ended a part of ``serve``: it stopped in order, nothing is lost; the log says which part, and how
130   interrupted from the keyboard
141   whoever read the output has gone (``| head``)
====  =====================================================================================================

A verb is one row of ``VERBS``: its name, one line of help, its arguments and the function that runs it. The parts
that need drivers are imported when their verb runs, so that ``validate-config`` works where nothing else does.
"""

import argparse
import os
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import uvloop

from sidecar import __version__
from sidecar.config import Loaded, load, render
from sidecar.errors import (
    BadRequest,
    ConfigError,
    SidecarError,
    SidecarUnreachable,
    SpoolFailed,
    SpoolLocked,
    SpoolRefused,
    StoreError,
)
from sidecar.operator import arguments, backfill_arguments, phase_arguments, priority
from sidecar.operator.validate_arguments import for_repair, for_validate

EXIT_CODES: Final[Mapping[type[SidecarError], int]] = MappingProxyType(
    {
        ConfigError: 2,
        BadRequest: 2,
        SpoolLocked: 3,
        SpoolRefused: 3,
        SpoolFailed: 4,
        StoreError: 5,
        SidecarUnreachable: 5,
    }
)
EXIT_NEGATIVE: Final = 1
EXIT_INTERRUPTED: Final = 130
EXIT_NO_READER: Final = 141  # as a shell says of a program that SIGPIPE ended


@dataclass(frozen=True, slots=True)
class Verb:
    """One word after ``sidecar``."""

    name: str
    summary: str
    run: Callable[[argparse.Namespace], int]
    arguments: Callable[[argparse.ArgumentParser], None]


def _for_dev(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DIR", default=".run", help="where everything lies; default: .run")
    parser.add_argument("--app", metavar="HOST:PORT", default="127.0.0.1:8080", help="application listener")
    parser.add_argument("--ops", metavar="HOST:PORT", default="127.0.0.1:9464", help="metrics and health listener")


def _without_arguments(_parser: argparse.ArgumentParser) -> None:
    """Nothing after the verb."""


def _load(args: argparse.Namespace) -> Loaded:
    loaded = load(args.config, os.environ)
    for warning in loaded.warnings:
        print(f"sidecar: warning: {warning}", file=sys.stderr)  # noqa: T201  (the command line speaks by printing)
    return loaded


def _run(main: Coroutine[Any, Any, int]) -> int:
    return uvloop.run(main)


def _serve(args: argparse.Namespace) -> int:
    loaded = load(args.config, os.environ)  # its warnings go to its own log, a line of JSON each
    from sidecar import app  # noqa: PLC0415  (drivers are imported only by the verbs that use them)

    return _run(app.serve(loaded))


def _dev(args: argparse.Namespace) -> int:
    from sidecar.embedded import dev  # noqa: PLC0415  (never in the production image)

    return _run(dev.run(args))


def _for_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fast", action="store_true", help="the same walk without the pauses for reading")


def _demo(args: argparse.Namespace) -> int:
    from sidecar.embedded.demo import run  # noqa: PLC0415  (never in the production image)

    return _run(run(fast=args.fast))


def _wait(args: argparse.Namespace) -> int:
    from sidecar.operator import wait  # noqa: PLC0415  (imports only what its verb needs, as all that follow)

    return wait.wait(args)


def _drain(args: argparse.Namespace) -> int:
    from sidecar.operator import drain  # noqa: PLC0415

    return _run(drain.drain(args))


def _spool(args: argparse.Namespace) -> int:
    from sidecar.operator import commands  # noqa: PLC0415

    return commands.spool(args)


def _dead_letter(args: argparse.Namespace) -> int:
    from sidecar.operator import commands  # noqa: PLC0415

    return commands.dead_letter(args)


def _store(args: argparse.Namespace) -> int:
    from sidecar.operator import commands  # noqa: PLC0415

    return commands.store(args)


def _backfill(args: argparse.Namespace) -> int:
    if args.action == "run":
        priority.take(args.priority)
    from sidecar.operator import backfill  # noqa: PLC0415

    return _run(backfill.run(args))


def _validate(args: argparse.Namespace) -> int:
    priority.take(args.priority)
    from sidecar.operator import validate  # noqa: PLC0415

    return _run(validate.validate(args))


def _repair(args: argparse.Namespace) -> int:
    priority.take(args.priority)
    from sidecar.operator import validate  # noqa: PLC0415

    return _run(validate.repair(args))


def _adopt(args: argparse.Namespace) -> int:
    from sidecar.operator import adopt  # noqa: PLC0415

    return _run(adopt.adopt(args))


def _clear_dynamodb(args: argparse.Namespace) -> int:
    from sidecar.operator import clear  # noqa: PLC0415

    return _run(clear.run(args))


def _phase(args: argparse.Namespace) -> int:
    from sidecar.operator import phase  # noqa: PLC0415

    return phase.phase(args)


def _fleet(args: argparse.Namespace) -> int:
    from sidecar.operator import fleet  # noqa: PLC0415

    return fleet.fleet(args)


def _init_stores(args: argparse.Namespace) -> int:
    loaded = _load(args)
    from sidecar import app  # noqa: PLC0415  (as above)

    return _run(app.init_stores(loaded))


def _validate_config(args: argparse.Namespace) -> int:
    loaded = _load(args)
    print(f"{loaded.path}: good, phase {loaded.settings.phase.label}, sha256 {loaded.digest}")  # noqa: T201  (its answer)
    return 0


def _print_config(args: argparse.Namespace) -> int:
    sys.stdout.write(render(_load(args).settings))
    return 0


def _version(_args: argparse.Namespace) -> int:
    print(f"sidecar {__version__}")  # noqa: T201  (its answer)
    return 0


VERBS: Final[Sequence[Verb]] = (
    Verb("serve", "accept, store and deliver records until SIGTERM", _serve, arguments.with_config),
    Verb("dev", "a private PostgreSQL, a local DynamoDB and the sidecar between them", _dev, _for_dev),
    Verb(
        "demo",
        "a scripted migration with faults, and the proof that nothing was lost",
        _demo,
        _for_demo,
    ),
    Verb(
        "validate-config",
        "read the configuration as serve would, and say what is wrong",
        _validate_config,
        arguments.with_config,
    ),
    Verb("print-config", "every setting in force, secrets masked", _print_config, arguments.with_config),
    Verb("init-stores", "create the tables and indexes that are missing", _init_stores, arguments.with_config),
    Verb("adopt", "what an existing table still needs to hold records: plan it, apply it", _adopt, arguments.for_adopt),
    Verb("wait", "until nothing is pending (for a preStop hook)", _wait, arguments.for_wait),
    Verb("drain", "deliver an orphaned spool until it is empty", _drain, arguments.for_drain),
    Verb("spool", "look into the spool: ls, cat, verify, export", _spool, arguments.for_spool),
    Verb("dead-letter", "ls, redrive, discard, export", _dead_letter, arguments.for_dead_letter),
    Verb(
        "backfill",
        "copy what one store holds and the other lacks, and prove it",
        _backfill,
        backfill_arguments.for_backfill,
    ),
    Verb(
        "clear-dynamodb",
        "delete DynamoDB's records, to make them again from PostgreSQL; only where nothing can be lost",
        _clear_dynamodb,
        backfill_arguments.for_clear,
    ),
    Verb("validate", "compare the two stores, exactly", _validate, for_validate),
    Verb("repair", "insert what one store lacks; a dry run unless --apply", _repair, for_repair),
    Verb("store", "pause, resume or bound the delivery to one store", _store, arguments.for_store),
    Verb("phase", "show, plan, set or roll back the migration's phase", _phase, phase_arguments.for_phase),
    Verb("fleet", "every instance with its phase, lag and state", _fleet, phase_arguments.for_fleet),
    Verb("version", "the version of this program", _version, _without_arguments),
)


def build_parser(verbs: Sequence[Verb]) -> argparse.ArgumentParser:
    """The parser of the whole command line; a usage error exits with 2, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="sidecar", description="Moves an application's logs from PostgreSQL to DynamoDB without losing one."
    )
    subparsers = parser.add_subparsers(metavar="VERB", required=True)
    for verb in verbs:
        sub = subparsers.add_parser(verb.name, help=verb.summary, description=verb.summary, allow_abbrev=False)
        verb.arguments(sub)
        sub.set_defaults(run=verb.run)
    return parser


def exit_code(error: SidecarError) -> int:
    """The exit code of an error that ends a verb; the nearest class of ``EXIT_CODES``, else 1."""
    return next((EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES), EXIT_NEGATIVE)


def main(argv: Sequence[str] | None = None, verbs: Sequence[Verb] = VERBS) -> int:
    """Run one verb and return its exit code; an error of the tree becomes one line on stderr."""
    args = build_parser(verbs).parse_args(argv)
    try:
        code = int(args.run(args))
        sys.stdout.flush()
    except SidecarError as error:
        print(f"sidecar: {error}", file=sys.stderr)  # noqa: T201  (the command line speaks by printing)
        return exit_code(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered at exit
        return EXIT_NO_READER
    return code


if __name__ == "__main__":
    sys.exit(main())

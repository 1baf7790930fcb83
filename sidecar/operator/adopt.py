"""``sidecar adopt``: what an existing table still needs so that records can go there, and doing it.

``--plan`` (also without any flag) changes nothing: it prints the DDL, ready for psql, with the locks that each
statement takes and for how long as far as the catalogue tells. ``--apply`` does the same statements, one after the
other, after the table's name was typed or given (``--confirm``). Only statements that add are ever made; what stands
against adopting at all (a jsonb payload, a time without a zone) is named and nothing is done.

Exit codes: 0 nothing is (or was left) to do, 1 ``--plan``: there is; a problem stands against it.
"""

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Final

from sidecar.app.adopting import Adoption, Plan, Step
from sidecar.clock import SystemClock
from sidecar.config import load
from sidecar.errors import ConfigError

_UNITS: Final = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
_EXIT_NO: Final = 1


async def adopt(args: argparse.Namespace) -> int:
    """Plan or apply; the exit code.

    Raises:
        ConfigError: the configuration cannot be read, adopts nothing, or the confirmation is another name.
        StoreError: the database cannot be reached or refuses.
    """
    options = load(args.config, os.environ).settings.postgres
    if not options.adopt.enabled:
        raise ConfigError(
            "postgres.adopt.enabled",
            seen=False,
            allowed="true, with postgres.table and postgres.adopt.columns as the table has them",
            hint="docs/ADOPTING.md has an example; without it the sidecar makes its own table (init-stores)",
        )
    if args.apply and options.pgbouncer:
        raise ConfigError(
            "postgres.pgbouncer",
            seen=True,
            allowed="a direct connection for --apply: an index is built outside of a transaction",
            hint="set SIDECAR__POSTGRES__PGBOUNCER=false and the server's own host and port, or give the plan to psql",
        )
    adoption = Adoption(options, SystemClock(), read_indexes=not args.without_read_indexes)
    try:
        plan = await adoption.plan()
        sys.stdout.write(_shown(plan))
        if plan.problems or not args.apply:
            return _EXIT_NO if plan.problems or plan.steps else 0
        if not plan.steps:
            return 0
        await _confirm(args, plan)
        async for step in adoption.apply():
            sys.stderr.write(f"done: {step.sql}\n")
            sys.stderr.flush()
        return 0
    finally:
        await adoption.close()


async def _confirm(args: argparse.Namespace, plan: Plan) -> None:
    """Raises ConfigError unless the table's name was given, on the command line or now."""
    given = args.confirm
    if given is None and sys.stdin.isatty():
        sys.stderr.write(f"type {plan.table} to do this: ")
        sys.stderr.flush()
        given = (await asyncio.to_thread(sys.stdin.readline)).strip()
    if given != plan.table:
        raise ConfigError(
            "--confirm",
            seen=given or "nothing",
            allowed=plan.table,
            hint="nothing was done; read the plan above, then name the table",
        )


def _shown(plan: Plan) -> str:
    """The plan as text that psql takes: everything but the statements is a comment."""
    rows = "rows unknown (never analysed)" if plan.rows is None else f"about {plan.rows:,} rows"
    parts = f", {plan.partitions} partitions" if plan.partitions else ""
    lines = [f"-- {plan.table}: {rows}, {_size(plan.bytes)} without indexes{parts}"]
    for problem in plan.problems:
        lines += [f"-- PROBLEM {problem.name}: {problem.observed}", f"--   required: {problem.required}"]
    if plan.problems:
        lines.append("-- nothing can be applied before these are solved; see docs/ADOPTING.md")
    if not plan.steps and not plan.problems:
        lines.append("-- nothing to do: the table has what the sidecar needs")
    if plan.steps:
        lines += [
            "-- Everything adds; nothing is changed or dropped but an index that an interrupted build left invalid.",
            "-- Not in one transaction: CONCURRENTLY forbids it. What runs into lock_timeout is repeated later.",
        ]
    bounded = False
    for step in plan.steps:
        if step.blocks_writers != bounded:
            bounded = step.blocks_writers
            lines += ["", f"SET lock_timeout = '{plan.lock_seconds:g}s';" if bounded else "SET lock_timeout = 0;"]
        lines += _step(step)
    return "\n".join(lines) + "\n"


def _step(step: Step) -> Sequence[str]:
    kind = "required" if step.required else "for reads"
    head = ["", f"-- {kind}: {step.serves}", f"-- lock: {step.lock}, {step.held}"]
    return [*head, f"{step.sql};"]


def _size(size: int) -> str:
    return next((f"{size / scale:.1f} {name}" for name, scale in _UNITS if size >= scale), f"{size} bytes")

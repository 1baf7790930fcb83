"""``sidecar backfill``: one process's share of a copy, its progress, and what is ordered of all of them.

Exit codes: 0 everything is in the destination, proved; 1 it is not, or not proved: records were refused or are still
missing, or it was told to stop (its checkpoint is kept; run it again); 2 the command line or the configuration is
wrong; 5 a store could not be reached, or another process has this shard.
"""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from sidecar import jsonlog
from sidecar.app.backfill import Request, backfill, with_jobs
from sidecar.backfill.checkpoint import Checkpoint, JobStore, Orders, give_orders, read_orders
from sidecar.backfill.evidence import Family, families
from sidecar.backfill.job import END_US, FIRST_US, Job, Shard
from sidecar.backfill.run import Backfill
from sidecar.config import load
from sidecar.errors import ConfigError
from sidecar.operator.backfill_arguments import DEFAULT_RATE
from sidecar.operator.client import actor
from sidecar.operator.progress import Progress
from sidecar.phase import POSTGRES
from sidecar.record import timestamp_text
from sidecar.retry import State

_EXIT_NO: Final = 1
_DAY: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)
_INDEX: Final = "JOB_COMPLETION_INDEX"


async def run(args: argparse.Namespace) -> int:
    """The verb. Raises ConfigError, StoreError."""
    settings = load(args.config, os.environ).settings
    jsonlog.configure("error" if sys.stderr.isatty() else settings.logging.level)
    if args.action == "run":
        request = _request(args)
        watched = _Watched(request)
        try:
            checkpoint = await backfill(settings, request, watched.show)
        finally:
            watched.close()
        return _told(request.job, checkpoint, watched.consumed, as_json=args.json)

    async def act(jobs: JobStore) -> int:
        if args.action == "status":
            return await _status(jobs, as_json=args.json)
        return await _order(jobs, args)

    return await with_jobs(settings, act)


# --- what is asked ---------------------------------------------------------------------------------------------------


def _request(args: argparse.Namespace) -> Request:
    if args.source is None or args.destination is None or args.source == args.destination:
        seen = f"--from {args.source} --to {args.destination}"
        raise ConfigError("--from, --to", seen=seen, allowed="postgres and dynamodb, one each")
    back = args.destination == POSTGRES and not args.dry_run  # a copy back; a dry run looks at everything
    gaps_only = (args.hours or ("gaps" if back else "all")) == "gaps"
    job = Job(
        source=args.source,
        destination=args.destination,
        start=FIRST_US if args.start is None else parse_time("--start", args.start),
        end=END_US if args.end is None else parse_time("--end", args.end),
        shard=_shard(args),
        gaps_only=gaps_only,
        dry=args.dry_run,
    )
    if job.start >= job.end:
        raise ConfigError("--start, --end", seen=f"{args.start} to {args.end}", allowed="a start before the end")
    rate = DEFAULT_RATE if args.rate is None else _rate(args.rate)
    if args.capacity is not None and not args.capacity > 0:
        raise ConfigError("--capacity", seen=args.capacity, allowed="a number above 0")
    return Request(
        job,
        rate=rate,
        units=args.capacity,
        skip_refused=args.skip_refused,
        restart=args.restart,
        ops=args.ops,
    )


def _shard(args: argparse.Namespace) -> Shard:
    if args.shard is not None:
        return Shard.parse(args.shard)
    if args.shards is None:
        return Shard()
    index = os.environ.get(_INDEX)
    if index is None:
        raise ConfigError(_INDEX, seen=None, allowed="a number below --shards", hint="set by an Indexed Job")
    return Shard.parse(f"{index}/{args.shards}")


def _rate(text: str) -> float | None:
    if text == "none":
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not (rate > 0 and math.isfinite(rate)):
        raise ConfigError("--rate", seen=text, allowed="records per second above 0, or none")
    return rate


def parse_time(option: str, text: str) -> int:
    """Microseconds since the epoch of ``2026-11-01`` (its first instant, UTC) or ``2026-11-01T10:00:00Z``.

    Raises:
        ConfigError: anything else; a time without offset among it.
    """
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is not None and _DAY.fullmatch(text):
        found = found.replace(tzinfo=UTC)
    if found is None or found.tzinfo is None:
        raise ConfigError(option, seen=text, allowed="a UTC day, 2026-11-01, or an instant, 2026-11-01T10:00:00Z")
    since = found - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


# --- what is told ----------------------------------------------------------------------------------------------------


class _Watched:
    """Progress on stderr, a line for each stage."""

    def __init__(self, request: Request) -> None:
        self._stage = ""
        self._paused: str | None = None
        self._progress = Progress("surveyed")
        self.consumed: dict[str, float] = {}
        self._job = request.job

    def show(self, run: Backfill) -> None:
        seen = run.checkpoint
        self.consumed = run.parts.filler.capacity.consumed
        if seen.stage != self._stage:
            self._progress.close()
            self._stage = seen.stage
            self._progress = Progress({"copy": "copied", "survey": "surveyed"}.get(seen.stage, seen.stage))
            _say(f"{self._job.key}: {seen.stage}")
        paused = run.parts.filler.pace.paused_by
        if paused != self._paused:
            self._progress.close()
            self._paused = paused
            _say("resumed" if paused is None else f"paused by {paused} ({run.parts.filler.pace.reason})")
        if seen.stage == "done":
            return
        copying = seen.stage == "copy"
        self._progress.show(seen.copied if copying else seen.looked_at, run.left if copying else None, _trouble(run))

    def close(self) -> None:
        self._progress.close()


def _trouble(run: Backfill) -> str:
    pace = run.parts.filler.pace
    state = pace.state(run.parts.clock.monotonic())
    return run.trouble if state is State.UP else f"{state} ({pace.reason})"


def _told(job: Job, seen: Checkpoint, consumed: Mapping[str, float], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"job": job.key, **_figures(seen), "write_units_of_this_process": consumed}))  # noqa: T201  (the answer of a command)
    else:
        for line in _lines(seen, dry=job.dry):
            _say(line)
    for refusal in seen.refusals:
        _say(f"refused: {refusal.log_id}: {refusal.reason}")
    return 0 if seen.good else _EXIT_NO


def _figures(seen: Checkpoint) -> dict[str, object]:
    return {
        "stage": seen.stage,
        "good": seen.good,
        "looked_at": seen.looked_at,
        "missing_before": seen.missing,
        "copied": seen.copied,
        "present": seen.present,
        "refused": seen.refused,
        "missing_after": seen.left,
        "of_them_young": seen.young,
        "differing": seen.differing,
        "gap_records_closed": seen.closed,
    }


def _lines(seen: Checkpoint, *, dry: bool) -> list[str]:
    lines = [f"{seen.looked_at:,} records looked at, {seen.missing:,} of them were missing in the destination"]
    if not dry:
        lines.append(f"{seen.copied:,} copied, {seen.present:,} met that were there already")
    if seen.refused:
        lines.append("refused: " + ", ".join(f"{number:,} {kind}" for kind, number in sorted(seen.refused.items())))
        if not seen.copied:
            lines.append("nothing was copied: mend or accept them (--skip-refused leaves them out)")
    if seen.stage != "done":
        lines.append(f"stopped during {seen.stage}; the checkpoint is kept, run it again")
    elif not dry and not (seen.refused and not seen.copied):
        lines.append(
            f"afterwards {seen.left - seen.young:,} missing, {seen.young:,} too young to say, {seen.differing:,} with"
            f" other content; gaps of {seen.closed:,} records closed"
        )
    return lines


async def _status(jobs: JobStore, *, as_json: bool) -> int:
    orders = await read_orders(jobs)
    found = [*await families(jobs, "copy/"), *await families(jobs, "dry/")]
    if as_json:
        print(json.dumps({"orders": _ordered(orders), "jobs": [_family(each) for each in found]}))  # noqa: T201
        return 0
    if orders.paused_by is not None:
        _say(f"paused by {orders.paused_by}: {orders.reason}")
    if orders.rate is not None:
        _say(f"rate: {orders.rate:g} records/s of each process")
    for family in found:
        print(f"{family.name}: {len(family.checkpoints)} of {family.shards} shards began")  # noqa: T201
        for seen in family.checkpoints:
            print(  # noqa: T201
                f"  {seen.stage:7} {seen.copied:,} of {seen.missing:,} copied, {seen.present:,} present,"
                f" {sum(seen.refused.values()):,} refused, {seen.left:,} left; {timestamp_text(seen.saved_us)[:19]}"
                f" {seen.holder or '-'}"
            )
    return 0


def _ordered(orders: Orders) -> dict[str, object]:
    return {"paused_by": orders.paused_by, "reason": orders.reason, "rate": orders.rate}


def _family(family: Family) -> dict[str, object]:
    return {
        "job": family.name,
        "shards": family.shards,
        "finished": None if family.finished_us is None else timestamp_text(family.finished_us),
        "checkpoints": [
            {**_figures(seen), "saved": timestamp_text(seen.saved_us), "holder": seen.holder}
            for seen in family.checkpoints
        ],
    }


async def _order(jobs: JobStore, args: argparse.Namespace) -> int:
    changes: dict[str, object]
    if args.action == "pause":
        changes = {"paused_by": actor(), "reason": args.why or "no reason given"}
    elif args.action == "resume":
        changes = {"paused_by": None, "reason": ""}
    else:
        if args.rate is None:
            raise ConfigError("--rate", seen=None, allowed="records per second above 0, or none (as it was started)")
        changes = {"rate": _rate(args.rate)}
    orders = await give_orders(jobs, **changes)
    print(json.dumps(_ordered(orders)))  # noqa: T201
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"sidecar backfill: {text}\n")
    sys.stderr.flush()

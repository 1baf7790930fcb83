"""The guard before DynamoDB's records are thrown away to be made again from PostgreSQL (``sidecar clear-dynamodb``).

Thrown away in the wrong phase they are lost: after the migration DynamoDB alone has the newest ones. So every way to
know that is asked, and each alone refuses:

* the name of the table, typed out;
* the phase that the configuration asks for, the phase of each copy of the fleet's record, and what that record is
  preparing: none of them may read from DynamoDB or leave PostgreSQL out;
* the gap ledger: no open line says that PostgreSQL lacks records;
* the records themselves: no id in DynamoDB that PostgreSQL has not got, or has with other content, except those that
  are too young to say, which are still on their way there.

ORDER, and what a failure at each stage leaves:

1. The audit trail says what is intended, in both stores.
2. Gap lines (``history``) are opened for every hour in which PostgreSQL holds records, and for the hours around now. A
   failure: DynamoDB is whole, the lines say too much, and a backfill closes them. All those days are noted as written
   to: no verdict of what is about to be thrown away stands.
3. Checkpoints of jobs into DynamoDB are ended: a backfill that ran meanwhile is fenced off, and none resumes as if its
   copies were still there.
4. The table is deleted and created again. A failure between the two: sidecars hold their backlog (``blocked``) until
   ``init-stores``, or this verb again, has made it.
5. The audit trail says that it is done.

Then a backfill makes the records again, and closes the lines.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from sidecar.backfill.checkpoint import Checkpoint, JobStore, parse
from sidecar.backfill.comparison import Validator, close
from sidecar.backfill.job import END_US, FIRST_US
from sidecar.clock import Clock
from sidecar.errors import BadRequest
from sidecar.fleet_tables import AuditEntry, FleetRecord, FleetStore
from sidecar.gaps import GapLedger, GapLine
from sidecar.phase import DYNAMODB, POSTGRES, TABLE, Phase, StoreName
from sidecar.stores.base import HOUR_US, Store
from sidecar.verdicts import DAY_US, ValidationLedger

_LINES_AT_ONCE: Final = 1_000
_AHEAD: Final = 25  # hours from now in which a record may be stamped
_BEHIND: Final = 2


class NotCleared(BadRequest):
    """Refused; the reasons, one a line."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("DynamoDB was not cleared:\n  " + "\n  ".join(reasons))


@dataclass(frozen=True, slots=True)
class Asked:
    """What the operator says."""

    table: str  # as it was typed
    by: str
    why: str


@dataclass(frozen=True, slots=True)
class Stand:
    """What is asked and acted on; handed in by the wiring."""

    table: str  # as it is configured
    wished: Phase  # by the configuration
    postgres: Store
    ledgers: dict[StoreName, GapLedger]
    fleets: dict[StoreName, FleetStore]
    only_in_dynamodb: Validator  # DynamoDB's records, as they stand in PostgreSQL
    jobs: JobStore
    verdicts: ValidationLedger
    recreate: Callable[[], Awaitable[Sequence[str]]]  # delete the table and make it again
    clock: Clock


async def clear(stand: Stand, asked: Asked, say: Callable[[str], None]) -> None:
    """Check everything, then do it. Raises NotCleared, StoreError (an answer that cannot be had is a no)."""
    reasons = [*named(stand, asked), *await phases(stand), *await gaps(stand)]
    if not reasons:
        reasons = await records(stand)
    if reasons:
        raise NotCleared(reasons)
    now = stand.clock.now_us()
    epoch = max((r.epoch for r in [await f.read_record() for f in stand.fleets.values()] if r is not None), default=0)

    async def audit(outcome: str) -> None:
        entry = AuditEntry(
            id=f"clear-dynamodb-{now}",
            outcome="intended" if outcome == "intended" else "done",
            action=f"clear-dynamodb {stand.table}",
            by=asked.by,
            why=asked.why,
            at_us=stand.clock.now_us(),
            epoch=epoch,
        )
        for fleet in stand.fleets.values():
            await fleet.append_audit(entry)

    await audit("intended")
    opened = await open_history(stand, f"clear/{now}")
    say(f"gap lines of {opened:,} records opened")
    await end_jobs(stand)
    for line in await stand.recreate():
        say(line)
    await audit("done")


def named(stand: Stand, asked: Asked) -> list[str]:
    """The table's name was typed out, and a reason given."""
    found = []
    if asked.table != stand.table:
        found.append(f"--table says {asked.table!r}, the configuration names {stand.table!r}")
    if not asked.why.strip():
        found.append("--why is empty")
    return found


async def phases(stand: Stand) -> list[str]:
    """No phase that anybody states or prepares needs DynamoDB's records. Raises StoreError."""
    stated: list[tuple[str, Phase | None]] = [("the configuration asks for", stand.wished)]
    for name, fleet in stand.fleets.items():
        record: FleetRecord | None = await fleet.read_record()
        if record is not None:
            stated.append((f"the fleet's record in {name} says", record.phase))
            stated.append((f"the fleet's record in {name} prepares", record.preparing))
    return [
        f"{who} phase {phase.label}: it reads from DynamoDB or does not write to PostgreSQL"
        for who, phase in stated
        if phase is not None and (TABLE[phase].reads_from == DYNAMODB or POSTGRES not in TABLE[phase].required)
    ]


async def gaps(stand: Stand) -> list[str]:
    """PostgreSQL lacks nothing that the ledger knows of. Raises StoreError."""
    lines = [line for ledger in stand.ledgers.values() for line in await ledger.gaps() if line.store == POSTGRES]
    if not lines:
        return []
    number = sum(line.open for line in lines)
    return [f"the gap ledger says that PostgreSQL lacks {number:,} records: copy them back first"]


async def records(stand: Stand) -> list[str]:
    """PostgreSQL holds what DynamoDB holds. Raises StoreError."""
    missing = differing = 0
    hours = stand.only_in_dynamodb(FIRST_US, END_US, lambda _: True)
    try:
        async for hour in hours:
            missing += hour.missing
            differing += hour.differing
    finally:
        await close(hours)
    found = []
    if missing:
        found.append(f"{missing:,} records are in DynamoDB alone: copy them back first")
    if differing:
        found.append(f"{differing:,} records differ from PostgreSQL's: look at them first")
    return found


async def open_history(stand: Stand, source: str) -> int:
    """A line for every hour that is to be filled again; records counted. Raises StoreError."""
    now = stand.clock.now_us() // HOUR_US
    counts = dict.fromkeys(range(now - _BEHIND, now + _AHEAD), 1)
    total = 0
    async for entry in stand.postgres.scan(FIRST_US, END_US):
        hour = entry.log_timestamp // HOUR_US
        counts[hour] = counts.get(hour, 0) + 1
        total += 1
    lines = [
        GapLine(store=DYNAMODB, kind="history", hour=hour, source=source, opened=counts[hour])
        for hour in sorted(counts)
    ]
    for at in range(0, len(lines), _LINES_AT_ONCE):
        await stand.ledgers[POSTGRES].put_gaps(lines[at : at + _LINES_AT_ONCE])
    now_us = stand.clock.now_us()
    await stand.verdicts.note_writes({hour * HOUR_US // DAY_US: now_us for hour in counts})
    return total


async def end_jobs(stand: Stand) -> None:
    """Every job into DynamoDB begins anew: all that it copied is missing again. Raises StoreError."""
    for key, value in await stand.jobs.all("copy/"):
        if f">{DYNAMODB}/" not in key:
            continue
        old = parse(value)
        ended = Checkpoint(
            run=old.run,
            stage="done",
            started_us=old.started_us,
            finished_us=stand.clock.now_us(),
            left=old.looked_at,
        )
        while True:
            found = await stand.jobs.read(key)
            if found is None or await stand.jobs.write(key, msgspec.json.encode(ended), found[1]):
                break

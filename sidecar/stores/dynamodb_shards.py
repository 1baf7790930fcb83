"""How many shards a UTC day has: a schedule in the fleet table that all writers and readers follow.

THE ITEM: ``pk = "shards"``, ``sk = "schedule"``, ``v`` N (version), ``entries`` M of ``YYYY-MM-DD`` to N: records
stamped on that day or later have that many shards. The first entry is ``0001-01-01``, so every day has a number.

INVARIANT: a reader fans out to every shard that any writer may have chosen; else it would hide records. So:

* entries are only added, by compare-and-set on ``v``, each for a later day than the last, and a change begins with the
  day after tomorrow: every copy in memory is younger than ``MAX_AGE_SECONDS`` (12 h), so whoever writes or reads that
  day in its time knows of it;
* a record may be stamped ahead of its time, and a writer's clock may be wrong: under fewer shards than before, readers
  go on with the larger number for ``FORESIGHT_DAYS`` days. (More shards than before are no danger: ``hash mod N`` of
  the smaller N is among the larger N's shards.)

A copy is read at first use and again after ``REFRESH_SECONDS``; where that fails, it serves until ``MAX_AGE_SECONDS``.
No schedule at all is BLOCKED: inventing one could hide what an earlier, lost one had spread.
"""

import asyncio
from bisect import bisect_right
from dataclasses import dataclass
from datetime import date
from typing import Final

import msgspec

from sidecar import settings
from sidecar.clock import Clock
from sidecar.errors import RetryClass, StoreError
from sidecar.stores import dynamodb_errors as errors
from sidecar.stores.base import Check
from sidecar.stores.dynamodb_items import DAY, day_text
from sidecar.stores.dynamodb_wire import Wire

REFRESH_SECONDS: Final = 300.0
MAX_AGE_SECONDS: Final = 12 * 3600.0
FORESIGHT_DAYS: Final = 31
MAX_SHARDS: Final = 64
_KEY: Final = {"pk": {"S": "shards"}, "sk": {"S": "schedule"}}
_EPOCH: Final = date(1970, 1, 1).toordinal()
FIRST_DAY: Final = date.min.toordinal() - _EPOCH  # 0001-01-01, in days since the epoch
_ATTEMPTS: Final = 5  # of the compare-and-set against others who change it at the same time


@dataclass(frozen=True, slots=True)
class Schedule:
    """A copy of the schedule: ``counts[i]`` shards from ``days[i]`` (days since the epoch) on."""

    version: int
    days: tuple[int, ...]
    counts: tuple[int, ...]

    def shards(self, day: int) -> int:
        """Among how many shards a writer spreads the records of a day."""
        return self.counts[max(bisect_right(self.days, day) - 1, 0)]

    def fan_out(self, day: int) -> int:
        """How many shards of a day a reader must look into: all that a writer may have chosen."""
        first = max(bisect_right(self.days, day - FORESIGHT_DAYS) - 1, 0)
        last = max(bisect_right(self.days, day) - 1, 0)
        return max(self.counts[first : last + 1])

    def changed(self, day: int, count: int) -> "Schedule":
        """The next version: ``count`` shards from ``day`` on, or from the day after the last change if that is later.

        Nothing is ever taken out: somebody may have written by it.
        """
        return Schedule(self.version + 1, (*self.days, max(day, self.days[-1] + 1)), (*self.counts, count))


class ShardSchedule:
    """The schedule as this process knows it. Every method raises StoreError."""

    def __init__(self, wire: Wire, options: settings.DynamoDB, *, clock: Clock) -> None:
        self._wire = wire
        self._table = options.fleet_table
        self._clock = clock
        self._copy: Schedule | None = None
        self._read_at = 0.0
        self._reading = asyncio.Lock()

    def peek(self) -> Schedule | None:
        """The copy in memory while it is fresh."""
        return self._copy if self._clock.monotonic() - self._read_at < REFRESH_SECONDS else None

    async def current(self) -> Schedule:
        """The schedule, read anew where the copy is not fresh. BLOCKED where there is none."""
        async with self._reading:
            fresh = self.peek()
            if fresh is not None:
                return fresh
            try:
                found = await self._read()
            except StoreError:
                if self._copy is None or self._clock.monotonic() - self._read_at >= MAX_AGE_SECONDS:
                    raise
                return self._copy
            if found is None:
                raise errors.error(
                    RetryClass.BLOCKED,
                    f"no shard schedule in table {self._table}: create the store, or restore that table",
                    "NoShardSchedule",
                )
            self._copy, self._read_at = found, self._clock.monotonic()
            return found

    async def establish(self, count: int) -> str | None:
        """Make sure that the schedule exists and ends with ``count``; returns what was done, if anything.

        The first one holds for all days; a change begins with the day after tomorrow, UTC.
        """
        for _ in range(_ATTEMPTS):
            present = await self._read()
            if present is None:
                wanted = Schedule(1, (FIRST_DAY,), (count,))
                done = f"shard schedule: {count} a day"
            elif present.counts[-1] == count:
                return None
            else:
                wanted = present.changed(self._clock.now_us() // DAY + 2, count)
                done = f"shard schedule: {present.counts[-1]} -> {count} a day from {day_text(wanted.days[-1])} on"
            if await self._replace(present, wanted):
                self._copy = None
                return done
        raise errors.error(
            RetryClass.TRANSIENT, "the shard schedule is being changed by others: try again", "ShardSchedule"
        )

    async def check(self) -> Check:
        """One line of a preflight."""
        present = await self._read()
        observed = "missing"
        if present is not None:
            pairs = zip(present.days, present.counts, strict=True)
            observed = ", ".join(f"{count} from {day_text(day)}" for day, count in pairs)
        return Check("shard schedule", present is not None, observed, f"a schedule in table {self._table}")

    async def _read(self) -> Schedule | None:
        body = {"TableName": self._table, "Key": _KEY, "ConsistentRead": True}
        return _parse(await self._wire.call("GetItem", msgspec.json.encode(body)))

    async def _replace(self, present: Schedule | None, wanted: Schedule) -> bool:
        pairs = zip(wanted.days, wanted.counts, strict=True)
        entries = {day_text(day): {"N": str(count)} for day, count in pairs}
        body: dict[str, object] = {
            "TableName": self._table,
            "Item": {**_KEY, "v": {"N": str(wanted.version)}, "entries": {"M": entries}},
            "ConditionExpression": "attribute_not_exists(pk)",
        }
        if present is not None:
            body["ConditionExpression"] = "v = :v"
            body["ExpressionAttributeValues"] = {":v": {"N": str(present.version)}}
        try:
            await self._wire.call("PutItem", msgspec.json.encode(body))
        except StoreError as failure:
            if failure.code == errors.CONDITION_FAILED:
                return False
            raise
        return True


def _parse(answer: bytes) -> Schedule | None:
    try:
        item = msgspec.json.decode(answer).get("Item")
        if item is None:
            return None
        entries = item["entries"]["M"]
        pairs = sorted((date.fromisoformat(day).toordinal() - _EPOCH, int(n["N"])) for day, n in entries.items())
        days, counts = zip(*pairs, strict=True)
        if days[0] != FIRST_DAY or not all(1 <= count <= MAX_SHARDS for count in counts):
            raise ValueError  # noqa: TRY301  (one translation for every way to be unreadable)
        return Schedule(int(item["v"]["N"]), days, counts)
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError):
        raise errors.error(
            RetryClass.BLOCKED, "the shard schedule in the fleet table is unreadable: restore it", "ShardSchedule"
        ) from None

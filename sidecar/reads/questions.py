"""What can be asked, each as a frozen value that asks any store and gets the same answer from either.

A question holds all that decides its answer (bounds included), so it can be put again, to the other store, later: that
is what shadow reads do. ``pattern`` is its name in metrics.

BOUNDS OF A PAGE. It ends at ``limit`` records, or before the record that would make it larger than ``max_weight``; one
record is always let through. Both rules look at the records alone, so the page is the same from either store. Records
are asked for in chunks whose size follows the weight of those before, so memory is bounded by the first chunk and
``max_weight`` and not by ``limit`` times the largest record.

SERVICES. With an allow-list, records of other services are passed over, never shown, and never named by a cursor: a
cursor is always the position of a record that was shown. Where many are passed over the page takes longer; its only
bound is the time that a read may take. A summary comes from indexes that do not know the service, so with an
allow-list it is made from whole records.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal

from sidecar.record import LogRecord
from sidecar.stores.base import (
    ByApplication,
    ByCorrelation,
    ByService,
    CountGroup,
    CountQuery,
    ErrorsOn,
    Position,
    Query,
    Store,
    Summary,
    position_of,
    summary_of,
)

Pattern = Literal["id", "application", "service", "correlation", "errors", "count"]
View = Literal["full", "summary"]
Services = frozenset[str] | None

PATTERNS: Final[Mapping[type, Pattern]] = MappingProxyType(
    {ByApplication: "application", ByService: "service", ByCorrelation: "correlation", ErrorsOn: "errors"}
)
_FIRST_CHUNK: Final = 100  # records: one BatchGetItem; at most 35 MB
_SMALLEST_CHUNK: Final = 8
_BASE_WEIGHT: Final = 300  # bytes of a record besides its payloads, about


@dataclass(frozen=True, slots=True)
class Result:
    """What a store answered: records in order and whether they are all there are, or numbers by group."""

    entries: Sequence[LogRecord | Summary] = ()
    complete: bool = True  # False: there may be more after the last entry
    totals: Mapping[str, int] = field(default_factory=dict)
    weight: int = 0  # bytes held by the entries, about


@dataclass(frozen=True, slots=True)
class ById:
    """One record, strongly consistent."""

    log_id: str

    @property
    def pattern(self) -> Pattern:
        """``id``."""
        return "id"

    async def ask(self, store: Store) -> Result:
        """One entry or none. Raises StoreError."""
        record = await store.get(self.log_id)
        return Result() if record is None else Result((record,), weight=weight(record))


@dataclass(frozen=True, slots=True)
class PageOf:
    """One page of a query."""

    query: Query
    before: Position | None
    limit: int
    max_weight: int
    view: View = "full"
    services: Services = None

    @property
    def pattern(self) -> Pattern:
        """Which of the queries."""
        return PATTERNS[type(self.query)]

    async def ask(self, store: Store) -> Result:
        """The page. Raises StoreError."""
        if self.view == "summary" and self.services is None:
            entries = await store.summaries(self.query, before=self.before, limit=self.limit)
            return Result(entries, complete=len(entries) < self.limit, weight=len(entries) * _BASE_WEIGHT)
        page = await self._records(store)
        if self.view == "summary":
            return Result([summary_of(r) for r in page.entries if isinstance(r, LogRecord)], page.complete)
        return page

    async def _records(self, store: Store) -> Result:
        found: list[LogRecord] = []
        held = seen = seen_weight = 0
        before, chunk = self.before, min(_FIRST_CHUNK, self.limit)
        if self.services is not None:
            chunk = _FIRST_CHUNK
        while True:
            batch = await store.query(self.query, before=before, limit=chunk)
            for record in batch:
                size = weight(record)
                seen, seen_weight = seen + 1, seen_weight + size
                if self.services is not None and record.service_name not in self.services:
                    continue
                if found and held + size > self.max_weight:
                    return Result(found, complete=False, weight=held)
                found.append(record)
                held += size
                if len(found) == self.limit:
                    return Result(found, complete=False, weight=held)
            if len(batch) < chunk:
                return Result(found, weight=held)
            before = position_of(batch[-1])
            room = (self.max_weight - held) // max(1, seen_weight // seen) + 1
            wanted = self.limit if self.services is not None else self.limit - len(found)
            chunk = max(1, min(wanted, max(_SMALLEST_CHUNK, room)))


@dataclass(frozen=True, slots=True)
class CountOf:
    """How many, by complete enumeration; ``groups`` None: one number under the name ``""``."""

    query: CountQuery
    group: CountGroup | None = None
    services: Services = None

    @property
    def pattern(self) -> Pattern:
        """``count``."""
        return "count"

    async def ask(self, store: Store) -> Result:
        """The numbers. Raises StoreError; with an allow-list each allowed service is counted, and nothing else."""
        if self.services is None or self.query.service_name is not None:
            return Result(totals=await self._count(store, self.query))
        totals: Counter[str] = Counter()
        for name in sorted(self.services):  # one after the other: an allow-list is short, and ingest goes first
            one = CountQuery(self.query.start, self.query.end, name, self.query.is_success)
            totals.update(await self._count(store, one))
        return Result(totals=dict(totals) if self.group is not None else {"": totals[""]})

    async def _count(self, store: Store, query: CountQuery) -> Mapping[str, int]:
        if self.group is None:
            return {"": await store.count(query)}
        return await store.count_by(query, self.group)


Question = ById | PageOf | CountOf


def weight(record: LogRecord) -> int:
    """Bytes that a record holds, about; from its own lengths, so the same whichever store it came from."""
    return (
        _BASE_WEIGHT
        + len(record.request_data or "")
        + len(record.response_data or "")
        + len(record.error_message or "")
    )


async def ask_within(question: Question, store: Store, seconds: float) -> Result:
    """``question.ask`` with an end. Raises StoreError, TimeoutError."""
    async with asyncio.timeout(seconds):
        return await question.ask(store)

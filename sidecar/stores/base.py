"""The port that every store implements; one contract test defines it (``tests/stores/test_contract.py``).

A store holds a subset of the grow-only set of records. It never updates or deletes a log row. Opening a store does
not connect: a sidecar must accept records while a database is down.
"""

import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, NamedTuple, Protocol

import msgspec

from sidecar.errors import RetryClass
from sidecar.phase import StoreName
from sidecar.record import LogRecord, digest


@dataclass(frozen=True, slots=True)
class WriteLimits:
    """What one ``write`` call may carry and how many calls may be under way."""

    max_records: int
    max_bytes: int  # sum of the records' stored sizes, bytes
    max_in_flight: int


@dataclass(frozen=True, slots=True)
class Failure:
    """One record of a batch that was not stored; ``reason`` names no value of the record."""

    index: int
    retry_class: RetryClass
    reason: str
    code: str = ""


@dataclass(frozen=True, slots=True)
class WriteResult:
    """Every record of the batch that ``failures`` does not name is stored, now or before (a duplicate is success).

    ``consumed`` is DynamoDB's consumed write capacity units by target (table or index name), where reported.
    """

    failures: Sequence[Failure] = ()
    consumed: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class FillResult:
    """What became of each record of a ``fill``.

    ``stored[i]`` is True where this call stored record i. False: its id was there, or ``failures`` names it. After a
    THROTTLE the rest of the batch is in ``failures`` or stored, never unknown. ``consumed`` as in ``WriteResult``; a
    put that found its id there counts with one unit per KB of the table, because the service does not tell.
    """

    stored: Sequence[bool]
    failures: Sequence[Failure] = ()
    consumed: tuple[tuple[str, float], ...] = ()


class Position(NamedTuple):
    """A place in the order of every answer: newest first, equal times by id, both descending."""

    log_timestamp: int  # microseconds since the epoch
    log_id: str


@dataclass(frozen=True, slots=True)
class ByApplication:
    """R1: all records of one application (specification L22)."""

    application_id: int


@dataclass(frozen=True, slots=True)
class ByService:
    """R2: one service, both ends inclusive, microseconds since the epoch (specification L23)."""

    service_name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ByCorrelation:
    """R5: all records with one correlation id (specification L593)."""

    correlation_id: str


@dataclass(frozen=True, slots=True)
class ErrorsOn:
    """R3: records with is_success false of one UTC day; ``day`` is days since the epoch (specification L25)."""

    day: int


Query = ByApplication | ByService | ByCorrelation | ErrorsOn


@dataclass(frozen=True, slots=True)
class CountQuery:
    """R4: how many records, start and end inclusive, microseconds since the epoch; None means any."""

    start: int
    end: int
    service_name: str | None = None
    is_success: bool | None = None


HOUR_US: Final = 3_600_000_000
HourFilter = Callable[[int], bool]
"""Which UTC hours (of log_timestamp, counted since the epoch) are wanted: a shard's, or those with a gap."""

CountGroup = Literal["date", "service"]
"""By what numbers are broken down: UTC day of log_timestamp (``YYYY-MM-DD``), or service_name."""

Consistency = Literal["strong", "eventual"]


class Summary(msgspec.Struct, frozen=True, gc=False):
    """What the indexes of both stores hold of a record: enough for a list, without reading the record."""

    log_id: str
    log_timestamp: int  # microseconds since the epoch
    log_type: str
    status_code: int | None
    is_success: bool
    processing_time_ms: int | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number that was not enumerated; ``method`` says to a person how it was made."""

    count: int
    method: str


class ScanEntry(NamedTuple):
    """What a consistency scan yields per record: enough to compare two stores exactly."""

    log_timestamp: int
    log_id: str
    digest: bytes  # record.digest of what the store holds
    shown_under: bytes  # ``service_tag`` of the service whose queries show it; ``NOWHERE``: none's


NOWHERE: Final = bytes(8)


@lru_cache(maxsize=4096)
def service_tag(service_name: str) -> bytes:
    """Eight bytes that stand for a service in a scan."""
    return hashlib.blake2b(service_name.encode(), digest_size=8).digest()


def entry_of(record: LogRecord) -> ScanEntry:
    """The entry of a record that is where it belongs."""
    return ScanEntry(record.log_timestamp, record.log_id, digest(record), service_tag(record.service_name))


@dataclass(frozen=True, slots=True)
class Examined:
    """A record as it is stored, and what is wrong beside its fields.

    ``wrong`` names what the store keeps to find it by, or to compare it by, and what is not as a sidecar writes it:
    some query does not show the record then. PostgreSQL's indexes are made from the columns: there it is empty.
    """

    record: LogRecord
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a preflight: what was looked at, what was seen, what is required."""

    name: str
    ok: bool
    observed: str
    required: str


class Store(Protocol):
    """A place where records end up.

    Every method raises ``StoreError`` with a retry class and nothing else; the driver's errors are translated by one
    table per store. All are safe to call concurrently.
    """

    @property
    def name(self) -> StoreName:
        """Which store of the phase table this is."""
        ...

    @property
    def consistency(self) -> Consistency:
        """Of queries and counts: ``eventual`` where a record that is stored may not be seen for a moment."""
        ...

    @property
    def limits(self) -> WriteLimits:
        """Bounds of one ``write`` call; the shipper keeps to them, the store checks them."""
        ...

    async def write(self, batch: Sequence[LogRecord]) -> WriteResult:
        """Store a batch; idempotent by log_id; never overwrites other content where the store can tell.

        No id twice in one batch. Raises StoreError when nothing is known of any record (the call may have been
        applied: repeat it): PERMANENT or UNKNOWN mean that some record of the batch, unknown which, was refused
        (bisect); the other classes concern the store as a whole.
        """
        ...

    async def put_if_absent(self, batch: Sequence[LogRecord]) -> Sequence[bool]:
        """For backfill and repair: store only ids that are not there; True where this call stored it.

        Never overwrites, whatever else is written meanwhile.
        """
        ...

    async def fill(self, batch: Sequence[LogRecord]) -> FillResult:
        """As ``put_if_absent``, with an answer for each record and what it cost; for copying many.

        Raises StoreError as ``write`` does: PERMANENT or UNKNOWN mean that some record of the batch, unknown which,
        was refused and none is stored (bisect); the other classes that the call is to be repeated.
        """
        ...

    async def rehearse(self, batch: Sequence[LogRecord]) -> Sequence[Failure]:
        """Which records ``fill`` would refuse as data, and why; stores nothing. Ids that are there are not refused."""
        ...

    async def get(self, log_id: str) -> LogRecord | None:
        """Strongly consistent read by id; None means that the store answered and has none."""
        ...

    async def examine(self, log_id: str) -> Examined | None:
        """As ``get``, and whether every index shows the record: decided by the record's own keys, not by an index."""
        ...

    async def query(self, query: Query, *, before: Position | None, limit: int) -> Sequence[LogRecord]:
        """Up to ``limit`` records strictly after ``before`` in the order of Position (descending), newest first."""
        ...

    async def summaries(self, query: Query, *, before: Position | None, limit: int) -> Sequence[Summary]:
        """As ``query``, from the indexes alone where the store has them."""
        ...

    async def count(self, query: CountQuery) -> int:
        """Exact number by complete enumeration (eventually consistent in DynamoDB)."""
        ...

    async def count_by(self, query: CountQuery, group: CountGroup) -> Mapping[str, int]:
        """As ``count``, by group; groups without a record are left out."""
        ...

    async def estimate(self, query: CountQuery) -> Estimate:
        """About how many, at a fraction of the cost of ``count``."""
        ...

    async def sample(self, *, before: int, limit: int) -> Sequence[LogRecord]:
        """Some records with log_timestamp < before (microseconds), whichever are cheap to find; in no order.

        May be fewer than there are, even none: for probes, never for an answer.
        """
        ...

    def scan(self, start: int, end: int, *, hours: HourFilter | None = None) -> AsyncIterator[ScanEntry]:
        """All records with start <= log_timestamp < end (microseconds), ascending by (time, id); bounded memory.

        Only of the ``hours`` that are wanted, where they are given.
        """
        ...

    def deep_scan(self, start: int, end: int) -> AsyncIterator[ScanEntry]:
        """As ``scan``, but from the records themselves: what the store keeps beside their fields is checked.

        Where anything of it is wrong, the entry is shown ``NOWHERE``; one that is no record at all has no digest.
        """
        ...

    def stream(
        self, start: int, end: int, *, after: Position | None = None, hours: HourFilter | None = None
    ) -> AsyncIterator[Sequence[LogRecord]]:
        """Whole records with start <= log_timestamp < end (microseconds), ascending by (time, id), in bounded memory.

        Only those strictly after ``after`` (where an earlier stream was left) and of the ``hours`` that are wanted; the
        bodies of other hours are not read. No page is empty. What is written behind the stream's position meanwhile may
        be missed.
        """
        ...

    async def ping(self) -> None:
        """Cheapest call that proves that a write could succeed (table there, permission given); else StoreError."""
        ...

    async def create(self) -> Sequence[str]:
        """Create what is missing (table, indexes, fleet tables); returns what was done; idempotent."""
        ...

    async def check(self) -> Sequence[Check]:
        """Compare what is there with what is needed: table, keys, indexes, uniqueness, warnings."""
        ...

    async def close(self) -> None:
        """Release connections; idempotent, bounded in time."""
        ...


def position_of(entry: LogRecord | Summary) -> Position:
    """Where an entry stands in the order of every answer."""
    return Position(entry.log_timestamp, entry.log_id)


def summary_of(record: LogRecord) -> Summary:
    """The summary that an index would give of a record."""
    return Summary(
        record.log_id,
        record.log_timestamp,
        record.log_type,
        record.status_code,
        record.is_success,
        record.processing_time_ms,
    )

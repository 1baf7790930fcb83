"""The port in memory: the reference that the contract test compares the other stores with.

Ships with the product for what needs a store and no server. It keeps every promise of ``stores.base`` but durability;
whoever wants it to fail wraps it.
"""

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence

from sidecar.errors import RetryClass, StoreError
from sidecar.phase import POSTGRES, StoreName
from sidecar.record import LogRecord, timestamp_text
from sidecar.stores.base import (
    HOUR_US,
    ByApplication,
    ByCorrelation,
    ByService,
    Check,
    Consistency,
    CountGroup,
    CountQuery,
    ErrorsOn,
    Estimate,
    Examined,
    Failure,
    FillResult,
    HourFilter,
    Position,
    Query,
    ScanEntry,
    Summary,
    WriteLimits,
    WriteResult,
    entry_of,
    summary_of,
)

_DAY_US = 86_400_000_000
_PAGE = 100  # records of a page of a stream
_LIMITS = WriteLimits(max_records=1_000, max_bytes=4 * 1024 * 1024, max_in_flight=2)


class MemoryStore:
    """``stores.base.Store`` in a dictionary.

    Args:
        name: which store of the phase table it stands for.
        limits: bounds of one ``write``.
    """

    def __init__(self, name: StoreName = POSTGRES, limits: WriteLimits = _LIMITS) -> None:
        self._name = name
        self._limits = limits
        self._records: dict[str, LogRecord] = {}

    @property
    def name(self) -> StoreName:
        """Return the name given."""
        return self._name

    @property
    def consistency(self) -> Consistency:
        """``strong``."""
        return "strong"

    @property
    def limits(self) -> WriteLimits:
        """As given."""
        return self._limits

    async def write(self, batch: Sequence[LogRecord]) -> WriteResult:
        """Keep what is not there, compare what is."""
        if len(batch) > self._limits.max_records:
            raise StoreError(
                self._name,
                RetryClass.PERMANENT,
                f"{len(batch)} records in one batch, at most {self._limits.max_records}",
            )
        return WriteResult(
            [
                Failure(index, RetryClass.CONFLICT, "the same log_id is stored with other content")
                for index, record in enumerate(batch)
                if self._records.setdefault(record.log_id, record) != record
            ]
        )

    async def put_if_absent(self, batch: Sequence[LogRecord]) -> Sequence[bool]:
        """Keep what is not there."""
        stored = []
        for record in batch:
            stored.append(record.log_id not in self._records)
            self._records.setdefault(record.log_id, record)
        return stored

    async def fill(self, batch: Sequence[LogRecord]) -> FillResult:
        """As ``put_if_absent``."""
        return FillResult(await self.put_if_absent(batch))

    async def rehearse(self, batch: Sequence[LogRecord]) -> Sequence[Failure]:  # noqa: ARG002  (the port's signature)
        """Nothing is refused."""
        return ()

    async def get(self, log_id: str) -> LogRecord | None:
        """Look up by id."""
        return self._records.get(log_id)

    async def examine(self, log_id: str) -> Examined | None:
        """Nothing is kept beside the record."""
        record = await self.get(log_id)
        return None if record is None else Examined(record)

    async def query(self, query: Query, *, before: Position | None, limit: int) -> Sequence[LogRecord]:
        """Filter, sort, cut."""
        found = [
            record
            for record in self._records.values()
            if _matches(query, record) and (before is None or _position(record) < before)
        ]
        return sorted(found, key=_position, reverse=True)[:limit]

    async def summaries(self, query: Query, *, before: Position | None, limit: int) -> Sequence[Summary]:
        """As ``query``, cut to the summary."""
        return [summary_of(record) for record in await self.query(query, before=before, limit=limit)]

    async def count(self, query: CountQuery) -> int:
        """Look at every record."""
        return sum(_counts(query, record) for record in self._records.values())

    async def count_by(self, query: CountQuery, group: CountGroup) -> Mapping[str, int]:
        """Look at every record."""
        counted = (record for record in self._records.values() if _counts(query, record))
        if group == "service":
            return Counter(record.service_name for record in counted)
        return Counter(timestamp_text(record.log_timestamp)[:10] for record in counted)

    async def estimate(self, query: CountQuery) -> Estimate:
        """Exact: nothing is cheaper here."""
        return Estimate(await self.count(query), "counted in memory")

    async def sample(self, *, before: int, limit: int) -> Sequence[LogRecord]:
        """The first ones that were written."""
        return [record for record in self._records.values() if record.log_timestamp < before][:limit]

    async def scan(self, start: int, end: int, *, hours: HourFilter | None = None) -> AsyncIterator[ScanEntry]:
        """The stream, digested."""
        async for page in self.stream(start, end, hours=hours):
            for record in page:
                yield entry_of(record)

    def deep_scan(self, start: int, end: int) -> AsyncIterator[ScanEntry]:
        """There is nothing deeper."""
        return self.scan(start, end)

    async def stream(
        self, start: int, end: int, *, after: Position | None = None, hours: HourFilter | None = None
    ) -> AsyncIterator[Sequence[LogRecord]]:
        """Sort what is there at the first step; later writes are not seen."""
        window = [
            r
            for r in self._records.values()
            if start <= r.log_timestamp < end
            and (after is None or _position(r) > after)
            and (hours is None or hours(r.log_timestamp // HOUR_US))
        ]
        window.sort(key=_position)
        for at in range(0, len(window), _PAGE):
            yield window[at : at + _PAGE]

    async def ping(self) -> None:
        """Memory is always there."""

    async def create(self) -> Sequence[str]:
        """There is nothing to make."""
        return ()

    async def check(self) -> Sequence[Check]:
        """One line: there is nothing to look at."""
        return [Check(f"{self._name}.memory", ok=True, observed="in memory", required="nothing durable")]

    async def close(self) -> None:
        """Keep what was written readable, as in a store whose client went away."""


def _position(record: LogRecord) -> Position:
    return Position(record.log_timestamp, record.log_id)


def _matches(query: Query, record: LogRecord) -> bool:
    match query:
        case ByApplication(application_id):
            return record.application_id == application_id
        case ByCorrelation(correlation_id):
            return record.correlation_id == correlation_id
        case ByService(service_name, start, end):
            return record.service_name == service_name and start <= record.log_timestamp <= end
        case ErrorsOn(day):
            return not record.is_success and record.log_timestamp // _DAY_US == day


def _counts(query: CountQuery, record: LogRecord) -> bool:
    return (
        query.start <= record.log_timestamp <= query.end
        and query.service_name in (None, record.service_name)
        and query.is_success in (None, record.is_success)
    )

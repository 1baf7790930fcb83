"""A record written to each store, read back and taken back: proof that the path works, and nothing left of it.

PostgreSQL: insert and select in one transaction that is rolled back: constraints, triggers and rights are asked, nobody
else ever sees the row. DynamoDB has no such transaction: put, strongly consistent get and delete under the id prefix
``canary#``, the only key that the sidecar's role may delete, and without the index attributes, so that no query, count
or validation ever meets it. What came back is compared field by field with what was sent, payloads and microseconds
included.

FAILURE. A store's error is the outcome's ``problem``, of that store alone. A canary that was put and could not be
deleted says so: it lies under its prefix, and the next one has another id.
"""

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from sidecar.clock import Clock
from sidecar.errors import SidecarError
from sidecar.phase import StoreName
from sidecar.record import FIELDS, LogRecord

PREFIX: Final = "canary#"
SERVICE: Final = "hybrid-log-sidecar.canary"
_PAYLOAD: Final = '{"amount": 1.10, "amount": 1.1, "text": "\\u00e9\\ud83d\\ude00 \\u0000"}'  # kept byte for byte


class CanaryStore(Protocol):
    """A store in which a record can be tried without leaving it there."""

    async def sample(self, *, before: int, limit: int) -> Sequence[LogRecord]:
        """Some records with log_timestamp < before. Raises StoreError."""
        ...

    async def canary(self, record: LogRecord) -> LogRecord | None:
        """Write, read and take back; what was read. Raises StoreError."""
        ...


@dataclass(frozen=True, slots=True)
class CanaryOutcome:
    """What became of it in one store; ``problem`` is empty where all thirteen fields came back and nothing is left."""

    store: StoreName
    problem: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Canary:
    """Tries all stores at once."""

    stores: Mapping[StoreName, CanaryStore]
    clock: Clock

    async def __call__(self) -> Sequence[CanaryOutcome]:
        """One outcome per store, in the order of the stores. Raises nothing."""
        record = self._record(await self._usual_type())
        return await asyncio.gather(*(self._try(store, record) for store in self.stores))

    async def _try(self, store: StoreName, record: LogRecord) -> CanaryOutcome:
        started = self.clock.monotonic()
        try:
            found = await self.stores[store].canary(record)
        except SidecarError as error:
            return CanaryOutcome(store, str(error), self.clock.monotonic() - started)
        return CanaryOutcome(store, _difference(record, found), self.clock.monotonic() - started)

    async def _usual_type(self) -> str:
        """A log_type that is in use: an adopted table may list the allowed ones. ``INFO`` where nothing tells."""
        for store in self.stores.values():
            try:
                found = await store.sample(before=self.clock.now_us(), limit=1)
            except SidecarError:  # the trial itself will say what is wrong with it
                continue
            if found:
                return found[0].log_type
        return "INFO"

    def _record(self, log_type: str) -> LogRecord:
        """A payload that a parser would not give back, and nothing that an adopted table's own rules may refuse.

        No application (a foreign key), numbers that fit the smallest column.
        """
        return LogRecord(
            log_id=str(uuid.uuid4()),
            application_id=None,
            log_type=log_type,
            service_name=SERVICE,
            request_data=_PAYLOAD,
            response_data="",
            status_code=418,
            is_success=False,
            error_message="a canary: not an error, é😀",
            processing_time_ms=1,
            log_timestamp=self.clock.now_us(),
            correlation_id=SERVICE,
            user_id="",
        )


def _difference(sent: LogRecord, found: LogRecord | None) -> str:
    """Names of the fields that differ."""
    if found is None:
        return "written, and not found when it was read"
    names = [name for name in FIELDS if getattr(sent, name) != getattr(found, name)]
    return f"read back with another {', '.join(names)}" if names else ""

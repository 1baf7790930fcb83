"""What a validation finds, in frozen values: reasons, differences, what a whole run comes to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final, NamedTuple

from sidecar.phase import DYNAMODB, POSTGRES, StoreName
from sidecar.record import FIELDS, LogRecord
from sidecar.verdicts import Outcome

FIRST_US: Final = -62_135_596_800_000_000  # 0001-01-01T00:00:00Z
LAST_US: Final = 253_402_300_800_000_000  # 10000-01-01T00:00:00Z, exclusive


class Reason(StrEnum):
    """Why a record is not the same in both stores."""

    MISSING_IN_SQL = "missing_in_sql"
    MISSING_IN_DYNAMO = "missing_in_dynamo"
    FIELD_MISMATCH = "field_mismatch"
    ID_CONFLICT = "id_conflict"
    DEAD_LETTER = "dead_letter"
    OLD_WRITER = "old_writer"
    FOREIGN_WRITER = "foreign_writer"
    IN_FLIGHT = "in_flight"
    IN_FLIGHT_UNKNOWN = "in_flight_unknown"
    EXPECTED_GAP = "expected_gap"
    EXPIRED = "expired"
    ACKNOWLEDGED = "acknowledged"


UNDECIDED: Final = frozenset({Reason.IN_FLIGHT, Reason.IN_FLIGHT_UNKNOWN})
"""Nobody can say yet: neither clean nor divergent; validate again."""
EXPECTED: Final = frozenset({Reason.EXPECTED_GAP, Reason.EXPIRED, Reason.ACKNOWLEDGED})
"""Known, and not to be mended by the validator: these do not fail consistency."""
DIVERGENT: Final = frozenset(Reason) - UNDECIDED - EXPECTED
"""Any of these, once, and the stores are not consistent: the tolerance is 0."""

MISSING: Final[Mapping[StoreName, Reason]] = MappingProxyType(
    {POSTGRES: Reason.MISSING_IN_SQL, DYNAMODB: Reason.MISSING_IN_DYNAMO}
)


def outcome_of(reasons: Mapping[str, int]) -> Outcome:
    """``divergent`` if any difference is, else ``undecided`` if any is, else ``clean``."""
    found = {Reason(name) for name, number in reasons.items() if number}
    return "divergent" if found & DIVERGENT else "undecided" if found & UNDECIDED else "clean"


class Candidate(NamedTuple):
    """An id that the two scans did not agree on; None: the scan of that store did not have it at this time."""

    log_timestamp: int
    log_id: str
    sql: bytes | None  # digest
    dynamo: bytes | None


@dataclass(frozen=True, slots=True)
class Difference:
    """One record that is not the same in both stores, after everything that could explain it was looked at."""

    log_id: str
    log_timestamp: int  # where it was found: PostgreSQL's if that is in the window, else DynamoDB's
    reason: Reason
    sql: LogRecord | None = None  # as read, strongly consistent
    dynamo: LogRecord | None = None
    detail: str = ""  # never a value of the record
    keys: tuple[str, ...] = ()  # attributes of DynamoDB's item, beside the fields, that are not what they must be

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that differ where both stores have the record, then of the item's wrong keys."""
        a, b = self.sql, self.dynamo
        if a is None or b is None:
            return ()
        return (*(name for name in FIELDS if getattr(a, name) != getattr(b, name)), *self.keys)

    @property
    def present_in(self) -> tuple[StoreName, ...]:
        """The stores that have a record under this id."""
        return tuple(name for name, held in ((POSTGRES, self.sql), (DYNAMODB, self.dynamo)) if held is not None)


@dataclass(frozen=True, slots=True)
class Window:
    """Which records: start_us <= log_timestamp < end_us, microseconds since the epoch."""

    start_us: int
    end_us: int
    everything: bool = False  # no window was given: from the first record to ``end_us``

    @classmethod
    def all_until(cls, end_us: int) -> "Window":
        """Everything up to ``end_us``."""
        return cls(FIRST_US, end_us, everything=True)


@dataclass(frozen=True, slots=True)
class Settled:
    """What the sidecars that could be asked said of the records that they had accepted before."""

    asked: tuple[str, ...] = ()  # instances, and how each was asked
    silent: tuple[str, ...] = ()  # instances that count and did not answer: what they hold is unknown
    behind: frozenset[StoreName] = frozenset()  # stores to which another instance still owes some of them
    knows_all: bool = False  # the instances asked are all there are: nobody else can hold a record

    warnings: tuple[str, ...] = field(default=())

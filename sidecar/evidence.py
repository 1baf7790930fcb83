"""What the gates of a phase change want to know of the data, and nothing of how it is found out.

Whoever validates, copies or watches keeps its results in the fleet's tables and answers these questions from them, so
that any instance, after any restart, gives the same answer. A question is a read: it may ask a store, starts no work,
and ends within that store's timeouts.

INVARIANT: an answer never says more than was established. Unknown is ``None`` (never looked) or a figure that keeps the
gate red; a result that later writes have overtaken is said to be overtaken. What was not asked of the whole fleet is
not an answer.

FAILURE: StoreError where the results cannot be read. The gate is red with that error as what was observed.

Times are wall-clock microseconds since 1970-01-01 UTC, days are days since then (``timestamp // 86_400_000_000``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from sidecar.phase import StoreName

DAY_US: Final = 86_400_000_000


@dataclass(frozen=True, slots=True)
class TailVerdict:
    """The last finished validation of the newest records: [start_us, end_us) of log_timestamp."""

    start_us: int
    end_us: int
    finished_us: int
    compared: int  # ids seen in either store
    unexpected: int  # differences of a class that is not explained (in flight, dead letter, expected gap, expired)
    run: str = ""  # its name in the results, for who wants to look

    @property
    def clean(self) -> bool:
        """No unexplained difference."""
        return self.unexpected == 0


@dataclass(frozen=True, slots=True)
class DayVerdicts:
    """Every UTC day that holds a record in either store, and how its last finished validation ended.

    A day is *stale* where a record of that day was written to either store after that validation began (late writes,
    backfill, repair), or where it was never validated; such a day is in ``stale`` and not in ``unclean``.
    """

    days: int  # how many there are
    unclean: tuple[int, ...] = ()  # validated, and unexplained differences are left; ascending
    stale: tuple[int, ...] = ()  # not validated since the last write to it; ascending
    oldest_us: int | None = None  # when the oldest of the verdicts that count was finished


@dataclass(frozen=True, slots=True)
class CopyBack:
    """How far the copy of records that one store lacks has come, e.g. of phase 3's records into PostgreSQL."""

    store: StoreName  # that is filled
    started_us: int
    finished_us: int | None  # None: it is under way, or was interrupted
    copied: int
    left: int | None  # records known to be missing still; None: not known yet
    refused: Mapping[str, int] = field(default_factory=dict)  # by constraint: what the store would not take


@dataclass(frozen=True, slots=True)
class Feasibility:
    """The last finished dry run of the way back: would PostgreSQL take what DynamoDB alone holds, or will hold?"""

    finished_us: int
    looked_at: int  # records
    refused: Mapping[str, int] = field(default_factory=dict)  # by constraint; empty: it would take them all
    run: str = ""


@dataclass(frozen=True, slots=True)
class OldWriters:
    """Whether anybody but this fleet writes to an adopted table."""

    watched_since_us: int  # nobody can have been quiet for longer than somebody looked
    last_seen_us: int | None  # the newest row that no sidecar wrote; None: none was seen since then


class Validations(Protocol):
    """Answers of the validator (``sidecar.consistency``)."""

    async def tail(self) -> TailVerdict | None:
        """The newest finished validation that reached at least 48 h back; None: there was none."""
        ...

    async def days(self) -> DayVerdicts | None:
        """All days; None: the validator never looked which days there are."""
        ...


class Copies(Protocol):
    """Answers of backfill and copy-back (``sidecar.backfill``)."""

    async def copy(self, store: StoreName) -> CopyBack | None:
        """The last run that filled ``store``; None: there was none."""
        ...

    async def feasibility(self) -> Feasibility | None:
        """The last finished dry run into PostgreSQL; None: there was none."""
        ...


class Writers(Protocol):
    """Answers of whoever watches an adopted table for old writers."""

    async def old_writers(self) -> OldWriters | None:
        """None: PostgreSQL's table is our own and nobody else writes there."""
        ...


class NotYet:
    """Implements all of them for what no part answers yet: nothing was ever looked at, and the table is our own."""

    async def tail(self) -> TailVerdict | None:
        """Never."""
        return None

    async def days(self) -> DayVerdicts | None:
        """Never."""
        return None

    async def copy(self, store: StoreName) -> CopyBack | None:  # noqa: ARG002  (the port's signature)
        """Never."""
        return None

    async def feasibility(self) -> Feasibility | None:
        """Never."""
        return None

    async def old_writers(self) -> OldWriters | None:
        """Nobody."""
        return None


@dataclass(frozen=True, slots=True)
class Evidence:
    """Who answers what; the wiring fills it in (``sidecar.app``)."""

    validations: Validations = field(default_factory=NotYet)
    copies: Copies = field(default_factory=NotYet)
    writers: Writers = field(default_factory=NotYet)

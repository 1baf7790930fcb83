"""What two answers to one question have not in common. Pure: no store, no clock.

CLASSES (label ``result`` of ``shadow_reads_total``), the first that applies:

================  ================================================================================================
``error``         the other store failed
``field``         a record is in both and its content differs
``missing``       a record of the served answer is not in the other store (a count: the other has fewer)
``extra``         the other store has a record that the served answer lacks (a count: the other has more)
``order``         the same records, in another order
``in_flight``     they differed, but in records that may still be on their way; or a moment later not any more
``expired``       records so old that the store which lacks them has removed them (``dynamodb.ttl_days``,
                  ``validation.postgres_retention_days``)
``expected_gap``  records that the gap ledger says the other store (or, extra, the serving one) was never given
``slow``          the same answer, but much later than the served one, or not in time
``match``         the same answer
================  ================================================================================================


HORIZON. A page that ended at its limit says nothing of what comes after its last record. So two pages are compared from
the newest record down to the higher of the two ends: one record missing at the top is one difference, and not also an
extra one at the bottom.

Values never leave: a difference names fields and describes both sides by kind and length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import msgspec

from sidecar.reads.questions import Result
from sidecar.record import LogRecord
from sidecar.stores.base import Position, Summary, position_of


class Outcome(StrEnum):
    """Class of one comparison; see the module."""

    MATCH = "match"
    MISSING = "missing"
    EXTRA = "extra"
    FIELD = "field"
    ORDER = "order"
    ERROR = "error"
    SLOW = "slow"
    IN_FLIGHT = "in_flight"
    EXPIRED = "expired"
    EXPECTED_GAP = "expected_gap"


MISMATCHES: Final = frozenset({Outcome.FIELD, Outcome.MISSING, Outcome.EXTRA, Outcome.ORDER})
"""What no delay explains."""


@dataclass(frozen=True, slots=True)
class Differences:
    """What differs; empty where the answers are equal."""

    missing: Mapping[str, int] = field(default_factory=dict)  # log_id -> log_timestamp; counts: group -> how many
    extra: Mapping[str, int] = field(default_factory=dict)
    changed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # log_id -> field -> described
    disordered: bool = False

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.changed or self.disordered)

    @property
    def outcome(self) -> Outcome:
        """The class, where nothing explains the difference."""
        if self.changed:
            return Outcome.FIELD
        if self.missing:
            return Outcome.MISSING
        if self.extra:
            return Outcome.EXTRA
        return Outcome.ORDER if self.disordered else Outcome.MATCH


def compare(served: Result, other: Result) -> Differences:
    """How ``other`` differs from ``served``; both are answers to the same question."""
    if served.totals or other.totals:
        return _numbers(served.totals, other.totals)
    horizon = max((end for end in (_end(served), _end(other)) if end is not None), default=None)
    ours = _down_to(served, horizon)
    theirs = _down_to(other, horizon)
    both = [log_id for log_id in ours if log_id in theirs]
    changed = {i: changed_fields(ours[i], theirs[i]) for i in both if ours[i] != theirs[i]}
    return Differences(
        missing={i: e.log_timestamp for i, e in ours.items() if i not in theirs},
        extra={i: e.log_timestamp for i, e in theirs.items() if i not in ours},
        changed=changed,
        disordered=not changed and both != [i for i in theirs if i in ours],
    )


def changed_fields(ours: LogRecord | Summary, theirs: LogRecord | Summary) -> dict[str, str]:
    """The fields that differ, each described without its values."""
    pairs = zip(msgspec.structs.asdict(ours).items(), msgspec.structs.asdict(theirs).values(), strict=True)
    return {name: f"{_describe(a)} / {_describe(b)}" for (name, a), b in pairs if a != b}


def _describe(value: object) -> str:
    if value is None:
        return "null"
    return f"text of {len(value)}" if isinstance(value, str) else type(value).__name__


def _numbers(ours: Mapping[str, int], theirs: Mapping[str, int]) -> Differences:
    lacking = {g: ours.get(g, 0) - theirs.get(g, 0) for g in ours.keys() | theirs.keys()}
    return Differences(
        missing={g: n for g, n in lacking.items() if n > 0}, extra={g: -n for g, n in lacking.items() if n < 0}
    )


def _end(result: Result) -> Position | None:
    """The lowest position down to which the answer is whole; None: to the very end."""
    return None if result.complete else min(map(position_of, result.entries), default=None)


def _down_to(result: Result, horizon: Position | None) -> dict[str, LogRecord | Summary]:
    entries: Sequence[LogRecord | Summary] = result.entries
    return {e.log_id: e for e in entries if horizon is None or position_of(e) >= horizon}

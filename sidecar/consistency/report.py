"""A run as people and programs read it: the specification's five members first, then ours.

Values of records are in a report only where the run was asked to reveal them, which is audited: by default a difference
says which fields differ.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Final

from sidecar.consistency.types import Difference, Reason
from sidecar.record import timestamp_text, to_dict
from sidecar.verdicts import Example, RunLine

_SAYS: Final[Mapping[Reason, str]] = {
    Reason.MISSING_IN_SQL: "records are in DynamoDB and not in PostgreSQL",
    Reason.MISSING_IN_DYNAMO: "records are in PostgreSQL and not in DynamoDB",
    Reason.FIELD_MISMATCH: "records differ in some field, or in a key that DynamoDB finds them by",
    Reason.ID_CONFLICT: "ids were given to two different records",
    Reason.DEAD_LETTER: "records were refused by a store and wait as dead letters",
    Reason.OLD_WRITER: "rows were written past the sidecar into PostgreSQL and not copied yet",
    Reason.FOREIGN_WRITER: "items are in DynamoDB that no sidecar wrote",
    Reason.IN_FLIGHT: "records are still on their way",
    Reason.IN_FLIGHT_UNKNOWN: "records may be on their way: a sidecar did not say what it holds",
    Reason.EXPECTED_GAP: "records are in open gaps of the ledger",
    Reason.EXPIRED: "records were removed by retention",
    Reason.ACKNOWLEDGED: "records were given up by an operator",
}


def counted(reasons: Mapping[str, int]) -> "Counter[str]":
    """A counter of reasons that may be added to."""
    return Counter(reasons)


def example(each: Difference, *, reveal: bool) -> Example:
    """One difference as it is shown."""
    values: dict[str, dict[str, object]] | None = None
    if reveal:
        whole = each.sql is None or each.dynamo is None
        values = {}
        for name, record in (("postgres", each.sql), ("dynamodb", each.dynamo)):
            if record is not None:
                shown = to_dict(record)
                values[name] = shown if whole else {f: shown[f] for f in each.fields if f in shown}
    return Example(
        log_id=each.log_id,
        log_timestamp=timestamp_text(each.log_timestamp),
        reason=each.reason.value,
        present_in=each.present_in,
        fields=each.fields,
        detail=each.detail,
        values=values,
    )


def document(line: RunLine) -> dict[str, object]:
    """The report. ``is_consistent`` is true for a finished run without one unexplained or undecided difference."""
    total = sum(line.reasons.values())
    seconds = ((line.finished_us or line.updated_us) - line.started_us) / 1e6
    return {
        "is_consistent": line.outcome == "clean",
        "sql_record_count": line.sql_records,
        "dynamo_db_record_count": line.dynamo_records,
        "discrepancies": [
            f"{reason.value}: {line.reasons[reason.value]} {_SAYS[reason]}"
            for reason in Reason
            if line.reasons.get(reason.value)
        ],
        "validation_duration": _span(seconds),
        "outcome": line.outcome,
        "error": line.error or None,
        "run": line.id,
        "start": None if line.everything else timestamp_text(line.start_us),
        "end": timestamp_text(line.end_us),
        "mode": "deep" if line.deep else "digests",
        "started_at": timestamp_text(line.started_us),
        "finished_at": None if line.finished_us is None else timestamp_text(line.finished_us),
        "matched": line.matched,
        "reasons": {reason.value: line.reasons.get(reason.value, 0) for reason in Reason},
        "differences": total,
        "examples": list(line.examples),
        "examples_cut": total > len(line.examples),
        "warnings": list(line.warnings),
    }


def _span(seconds: float) -> str:
    """As the specification's TimeSpan is written: ``00:01:02.345678``."""
    whole = max(0, round(seconds * 1e6))
    minutes, us = divmod(whole, 60_000_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{us // 1_000_000:02d}.{us % 1_000_000:06d}"

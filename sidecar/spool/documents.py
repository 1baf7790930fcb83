"""The JSON shapes of what is in a spool: one for the control API, the export files and the command line."""

import base64

from sidecar.phase import Phase
from sidecar.record import timestamp_text, to_dict
from sidecar.spool.inspect import FrameLine, Held
from sidecar.spool.types import AuditLine, DeadLetter

_LABELS = {int(phase): phase.label for phase in Phase}


def frame(line: FrameLine) -> dict[str, object]:
    """A frame; a damaged header says nothing but that."""
    if not line.sound:
        return {"seq": line.seq, "sound": False}
    return {
        "seq": line.seq,
        "sound": True,
        "accepted_at": timestamp_text(line.accepted_us),
        "phase": _LABELS.get(line.phase),
        "records": line.records,
        "bytes": line.size,
        "first_log_timestamp": timestamp_text(line.first_us),
        "last_log_timestamp": timestamp_text(line.last_us),
        "pending": sorted(line.owed - line.settled),
        "required": sorted(line.required),
        "undecided": line.unresolved,
    }


def held(item: Held) -> dict[str, object]:
    """A record in the spool with its fate at every store; ``record`` is as ``POST /logs`` takes it."""
    return {
        "seq": item.seq,
        "accepted_at": timestamp_text(item.accepted_us),
        "phase": _LABELS.get(item.phase),
        "stores": dict(sorted(item.stores.items())),
        "record": to_dict(item.record),
    }


def letter(item: DeadLetter, *, payload: bool) -> dict[str, object]:
    """A dead letter; with ``payload`` its record as ``POST /logs`` takes it, or what was refused at the door.

    Bytes that are no UTF-8 come as ``raw_base64``.
    """
    shape: dict[str, object] = {
        "key": item.key,
        "store": item.store,
        "log_id": item.log_id,
        "class": item.retry_class,
        "reason": item.reason,
        "code": item.code,
        "attempts": item.attempts,
        "first_at": timestamp_text(item.first_us),
        "last_at": timestamp_text(item.last_us),
        "phase": _LABELS.get(item.phase),
        "bytes": item.size,
    }
    if payload and item.record is not None:
        shape["record"] = to_dict(item.record)
    elif payload and item.raw is not None:
        try:
            shape["raw"] = item.raw.decode()
        except UnicodeDecodeError:
            shape["raw_base64"] = base64.b64encode(item.raw).decode()
    return shape


def audit_line(line: AuditLine) -> dict[str, object]:
    """One line of the audit trail."""
    return {
        "key": line.key,
        "at": timestamp_text(line.at_us),
        "who": line.who,
        "what": line.what,
        "why": line.why,
        "evidence": line.evidence,
    }

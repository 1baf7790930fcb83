"""The spool: the durable buffer between an answer and the stores. Knows nothing of stores or HTTP but names.

THE PART'S CONTRACT (the on-disk format and its invariants stand in ``spool/schema.py``):

* ``append`` returns only after the commit that holds the records returned from fsync (P1).
* Obligations (which names, which of them required) are stamped with the frame and never weakened.
* A frame leaves the file only when it is settled for every owed name; what could not be delivered was copied to
  ``deferred`` or ``dead_letters`` in the same transaction that settled it.
* ``owed = delivered + pending + dead_lettered + released + discarded + quarantined`` per name, from durable counters,
  at every instant that ``counters`` is called (P4).
* EIO or a failed fsync fails everybody who waits and every later call with SpoolFailed (P8). SQLITE_FULL rolls back,
  raises Busy, and goes on.
"""

from sidecar.spool.spool import Spool
from sidecar.spool.types import (
    AuditLine,
    Counters,
    Cursor,
    DeadLetter,
    Deferred,
    Frame,
    Leftover,
    Obligation,
    Receipt,
    RecordStatus,
    RecoveryReport,
    ReleasePlan,
    Seen,
    SpoolState,
)

__all__ = [
    "AuditLine",
    "Counters",
    "Cursor",
    "DeadLetter",
    "Deferred",
    "Frame",
    "Leftover",
    "Obligation",
    "Receipt",
    "RecordStatus",
    "RecoveryReport",
    "ReleasePlan",
    "Seen",
    "Spool",
    "SpoolState",
]

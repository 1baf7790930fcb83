"""What goes into and comes out of the spool: frozen values, and the two interfaces that the other layers call."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from sidecar.record import LogRecord

Fate = Literal["pending", "delivered", "deferred", "dead_lettered", "released", "discarded", "quarantined"]


@dataclass(frozen=True, slots=True)
class Obligation:
    """To whom the records of a frame are owed; stamped at accept, strengthened later, never weakened.

    ``unresolved`` records are owed to be decided (a fenced instance, semantics section 9): nobody ships them until
    ``resolve`` replaces the obligation, once.
    """

    phase: int
    required: frozenset[str]
    best_effort: frozenset[str] = frozenset()
    unresolved: bool = False

    @property
    def owed(self) -> frozenset[str]:
        """All names, required and best-effort."""
        return self.required | self.best_effort


@dataclass(frozen=True, slots=True)
class Receipt:
    """What ``append`` hands back: the frames that hold the records of that call, and to whom they are owed."""

    seqs: tuple[int, ...]
    obligation: Obligation


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What opening found and did (P9). A spool that was stopped in order reports nothing but ``unclean=False``."""

    unclean: bool  # the last process did not stop in order
    quarantined: int  # records that were accepted and cannot be found or read now, added to the counters
    wal_damage: int  # damaged spots of the write-ahead log; 1 for a missing one
    salvaged: int  # records taken over from damaged files
    lower_bound: bool  # ``quarantined`` could not be counted exactly
    messages: tuple[str, ...] = ()  # one clear line each, fit for the log


@dataclass(frozen=True, slots=True)
class ReleasePlan:
    """The oldest backlog of a best-effort store that may be released, for one line in the gap ledger.

    ``hours`` counts the records by UTC hour of log_timestamp (hours since the epoch).
    """

    store: str
    seqs: tuple[int, ...]
    hours: Mapping[int, int]
    records: int
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class AuditLine:
    """One line of the spool's audit trail."""

    key: int
    at_us: int
    who: str
    what: str
    why: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Seen:
    """One client-supplied or derived id of the dedup window: durable with the frame that it came in."""

    log_id: bytes  # 16 bytes
    content: bytes  # 16 bytes: digest of what the client sent, before defaults
    expires_us: int = 0  # filled by the spool when it loads the window: wall-clock microseconds


@dataclass(slots=True)
class Frame:
    """The records of one commit with one obligation, as a cursor hands them out.

    ``sizes[i]`` is the stored size of ``records[i]`` in bytes. A record whose checksum failed was quarantined and
    is not in ``records``; ``indexes[i]`` is its place in the frame on disk.
    """

    seq: int
    phase: int
    required: bool  # for the cursor's own store
    accepted_us: int  # wall clock at commit, for ages that people read
    records: Sequence[LogRecord]
    sizes: Sequence[int]
    indexes: Sequence[int] = field(default=())


@dataclass(frozen=True, slots=True)
class Leftover:
    """A record of a frame that its store did not take; goes to ``deferred`` or ``dead_letters`` when settled."""

    position: int  # index into Frame.records
    kind: Literal["deferred", "dead_letter"]
    retry_class: str  # RetryClass value, or "refused"
    reason: str  # redacted: names no value of the record
    code: str = ""
    attempts: int = 1
    due_us: int = 0  # deferred only: wall-clock microseconds of the next try


@dataclass(frozen=True, slots=True)
class Deferred:
    """A record that is tried again alone, later."""

    key: int
    store: str
    record: LogRecord
    accepted_us: int
    first_us: int
    due_us: int
    attempts: int
    retry_class: str
    reason: str
    code: str
    phase: int
    size: int  # stored bytes


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that a store refused as data, with its own copy of the body.

    ``store`` is ``"door"`` and ``record`` None for a record refused at the door: then ``raw`` holds what was sent.
    """

    key: int
    store: str
    log_id: str | None
    record: LogRecord | None
    raw: bytes | None
    retry_class: str
    reason: str
    code: str
    attempts: int
    first_us: int
    last_us: int
    phase: int
    size: int


@dataclass(frozen=True, slots=True)
class Counters:
    """One store's account; durable, so that it adds up across restarts (semantics, section 6)."""

    owed: int
    delivered: int
    pending: int  # in frames not yet settled, and deferred
    dead_lettered: int
    released: int
    discarded: int
    quarantined: int
    pending_bytes: int
    oldest_pending_us: int | None  # wall clock at accept of the oldest pending record
    dead_letter_bytes: int


@dataclass(frozen=True, slots=True)
class SpoolState:
    """What the spool says of itself: for metrics, ``/status`` and admission."""

    bytes_used: int  # live pages of the database and its WAL
    capacity_bytes: int
    free_disk_bytes: int
    accepting: bool  # False: ``append`` raises Busy
    busy_reason: str  # "", "spool_full", "disk_full", "spool_slow" (commits lag, too much waits in memory)
    commit_seconds_last: float
    quarantined_records: int
    wal_damage: int
    dedup_ids: int


@dataclass(frozen=True, slots=True)
class RecordStatus:
    """Where one record of this spool stands, per owed store, while it is in local retention."""

    log_id: str
    accepted_us: int
    phase: int
    stores: dict[str, Fate]
    required: frozenset[str]


class Cursor(Protocol):
    """One store's own progress through the spool. One consumer at a time; calls from the event loop only."""

    async def take(self, max_records: int, max_bytes: int) -> Sequence[Frame]:
        """The next unsettled frames owed to this store, oldest first, each once per run; waits until there is one.

        At least one frame even if it alone is over the bounds (a frame is at most 1,000 records and 4 MiB, or one
        record). Served from the tail cache where the store keeps up, else read back and checksummed. Raises
        SpoolFailed.
        """
        ...

    def settle(self, frame: Frame, leftovers: Sequence[Leftover] = ()) -> None:
        """All of the frame is with the store, but for the leftovers. Returns at once; the mark rides on a commit.

        In memory it counts at once; on disk within about 50 ms. A crash in between means that the frame is handed
        out again: stores are idempotent. Marks that find the disk full wait and are tried again; memory stays
        bounded because ``take`` waits too.
        """
        ...

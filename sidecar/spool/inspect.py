"""Looking into a stopped sidecar's spool without changing a byte: for ``sidecar spool ls|cat|verify|export``.

SQLite is not used: opening a file with it replays and deletes the write-ahead log. Pages are read directly, as
salvage does, with the log's committed pages laid over them. Memory does not grow with the backlog.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, Self

from sidecar.errors import SpoolRefused
from sidecar.record import LogRecord
from sidecar.spool import disk, framing, pages, salvage, schema, wal
from sidecar.spool.divergence import single_bits
from sidecar.spool.framing import UNRESOLVED, Header
from sidecar.spool.ledger import Account, Ledger, Resolution
from sidecar.spool.leftovers import Row, dead_letter
from sidecar.spool.progress import Progress
from sidecar.spool.types import DeadLetter, Fate

_FRAME_COLUMNS: Final = 13
_LEFTOVER_COLUMNS: Final = 20
_FATES: Final[dict[int, Fate]] = {
    schema.DEFERRED: "deferred",
    schema.DEAD: "dead_lettered",
    schema.DISCARDED: "discarded",
    schema.QUARANTINED: "quarantined",
}


@dataclass(frozen=True, slots=True)
class FrameLine:
    """One frame, as ``ls`` shows it. An unresolved frame is owed to nobody yet."""

    seq: int
    phase: int
    records: int
    size: int  # bytes
    accepted_us: int
    first_us: int  # smallest and largest log_timestamp
    last_us: int
    owed: frozenset[str]
    required: frozenset[str]
    settled: frozenset[str]
    unresolved: bool
    sound: bool  # False: the header's checksum fails, nothing above is to be trusted


class Held(NamedTuple):
    """One record in a frame, as ``cat`` and ``export`` show it."""

    record: LogRecord
    seq: int
    accepted_us: int
    phase: int
    stores: dict[str, Fate]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What ``verify`` found; ``problems`` is empty where the next start will report nothing."""

    frames: int
    records: int
    leftovers: int
    owed: dict[str, int]  # records still owed, by store, deferred ones included
    problems: tuple[str, ...]


class StoppedSpool:
    """A spool whose sidecar does not run. Use as a context manager; holds the spool's lock meanwhile."""

    def __init__(self, directory: Path) -> None:
        """Open for reading.

        Raises:
            SpoolLocked: a sidecar runs; use its control API.
            SpoolRefused: there is no spool in the directory, or its schema cannot be read.
        """
        if not (directory / disk.DATABASE).exists():
            raise SpoolRefused(f"spool.directory: there is no {disk.DATABASE} in {directory}; check the path")
        self._lock = disk.Lock(directory)
        self._fd = os.open(directory / disk.DATABASE, os.O_RDONLY)
        log = next((each for name in (disk.WAL, disk.KEPT) if (each := directory / name).exists()), None)
        self._log = wal.walk(log.read_bytes() if log is not None else b"")
        self._overlay = {f.page: f for f in self._log.frames[: self._log.kept]}
        self._position = disk.Position.read(directory)
        self._roots = dict(salvage.roots(self._fetch))
        if not {"frames", "progress", "leftovers", "resolutions"} <= self._roots.keys():
            self.close()
            raise SpoolRefused(
                f"spool.directory: the schema of {directory / disk.DATABASE} cannot be read; start repairs it"
            )
        self.broken_tables: set[str] = set()
        self.progress = [row for row in self._progress() if row.sound]
        resolutions = [
            Resolution(rowid, *columns[1:])  # type: ignore[arg-type]  # four numbers
            for rowid, columns in self._rows("resolutions")
        ]
        accounts = [Account(row.name, 1 << row.bit, row.marks, row.strengthened) for row in self.progress]
        self.ledger = Ledger(accounts, resolutions, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the spool."""
        os.close(self._fd)
        self._lock.release()

    # --- pages -----------------------------------------------------------------------------------------------------

    def _fetch(self, number: int) -> bytes | None:
        frame = self._overlay.get(number)
        return self._log.image(frame) if frame is not None else salvage.read_page(self._fd, number)

    def _rows(self, table: str) -> Iterator[tuple[int, list[pages.Value]]]:
        numbers, whole = pages.leaves(self._roots[table], self._fetch)
        if not whole:
            self.broken_tables.add(table)
        for number in numbers:
            page = self._fetch(number)
            if page is not None:
                yield from pages.rows(page, number, self._fetch)

    def _progress(self) -> Iterator[Progress]:
        for rowid, columns in self._rows("progress"):
            if len(columns) == len(Progress._fields):
                yield Progress(rowid, *columns[1:])  # type: ignore[arg-type]  # its checksum covers the types too

    def _frames(self) -> Iterator[tuple[Header, bytes]]:
        for rowid, columns in self._rows("frames"):
            if len(columns) == _FRAME_COLUMNS:
                *small, body = columns[1:]
                yield Header(rowid, *small), body if isinstance(body, bytes) else b""  # type: ignore[arg-type]

    def _leftovers(self) -> Iterator[Row]:
        for rowid, columns in self._rows("leftovers"):
            if len(columns) == _LEFTOVER_COLUMNS:
                yield Row(rowid, *columns[1:])  # type: ignore[arg-type]  # in the order of the table

    def _effective(self, raw: Header) -> Header:
        """With what was decided later, for the stores whose account can be read."""
        known = sum(self.ledger.by_mask)
        return self.ledger.effective(raw._replace(owed=raw.owed & known, required=raw.required & known))

    # --- what is asked ---------------------------------------------------------------------------------------------

    def frames(self) -> Iterator[FrameLine]:
        """Every frame in the file, oldest first (``ls``)."""
        for raw, _ in self._frames():
            sound = raw.sound
            header = self._effective(raw) if sound else raw
            settled = self.ledger.settled(header) if sound else 0
            names = self.ledger.names
            yield FrameLine(
                raw.seq,
                header.phase,
                header.n,
                header.size,
                header.accepted_us,
                header.t0,
                header.t1,
                names(header.owed) if sound else frozenset(),
                names(header.required) if sound else frozenset(),
                names(settled) if sound else frozenset(),
                bool(sound and header.flags & UNRESOLVED),
                sound,
            )

    def records(self, *, pending_for: str | None = None, log_id: str | None = None) -> Iterator[Held]:
        """Records in frames, oldest first (``cat``, ``export``); those still owed to a store, or one id.

        Deferred records and dead letters whose frame has left are in :meth:`letters`.
        """
        exceptions: dict[tuple[int, int], dict[str, Fate]] = {}
        for row in self._leftovers():
            if row.state in _FATES:
                exceptions.setdefault((row.seq, row.idx), {})[row.store] = _FATES[row.state]
        wanted = bytes.fromhex(log_id.replace("-", "")) if log_id is not None else None
        for raw, body in self._frames():
            if not raw.sound or (wanted is not None and framing.find(raw, wanted) is None):
                continue
            header = self._effective(raw)
            settled = self.ledger.settled(header)
            owed = 0 if header.flags & UNRESOLVED else header.owed
            whole: dict[str, Fate] = {
                self.ledger.by_mask[bit].name: "delivered" if settled & bit else "pending" for bit in single_bits(owed)
            }
            unpacked = framing.unpack(header, body)
            for index, record in zip(unpacked.indexes, unpacked.records, strict=True):
                stores = whole | exceptions.get((header.seq, index), {})
                if wanted is not None and record.log_id != (log_id or "").lower():
                    continue
                if pending_for is None or stores.get(pending_for) == "pending":
                    yield Held(record, header.seq, header.accepted_us, header.phase, stores)

    def letters(self, *, deferred: bool = False) -> Iterator[DeadLetter]:
        """Dead letters, or deferred records, in the order of their keys."""
        wanted = schema.DEFERRED if deferred else schema.DEAD
        return (dead_letter(row) for row in self._leftovers() if row.state == wanted)

    def verify(self) -> Verdict:
        """Check every checksum there is."""
        problems = []
        records = frames = damaged = unsound = 0
        owed: Counter[str] = Counter()
        for raw, body in self._frames():
            frames += 1
            if not raw.sound:
                unsound += 1
                continue
            unpacked = framing.unpack(raw, body)
            records += raw.n
            damaged += len(unpacked.damaged)
            header = self._effective(raw)
            if not header.flags & UNRESOLVED:
                for name in self.ledger.names(header.owed & ~self.ledger.settled(header)):
                    owed[name] += raw.n
        leftovers = 0
        for row in self._leftovers():
            leftovers += 1
            owed[row.store] += row.state == schema.DEFERRED
            if row.state in (schema.DEFERRED, schema.DEAD) and row.store != schema.DOOR and row.record is None:
                damaged += 1
        unsound_progress = sum(not row.sound for row in self._progress())
        found = (
            (damaged, "records with a failing checksum"),
            (unsound, "frames with a damaged header"),
            (unsound_progress, "damaged rows of progress"),
            (self._log.transactions_lost, f"commits behind a bad frame of {disk.WAL}"),
            (len(self.broken_tables), f"tables with damaged pages: {', '.join(sorted(self.broken_tables))}"),
        )
        problems += [f"{n} {what}" for n, what in found if n]
        return Verdict(frames, records, leftovers, dict(+owed), tuple(problems))

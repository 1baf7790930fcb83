"""An external merge sort in bounded memory and on a bounded disk; knows nothing of what it sorts.

``RUN_ENTRIES`` at a time are sorted and written to an anonymous temporary file (TMPDIR), ``MERGE_RUNS`` files are
merged into one when there are as many, and the answer is read from a merge of what is left. Fewer than ``RUN_ENTRIES``
touch no file. Where the disk does not hold all, the largest are dropped, and ``ceiling`` says up to where the answer is
whole.

FILE: entries one after the other, each 2 bytes length (big-endian), then its bytes.
"""

import asyncio
import heapq
import struct
import tempfile
from collections.abc import Iterator
from itertools import islice, takewhile
from typing import BinaryIO, Final

RUN_ENTRIES: Final = 8_192  # 100 bytes each in memory; sorted in 2 ms, in which no other thread of Python's runs
MERGE_RUNS: Final = 64
CHUNK_ENTRIES: Final = 2_000
_LENGTH: Final = struct.Struct(">H")
_ENTRY_BYTES: Final = 91  # of one in a file
_PEAK: Final = 2.1  # a merge holds what it reads and what it writes, and a run is on its way


class Sorter:
    """An external merge sort of the smallest entries above ``floor`` that fit on the disk."""

    def __init__(self, disk_bytes: int, floor: bytes) -> None:
        """``ceiling`` is the largest entry kept, once larger ones were dropped; None where none was."""
        self.ceiling: bytes | None = None
        self._floor = floor
        self._most = max(RUN_ENTRIES, int(disk_bytes / _ENTRY_BYTES / _PEAK))
        self._spilled = 0
        self._buffer: list[bytes] = []
        self._runs: list[BinaryIO] = []
        self._spilling = asyncio.Lock()

    async def add(self, entries: list[bytes]) -> None:
        """Take entries in any order. Raises OSError."""
        if self._floor or self.ceiling is not None:
            entries = [e for e in entries if self._floor < e and (self.ceiling is None or e <= self.ceiling)]
        self._buffer += entries
        async with self._spilling:
            while len(self._buffer) >= RUN_ENTRIES:  # others may have added while this one waited
                full, self._buffer = self._buffer[:RUN_ENTRIES], self._buffer[RUN_ENTRIES:]
                if self.ceiling is not None:
                    full = [entry for entry in full if entry <= self.ceiling]
                if full:
                    await asyncio.to_thread(self._spill, full)

    def merged(self) -> Iterator[bytes]:
        """All entries in order; call it once, after the last ``add``."""
        self._buffer.sort()
        merged = heapq.merge(*(_read(run) for run in self._runs), self._buffer)
        return merged if self.ceiling is None else takewhile(self.ceiling.__ge__, merged)

    def close(self) -> None:
        """Give the temporary files back."""
        for run in self._runs:
            run.close()

    def _spill(self, entries: list[bytes]) -> None:
        entries.sort()
        self._runs.append(_write(iter(entries)))
        self._spilled += len(entries)
        full = self._spilled > self._most
        if full or len(self._runs) == MERGE_RUNS:
            runs, self._runs = self._runs, []
            try:
                merged: Iterator[bytes] = heapq.merge(*(_read(run) for run in runs))
                kept = _Lowest(merged, self._most * 3 // 4 if full else None)
                self._runs.append(_write(iter(kept)))
                self._spilled = kept.number
                if full:  # only now: entries that come in meanwhile are judged by the bound that holds
                    self.ceiling = kept.last
            finally:
                for run in runs:
                    run.close()


class _Lowest:
    """The first ``most`` of ascending entries (None: all); after it was iterated, how many and which was the last."""

    def __init__(self, entries: Iterator[bytes], most: int | None) -> None:
        self._entries = islice(entries, most)
        self.number = 0
        self.last: bytes | None = None

    def __iter__(self) -> Iterator[bytes]:
        for entry in self._entries:
            self.number += 1
            self.last = entry
            yield entry


def _write(entries: Iterator[bytes]) -> BinaryIO:
    file = tempfile.TemporaryFile(prefix="sidecar-scan-")  # noqa: SIM115  (the sorter closes it)
    try:
        while chunk := list(islice(entries, CHUNK_ENTRIES)):
            file.write(b"".join([_LENGTH.pack(len(entry)) + entry for entry in chunk]))
        file.seek(0)
    except BaseException:  # whatever it is goes on; the file must not stay open
        file.close()
        raise
    return file


def _read(file: BinaryIO) -> Iterator[bytes]:
    while head := file.read(_LENGTH.size):
        yield file.read(_LENGTH.unpack(head)[0])

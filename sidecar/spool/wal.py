"""Walking SQLite's write-ahead log before SQLite does (file format: sqlite.org/fileformat2.html, section 4).

SQLite takes frames up to the first one whose salts or cumulative checksum do not fit and silently drops the rest. Here
every frame of the current generation is checked by itself, with the checksum stored in the frame before it as the
seed, so that one damaged page does not hide those behind it.

Every commit is fsynced before the next one is written. So a failure *inside the last transaction* may be a write that
a kill or a power cut interrupted, never acknowledged; a failure with a later transaction behind it is damage.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

HEADER_BYTES: Final = 32
_FRAME_HEADER: Final = struct.Struct(">IIIIII")  # page, size after commit, two salts, two checksums
_HEADER: Final = struct.Struct(">IIIIIIII")
_MAGIC: Final = 0x377F0682  # the lowest bit says: checksums of big-endian words
_VERSION: Final = 3_007_000
_MASK: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class LogFrame:
    """One page image in the log."""

    page: int
    commits: bool
    good: bool
    at: int  # offset of the page image


@dataclass(frozen=True, slots=True)
class Walk:
    """What a log holds."""

    data: bytes
    page_size: int
    frames: Sequence[LogFrame]  # of the current generation, in order
    kept: int  # how many of them SQLite will recover: up to the last commit before the first failure
    transactions_lost: int  # commits behind that point

    @property
    def torn(self) -> bool:
        """Only the last transaction is hurt: a kill or a power cut does that, and then nobody was answered."""
        return self.transactions_lost == 1

    @property
    def damaged(self) -> bool:
        """Committed transactions stand behind a failure."""
        return self.transactions_lost > 1

    @property
    def bad_frames(self) -> int:
        """Frames whose checksum fails."""
        return sum(not f.good for f in self.frames)

    def image(self, frame: LogFrame) -> bytes:
        """The page image of a frame."""
        return self.data[frame.at : frame.at + self.page_size]


def checksum(data: bytes | memoryview, seed: tuple[int, int], *, big: bool) -> tuple[int, int]:
    """SQLite's checksum of a multiple of 8 bytes."""
    s0, s1 = seed
    words = struct.unpack(f"{'>' if big else '<'}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        s0 = (s0 + even + s1) & _MASK
        s1 = (s1 + odd + s0) & _MASK
    return s0, s1


def walk(data: bytes) -> Walk:
    """Check a log, given as its bytes. Never raises, whatever they are."""
    if len(data) < HEADER_BYTES:
        return Walk(data, 4096, (), 0, 0)
    magic, version, page_size, _, salt1, salt2, sum1, sum2 = _HEADER.unpack_from(data)
    big = bool(magic & 1)
    sound = (
        magic & ~1 == _MAGIC
        and version == _VERSION
        and 512 <= page_size <= 65536  # noqa: PLR2004  (SQLite's bounds)
        and checksum(data[:24], (0, 0), big=big) == (sum1, sum2)
    )
    if not sound:  # take the shape from the file's own frames: ours have 4 KiB pages and little-endian sums
        page_size, big = 4096, False
        if len(data) >= HEADER_BYTES + _FRAME_HEADER.size:
            salt1, salt2 = _FRAME_HEADER.unpack_from(data, HEADER_BYTES)[2:4]
    frames: list[LogFrame] = []
    seed: tuple[int, int] = (sum1, sum2)
    broken = not sound
    kept = lost = 0
    view = memoryview(data)
    step = _FRAME_HEADER.size + page_size
    pending: list[LogFrame] = []  # since a gap of frames with other salts: they count only if ours follow
    for at in range(HEADER_BYTES, len(data) - step + 1, step):
        page, size, s1, s2, c1, c2 = _FRAME_HEADER.unpack_from(data, at)
        body = at + _FRAME_HEADER.size
        if (s1, s2) != (salt1, salt2):
            pending.append(LogFrame(page, bool(size), good=False, at=body))
            seed = (c1, c2)
            continue
        if pending:  # our frames go on behind something that is not ours: that was one of ours
            frames += pending
            lost += sum(f.commits for f in pending)
            pending = []
            broken = True
        total = checksum(view[at : at + 8], seed, big=big)
        total = checksum(view[body : body + page_size], total, big=big)
        seed = (c1, c2)
        good = total == seed and page > 0
        broken = broken or not good
        frames.append(LogFrame(page, bool(size), good, body))
        if size and broken:
            lost += 1
        elif size:
            kept = len(frames)
    return Walk(data, page_size, frames, kept, lost)

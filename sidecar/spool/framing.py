"""The bytes of a frame: how records are packed for the file, and checked when they are read back.

Body: for each record ``[u32 length][u32 crc32][msgpack bytes]``, little-endian. Index (column ``ids``): n 16-byte ids,
then n u32 lengths. The header's crc32 covers the small columns and the index, so that a flipped obligation or length
is noticed; each record has a checksum of its own, so that one damaged record takes no neighbour with it. Lengths stand
twice: with a sound index a damaged length in the body costs nothing.
"""

import contextlib
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Final, NamedTuple
from zlib import crc32

import msgspec

from sidecar.record import LogRecord, decode

MAX_RECORDS: Final = 1_000
MAX_BYTES: Final = 4 * 1024 * 1024
UNRESOLVED: Final = 1  # flag: to whom the frame is owed is decided later
PREFIX: Final = struct.Struct("<II")
HEADER_COLUMNS: Final = "seq, phase, owed, required, flags, n, bytes, accepted_us, t0, t1, crc, ids"
_ID: Final = 16
SMALL: Final = struct.Struct("<QqQQIIQqqq")


class Header(NamedTuple):
    """The small columns of a frame, in the order of ``HEADER_COLUMNS``."""

    seq: int
    phase: int
    owed: int  # bit mask of stores
    required: int  # bit mask, a part of owed
    flags: int
    n: int
    size: int  # bytes of the body
    accepted_us: int
    t0: int  # smallest and largest log_timestamp, microseconds
    t1: int
    crc: int
    ids: bytes

    @property
    def sound(self) -> bool:
        """True where the checksum fits and the index has the right length."""
        try:
            return len(self.ids) == 20 * self.n and self.crc == checksum(self[:10], self.ids)
        except (struct.error, TypeError):  # damage made a column NULL, text or out of range
            return False


class Chunk(NamedTuple):
    """Records of one append, packed; joined with others of the same obligation into a frame."""

    records: Sequence[LogRecord]
    sizes: Sequence[int]
    ids: bytes
    lengths: bytes
    body: bytes
    t0: int
    t1: int


class Entry(NamedTuple):
    """A committed frame with its decoded records, as the tail cache holds it."""

    header: Header
    records: Sequence[LogRecord]
    sizes: Sequence[int]


class Damaged(NamedTuple):
    """A record whose checksum failed: its place in the frame and the bytes found there."""

    idx: int
    raw: bytes


class Unpacked(NamedTuple):
    """What came back from a body."""

    records: list[LogRecord]
    sizes: list[int]
    indexes: Sequence[int]
    damaged: list[Damaged]


def checksum(small: tuple[int, ...], ids: bytes) -> int:
    """crc32 of a frame's ten small columns (seq to t1) and its index."""
    return crc32(ids, crc32(SMALL.pack(*small)))


def pack(records: Sequence[LogRecord], encoded: Sequence[bytes]) -> list[Chunk]:
    """Pack one append: one chunk, or several where it is over the bounds of a frame.

    Raises ValueError where ids are not UUIDs or the two sequences differ in length.
    """
    sizes = list(map(len, encoded))
    if len(records) <= MAX_RECORDS and sum(sizes) + 8 * len(sizes) <= MAX_BYTES:
        return [_chunk(records, encoded, sizes)]
    chunks = []
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and (i - start >= MAX_RECORDS or total + size + 8 > MAX_BYTES):
            chunks.append(_chunk(records[start:i], encoded[start:i], sizes[start:i]))
            start, total = i, 0
        total += size + 8
    chunks.append(_chunk(records[start:], encoded[start:], sizes[start:]))
    return chunks


def _chunk(records: Sequence[LogRecord], encoded: Sequence[bytes], sizes: list[int]) -> Chunk:
    stamps = [r.log_timestamp for r in records]
    ids = bytes.fromhex("".join([r.log_id for r in records]).replace("-", ""))
    if len(ids) != _ID * len(sizes):
        raise ValueError("append: every record needs a UUID and its stored form")
    prefixes = map(PREFIX.pack, sizes, map(crc32, encoded))
    body = b"".join(chain.from_iterable(zip(prefixes, encoded, strict=True)))
    return Chunk(records, sizes, ids, struct.pack(f"<{len(sizes)}I", *sizes), body, min(stamps), max(stamps))


def find(header: Header, log_id: bytes) -> int | None:
    """The index of ``log_id`` (16 bytes) in the frame, None where it is not there."""
    return find_id(header.ids, header.n, log_id)


def find_id(ids: bytes | bytearray, n: int, log_id: bytes) -> int | None:
    """The index of ``log_id`` among n packed ids, None where it is not there."""
    at = ids.find(log_id, 0, _ID * n)
    while at >= 0 and at % _ID:
        at = ids.find(log_id, at + 1, _ID * n)
    return None if at < 0 else at // _ID


def lengths(header: Header) -> tuple[int, ...]:
    """The stored size of each record in bytes."""
    return struct.unpack_from(f"<{header.n}I", header.ids, _ID * header.n)


def seal(small: tuple[int, ...], ids: bytes) -> Header:
    """The header of a frame: its ten small columns (seq to t1) and its index, with their checksum."""
    return Header._make((*small, checksum(small, ids), ids))


def scan(body: bytes) -> list[LogRecord]:
    """The sound records of a body without a trusted header, by the lengths in the body, up to the first bad length."""
    records: list[LogRecord] = []
    at = 0
    while at + PREFIX.size <= len(body):
        size, crc = PREFIX.unpack_from(body, at)
        raw = body[at + PREFIX.size : at + PREFIX.size + size]
        if len(raw) == size and crc32(raw) == crc:
            with contextlib.suppress(msgspec.MsgspecError):
                records.append(decode(raw))
        at += PREFIX.size + size
    return records


def unpack(header: Header, body: bytes) -> Unpacked:
    """Decode the body of a frame with a sound header; damaged records are set apart."""
    records: list[LogRecord] = []
    sizes: list[int] = []
    indexes: list[int] = []
    damaged: list[Damaged] = []
    view = memoryview(body)
    at = 0
    for i, size in enumerate(lengths(header)):
        raw = view[at + 8 : at + 8 + size]
        try:
            if crc32(raw) != PREFIX.unpack_from(body, at)[1]:
                raise ValueError  # noqa: TRY301  (one way out for all three kinds of damage)
            records.append(decode(raw))
        except (ValueError, struct.error, msgspec.MsgspecError):
            damaged.append(Damaged(i, bytes(view[at : at + 8 + size])))
        else:
            sizes.append(size)
            indexes.append(i)
        at += 8 + size
    return Unpacked(records, sizes, indexes, damaged)

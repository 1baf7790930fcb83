"""The newest frames, decoded, so that a store which keeps up never reads the file; and ids of frames that have left."""

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from sidecar.spool.framing import Entry, Header, find, find_id

_BLOCK_IDS: Final = 4_096
_RING_IDS: Final = 100_000


class Tail:
    """Every live frame with seq >= ``first`` is here, or settled by all; bounded in bytes of stored records.

    Decoded records take two to three times their stored bytes. Where a store has a longer way to go in the file than
    this cache reaches back, holding frames for it would only cost memory, when memory is short: see ``Spool``.
    """

    def __init__(self, limit: int, first: int) -> None:
        self._limit = limit
        self._entries: dict[int, Entry] = {}
        self._bytes = 0
        self.first = first

    def add(self, entry: Entry) -> None:
        """Add a committed frame and drop the oldest over the bound."""
        self._entries[entry.header.seq] = entry
        self._bytes += entry.header.size
        while self._bytes > self._limit and self._entries:
            seq = next(iter(self._entries))
            self.drop(seq)
            self.first = seq + 1

    def get(self, seq: int) -> Entry | None:
        """The frame, None where it is not here."""
        return self._entries.get(seq)

    def drop(self, seq: int) -> None:
        """Forget a frame; unknown ones are fine."""
        entry = self._entries.pop(seq, None)
        if entry is not None:
            self._bytes -= entry.header.size

    @property
    def worth_trimming(self) -> bool:
        """Whether more than an eighth of the bound is in use: less is not worth a look at every commit."""
        return self._bytes > self._limit // 8

    @property
    def size(self) -> int:
        """Bytes of stored records that are here."""
        return self._bytes

    @property
    def limit(self) -> int:
        """The bound, bytes."""
        return self._limit

    def forget(self, upto: int) -> None:
        """Drop the frames up to a number: whoever needs one of them reads it back from the file."""
        while self._entries and (seq := next(iter(self._entries))) <= upto:
            self.drop(seq)
        self.first = max(self.first, upto + 1)

    def find(self, log_id: bytes) -> tuple[Header, int] | None:
        """The newest frame here that holds an id, and the record's index."""
        for entry in reversed(self._entries.values()):
            index = find(entry.header, log_id)
            if index is not None:
                return entry.header, index
        return None


@dataclass(slots=True)
class _Block:
    ids: bytearray = field(default_factory=bytearray)
    starts: list[int] = field(default_factory=list)  # in ids
    headers: list[Header] = field(default_factory=list)  # without their index


class Ring:
    """Ids of frames that were trimmed lately, so that status answers for a short while after full delivery."""

    def __init__(self, limit: int = _RING_IDS) -> None:
        self._limit = limit
        self._blocks: deque[_Block] = deque()
        self._count = 0

    def add(self, header: Header) -> None:
        """Remember a frame that every store has settled."""
        if not self._blocks or len(self._blocks[-1].ids) >= 16 * _BLOCK_IDS:
            self._blocks.append(_Block())
        block = self._blocks[-1]
        block.starts.append(len(block.ids) // 16)
        block.headers.append(header._replace(ids=b""))
        block.ids += header.ids[: 16 * header.n]
        self._count += header.n
        while self._count > self._limit and len(self._blocks) > 1:
            self._count -= len(self._blocks.popleft().ids) // 16

    def find(self, log_id: bytes) -> tuple[Header, int] | None:
        """The newest remembered frame with an id (its header without the index), and the record's index."""
        for block in reversed(self._blocks):
            at = find_id(block.ids, len(block.ids) // 16, log_id)
            if at is not None:
                i = bisect_right(block.starts, at) - 1
                return block.headers[i], at - block.starts[i]
        return None

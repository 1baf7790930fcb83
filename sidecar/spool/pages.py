"""Reading rows straight from the pages of an SQLite file (sqlite.org/fileformat2.html, sections 1.6 and 2.1).

For files that SQLite itself refuses. Whatever the bytes are, nothing is raised; a cell that makes no sense is left out.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Final

Value = int | float | str | bytes | None
Fetch = Callable[[int], bytes | None]

PAGE: Final = 4096
_LEAF: Final = 0x0D
_INTERIOR: Final = 0x05
_INTEGERS: Final = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
_DAMAGE: Final = (IndexError, struct.error, ValueError, OverflowError)


def is_leaf(page: bytes, number: int) -> bool:
    """True for a leaf of a table's tree."""
    return page[_start(number)] == _LEAF


def _start(number: int) -> int:
    return 100 if number == 1 else 0


def _pointers(page: bytes, number: int, header: int) -> Iterator[int]:
    start = _start(number)
    (cells,) = struct.unpack_from(">H", page, start + 3)
    for i in range(min(cells, (PAGE - start - header) // 2)):
        yield struct.unpack_from(">H", page, start + header + 2 * i)[0]


def leaves(root: int, fetch: Fetch) -> tuple[list[int], bool]:
    """The leaf pages under a root, and whether every page on the way made sense."""
    found: list[int] = []
    whole = True
    todo, seen = [root], set[int]()
    while todo:
        number = todo.pop()
        page = fetch(number)
        if number in seen or page is None:
            whole = False
            continue
        seen.add(number)
        kind = page[_start(number)]
        if kind == _LEAF:
            found.append(number)
        elif kind == _INTERIOR:
            try:
                children = [struct.unpack_from(">I", page, at)[0] for at in _pointers(page, number, 12)]
                children.append(struct.unpack_from(">I", page, _start(number) + 8)[0])
            except struct.error:
                whole = False
                continue
            todo += reversed(children)
        else:
            whole = False
    return found, whole


def rows(page: bytes, number: int, fetch: Fetch) -> Iterator[tuple[int, list[Value]]]:
    """(rowid, columns) of the cells of a leaf. Missing overflow pages read as zeros, for checksums to find."""
    try:
        pointers = list(_pointers(page, number, 8))
    except struct.error:
        return
    for at in pointers:
        try:
            row = _cell(page, at, fetch)
        except _DAMAGE:
            continue
        yield row


def _cell(page: bytes, at: int, fetch: Fetch) -> tuple[int, list[Value]]:
    size, at = _varint(page, at)
    rowid, at = _varint(page, at)
    most = PAGE - 35
    local = size
    if size > most:
        least = (PAGE - 12) * 32 // 255 - 23
        local = least + (size - least) % (PAGE - 4)
        if local > most:
            local = least
    if at + local > PAGE or size > 1 << 30:
        raise ValueError("a cell reaches over its page")
    payload = page[at : at + local]
    if local < size:
        (following,) = struct.unpack_from(">I", page, at + local)
        payload += _overflow(following, size - local, fetch)
    return rowid, _columns(payload)


def _overflow(number: int, size: int, fetch: Fetch) -> bytes:
    parts: list[bytes] = []
    left = size
    while left > 0:
        page = fetch(number) if number else None
        if page is None:
            parts.append(bytes(left))
            break
        parts.append(page[4 : 4 + left])
        left -= PAGE - 4
        (number,) = struct.unpack_from(">I", page)
    return b"".join(parts)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i in range(8):
        byte = data[at + i]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:  # noqa: PLR2004  (the last byte of a varint has its top bit clear)
            return value, at + i + 1
    value = value << 8 | data[at + 8]
    return value - (1 << 64) if value >= 1 << 63 else value, at + 9


def _columns(payload: bytes) -> list[Value]:
    header, at = _varint(payload, 0)
    if not 0 < header <= len(payload):
        raise ValueError("a record's header reaches over its end")
    kinds = []
    while at < header:
        kind = payload[at]
        if kind < 0x80:  # noqa: PLR2004  (the usual varint of one byte)
            at += 1
        else:
            kind, at = _varint(payload, at)
        kinds.append(kind)
    values: list[Value] = []
    for kind in kinds:
        size = _INTEGERS.get(kind)
        if size is not None:
            values.append(int.from_bytes(payload[at : at + size], "big", signed=True))
        else:
            value, size = _value(kind, payload, at)
            values.append(value)
        at += size
    if at > len(payload):
        raise ValueError("a record is cut short")
    return values


def _value(kind: int, payload: bytes, at: int) -> tuple[Value, int]:
    if kind >= 12:  # noqa: PLR2004  (serial types of the format: even = blob, odd = text)
        size = (kind - 12) // 2
        raw = payload[at : at + size]
        return (raw.decode(errors="replace") if kind % 2 else raw), size
    if kind == 7:  # noqa: PLR2004
        return struct.unpack_from(">d", payload, at)[0], 8
    if kind in (0, 8, 9):
        return (None, 0, 1)[0 if kind == 0 else kind - 7], 0
    raise ValueError("a reserved serial type")

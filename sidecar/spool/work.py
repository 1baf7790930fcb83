"""What the event loop asks of the database thread, and the figures that it sends back."""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sidecar.spool.framing import Chunk

Run = Callable[[sqlite3.Connection], Any]


class Key(NamedTuple):
    """What the records of one frame have in common."""

    phase: int
    owed: int
    required: int
    flags: int


@dataclass(slots=True, eq=False)
class Append:
    """Records of one call, all in one commit."""

    key: Key
    chunks: Sequence[Chunk]
    seen: bytes
    size: int
    future: "asyncio.Future[tuple[int, ...]]"
    seqs: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Write:
    """Something to do inside the next transaction; ``done`` is called on the loop with what ``run`` returned."""

    run: Run
    future: "asyncio.Future[Any]"
    done: Callable[[Any], None] | None = None
    refusable: bool = False  # may be given up with Busy when there is no room
    marks: int = 0  # only marks, which a crash may lose: their generation (from 1); 0 for everything else
    measured: bool = False  # admission is to know at once what room it made


@dataclass(slots=True, eq=False)
class Read:
    """Something to look up, outside a transaction, after the writes that were asked for before."""

    run: Run
    future: "asyncio.Future[Any]"
    done: None = None


class Stop:
    """The last thing in the queue: checkpoint, close."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What admission decides by."""

    used: int  # bytes: live pages and the write-ahead log
    disk_free: int
    ballast: bool  # whole, or switched off
    commit_seconds: float
    stuck: str  # "", or why marks find no room: "spool_full", "disk_full"

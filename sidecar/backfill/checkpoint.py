"""How far a run has come, kept where every later process finds it; and what an operator ordered.

THE PLACE is DynamoDB's fleet table, for both directions: a pod's file is gone with the pod, a copy needs both stores
anyway, and nobody needs another table or another right. One item for each (job, shard), one for the orders.

INVARIANTS

* A checkpoint is written after what it says is stored, never before: after kill -9 some records are copied again, as
  conditional puts that change nothing.
* Every write is a compare-and-set on the version that this process wrote or took over last. So of two processes with
  the same shard only the one that took over last goes on; the other one fails at its next write. Both are harmless:
  all they do is put what is not there.
* A process that finds a checkpoint which somebody else holds watches it for ``QUIET_SECONDS``. Where it changes
  meanwhile, the holder is alive and the newcomer gives up; a holder of the same machine whose process is gone is not
  waited for, nor is one that ended in order.
"""

import asyncio
import os
import socket
from collections.abc import Sequence
from typing import Final, Literal, Protocol

import msgspec

from sidecar.backfill.hours import Run
from sidecar.clock import Clock
from sidecar.errors import RetryClass, StoreError
from sidecar.phase import DYNAMODB
from sidecar.stores.base import Position

SAVE_SECONDS: Final = 2.0
QUIET_SECONDS: Final = 5 * SAVE_SECONDS
MOST_REFUSALS: Final = 500  # that are named with their id
ORDERS: Final = "orders"
_POLL_SECONDS: Final = 1.0

Stage = Literal["survey", "copy", "verify", "done"]


class Refusal(msgspec.Struct, frozen=True):
    """A record that the destination would not take, or did not."""

    log_id: str
    reason: str


class Checkpoint(msgspec.Struct, kw_only=True):
    """All that a later process needs to go on; JSON, fields are only ever added."""

    run: str
    holder: str = ""  # host:pid of the process at work; empty: it ended in order
    stage: Stage = "survey"
    started_us: int = 0
    saved_us: int = 0
    finished_us: int | None = None
    reached: int | None = None  # survey, verify: log_timestamp up to which the walk is done
    position: Position | None = None  # copy in one stream: the last record that is stored
    runs: list[Run] = []  # hours with something to copy
    looked_at: int = 0  # records of the source that the survey saw
    missing: int = 0  # of them, not in the destination then
    copied: int = 0
    present: int = 0  # met by the copy, and there already
    refused: dict[str, int] = {}  # by reason
    refusals: list[Refusal] = []  # the first of them
    below: int = 0  # copy by hours: all hours with a lower order are done
    open_hours: dict[int, Position | None] = {}  # those above that are under way or done; None: from the beginning
    done_hours: list[int] = []  # of them, those that are done
    left: int = 0  # verify: records still missing
    differing: int = 0  # verify: records that are there with other content
    young: int = 0  # verify: of those missing, too new to be called so
    closed: int = 0  # records of gap lines that were closed

    dry: bool = False

    @property
    def good(self) -> bool:
        """All of it is in the destination, proved, and nothing was refused; live traffic's newest may be on its way.

        Of a dry run: nothing would be refused.
        """
        missing = not self.dry and self.left > self.young
        return self.stage == "done" and not (self.refused or missing or self.differing)

    def refuse(self, refusal: Refusal, kind: str) -> None:
        """Keep what was refused; ``kind`` is the reason without the size.

        A part that is done again after a failure meets the same records; of those that are named none counts twice.
        """
        if any(known.log_id == refusal.log_id for known in self.refusals):
            return
        self.refused[kind] = self.refused.get(kind, 0) + 1
        if len(self.refusals) < MOST_REFUSALS:
            self.refusals.append(refusal)


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator wants of every process at work."""

    paused_by: str | None = None
    reason: str = ""
    rate: float | None = None  # records/s of each process; None: as it was started


class JobStore(Protocol):
    """Small values by name, with compare-and-set. Every method raises StoreError."""

    async def read(self, key: str) -> tuple[bytes, int] | None:
        """Value and version; sees every write that was answered before."""
        ...

    async def write(self, key: str, value: bytes, expected: int) -> bool:
        """Replace the value of version ``expected`` (0: there is none) by version ``expected + 1``; False: it is not.

        A write that failed with StoreError may have been done.
        """
        ...

    async def all(self, prefix: str) -> Sequence[tuple[str, bytes]]:
        """Every value whose key begins with ``prefix``."""
        ...


def parse(value: bytes) -> Checkpoint:
    """What was kept. Raises StoreError: BLOCKED where it is no checkpoint."""
    try:
        return msgspec.json.decode(value, type=Checkpoint)
    except msgspec.DecodeError:
        raise StoreError(
            DYNAMODB,
            RetryClass.BLOCKED,
            "a checkpoint in the fleet table is unreadable: run that shard with --restart",
            "Checkpoint",
        ) from None


def holder() -> str:
    """This process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def _gone(name: str) -> bool:
    """Whether a holder is a process of this machine that has ended."""
    host, _, pid = name.rpartition(":")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return name == holder()  # the id came back to us


class Keeper:
    """One checkpoint and its place.

    Args:
        store: where.
        key: under which name.
        clock: for stamps and for watching.
    """

    def __init__(self, store: JobStore, key: str, clock: Clock) -> None:
        self._store = store
        self._key = key
        self._clock = clock
        self._version = 0
        self._unsure: bytes | None = None  # what was written and not answered
        self._writing = asyncio.Lock()

    async def take(self, run: str, *, dry: bool = False, restart: bool = False) -> Checkpoint:
        """The checkpoint of an unfinished run, or a new one; from now on it is ours.

        Raises:
            StoreError: CONFLICT where another process is at work on it; BLOCKED where it cannot be read.
        """
        found = await self._store.read(self._key)
        old = None if found is None or restart else parse(found[0])
        self._version = 0 if found is None else found[1]
        if old is not None and old.holder and not _gone(old.holder):
            await self._watch(old.holder)
        if old is None or old.stage == "done":
            old = Checkpoint(run=run, dry=dry, started_us=self._clock.now_us())
        await self.save(old)
        return old

    async def save(self, checkpoint: Checkpoint, *, leave: bool = False) -> None:
        """Write it; ``leave``: this process is done with it.

        Raises:
            StoreError: CONFLICT where another process took it over.
        """
        async with self._writing:
            await self._save(checkpoint, leave=leave)

    async def _save(self, checkpoint: Checkpoint, *, leave: bool) -> None:
        checkpoint.holder = "" if leave else holder()
        checkpoint.saved_us = self._clock.now_us()
        value = msgspec.json.encode(checkpoint)
        lost, self._unsure = self._unsure, value
        if not await self._store.write(self._key, value, self._version):
            found = await self._store.read(self._key)
            if found is None or found != (lost, self._version + 1):
                raise _taken("it was taken over by another process")
            self._version += 1  # our last write was done, and its answer lost
            if not await self._store.write(self._key, value, self._version):
                raise _taken("it was taken over by another process")
        self._version += 1
        self._unsure = None

    async def orders(self) -> Orders:
        """What is ordered now."""
        return await read_orders(self._store)

    async def _watch(self, who: str) -> None:
        until = self._clock.monotonic() + QUIET_SECONDS
        while self._clock.monotonic() < until:
            await self._clock.sleep(_POLL_SECONDS)
            found = await self._store.read(self._key)
            if found is not None and found[1] != self._version:
                raise _taken(f"{who} is at work on it")


def _taken(why: str) -> StoreError:
    return StoreError(DYNAMODB, RetryClass.CONFLICT, f"this shard's checkpoint is not ours: {why}", "CheckpointTaken")


def _orders(value: bytes) -> Orders:
    try:
        return msgspec.json.decode(value, type=Orders)
    except msgspec.DecodeError:
        raise StoreError(
            DYNAMODB, RetryClass.BLOCKED, "the orders in the fleet table are unreadable: delete them", "Orders"
        ) from None


async def read_orders(store: JobStore) -> Orders:
    """What is ordered now. Raises StoreError."""
    found = await store.read(ORDERS)
    return Orders() if found is None else _orders(found[0])


async def give_orders(store: JobStore, **changed: object) -> Orders:
    """Change some of the orders, whoever else does so at the same time. Raises StoreError."""
    while True:
        found = await store.read(ORDERS)
        now = Orders() if found is None else _orders(found[0])
        wanted = msgspec.structs.replace(now, **changed)
        if await store.write(ORDERS, msgspec.json.encode(wanted), 0 if found is None else found[1]):
            return wanted

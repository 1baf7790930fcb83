"""What the spool's tests share: records, settings, a manual clock, crash copies, the identity."""

import asyncio
import contextlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sidecar.clock import SystemClock
from sidecar.phase import DYNAMODB, POSTGRES
from sidecar.record import LogRecord, encode
from sidecar.settings import MIB, Dedup
from sidecar.settings import Spool as SpoolSettings
from sidecar.spool import Counters, Frame, Leftover, Obligation, Receipt, Seen, Spool

STORES = (POSTGRES, DYNAMODB)
SQL_ONLY = Obligation(0, frozenset({POSTGRES}))
DUAL = Obligation(1, frozenset({POSTGRES}), frozenset({DYNAMODB}))
BOTH = Obligation(2, frozenset({POSTGRES, DYNAMODB}))
DYNAMO = Obligation(3, frozenset({DYNAMODB}))
FENCED = Obligation(1, frozenset(), unresolved=True)
HOUR_US = 3_600_000_000


class ManualClock(SystemClock):
    """Wall and monotonic time that tests move; sleeping is real."""

    def __init__(self) -> None:
        self.wall_us = 1_800_000_000_000_000
        self.seconds = 1_000.0

    def now_us(self) -> int:
        return self.wall_us

    def monotonic(self) -> float:
        return self.seconds

    def pass_time(self, seconds: float) -> None:
        """Let both clocks go on."""
        self.seconds += seconds
        self.wall_us += int(seconds * 1_000_000)


def settings(**changes: object) -> SpoolSettings:
    """Settings for a test: any file system, no ballast."""
    return SpoolSettings(**{"allow_volatile": True, "ballast_bytes": 0} | changes)


def record(n: int = 0, *, size: int = 40, at_us: int = 1_700_000_000_000_000) -> LogRecord:
    """A record with a fresh id."""
    text = f"{n}:".ljust(size, "x")
    return LogRecord(str(uuid.uuid4()), n, "INFO", "orders", text, None, 200, True, None, 5, at_us + n, None, "someone")


def records(count: int, **kwargs: int) -> list[LogRecord]:
    """Several records."""
    return [record(n, **kwargs) for n in range(count)]


def open_spool(directory: Path, **kwargs: object) -> Spool:
    """Open with test settings; ``settings``, ``dedup``, ``stores``, ``clock``, ``connect`` may be given."""
    extra = {"connect": kwargs["connect"]} if "connect" in kwargs else {}
    return Spool.open(
        directory,
        kwargs.get("settings") or settings(),
        kwargs.get("dedup") or Dedup(),
        kwargs.get("stores") or STORES,
        kwargs.get("clock") or SystemClock(),
        **extra,
    )


@contextlib.asynccontextmanager
async def spool_at(directory: Path, **kwargs: object):
    """An open spool that is closed afterwards."""
    spool = open_spool(directory, **kwargs)
    try:
        yield spool
    finally:
        await spool.close()


async def put(
    spool: Spool, batch: Sequence[LogRecord], obligation: Obligation = BOTH, seen: Sequence[Seen] = ()
) -> Receipt:
    """Append records in their stored form."""
    return await spool.append(batch, [encode(r) for r in batch], obligation, seen)


async def take(spool: Spool, store: str, most: int = 10_000) -> list[Frame]:
    """All that a store can take now (there must be something)."""
    return list(await asyncio.wait_for(spool.cursor(store).take(most, 64 * MIB), 10))


async def take_now(spool: Spool, store: str) -> list[Frame]:
    """All that a store can take now, possibly nothing: frames come until everything pending is in hand."""
    out: list[Frame] = []
    held = 0
    while held < pending_in_frames(spool, store):
        more = await take(spool, store)
        out += more
        held += sum(len(f.records) for f in more)
    return out


def pending_in_frames(spool: Spool, store: str) -> int:
    """Records in frames that the store has not settled."""
    return spool.ledger.accounts[store].frame_records


async def deliver(spool: Spool, store: str) -> list[LogRecord]:
    """Take and settle everything that is pending for a store."""
    out: list[LogRecord] = []
    while pending_in_frames(spool, store):
        for frame in await take(spool, store):
            out += frame.records
            spool.cursor(store).settle(frame)
    return out


async def flushed(spool: Spool) -> None:
    """Wait until the marks are in the file."""
    spool.flush_now()
    await spool.write(lambda _: None)


def dead(position: int, retry_class: str = "permanent", reason: str = "refused") -> Leftover:
    """A leftover that becomes a dead letter."""
    return Leftover(position, "dead_letter", retry_class, reason, "22001")


def later(position: int, due_us: int = 0) -> Leftover:
    """A leftover that is tried again."""
    return Leftover(position, "deferred", "unknown", "odd", "XX", 1, due_us)


def balanced(counters: Counters) -> bool:
    """The identity of semantics, section 6."""
    return counters.owed == (
        counters.delivered
        + counters.pending
        + counters.dead_lettered
        + counters.released
        + counters.discarded
        + counters.quarantined
    )


def crash_copy(source: Path, target: Path) -> Path:
    """What a kill at this moment would leave: a copy of the files of a spool that is still open."""
    shutil.copytree(source, target)
    return target


@contextlib.contextmanager
def changed(path: Path) -> Iterator[bytearray]:
    """Edit a file's bytes in place."""
    data = bytearray(path.read_bytes())
    yield data
    path.write_bytes(data)


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for a condition."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)

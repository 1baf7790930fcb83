"""What one run copies, and which part of it is this process's.

The unit of everything is the UTC **hour** of log_timestamp, as in the gap ledger. A shard has the hours whose hash is
its own, so shards partition all hours of all time exactly, whatever range each of them sees; the same hours on every
machine; and no shard has all the nights. Within a shard hours are taken in the order of another hash: neighbouring
hours lie in one partition of DynamoDB's index by day, which is hot enough where live traffic writes.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Final

from sidecar.errors import ConfigError
from sidecar.phase import StoreName
from sidecar.stores.base import HOUR_US

_SHARD: Final = re.compile(r"([0-9]{1,4})/([0-9]{1,4})", re.ASCII)
FIRST_US: Final = -62_135_596_800_000_000  # 0001-01-01T00:00:00Z
END_US: Final = 253_402_300_800_000_000  # after the end of year 9999


def _hash(hour: int, purpose: bytes) -> int:
    return int.from_bytes(blake2b(b"%d" % hour, digest_size=8, person=purpose).digest())


@lru_cache(maxsize=1 << 16)
def spread(hour: int) -> int:
    """Which shard an hour falls to, before the division."""
    return _hash(hour, b"shard")


ORDER_END: Final = 1 << 63
"""Above the order of every hour."""


def order(hour: int) -> int:
    """Hours are copied in the order of this number, 63 bits."""
    return _hash(hour, b"order") >> 1


@dataclass(frozen=True, slots=True)
class Shard:
    """Part ``index`` of ``of``, counted from 0."""

    index: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """``2/8``: the third of eight. Raises ConfigError."""
        found = _SHARD.fullmatch(text)
        if found is None or int(found[1]) >= int(found[2]):
            raise ConfigError("--shard", seen=text, allowed="I/N with 0 <= I < N, e.g. 0/8 to 7/8")
        return cls(int(found[1]), int(found[2]))

    def holds(self, hour: int) -> bool:
        """Whether an hour (since the epoch) is of this shard."""
        return self.of == 1 or spread(hour) % self.of == self.index


@dataclass(frozen=True, slots=True)
class Job:
    """One run's share of the work. Times are microseconds since the epoch; ``end`` is exclusive."""

    source: StoreName
    destination: StoreName
    start: int = FIRST_US
    end: int = END_US
    shard: Shard = Shard()
    gaps_only: bool = False  # only hours in which the gap ledger says that the destination lacks records
    dry: bool = False  # look and rehearse, copy nothing

    @property
    def family(self) -> str:
        """What all shards of one job have in common."""
        kind = "dry" if self.dry else "copy"
        which = "gaps" if self.gaps_only else "all"
        return f"{kind}/{self.source}>{self.destination}/{self.start}..{self.end}/{which}/{self.shard.of}"

    @property
    def key(self) -> str:
        """Under which the checkpoint is kept."""
        return f"{self.family}/{self.shard.index}"

    def covers(self, hour: int) -> bool:
        """Whether the whole of an hour is of this job: only then can it be said to be complete."""
        return self.start <= hour * HOUR_US and (hour + 1) * HOUR_US <= self.end and self.shard.holds(hour)

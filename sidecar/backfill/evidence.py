"""What the gates of a phase change ask of backfill, answered from the checkpoints (``sidecar.evidence.Copies``).

A job has as many checkpoints as shards. It is finished where every one of them is, and its figures are their sums; a
shard that never began is known by the number of shards, which each key states. Of several jobs the one that began last
speaks: an earlier one says nothing of the records that came after it.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sidecar.backfill.checkpoint import Checkpoint, JobStore, parse
from sidecar.evidence import CopyBack, Feasibility
from sidecar.phase import POSTGRES, StoreName


@dataclass(frozen=True, slots=True)
class Family:
    """All shards of one job."""

    name: str
    shards: int
    checkpoints: Sequence[Checkpoint]  # of those that began

    @property
    def started_us(self) -> int:
        """When the last of them began."""
        return max(checkpoint.started_us for checkpoint in self.checkpoints)

    @property
    def finished_us(self) -> int | None:
        """When the last of them ended; None while one is under way or has not begun."""
        ends = [c.finished_us for c in self.checkpoints if c.stage == "done" and c.finished_us is not None]
        return max(ends) if len(ends) == self.shards else None

    def refused(self) -> dict[str, int]:
        """By reason."""
        total = Counter[str]()
        for checkpoint in self.checkpoints:
            total.update(checkpoint.refused)
        return dict(total)


async def families(store: JobStore, prefix: str) -> Sequence[Family]:
    """Every job whose key begins with ``prefix``. Raises StoreError."""
    grouped: dict[str, list[Checkpoint]] = defaultdict(list)
    for key, value in await store.all(prefix):
        grouped[key.rpartition("/")[0]].append(parse(value))
    return [Family(name, int(name.rpartition("/")[2]), found) for name, found in grouped.items()]


class Copies:
    """``sidecar.evidence.Copies`` from the checkpoints of all jobs."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    async def copy(self, store: StoreName) -> CopyBack | None:
        """The last run that filled ``store``. Raises StoreError."""
        found = [f for f in await families(self._store, "copy/") if f">{store}/" in f.name]
        if not found:
            return None
        last = max(found, key=lambda family: family.started_us)
        finished = last.finished_us
        seen = last.checkpoints
        left = None if finished is None else sum(each.left + each.differing for each in seen)
        return CopyBack(
            store=store,
            started_us=min(each.started_us for each in seen),
            finished_us=finished,
            copied=sum(each.copied for each in seen),
            left=left,
            refused=last.refused(),
        )

    async def feasibility(self) -> Feasibility | None:
        """The last finished dry run into PostgreSQL. Raises StoreError."""
        found = [f for f in await families(self._store, "dry/") if f">{POSTGRES}/" in f.name]
        ended = [(family.finished_us, family) for family in found if family.finished_us is not None]
        if not ended:
            return None
        at, last = max(ended, key=lambda pair: pair[0])
        looked_at = sum(each.looked_at for each in last.checkpoints)
        return Feasibility(finished_us=at, looked_at=looked_at, refused=last.refused(), run=last.name)

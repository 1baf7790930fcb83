"""What a change of phase demands of records that are already on disk: owed to more, decided at last, owed anew.

The spool stamps a record once (``sidecar.spool``). This part makes good what a stamp cannot know:

* :meth:`Obligations.apply`: a phase is in force from now on. What it requires is required of everything pending; what
  is pending and was not owed to a store of this phase gets a copy that is owed to that store; what was undecided (a
  fenced instance's records) is owed to the phase's stores.
  A copy's stamp is the phase in force, whose other stores its original is owed to: the phase of a frame says for each
  store whether the record is owed to it, here or in its original.
* :meth:`Obligations.undecided`: records that were stamped or shipped under a policy that may have been outdated are
  appended once more, undecided. The stores' keys make a second delivery have no effect; the accounts count it as owed
  twice, and delivered twice.

STAGES of ``apply``, and what a crash or a failure at each leaves: 1. strengthen, 2. copies, 3. the mark up to which
copies were made (meta ``copied:<store>``), 4. resolve. Each is idempotent but 2, whose repetition costs copies that the
stores take as duplicates; after 3 nothing is copied again. Busy (no room for the copies) or SpoolFailed are raised, and
the caller does not claim the phase before a later call returned.

COST: a look at the headers of what is pending; bodies are read only of frames that are copied, about 1 MiB at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from sidecar.phase import TABLE, Delivery, Phase, Policy, StoreName
from sidecar.record import LogRecord, encode
from sidecar.spool import view
from sidecar.spool.inspect import FrameLine
from sidecar.spool.types import Obligation, Receipt, Seen

_TOGETHER: Final = 500  # records of one append
_HEADERS: Final = 500  # frames looked at in one step


class SpoolPort(Protocol):
    """What is needed of the spool (``sidecar.spool.Spool``)."""

    async def append(
        self, records: Sequence[LogRecord], encoded: Sequence[bytes], obligation: Obligation, seen: Sequence[Seen] = ()
    ) -> Receipt:
        """Make records durable."""
        ...

    async def read(self, run: Callable[[Any], Any]) -> Any:
        """Run a query in the database thread."""
        ...

    def flush_now(self) -> None:
        """Let what is read next know what is settled."""
        ...

    async def strengthen(self, store: str) -> int:
        """Make every best-effort obligation to a store required."""
        ...

    async def resolve(self, obligation: Obligation) -> int:
        """Decide what is undecided."""
        ...

    def meta(self, key: str) -> str | None:
        """A small durable value."""
        ...

    async def set_meta(self, key: str, value: str) -> None:
        """Make it durable."""
        ...


def obligation_of(policy: Policy) -> Obligation:
    """What records of a phase are stamped with."""
    return Obligation(int(policy.phase), policy.required, policy.owed - policy.required)


def open_obligation(policy: Policy) -> Obligation:
    """To be decided; the phase is what was last known, for people."""
    return Obligation(int(policy.phase), frozenset(), unresolved=True)


@dataclass(frozen=True, slots=True)
class Obligations:
    """See the module's docstring. Used from the event loop."""

    spool: SpoolPort

    async def apply(self, policy: Policy) -> None:
        """Make good what ``policy`` demands; idempotent. Raises Busy, SpoolFailed."""
        for store in sorted(policy.required):
            await self.spool.strengthen(store)
        for store in sorted(policy.owed):
            await self.owe_pending(store, policy)
        await self.spool.resolve(obligation_of(policy))

    async def owe_pending(self, store: StoreName, policy: Policy) -> int:
        """Owe to ``store`` what is pending and was not owed to it; how many records. Raises Busy, SpoolFailed."""
        obligation = _alone(store, policy)
        done = int(self.spool.meta(f"copied:{store}") or 0)
        copied, last = 0, done
        after: int | None = done
        self.spool.flush_now()
        while after is not None:
            lines, following = await self.spool.read(partial(view.frames, after=after, limit=_HEADERS))
            first = next((line.seq for line in lines if _misses(line, store)), None)
            if first is None:
                last = max([last, *(line.seq for line in lines)])
                after = following
                continue
            held, at = await self.spool.read(partial(view.owed, at=view.Position(0, first - 1)))
            missed = [item.record for item in held if item.stores and store not in TABLE[Phase(item.phase)].owed]
            for start in range(0, len(missed), _TOGETHER):
                part = missed[start : start + _TOGETHER]
                await self.spool.append(part, [encode(record) for record in part], obligation)
            copied += len(missed)
            last = max([last, first, *(item.seq for item in held)])
            after = at.after if at is not None and at.part == 0 else None
        if last > done:
            await self.spool.set_meta(f"copied:{store}", str(last))
        return copied

    async def undecided(self, records: Sequence[LogRecord], policy: Policy) -> Receipt:
        """Owe records once more, to whom the phase will say. Raises Busy, SpoolFailed."""
        return await self.spool.append(records, [encode(record) for record in records], open_obligation(policy))


def _misses(line: FrameLine, store: StoreName) -> bool:
    """Whether the pending frame was stamped by a phase that owes nothing to the store.

    What is deferred to a later try has left its frame; it had its gap line when the frame was shipped.
    """
    return line.sound and not line.unresolved and store not in TABLE[Phase(line.phase)].owed


def _alone(store: StoreName, policy: Policy) -> Obligation:
    one, nobody = frozenset[str]({store}), frozenset[str]()
    required = policy.writes[store] is Delivery.REQUIRED
    return Obligation(int(policy.phase), one if required else nobody, nobody if required else one)

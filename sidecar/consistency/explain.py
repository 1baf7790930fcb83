"""From candidates to differences: each is looked at again, strongly consistent, and whatever explains it is asked.

ORDER, and why a record in motion is never called missing:

1. *settle*: wait until every sidecar that can be asked has settled what it had accepted by now. Every candidate was
   read from a store, so it was accepted before.
2. *fates*: what the sidecars know of each candidate. Before the stores are read: a record that is settled by then must
   be found by the read that follows; one that is not is in flight whatever the read says.
3. *read*: both stores by id. Equal, or gone from both: no difference. An id that stands under another log_timestamp in
   the other store is found here: one field_mismatch at PostgreSQL's time, not one missing and one extra. Equal fields
   are not enough: an item whose keys are not those of its fields is hidden from some query, and its stored digest may
   hide a change. That is a field_mismatch too, which names the keys. The item's own attributes decide, read strongly
   consistent, never an index that is behind.
4. *again*: a difference that nothing explains is looked at again until a look *began* late enough: ``settle`` seconds
   after it was read where not every sidecar could be asked (and there one of a record younger than ``young`` seconds is
   in flight), else the few after they had settled in which another sidecar mirrors its dead letters. However long this
   process is held up, between two questions or within one, the last look is made anew.
5. *gaps*: read after the look, because a gap is written before its records are given up. At most as many records of an
   hour are explained as the ledger says are missing in it; what is more than that is missing.
6. *once more*: what no gap explains is read a last time, because a gap is closed only after its records are stored: one
   that was filled since the look explains nothing any more, and its records are there.

A failure of any of these is a failure of the run: an error is never an explanation.
"""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol

from sidecar.clock import Clock
from sidecar.consistency.patience import patiently
from sidecar.consistency.types import DIVERGENT, FIRST_US, MISSING, Candidate, Difference, Reason, Settled, Window
from sidecar.errors import StoreError
from sidecar.gaps import GapLine, summed
from sidecar.phase import DYNAMODB, POSTGRES, STORES, StoreName
from sidecar.record import LogRecord
from sidecar.screening.identity import version7_time
from sidecar.stores.base import Store

HOUR_US: Final = 3_600_000_000
_AT_ONCE: Final = 8  # records read at a time
_UNREADABLE: Final = "UnreadableAnswer"  # code of an answer, here an item, that is not what a sidecar writes
PART: Final = 256  # candidates that are decided at a time: two records of each are in memory
_MIRRORED: Final = 5.0  # seconds in which every dead letter of the fleet has a line
_PAUSE: Final = 1.0  # seconds between two looks at what does not go away
_COMPUTED: Final = re.compile("51deca70-[0-9a-f]{4}-8000-.*")  # ids computed from rows that no sidecar wrote

_OF_FATE: Final[Mapping[str, Reason]] = {
    "pending": Reason.IN_FLIGHT,
    "deferred": Reason.IN_FLIGHT,
    "dead_lettered": Reason.DEAD_LETTER,
    "released": Reason.EXPECTED_GAP,
    "discarded": Reason.ACKNOWLEDGED,
}
"""What a sidecar's answer means; a fate that is not here (delivered, quarantined) explains nothing."""


@dataclass(frozen=True, slots=True)
class Known:
    """What one sidecar says of one record at one store."""

    fate: str  # spool.types.Fate
    retry_class: str = ""  # of a dead letter, e.g. ``conflict``


class Whereabouts(Protocol):
    """What the sidecars know of records; see ``sidecar.consistency.whereabouts``."""

    async def settle(self, patience: float) -> Settled:
        """Wait, at most ``patience`` seconds, until what was accepted by now is settled; who was asked."""
        ...

    async def fates(self, log_ids: Sequence[str]) -> Mapping[str, Mapping[StoreName, Known]]:
        """What is known; ids of which nothing is known are left out. Raises StoreError."""
        ...


Gaps = Callable[[], Awaitable[Sequence[GapLine]]]
"""The open lines of every ledger. Raises StoreError."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What is not found in the stores: patience and retention."""

    settle: float = (
        30.0  # seconds that sidecars are waited for, and that a difference must last where not all were asked
    )
    young: float = 60.0  # seconds: a record younger than this may be on its way from a sidecar that was not asked
    kept_from_us: Mapping[StoreName, Callable[[], int]] | None = (
        None  # store -> log_timestamp below which it keeps none
    )


class Explainer:
    """Decides about candidates. One per run: it remembers how many of each hour's gap were used up."""

    def __init__(
        self,
        stores: Mapping[StoreName, Store],
        whereabouts: Whereabouts,
        gaps: Gaps,
        *,
        window: Window,
        rules: Rules,
        clock: Clock,
    ) -> None:
        """``window`` is the whole run's, also where the run was resumed in its middle."""
        self._sql = stores[POSTGRES]
        self._dynamo = stores[DYNAMODB]
        self._whereabouts = whereabouts
        self._gaps = gaps
        self._window = window
        self._rules = rules
        self._clock = clock
        self.used: Counter[tuple[StoreName, int]] = Counter()
        """How many records of an hour were explained by the store's gap so far."""
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self.settled = Settled()

    async def differences(self, candidates: Sequence[Candidate], read_at: float) -> AsyncGenerator[list[Difference]]:
        """What is left of candidates that were read by ``read_at`` (monotonic seconds), part by part.

        A part is small, because a difference holds both stores' record: memory does not grow with their number.
        """
        history, candidates = await self._of_history(candidates)
        if history:
            yield history
        if not candidates:
            return
        self.settled = await patiently(lambda: self._whereabouts.settle(self._rules.settle), self._clock)
        settled_at = self._clock.monotonic()
        late = settled_at + _MIRRORED if self.settled.knows_all else read_at + self._rules.settle
        asked_at, fates = self._clock.monotonic(), await self._fates(candidates)
        for start in range(0, len(candidates), PART):
            if asked_at < late <= self._clock.monotonic():  # once for all that are left, and not again for each part
                asked_at, fates = self._clock.monotonic(), await self._fates(candidates[start:])
            yield await self._decide(candidates[start : start + PART], fates, asked_at, late)

    async def _decide(
        self,
        candidates: Sequence[Candidate],
        fates: Mapping[str, Mapping[StoreName, Known]],
        asked_at: float,
        late: float,
    ) -> list[Difference]:
        """What is left of these; ``fates`` are of ``asked_at``, the last look begins at ``late`` or after."""
        found = await self._look(candidates, fates)
        while True:
            doubtful = _doubtful(found)
            if not doubtful or asked_at >= late:
                break
            await self._clock.sleep(max(0.0, min(late - self._clock.monotonic(), _PAUSE)))
            asked_at = self._clock.monotonic()
            looked_at = [c for c in candidates if c.log_id in doubtful]
            fates = await self._fates(looked_at)
            again = await self._look(looked_at, fates)
            anew = {d.log_id: d for d in again}
            found = [anew.get(d.log_id, d) for d in found if d.log_id not in doubtful or d.log_id in anew]
        found = await self._expected(found)
        lacking = _doubtful(d for d in found if len(d.present_in) == 1)
        if not lacking:
            return found
        again = await self._look([c for c in candidates if c.log_id in lacking], fates)
        still = {d.log_id for d in again}
        return [d for d in found if d.log_id not in lacking or d.log_id in still]

    async def _fates(self, candidates: Sequence[Candidate]) -> Mapping[str, Mapping[StoreName, Known]]:
        ids = [c.log_id for c in candidates if not self._expired(c)]
        return await patiently(lambda: self._whereabouts.fates(ids), self._clock) if ids else {}

    async def _of_history(self, candidates: Sequence[Candidate]) -> tuple[list[Difference], list[Candidate]]:
        """What an open gap of kind ``history`` explains needs no look: there may be millions before a backfill."""
        room: Counter[tuple[StoreName, int]] = Counter()
        for line in summed(await patiently(self._gaps, self._clock)):
            if line.kind == "history":
                room[line.store, line.hour] += line.open
        if not room:
            return [], list(candidates)
        room.subtract({key: used for key, used in self.used.items() if key in room})
        explained, left = [], []
        for each in candidates:
            lacking = DYNAMODB if each.dynamo is None else POSTGRES if each.sql is None else None
            if lacking is not None and room[key := (lacking, each.log_timestamp // HOUR_US)] > 0:
                room[key] -= 1
                self.used[key] += 1
                explained.append(Difference(each.log_id, each.log_timestamp, Reason.EXPECTED_GAP))
            else:
                left.append(each)
        return explained, left

    async def _look(
        self, candidates: Sequence[Candidate], fates: Mapping[str, Mapping[StoreName, Known]]
    ) -> list[Difference]:
        found = [Difference(c.log_id, c.log_timestamp, Reason.EXPIRED) for c in candidates if self._expired(c)]
        looks = await _all([self._one(c, fates.get(c.log_id, {})) for c in candidates if not self._expired(c)])
        return [*found, *(d for d in looks if d is not None)]

    async def _one(self, seen: Candidate, fates: Mapping[StoreName, Known]) -> Difference | None:
        async with self._slots:
            sql = await patiently(partial(self._sql.get, seen.log_id), self._clock)
            try:
                examined = await patiently(partial(self._dynamo.examine, seen.log_id), self._clock)
            except StoreError as error:
                if error.code != _UNREADABLE:
                    raise
                if self._another(seen, sql):
                    return None
                detail = "an item under this id is none that a sidecar writes"
                return Difference(seen.log_id, seen.log_timestamp, Reason.FOREIGN_WRITER, sql, None, detail)
        dynamo, wrong = (None, ()) if examined is None else (examined.record, examined.wrong)
        if sql == dynamo and not wrong:
            return None
        if sql is not None and dynamo is not None:
            return None if self._another(seen, sql) else _changed(sql, dynamo, wrong, fates, seen.log_timestamp)
        present = sql if dynamo is None else dynamo
        assert present is not None  # noqa: S101  (they differ, so one of them is there)
        lacking: StoreName = DYNAMODB if dynamo is None else POSTGRES
        reason, detail = self._missing(present, lacking, fates.get(lacking), foreign="h" in wrong)
        return Difference(present.log_id, present.log_timestamp, reason, sql, dynamo, detail, wrong)

    def _another(self, seen: Candidate, sql: LogRecord | None) -> bool:
        """Whether PostgreSQL's entry of this id is a candidate too, and speaks for both stores."""
        return sql is not None and seen.log_timestamp != sql.log_timestamp and self._inside(sql.log_timestamp)

    def _expired(self, seen: Candidate) -> bool:
        """Of an entry that one scan alone has: whether the other store keeps nothing that old. Not worth a read."""
        lacking = DYNAMODB if seen.dynamo is None else POSTGRES if seen.sql is None else None
        return lacking is not None and seen.log_timestamp < self._kept_from(lacking)

    def _kept_from(self, store: StoreName) -> int:
        kept_from = (self._rules.kept_from_us or {}).get(store)
        return FIRST_US if kept_from is None else kept_from()

    def _inside(self, time: int) -> bool:
        return self._window.start_us <= time < self._window.end_us

    def _missing(
        self, record: LogRecord, lacking: StoreName, known: Known | None, *, foreign: bool
    ) -> tuple[Reason, str]:
        """Why ``lacking`` has no record; what only the ledger can explain is looked at last.

        ``foreign``: the record's stored digest is not that of its fields.
        """
        if record.log_timestamp < self._kept_from(lacking):
            return Reason.EXPIRED, ""
        if known is not None and known.fate in _OF_FATE:
            return _OF_FATE[known.fate], known.retry_class
        detail = "" if known is None else f"the sidecar says: {known.fate}"
        if lacking == DYNAMODB and _COMPUTED.fullmatch(record.log_id):
            return Reason.OLD_WRITER, detail
        if lacking == POSTGRES and foreign:
            return Reason.FOREIGN_WRITER, "its digest is not that of its fields"
        return MISSING[lacking], detail

    async def _expected(self, found: Sequence[Difference]) -> list[Difference]:
        """Explain by open gaps; what is then left and may still be on its way is in flight."""
        if not any(d.reason in DIVERGENT and len(d.present_in) == 1 for d in found):
            return list(found)
        room: Counter[tuple[StoreName, int]] = Counter()
        for line in summed(await patiently(self._gaps, self._clock)):
            room[line.store, line.hour] += line.open
        room.subtract(self.used)
        decided = []
        for each in found:
            if each.reason in DIVERGENT and each.reason is not Reason.DEAD_LETTER and len(each.present_in) == 1:
                lacking: StoreName = DYNAMODB if each.dynamo is None else POSTGRES
                key = lacking, each.log_timestamp // HOUR_US
                if room[key] > 0:
                    room[key] -= 1
                    self.used[key] += 1
                    decided.append(_because(each, Reason.EXPECTED_GAP))
                    continue
                each = self._on_its_way(each, lacking)  # noqa: PLW2901  (the same difference, decided)
            decided.append(each)
        return decided

    def _on_its_way(self, each: Difference, lacking: StoreName) -> Difference:
        settled = self.settled
        if settled.silent:
            silent = ", ".join(settled.silent)
            return _because(each, Reason.IN_FLIGHT_UNKNOWN, f"{silent} did not say what it holds")
        if lacking in settled.behind:
            return _because(each, Reason.IN_FLIGHT, "another sidecar still owes records to this store")
        born = max(each.log_timestamp, version7_time(each.log_id) or each.log_timestamp)
        if not settled.knows_all and self._clock.now_us() - born < self._rules.young * 1e6:
            return _because(each, Reason.IN_FLIGHT, "younger than phases.max_lag")
        return each


def _changed(
    sql: LogRecord, dynamo: LogRecord, wrong: tuple[str, ...], fates: Mapping[StoreName, Known], at_us: int
) -> Difference:
    """Both stores have the id, with other content or wrong keys; ``at_us`` is where it was found."""

    def because(reason: Reason, detail: str = "") -> Difference:
        return Difference(sql.log_id, at_us, reason, sql, dynamo, detail, wrong)

    if sql == dynamo:
        return because(Reason.FIELD_MISMATCH, "all fields are equal; the item's keys are not those of its fields")
    for store in STORES:
        known = fates.get(store)
        if known is None or known.retry_class != "conflict":
            continue
        if known.fate == "discarded":
            return because(Reason.ACKNOWLEDGED, f"conflict at {store}")
        if known.fate == "dead_lettered":
            return because(Reason.ID_CONFLICT, f"{store} refused the other content")
    if any(known.fate in ("pending", "deferred") for known in fates.values()):
        return because(Reason.IN_FLIGHT)
    return because(Reason.FIELD_MISMATCH)


def _doubtful(found: Iterable[Difference]) -> set[str]:
    """Ids of differences that nothing explains so far."""
    return {d.log_id for d in found if d.reason in DIVERGENT and d.reason is not Reason.DEAD_LETTER}


def _because(each: Difference, reason: Reason, detail: str = "") -> Difference:
    return replace(each, reason=reason, detail=detail or each.detail)


async def _all(looks: Sequence[Awaitable[Difference | None]]) -> Sequence[Difference | None]:
    """All, or the first error, with nothing left under way."""
    tasks = [asyncio.ensure_future(look) for look in looks]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

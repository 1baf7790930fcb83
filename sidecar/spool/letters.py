"""Deferred records, dead letters and refused records, from the event loop's side."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final
from zlib import crc32

from sidecar.clock import Clock
from sidecar.errors import Busy
from sidecar.settings import Spool as SpoolSettings
from sidecar.spool import divergence, leftovers, schema
from sidecar.spool.framing import Damaged
from sidecar.spool.ledger import Account, LeftoverRow
from sidecar.spool.leftovers import Change, Row, Selection
from sidecar.spool.marks import Refreshed
from sidecar.spool.parts import Parts
from sidecar.spool.types import DeadLetter, Deferred, Leftover

_AT_ONCE: Final = 2_000  # rows of one transaction of redrive or discard


class Letters:
    """Which deferred records are in a shipper's hands, and every change of the table of leftovers."""

    def __init__(self, parts: Parts, door: Account, settings: SpoolSettings, clock: Clock) -> None:
        self._parts = parts
        self._door = door
        self._quota = int(settings.cap_bytes * settings.refused_share)
        self._clock = clock
        self._in_hand: dict[int, tuple[str, int, int]] = {}  # key: store, seq, owed

    def _account(self, store: str) -> Account:
        return self._door if store == schema.DOOR else self._parts.ledger.accounts[store]

    def _held(self, store: str) -> frozenset[int]:
        return frozenset(key for key, (name, _, _) in self._in_hand.items() if name == store)

    def refreshed(self, news: Sequence[Refreshed]) -> None:
        """Take over what the file says of deferred records."""
        for new in news:
            account = self._account(new.store)
            account.deferred_oldest_us = new.oldest_us
            account.next_due_us = next((us for us, key in new.due if key not in self._in_hand), None)

    def _apply(self, change: Change) -> None:
        for name in {*change.deferred, *change.dead_bytes, *change.delivered, *change.discarded, *change.quarantined}:
            account = self._account(name)
            account.deferred += change.deferred[name]
            account.deferred_bytes += change.deferred_bytes[name]
            account.dead_bytes += change.dead_bytes[name]
            account.discarded += change.discarded[name]
            self._parts.ledger.wrote(account, change.delivered[name], change.quarantined[name])
        for (name, retry_class), n in change.dead.items():
            self._account(name).dead[retry_class] += n
        self._parts.ledger.corrections.update(change.corrections)
        self.refreshed(change.refreshed)

    # --- deferred --------------------------------------------------------------------------------------------------

    def next_due_us(self, store: str) -> int | None:
        """On the wall clock as it stands now."""
        due = self._account(store).next_due_us
        return None if due is None else self._parts.wall_us(due)

    def take_back(self, store: str) -> None:
        """The consumer is gone: what it held is due again."""
        held = self._held(store)
        for key in held:
            del self._in_hand[key]
        if held:
            self._account(store).next_due_us = 0

    async def due(self, store: str, now_us: int, limit: int, max_bytes: int) -> Sequence[Deferred]:
        """See Spool.due."""
        self._parts.flush_now()
        steady = self._parts.steady_us(now_us)
        found, news = await self._parts.read(
            partial(
                leftovers.due,
                store=store,
                now_us=steady,
                limit=limit,
                max_bytes=max_bytes,
                in_hand=self._held(store),
            )
        )
        out = []
        for row in found:
            record = row.record
            if row.key in self._in_hand:
                continue
            if record is None:
                await self._quarantine(row)
                continue
            self._in_hand[row.key] = (store, row.seq, row.owed)
            out.append(leftovers.deferred(row, record, self._parts.wall_us(row.due_us)))
        self.refreshed([news])
        return out

    async def _quarantine(self, row: Row) -> None:
        self._parts.keep_damaged(f"leftover-{row.key}", [Damaged(row.idx, row.body or b"")])
        await self._parts.write(partial(leftovers.quarantine, row=row, held=len(self._in_hand)), self._apply)

    async def finish(self, item: Deferred, outcome: Leftover | None) -> None:
        """See Spool.finish_deferred. Raises ValueError for an item that is not in anybody's hands."""
        held = self._in_hand.get(item.key)
        if held is None:
            raise ValueError(f"deferred record {item.key} was not handed out")
        _, seq, owed = held
        accounts = self._parts.ledger.by_mask
        settled = sum(b for b in divergence.single_bits(owed) if accounts[b].marks.covers(seq))
        self._parts.flush_now()  # the corrections below rest on what is settled by now
        run = partial(
            leftovers.finish,
            key=item.key,
            outcome=outcome,
            due_us=self._parts.steady_us(outcome.due_us) if outcome is not None else 0,
            now_us=self._clock.now_us(),
            settled=settled,
            held=len(self._in_hand),
        )

        def done(change: Change) -> None:
            self._in_hand.pop(item.key, None)
            self._apply(change)

        await self._parts.write(run, done)

    # --- dead ------------------------------------------------------------------------------------------------------

    def counts(self) -> dict[tuple[str, str], int]:
        """See Spool.dead_letter_counts."""
        accounts = (self._door, *self._parts.ledger.accounts.values())
        return {(a.name, retry_class): n for a in accounts for retry_class, n in a.dead.items() if n}

    async def page(self, store: str | None, retry_class: str | None, after: int, limit: int) -> Sequence[DeadLetter]:
        """See Spool.dead_letters."""
        self._parts.flush_now()
        run = partial(leftovers.dead_letters, store=store, retry_class=retry_class, after=after, limit=limit)
        return [leftovers.dead_letter(row) for row in await self._parts.read(run)]

    async def refuse(self, raws: Sequence[tuple[bytes, str, str]]) -> int:
        """See Spool.refuse."""
        now = self._clock.now_us()
        room = self._quota - self._door.dead_bytes if self._parts.accepting else 0
        rows = []
        for raw, field, reason in raws:
            if len(raw) > room:
                break
            room -= len(raw)
            rows.append(
                LeftoverRow(
                    store=schema.DOOR,
                    state=schema.DEAD,
                    seq=0,
                    idx=0,
                    log_id=None,
                    phase=-1,
                    owed=0,
                    required=0,
                    accepted_us=now,
                    first_us=now,
                    last_us=now,
                    due_us=0,
                    attempts=0,
                    retry_class="refused",
                    reason=reason,
                    code=field,
                    size=len(raw),
                    crc=crc32(raw),
                    body=raw,
                )
            )
        if not rows:
            return 0
        try:
            await self._parts.write(partial(leftovers.insert, new=rows), self._apply, refusable=True)
        except Busy:
            return 0  # counted by the caller; what was refused is not owed to anybody
        return len(rows)

    async def redrive(
        self, keys: Sequence[int] | None, store: str | None, retry_class: str | None, who: str, reason: str
    ) -> int:
        """See Spool.redrive."""
        now = self._parts.steady_us(self._clock.now_us())
        run = partial(leftovers.redrive, now_us=now, held=len(self._in_hand))
        return await self._in_steps("redrive", run, Selection(_keys(keys), store, retry_class), who, reason)

    async def discard(
        self, keys: Sequence[int] | None, store: str | None, retry_class: str | None, who: str, reason: str
    ) -> int:
        """See Spool.discard."""
        if not reason.strip() or not who.strip():
            raise ValueError("discard: who and reason are needed; they go to the audit trail")
        chosen = Selection(_keys(keys), store, retry_class)
        return await self._in_steps("discard", leftovers.discard, chosen, who, reason)

    async def _in_steps(
        self, what: str, change: Callable[..., Change], chosen: Selection, who: str, reason: str
    ) -> int:
        """Up to 2,000 rows in a transaction, each with its line in the audit trail."""
        self._parts.flush_now()
        total = 0
        while True:
            run = partial(
                leftovers.audited,
                change=partial(change, chosen=chosen, limit=_AT_ONCE),
                line=(self._clock.now_us(), who, what, reason),
                chosen=chosen,
            )
            done = await self._parts.write(run, self._apply)
            total += done.moved
            if done.moved < _AT_ONCE:
                return total


def _keys(keys: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if keys is None else tuple(keys)

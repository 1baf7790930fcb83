"""Two stores read side by side: for each hour, what the first holds and the second lacks.

A merge of two scans that ascend by (time, id): memory is bounded by the suspects of one hour. DynamoDB's scan goes
through an index that follows the table by a moment, so what seems to be missing or different is looked up by id,
strongly consistent, before it is called so: where there are up to ``MOST_SUSPECTS`` of them in an hour, and
``MOST_LOOKUPS`` in all. Beyond that the index's word is taken: it may say that something is missing, never that
something is there which is not.

A record that the destination lacks is *young* while its time is less than ``settle_us`` ago: live traffic may still be
on its way there. An hour is clean where nothing is missing, different or young.

Whoever validates better (``sidecar.consistency``) takes this part's place through ``Validator``.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from sidecar.record import digest
from sidecar.stores.base import HOUR_US, HourFilter, ScanEntry, Store

MOST_SUSPECTS: Final = 5_000
MOST_LOOKUPS: Final = 20_000
_AT_ONCE: Final = 8
Scan = AsyncIterator[ScanEntry]
Validator = Callable[[int, int, HourFilter], AsyncIterator["Hour"]]
"""``(start, end, hours)`` -> every occupied hour of the source, ascending, as it stands in the destination."""


@dataclass(slots=True)
class Hour:
    """One UTC hour of the source."""

    number: int  # since the epoch
    records: int = 0
    missing: int = 0  # the destination has not got the id
    differing: int = 0  # it has, with other content
    young: int = 0  # missing, and too new to be called so
    suspects: list[ScanEntry] = field(default_factory=list)  # the first of those missing or differing

    @property
    def complete(self) -> bool:
        """Every id is there."""
        return not self.missing and not self.young

    @property
    def clean(self) -> bool:
        """Every id is there with the same content."""
        return self.complete and not self.differing

    def suspect(self, entry: ScanEntry, *, there: bool) -> None:
        """An entry that is not in the destination, or not as it is here."""
        if there:
            self.differing += 1
        else:
            self.missing += 1
        if len(self.suspects) < MOST_SUSPECTS:
            self.suspects.append(entry)


async def merged(source: Scan, destination: Scan) -> AsyncIterator[Hour]:
    """Every hour of ``source``, as the two scans have it. Raises StoreError."""
    hour: Hour | None = None
    try:
        other = await anext(destination, None)
        async for entry in source:
            number = entry.log_timestamp // HOUR_US
            if hour is None or hour.number != number:
                if hour is not None:
                    yield hour
                hour = Hour(number)
            hour.records += 1
            place = entry[:2]
            while other is not None and other[:2] < place:
                other = await anext(destination, None)
            there = other is not None and other[:2] == place
            if not there or (other is not None and other.digest != entry.digest):
                hour.suspect(entry, there=there)
        if hour is not None:
            yield hour
    finally:
        await close(source)
        await close(destination)


async def close(iterator: AsyncIterator[object]) -> None:
    """End a scan or stream that is not read to its end: what it holds open is given back now."""
    end = getattr(iterator, "aclose", None)  # the port promises an iterator; every store's is a generator
    if end is not None:
        await end()


class Comparison:
    """The validator that this part brings along.

    Args:
        source: whose records must be in the other one.
        destination: the other one.
        settle_us: how old a record must be to be missed, microseconds.
        now_us: wall clock.
        paced: holds the source's entries back; the merge holds back the destination's.
    """

    def __init__(
        self,
        source: Store,
        destination: Store,
        *,
        settle_us: int,
        now_us: Callable[[], int],
        paced: Callable[[Scan], Scan] = lambda scan: scan,
    ) -> None:
        self._paced = paced
        self._source = source
        self._destination = destination
        self._settle_us = settle_us
        self._now_us = now_us
        self._lookups = 0

    async def __call__(self, start: int, end: int, hours: HourFilter) -> AsyncIterator[Hour]:
        """Every occupied hour, confirmed. Raises StoreError."""
        young_from = self._now_us() - self._settle_us
        source = self._paced(self._source.scan(start, end, hours=hours))
        hourly = merged(source, self._destination.scan(start, end, hours=hours))
        try:
            async for hour in hourly:
                if hour.suspects:
                    await self._confirm(hour, young_from)
                yield hour
        finally:
            await close(hourly)

    async def _confirm(self, hour: Hour, young_from: int) -> None:
        """Look every suspect up, where there are not too many."""
        number = hour.missing + hour.differing
        if number > len(hour.suspects) or self._lookups + number > MOST_LOOKUPS:
            return
        self._lookups += number
        hour.missing = hour.differing = 0
        for at in range(0, number, _AT_ONCE):
            part = hour.suspects[at : at + _AT_ONCE]
            for entry, state in zip(part, await asyncio.gather(*map(self._state, part)), strict=True):
                if state == "differs":
                    hour.differing += 1
                elif state == "missing" and entry.log_timestamp > young_from:
                    hour.young += 1
                elif state == "missing":
                    hour.missing += 1

    async def _state(self, entry: ScanEntry) -> Literal["same", "differs", "missing"]:
        found = await self._destination.get(entry.log_id)
        if found is None:
            return "missing"
        return "same" if digest(found) == entry.digest else "differs"

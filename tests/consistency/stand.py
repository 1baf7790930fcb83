"""A validator over any two stores for tests, harm done to them at random, and what a report must then say."""

import itertools
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sidecar.consistency import Difference, Nobody, Options, Rules, Settled, Validator, Whereabouts, Window
from sidecar.consistency.explain import Known
from sidecar.gaps import GapLine
from sidecar.phase import DYNAMODB, POSTGRES, STORES, StoreName
from sidecar.record import LogRecord
from sidecar.stores.memory import MemoryStore
from sidecar.verdicts import MemoryLedger, RunLine
from tests.parts.reads import PausableClock
from tests.stores.records import BASE, DAY, log_id, record

WINDOW = Window(BASE, BASE + 3 * DAY)
KINDS = ("delete", "add", "edit", "swap", "move")


class Told:
    """Whereabouts as the test tells them."""

    def __init__(self) -> None:
        self.settled = Settled(asked=("pod-1",), knows_all=True)
        self.known: dict[str, dict[StoreName, Known]] = {}
        self.on_settle: Callable[[], Awaitable[None]] | None = None

    async def settle(self, patience: float) -> Settled:
        if self.on_settle is not None:
            await self.on_settle()
        return self.settled

    async def fates(self, log_ids: Sequence[str]) -> Mapping[str, Mapping[StoreName, Known]]:
        return {log_id: self.known[log_id] for log_id in log_ids if log_id in self.known}


@dataclass
class ConsistencyStand:
    """Two stores and what a validation asks besides."""

    stores: Mapping[StoreName, Any] = field(default_factory=lambda: {name: MemoryStore(name) for name in STORES})
    whereabouts: Whereabouts = field(default_factory=Nobody)
    clock: Any = field(default_factory=PausableClock)
    rules: Rules = field(default_factory=Rules)
    ledger: Any = field(default_factory=MemoryLedger)
    lines: list[GapLine] = field(default_factory=list)
    seen: list[Difference] = field(default_factory=list)

    def __post_init__(self) -> None:
        numbers = itertools.count(1)
        self.validator = Validator(
            self.stores,
            self.whereabouts,
            self.gaps,
            self.ledger,
            rules=lambda: self.rules,
            clock=self.clock,
            new_id=lambda: f"run-{next(numbers)}",
        )

    async def gaps(self) -> Sequence[GapLine]:
        return self.lines

    async def write(self, batch: Sequence[LogRecord], *names: StoreName) -> None:
        """Into these stores, or both."""
        for name in names or STORES:
            size = self.stores[name].limits.max_records
            for start in range(0, len(batch), size):
                assert not (await self.stores[name].write(batch[start : start + size])).failures

    async def run(self, window: Window = WINDOW, resume: RunLine | None = None, **options: Any) -> RunLine:
        """One validation; every difference is in ``seen``."""
        self.seen = []

        async def found(differences: Sequence[Difference]) -> None:
            self.seen.extend(differences)

        return await self.validator.run(window, Options(**options), resume=resume, found=found)

    def found(self) -> dict[str, str]:
        """log_id -> reason, of the last run; an id that comes twice fails."""
        assert len({d.log_id for d in self.seen}) == len(self.seen)
        return {d.log_id: d.reason.value for d in self.seen}


def population(rng: random.Random, number: int) -> list[LogRecord]:
    """Records of several services over three days; many share an instant."""
    return [
        record(
            n,
            log_timestamp=BASE + rng.randrange(3) * DAY + rng.randrange(2_000) * 1_000_000,
            service_name=rng.choice(("orders", "billing", "a-service-nobody-listed")),
            is_success=rng.random() < 0.9,
        )
        for n in range(number)
    ]


def harm(
    rng: random.Random, held: Sequence[LogRecord], kinds: Sequence[str] = KINDS
) -> tuple[dict[StoreName, list[tuple[str, LogRecord]]], dict[str, str]]:
    """What to do to each store behind the sidecar ((verb, record) each), and the differences that this makes."""
    deeds: dict[StoreName, list[tuple[str, LogRecord]]] = {name: [] for name in STORES}
    expected: dict[str, str] = {}
    victims = rng.sample(list(held), min(len(held), rng.randrange(1, 12) * 2))
    missing = {POSTGRES: "missing_in_sql", DYNAMODB: "missing_in_dynamo"}
    fresh = itertools.count(len(held) + 1)
    while victims:
        kind, store = rng.choice(kinds), rng.choice(STORES)
        victim = victims.pop()
        other = next(name for name in STORES if name != store)
        if kind == "delete":
            deeds[store].append(("delete", victim))
            expected[victim.log_id] = missing[store]
        elif kind == "add":
            added = msgspec.structs.replace(victim, log_id=log_id(next(fresh)))
            deeds[store].append(("put", added))
            expected[added.log_id] = missing[other]
        elif kind == "edit":
            name, value = rng.choice((("user_id", "x"), ("request_data", ""), ("status_code", 500), ("user_id", "")))
            deeds[store].append(("put", msgspec.structs.replace(victim, **{name: value})))
            expected[victim.log_id] = "field_mismatch"
        elif kind == "swap":  # one gone here, another one there: the counts stay equal
            added = msgspec.structs.replace(victim, log_id=log_id(next(fresh)))
            deeds[store] += [("delete", victim), ("put", added)]
            expected[victim.log_id] = missing[store]
            expected[added.log_id] = missing[other]
        else:
            moved = victim.log_timestamp + rng.choice((1, DAY, -5 * DAY))
            deeds[store].append(("put", msgspec.structs.replace(victim, log_timestamp=moved)))
            expected[victim.log_id] = "field_mismatch"
    return deeds, expected


def harm_memory(store: MemoryStore, deeds: Sequence[tuple[str, LogRecord]]) -> None:
    """Do it."""
    for verb, each in deeds:
        if verb == "delete":
            del store._records[each.log_id]
        else:
            store._records[each.log_id] = each

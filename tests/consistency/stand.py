"""A validator over any two stores for tests, harm done to them at random, and what a report must then say."""

import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sidecar.consistency import FIRST_US, Difference, Nobody, Options, Rules, Settled, Validator, Whereabouts, Window
from sidecar.consistency.explain import Known
from sidecar.gaps import GapLine
from sidecar.phase import DYNAMODB, POSTGRES, STORES, StoreName
from sidecar.record import LogRecord, digest, timestamp_text
from sidecar.stores.base import NOWHERE, Examined, HourFilter, ScanEntry, service_tag
from sidecar.stores.dynamodb_items import parse_time_key
from sidecar.stores.memory import MemoryStore
from sidecar.verdicts import MemoryLedger, RunLine
from tests.parts.reads import PausableClock
from tests.stores.records import BASE, DAY, log_id, record

WINDOW = Window(BASE, BASE + 3 * DAY)
KINDS = ("delete", "add", "edit", "swap", "move", "key")


class Indexed(MemoryStore):
    """A DynamoDB in memory: finds records by keys that are kept beside the fields, and may be wrong.

    ``keys``: log_id -> attribute -> what somebody set it to; None: took it away.
    """

    def __init__(self) -> None:
        super().__init__(DYNAMODB)
        self.keys: dict[str, dict[str, str | None]] = {}

    async def scan(self, start: int, end: int, *, hours: HourFilter | None = None) -> AsyncIterator[ScanEntry]:
        """As the index shows them."""
        shown = []
        async for entry in super().scan(FIRST_US, 1 << 62):
            keys = self.keys.get(entry.log_id, {})
            gt = keys.get("gt", "")
            if None in (gt, keys.get("gs", "")):
                continue
            if gt:
                entry = entry._replace(log_timestamp=readable(gt) or start, shown_under=NOWHERE)  # noqa: PLW2901
            if "gs" in keys:
                entry = entry._replace(shown_under=service_tag(str(keys["gs"])))  # noqa: PLW2901
            if "h" in keys:
                entry = entry._replace(digest=b"")  # noqa: PLW2901
            shown.append(entry)
        for entry in sorted(shown):
            if start <= entry.log_timestamp < end:
                yield entry

    async def deep_scan(self, start: int, end: int) -> AsyncIterator[ScanEntry]:
        """What the index shows, checked."""
        async for entry in self.scan(start, end):
            content = digest(self._records[entry.log_id])
            yield entry._replace(digest=content, shown_under=NOWHERE) if entry.log_id in self.keys else entry

    async def examine(self, log_id: str) -> Examined | None:
        """The record's own keys."""
        record = await self.get(log_id)
        return None if record is None else Examined(record, tuple(self.keys.get(log_id, {})))


def readable(gt: str) -> int | None:
    """The time of a sort key."""
    try:
        return parse_time_key(gt[:27])
    except ValueError:
        return None


def wrong_keys(victim: LogRecord) -> dict[str, tuple[str | None, ...]]:
    """What somebody may do to each key of an item so that some query no longer shows it, or a wrong one does."""
    time = timestamp_text(victim.log_timestamp)
    day = time[:10]
    return {
        "gs": (
            None,
            f"S#elsewhere#{day}#0",
            f"S#{victim.service_name}#1999-01-01#0",
            f"S#{victim.service_name}#{day}#99",
        ),
        "gt": (
            None,
            f"{timestamp_text(victim.log_timestamp + 1)}#{victim.log_id}",
            f"{time}#{log_id(10**6)}",
            f"{day}~",
        ),
        "h": (None, "not the digest"),
        "ga": (None, "A#99"),
        "gc": (None, "C#another"),
        "ge": (f"E#{day}#0",) if victim.is_success else (None, f"E#{day}#99"),
    }


SEEN_BY_DEEP_ALONE = frozenset({"ga", "gc", "ge"})


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

    stores: Mapping[StoreName, Any] = field(
        default_factory=lambda: {POSTGRES: MemoryStore(POSTGRES), DYNAMODB: Indexed()}
    )
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


Deed = tuple[str, LogRecord]
"""``delete``, ``put``, or ``gs=VALUE``: an attribute and what it becomes, nothing: it goes. And the record."""


@dataclass(frozen=True)
class Harm:
    """What to do to each store behind the sidecar, and the differences that this makes, log_id -> reason."""

    deeds: dict[StoreName, list[Deed]]
    expected: dict[str, str]  # of a fast run
    deep: dict[str, str]  # of a deep one
    keys: dict[str, str]  # log_id -> the key that is wrong


def harm(rng: random.Random, held: Sequence[LogRecord], kinds: Sequence[str] = KINDS) -> Harm:
    """At random."""
    deeds: dict[StoreName, list[Deed]] = {name: [] for name in STORES}
    expected: dict[str, str] = {}
    unseen: set[str] = set()
    keys: dict[str, str] = {}
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
        elif kind == "key":
            key, values = rng.choice(list(wrong_keys(victim).items()))
            deeds[DYNAMODB].append((f"{key}={rng.choice(values) or ''}", victim))
            expected[victim.log_id] = "field_mismatch"
            keys[victim.log_id] = key
            unseen |= {victim.log_id} if key in SEEN_BY_DEEP_ALONE else set()
        else:
            moved = victim.log_timestamp + rng.choice((1, DAY, -5 * DAY))
            deeds[store].append(("put", msgspec.structs.replace(victim, log_timestamp=moved)))
            expected[victim.log_id] = "field_mismatch"
    return Harm(deeds, {i: reason for i, reason in expected.items() if i not in unseen}, expected, keys)


def harm_memory(store: MemoryStore, deeds: Sequence[Deed]) -> None:
    """Do it."""
    for verb, each in deeds:
        if verb == "delete":
            del store._records[each.log_id]
        elif verb == "put":
            store._records[each.log_id] = each
        else:
            assert isinstance(store, Indexed)
            key, _, value = verb.partition("=")
            store.keys[each.log_id] = {key: value or None}

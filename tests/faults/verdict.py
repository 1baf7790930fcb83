"""The oracle: after healing, everything in both stores against everything the client knows.

``lost``      an acknowledged record is missing from a store that its answer's phase demanded, and is no dead letter
``altered``   a store holds other content than was sent
``twice``     an id stands twice in a store
``invented``  a store holds what nobody sent, or what the record's phase did not demand
``half``      a record without an answer is in some of a phase's stores and not in the others
``account``   the metrics do not say what the stores say
``died``      a delivery task ended with an exception and was started anew: a bug, whatever came of it
``silent``    a fault that left no trace in the metrics (:func:`felt`)
"""

import contextlib
import sqlite3
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from tests.faults.client import History
from tests.parts import oracle
from tests.parts.account import adds_up
from tests.parts.sidecar import Sidecar
from tests.scenarios.conftest import Stand

DEMANDED: Final[Mapping[str, frozenset[str]]] = {
    "sql_only": frozenset({"postgres"}),
    "dual_write": frozenset({"postgres", "dynamodb"}),
    "dual_write_read_dynamo": frozenset({"postgres", "dynamodb"}),
    "dynamo_only": frozenset({"dynamodb"}),
}


class Violation(AssertionError):
    """A promise is broken; ``kind`` is a word of the module's list, or the row's own."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(f"{kind}: {what}")
        self.kind = kind


@contextlib.contextmanager
def guilty(*kinds: str) -> Iterator[None]:
    """A negative control: the block must end with a violation of one of these kinds."""
    with pytest.raises(Violation) as caught:
        yield
    assert caught.value.kind in kinds, caught.value


def require(kind: str, found: object, what: str) -> None:
    """Raise a violation where there is something."""
    if found:
        raise Violation(kind, f"{what}: {found!r:.300}")


async def drained(sidecar: Sidecar, seconds: float = 90.0) -> None:
    """Wait until nothing is pending; that it never comes to that is a violation of the kind ``stuck``."""
    try:
        await sidecar.drained(seconds)
    except AssertionError as error:
        raise Violation("stuck", str(error)) from error


async def judge(
    history: History,
    stand: Stand,
    sidecar: Sidecar | None = None,
    *,
    dead: Mapping[str, set[str]] | None = None,
) -> None:
    """Raise a violation of (a) to (f); ``sidecar``, where given, has drained and its account is looked at too."""
    found = {}
    try:
        found = {"postgres": await stand.in_postgres(), "dynamodb": await stand.in_dynamodb()}
    except AssertionError as error:
        raise Violation("twice", str(error)) from error
    letters = {store: (dead or {}).get(store, set()) for store in found}
    require("lost", not history.acked, "the row proves nothing: nothing was acknowledged")
    for store, rows in found.items():
        missing = [
            i for i, p in history.acked.items() if store in DEMANDED[p] and i not in rows and i not in letters[store]
        ]
        require("lost", missing, f"{len(missing)} of {len(history.acked)} acknowledged are not in {store}")
        require("invented", list(rows.keys() - history.sent.keys()), f"in {store}, sent by nobody")
        require(
            "invented",
            [i for i in rows if i in history.acked and store not in DEMANDED[history.acked[i]]],
            f"in {store}, not demanded",
        )
        require("altered", [i for i in rows if oracle.content(rows[i]) != history.sent[i]], f"other content in {store}")
        require("twice", list(letters[store] & rows.keys()), f"in {store} and a dead letter of it")
    shapes = {DEMANDED[phase] for phase in history.acked.values()}
    for log_id in (found["postgres"].keys() | found["dynamodb"].keys()) - history.acked.keys():
        where = frozenset(s for s in found if log_id in found[s] or log_id in letters[s])
        require("half", where not in shapes and where, f"{log_id} without an answer")
    if sidecar is not None:
        await _account(sidecar, found, letters)


async def felt(sidecar: Sidecar, name: str, *labels: str, least: float = 1) -> None:
    """Raise a violation where a fault left no counter: the samples of a metric with these labels, added up."""
    metrics = await sidecar.metrics()
    count = sum(v for k, v in metrics.items() if k.startswith(f"sidecar_{name}{{") and all(e in k for e in labels))
    require("silent", count < least and f"{name} {labels} {count:.0f}", "the fault left no counter")


async def _account(sidecar: Sidecar, found: Mapping[str, Mapping[str, Any]], letters: Mapping[str, set[str]]) -> None:
    metrics = await sidecar.metrics()
    try:
        adds_up(metrics)
    except AssertionError as error:
        raise Violation("account", str(error)) from error
    require("died", sum(v for k, v in metrics.items() if "shipper_restarts_total{" in k), "delivery tasks")
    for store, rows in found.items():
        key = f'{{store="{store}"}}'
        require("account", metrics[f"sidecar_store_pending_records{key}"], f"pending for {store}")
        require("account", metrics[f"sidecar_store_records_quarantined_total{key}"], f"quarantined for {store}")
        counted = metrics.get(f"sidecar_store_records_delivered_total{key}", 0)
        require(
            "account", counted != len(rows) and (counted, len(rows)), f"delivered by the metrics, and rows, of {store}"
        )
        dead = sum(v for k, v in metrics.items() if "dead_letter_records{" in k and f'store="{store}"' in k)
        require("account", dead != len(letters[store]) and dead, f"dead letters of {store} by the metrics")


def dead_letters(spool: Path) -> dict[str, set[str]]:
    """The dead letters in the files of a sidecar that has stopped, read without its code."""
    found: dict[str, set[str]] = {"postgres": set(), "dynamodb": set()}
    with contextlib.closing(sqlite3.connect(f"file:{spool / 'spool.db'}?mode=ro&immutable=1", uri=True)) as connection:
        for store, log_id in connection.execute("SELECT store, log_id FROM leftovers WHERE state = 2"):
            if store in found:
                found[store].add(str(uuid.UUID(bytes=log_id)))
    return found

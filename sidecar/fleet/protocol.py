"""How a fleet of sidecars changes phase together: the rules, pure. Invariants first (semantics, section 9).

SAFETY
  S1  Of two unfenced instances, each reads from a store that the other writes: their phases are equal or adjacent.
  S2  The two copies of the record are at most one epoch apart, by one permitted step; equal epochs are equal records.
  S3  An unfenced instance is at most one epoch behind the highest copy.
  S4  A fenced instance neither stamps records with a phase nor answers reads.
  S5  No instance may release its backlog to a store while another, at a later epoch, reads from that store.
LIVENESS
  L1  From every state, once stores can be reached again, every instance can become unfenced at the highest epoch, so
      no acknowledged record stays unresolved for ever, and every phase can still be reached.

HOW
  authority   PostgreSQL decides in phases 0-2, DynamoDB in phase 3. A change is a compare-and-set on the copy that is
              the authority of the phase being *left*, and then a copy to the other store: 2->3 writes PostgreSQL first,
              3->2 DynamoDB first. So each epoch has one successor, whoever leads; leases only save work. A reader takes
              the highest epoch that it can see.
  settled     Epoch e is settled when (1) both copies were seen at e, and *afterwards* (2) the heartbeats in both stores
              showed every instance at e, drained or gone. Whoever announces itself after (2) reads its record after (1)
              and so at e or later; what was seen stays true. The fact is therefore written into the record, once, and
              the next change needs nothing but the authority: 1->0 and 2->1 work with DynamoDB down.
  join        An instance announces itself (a heartbeat that claims no more than it has applied) *before* it reads the
              record, and within one incarnation never applies an older record than it has.
  fence       An instance is unfenced for ``fence_after`` from the *start* of its last heartbeat that succeeded. A lapse
              is final: also if a late success arrives, it joins anew.
  gone        An observer counts an instance out when both stores, read after the time was taken, still show the
              heartbeat that the observer first saw ``fence_after`` plus a margin earlier on its own monotonic clock.
  prepare     A step into a phase that requires or reads a store to which backlog may be released is preceded by an
              epoch that forbids the release (``preparing``); gates that count gaps are evaluated once it is settled.

``tests/fleet/test_model.py`` explores every interleaving of these functions for three instances, and shows for each
rule that the invariants break without it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import msgspec

from sidecar.fleet_tables import FleetRecord
from sidecar.phase import DYNAMODB, POSTGRES, STORES, TABLE, Delivery, Phase, Policy, StoreName

AUTHORITY: Mapping[Phase, StoreName] = MappingProxyType(
    {phase: POSTGRES if POSTGRES in policy.writes else DYNAMODB for phase, policy in TABLE.items()}
)
"""Which copy decides while a phase is in force."""

OTHER: Mapping[StoreName, StoreName] = MappingProxyType({POSTGRES: DYNAMODB, DYNAMODB: POSTGRES})

FIRST: StoreName = POSTGRES
"""Where every fleet's first record is created, whatever its phase, so that two cannot be created apart."""


@dataclass(frozen=True, slots=True)
class Change:
    """One compare-and-set on one copy; ``expected`` None means that there is none yet."""

    store: StoreName
    expected: FleetRecord | None
    new: FleetRecord


@dataclass(frozen=True, slots=True)
class Move:
    """What the next epoch is: another phase, or the same phase with a preparation begun or given up."""

    phase: Phase
    preparing: Phase | None = None


def rank(record: FleetRecord | None) -> tuple[int, int]:
    """Order of records: later epoch, then later revision; none at all comes first."""
    return (0, 0) if record is None else (record.epoch, record.revision)


def highest(records: Iterable[FleetRecord | None]) -> FleetRecord | None:
    """The record that wins (highest epoch, then revision), or None."""
    return max(records, key=rank, default=None)


def compatible(a: Policy, b: Policy) -> bool:
    """True if two instances may work under these policies at once: each reads from a store that the other writes."""
    return a.reads_from in b.writes and b.reads_from in a.writes


def releasable(record: FleetRecord) -> frozenset[StoreName]:
    """Stores whose oldest backlog may be released under this record (S5)."""
    return frozenset(s for s, d in policy_of(record).writes.items() if d is Delivery.BEST_EFFORT)


def policy_of(record: FleetRecord) -> Policy:
    """The phase's row of the table; while a phase is being prepared, what that phase requires is required already."""
    return _policy(record.phase, record.preparing)


@cache
def _policy(phase: Phase, preparing: Phase | None) -> Policy:
    row = TABLE[phase]
    if preparing is None:
        return row
    required = TABLE[preparing].required
    writes = {s: Delivery.REQUIRED if s in required else d for s, d in row.writes.items()}
    return Policy(row.phase, MappingProxyType(writes), row.reads_from, row.description)


def needs_preparation(start: Phase, target: Phase) -> bool:
    """True if ``target`` requires or reads a store to which ``start`` may release backlog."""
    wanted = TABLE[target].required | {TABLE[target].reads_from}
    return any(d is Delivery.BEST_EFFORT and s in wanted for s, d in TABLE[start].writes.items())


def next_move(record: FleetRecord, desired: Phase) -> Move | None:
    """The one next move from ``record`` toward ``desired``; None when it is there."""
    phase = record.phase
    if desired == phase:
        return None if record.preparing is None else Move(phase)
    if desired < phase:
        return Move(Phase(phase - 1))
    target = Phase(phase + 1)
    if needs_preparation(phase, target) and record.preparing != target:
        return Move(phase, preparing=target)
    return Move(target)


def may_create(phase: Phase, copies: Mapping[StoreName, FleetRecord | None], visible: Collection[StoreName]) -> bool:
    """True if a first record with ``phase`` may be created in ``FIRST``.

    ``copies`` holds what the stores in ``visible`` answered. Every phase but 0 must have heard from both stores; a
    baseline without DynamoDB must start without it.
    """
    if any(copies.get(store) is not None for store in visible):
        return False
    return FIRST in visible and (TABLE[phase].owed == {FIRST} or all(store in visible for store in STORES))


def mirror(copies: Mapping[StoreName, FleetRecord | None]) -> Change | None:
    """With both copies seen: the write that brings the one behind up to the other; None when they are equal."""
    top = highest(copies.values())
    if top is None:
        return None
    for store in STORES:
        if rank(copies[store]) < rank(top):
            return Change(store, copies[store], top)
    return None


def authoritative(copies: Mapping[StoreName, FleetRecord | None]) -> FleetRecord | None:
    """The highest record seen, if the copy that decides was seen to have it; otherwise None: nothing may change."""
    top = highest(copies.values())
    if top is None or copies.get(AUTHORITY[top.phase]) != top:
        return None
    return top


def settle(copies: Mapping[StoreName, FleetRecord | None]) -> Change | None:
    """The write that records that the epoch is settled; the caller has the evidence (see the module's docstring).

    None when it is recorded already or when a copy lacks the epoch.
    """
    top = authoritative(copies)
    if top is None or top.settled or not mirrored(copies):
        return None
    return Change(AUTHORITY[top.phase], top, msgspec.structs.replace(top, settled=True, revision=top.revision + 1))


def mirrored(copies: Mapping[StoreName, FleetRecord | None]) -> bool:
    """True if both copies were seen and have the same epoch."""
    epochs = {record.epoch for store in STORES if (record := copies.get(store)) is not None}
    return len(epochs) == 1 and all(copies.get(store) is not None for store in STORES)


def advance(
    copies: Mapping[StoreName, FleetRecord | None], move: Move, *, by: str, why: str, at_us: int
) -> Change | None:
    """The write that makes ``move`` the next epoch; None while the current one is not settled or not decidable."""
    top = authoritative(copies)
    if top is None or not top.settled:
        return None
    new = msgspec.structs.replace(
        top,
        epoch=top.epoch + 1,
        revision=top.revision + 1,
        phase=move.phase,
        preparing=move.preparing,
        settled=False,
        by=by,
        why=why,
        at_us=at_us,
    )
    return Change(AUTHORITY[top.phase], top, new)


@dataclass(frozen=True, slots=True)
class Claim:
    """What an observer may conclude of one process from its newest heartbeat."""

    instance: str
    epoch: int  # wholly applied, as it says
    counts: bool  # False: drained or gone


def blockers(claims: Sequence[Claim], epoch: int) -> list[str]:
    """Instances for which ``epoch`` cannot be settled yet, sorted."""
    return sorted(c.instance for c in claims if c.counts and c.epoch < epoch)


def adopt(applied: FleetRecord | None, seen: Iterable[FleetRecord | None]) -> FleetRecord | None:
    """What an instance works under after it has read: never an older record than it has."""
    return highest((applied, *seen))

"""What a controller does next with what it has just read: pure, one decision at a time.

Order, and why: a fleet needs a record before anything; the copies are made equal before an epoch is settled; an epoch
is settled whatever is wished; then the wish is recorded, and only then a move is proposed, which the controller may do
once its gates are green. Whatever stops the way is a ``Hold``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from sidecar.fleet import protocol
from sidecar.fleet.census import Member, current
from sidecar.fleet.member import Wish
from sidecar.fleet.protocol import Change, Move
from sidecar.fleet_tables import FleetRecord, Hold
from sidecar.phase import STORES, TABLE, Phase, StoreName

PhaseAuthority = Literal["file", "api"]


@dataclass(frozen=True, slots=True)
class View:
    """What one look found. A store that did not answer is missing from ``copies`` and named in ``unreachable``."""

    copies: Mapping[StoreName, FleetRecord | None]
    unreachable: Mapping[StoreName, str]  # why, safe to show
    members: Sequence[Member] = ()
    complete: bool = False  # both stores' heartbeats were read after the copies


@dataclass(frozen=True, slots=True)
class Decision:
    """At most one of ``change`` (do it now) and ``move`` (do it when its gates are green)."""

    action: str = ""  # "create", "mirror", "settle", "wish"
    change: Change | None = None
    move: Move | None = None
    holds: tuple[Hold, ...] = ()


def create(view: View, wish: Wish, *, by: str, at_us: int) -> Decision:
    """The first record, from the configuration of whoever comes first."""
    if not protocol.may_create(wish.phase, view.copies, tuple(view.copies)):
        missing = ", ".join(f"{store}: {why}" for store, why in sorted(view.unreachable.items()))
        need = "postgres to answer" if TABLE[wish.phase].owed == {protocol.FIRST} else "both stores to answer"
        return Decision(holds=(Hold("fleet_record", f"none exists; no answer from {missing}", f"{need} once"),))
    record = FleetRecord(
        epoch=1,
        phase=wish.phase,
        by=by,
        why="first instance of the fleet, from its configuration",
        at_us=at_us,
        desired=wish.phase,
        phase_epoch=wish.phase_epoch or 0,
    )
    return Decision("create", Change(protocol.FIRST, None, record))


def decide(view: View, authority: PhaseAuthority) -> Decision:
    """The next thing to do with a fleet that has a record."""
    top = protocol.highest(view.copies.values())
    if top is None:
        raise ValueError("no record was read: create() decides that")
    if all(store in view.copies for store in STORES) and (change := protocol.mirror(view.copies)) is not None:
        return Decision("mirror", change)
    ahead = max((m.heartbeat.epoch for m in view.members if m.counts), default=0)
    if ahead > top.epoch:
        return Decision(
            holds=(
                Hold(
                    "record_not_lost",
                    f"epoch {top.epoch} in the stores, epoch {ahead} applied",
                    "the record that was applied: a store was restored to an older state, or a copy was not read",
                ),
            )
        )
    if protocol.authoritative(view.copies) is None:
        store = protocol.AUTHORITY[top.phase]
        why = view.unreachable.get(store, "it has an older record")
        return Decision(
            holds=(Hold("authority_reachable", f"{store}: {why}", f"the record of epoch {top.epoch} there"),)
        )
    hold: tuple[Hold, ...] = ()
    if not top.settled:
        stopped = _unsettled(view, top)
        if stopped is None and (change := protocol.settle(view.copies)) is not None:
            return Decision("settle", change)
        hold = (stopped,) if stopped is not None else ()
    return _follow(view, top, authority, hold)


def _unsettled(view: View, top: FleetRecord) -> Hold | None:
    if not view.complete or not protocol.mirrored(view.copies):
        silent = ", ".join(f"{s}: {why}" for s, why in sorted(view.unreachable.items())) or "heartbeats were not read"
        return Hold("both_copies", silent, f"both stores to answer, with epoch {top.epoch}")
    waiting = protocol.blockers([m.claim for m in view.members], top.epoch)
    if not waiting:
        return None
    shown = ", ".join(waiting[:5]) + (f" and {len(waiting) - 5} more" if len(waiting) > len(waiting[:5]) else "")
    return Hold("all_applied", f"waiting for {shown}", f"epoch {top.epoch} applied by every instance, or it is gone")


def _follow(view: View, top: FleetRecord, authority: PhaseAuthority, hold: tuple[Hold, ...]) -> Decision:
    if authority == "file":
        wish, conflict = accepted(top, view.members)
        hold = hold if conflict is None else (*hold, conflict)
        if wish is not None and (change := rewish(top, wish)) is not None:
            return Decision("wish", change)
        if wish is None and top.phase_epoch == 0:
            return Decision(holds=hold)
    move = protocol.next_move(top, top.phase if top.desired is None else top.desired)
    if move is None or not top.settled:
        return Decision(holds=hold)
    return Decision(move=move, holds=hold)


def accepted(record: FleetRecord, members: Sequence[Member]) -> tuple[Wish | None, Hold | None]:
    """Which configuration the fleet follows, and what is wrong with the others.

    Without ``phase_epoch`` all instances that count must agree. With it, the highest is followed, and every other
    configuration that names another phase than the fleet's wish moves nothing (``epoch_conflict``).
    """
    wishes: dict[str, Wish] = {}
    for row in (m.heartbeat for m in current(members) if m.counts):
        if row.desired is not None:
            name = row.instance if row.instance not in wishes else f"{row.instance} ({row.incarnation})"
            wishes[name] = Wish(row.desired, row.phase_epoch, row.force)
    top = max((w.phase_epoch or 0 for w in wishes.values()), default=0)
    if top > record.phase_epoch:
        voters = [w for w in wishes.values() if w.phase_epoch == top]
        if len({w.phase for w in voters}) > 1:
            return None, Hold(
                "epoch_conflict", f"phase_epoch {top}: {_split(wishes, top)}", "one phase for one phase_epoch"
            )
        return _joint(voters), None
    if record.phase_epoch > 0:
        return _standing(record, wishes)
    if not wishes:
        return None, None
    if len({w.phase for w in wishes.values()}) > 1:
        return None, Hold(
            "configurations_agree",
            _split(wishes, None),
            "the same phase in every instance's configuration, or a phase_epoch",
        )
    return _joint(list(wishes.values())), None


def _standing(record: FleetRecord, wishes: Mapping[str, Wish]) -> tuple[Wish | None, Hold | None]:
    """No configuration is newer than the wish in the record: it stands, and others are named."""
    current = [w for w in wishes.values() if w.phase_epoch == record.phase_epoch and w.phase == record.desired]
    stale = sorted(i for i, w in wishes.items() if w.phase != record.desired)
    conflict = Hold(
        "epoch_conflict",
        f"{', '.join(stale[:5])}: another phase without a phase_epoch above {record.phase_epoch}",
        f"phase_epoch {record.phase_epoch + 1} or higher to change the phase",
    )
    return (_joint(current) if current else None), (conflict if stale else None)


def _joint(wishes: Sequence[Wish]) -> Wish:
    """One wish for all: forced only if all say so."""
    reasons = [w.force for w in wishes]
    force = None if None in reasons else reasons[0]
    return Wish(wishes[0].phase, wishes[0].phase_epoch, force)


def _split(wishes: Mapping[str, Wish], epoch: int | None) -> str:
    by_phase: dict[Phase, list[str]] = {}
    for instance, wish in sorted(wishes.items()):
        if epoch is None or wish.phase_epoch == epoch:
            by_phase.setdefault(wish.phase, []).append(instance)
    return "; ".join(f"{phase.label}: {', '.join(names[:3])}" for phase, names in sorted(by_phase.items()))


def rewish(record: FleetRecord, wish: Wish) -> Change | None:
    """The write that records a wish; the epoch and who made it stay. None when it is recorded already."""
    new = msgspec.structs.replace(
        record, desired=wish.phase, phase_epoch=max(record.phase_epoch, wish.phase_epoch or 0), force=wish.force
    )
    if new == record:
        return None
    new = msgspec.structs.replace(new, revision=record.revision + 1)
    return Change(protocol.AUTHORITY[record.phase], record, new)

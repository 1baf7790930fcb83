"""A fleet of sidecars that changes phase together. Read ``protocol`` first: the invariants and the rules.

* ``types``       what is stored: record, heartbeat, gap line, audit entry
* ``protocol``    the rules, pure
* ``decision``    what a controller does next with what it has read, pure
* ``census``      who is alive, by the observer's monotonic clock
* ``member``      one instance: announce, apply, fence
* ``controller``  tick: look, and do what is due
* ``store``       the port; ``memory`` is its reference, ``lease`` is for stores without a clock
"""

from sidecar.fleet.census import Census, Member, Presence
from sidecar.fleet.controller import Controller, Evidence, Finding, Outlook, StepGate
from sidecar.fleet.decision import Hold
from sidecar.fleet.member import FleetMember, Identity, Load, Use, Wish
from sidecar.fleet.memory import MemoryFleetStore
from sidecar.fleet.protocol import Move
from sidecar.fleet.store import FleetStore
from sidecar.fleet.types import AuditEntry, FleetRecord, GapLine, Heartbeat

__all__ = [
    "AuditEntry",
    "Census",
    "Controller",
    "Evidence",
    "Finding",
    "FleetMember",
    "FleetRecord",
    "FleetStore",
    "GapLine",
    "Heartbeat",
    "Hold",
    "Identity",
    "Load",
    "Member",
    "MemoryFleetStore",
    "Move",
    "Outlook",
    "Presence",
    "StepGate",
    "Use",
    "Wish",
]

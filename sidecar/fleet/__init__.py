"""A fleet of sidecars that changes phase together. Read ``protocol`` first: the invariants and the rules.

* ``protocol``    the rules, pure
* ``decision``    what a controller does next with what it has read, pure
* ``census``      who is alive, by the observer's monotonic clock
* ``member``      one instance: announce, apply, fence
* ``controller``  tick: look, and do what is due
* ``outlook``     what such a look found
* ``memory``      the reference of the port ``sidecar.fleet_tables``, where what is stored is defined, too
* ``stores``      the port of each real store
"""

from sidecar.fleet.census import Census, Member, Presence, current, shared_names
from sidecar.fleet.controller import Controller
from sidecar.fleet.member import FleetMember, Identity, Load, Use, Wish
from sidecar.fleet.memory import MemoryFleetStore
from sidecar.fleet.outlook import Evidence, Finding, Outlook, StepGate
from sidecar.fleet.protocol import Move
from sidecar.fleet.stores import build_fleet_stores
from sidecar.fleet_tables import AuditEntry, FateLine, FleetRecord, FleetStore, Heartbeat, Hold
from sidecar.gaps import GapLine

__all__ = [
    "AuditEntry",
    "Census",
    "Controller",
    "Evidence",
    "FateLine",
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
    "build_fleet_stores",
    "current",
    "shared_names",
]

"""The fleet's port of every store that the sidecar has."""

from collections.abc import Mapping

from sidecar.fleet_tables import FleetStore, KeepsFleet
from sidecar.phase import StoreName


def build_fleet_stores(stores: Mapping[StoreName, KeepsFleet]) -> Mapping[StoreName, FleetStore]:
    """What ``FleetMember`` and ``Controller`` take, from the stores of records; nothing is opened, nothing is asked."""
    return {name: store.fleet for name, store in stores.items()}

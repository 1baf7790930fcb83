"""Who answers what the gates ask of the data: the verdicts, the checkpoints, and the watch over an adopted table."""

from collections.abc import Mapping

from sidecar.app.adopted import old_writers
from sidecar.app.consistency import home_of
from sidecar.app.parts import LedgeredStore
from sidecar.backfill.evidence import Copies
from sidecar.clock import Clock
from sidecar.consistency.evidence import Validations
from sidecar.evidence import Evidence
from sidecar.phase import StoreName
from sidecar.settings import Settings
from sidecar.stores.dynamodb_jobs import DynamoDBJobs


def build_evidence(stores: Mapping[StoreName, LedgeredStore], settings: Settings, clock: Clock) -> Evidence:
    """Reads only; nothing is opened before it is asked."""
    home = home_of(stores)
    return Evidence(
        validations=Validations(home.verdicts, clock),
        copies=Copies(DynamoDBJobs(home.wire, settings.dynamodb)),
        writers=old_writers(stores),
    )

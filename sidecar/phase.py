"""The four migration phases as ONE TABLE (specification L524-556; semantics, section 2).

Nobody else compares phases: a part asks the policy what to do. Flags of the specification are derived from the
table, so they can never contradict the phase.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import Literal

from sidecar.errors import ConfigError

StoreName = Literal["postgres", "dynamodb"]
POSTGRES: StoreName = "postgres"
DYNAMODB: StoreName = "dynamodb"
STORES: tuple[StoreName, ...] = (POSTGRES, DYNAMODB)


class Phase(IntEnum):
    """MigrationPhase (specification L390-396)."""

    SQL_ONLY = 0
    DUAL_WRITE = 1
    DUAL_WRITE_READ_DYNAMO = 2
    DYNAMO_ONLY = 3

    @property
    def label(self) -> str:
        """The name used in configuration, answers and metrics, e.g. ``dual_write``."""
        return self.name.lower()


class Delivery(StrEnum):
    """What a phase owes to a store."""

    REQUIRED = "required"  # never released; a full spool pushes the application back
    BEST_EFFORT = "best_effort"  # may lag; released last-resort, recorded in the gap ledger; never pushes back


@dataclass(frozen=True, slots=True)
class Policy:
    """What one phase means. Immutable; a request keeps the policy that it began with."""

    phase: Phase
    writes: Mapping[StoreName, Delivery]
    reads_from: StoreName
    description: str

    @property
    def required(self) -> frozenset[StoreName]:
        """Stores that must receive every record of this phase."""
        return frozenset(s for s, d in self.writes.items() if d is Delivery.REQUIRED)

    @property
    def owed(self) -> frozenset[StoreName]:
        """All stores that records of this phase are owed to."""
        return frozenset(self.writes)

    @property
    def flags(self) -> dict[str, bool]:
        """The specification's HybridLogConfiguration flags (L371-382), derived."""
        return {
            "writes_to_sql": POSTGRES in self.writes,
            "writes_to_dynamodb": DYNAMODB in self.writes,
            "require_both_writes": self.required == {POSTGRES, DYNAMODB},
            "reads_from_dynamodb": self.reads_from == DYNAMODB,
        }


def _policy(phase: Phase, reads: StoreName, text: str, **writes: Delivery) -> Policy:
    typed: dict[StoreName, Delivery] = {s: writes[s] for s in STORES if s in writes}
    return Policy(phase, MappingProxyType(typed), reads, text)


TABLE: Mapping[Phase, Policy] = MappingProxyType(
    {
        p.phase: p
        for p in (
            _policy(Phase.SQL_ONLY, POSTGRES, "Baseline - SQL only", postgres=Delivery.REQUIRED),
            _policy(
                Phase.DUAL_WRITE,
                POSTGRES,
                "Dual write - SQL primary, DynamoDB secondary",
                postgres=Delivery.REQUIRED,
                dynamodb=Delivery.BEST_EFFORT,
            ),
            _policy(
                Phase.DUAL_WRITE_READ_DYNAMO,
                DYNAMODB,
                "Dual write with DynamoDB reads",
                postgres=Delivery.REQUIRED,
                dynamodb=Delivery.REQUIRED,
            ),
            _policy(Phase.DYNAMO_ONLY, DYNAMODB, "DynamoDB only - migration complete", dynamodb=Delivery.REQUIRED),
        )
    }
)

_SPELLINGS: Mapping[str, Phase] = MappingProxyType(
    {p.label: p for p in Phase} | {str(int(p)): p for p in Phase} | {p.name.title().replace("_", ""): p for p in Phase}
)


def parse_phase(value: object, setting: str = "phase") -> Phase:
    """Read a phase from configuration: ``dual_write``, ``DualWrite``, ``1`` or ``"1"``.

    Raises:
        ConfigError: any other value (a bool is not a number here).
    """
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        phase = _SPELLINGS.get(str(value).strip())
        if phase is not None:
            return phase
    raise ConfigError(
        setting, seen=value, allowed=", ".join(p.label for p in Phase) + " (or 0..3)", hint="correct the name"
    )


def adjacent(a: Phase, b: Phase) -> bool:
    """True where one step leads from a to b: the only pairs that may coexist in a fleet (semantics, section 9)."""
    return abs(a - b) == 1

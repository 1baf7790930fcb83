"""To whom records are owed at an instant, and a request's hold on that from the stamp to the commit."""

from dataclasses import dataclass
from typing import Protocol

from sidecar.phase import Policy
from sidecar.spool.types import Obligation


@dataclass(frozen=True, slots=True)
class Standing:
    """To whom records are owed at this instant. ``fenced``: this instance does not know the fleet's phase for sure."""

    policy: Policy
    fenced: bool = False

    @property
    def obligation(self) -> Obligation:
        """What the records of a request are stamped with; a fenced instance leaves it to be decided."""
        if self.fenced:
            return Obligation(int(self.policy.phase), frozenset(), unresolved=True)
        return Obligation(
            phase=int(self.policy.phase),
            required=self.policy.required,
            best_effort=self.policy.owed - self.policy.required,
        )


class Hold(Protocol):
    """A request's hold on the standing that its records are stamped by, from the stamp to the commit."""

    @property
    def standing(self) -> Standing:
        """As it was when the hold began."""
        ...

    @property
    def valid(self) -> bool:
        """False where it may have been outdated before the commit was over (``sidecar.fleet.Use``)."""
        ...


@dataclass(frozen=True, slots=True)
class Firm:
    """The hold of an instance that decides its phase alone: it is always valid."""

    standing: Standing
    valid: bool = True

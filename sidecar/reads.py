"""Which store answers a read: the one that the phase names, and nobody else. A failure is raised, never "no data"."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sidecar.phase import Policy, StoreName
from sidecar.record import LogRecord
from sidecar.stores.base import Store


@dataclass(frozen=True, slots=True)
class Read:
    """One record (or None: the store answered and has none), who served it and under which policy."""

    record: LogRecord | None
    served_by: StoreName
    policy: Policy


class Reads:
    """Answers reads by the policy in force when each begins."""

    def __init__(self, stores: Mapping[StoreName, Store], policy: Callable[[], Policy]) -> None:
        self._stores = stores
        self._policy = policy

    async def get(self, log_id: str) -> Read:
        """One record by id, strongly consistent. Raises StoreError where the store cannot answer."""
        policy = self._policy()
        return Read(await self._stores[policy.reads_from].get(log_id), policy.reads_from, policy)

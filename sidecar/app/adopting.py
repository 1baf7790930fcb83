"""The adoption of a table, for the command line: the only thing it needs of the PostgreSQL store."""

from collections.abc import AsyncIterator

from sidecar.clock import Clock
from sidecar.settings import Postgres
from sidecar.stores.postgres import PostgresStore
from sidecar.stores.postgres_plan import Plan, Step

__all__ = ["Adoption", "Plan", "Step"]


class Adoption:
    """Plans and applies what an adopted table still needs; every method may raise StoreError."""

    def __init__(self, options: Postgres, clock: Clock, *, read_indexes: bool) -> None:
        self._store = PostgresStore(options, clock=clock)
        self._read_indexes = read_indexes

    async def plan(self) -> Plan:
        """What is to be done; changes nothing."""
        return await self._store.adoption(read_indexes=self._read_indexes)

    def apply(self) -> AsyncIterator[Step]:
        """Do it, step by step; yields each when it is done."""
        return self._store.adopt(read_indexes=self._read_indexes)

    async def close(self) -> None:
        """End all connections."""
        await self._store.close()

"""A record inserted and read in a transaction that is rolled back (``sidecar.canary``)."""

from collections.abc import Callable, Sequence
from typing import Any

from sidecar.stores.postgres_connections import Connections, Link


async def tried(
    connections: Connections,
    insert: Callable[[tuple[str, ...]], str],
    row: Sequence[object],
    stored: str,
    named: Sequence[object],
) -> Any:
    """What the table gives back of ``row``, as rows; ``insert`` makes the statement for an index. Raises StoreError."""

    async def work(link: Link) -> Any:
        transaction = link.connection.transaction()
        await transaction.start()
        try:
            await link.connection.fetch(insert(link.unique), *([value] for value in row))
            return await link.connection.fetch(stored, *named)
        finally:
            if not link.connection.is_closed():
                await transaction.rollback()

    return await connections.run(work, whole=False)

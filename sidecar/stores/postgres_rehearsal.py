"""Which rows PostgreSQL would refuse: the real insert, in a transaction that is rolled back.

Known limits would not do: what refuses a row may be a check constraint, a foreign key, a unique index, a trigger or a
policy of an adopted table. So the server is asked, with the very statement that fills:

* Everything happens inside one transaction (a savepoint of the pooler's, where there is one) that always ends in
  ROLLBACK. Deferred constraints are made immediate, or their verdict would come with the commit that never comes.
* A batch that is refused is halved until the rows that are refused stand alone. Halves that pass stay until the end,
  so that two rows which violate a unique index together are found too.
* What it costs: the rows that pass are written and left dead (VACUUM gives the space back, and the copy that follows
  uses it), sequences of an adopted table's own columns advance. Rows whose id is there already cost nothing.

FAILURE: only what concerns the rows is a verdict. Anything else (the connection, a lock, a full disk) raises, and the
server rolls back by itself.
"""

from collections.abc import Sequence
from typing import Final

from sidecar.errors import RetryClass, StoreError
from sidecar.stores.base import Failure
from sidecar.stores.postgres_connections import Connection
from sidecar.stores.postgres_errors import translate

Row = tuple[object, ...]
_VERDICTS: Final = frozenset({RetryClass.PERMANENT, RetryClass.UNKNOWN, RetryClass.CONFLICT})


async def refused(connection: Connection, insert: str, rows: Sequence[Row]) -> list[Failure]:
    """Try ``insert`` (of arrays, one per column) with the rows; nothing is left behind. Raises StoreError."""
    if not rows:
        return []
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute("SET CONSTRAINTS ALL IMMEDIATE")
        return await _among(connection, insert, rows, 0)
    finally:
        if not connection.is_closed():
            await transaction.rollback()


async def _among(connection: Connection, insert: str, rows: Sequence[Row], first: int) -> list[Failure]:
    """The refused ones of ``rows``, whose indexes begin with ``first``; the others are inserted."""
    refusal = await _try(connection, insert, rows)
    if refusal is None:
        return []
    if len(rows) == 1:
        return [Failure(first, refusal.retry_class, refusal.reason, refusal.code)]
    half = len(rows) // 2
    left = await _among(connection, insert, rows[:half], first)
    return left + await _among(connection, insert, rows[half:], first + half)


async def _try(connection: Connection, insert: str, rows: Sequence[Row]) -> StoreError | None:
    """Insert the rows, all or none; why not, where the rows are at fault. Raises StoreError where they are not."""
    point = connection.transaction()
    await point.start()
    try:
        await connection.execute(insert, *zip(*rows, strict=True))
    except Exception as error:  # noqa: BLE001  (the driver's own table of errors says what each means)
        verdict = translate(error)
    else:
        await point.commit()
        return None
    if verdict.retry_class not in _VERDICTS:
        raise verdict
    await point.rollback()
    return verdict

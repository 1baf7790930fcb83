"""An item put, read and deleted under the canary's prefix (``sidecar.canary``)."""

from typing import Any, Final

import msgspec

from sidecar.canary import PREFIX
from sidecar.record import FIELDS, LogRecord
from sidecar.stores import dynamodb_errors as errors
from sidecar.stores.dynamodb_items import Item, encode_item
from sidecar.stores.dynamodb_wire import Wire

_KEPT: Final = frozenset(FIELDS) | {"h"}  # no attribute of an index: no query ever meets it


class _Got(msgspec.Struct):
    item: Item | None = msgspec.field(name="Item", default=None)


async def tried(wire: Wire, table: str, record: LogRecord) -> LogRecord | None:
    """What the table gives back of ``record``. Raises StoreError, also where the item could not be deleted."""
    whole: dict[str, Any] = msgspec.json.decode(encode_item(record, 1, None))
    key = {"log_id": {"S": PREFIX + record.log_id}}
    item = {name: value for name, value in whole.items() if name in _KEPT} | key
    await wire.call("PutItem", msgspec.json.encode({"TableName": table, "Item": item}))
    try:
        wanted = {"TableName": table, "Key": key, "ConsistentRead": True}
        answer = await wire.call("GetItem", msgspec.json.encode(wanted))
        found = msgspec.json.decode(answer, type=_Got).item
        read = None if found is None else found.record()
    except (msgspec.DecodeError, ValueError):
        raise errors.unreadable("GetItem") from None
    finally:
        await wire.call("DeleteItem", msgspec.json.encode({"TableName": table, "Key": key}))
    return None if read is None else msgspec.structs.replace(read, log_id=read.log_id.removeprefix(PREFIX))

"""What DynamoDB refuses of a record, known before anything is sent.

==================  ===========================================================================================
limit               where it can be met
==================  ===========================================================================================
400 KB an item      rows of an adopted table: the door's own bound is 350 KiB
2,048 bytes a hash  a service name or correlation id of an adopted table; the door's 100 characters are far below
key
years 1 to 9999     a ``timestamptz`` may lie before or after, or be infinite; our sort key has four digits
==================  ===========================================================================================
"""

from typing import Final, NamedTuple

from sidecar.record import LogRecord
from sidecar.stores.dynamodb_items import MAX_ITEM_BYTES, encode_item, fits, item_size
from sidecar.stores.dynamodb_pages import FIRST_US, LAST_US

MAX_KEY_BYTES: Final = 2_048
_OWN_KEY_BYTES: Final = 32  # of ``gs`` beside the name: prefix, date and shard


class Refusal(NamedTuple):
    """Why; both texts name no value of the record but its size."""

    reason: str
    code: str


def refusal(record: LogRecord, shards: int, ttl_days: int | None) -> Refusal | None:
    """Why the service would refuse the record's item; None where it would take it."""
    if not FIRST_US <= record.log_timestamp <= LAST_US:
        return Refusal("log_timestamp is not of the years 1 to 9999", "TimeOutOfRange")
    for field in ("service_name", "correlation_id"):
        text = getattr(record, field)
        if text is not None and len(text.encode()) > MAX_KEY_BYTES - _OWN_KEY_BYTES:
            return Refusal(f"{field} is over {MAX_KEY_BYTES - _OWN_KEY_BYTES} bytes: no key of an index", "KeyTooLarge")
    item = encode_item(record, shards, ttl_days)
    if not fits(item):
        return Refusal(f"the item has {item_size(item)} bytes, DynamoDB takes {MAX_ITEM_BYTES}", "ItemTooLarge")
    return None

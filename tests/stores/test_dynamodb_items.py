"""A record as an item and back; keys, shards and sizes."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.record import LogRecord, digest, timestamp_text
from sidecar.stores import dynamodb_items as items
from tests.parts.dynamodb import NOON_US, record
from tests.stores.records import FIRST_TIME, LAST_TIME, log_records

_item = msgspec.json.Decoder(items.Item)


def decoded(value: LogRecord, shards: int = 4, ttl_days: int | None = None) -> dict[str, dict[str, object]]:
    """The item as plain JSON."""
    item = items.encode_item(value, shards, ttl_days)
    return msgspec.json.decode(item, type=dict[str, dict[str, object]])


@given(log_records(), st.integers(1, 64))
def test_every_record_comes_back_from_its_item(value: LogRecord, shards: int) -> None:
    """No text, number or null is changed on the way, whatever its characters."""
    assert _item.decode(items.encode_item(value, shards, None)).record() == value


@given(log_records())
def test_the_item_carries_the_digest_of_the_record(value: LogRecord) -> None:
    """``h`` is record.digest, as Binary."""
    assert msgspec.convert(decoded(value)["h"], dict[str, bytes]) == {"B": digest(value)}


@given(st.integers(FIRST_TIME, LAST_TIME))
def test_time_keys_are_the_timestamp_text_and_come_back(us: int) -> None:
    """The quick way writes what record.timestamp_text writes, over all years that have four digits."""
    assert items.time_key(us) == timestamp_text(us)
    assert items.parse_time_key(items.time_key(us)) == us


@given(st.integers(FIRST_TIME, LAST_TIME), st.uuids(), st.integers(FIRST_TIME, LAST_TIME), st.uuids())
def test_order_of_sort_keys_is_order_of_time_and_id(us: int, one: object, other_us: int, other: object) -> None:
    """Text order of ``gt`` is the order of every answer."""
    left, right = (us, str(one)), (other_us, str(other))
    assert (items.sort_key(*left) < items.sort_key(*right)) == (left < right)


@pytest.mark.parametrize(
    "text", ["", "2026-11-22", "2026-11-22T17:24:52.12345Z", "2026-11-22T17:24:52.123456+", "x" * 27]
)
def test_a_time_key_that_is_not_ours_is_refused(text: str) -> None:
    """Never read as some other time."""
    with pytest.raises(ValueError):
        items.parse_time_key(text)


def test_keys_have_the_documented_form() -> None:
    """The formats of decision record 0002, which readers in other languages rely on."""
    value = record(
        log_id="0190163d-8694-739b-aea5-966c26f8ad91", is_success=False, service_name="a#b", correlation_id=""
    )
    keys = {name: typed["S"] for name, typed in decoded(value).items() if name in {"gt", "gs", "ga", "gc", "ge"}}
    assert keys == {
        "gt": "2024-10-04T12:00:00.000000Z#0190163d-8694-739b-aea5-966c26f8ad91",
        "gs": "S#a#b#2024-10-04#1",
        "ga": "A#7",
        "gc": "C#",
        "ge": "E#2024-10-04#1",
    }


def test_shards_are_the_same_in_every_version() -> None:
    """CRC-32 of the id's text, modulo: fixed values, because written items depend on it."""
    ids = ("0190163d-8694-739b-aea5-966c26f8ad91", "00000000-0000-7000-8000-000000000000", "ping")
    assert [items.shard_of(i, 64) for i in ids] == [57, 23, 61]


def test_null_has_no_attribute_and_no_key() -> None:
    """The indexes are sparse, and null is not the empty text."""
    fields = ("application_id", "request_data", "response_data", "status_code", "processing_time_ms")
    found = decoded(record(**dict.fromkeys((*fields, "correlation_id", "user_id"))))
    assert found.keys() == {"log_id", "log_type", "service_name", "is_success", "log_timestamp", "h", "gt", "gs"}


@pytest.mark.parametrize("field", ["request_data", "response_data", "error_message", "correlation_id", "user_id"])
def test_an_empty_text_stays_an_empty_text(field: str) -> None:
    """Distinct from null in both directions."""
    value = record(**{field: ""})
    assert decoded(value)[field] == {"S": ""}
    assert _item.decode(items.encode_item(value, 4, None)).record() == value


@pytest.mark.parametrize(("us", "seconds"), [(0, 0), (1, 1), (1_000_000, 1), (NOON_US + 1, NOON_US // 1_000_000 + 1)])
def test_expiry_counts_from_the_records_time_and_is_never_early(us: int, seconds: int) -> None:
    """Rounded up to the whole second; from log_timestamp, not from now."""
    assert decoded(record(log_timestamp=us), ttl_days=30)["expires_at"] == {"N": str(seconds + 30 * 86_400)}
    assert "expires_at" not in decoded(record(log_timestamp=us))


@given(log_records())
def test_the_json_is_never_shorter_than_what_is_counted(value: LogRecord) -> None:
    """So a short JSON needs no exact count."""
    item = items.encode_item(value, 4, 30)
    assert items.item_size(item) <= len(item)


def test_item_size_counts_as_the_service_does() -> None:
    """UTF-8 of names and texts; a number one byte for two digits and some; BOOL one; Binary its bytes."""
    item = b'{"ab":{"S":"\xc3\xa9x"},"n":{"N":"1234"},"f":{"BOOL":true},"h":{"B":"AAAA"}}'
    assert items.item_size(item) == (2 + 3) + (1 + 4) + (1 + 1) + (1 + 3)


def test_an_item_of_exactly_400_kb_fits_and_one_byte_more_does_not() -> None:
    """Measured on the item, not on its JSON, which is longer here because of the escapes."""
    spare = items.MAX_ITEM_BYTES - items.item_size(items.encode_item(record(response_data=""), 4, None))
    assert items.fits(items.encode_item(record(response_data='"' * spare), 4, None))
    assert not items.fits(items.encode_item(record(response_data='"' * (spare + 1)), 4, None))

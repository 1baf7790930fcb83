"""A record as a DynamoDB item and back.

LAYOUT (decision record 0002; semantics, section 10). The table's key is ``log_id`` alone.

=====================  ====  =================================================================================
attribute              type  meaning
=====================  ====  =================================================================================
the thirteen fields          under their snake_case names; text S, numbers N, ``is_success`` BOOL,
                             ``log_timestamp`` S, ``record.timestamp_text``. Null = no attribute; an empty text stays
                             an empty S.
``h``                  B     ``record.digest``: 128 bits over the thirteen fields
``gt``                 S     sort key of every index: ``<timestamp_text>#<log_id>``; text order is (time, id)
``gs``                 S     hash key of index ``service``: ``S#<service_name>#<YYYY-MM-DD>#<shard>``
``ga``                 S     hash key of index ``application``: ``A#<application_id>``; absent where that is null
``gc``                 S     hash key of index ``correlation``: ``C#<correlation_id>``; absent where that is null
``ge``                 S     hash key of index ``errors``: ``E#<YYYY-MM-DD>#<shard>``; absent where is_success
``expires_at``         N     TTL, seconds since the epoch, counted from log_timestamp; absent without ``ttl_days``
=====================  ====  =================================================================================

The prefix keeps an empty text a legal index key (DynamoDB refuses the empty string there), so null and "" stay
distinct and both are found again. A hash key is unambiguous whatever the text contains, because what follows the text
has a fixed form. ``shard = crc32(log_id) mod N(date)``: stable over versions, machines and languages.

Items are built straight as DynamoDB JSON bytes: every value passes through msgspec's escaping, or cannot need any.
"""

import re
from binascii import a2b_base64, b2a_base64
from datetime import date, datetime
from functools import lru_cache
from typing import Final
from zlib import crc32

import msgspec

from sidecar.record import LogRecord, digest, timestamp_text
from sidecar.stores.base import Summary

SECOND: Final = 1_000_000  # microseconds
DAY: Final = 86_400 * SECOND
_EPOCH: Final = date(1970, 1, 1).toordinal()
MAX_ITEM_BYTES: Final = 400 * 1024
_SHARD_DIGITS: Final = 4

_json = msgspec.json.encode
_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]\.[0-9]{6}Z")


@lru_cache(maxsize=4096)
def _second_bytes(second: int) -> bytes:
    """``2026-11-22T17:24:52.``: the slow part of a timestamp, the same for all records of one second."""
    return timestamp_text(second * SECOND)[:20].encode()


def _time_bytes(us: int) -> bytes:
    second, rest = divmod(us, SECOND)
    return b"%b%06dZ" % (_second_bytes(second), rest)


def time_key(us: int) -> str:
    """The same text as ``record.timestamp_text``, quickly."""
    return _time_bytes(us).decode()


@lru_cache(maxsize=65_536)
def _minute(text: str) -> int:
    """Microseconds since the epoch of ``2026-11-22T17:24``. Raises ValueError."""
    return int(datetime.fromisoformat(f"{text}:00+00:00").timestamp()) * SECOND


def parse_time_key(text: str) -> int:
    """Microseconds since the epoch of what ``time_key`` wrote. Raises ValueError for anything else."""
    if _TIME.fullmatch(text) is None:
        raise ValueError
    return _minute(text[:16]) + int(text[17:19]) * SECOND + int(text[20:26])


def sort_key(us: int, log_id: str) -> str:
    """``gt``: text order is the order of (time, id)."""
    return f"{time_key(us)}#{log_id}"


def split_sort_key(key: str) -> tuple[str, str]:
    """``(timestamp text, log_id)`` of a ``gt``."""
    return key[:27], key[28:]


def day_text(day: int) -> str:
    """``2026-11-22`` of days since the epoch."""
    return timestamp_text(day * DAY)[:10]


def day_number(text: str) -> int | None:
    """Days since the epoch of ``2026-11-22``; None where the text is no such date."""
    try:
        return date.fromisoformat(text).toordinal() - _EPOCH
    except ValueError:
        return None


def shard_of(log_id: str, shards: int) -> int:
    """The shard of a record among ``shards``."""
    return crc32(log_id.encode()) % shards


def service_key(service_name: str, day: str, shard: int) -> str:
    """``gs``; ``day`` is ``YYYY-MM-DD``."""
    return f"S#{service_name}#{day}#{shard}"


def split_service_key(key: str) -> tuple[str, str]:
    """``(service_name, day)`` of a ``gs``, whatever the name contains."""
    head, _, _ = key.rpartition("#")
    head, _, day = head.rpartition("#")
    return head[2:], day


def errors_key(day: str, shard: int) -> str:
    """``ge``; ``day`` is ``YYYY-MM-DD``."""
    return f"E#{day}#{shard}"


def application_key(application_id: int) -> str:
    """``ga``."""
    return f"A#{application_id}"


def correlation_key(correlation_id: str) -> str:
    """``gc``; an empty correlation id is the key ``C#``."""
    return f"C#{correlation_id}"


def expires_at(log_timestamp: int, ttl_days: int) -> int:
    """TTL in whole seconds, rounded up: never before its time."""
    return -(-log_timestamp // SECOND) + ttl_days * 86_400


def encode_item(record: LogRecord, shards: int, ttl_days: int | None) -> bytes:  # noqa: C901  (the hot path, unrolled)
    """The item as DynamoDB JSON: ``{"log_id":{"S":"..."}, ...}``; ``shards`` is N of the record's UTC day."""
    log_id, is_success, log_timestamp = record.log_id, record.is_success, record.log_timestamp
    time = _time_bytes(log_timestamp)
    day = time[:10]
    identity = log_id.encode()  # canonical: nothing in it needs escaping
    service = _json(record.service_name)
    shard = b"%d" % shard_of(log_id, shards)
    # One join of small parts: formatting the same with % costs a fifth more, structs for msgspec as much.
    parts = [
        b'{"log_id":{"S":"',
        identity,
        b'"},"log_type":{"S":',
        _json(record.log_type),
        b'},"service_name":{"S":',
        service,
        b'},"log_timestamp":{"S":"',
        time,
        b'"},"is_success":{"BOOL":true},"h":{"B":"' if is_success else b'"},"is_success":{"BOOL":false},"h":{"B":"',
        b2a_base64(digest(record), newline=False),
        b'"},"gt":{"S":"',
        time,
        b"#",
        identity,
        b'"},"gs":{"S":"S#',
        service[1:-1],
        b"#",
        day,
        b"#",
        shard,
        b'"}',
    ]
    if record.request_data is not None:
        parts += (b',"request_data":{"S":', _json(record.request_data), b"}")
    if record.response_data is not None:
        parts += (b',"response_data":{"S":', _json(record.response_data), b"}")
    if record.error_message is not None:
        parts += (b',"error_message":{"S":', _json(record.error_message), b"}")
    if record.user_id is not None:
        parts += (b',"user_id":{"S":', _json(record.user_id), b"}")
    if record.status_code is not None:
        parts.append(b',"status_code":{"N":"%d"}' % record.status_code)
    if record.processing_time_ms is not None:
        parts.append(b',"processing_time_ms":{"N":"%d"}' % record.processing_time_ms)
    application_id = record.application_id
    if application_id is not None:
        parts.append(b',"application_id":{"N":"%d"},"ga":{"S":"A#%d"}' % (application_id, application_id))
    if record.correlation_id is not None:
        text = _json(record.correlation_id)
        parts += (b',"correlation_id":{"S":', text, b'},"gc":{"S":"C#', text[1:], b"}")
    if not is_success:
        parts += (b',"ge":{"S":"E#', day, b"#", shard, b'"}')
    if ttl_days is not None:
        parts.append(b',"expires_at":{"N":"%d"}' % expires_at(log_timestamp, ttl_days))
    parts.append(b"}")
    return b"".join(parts)


class _S(msgspec.Struct, gc=False):
    S: str


class _N(msgspec.Struct, gc=False):
    N: str


class _B(msgspec.Struct, gc=False):
    B: bytes  # base64 in JSON


class _Bool(msgspec.Struct, gc=False):
    BOOL: bool


class Item(msgspec.Struct, gc=False):
    """An item as the service answers it; unknown attributes are passed over."""

    log_id: _S
    log_type: _S
    service_name: _S
    is_success: _Bool
    log_timestamp: _S
    application_id: _N | None = None
    request_data: _S | None = None
    response_data: _S | None = None
    status_code: _N | None = None
    error_message: _S | None = None
    processing_time_ms: _N | None = None
    correlation_id: _S | None = None
    user_id: _S | None = None

    def record(self) -> LogRecord:
        """The record that this item holds. Raises ValueError where a number or the time is none of ours."""
        return LogRecord(
            self.log_id.S,
            _integer(self.application_id),
            self.log_type.S,
            self.service_name.S,
            _string(self.request_data),
            _string(self.response_data),
            _integer(self.status_code),
            self.is_success.BOOL,
            _string(self.error_message),
            _integer(self.processing_time_ms),
            parse_time_key(self.log_timestamp.S),
            _string(self.correlation_id),
            _string(self.user_id),
        )


class KeyedItem(Item, gc=False):
    """An item with what a sidecar keeps beside the fields."""

    h: _B | None = None
    gt: _S | None = None
    gs: _S | None = None
    ga: _S | None = None
    gc: _S | None = None
    ge: _S | None = None

    def wrong(self, record: LogRecord, content: bytes, shards: int) -> tuple[str, ...]:
        """Names of the attributes that are not what they must be for this item's ``record``.

        Args:
            record: what ``record()`` gives.
            content: its digest.
            shards: how many of its day readers look into. Any of them will do: whichever it is in, it is found.
        """
        time = time_key(record.log_timestamp)
        application, correlation = record.application_id, record.correlation_id
        errors = self.ge is None if record.is_success else _among(self.ge, f"E#{time[:10]}#", shards)
        checks = (
            ("h", self.h is not None and content == self.h.B),
            ("gt", _string(self.gt) == f"{time}#{record.log_id}"),
            ("gs", _among(self.gs, f"S#{record.service_name}#{time[:10]}#", shards)),
            ("ga", _string(self.ga) == (None if application is None else application_key(application))),
            ("gc", _string(self.gc) == (None if correlation is None else correlation_key(correlation))),
            ("ge", errors),
        )
        return tuple(name for name, right in checks if not right)


def _among(key: _S | None, prefix: str, shards: int) -> bool:
    return key is not None and key.S.startswith(prefix) and shard_number(key.S[len(prefix) :]) in range(shards)


def shard_number(text: str) -> int:
    """A shard as it is written in a key; -1 where the text is none."""
    return (
        int(text) if len(text) <= _SHARD_DIGITS and text.isascii() and text.isdigit() and text == str(int(text)) else -1
    )


class IndexEntry(msgspec.Struct, gc=False):
    """What an index answers for: time, id and, where projected and asked for, digest, hash key and the table's key."""

    gt: _S
    h: _B | None = None
    gs: _S | None = None
    log_id: _S | None = None


class LooseEntry(msgspec.Struct, gc=False):
    """An entry of an item that somebody else wrote: ``h`` is of any type."""

    gt: _S
    gs: _S
    log_id: _S

    def strict(self) -> IndexEntry:
        """The same without a digest."""
        return IndexEntry(self.gt, None, self.gs, self.log_id)


class SummaryEntry(msgspec.Struct, gc=False):
    """All that an index holds of a record, but for its digest."""

    gt: _S
    log_type: _S
    is_success: _Bool
    status_code: _N | None = None
    processing_time_ms: _N | None = None

    def summary(self) -> Summary:
        """In the port's form. Raises ValueError where a number or the time is none of ours."""
        time, log_id = split_sort_key(self.gt.S)
        return Summary(
            log_id,
            parse_time_key(time),
            self.log_type.S,
            _integer(self.status_code),
            self.is_success.BOOL,
            _integer(self.processing_time_ms),
        )


def _integer(value: _N | None) -> int | None:
    return None if value is None else int(value.N)


def _string(value: _S | None) -> str | None:
    return None if value is None else value.S


def item_size(item: bytes) -> int:
    """The size that DynamoDB counts, in bytes: UTF-8 of names and values (numbers: two digits a byte, plus one)."""
    total = 0
    for name, typed in msgspec.json.decode(item).items():
        ((kind, value),) = typed.items()
        total += len(name.encode())
        if kind == "S":
            total += len(value.encode())
        elif kind == "N":
            total += 2 + (len(value) + 1) // 2
        elif kind == "B":
            total += len(a2b_base64(value))
        else:
            total += 1
    return total


def fits(item: bytes) -> bool:
    """True where the item is within DynamoDB's 400 KB. Its JSON is never shorter than what is counted."""
    return len(item) <= MAX_ITEM_BYTES or item_size(item) <= MAX_ITEM_BYTES

"""The integration-log record as it is stored: thirteen fields, immutable, identified before its first durable write.

``LogRecord`` is the one shape that travels from the door to the spool, to every store and back to a reader. Its
msgpack array form is what the spool keeps and what :func:`digest` hashes, so the order of the fields is an on-disk
format: append only, never reorder.
"""

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
FIELDS: Final = (
    "log_id",
    "application_id",
    "log_type",
    "service_name",
    "request_data",
    "response_data",
    "status_code",
    "is_success",
    "error_message",
    "processing_time_ms",
    "log_timestamp",
    "correlation_id",
    "user_id",
)


class LogRecord(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One record (specification: IntegrationLog; semantics, section 1).

    ``log_id`` is the canonical lower-case UUID text, ``log_timestamp`` microseconds since the epoch, UTC.
    """

    log_id: str
    application_id: int | None
    log_type: str
    service_name: str
    request_data: str | None
    response_data: str | None
    status_code: int | None
    is_success: bool
    error_message: str | None
    processing_time_ms: int | None
    log_timestamp: int
    correlation_id: str | None
    user_id: str | None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(LogRecord)

encode = _encoder.encode
"""``encode(record) -> bytes``: the stored form (msgpack array of the thirteen fields)."""

decode = _decoder.decode
"""``decode(data) -> LogRecord``; raises msgspec.DecodeError / ValidationError on damaged bytes."""


_blank: Final = hashlib.blake2b(digest_size=16)


def digest(record: LogRecord) -> bytes:
    """128-bit digest of the stored record (BLAKE2b over its stored form): equal iff all thirteen fields are equal."""
    state = _blank.copy()  # cheaper than a new one: no arguments to parse
    state.update(encode(record))
    return state.digest()


def timestamp_text(us: int) -> str:
    """``2026-11-22T17:24:52.123456Z``: always six digits and Z, so that text order is time order (years 1..9999)."""
    return (EPOCH + timedelta(microseconds=us)).strftime("%Y-%m-%dT%H:%M:%S.%fZ").rjust(27, "0")


def to_dict(record: LogRecord) -> dict[str, object]:
    """The JSON shape of a record in every answer: snake_case names, timestamp as text, payloads as text."""
    values = dict(zip(FIELDS, msgspec.structs.astuple(record), strict=True))
    values["log_timestamp"] = timestamp_text(record.log_timestamp)
    return values

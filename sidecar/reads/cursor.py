"""Where a page ends, as a text that either store can go on from.

FORMAT, version 1: base64url without padding (44 characters) of 33 bytes::

    1   version, 0x01
    8   log_timestamp of the last record of the page, microseconds since the epoch, signed, big-endian
    16  its log_id
    8   BLAKE2b over all of the above and the query

INVARIANTS: a cursor names a place in the order of all answers (``stores.base.Position``), never a store's own token, so
paging goes on through a change of phase without a repeat or a miss. The digest holds the query but neither ``limit``
nor ``view``: these may change from page to page. It is no secret and protects nothing; it tells a cursor of another
query, a damaged one or an invented one from ours.
"""

import base64
import binascii
import hashlib
import struct
import uuid
from typing import Final

import msgspec

from sidecar.errors import BadRequest
from sidecar.screening.timestamps import EARLIEST, LATEST
from sidecar.stores.base import ByApplication, ByCorrelation, ByService, ErrorsOn, Position, Query

_VERSION: Final = 1
_HEAD: Final = struct.Struct(">Bq16s")
_DIGEST_BYTES: Final = 8
_TEXT_LENGTH: Final = 44
_PERSON: Final = b"sidecar-cursor"

_encode_query: Final = msgspec.msgpack.Encoder().encode


def encode(query: Query, position: Position) -> str:
    """The cursor that goes on after ``position``."""
    head = _HEAD.pack(_VERSION, position.log_timestamp, uuid.UUID(position.log_id).bytes)
    return base64.urlsafe_b64encode(head + _digest(query, head)).decode()


def decode(query: Query, text: str) -> Position:
    """Where a page of ``query`` goes on.

    Raises:
        BadRequest: no cursor of ours, of another version, or of another query.
    """
    try:
        if len(text) != _TEXT_LENGTH:
            raise ValueError  # noqa: TRY301  (one refusal for every way to be none of ours)
        raw = base64.b64decode(text, altchars=b"-_", validate=True)
        version, log_timestamp, identity = _HEAD.unpack(raw[: _HEAD.size])
    except (ValueError, binascii.Error, struct.error):
        raise BadRequest("cursor: not one of ours; send next_cursor of the page before as it came") from None
    if version != _VERSION:
        raise BadRequest("cursor: of another version of the sidecar; begin again without a cursor")
    if raw[_HEAD.size :] != _digest(query, raw[: _HEAD.size]) or not EARLIEST <= log_timestamp <= LATEST:
        raise BadRequest("cursor: belongs to another query or is damaged; repeat the query that it came from")
    return Position(log_timestamp, str(uuid.UUID(bytes=identity)))


def _digest(query: Query, head: bytes) -> bytes:
    match query:
        case ByApplication(application_id):
            parts: tuple[object, ...] = ("application", application_id)
        case ByCorrelation(correlation_id):
            parts = ("correlation", correlation_id)
        case ByService(service_name, start, end):
            parts = ("service", service_name, start, end)
        case ErrorsOn(day):
            parts = ("errors", day)
    return hashlib.blake2b(head + _encode_query(parts), digest_size=_DIGEST_BYTES, person=_PERSON).digest()

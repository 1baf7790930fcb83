r"""The fast lane over whole batches, and the order in which a body's records are screened.

FAST LANE: one typed decode of the whole body, then one pass in which every check either holds or *doubts*. Doubt sends
the body to be screened record by record: each record tries the same lane alone, and only those that fail there go
member by member (``exact``). What makes the fast lane exact where msgspec is lenient:

* literal duplicate keys: msgspec keeps the last silently. Outside the payloads, whose quotes are counted apart, a text
  holds two quotes for every key and two for every string value, and besides only escaped ones; so if the quotes are
  exactly twice the fields set and the strings among them, no key came twice (any other number is a doubt).
* NUL: can only come from the escape ``\u0000``; a body that holds these six characters anywhere is a doubt.
* UTF-8: texts are decoded strictly, here or by msgspec; a failure is a doubt, and the slow lane then checks the body.
"""

import hashlib
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from types import MappingProxyType
from typing import Final, cast

import msgspec
from msgspec import UNSET

from sidecar.clock import Clock
from sidecar.errors import MalformedBody, TooLarge
from sidecar.record import LogRecord, encode
from sidecar.screening import scan, shapes
from sidecar.screening.exact import Bounds, complete, numbers_fit, read, too_deep, too_large
from sidecar.screening.identity import Minter, canonical, derive_ids, version7_time
from sidecar.screening.schema import (
    DEFAULT_IS_SUCCESS,
    DEFAULT_LOG_TYPE,
    CamelWire,
    PascalWire,
    Refusal,
    Refused,
    Rule,
    Wire,
    text_limits,
)
from sidecar.screening.timestamps import LATEST, Timestamps
from sidecar.settings import Ingest

_decoders: Final = tuple(
    (msgspec.json.Decoder(wire), msgspec.json.Decoder(list[wire]))  # type: ignore[valid-type]  # wire is a value
    for wire in (Wire, CamelWire, PascalWire)
)
_decode_text: Final = msgspec.json.Decoder(str).decode
_envelope: Final = re.compile(rb'[ \t\n\r]*\{[ \t\n\r]*"[lL]ogs"[ \t\n\r]*:[ \t\n\r]*(?=\[)')
_nul: Final = re.compile(rb"\\u0000").search
_array: Final = re.compile(rb"[ \t\n\r]*\[")
_DOUBT: Final = (msgspec.DecodeError, ValueError, RecursionError)
_SHORTEST_RECORD: Final = 20  # bytes; {"service_name":"x"}
_CHUNK: Final = 128  # records of the slow lane between two pauses
_UNBOUNDED: Final = 2**63
_CONTENT_AS: Final = b"sidecar-content1"


class _Doubt(ValueError):
    """The fast lane cannot vouch for a record."""


class Form(StrEnum):
    """What a body claims to be."""

    JSON = "json"  # an object, an array of objects, or {"logs": [...]}
    LINES = "lines"  # NDJSON: one object a line


@dataclass(slots=True)
class Screened:
    """What became of the records of one request; the columns run in parallel, in input order.

    ``contents`` is the 16-byte digest of what the client sent, for records whose id it supplied or derived, else None.
    """

    batch: bool
    total: int = 0
    indexes: Sequence[int] = ()
    records: list[LogRecord] = field(default_factory=list)
    encoded: list[bytes] = field(default_factory=list)
    contents: list[bytes | None] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


class Screener:
    """Screens bodies. One per instance, called from one thread; ``column_limits`` are an adopted table's widths."""

    def __init__(self, clock: Clock, minter: Minter, column_limits: Mapping[str, int] = MappingProxyType({})) -> None:
        self._clock = clock
        self._minter = minter
        self._stamps = Timestamps()
        self.narrow(column_limits, {}, "")

    def narrow(self, texts: Mapping[str, int], numbers: Mapping[str, tuple[int, int]], reserved: str) -> None:
        """Hold records against an adopted table from now on: its columns' widths and ranges, its computed ids."""
        self._limits = (text_limits(texts), MappingProxyType(dict(numbers)), reserved)

    def screen(self, body: bytes, form: Form, ingest: Ingest, key: str | None = None) -> Screened:
        """All of a body at once; raises as ``steps``."""
        bounds = self.bounds(ingest)
        fast = self.whole(body, form, bounds, ingest.max_records, key)
        if fast is not None:
            return fast
        steps = self.steps(body, form, bounds, ingest.max_records, key)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                return cast("Screened", done.value)

    def bounds(self, ingest: Ingest) -> Bounds:
        """What the records of one request are held against, from now on."""
        now = self._clock.now_us()
        latest = min(now + int(ingest.max_future * 1_000_000), LATEST)
        return Bounds(ingest.max_record_bytes, ingest.max_depth, now, latest, *self._limits)

    # ---------------------------------------------------------------------------------------------- the fast lane

    def whole(self, body: bytes, form: Form, bounds: Bounds, most: int, key: str | None) -> Screened | None:
        """The fast lane over a whole body of at most ``most`` records; None is doubt: then ``steps`` decides.

        ``key`` is a checked Idempotency-Key: ids are then derived from it and the record's index.
        """
        if len(body) > most * _SHORTEST_RECORD and body.count(b"{") > 4 * most:
            return None  # perhaps too many records: counted before they are built
        source, batch = body, True
        lines: list[bytes] | None = None
        if form is Form.LINES:
            lines = list(islice(shapes.lines(body), most + 1))
            if len(lines) > most:
                return None
        elif _array.match(body) is None:
            envelope = _envelope.match(body)
            batch = envelope is not None
            if envelope is not None:
                source = shapes.inside(body, envelope.end())
        for one, many in _decoders:
            wires: list[Wire]
            try:
                if lines is not None:
                    wires = list(map(one.decode, lines))
                else:
                    wires = many.decode(source) if batch else [one.decode(source)]
            except _DOUBT:
                continue
            columns = self._judge(wires, source, bounds, key, 0) if len(wires) <= most else None
            return None if columns is None else Screened(batch, len(wires), range(len(wires)), *columns)
        return None

    def singles(
        self, bodies: Sequence[bytes], bounds: Bounds
    ) -> tuple[list[LogRecord], list[bytes], list[bytes | None]] | None:
        """The fast lane over bodies of one record each: records, stored forms and contents, in order.

        None: at least one of them is in doubt or is no single record; nothing is known of the others.
        Quotes are counted over all together: a key that comes twice only adds some, so none makes up for another's.
        """
        for one, _ in _decoders:
            wires: list[Wire]
            try:
                wires = list(map(one.decode, bodies))
            except _DOUBT:
                continue
            return self._judge(wires, b"".join(bodies), bounds, None, 0)
        return None

    def _judge(  # noqa: C901, PLR0912, PLR0915  (one pass, unrolled: this is the hot loop)
        self, wires: Sequence[Wire], source: bytes, bounds: Bounds, key: str | None, first_index: int
    ) -> tuple[list[LogRecord], list[bytes], list[bytes | None]] | None:
        """Records, stored forms and content digests of decoded wires; None is doubt."""
        if b"\\" in source and _nul(source):  # the first alone is a hundred times faster, an expression than ``in``
            return None
        quotes = source.count(b'"')
        fresh: list[str] | None = None
        if key is not None:
            fresh = derive_ids(key, range(first_index, first_index + len(wires)))
        now = bounds.now_us
        latest = bounds.latest_us
        reserved = bounds.reserved
        depth = bounds.max_depth
        limits = bounds.text_limits
        type_limit = limits["log_type"]
        service_limit = limits["service_name"]
        error_limit = limits.get("error_message", _UNBOUNDED)
        correlation_limit = limits["correlation_id"]
        user_limit = limits["user_id"]
        request_limit = limits.get("request_data", _UNBOUNDED)
        response_limit = limits.get("response_data", _UNBOUNDED)
        parse = self._stamps.parse
        seconds = self._stamps.seconds
        quote = scan.QUOTE
        records: list[LogRecord] = []
        given: list[int] = []
        set_fields = 0
        strings = 0  # besides payloads
        nests = 2 * depth  # bytes of the shortest payload that could nest too deep
        own_ids = key is not None
        try:
            for position, wire in enumerate(wires):
                count = 13
                flags = 0
                texts = 1  # service_name is always there
                service_name = wire.service_name
                if not 1 <= len(service_name) <= service_limit:
                    raise _Doubt
                application_id = wire.application_id
                if application_id is UNSET:
                    application_id = None
                    count -= 1
                status_code = wire.status_code
                if status_code is UNSET:
                    status_code = None
                    count -= 1
                processing_time_ms = wire.processing_time_ms
                if processing_time_ms is UNSET:
                    processing_time_ms = None
                    count -= 1
                is_success = wire.is_success
                if is_success is UNSET:
                    is_success = DEFAULT_IS_SUCCESS
                    count -= 1
                    flags |= 1
                log_type = wire.log_type
                if log_type is UNSET:
                    log_type = DEFAULT_LOG_TYPE
                    count -= 1
                    flags |= 2
                elif 1 <= len(log_type) <= type_limit:
                    texts += 1
                else:
                    raise _Doubt
                error_message = wire.error_message
                if error_message is UNSET:
                    error_message = None
                    count -= 1
                elif error_message is not None:
                    texts += 1
                    if len(error_message) > error_limit:
                        raise _Doubt
                correlation_id = wire.correlation_id
                if correlation_id is UNSET:
                    correlation_id = None
                    count -= 1
                elif correlation_id is not None:
                    texts += 1
                    if len(correlation_id) > correlation_limit:
                        raise _Doubt
                user_id = wire.user_id
                if user_id is UNSET:
                    user_id = None
                    count -= 1
                elif user_id is not None:
                    texts += 1
                    if len(user_id) > user_limit:
                        raise _Doubt
                raw = wire.request_data
                request_data: str | None
                if raw is UNSET:
                    request_data = None
                    count -= 1
                else:
                    piece = bytes(raw)
                    quotes -= piece.count(b'"')
                    if piece[0] == quote:
                        request_data = _decode_text(piece) if b"\\" in piece else piece[1:-1].decode()
                        if len(request_data) > request_limit:
                            raise _Doubt
                    elif piece == b"null":
                        request_data = None
                    elif len(piece) >= nests and piece.count(b"{") + piece.count(b"[") >= depth:
                        raise _Doubt
                    else:
                        request_data = piece.decode()
                        if len(request_data) > request_limit:
                            raise _Doubt
                raw = wire.response_data
                response_data: str | None
                if raw is UNSET:
                    response_data = None
                    count -= 1
                else:
                    piece = bytes(raw)
                    quotes -= piece.count(b'"')
                    if piece[0] == quote:
                        response_data = _decode_text(piece) if b"\\" in piece else piece[1:-1].decode()
                        if len(response_data) > response_limit:
                            raise _Doubt
                    elif piece == b"null":
                        response_data = None
                    elif len(piece) >= nests and piece.count(b"{") + piece.count(b"[") >= depth:
                        raise _Doubt
                    else:
                        response_data = piece.decode()
                        if len(response_data) > response_limit:
                            raise _Doubt
                text = wire.log_timestamp
                moment: int | None
                if text is UNSET or text is None:
                    count -= text is UNSET
                    moment = None
                else:
                    texts += 1
                    base = seconds.get(text[:19])
                    digits = text[20:-1]
                    if base is None or not digits.isdigit() or text[19] != "." or text[-1] != "Z" or not text.isascii():
                        moment = parse(text)
                    else:
                        moment = base + int((digits + "00000")[:6])
                log_id = wire.log_id
                if log_id is UNSET or log_id is None:
                    count -= log_id is UNSET
                    if fresh is None:
                        fresh = self._minter.batch(len(wires))
                    log_id = fresh[position]
                    if moment is None:
                        moment = now
                        flags |= 4
                    if key is None:
                        flags = -1
                else:
                    texts += 1
                    own_ids = True
                    log_id = canonical(log_id)
                    if key is not None or (reserved and log_id.startswith(reserved)):
                        raise _Doubt
                    if moment is None:
                        moment = version7_time(log_id)
                        if moment is None:
                            raise _Doubt
                if moment > latest:
                    raise _Doubt
                set_fields += count
                strings += texts
                given.append(flags)
                records.append(
                    LogRecord(
                        log_id,
                        application_id,
                        log_type,
                        service_name,
                        request_data,
                        response_data,
                        status_code,
                        is_success,
                        error_message,
                        processing_time_ms,
                        moment,
                        correlation_id,
                        user_id,
                    )
                )
        except ValueError:  # a timestamp, an id or a payload's UTF-8 that the slow lane will word
            return None
        if quotes != 2 * (set_fields + strings) or not numbers_fit(records, bounds.number_limits):
            return None
        encoded = list(map(encode, records))
        if encoded and max(map(len, encoded)) > bounds.max_record_bytes:
            return None
        if not own_ids:
            return records, encoded, [None] * len(records)
        return records, encoded, list(map(_content, records, encoded, given))

    # ---------------------------------------------------------------------------------------------- one by one

    def steps(
        self, body: bytes, form: Form, bounds: Bounds, most: int, key: str | None
    ) -> Generator[None, None, Screened]:
        """Screen a body that ``whole`` doubts, record by record; yields where it may pause for others.

        Raises:
            MalformedBody: not JSON in UTF-8.
            TooLarge: more than ``most`` records.
            InvalidRecord: JSON, but neither an object nor an array of records.
        """
        lines = form is Form.LINES
        batch, texts = (True, shapes.lines(body)) if lines else shapes.documents(body)
        result = Screened(batch)
        indexes: list[int] = []
        result.indexes = indexes
        for index, text in enumerate(texts):
            if index >= most:
                raise TooLarge(f"more than {most} records in one request; send fewer at a time")
            if index % _CHUNK == _CHUNK - 1:
                yield
            result.total = index + 1
            try:
                record, data, content = self._one(text, bounds, key, index)
            except Refusal as why:
                result.refused.append(Refused(index, why.field, why.rule, why.reason, text))
            except MalformedBody as why:
                if not lines:
                    raise
                result.refused.append(Refused(index, "record", Rule.MALFORMED, f"this line: {why}", text))
            else:
                indexes.append(index)
                result.records.append(record)
                result.encoded.append(data)
                result.contents.append(content)
        return result

    def _one(self, text: bytes, bounds: Bounds, key: str | None, index: int) -> tuple[LogRecord, bytes, bytes | None]:
        """One record: the fast lane alone, then member by member; raises Refusal, MalformedBody."""
        for decoder, _ in _decoders:
            try:
                wire = decoder.decode(text)
            except _DOUBT:
                continue
            columns = self._judge((wire,), text, bounds, key, index)
            if columns is None:
                break
            return columns[0][0], columns[1][0], columns[2][0]
        return self.exactly(text, bounds, key, index)

    def exactly(
        self, text: bytes, bounds: Bounds, key: str | None, index: int
    ) -> tuple[LogRecord, bytes, bytes | None]:
        """One record by the slow lane alone: record, stored form, content digest; raises Refusal, MalformedBody."""
        try:
            scan.check_syntax(text)
        except RecursionError:
            raise too_deep(bounds.max_depth) from None
        given = read(text, bounds, self._stamps)

        def fresh_id() -> str:
            return self._minter.batch(1)[0] if key is None else derive_ids(key, (index,))[0]

        record = complete(given, fresh_id, bounds, keyed=key is not None)
        data = encode(record)
        if len(data) > bounds.max_record_bytes:
            raise too_large(bounds.max_record_bytes)
        flags = ("is_success" not in given) | ("log_type" not in given) << 1
        if "log_id" not in given:
            flags = -1 if key is None else flags | ("log_timestamp" not in given) << 2
        return record, data, _content(record, data, flags)


def _content(record: LogRecord, encoded: bytes, flags: int) -> bytes | None:
    """Digest of a record as the client sent it; ``flags``: bit 0 is_success, 1 log_type, 2 log_timestamp defaulted.

    A default time differs from one sending to the next, so it is left out; -1: the id is ours, nothing to compare.
    """
    if flags < 0:
        return None
    if flags & 4:
        encoded = encode(msgspec.structs.replace(record, log_timestamp=0))
    return hashlib.blake2b(encoded + b"%d" % flags, digest_size=16, person=_CONTENT_AS).digest()

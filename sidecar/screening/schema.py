"""The thirteen fields at the door, as one table: spellings, kinds, bounds; and the wire shapes of the fast lane.

Lengths count characters: Unicode code points, as PostgreSQL's ``varchar(n)`` and Python's ``len`` do (an emoji
outside the basic plane is one here and two in .NET's ``String.Length``).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Final, cast

import msgspec
from msgspec import UNSET, Raw, UnsetType

from sidecar.errors import InvalidRecord
from sidecar.record import FIELDS

INT32: Final = 2**31
INT64: Final = 2**63


class Rule(StrEnum):
    """Which rule a refused record broke; a metric label, so the set is closed."""

    NOT_AN_OBJECT = "not_an_object"
    MALFORMED = "malformed"  # a line of NDJSON that is not JSON
    UNKNOWN_FIELD = "unknown_field"
    FIELD_TWICE = "field_twice"
    MISSING = "missing"
    TYPE = "type"
    RANGE = "range"
    LENGTH = "length"
    CHARACTER = "character"  # NUL or a lone surrogate
    TIMESTAMP = "timestamp"
    LOG_ID = "log_id"
    DEPTH = "depth"
    TOO_LARGE = "too_large"
    CONFLICT = "conflict"  # same log_id, other content


STATUS: Final[Mapping[Rule, int]] = MappingProxyType(
    dict.fromkeys(Rule, 422) | {Rule.TOO_LARGE: 413, Rule.CONFLICT: 409}
)
"""The status that a refused record answers with (semantics, section 3)."""


class Refusal(InvalidRecord):
    """One record breaks ``rule``; carries no value of the record."""

    def __init__(self, field: str, rule: Rule, reason: str) -> None:
        self.rule = rule
        super().__init__(field, reason)


@dataclass(frozen=True, slots=True)
class Refused:
    """One refused record of a request: its place in the input, why, and what was sent."""

    index: int
    field: str
    rule: Rule
    reason: str
    raw: bytes

    @property
    def status(self) -> int:
        """HTTP status of this record alone."""
        return STATUS[self.rule]


class Kind(StrEnum):
    """How a field's JSON value is read."""

    TEXT = "text"
    INT32 = "int32"
    INT64 = "int64"
    BOOL = "bool"
    UUID = "uuid"
    INSTANT = "instant"
    PAYLOAD = "payload"


@dataclass(frozen=True, slots=True)
class FieldRule:
    """What one field may be. ``made_here`` fields take null as not given; their default is made by the sidecar."""

    kind: Kind
    nullable: bool = True
    required: bool = False
    min_length: int = 0  # characters
    max_length: int | None = None  # characters; None: bounded by max_record_bytes alone
    made_here: bool = False


RULES: Final[Mapping[str, FieldRule]] = MappingProxyType(
    {
        "log_id": FieldRule(Kind.UUID, made_here=True),
        "application_id": FieldRule(Kind.INT64),
        "log_type": FieldRule(Kind.TEXT, nullable=False, min_length=1, max_length=50),
        "service_name": FieldRule(Kind.TEXT, nullable=False, required=True, min_length=1, max_length=100),
        "request_data": FieldRule(Kind.PAYLOAD),
        "response_data": FieldRule(Kind.PAYLOAD),
        "status_code": FieldRule(Kind.INT32),
        "is_success": FieldRule(Kind.BOOL, nullable=False),
        "error_message": FieldRule(Kind.TEXT),
        "processing_time_ms": FieldRule(Kind.INT64),
        "log_timestamp": FieldRule(Kind.INSTANT, made_here=True),
        "correlation_id": FieldRule(Kind.TEXT, max_length=100),
        "user_id": FieldRule(Kind.TEXT, max_length=100),
    }
)
assert tuple(RULES) == FIELDS  # noqa: S101  (one order for the wire, the record and the disk)


def text_limits(columns: Mapping[str, int]) -> Mapping[str, int]:
    """The longest text of each field, in characters: ours, or the mapped column's where that is narrower."""
    limits = {name: rule.max_length for name, rule in RULES.items() if rule.max_length is not None}
    for name, width in columns.items():
        limits[name] = min(width, limits.get(name, width))
    return MappingProxyType(limits)


DEFAULT_LOG_TYPE: Final = "INFO"
DEFAULT_IS_SUCCESS: Final = True


def camel(name: str) -> str:
    """``log_id`` -> ``logId``."""
    head, *tail = name.split("_")
    return head + "".join(part.title() for part in tail)


def pascal(name: str) -> str:
    """``log_id`` -> ``LogId``."""
    return "".join(part.title() for part in name.split("_"))


SPELLINGS: Final[Mapping[str, str]] = MappingProxyType(
    {spell(name): name for name in FIELDS for spell in (str, camel, pascal)}
)
"""Every accepted member name -> its field."""

LOGS: Final = frozenset({"logs", "Logs"})
"""Member of the envelope ``{"logs": [...]}``."""

Int32 = Annotated[int, msgspec.Meta(ge=-INT32, le=INT32 - 1)]
Int64 = Annotated[int, msgspec.Meta(ge=-INT64, le=INT64 - 1)]


class Wire(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A record as it stands in JSON, snake_case; UNSET where the client sent nothing.

    ``Raw`` keeps a payload's source text; texts are bounded by the screener, because a mapped column may be narrower.
    """

    service_name: str
    log_id: str | UnsetType | None = UNSET
    application_id: Int64 | UnsetType | None = UNSET
    log_type: str | UnsetType = UNSET
    request_data: Raw | UnsetType = UNSET
    response_data: Raw | UnsetType = UNSET
    status_code: Int32 | UnsetType | None = UNSET
    is_success: bool | UnsetType = UNSET
    error_message: str | UnsetType | None = UNSET
    processing_time_ms: Int64 | UnsetType | None = UNSET
    log_timestamp: str | UnsetType | None = UNSET
    correlation_id: str | UnsetType | None = UNSET
    user_id: str | UnsetType | None = UNSET


def _respelled(name: str, spell: Callable[[str], str]) -> type[Wire]:
    """The same shape under other member names (``rename`` does not reach inherited fields)."""
    fields = [(f.name, f.type) if f.required else (f.name, f.type, f.default) for f in msgspec.structs.fields(Wire)]
    made = msgspec.defstruct(name, fields, rename=spell, forbid_unknown_fields=True, gc=False)
    return cast("type[Wire]", made)  # it has Wire's attributes, which is all that the screener uses


CamelWire: Final = _respelled("CamelWire", camel)
PascalWire: Final = _respelled("PascalWire", pascal)

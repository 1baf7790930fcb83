"""What a configuration may say about a mapping: how somebody else's log event becomes a record; frozen values.

The meaning is in ``sidecar.mapping``; ``sidecar.config_mappings`` reads these values from config.yaml. A field that is
not stated is taken from the mapping that this one extends.
"""

from typing import Final, Literal

import msgspec

Constant = str | int | bool
Identity = Literal["content", "minted"]
TimeFormat = Literal["iso", "epoch_s", "epoch_ms", "epoch_us", "epoch_ns"]

TIME_FORMATS: Final = ("iso", "epoch_s", "epoch_ms", "epoch_us", "epoch_ns")
IDENTITIES: Final = ("content", "minted")


class FieldSource(msgspec.Struct, frozen=True):
    """Where one field's value comes from: the first of ``paths`` whose value fits, else ``default``."""

    paths: tuple[str, ...] = ()  # JSON Pointers (RFC 6901) into the event
    default: Constant | None = None
    formats: tuple[TimeFormat, ...] = ()  # log_timestamp only; at most one epoch unit
    offset: str | None = None  # log_timestamp only: of texts without one, ``Z`` or ``+hh:mm``
    on_failure: bool = False  # only where is_success is false; the source then stays in request_data too


class LevelSource(msgspec.Struct, frozen=True):
    """How a level becomes ``log_type`` and ``is_success``; None is taken from the mapping that is extended."""

    paths: tuple[str, ...] | None = None
    names: tuple[tuple[str, str], ...] | None = None  # a level's text, a number, or a range ``10-19`` -> log_type
    failure: tuple[str, ...] | None = None  # the log_types that mean is_success: false


class DeclaredMapping(msgspec.Struct, frozen=True):
    """One mapping. ``fields`` maps a field to its source; None takes the source away that is extended."""

    extends: str | None = None  # a ready-made mapping
    fields: tuple[tuple[str, FieldSource | None], ...] = ()
    level: LevelSource | None = None
    events: tuple[str, ...] | None = None  # members of an object body that hold the array of events
    identity: Identity | None = None


Mappings = dict[str, DeclaredMapping]
"""By name; nobody changes it once it is read."""


def as_written(declared: DeclaredMapping) -> dict[str, object]:
    """A mapping in the shape of config.yaml, for ``print-config``."""
    shape: dict[str, object] = {}
    if declared.extends is not None:
        shape["extends"] = declared.extends
    if declared.identity is not None:
        shape["identity"] = declared.identity
    if declared.events is not None:
        shape["events"] = declared.events
    for field, source in declared.fields:
        shape[field] = None if source is None else _source(source)
    level = declared.level
    if level is not None:
        stated = {"from": level.paths, "names": None if level.names is None else dict(level.names)}
        shape["level"] = {k: v for k, v in {**stated, "failure": level.failure}.items() if v is not None}
    return shape


def _source(source: FieldSource) -> dict[str, object]:
    if not source.paths and source.default is not None:
        return {"value": source.default}
    shape: dict[str, object] = {"from": source.paths}
    if source.default is not None:
        shape["default"] = source.default
    if source.formats:
        shape["format"] = source.formats
    if source.offset is not None:
        shape["offset"] = source.offset
    if source.on_failure:
        shape["when"] = "failure"
    return shape

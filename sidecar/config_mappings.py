"""The section ``mappings`` of config.yaml: how other people's log events become records (``sidecar.mapping``).

::

    mappings:
      billing:                       # POST /ingest/billing; a ready-made name changes that mapping
        extends: serilog             # what is not stated is that mapping's; left out: nothing, or the ready-made one
        identity: content            # content: log_id from the event's bytes; minted: a new one at each sending
        events: [events, records]    # members of an object body that may hold the array of events
        service_name: {value: billing}
        correlation_id: /Properties/OrderId
        user_id: {from: [/Properties/UserId, /UserId], default: nobody}
        error_message: {from: /Exception, when: failure}
        log_timestamp: {from: /Timestamp, format: [iso, epoch_ms], offset: "+01:00"}
        response_data: null          # takes away what is extended
        level:
          from: [/Level, /@l]
          names: {Verbose: TRACE, 10-19: TRACE, 20: DEBUG}
          failure: [ERROR, FATAL]

FAILURE: every error names the setting by its path, ``mappings.billing.level.names``; all mappings are compiled here, so
that a mapping in force is one that works.
"""

import re
from collections.abc import Mapping
from typing import Final, cast

from sidecar.config_document import Expander, Listing, Node, Scalar, Table
from sidecar.declared_mapping import (
    IDENTITIES,
    TIME_FORMATS,
    DeclaredMapping,
    FieldSource,
    Identity,
    LevelSource,
    Mappings,
    TimeFormat,
)
from sidecar.errors import ConfigError
from sidecar.mapping import READY_MADE, compile_mapping
from sidecar.mapping.times import FIELD
from sidecar.mapping.values import MAPPED

SETTING: Final = "mappings"
_MOST: Final = 64  # mappings, paths of a field, names of a level
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.ASCII)
_OFFSET: Final = re.compile(r"Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9]", re.ASCII)
_OWN: Final = ("extends", "identity", "events", "level")
_FIELDS: Final = (*MAPPED, FIELD)
_TIME_KEYS: Final = ("from", "format", "offset")
_KEYS: Final = ("from", "value", "default", "when")
_NO_CONSTANT: Final = frozenset({"log_id", "response_data"})
"""Two events with one id are one; a payload is the event's own."""


class _Reader:
    """Reads scalars and lists of one setting; ``path`` names it in errors."""

    def __init__(self, expander: Expander) -> None:
        self._expander = expander

    def text(self, path: str, node: Node) -> str:
        if isinstance(node, Scalar):
            scalar = self._expander.expand(node, path)
            if not scalar.is_null and scalar.text.isprintable():
                return scalar.text
        raise ConfigError(path, seen=_shape(node), allowed="a printable text", hint=f"write one value ({node.where})")

    def texts(self, path: str, node: Node) -> tuple[str, ...]:
        """One text, or a list of some."""
        if not isinstance(node, Listing):
            return (self.text(path, node),)
        if len(node.items) > _MOST:
            raise ConfigError(path, seen=len(node.items), allowed=f"at most {_MOST}", hint=f"shorten it ({node.where})")
        return tuple(self.text(path, item) for item in node.items)

    def choice(self, path: str, node: Node, allowed: tuple[str, ...]) -> str:
        text = self.text(path, node)
        if text not in allowed:
            raise ConfigError(path, seen=text[:60], allowed=", ".join(allowed), hint=f"correct it ({node.where})")
        return text


def read_mappings(node: Node, expander: Expander) -> Mappings:
    """The mappings that ``node`` states, each of them compiled once to prove it.

    Raises:
        ConfigError: names the setting under ``mappings``, what was seen and what is allowed.
    """
    if isinstance(node, Scalar) and node.is_null:
        return {}
    reader = _Reader(expander)
    found: dict[str, DeclaredMapping] = {}
    table = _table(SETTING, node, "mappings by name")
    if len(table) > _MOST:
        raise ConfigError(SETTING, seen=len(table), allowed=f"at most {_MOST} mappings", hint=node.where)
    for name, each in table.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{SETTING}.{name[:60]}",
                seen="a name that cannot stand in POST /ingest/{name}",
                allowed="a-z 0-9 - _, at most 64",
                hint=f"rename it ({each.where})",
            )
        found[name] = _mapping(f"{SETTING}.{name}", each, reader)
        base = READY_MADE.get(found[name].extends or name)
        compile_mapping(name, found[name], base)
    return found


def _mapping(path: str, node: Node, reader: _Reader) -> DeclaredMapping:
    fields: list[tuple[str, FieldSource | None]] = []
    extends: str | None = None
    identity: str | None = None
    events: tuple[str, ...] | None = None
    level: LevelSource | None = None
    for key, each in _table(path, node, "a mapping: fields, level, events, identity, extends").items():
        inner = f"{path}.{key}"
        match key:
            case "extends":
                extends = reader.choice(inner, each, tuple(sorted(READY_MADE)))
            case "identity":
                identity = reader.choice(inner, each, IDENTITIES)
            case "events":
                events = reader.texts(inner, each)
            case "level":
                level = _level(inner, each, reader)
            case _:
                fields.append((key, _field(inner, key, each, reader)))
    return DeclaredMapping(extends, tuple(fields), level, events, cast("Identity | None", identity))


def _field(path: str, field: str, node: Node, reader: _Reader) -> FieldSource | None:
    if field not in _FIELDS:
        raise ConfigError(
            path,
            seen="an unknown setting of a mapping",
            allowed=", ".join((*_FIELDS, *_OWN)),
            hint=f"request_data takes what no field takes ({node.where})"
            if field == "request_data"
            else f"remove it ({node.where})",
        )
    if isinstance(node, Scalar) and node.is_null:
        return None
    if not isinstance(node, Table):
        return FieldSource(reader.texts(path, node))
    stated = _table(path, node, "from", _TIME_KEYS if field == FIELD else _KEYS)
    if "value" in stated and len(stated) > 1:
        raise ConfigError(
            path, seen="value beside others", allowed="value alone, or from with default and when", hint=node.where
        )
    if "value" not in stated and "from" not in stated:
        raise ConfigError(path, seen="no from", allowed="from (a path) or value (a constant)", hint=node.where)
    paths = reader.texts(f"{path}.from", stated["from"]) if "from" in stated else ()
    if field == FIELD:
        return FieldSource(
            paths, formats=_formats(f"{path}.format", stated, reader), offset=_offset(path, stated, reader)
        )
    constant = next((key for key in ("value", "default") if key in stated), None)
    if constant is not None and field in _NO_CONSTANT:
        raise ConfigError(f"{path}.{constant}", seen="a constant", allowed="a path", hint=f"remove it ({node.where})")
    if "when" in stated:
        reader.choice(f"{path}.when", stated["when"], ("failure",))
    return FieldSource(
        paths,
        default=None if constant is None else reader.text(f"{path}.{constant}", stated[constant]),
        on_failure="when" in stated,
    )


def _formats(path: str, stated: Mapping[str, Node], reader: _Reader) -> tuple[TimeFormat, ...]:
    if "format" not in stated:
        return ()
    node = stated["format"]
    formats = reader.texts(path, node)
    unknown = [each for each in formats if each not in TIME_FORMATS]
    if unknown or not formats or sum(each != "iso" for each in formats) > 1:
        raise ConfigError(
            path,
            seen=", ".join(formats)[:60] or "nothing",
            allowed=f"iso, and at most one of {', '.join(TIME_FORMATS[1:])}",
            hint=f"correct it ({node.where})",
        )
    return cast("tuple[TimeFormat, ...]", formats)


def _offset(path: str, stated: Mapping[str, Node], reader: _Reader) -> str | None:
    if "offset" not in stated:
        return None
    text = reader.text(f"{path}.offset", stated["offset"])
    if not _OFFSET.fullmatch(text):
        raise ConfigError(f"{path}.offset", seen=text[:60], allowed="Z or an offset such as +01:00", hint="correct it")
    return text


def _level(path: str, node: Node, reader: _Reader) -> LevelSource:
    stated = _table(path, node, "from, names, failure", ("from", "names", "failure"))
    names: tuple[tuple[str, str], ...] | None = None
    if "names" in stated:
        inner = f"{path}.names"
        table = _table(inner, stated["names"], "a log_type by level")
        if len(table) > _MOST:
            raise ConfigError(inner, seen=len(table), allowed=f"at most {_MOST}", hint="write ranges such as 10-19")
        names = tuple((name, reader.text(f"{inner}.{name[:40]}", each)) for name, each in table.items())
    return LevelSource(
        reader.texts(f"{path}.from", stated["from"]) if "from" in stated else None,
        names,
        reader.texts(f"{path}.failure", stated["failure"]) if "failure" in stated else None,
    )


def _table(path: str, node: Node, allowed: str, keys: tuple[str, ...] = ()) -> Mapping[str, Node]:
    """The entries of a section; ``keys`` are all that it may have, where it has not any."""
    if not isinstance(node, Table):
        raise ConfigError(path, seen=_shape(node), allowed=allowed, hint=f"indent its lines ({node.where})")
    for key, each in node.entries.items() if keys else ():
        if key not in keys:
            raise ConfigError(
                f"{path}.{key}", seen="an unknown setting", allowed=", ".join(keys), hint=f"remove it ({each.where})"
            )
    return node.entries


def _shape(node: Node) -> str:
    return {Table: "a section", Listing: "a list", Scalar: "an empty or unprintable value"}[type(node)]

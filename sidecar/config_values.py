"""Every setting with its type, and how a text becomes that type.

``FIELDS`` is derived once from the structs of ``sidecar.settings``: the one place where a setting is declared. The
type written there (its bounds, its unit in the ``title``) is the whole rule; nothing is guessed from the text.

FAILURE: a text that is no value of its setting's type ends in a ConfigError that names the setting, what was seen
(``***`` for a secret), what is allowed and where it stands.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from types import MappingProxyType
from typing import Any, Final, Literal, cast

import msgspec
from msgspec import inspect

from sidecar.config_document import Expander, Listing, Node, Scalar, Table
from sidecar.declared_mapping import as_written
from sidecar.errors import ConfigError
from sidecar.phase import Phase, parse_phase
from sidecar.settings import LIVE, Secret, Settings

Unit = Literal["seconds", "bytes", ""]
MAX_SECONDS: Final = 3650 * 86400.0  # ten years: no wait of the sidecar is longer
_SHOWN: Final = 60  # characters of a refused value that an error shows


@dataclass(frozen=True, slots=True)
class Field:
    """One setting: where it stands, what it may hold."""

    path: str  # e.g. postgres.port
    kind: inspect.Type  # without None and without metadata
    unit: Unit
    nullable: bool
    default: object

    @property
    def live(self) -> bool:
        """Whether a hot reload applies it."""
        return self.path.partition(".")[0] in LIVE

    @property
    def secret(self) -> bool:
        """Whether no text may show it."""
        return isinstance(self.kind, inspect.CustomType) and self.kind.cls is Secret

    @property
    def allowed(self) -> str:
        """What may be written, for errors and for the reference."""
        return _describe(self.kind, self.unit) + (", or null" if self.nullable else "")


def _walk(struct: inspect.StructType, prefix: str = "") -> dict[str, Field]:
    fields: dict[str, Field] = {}
    for declared in struct.fields:
        path = prefix + declared.name
        kind: inspect.Type = declared.type
        nullable = False
        if isinstance(kind, inspect.StructType):
            fields |= _walk(kind, path + ".")
            continue
        if isinstance(kind, inspect.UnionType):
            nullable = True
            (kind,) = (each for each in kind.types if not isinstance(each, inspect.NoneType))
        unit: Unit = ""
        if isinstance(kind, inspect.Metadata):
            unit = cast("Unit", (kind.extra_json_schema or {}).get("title", ""))
            kind = kind.type
        made = declared.default_factory is not msgspec.NODEFAULT
        fields[path] = Field(path, kind, unit, nullable, declared.default_factory() if made else declared.default)
    return fields


FIELDS: Final[Mapping[str, Field]] = MappingProxyType(_walk(cast("inspect.StructType", inspect.type_info(Settings))))
SECTIONS: Final = frozenset(path.rpartition(".")[0] for path in FIELDS) - {""}


@dataclass(frozen=True, slots=True)
class Stated:
    """A value that somebody stated, and where."""

    value: object
    where: str


def read_table(table: Table, expander: Expander, section: str = "") -> dict[str, Stated]:
    """All settings that ``table`` states, as path -> value.

    Raises:
        ConfigError: an unknown name (with the nearest known one), or a value that is not of its setting's type.
    """
    stated: dict[str, Stated] = {}
    for key, node in table.entries.items():
        path = f"{section}.{key}" if section else key
        if path in SECTIONS:
            if isinstance(node, Table):
                stated |= read_table(node, expander, path)
            elif not (isinstance(node, Scalar) and node.is_null):  # a section whose lines are all comments is empty
                raise ConfigError(
                    path, seen=_shape(node), allowed="a section of settings", hint=f"indent its lines ({node.where})"
                )
        elif path in FIELDS:
            stated[path] = Stated(read_value(FIELDS[path], node, expander), node.where)
        else:
            raise unknown_setting(path, node.where)
    return stated


def unknown_setting(path: str, where: str) -> ConfigError:
    """The error for a name that is no setting; suggests the nearest."""
    section, _, key = path.rpartition(".")
    if section and section not in SECTIONS:
        section, key = "", section
    siblings = sorted({_child(known, section) for known in FIELDS} - {""})
    elsewhere = [known for known in FIELDS if known.rpartition(".")[2] == path.rpartition(".")[2]]
    near = elsewhere or [
        f"{section}.{name}" if section else name
        for name in difflib.get_close_matches(key.lower()[:64], siblings, n=1, cutoff=0.6)
    ]
    hint = f"did you mean {near[0]}?" if near else "remove it"
    return ConfigError(
        path or "(empty)", seen="an unknown setting", allowed=", ".join(siblings), hint=f"{hint} ({where})"
    )


def _child(path: str, section: str) -> str:
    if section:
        if not path.startswith(section + "."):
            return ""
        path = path[len(section) + 1 :]
    return path.partition(".")[0]


def read_value(field: Field, node: Node, expander: Expander) -> object:
    """The value of one setting.

    Raises:
        ConfigError: it is not of the setting's type or out of its bounds.
    """
    if isinstance(field.kind, inspect.VarTupleType) and isinstance(node, Listing):
        return tuple(_item(field, field.kind.item_type, item, expander) for item in node.items)
    if not isinstance(node, Scalar):
        raise _refuse(field, _shape(node), node.where, shown=True)
    scalar = expander.expand(node, field.path)
    if scalar.is_null:
        if field.nullable:
            return None
        raise _refuse(field, "nothing", scalar.where, shown=True)
    if isinstance(field.kind, inspect.VarTupleType):
        items = [part.strip() for part in scalar.text.split(",")] if scalar.text.strip() not in ("", "[]") else []
        return tuple(
            _item(field, field.kind.item_type, Scalar(item, plain=False, where=scalar.where), expander=None)
            for item in items
        )
    return _convert(field, field.kind, scalar)


def _item(field: Field, kind: inspect.Type, node: Node, expander: Expander | None) -> object:
    if not isinstance(node, Scalar) or node.is_null:
        raise _refuse(field, "an item that is no text", node.where, shown=True)
    return _convert(field, kind, expander.expand(node, field.path) if expander else node)


def _convert(field: Field, kind: inspect.Type, scalar: Scalar) -> object:
    text = scalar.text.removesuffix("\n")  # a block scalar ends with one
    if not text.isprintable():
        raise _refuse(field, "control characters or half of a surrogate pair", scalar.where, shown=True)
    if isinstance(kind, inspect.EnumType) and kind.cls is Phase:
        try:
            return parse_phase(_clip(text), field.path)
        except ConfigError as error:
            raise ConfigError(
                field.path, seen=error.seen, allowed=error.allowed, hint=f"{error.hint} ({scalar.where})"
            ) from None
    value = _READERS[type(kind)](text, kind, field.unit)
    if value is None or not _within(kind, value):
        raise _refuse(field, text, scalar.where)
    return value


_INTEGER: Final = re.compile(r"[+-]?[0-9](?:_?[0-9]){0,17}")
_NUMBER: Final = re.compile(r"[+-]?(?:[0-9]{1,17}(?:\.[0-9]{0,17})?|\.[0-9]{1,17})(?:[eE][+-]?[0-9]{1,2})?")
_SIZE: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([KMGT]i?B?|k|B)?")
_DURATION: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?) ?(us|ms|s|m|h|d)")
_TIMESPAN: Final = re.compile(r"(?:([0-9]{1,5})\.)?([01][0-9]|2[0-3]):([0-5][0-9]):([0-5][0-9](?:\.[0-9]{1,7})?)")
_SECONDS_IN: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_POWERS: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_TRUTHS: Final = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def parse_seconds(text: str) -> float | None:
    """Seconds from ``1.5``, ``500ms``, ``1h30m`` or .NET's ``[days.]hh:mm:ss[.fraction]``; None for anything else."""
    if _NUMBER.fullmatch(text):
        return _bounded_seconds(float(text))
    if span := _TIMESPAN.fullmatch(text):
        days, hours, minutes, seconds = span.groups()
        return _bounded_seconds(int(days or 0) * 86400 + int(hours) * 3600 + int(minutes) * 60 + float(seconds))
    total, end = 0.0, 0
    for part in _DURATION.finditer(text):
        if text[end : part.start()].strip(" "):
            return None
        # Decimal, so that 100ms is 0.1 and not its neighbour.
        total += float(Decimal(part[1]) * Decimal(repr(_SECONDS_IN[part[2]])))
        end = part.end()
    return _bounded_seconds(total) if end and end == len(text) else None


def _bounded_seconds(seconds: float) -> float | None:
    return seconds if seconds <= MAX_SECONDS else None


def parse_bytes(text: str) -> int | None:
    """Bytes from ``1048576``, ``256KiB``, ``1Gi`` (1024-based) or ``10MB`` (1000-based); None for anything else."""
    if _INTEGER.fullmatch(text):
        return int(text)
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    unit = (match[2] or "").removesuffix("B").upper()
    base = 1024 if unit.endswith("I") else 1000
    size = Decimal(match[1]) * base ** _POWERS[unit.removesuffix("I")]
    return int(size) if size == size.to_integral_value() else None


def _read_int(text: str, _kind: inspect.Type, unit: Unit) -> int | None:
    if unit == "bytes":
        return parse_bytes(text)
    return int(text) if _INTEGER.fullmatch(text) else None


def _read_float(text: str, _kind: inspect.Type, unit: Unit) -> float | None:
    if unit == "seconds":
        return parse_seconds(text)
    return float(text) if _NUMBER.fullmatch(text) else None


def _read_choice(text: str, kind: inspect.Type, _unit: Unit) -> object:
    return text if text in cast("inspect.LiteralType", kind).values else None


_READERS: Final[Mapping[type[inspect.Type], Callable[[str, Any, Unit], object]]] = MappingProxyType(
    {
        inspect.BoolType: lambda text, _kind, _unit: _TRUTHS.get(text.lower()),
        inspect.CustomType: lambda text, _kind, _unit: Secret(text) if text else None,
        inspect.DictType: lambda _text, _kind, _unit: None,  # a section, read by ``config_mappings``
        inspect.FloatType: _read_float,
        inspect.IntType: _read_int,
        inspect.LiteralType: _read_choice,
        inspect.StrType: lambda text, _kind, _unit: text or None,
    }
)


def _within(kind: inspect.Type, value: Any) -> bool:
    if isinstance(kind, (inspect.IntType, inspect.FloatType)):
        return (
            (kind.ge is None or value >= kind.ge)
            and (kind.gt is None or value > kind.gt)
            and (kind.le is None or value <= kind.le)
            and (kind.lt is None or value < kind.lt)
        )
    if isinstance(kind, inspect.StrType):
        return (
            (kind.min_length is None or len(value) >= kind.min_length)
            and (kind.max_length is None or len(value) <= kind.max_length)
            and (kind.pattern is None or re.search(kind.pattern, value) is not None)
        )
    return True


def _describe(kind: inspect.Type, unit: Unit) -> str:
    return _DESCRIPTIONS[type(kind)](kind, unit)


_DESCRIPTIONS: Final[Mapping[type[inspect.Type], Callable[[Any, Unit], str]]] = MappingProxyType(
    {
        inspect.BoolType: lambda _kind, _unit: "true or false",
        inspect.CustomType: lambda _kind, _unit: "a text that is not empty",
        inspect.DictType: lambda _kind, _unit: "a section of the file: mappings by name",
        inspect.EnumType: lambda _kind, _unit: ", ".join(phase.label for phase in Phase) + " (or 0..3)",
        inspect.FloatType: lambda kind, unit: _NUMBERS[unit or inspect.FloatType] + _bounds(kind, unit),
        inspect.IntType: lambda kind, unit: _NUMBERS[unit or inspect.IntType] + _bounds(kind, unit),
        inspect.LiteralType: lambda kind, _unit: "one of " + ", ".join(str(value) for value in kind.values),
        inspect.StrType: lambda kind, _unit: (
            "a text that is not empty" + (f", matching {kind.pattern}" if kind.pattern else "")
        ),
        inspect.VarTupleType: lambda kind, _unit: f"a list; each item {_describe(kind.item_type, '')}",
    }
)

_NUMBERS: Final[Mapping[object, str]] = {
    "seconds": "a duration such as 500ms, 30s, 15m or 24h",
    "bytes": "a size such as 256KiB or 1GiB",
    inspect.IntType: "a whole number",
    inspect.FloatType: "a number",
}


def _bounds(kind: inspect.IntType | inspect.FloatType, unit: Unit) -> str:
    marks = (("at least", kind.ge), ("above", kind.gt), ("at most", kind.le), ("below", kind.lt))
    parts = [f"{word} {show(bound, unit)}" for word, bound in marks if bound is not None]
    return f", {', '.join(parts)}" if parts else ""


def show(value: object, unit: Unit = "") -> str:
    """A value in the spelling that config.yaml would use: ``15m``, ``1GiB``, ``null``."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, Enum):
        return str(value.name).lower()
    if isinstance(value, (int, float)) and unit:
        scales: Sequence[tuple[str, float]] = (
            (("d", 86400), ("h", 3600), ("m", 60), ("s", 1), ("ms", 1e-3))
            if unit == "seconds"
            else (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
        )
        for name, scale in scales:
            if value and round(value / scale) * scale == value:
                return f"{round(value / scale)}{name}"
        return repr(value)
    if isinstance(value, Mapping):
        return msgspec.json.encode({name: as_written(each) for name, each in value.items()}).decode()
    return "[" + ", ".join(show(item) for item in value) + "]" if isinstance(value, tuple) else str(value)


def _shape(node: Node) -> str:
    return {Table: "a section", Listing: "a list", Scalar: "a single value"}[type(node)]


def _clip(text: str) -> str:
    text = re.sub(r"//[^/@\s]*@", "//***@", text)  # user and password of a URL
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _refuse(field: Field, seen: str, where: str, *, shown: bool = False) -> ConfigError:
    safe = seen if shown else "***" if field.secret else _clip(seen)
    return ConfigError(field.path, seen=safe, allowed=field.allowed, hint=f"correct the value ({where})")


def assemble(stated: Mapping[str, object]) -> Settings:
    """The frozen settings with ``stated`` (path -> value) over the defaults."""
    return cast("Settings", _assemble(Settings, stated, ""))


def _assemble(cls: type[msgspec.Struct], stated: Mapping[str, object], prefix: str) -> msgspec.Struct:
    values: dict[str, object] = {}
    for declared in msgspec.structs.fields(cls):
        path = prefix + declared.name
        if path in SECTIONS:
            values[declared.name] = _assemble(cast("type[msgspec.Struct]", declared.type), stated, path + ".")
        elif path in stated:
            values[declared.name] = stated[path]
    return cls(**values)


def value_at(settings: Settings, path: str) -> object:
    """The value of the setting named ``path``."""
    value: object = settings
    for name in path.split("."):
        value = getattr(value, name)
    return value

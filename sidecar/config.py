"""config.yaml, the environment and the defaults become one frozen ``Settings``, or one ConfigError.

ORDER, the later wins: defaults of ``sidecar.settings`` < the file < ``SIDECAR__SECTION__KEY`` in the environment.

1. ``config_document`` reads bounded bytes and makes a tree of texts (no tags, no implicit types, no bombs).
2. ``config_appsettings`` splits off the specification's own spelling; stated twice it must mean the same.
3. ``config_values`` expands ``${VAR}`` and gives every text the type that its setting declares.
4. ``config_checks`` holds the rules between settings.

FAILURE: ``load`` raises ConfigError and nothing else, whatever the bytes, the path or the environment are; nothing of
the process has changed then. No error, warning or printed configuration shows a secret.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from sidecar.config_appsettings import take
from sidecar.config_checks import check, warnings
from sidecar.config_document import Expander, Scalar, parse, read_bounded
from sidecar.config_mappings import SETTING as MAPPINGS
from sidecar.config_mappings import read_mappings
from sidecar.config_values import (
    FIELDS,
    Stated,
    assemble,
    read_table,
    read_value,
    show,
    unknown_setting,
    value_at,
)
from sidecar.errors import ConfigError
from sidecar.settings import Settings

PREFIX: Final = "SIDECAR__"
DEFAULT_PATH: Final = "/etc/sidecar/config.yaml"


@dataclass(frozen=True, slots=True)
class Loaded:
    """One configuration that was read and found good."""

    settings: Settings
    digest: str  # SHA-256 of the file's bytes, hexadecimal
    path: str
    stated: frozenset[str] = field(default=frozenset())  # settings that the file or the environment states
    warnings: tuple[str, ...] = ()


def load(path: str, environ: Mapping[str, str] = os.environ) -> Loaded:
    """Read, type and check the configuration at ``path``.

    Blocks on the disk: the event loop calls it in a thread. ``environ`` gives ``${VAR}`` and the overrides.

    Raises:
        ConfigError: unreadable, unknown, contradictory or out of range; names the setting and what to do.
    """
    return interpret(read_bounded(path), path, environ)


def interpret(data: bytes, path: str, environ: Mapping[str, str]) -> Loaded:
    """The configuration that ``data`` states; ``path`` only names it. Raises ConfigError as ``load`` does."""
    expander = Expander(environ)
    table, foreign = take(parse(data, path), expander)
    stated: dict[str, Stated] = {}
    if (node := table.entries.pop(MAPPINGS, None)) is not None:
        stated[MAPPINGS] = Stated(read_mappings(node, expander), node.where)
    stated |= read_table(table, expander)
    for name, node in foreign.items():
        value = read_value(FIELDS[name], node, expander)
        if name in stated and stated[name].value != value:
            raise ConfigError(
                name,
                seen=f"two different values, at {stated[name].where} and at {node.where}",
                allowed="one value",
                hint="the section in the specification's spelling states the same setting: remove one of the two",
            )
        stated[name] = Stated(value, node.where)
    overrides = _overrides(environ)
    stated |= overrides
    settings = assemble({name: each.value for name, each in stated.items()})
    check(settings)
    notes = warnings(settings, environ)
    if "phase" in overrides:
        notes += ("phase: set by SIDECAR__PHASE, so a changed file cannot move it",)
    return Loaded(settings, hashlib.sha256(data).hexdigest(), path, frozenset(stated), notes)


def _overrides(environ: Mapping[str, str]) -> dict[str, Stated]:
    found: dict[str, Stated] = {}
    for variable in sorted(environ):
        if not variable.startswith(PREFIX):
            continue
        path = variable.removeprefix(PREFIX).lower().replace("__", ".")
        where = f"environment variable {variable[:100]}"
        if path not in FIELDS:
            raise unknown_setting(path[:100], where)
        text = environ[variable]
        scalar = Scalar(text, plain=not text, where=where)
        # An empty expander: what comes from the environment is not expanded again.
        found[path] = Stated(read_value(FIELDS[path], scalar, _LITERAL), where)
    return found


class _Literal(Expander):
    """Leaves every text as it is."""

    def expand(self, scalar: Scalar, setting: str) -> Scalar:  # noqa: ARG002  (the base's signature)
        return scalar


_LITERAL: Final = _Literal({})


def render(settings: Settings) -> str:
    """The whole configuration as YAML that ``load`` reads back to the same values; secrets are ``***``."""
    lines: list[str] = []
    section: list[str] = []
    for path, each in FIELDS.items():
        *heads, name = path.split(".")
        for depth, head in enumerate(heads):
            if section[: depth + 1] != heads[: depth + 1]:
                lines.append(f"{'  ' * depth}{head}:")
                section = heads[: depth + 1]
        value = value_at(settings, path)
        lines.append(f"{'  ' * len(heads)}{name}: {_quoted(value, each.secret, show(value, each.unit))}")
    return "\n".join(lines) + "\n"


def _quoted(value: object, secret: bool, shown: str) -> str:
    if value is None:
        return "null"
    if secret:
        return '"***"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_quote(str(item)) for item in value) + "]"
    if isinstance(value, Mapping):
        return shown.replace("${", "$${")
    return _quote(value) if isinstance(value, str) else shown


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''").replace("${", "$${") + "'"


def changed(old: Settings, new: Settings) -> tuple[str, ...]:
    """Names of the settings whose values differ, in the order of their declaration."""
    return tuple(path for path in FIELDS if value_at(old, path) != value_at(new, path))

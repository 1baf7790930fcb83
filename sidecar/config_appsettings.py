"""The specification's own spelling of the configuration (its appsettings.json, L424-442 and L524-556).

``HybridLogging``, ``DynamoDB`` and ``MigrationPhases`` are read beside our names and mean the same settings. Names
are matched without regard to case, as .NET does; only the exact ``dynamodb`` is our own section. The four rows of
``MigrationPhases`` state nothing: they must agree with the phase table, as every flag must.

FAILURE: a setting stated in both spellings with different values, an unknown name, or a row that contradicts the
table ends in a ConfigError.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from sidecar.config_document import Expander, Node, Scalar, Table
from sidecar.errors import ConfigError
from sidecar.phase import TABLE, Phase

PATHS: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        "HybridLogging": {
            "WritesToSql": "flags.writes_to_sql",
            "WritesToDynamoDb": "flags.writes_to_dynamodb",
            "RequireBothWrites": "flags.require_both_writes",
            "ReadsFromDynamoDb": "flags.reads_from_dynamodb",
            "CurrentPhase": "phase",
            "ContinueOnWriteFailure": "continue_on_write_failure",
            "RetryAttempts": "retry.attempts",
            "RetryDelay": "retry.delay",
        },
        "DynamoDB": {"TableName": "dynamodb.table", "Region": "dynamodb.region"},
    }
)
"""Section -> name -> our setting."""

_ROWS: Final = "MigrationPhases"
_ROW_FLAGS: Final = {
    "WritesToSql": "writes_to_sql",
    "WritesToDynamoDb": "writes_to_dynamodb",
    "RequireBothWrites": "require_both_writes",
    "ReadsFromDynamoDb": "reads_from_dynamodb",
}
_ROW: Final = re.compile(r"phase([0-3])_(\w+)", re.IGNORECASE | re.ASCII)


def take(root: Table, expander: Expander) -> tuple[Table, dict[str, Node]]:
    """Split off the specification's sections: the rest of the root, and our path -> node for what they state.

    Raises:
        ConfigError: an unknown name in one of the sections, or a row of MigrationPhases against the phase table.
    """
    rest: dict[str, Node] = {}
    stated: dict[str, Node] = {}
    sections = {name.casefold(): name for name in (*PATHS, _ROWS)}
    for key, node in root.entries.items():
        section = sections.get(key.casefold())
        if section is None or key == "dynamodb":
            rest[key] = node
            continue
        if not isinstance(node, Table):
            raise ConfigError(section, seen="no section", allowed="a section of settings", hint=node.where)
        if section == _ROWS:
            _check_rows(node, expander)
            continue
        names = {name.casefold(): name for name in PATHS[section]}
        for written, value in node.entries.items():
            name = names.get(written.casefold())
            if name is None:
                raise _unknown(f"{section}.{written}", ", ".join(PATHS[section]), value)
            path = PATHS[section][name]
            if path in stated:
                raise _unknown(f"{section}.{written}", "each name once", value)
            stated[path] = value
    return Table(rest, root.where), stated


def _check_rows(rows: Table, expander: Expander) -> None:
    for key, row in rows.entries.items():
        setting = f"{_ROWS}.{key}"
        match = _ROW.fullmatch(key)
        phase = Phase(int(match[1])) if match else None
        if phase is None or match is None or match[2].casefold() != phase.label.replace("_", ""):
            known = ", ".join(f"Phase{p.value}_{p.label.title().replace('_', '')}" for p in Phase)
            raise _unknown(setting, known, row)
        if not isinstance(row, Table):
            raise _unknown(setting, "a section of flags", row)
        _check_row(setting, phase, row, expander)


def _check_row(setting: str, phase: Phase, row: Table, expander: Expander) -> None:
    flags = TABLE[phase].flags
    names = {name.casefold(): flag for name, flag in _ROW_FLAGS.items()}
    for written, node in row.entries.items():
        if written.casefold() == "description":
            continue
        flag = names.get(written.casefold())
        if flag is None or not isinstance(node, Scalar):
            raise _unknown(f"{setting}.{written}", ", ".join((*_ROW_FLAGS, "Description")), node)
        expected = str(flags[flag]).lower()
        if expander.expand(node, setting).text.lower() != expected:
            raise ConfigError(
                f"{setting}.{written}",
                seen="another value",
                allowed=f"{expected}, as {phase.label} means",
                hint=f"the phases are fixed: remove the line or correct it ({node.where})",
            )


def _unknown(setting: str, allowed: str, node: Node) -> ConfigError:
    return ConfigError(setting, seen="an unknown or repeated name", allowed=allowed, hint=f"correct it ({node.where})")

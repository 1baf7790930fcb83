"""docs/CONFIGURATION.md, written from the settings module: ``python -m tests.parts.configuration_page``.

Type, unit, bounds and default come from the declarations, the meaning from the comment beside or above each field and
from the docstring of its section; ``tests/test_configuration_page.py`` fails when the page and the code differ.
"""

import ast
import inspect
import re
from pathlib import Path

from sidecar import config_checks, settings
from sidecar.config_appsettings import PATHS
from sidecar.config_values import FIELDS, Field, show, value_at

PAGE = Path(__file__).parent.parent.parent / "docs" / "CONFIGURATION.md"

HEAD = """\
# Configuration

<!-- Written by `python -m tests.parts.configuration_page` from sidecar/settings.py: change it there. -->

One file, `config.yaml` (`--config PATH`, else `$SIDECAR_CONFIG`, else `/etc/sidecar/config.yaml`), YAML or JSON, at
most 1 MiB. What it leaves out has its default. `sidecar validate-config` says what is wrong, `sidecar print-config`
what is in force, secrets masked. [config.yaml](../config.yaml) at the top of the repository is an example.

## How values are written

* `${VAR}` takes a variable of the environment and is an error without it; `${VAR:-default}` takes the default where
  the variable is unset or empty; `$${` is a literal `${`. A result that is empty states nothing (`null`). What a
  variable holds is a value, never structure, and is not expanded again.
* `SIDECAR__SECTION__KEY` in the environment overrides the file: `SIDECAR__POSTGRES__HOST=db`, `SIDECAR__PHASE=1`.
* Durations: a number of seconds, or with a unit (`us` `ms` `s` `m` `h` `d`, also together: `1h30m`), or .NET's
  `[days.]hh:mm:ss[.fraction]`; at most 3650 days. Sizes: a number of bytes, or `KiB` `MiB` `GiB` `TiB` (also `Ki`
  ...), or `kB`-like units of 1000 (`MB`, `GB`). Lists: a sequence, or a text with commas.
* A value means what its setting's type says: `no` is a text where a text is wanted, and false where a truth is.
* A name that is unknown, a name that stands twice, a tag, a merge key and a second document are errors. Up to 64
  aliases are read.
* Secrets (`password`) never show in errors, logs or `print-config`. Prefer `password_file`.

## What changes without a restart

The file is looked at every `reload.poll`, and at once after SIGHUP. Settings marked *live* are then in force for
every request that begins; a changed setting marked *restart* is reported as `restart_required` and keeps its
running value. A file that is unreadable, empty, cut off, contradictory or in any other way wrong leaves the last
good one in force: `sidecar_config_last_reload_successful` falls to 0 and one line says why. A file that no longer
states `phase` is wrong in this sense where the one in force does. Mount the ConfigMap's directory: a subPath mount
never changes.

## The specification's own spelling

An appsettings.json is read as it is: names in any case, a byte order mark and tabs included. A setting stated in
both spellings must have the same value. `MigrationPhases` may stand there too; its rows must say what the phases
mean.

"""


def comments(source: str) -> dict[str, dict[str, str]]:
    """Class -> field -> the comment beside it, or the comment lines right above it."""
    lines = source.splitlines()
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields = found.setdefault(node.name, {})
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                last = lines[(statement.end_lineno or statement.lineno) - 1]
                beside = re.search(r"\s# (.*)$", last[statement.end_col_offset or 0 :])
                above: list[str] = []
                number = statement.lineno - 2
                while lines[number].strip().startswith("# "):
                    above.insert(0, lines[number].strip()[2:])
                    number -= 1
                fields[statement.target.id] = beside[1] if beside else " ".join(above)
    return found


def _row(field: Field, name: str, meaning: str) -> str:
    default = "" if field.default is None else f"`{show(field.default, field.unit)}`"
    meaning = meaning.replace("None: ", "unset: ").replace("True: ", "true: ").replace("False: ", "false: ")
    allowed = field.allowed.removesuffix(", or null").replace("|", "\\|")
    cells = (f"`{name}`", allowed, default or "unset", meaning.replace("|", "\\|"), "live" if field.live else "restart")
    return "| " + " | ".join(cells) + " |"


def page() -> str:
    """The whole page."""
    texts = comments(inspect.getsource(settings))
    parts = [HEAD, "| specification | setting |\n|---|---|\n"]
    for section, names in PATHS.items():
        parts += [f"| `{section}:{name}` | `{path}` |\n" for name, path in names.items()]
    current = None
    for path, field in FIELDS.items():
        section, _, name = path.rpartition(".")
        cls = type(value_at(settings.Settings(), section)) if section else settings.Settings
        if section != current:
            current = section
            title = f"`{section}`" if section else "Top level"
            intro = inspect.cleandoc(cls.__doc__ or "") if section else "Settings that belong to no section."
            parts.append(f"\n## {title}\n\n{intro}\n\n")
            parts.append("| setting | allowed | default | meaning | change |\n|---|---|---|---|---|\n")
        parts.append(_row(field, name, texts[cls.__name__][name]) + "\n")
    parts.append("\n## Rules between settings\n\nEach is checked at start and at every reload:\n\n")
    parts += [f"* {inspect.cleandoc(rule.__doc__ or '')}\n" for rule in config_checks.CHECKS]
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

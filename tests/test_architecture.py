"""Rules of the source tree that no tool knows; the layers themselves are checked by import-linter in ``make check``."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sidecar.phase import Phase

ROOT = Path(__file__).parent.parent / "sidecar"
MODULES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
MAX_LINES = 450
VAGUE = {"utils", "util", "common", "helpers", "helper", "manager", "managers", "misc", "core", "base_utils"}
DRIVERS = {"asyncpg", "aioboto3", "aiobotocore", "boto3", "botocore"}
CONCRETE_STORES = ("sidecar.stores.postgres", "sidecar.stores.dynamodb", "sidecar.stores.memory")


def imports(tree: ast.AST) -> Iterator[str]:
    """The full dotted name of everything that is imported, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_web_server(tree: ast.AST) -> bool:
    """Whether aiohttp's server side is used."""
    return any(name == "aiohttp.web" or name.startswith(("aiohttp.web.", "aiohttp.web_")) for name in imports(tree))


def imports_driver(tree: ast.AST) -> bool:
    """Whether a database driver is imported."""
    return any(name.partition(".")[0] in DRIVERS for name in imports(tree))


def names_concrete_store(tree: ast.AST) -> bool:
    """Whether a store is imported that is not the port."""
    return any(name.startswith(CONCRETE_STORES) for name in imports(tree))


def _members(node: ast.AST) -> Iterator[ast.Attribute]:
    return (n for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr in Phase.__members__)


def compares_phase(tree: ast.AST) -> bool:
    """Whether a member of Phase stands in a comparison or in a case of a match."""
    return any(any(_members(node)) for node in ast.walk(tree) if isinstance(node, (ast.Compare, ast.MatchValue)))


def broken(rule: Callable[[ast.AST], bool], allowed: tuple[str, ...]) -> list[str]:
    """Modules that break the rule outside of the places where they may."""
    return [
        name
        for name, path in MODULES.items()
        if not name.startswith(allowed) and rule(ast.parse(path.read_text(encoding="utf-8")))
    ]


def test_http_server_is_used_only_in_api_and_where_it_is_wired():
    """aiohttp.web is imported in api, app and embedded alone."""
    assert broken(imports_web_server, ("api/", "app/", "app.py", "embedded/")) == []


def test_drivers_are_used_only_in_stores():
    """asyncpg, aioboto3 and botocore are imported in stores alone."""
    assert broken(imports_driver, ("stores/",)) == []


def test_concrete_stores_are_named_only_where_they_are_wired():
    """Everybody but app and embedded knows the port, not PostgreSQL or DynamoDB."""
    assert broken(names_concrete_store, ("stores/", "app/", "app.py", "embedded/")) == []


def test_phases_are_compared_only_in_the_table_and_the_switch():
    """A part asks the policy what to do; it never asks which phase it is."""
    assert broken(compares_phase, ("phase.py", "migration.py")) == []


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (imports_web_server, "from aiohttp import web"),
        (imports_web_server, "import aiohttp.web"),
        (imports_web_server, "def f():\n    from aiohttp.web_request import Request"),
        (imports_driver, "import botocore.auth"),
        (imports_driver, "if True:\n    from asyncpg import connect"),
        (names_concrete_store, "from sidecar.stores import postgres"),
        (names_concrete_store, "from sidecar.stores.dynamodb_wire import x"),
        (compares_phase, "x = phase is Phase.SQL_ONLY"),
        (compares_phase, "x = phase in (Phase.SQL_ONLY, Phase.DUAL_WRITE)"),
        (compares_phase, "match phase:\n    case p.Phase.DUAL_WRITE: pass"),
    ],
)
def test_each_rule_sees_what_it_forbids(rule, source):
    """The rules above can fail: each finds the forbidden line where it is written."""
    assert rule(ast.parse(source))
    assert not rule(
        ast.parse("from aiohttp import ClientSession\nfrom sidecar.stores.base import Store\nx = Phase.SQL_ONLY")
    )


LONGER = {  # with what holds it together, and how far it may go
    "spool/spool.py": 550,  # the spool's face: short methods that hand on to the parts
}


def test_files_are_short():
    """No file of the product is longer than 450 lines, but one that says why: one room, one thing."""
    long = {
        name: n
        for name, path in MODULES.items()
        if (n := len(path.read_text().splitlines())) > LONGER.get(name, MAX_LINES)
    }
    assert long == {}


def test_names_say_what_is_inside():
    """No module or package is called utils, common, helpers, manager or the like."""
    assert [name for name in MODULES if VAGUE & set(Path(name).with_suffix("").parts)] == []


def test_every_module_says_what_it_is():
    """Every module begins with a docstring."""
    assert [name for name, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_every_layer_has_its_module():
    """The rules look at a tree that is there: the package was found and is not empty."""
    assert {"phase.py", "migration.py", "stores/base.py"} <= set(MODULES)

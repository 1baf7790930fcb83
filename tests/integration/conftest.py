"""These tests run only when their directory is named: they need tools that ``make test`` does not install."""

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this directory out of a run that does not ask for it (``pytest``, ``make test``)."""
    named = (Path(str(argument).split("::")[0]).resolve() for argument in config.args)
    return None if any(path == HERE or HERE in path.parents for path in named) else True


FIRST = (
    "test_watching.py",
    "test_page.py",
    "test_pod_life.py",
    "test_image.py",
    "test_rights.py",
    "test_clients.py",
    "test_configmap.py",
    "test_dockerfile.py",
)
"""What takes long or waits begins first; the modules of many short tests fill the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A module runs in one process, in its own order; modules are given out in this one."""
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))

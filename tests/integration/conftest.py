"""These tests run only when their directory is named: they need tools that ``make test`` does not install."""

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this directory out of a run that does not ask for it (``pytest``, ``make test``)."""
    named = (Path(str(argument).split("::")[0]).resolve() for argument in config.args)
    return None if any(path == HERE or HERE in path.parents for path in named) else True


LONGEST = ("test_watching.py", "test_clients.py", "test_image.py", "test_page.py", "test_rights.py")
"""What takes minutes, or waits for long, begins first: then nothing long is left alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A module runs in one process, in its own order; the longest modules are given out first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))

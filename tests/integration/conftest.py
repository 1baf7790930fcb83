"""These tests run only when their directory is named: they need tools that ``make test`` does not install."""

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this directory out of a run that does not ask for it (``pytest``, ``make test``)."""
    named = (Path(str(argument).split("::")[0]).resolve() for argument in config.args)
    return None if any(path == HERE or HERE in path.parents for path in named) else True

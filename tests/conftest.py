"""Shared fixtures; each part that tests need lives in its own module under ``tests/parts``."""

import gc
import os
from collections.abc import Iterator

import pytest

from tests.parts.nursery import NURSERY

pytest_plugins = ["tests.parts.postgres", "tests.parts.adopted", "tests.parts.dynamodb"]

# Every core of the machine is busy here: what gives way to everybody would wait for the end of all other tests.
os.environ["SIDECAR_PRIORITY"] = "normal"


def pytest_collection_finish() -> None:
    """Thousands of tests and their modules stay to the end: nobody need look through them for garbage, many times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def nursery() -> Iterator[None]:
    """The process that forks sidecars ends with the session."""
    yield
    NURSERY.close()

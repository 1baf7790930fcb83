"""Shared fixtures; each part that tests need lives in its own module under ``tests/parts``."""

import gc
import os
from collections.abc import Iterator

import pytest

from tests.parts.nursery import NURSERY

pytest_plugins = ["tests.parts.postgres", "tests.parts.adopted", "tests.parts.dynamodb"]

# Every core of the machine is busy here: what gives way to everybody would wait for the end of all other tests.
os.environ["SIDECAR_PRIORITY"] = "normal"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The scenarios, which take longest, are begun first, as many by each of xdist's workers; else one ends alone.

    With ``--dist worksteal`` a worker begins with a stretch of the items as long as everybody's, and takes half of
    what another has left when it is through.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    total = len(items)
    long = [item for item in items if "scenarios" in item.path.parts]
    short = [item for item in items if "scenarios" not in item.path.parts]
    items.clear()
    for worker in range(workers):
        items += long[worker::workers]
        end = max(0, (worker + 1) * total // workers - len(items))
        items += short[:end]
        del short[:end]


def pytest_collection_finish() -> None:
    """Thousands of tests and their modules stay to the end: nobody need look through them for garbage, many times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def nursery() -> Iterator[None]:
    """The process that forks sidecars ends with the session."""
    yield
    NURSERY.close()

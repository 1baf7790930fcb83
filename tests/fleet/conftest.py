"""A fleet of two stores with a clock set by hand."""

import pytest

from tests.fleet.fakes import Fleet


@pytest.fixture
def fleet() -> Fleet:
    """Empty stores; nobody has started."""
    return Fleet()

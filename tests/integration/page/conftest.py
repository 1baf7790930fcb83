"""The stand of the scenarios, and a browser to look at its sidecars with."""

from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser

from tests.integration.page.browser import chromium
from tests.scenarios.conftest import http, stand

__all__ = ["browser", "http", "stand"]


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """A browser of its own for each test: it starts in half a second, and nothing of one reaches another."""
    async with chromium() as started:
        yield started

"""A real headless Chromium with one page of the sidecar, and everything that it said, asked for and got."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from playwright.async_api import Browser, ConsoleMessage, Page, Request, Response, async_playwright, expect

PATIENCE = 30_000  # milliseconds that a busy machine may take for anything
expect.set_options(timeout=PATIENCE)

# Nothing but this machine can be found, so that a page that needs more cannot pass; root has no sandbox.
ARGUMENTS = ("--no-sandbox", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")


@dataclass
class Look:
    """One page, opened, and what was noted of it."""

    page: Page
    errors: list[str] = field(default_factory=list)  # console errors and uncaught exceptions
    asked: list[str] = field(default_factory=list)  # method and address of every request
    got: list[Response] = field(default_factory=list)

    async def text(self, selector: str) -> str:
        """What somebody would read there."""
        return await self.page.locator(selector).inner_text()

    async def sees(self, selector: str, text: str) -> None:
        """Wait until the text stands there."""
        await expect(self.page.locator(selector)).to_contain_text(text)

    async def bodies(self) -> str:
        """All that the browser was answered, as text."""
        return "\n".join([await answer.text() for answer in self.got if answer.status != 304 and answer.ok])

    def outside(self, url: str) -> list[str]:
        """Requests to anybody but the sidecar."""
        home = urlsplit(url).netloc
        return [each for each in self.asked if urlsplit(each.partition(" ")[2]).netloc != home]

    def note_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.type}: {message.text} ({message.location})")

    def note_request(self, request: Request) -> None:
        self.asked.append(f"{request.method} {request.url}")

    def note_response(self, response: Response) -> None:
        self.got.append(response)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Debian's Chromium; fails where there is none."""
    path = shutil.which("chromium")
    assert path, "chromium is missing: run tests/integration/page/install"
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=path, args=[*ARGUMENTS], timeout=PATIENCE)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def look(browser: Browser, url: str, **options: Any) -> AsyncIterator[Look]:
    """Open the page in a context of its own; ``options`` are the context's, such as color_scheme."""
    context = await browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    context.set_default_timeout(PATIENCE)
    try:
        made = Look(await context.new_page())
        made.page.on("console", made.note_console)
        made.page.on("pageerror", lambda error: made.errors.append(f"uncaught: {error}"))
        made.page.on("request", made.note_request)
        made.page.on("response", made.note_response)
        answer = await made.page.goto(f"{url}/")
        assert answer
        assert answer.ok
        await expect(made.page.locator("#applied")).not_to_be_empty()
        yield made
    finally:
        await context.close()

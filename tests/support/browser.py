"""A real headless browser for tests of pages, and the problems that occur in a page."""

import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from playwright.async_api import Browser, BrowserContext, Page, Response, Route, ViewportSize, async_playwright

DESK = ViewportSize(width=1280, height=900)
PHONE = ViewportSize(width=360, height=740)


@dataclass(eq=False)
class WatchedPage:
    """A page, and the errors and warnings that occurred in it."""

    page: Page
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        def note_response(response: Response) -> None:
            if response.status >= 400:
                self.problems.append(f"{response.status} {response.url}")

        self.page.on(
            "console",
            lambda message: self.problems.append(message.text) if message.type in {"error", "warning"} else None,
        )
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("requestfailed", lambda request: self.problems.append(f"failed: {request.url}"))
        self.page.on("response", note_response)

    async def number(self, selector: str) -> float:
        """Return the number that an element shows."""
        return float((await self.page.locator(selector).inner_text()).replace(",", ""))

    async def fits(self) -> bool:
        """Return whether the page needs no horizontal scrolling."""
        return bool(await self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


@contextlib.asynccontextmanager
async def launch_browser() -> AsyncIterator[Browser]:
    """Start Chromium, or skip the test where it is not installed."""
    program = shutil.which("chromium")
    if program is None:
        # In CI a missing browser must not look like a passed suite.
        (pytest.fail if os.environ.get("CI") else pytest.skip)("chromium is not installed: apt install chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        await browser.close()


async def open_page(context: BrowserContext, url: str, path: str, *, offline: bool = False) -> WatchedPage:
    """Open a page of the server at `url`.

    What it loads from elsewhere fails if `offline`, as without a network; every request is then looked at, which costs
    half a second of processor time per page.
    """

    async def load(route: Route) -> None:
        await (route.continue_() if route.request.url.startswith(url) else route.abort())

    if offline:
        await context.route("**/*", load)
    watched = WatchedPage(await context.new_page())
    await watched.page.goto(f"{url}{path}")
    return watched

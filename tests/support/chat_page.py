"""What tests do on the page to chat on."""

from typing import Any

from playwright.async_api import BrowserContext, Locator, Page, expect
from tests.support.browser import WatchedPage, open_page
from tests.support.scripted_gateway import ScriptedGateway


async def open_chat(context: BrowserContext, gateway: ScriptedGateway) -> WatchedPage:
    watched = await open_page(context, gateway.url, "/")
    await expect(watched.page.locator("#link")).to_have_text("ready")
    return watched


async def ask(page: Page, text: str) -> None:
    await page.get_by_role("textbox", name="Message").fill(text)
    await page.keyboard.press("Enter")


def answers(page: Page) -> Locator:
    return page.get_by_role("article", name="Answer")


def questions(page: Page) -> Locator:
    return page.get_by_role("article", name="You")


async def settings(page: Page) -> None:
    await page.get_by_role("button", name="Settings", exact=True).click()


def roles(request: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in request["messages"]]

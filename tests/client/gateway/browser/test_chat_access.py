"""The page to chat on can be used with a keyboard, by a screen reader, on a phone, and with a key."""

import pytest
from playwright.async_api import Browser, BrowserContext, expect
from tests.support.browser import PHONE, open_page
from tests.support.chat_page import answers, ask, open_chat, roles, settings
from tests.support.scripted_gateway import PARAMETERS, ScriptedGateway, answer

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_everything_works_with_the_keyboard_alone(context: BrowserContext, gateway: ScriptedGateway) -> None:
    watched = await open_chat(context, gateway)
    page = watched.page
    gateway.will(answer("Hello."), answer("Again."), answer("Edited."))
    order = []
    for _ in range(12):
        await page.keyboard.press("Tab")
        order.append(await page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert order[:6] == ["toggle-list", "treeswarm", "Map", "API", "theme", "toggle-side"]
    assert order[6:8] == ["new", "Why do trees branch?"]
    await page.get_by_role("textbox", name="Message").focus()
    await page.keyboard.type("Hi")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("there")
    await page.keyboard.press("Enter")
    await expect(answers(page)).to_contain_text("Hello.")
    assert roles(gateway.requests[0]) == [("user", "Hi\nthere")]
    await expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    await expect(page.get_by_role("status").filter(has_text="Answer complete")).to_have_count(1)
    for name, text in (("Answer again", "Again."), ("Edit the question", "")):
        for _ in range(40):
            await page.keyboard.press("Shift+Tab")
            if await page.evaluate("document.activeElement.getAttribute('aria-label')") == name:
                break
        await page.keyboard.press("Enter")
        if text:
            await expect(answers(page)).to_contain_text(text)
            await page.get_by_role("textbox", name="Message").focus()
    await expect(page.get_by_role("textbox", name="Question")).to_be_focused()
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("button", name="Edit the question")).to_be_focused()
    await page.get_by_role("tab", name="This answer").focus()
    await page.keyboard.press("ArrowRight")
    await expect(page.get_by_role("tab", name="Settings")).to_be_focused()
    await expect(page.get_by_role("tabpanel", name="Settings")).to_be_visible()
    assert watched.problems == []


async def test_controls_have_names_and_log_is_announced(context: BrowserContext, gateway: ScriptedGateway) -> None:
    watched = await open_chat(context, gateway)
    page = watched.page
    gateway.will(answer("Hello.\n\n```python\nx = 1\n```\n\n- [x] done\n\n| a |\n|-|\n| b |"))
    await ask(page, "Hi")
    await expect(answers(page)).to_have_attribute("aria-busy", "false")
    await settings(page)
    nameless = """[...document.querySelectorAll('button, a, input, textarea, select, [role=img], [tabindex="0"]')]
        .filter((one) => one.checkVisibility())
        .filter((one) => !(one.getAttribute('aria-label') || one.textContent.trim() || one.labels?.length
                           || one.getAttribute('aria-labelledby')))
        .map((one) => one.outerHTML)"""
    assert await page.evaluate(nameless) == []
    labelled = (
        "[...document.querySelectorAll('[aria-labelledby], [aria-controls], [aria-describedby]')].flatMap((one) =>"
    )
    labelled += " ['labelledby', 'controls', 'describedby'].flatMap((kind) => (one.getAttribute(`aria-${kind}`) ?? '')"
    labelled += ".split(' ').filter((id) => id && !document.getElementById(id))))"
    assert await page.evaluate(labelled) == []
    await expect(page.get_by_role("log", name="Conversation")).to_have_attribute("aria-live", "polite")
    for landmark in ("banner", "navigation", "main", "complementary"):
        assert await page.get_by_role(landmark).count() >= 1  # type: ignore[arg-type]
    assert await page.get_by_role("heading", level=1).count() == 1
    assert watched.problems == []


async def test_phone_needs_no_horizontal_scroll(browser: Browser, gateway: ScriptedGateway) -> None:
    context = await browser.new_context(viewport=PHONE, color_scheme="dark")
    watched = await open_chat(context, gateway)
    page = watched.page
    assert await watched.fits()
    long = f"{'word ' * 40}{'x' * 300}\n\n```\n{'y' * 300}\n```\n\n| {' | '.join('abcdefghij')} |\n|{'-|' * 10}"
    gateway.will(answer(long, 9))
    await ask(page, "z" * 200)
    await expect(answers(page)).to_have_attribute("aria-busy", "false")
    await expect(page.get_by_role("complementary")).to_be_hidden()
    assert await watched.fits()
    for button, panel in (("Conversations", "list"), ("Answer and settings", "side")):
        await page.get_by_role("button", name=button, exact=True).click()
        await expect(page.locator(f"#{panel}")).to_be_visible()
        assert await watched.fits()
        for _ in range(12):  # what the panel covers cannot be reached
            await page.keyboard.press("Tab")
            within = f"[document.body, document.activeElement.closest('#{panel} *')].includes(document.activeElement)"
            assert await page.evaluate(within)
        await page.keyboard.press("Escape")
        await expect(page.locator(f"#{panel}")).to_be_hidden()
        await expect(page.get_by_role("button", name=button, exact=True)).to_be_focused()
    for scheme, paper in (("dark", "rgb(10, 16, 14)"), ("light", "rgb(244, 245, 240)")):
        await page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        await expect(page.locator("html")).to_have_css("background-color", paper)
    assert watched.problems == []
    await context.close()


async def test_key_is_asked_for_and_kept_for_the_tab(context: BrowserContext, gateway: ScriptedGateway) -> None:
    gateway.key = "sk-a-key"
    watched = await open_page(context, gateway.url, "/")
    page = watched.page
    dialog = page.get_by_role("dialog", name="This gateway needs a key")
    await expect(dialog).to_be_visible()
    await page.get_by_label("API key").fill("sk-wrong")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("alert")).to_have_text("That key was refused.")
    await page.get_by_label("API key").fill("sk-a-key")
    await page.keyboard.press("Enter")
    await expect(dialog).to_be_hidden()
    await expect(page.locator("#link")).to_have_text("ready")
    await page.reload()
    await expect(page.locator("#link")).to_have_text("ready")
    gateway.will(answer("Hello."))
    await ask(page, "Hi")
    await expect(answers(page)).to_contain_text("Hello.")
    assert await page.evaluate("Object.values(localStorage).some((text) => text.includes('sk-a-key'))") is False


async def test_model_without_a_template_continues_texts(context: BrowserContext, gateway: ScriptedGateway) -> None:
    gateway.about["chat"] = False
    watched = await open_chat(context, gateway)
    page = watched.page
    for text in ("print(1)", "end"):
        gateway.will([{"choices": [{"index": 0, "text": text, "finish_reason": None}]}])
    await ask(page, "def f():\n    ")
    await expect(answers(page)).to_contain_text("print(1)")
    await ask(page, "\n# ")
    await expect(answers(page).last).to_contain_text("end")
    assert [(request["path"], request["prompt"]) for request in gateway.requests] == [
        ("/v1/completions", "def f():\n    "),
        ("/v1/completions", "def f():\n    print(1)\n# "),
    ]
    assert watched.problems == []


async def test_full_storage_is_said(context: BrowserContext, gateway: ScriptedGateway) -> None:
    watched = await open_chat(context, gateway)
    page = watched.page
    await page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full'); }; }")
    gateway.will(answer("Hello."))
    await ask(page, "Hi")
    await expect(page.get_by_role("alert")).to_contain_text("This browser has no more room")
    await expect(answers(page)).to_contain_text("Hello.")
    assert watched.problems == []


async def test_missing_nodes_are_named(context: BrowserContext, gateway: ScriptedGateway) -> None:
    gateway.about = {"model": "demo", "ready": False, "why": "no node serves blocks 3:5", "parameters": PARAMETERS}
    watched = await open_page(context, gateway.url, "/")
    await expect(watched.page.locator("#link")).to_have_text("waiting for nodes")
    await expect(watched.page.get_by_role("alert")).to_have_text("No node serves blocks 3:5.")
    assert watched.problems == []

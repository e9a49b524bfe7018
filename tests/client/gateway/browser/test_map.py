"""The pages of a gateway work in a real browser, with a real gateway over three real nodes."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator

import httpx2
import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, expect
from tests.support.browser import DESK, PHONE, WatchedPage, open_page
from tests.support.gateway_process import KEY, Gateway, gateway
from tests.support.registry_media import free_port

from treeswarm_client.local_swarm import LocalSwarm, even_cuts, local_swarm

pytestmark = pytest.mark.asyncio(loop_scope="module")
# Timeout for changes of the swarm: a dead node is pinged again every ten seconds, on a machine busy with other tests.
SEEN_MS = 60_000
PROMPT = "class Queue:\n    def __init__(self"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    async with local_swarm("demo", even_cuts(8, 3)) as swarm:
        yield swarm


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(swarm: LocalSwarm) -> AsyncIterator[Gateway]:
    async with gateway(swarm.peers, "--draft", "demo-draft", "--tree-size", "24") as served:
        yield served


async def open_map(context: BrowserContext, served: Gateway, path: str = "/map/") -> WatchedPage:
    return await open_page(context, served.url, path, offline=True)


async def generate(served: Gateway, tokens: int = 48) -> str:
    async with served.openai() as api:
        completion = await api.completions.create(
            model="demo", prompt=PROMPT, max_tokens=tokens, extra_body={"ignore_eos": True}
        )
    return completion.choices[0].text


async def test_nodes_appear_without_any_problem(context: BrowserContext, served: Gateway, swarm: LocalSwarm) -> None:
    watched = await open_map(context, served)
    page = watched.page
    await expect(page.locator("#link")).to_have_text("live")
    await expect(page.locator(".nodes .bar[data-state=online]")).to_have_count(3, timeout=SEEN_MS)
    await expect(page.locator("#t-blocks")).to_have_text("8 / 8")
    await expect(page.locator("#t-nodes")).to_have_text("3")
    assert await page.locator(".nodes b").all_inner_texts() == [node.address for node in swarm.nodes]
    assert await page.locator(".nodes .name").all_inner_texts() == ["0:3", "3:5", "5:8"]
    assert await page.locator(".cell").all_inner_texts() == ["1"] * 8
    await expect(page.locator("#alarm")).to_be_hidden()
    assert watched.problems == []


async def test_generation_is_shown_as_its_tree(context: BrowserContext, served: Gateway) -> None:
    watched = await open_map(context, served)
    page = watched.page
    await expect(page.locator("#link")).to_have_text("live")
    text = await generate(served)
    panel = page.locator(".panel")
    await expect(panel.locator(".chip")).to_have_text("at its limit")
    rounds = int(await panel.get_attribute("data-rounds") or 0)
    tokens = await watched.number(".panel dl div:nth-child(1) dd")
    assert rounds > 0
    # Some tokens of the last round may lie beyond the limit.
    assert tokens >= 48
    assert await watched.number(".panel dl div:nth-child(2) dd") == pytest.approx(tokens / (rounds + 1), abs=0.006)
    assert (await panel.locator(".text").inner_text()).startswith(text[: len(text) // 2])
    tree = panel.locator(".tree")
    nodes = int(await tree.get_attribute("data-nodes") or 0)
    assert nodes > 0
    await expect(tree.locator("circle.guess, circle.late")).to_have_count(nodes)
    await expect(tree.locator("circle.bonus")).to_have_count(1)
    assert await tree.locator("circle.kept").count() == 2 + int(await tree.get_attribute("data-accepted") or 0)
    before = await watched.number("#t-per")
    await generate(served, 40)
    await expect(page.locator(".panel")).to_have_count(2)
    await expect(page.locator("#t-per-more")).to_contain_text("traversals")
    assert before > 1
    assert watched.problems == []


async def test_concurrent_generations_are_pictures_and_lines(context: BrowserContext, served: Gateway) -> None:
    watched = await open_map(context, served)
    await expect(watched.page.locator("#link")).to_have_text("live")
    await asyncio.gather(*(generate(served, 64) for _ in range(7)))
    await expect(watched.page.locator(".panel")).to_have_count(4)
    await expect(watched.page.locator(".rest li")).to_have_count(3)
    assert watched.problems == []


async def test_reduced_motion_is_respected(browser: Browser, served: Gateway) -> None:
    context = await browser.new_context(viewport=DESK, reduced_motion="reduce")
    watched = await open_map(context, served)
    await expect(watched.page.locator("#link")).to_have_text("live")
    await generate(served)
    await expect(watched.page.locator(".tree.walked:not(.moving)")).to_have_count(1)
    assert await watched.page.evaluate("document.getAnimations().length") == 0
    await context.close()


async def test_phone_needs_no_horizontal_scrolling(browser: Browser, served: Gateway) -> None:
    context = await browser.new_context(viewport=PHONE, color_scheme="dark")
    watched = await open_map(context, served)
    page = watched.page
    await expect(page.locator(".nodes .bar")).to_have_count(3, timeout=SEEN_MS)
    await asyncio.gather(*(generate(served) for _ in range(4)))
    await expect(page.locator(".panel")).to_have_count(2)
    assert await watched.fits()
    assert await page.evaluate("document.documentElement.dataset.theme") == "dark"
    await page.get_by_role("button", name="Change between light and dark").click()
    assert await page.evaluate("document.documentElement.dataset.theme") == "light"
    assert watched.problems == []
    await context.close()


async def test_conversation_with_a_real_swarm(context: BrowserContext, served: Gateway, swarm: LocalSwarm) -> None:
    watched = await open_map(context, served, "/")
    page = watched.page
    await expect(page.locator("#link")).to_have_text("ready")
    await expect(page.locator("#facts")).to_contain_text("8 blocks on 3 nodes · context 2,048 tokens · float32")
    await expect(page.locator("#facts")).to_contain_text("draft demo-draft")
    prompt = "<b>import</b> os"
    async with served.openai() as api:
        completion = await api.completions.create(model="demo", prompt=prompt, max_tokens=60, temperature=0)
    await page.get_by_role("button", name="Settings", exact=True).click()
    await page.get_by_label("Kind of request").select_option("Continue my text")
    await page.get_by_label("Temperature").fill("0")
    await page.get_by_label("Longest answer").fill("60")
    await page.get_by_role("textbox", name="Message").fill(prompt)
    await page.keyboard.press("Enter")
    answer = page.get_by_role("article", name="Answer")
    await expect(answer).to_have_attribute("aria-busy", "false", timeout=SEEN_MS)
    assert await answer.locator(".prose").evaluate("(home) => home.textContent") == completion.choices[0].text
    await page.get_by_role("tab", name="This answer").click()
    side = page.get_by_role("complementary")
    # Each piece of text is drawn in the colour of the traversal that brought it.
    trips = await answer.locator(".trip").evaluate_all("(pieces) => pieces.map((piece) => Number(piece.dataset.trip))")
    assert trips == sorted(trips)
    assert 1 < len(set(trips)) < 60
    per_traversal = await watched.number('[data-figure="per"] dd')
    assert per_traversal == pytest.approx(60 / max(trips), abs=0.01)
    assert int(await side.locator(".tree").get_attribute("data-nodes") or 0) > 0
    addresses = await side.locator('[data-kind="hop"] b').all_inner_texts()
    assert addresses == [node.address for node in swarm.nodes]
    await expect(side.get_by_role("img", name=re.compile("computing .* seconds"))).to_be_visible()
    assert watched.problems == []


async def test_answer_of_a_real_swarm_obeys_a_schema(context: BrowserContext, served: Gateway) -> None:
    watched = await open_map(context, served, "/")
    page = watched.page
    await page.get_by_role("button", name="Settings", exact=True).click()
    await page.get_by_label("Form of the answer").select_option("JSON of a schema")
    kinds = {"type": "object", "properties": {"kind": {"enum": ["oak", "fir"]}}, "required": ["kind"]}
    await page.get_by_label("JSON schema").fill(json.dumps(kinds | {"additionalProperties": False}))
    await page.get_by_label("Longest answer").fill("40")
    await page.get_by_role("textbox", name="Message").fill("Which tree?")
    await page.keyboard.press("Enter")
    answer = page.get_by_role("article", name="Answer")
    await expect(answer).to_have_attribute("aria-busy", "false", timeout=SEEN_MS)
    assert json.loads(await answer.locator("pre code").inner_text())["kind"] in {"oak", "fir"}
    assert watched.problems == []


async def test_snippets_of_the_api_page_run(context: BrowserContext, served: Gateway) -> None:
    watched = await open_map(context, served, "/docs")
    page = watched.page
    snippets = []
    for name in ("curl", "Python"):
        await page.get_by_role("button", name=name, exact=True).click()
        snippets.append(await page.locator("#snippet").inner_text())
    assert all(served.url in code and "demo" in code for code in snippets)
    for command in (["sh", "-c", snippets[0]], [sys.executable, "-c", snippets[1]]):
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        printed = (await process.communicate())[0].decode()
        assert process.returncode == 0
        assert (json.loads(printed)["choices"][0]["message"]["content"] if command[0] == "sh" else printed).strip()
    assert watched.problems == []


async def test_page_of_the_api_works_without_a_network(context: BrowserContext, served: Gateway) -> None:
    watched = await open_map(context, served, "/docs")
    page = watched.page
    async with httpx2.AsyncClient() as http:
        paths = (await http.get(f"{served.url}/openapi.json")).json()["paths"]
    await expect(page.locator(".route")).to_have_count(len(paths))
    assert await page.locator(".route summary code").all_inner_texts() == list(paths)
    route = page.locator(".route", has_text="/v1/completions")
    await route.locator("summary").click()
    await expect(route.locator("th", has_text="temperature")).to_be_visible()
    await route.get_by_role("button", name="Send").click()
    await expect(route.locator(".answer")).to_contain_text('"object": "text_completion"', timeout=SEEN_MS)
    await expect(route.locator(".answer")).to_contain_text("200")
    assert watched.problems == []


async def test_page_of_the_api_fits_a_phone_in_both_themes(browser: Browser, served: Gateway) -> None:
    context = await browser.new_context(viewport=PHONE, color_scheme="dark")
    watched = await open_map(context, served, "/docs")
    page = watched.page
    await expect(page.locator(".route").first).to_be_visible(timeout=SEEN_MS)
    await page.evaluate("document.querySelectorAll('details').forEach((route) => { route.open = true; })")
    assert await watched.fits()
    colours = [await page.evaluate("getComputedStyle(document.documentElement).backgroundColor")]
    await page.get_by_role("button", name="Change between light and dark").click()
    colours.append(await page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
    assert colours == ["rgb(10, 16, 14)", "rgb(244, 245, 240)"]
    assert watched.problems == []
    await context.close()


async def test_page_may_load_from_this_gateway_only(served: Gateway) -> None:
    async with httpx2.AsyncClient(headers={"Accept": "text/html"}) as http:
        answers = [
            await http.get(f"{served.url}/map/{name}") for name in ("", "map.js", "../pages/chat/main.js", "../")
        ]
        missing = await http.get(f"{served.url}/map/../nothing")
        moved = await http.get(f"{served.url}/map")
    assert [answer.status_code for answer in answers] == [200] * 4
    assert missing.status_code == 404
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
    assert moved.headers["location"].endswith("/map/")


async def test_text_from_nodes_is_never_markup(context: BrowserContext, served: Gateway) -> None:
    """The page's own code is given what a malicious node may send."""
    watched = await open_map(context, served)
    evil = "<img src=x onerror=alert(1)>"
    shown = await watched.page.evaluate(
        """async (evil) => {
            const { drawSwarm } = await import("./swarm.js");
            const node = {id: evil, address: evil, blocks: "0:1", state: evil, serves: false, reachable: true,
                          latency_ms: null, why_silent: evil, load: null, software: evil};
            const served = {weights: evil, dtype: evil, quantization: evil, activations: evil, covered: false,
                         gaps: ["0:2"], replicas: [0, 0], nodes: [node]};
            drawSwarm({models: [{name: evil, model: evil, blocks: 2, covered: false, gaps: ["0:2"], classes: [served]}],
                       refused: {[evil]: 2}, silent: {[evil]: evil}});
            return [document.querySelectorAll("main img").length, document.querySelector("#doubts").textContent];
        }""",
        evil,
    )
    assert shown == [0, f"2 records refused as {evil}{evil} sends no records: {evil}"]
    assert watched.problems == []


async def test_key_is_asked_for_and_kept_for_the_tab(context: BrowserContext, swarm: LocalSwarm) -> None:
    os.environ["TREESWARM_API_KEYS"] = KEY
    try:
        async with gateway(swarm.peers, "--draft", "ngram") as locked:
            watched = await open_map(context, locked)
            page = watched.page
            dialog = page.get_by_role("dialog", name="This gateway needs a key")
            await expect(dialog).to_be_visible()
            await expect(page.locator("#link")).to_have_text("locked")
            await expect(page.locator("#key-error")).to_be_empty()
            await page.get_by_label("API key").fill("sk-not-this-one")
            await page.keyboard.press("Enter")
            await expect(page.locator("#key-error")).to_have_text("That key was refused.")
            await page.get_by_label("API key").fill(KEY)
            await page.get_by_role("button", name="Unlock").click()
            await expect(dialog).to_be_hidden()
            await expect(page.locator("#link")).to_have_text("live")
            await expect(page.locator(".nodes .bar")).to_have_count(3, timeout=SEEN_MS)
            assert {problem for problem in watched.problems if "401" not in problem} == set()
            await page.reload()
            watched.problems.clear()  # the old page's connection was cut off
            await expect(page.locator("#link")).to_have_text("live")
            await expect(dialog).to_be_hidden()
            # The page to chat on, and the page of the API, use the same key.
            await page.goto(f"{locked.url}/")
            watched.problems.clear()
            await expect(page.locator("#link")).to_have_text("ready")
            await page.get_by_role("button", name="Settings", exact=True).click()
            await page.get_by_label("Longest answer").fill("24")
            await page.get_by_role("textbox", name="Message").fill(PROMPT)
            await page.keyboard.press("Enter")
            answer = page.get_by_role("article", name="Answer")
            await expect(answer).to_have_attribute("aria-busy", "false", timeout=SEEN_MS)
            # A caller's own words are theirs to see, although the map shows none.
            await expect(answer.locator(".trip").first).to_be_visible()
            await page.goto(f"{locked.url}/docs")
            watched.problems.clear()
            await expect(page.locator("#snippet")).to_contain_text("YOUR_KEY")
            await page.locator(".route summary").first.click()
            await page.locator(".route").first.get_by_role("button", name="Send").click()
            await expect(page.locator(".route").first.locator(".answer")).to_contain_text('"id": "demo"')
            await page.goto(f"{locked.url}/map/")
            watched.problems.clear()
            await expect(page.locator("#link")).to_have_text("live")
            # With API keys, the map shows no text.
            await generate(locked)
            await expect(page.locator(".panel .chip")).to_have_text("at its limit")
            assert set(await page.locator(".panel .text").inner_text()) <= set("•◆ \n")
            assert watched.problems == []
    finally:
        del os.environ["TREESWARM_API_KEYS"]
    # The gateway is gone: the page says so and tries again.
    await expect(page.locator("#link")).to_have_attribute("data-state", "waiting")
    await expect(page.locator("#link")).to_contain_text("reconnecting")


async def test_outage_at_the_start_shows_nodes_and_gap(context: BrowserContext, swarm: LocalSwarm) -> None:
    """The gateway has no client yet, because blocks are missing: that is when the map is looked at."""
    dead = f"127.0.0.1:{free_port()}"
    async with gateway(f"{swarm.nodes[0].address},{dead}", "--draft", "none") as served:
        watched = await open_map(context, served)
        page = watched.page
        await expect(page.locator(".nodes .bar[data-state=online]")).to_have_count(1, timeout=SEEN_MS)
        assert await page.locator(".nodes b").all_inner_texts() == [swarm.nodes[0].address]
        assert await page.locator(".cell").all_inner_texts() == ["1"] * 3 + ["0"] * 5
        await expect(page.locator("#t-blocks")).to_have_text("3 / 8")
        await expect(page.locator("#alarm")).to_contain_text("No node serves blocks 3:8 of demo")
        await expect(page.locator("#doubts")).to_contain_text(f"{dead} sends no records: no answer from {dead}")
        assert watched.problems == []
    async with gateway(dead, "--draft", "none") as served:
        page = (await open_map(context, served)).page
        await expect(page.locator("#alarm")).to_contain_text(f"no answer from {dead}", timeout=SEEN_MS)
        assert await page.locator(".cell").all_inner_texts() == ["0"] * 8


async def test_dead_node_leaves_a_gap(context: BrowserContext, served: Gateway, swarm: LocalSwarm) -> None:
    """This test must be the last of the file, because it kills a node."""
    watched = await open_map(context, served)
    page = watched.page
    await expect(page.locator(".nodes .bar[data-state=online]")).to_have_count(3, timeout=SEEN_MS)
    swarm.nodes[1].process.kill()
    await expect(page.locator(".cell[data-replicas='0']")).to_have_count(2, timeout=SEEN_MS)
    await expect(page.locator(".bar[data-state=silent]")).to_have_count(1)
    await expect(page.locator("#alarm")).to_contain_text("No node serves blocks 3:5")
    await expect(page.locator("#t-blocks")).to_have_text("6 / 8")
    await expect(page.locator(".badge")).to_have_text("gap at 3:5")
    assert watched.problems == []

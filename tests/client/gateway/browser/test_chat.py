"""The page to chat on works in a real browser; the gateway behind it answers what each test writes."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import BrowserContext, expect
from tests.support.chat_page import answers, ask, open_chat, questions, roles, settings
from tests.support.scripted_gateway import CUT, ROUTE, Refused, Script, ScriptedGateway, answer, delta

pytestmark = pytest.mark.asyncio(loop_scope="module")
EVIL = "<img src=x onerror=alert(1)>"
HALF = delta(content="Half")
FAILURES: list[tuple[Script, str]] = [
    (Refused(400, "top_q is not known"), "The gateway refused this request: top_q is not known."),
    (Refused(429, "32 generations run already"), "The gateway is busy: 32 generations run already."),
    (Refused(503, "no node serves blocks 3:5"), "The swarm cannot answer now: no node serves blocks 3:5."),
    ([HALF, {"error": {"message": "a gateway is stopped"}}], "A gateway is stopped."),
    ([HALF, CUT], "The connection to the gateway ended in the middle of the answer."),
]


async def test_conversation_is_sent_shown_and_kept(context: BrowserContext, gateway: ScriptedGateway) -> None:
    watched = await open_chat(context, gateway)
    page = watched.page
    gateway.will(answer("Trees **branch** for the light."), answer("Because it comes from everywhere."))
    await ask(page, "Why do trees branch?")
    await expect(answers(page).locator(".prose")).to_have_text("Trees branch for the light.")
    await expect(answers(page).locator("strong")).to_have_text("branch")
    await ask(page, "But why?")
    await expect(answers(page).last).to_contain_text("Because it comes from everywhere.")
    assert [roles(request) for request in gateway.requests] == [
        [("user", "Why do trees branch?")],
        [
            ("user", "Why do trees branch?"),
            ("assistant", "Trees **branch** for the light."),
            ("user", "But why?"),
        ],
    ]
    assert gateway.requests[0]["stream_options"] == {"include_usage": True, "include_traversals": True}
    assert "temperature" not in gateway.requests[0]
    listed = page.get_by_role("navigation", name="Conversations").get_by_role("link", name="Why do trees branch?")
    await expect(listed).to_have_attribute("aria-current", "page")
    await page.reload()
    await expect(answers(page)).to_have_count(2)
    await expect(answers(page).last).to_contain_text("Because it comes from everywhere.")
    assert watched.problems == []


async def test_tokens_of_one_round_trip_are_coloured_alike(context: BrowserContext, gateway: ScriptedGateway) -> None:
    watched = await open_chat(context, gateway)
    page = watched.page
    gateway.will(answer("one two three four five six seven eight nine", 4))
    await ask(page, "Count.")
    trips = answers(page).locator(".trip")
    await expect(trips).to_have_count(3)
    assert await trips.evaluate_all("(spans) => spans.map((span) => [span.textContent, span.dataset.trip])") == [
        ["one", "1"],
        [" two three four five", "2"],
        [" six seven eight nine", "3"],
    ]
    lines = "(spans) => new Set(spans.map((span) => getComputedStyle(span).textDecorationColor)).size"
    assert await trips.evaluate_all(lines) == 3
    await page.get_by_role("button", name="Round trips").click()
    underlined = "(spans) => spans.some((span) => getComputedStyle(span).textDecorationLine !== 'none')"
    assert not await trips.evaluate_all(underlined)
    assert watched.problems == []


async def test_tree_and_route_of_the_answer_are_shown(context: BrowserContext, gateway: ScriptedGateway) -> None:
    watched = await open_chat(context, gateway)
    page = watched.page
    repair = {"lost": [ROUTE["hops"][1] | {"why": EVIL}], "gained": [ROUTE["hops"][2]], "seconds": 0.084}
    route = ROUTE | {"repairs": [repair], "hops": [{**ROUTE["hops"][0], "address": EVIL}, *ROUTE["hops"][1:]]}
    steps = answer("one two three four five six seven eight nine", 4)
    gateway.will([*steps[:-2], delta(None, {"route": route}), *steps[-2:]])
    await ask(page, "Count.")
    side = page.get_by_role("complementary")
    await expect(side.locator('[data-figure="tokens"] dd')).to_have_text("9")
    await expect(side.locator('[data-figure="per"] dd')).to_have_text("3.00")
    await expect(side.get_by_role("img", name="Round 2: 6 nodes drafted, 3 accepted")).to_be_visible()
    await expect(side.locator(".caption")).to_have_text(
        "Traversal 3 of 3 brought 4 tokens · 6 guesses, 3 accepted · 81 ms"
    )
    assert await side.locator(".route-line b").all_inner_texts() == [
        "this gateway",
        EVIL,
        "127.0.0.1:4002",
        "127.0.0.1:4003",
        "127.0.0.1:4002",
        "127.0.0.1:4003 with blocks 5:8",
    ]
    await expect(side.locator('[data-kind="lost"]')).to_contain_text(f"blocks 3:5 · {EVIL}")
    await expect(side.locator('[data-kind="gained"]')).to_contain_text("after 84 ms")
    assert await page.locator("main img, aside img").count() == 0
    # One traversal is looked at with the keys: its tree is drawn, and its text is marked.
    await side.get_by_role("slider", name="Traversal to show").focus()
    await page.keyboard.press("ArrowLeft")
    await expect(side.get_by_role("img", name="Round 1: ")).to_be_visible()
    await expect(page.locator(".trip.marked")).to_have_text("two three four five")
    await answers(page).locator(".trip").last.click()
    await expect(side.get_by_role("img", name="Round 2: ")).to_be_visible()
    assert watched.problems == []


async def test_stop_keeps_what_came(context: BrowserContext, gateway: ScriptedGateway) -> None:
    watched = await open_chat(context, gateway)
    page = watched.page
    for stop in ("key", "button"):
        pause = asyncio.Event()
        gateway.will(answer("one two three four five six seven eight nine", pause=pause))
        await ask(page, "Count.")
        await expect(answers(page).last).to_contain_text("one two three four five")
        await expect(answers(page).last).to_have_attribute("aria-busy", "true")
        if stop == "key":
            await page.keyboard.press("Escape")
        else:
            await page.get_by_role("button", name="Stop").click()
        await expect(answers(page).last).to_contain_text("Stopped.")
        await expect(page.get_by_role("button", name="Send")).to_be_visible()
        assert "six" not in await answers(page).last.inner_text()
        pause.set()
    async with asyncio.timeout(20):
        while gateway.left < 2:
            await asyncio.sleep(0.02)
    await expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    assert [problem for problem in watched.problems if not problem.startswith("failed: ")] == []


async def test_regenerated_answers_are_versions_of_one(context: BrowserContext, gateway: ScriptedGateway) -> None:
    watched = await open_chat(context, gateway)
    page = watched.page
    gateway.will(answer("The first."), answer("The second."), answer("On the first."))
    await ask(page, "Say something.")
    await expect(answers(page)).to_contain_text("The first.")
    await page.get_by_role("button", name="Answer again").click()
    await expect(answers(page)).to_contain_text("The second.")
    assert roles(gateway.requests[1]) == [("user", "Say something.")]
    versions = page.get_by_role("group", name="Versions of this answer")
    await expect(versions).to_contain_text("2 / 2")
    await versions.get_by_role("button", name="Earlier version").click()
    await expect(answers(page)).to_contain_text("The first.")
    await expect(answers(page)).to_have_count(1)
    await ask(page, "Go on.")
    await expect(answers(page).last).to_contain_text("On the first.")
    assert roles(gateway.requests[2])[1] == ("assistant", "The first.")
    assert watched.problems == []


async def test_edited_question_begins_a_branch(context: BrowserContext, gateway: ScriptedGateway) -> None:
    watched = await open_chat(context, gateway)
    page = watched.page
    gateway.will(answer("A is a letter."), answer("More of A."), answer("B is a letter."))
    await ask(page, "What is A?")
    await expect(answers(page)).to_contain_text("A is a letter.")
    await ask(page, "More?")
    await expect(answers(page)).to_have_count(2)
    await questions(page).first.get_by_role("button", name="Edit the question").click()
    await page.get_by_role("textbox", name="Question").fill("What is B?")
    await page.keyboard.press("Enter")
    await expect(answers(page).locator(".prose")).to_have_text(["B is a letter."])
    assert roles(gateway.requests[2]) == [("user", "What is B?")]
    versions = page.get_by_role("group", name="Versions of this question")
    await versions.get_by_role("button", name="Earlier version").click()
    await expect(answers(page)).to_have_count(2)
    await expect(answers(page).last).to_contain_text("More of A.")
    await page.reload()
    await expect(answers(page)).to_have_count(2)
    assert watched.problems == []


async def test_settings_are_sent_and_checked(context: BrowserContext, gateway: ScriptedGateway) -> None:
    watched = await open_chat(context, gateway)
    page = watched.page
    gateway.will(answer("Aye."), answer('{"year": 1}'))
    await settings(page)
    await expect(page.get_by_label("Min p")).to_have_count(0)  # this gateway does not take it
    await page.get_by_label("System prompt").fill("You are a pirate.")
    values = {"Temperature": "0.5", "Top p": "0.9", "Top k": "40", "Longest answer": "99", "Seed": "-7"}
    for name, value in {**values, "Presence penalty": "1.5"}.items():
        await page.get_by_label(name).fill(value)
    await page.get_by_label("Stop texts").fill("END\n\nSTOP")
    await ask(page, "Ahoy?")
    await expect(answers(page)).to_contain_text("Aye.")
    sent = gateway.requests[0]
    assert {name: sent[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "seed", "stop")} == {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "max_tokens": 99, "seed": -7, "stop": ["END", "STOP"],
    }  # fmt: skip
    assert (sent["presence_penalty"], "frequency_penalty" in sent) == (1.5, False)
    assert roles(sent)[0] == ("system", "You are a pirate.")
    await page.get_by_label("Temperature").fill("warm")
    await ask(page, "Still?")
    await expect(page.get_by_label("Temperature")).to_have_attribute("aria-invalid", "true")
    await expect(page.locator("#wrong-temperature")).to_have_text("Temperature is “warm”: give a number.")
    await page.get_by_label("Temperature").fill("3")
    await ask(page, "Still?")
    await expect(page.locator("#wrong-temperature")).to_have_text("Temperature is 3: give a number from 0 to 2.")
    assert len(gateway.requests) == 1
    await page.get_by_role("button", name="Use the gateway’s defaults").click()
    await page.get_by_label("Form of the answer").select_option("JSON of a schema")
    await page.get_by_label("JSON schema").fill("{")
    await ask(page, "Still?")
    await expect(page.locator("#wrong-schema")).to_contain_text("The JSON schema is not JSON")
    schema = {"type": "object", "properties": {"year": {"type": "integer"}}}
    await page.get_by_label("JSON schema").fill(json.dumps(schema))
    await ask(page, "Still?")
    await expect(answers(page).last.locator("pre code")).to_have_text('{"year": 1}')
    form = gateway.requests[1]["response_format"]
    assert (form["type"], form["json_schema"]["schema"]) == ("json_schema", schema)
    assert watched.problems == []


async def test_tool_call_is_a_card_whose_result_is_sent(context: BrowserContext, gateway: ScriptedGateway) -> None:
    watched = await open_chat(context, gateway)
    page = watched.page
    call: dict[str, Any] = {"index": 0, "id": "call-1", "function": {"name": f"weather{EVIL}", "arguments": '{"city"'}}
    more: dict[str, Any] = {"index": 0, "function": {"arguments": ': "Oslo"}'}}
    gateway.will(
        [
            delta(role="assistant", content=None),
            delta(tool_calls=[call]),
            delta(tool_calls=[more]),
            delta("tool_calls"),
        ],
        answer("It snows."),
    )
    await settings(page)
    await page.get_by_role("button", name="Example").last.click()
    await page.get_by_label("Calls of tools").select_option("At least one")
    await ask(page, "How is Oslo?")
    card = page.get_by_role("region", name="Tool call")
    await expect(card).to_contain_text(f"Calls weather{EVIL}")
    assert gateway.requests[0]["tools"][0]["function"]["name"] == "weather"
    assert gateway.requests[0]["tool_choice"] == "required"
    await expect(card.locator("pre")).to_have_text('{\n  "city": "Oslo"\n}')
    await card.get_by_label("Result").fill("snow")
    await card.get_by_role("button", name="Send the result").click()
    await expect(answers(page).last).to_contain_text("It snows.")
    asked, result = gateway.requests[1]["messages"][1:]
    assert asked["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'
    assert result == {"role": "tool", "tool_call_id": "call-1", "content": "snow"}
    assert watched.problems == []


async def test_reasoning_is_collapsed(context: BrowserContext, gateway: ScriptedGateway) -> None:
    watched = await open_chat(context, gateway)
    page = watched.page
    gateway.will([delta(reasoning_content="Two and two "), delta(reasoning_content="is four."), *answer("Four.")])
    await ask(page, "2 + 2?")
    await expect(answers(page).locator(".prose")).to_have_text("Four.")
    await expect(page.get_by_text("Two and two is four.")).to_be_hidden()
    await page.get_by_text("Thought for 5 words").click()
    await expect(page.get_by_text("Two and two is four.")).to_be_visible()
    assert watched.problems == []


async def test_failure_is_a_sentence_with_a_retry(context: BrowserContext, gateway: ScriptedGateway) -> None:
    page = (await open_chat(context, gateway)).page
    for script, sentence in FAILURES:
        gateway.will(script, answer("Here it is."))
        await page.get_by_role("link", name="New conversation", exact=True).click()
        await ask(page, "Something.")
        await expect(answers(page).get_by_role("alert")).to_contain_text(sentence)
        await page.get_by_role("button", name="Try again").click()
        await expect(answers(page)).to_contain_text("Here it is.")
        assert roles(gateway.requests[-1]) == [("user", "Something.")]
        versions = page.get_by_role("group", name="Versions of this answer")
        if isinstance(script, Refused):
            await expect(versions).to_be_hidden()
        else:
            await versions.get_by_role("button", name="Earlier version").click()  # what came is kept
            await expect(answers(page)).to_contain_text("Half")


async def test_reload_in_mid_answer_keeps_what_came(context: BrowserContext, gateway: ScriptedGateway) -> None:
    watched = await open_chat(context, gateway)
    page = watched.page
    gateway.will(answer("one two three four five six seven eight nine", pause=asyncio.Event()))
    await ask(page, "Count.")
    await expect(answers(page)).to_contain_text("one two three four five")
    await page.reload()
    await expect(answers(page)).to_contain_text("one two three four five")
    await expect(answers(page).get_by_role("alert")).to_contain_text("closed or reloaded in the middle of the answer")
    await expect(answers(page).locator(".trip")).to_have_count(2)
    # What came can be continued.
    gateway.will([delta(content=" six", note={"traversal": 1, "tokens": 1}), delta("stop")])
    await page.get_by_role("button", name="Continue the answer").click()
    await expect(answers(page)).to_contain_text("one two three four five six")
    sent = gateway.requests[-1]
    assert roles(sent) == [("user", "Count."), ("assistant", "one two three four five")]
    assert (sent["continue_final_message"], sent["add_generation_prompt"]) == (True, False)
    assert [problem for problem in watched.problems if not problem.startswith("failed: ")] == []


async def test_hostile_text_stays_text(context: BrowserContext, gateway: ScriptedGateway) -> None:
    watched = await open_chat(context, gateway)
    page = watched.page
    gateway.about["model"] = EVIL
    gateway.will(answer(f"{EVIL} [a](javascript:alert(1)) `{EVIL}`\n\n```{EVIL}\n{EVIL}\n```\n\n| {EVIL} |\n|-|"))
    await page.reload()
    await expect(page.locator("#name")).to_have_text(EVIL)
    await ask(page, EVIL)
    await expect(answers(page)).to_contain_text(f"{EVIL} [a](javascript:alert(1))")
    await expect(questions(page).locator(".said")).to_have_text(EVIL)
    await page.get_by_role("button", name="Rename the conversation").click()
    await page.get_by_label("Title").fill(f"My {EVIL}")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("link", name=f"My {EVIL}")).to_be_visible()
    await expect(page.get_by_role("heading", name=f"My {EVIL}")).to_be_visible()
    assert await page.locator("main img, nav img, aside img, [onerror], [href^=javascript]").count() == 0
    watched.problems = [problem for problem in watched.problems if not problem.startswith("failed: ")]  # the reload
    # Even the page's own code could not make markup of a text.
    refused = await page.evaluate(
        "() => { try { document.body.innerHTML = '<b>'; } catch (error) { return error.name; } }"
    )
    assert refused == "TypeError"
    watched.problems = [problem for problem in watched.problems if "TrustedHTML" not in problem]
    assert watched.problems == []


async def test_conversation_deleted_in_mid_answer_stays_deleted(
    context: BrowserContext, gateway: ScriptedGateway
) -> None:
    watched = await open_chat(context, gateway)
    page = watched.page
    pause = asyncio.Event()
    gateway.will(answer("one two three four five six seven eight nine", pause=pause))
    await ask(page, "Count.")
    await expect(answers(page)).to_contain_text("one two three four five")
    await page.get_by_role("button", name="Delete the conversation").click()
    await page.get_by_role("button", name="Delete", exact=True).click()
    await expect(answers(page)).to_have_count(0)
    pause.set()
    async with asyncio.timeout(20):
        while not gateway.left:
            await asyncio.sleep(0.02)
    await page.goto(f"{gateway.url}/#%")  # an address that names nothing is a new conversation
    await page.reload()
    await expect(page.locator("#link")).to_have_text("ready")
    await expect(page.get_by_role("link", name="Count.")).to_have_count(0)
    assert [problem for problem in watched.problems if not problem.startswith("failed: ")] == []


async def test_conversations_are_renamed_exported_and_deleted(
    context: BrowserContext, gateway: ScriptedGateway, tmp_path: Path
) -> None:
    watched = await open_chat(context, gateway)
    page = watched.page
    gateway.will(answer("One."), answer("Two."))
    await ask(page, "First question")
    await expect(answers(page)).to_contain_text("One.")
    await page.get_by_role("link", name="New conversation", exact=True).click()
    await expect(answers(page)).to_have_count(0)
    await ask(page, "Second question")
    await expect(answers(page)).to_contain_text("Two.")
    for name in ("Export as Markdown", "Export as JSON"):
        async with page.expect_download() as started:
            await page.get_by_role("button", name=name).click()
        await (await started.value).save_as(tmp_path / name)
    assert (tmp_path / "Export as Markdown").read_text() == (
        "# Second question\n\n## Question\n\nSecond question\n\n## Answer\n\nTwo.\n"
    )
    exported = json.loads((tmp_path / "Export as JSON").read_text())
    assert [message["content"] for message in exported["messages"]] == ["Second question", "Two."]
    conversations = page.get_by_role("navigation", name="Conversations").get_by_role("listitem").get_by_role("link")
    assert await conversations.all_inner_texts() == ["Second question", "First question"]
    await page.get_by_role("button", name="Delete the conversation").click()
    await page.get_by_role("button", name="Keep it").click()
    await expect(conversations).to_have_count(2)
    await page.get_by_role("button", name="Delete the conversation").click()
    await page.get_by_role("button", name="Delete", exact=True).click()
    await expect(conversations).to_have_text(["First question"])
    await conversations.click()
    await expect(answers(page)).to_contain_text("One.")
    # A tab beside this one sees the same conversations.
    other = await context.new_page()
    await other.goto(gateway.url)
    await expect(other.get_by_role("link", name="First question")).to_be_visible()
    assert watched.problems == []

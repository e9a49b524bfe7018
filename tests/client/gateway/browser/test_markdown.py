"""The Markdown of answers, as the page's own code draws it in a real browser."""

import json
import random
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import Page
from tests.support.browser import launch_browser, open_page
from tests.support.scripted_gateway import scripted_gateway

pytestmark = pytest.mark.asyncio(loop_scope="module")
EVIL = "<img src=x onerror=alert(1)>"
DRAW = """async (texts) => {
    const { drawMarkdown, Trips } = await import("/pages/chat/markdown/draw.js");
    const plain = (node) => node.nodeType === Node.TEXT_NODE ? node.data
        : `<${node.localName}${node.getAttribute("href") ? ` ${node.getAttribute("href")}` : ""}>`
          + [...node.childNodes].map(plain).join("") + `</${node.localName}>`;
    return texts.map((text) => {
        const home = document.createElement("div");
        drawMarkdown(home, text, new Trips());
        for (const extra of home.querySelectorAll("figcaption")) extra.remove();
        return [...home.childNodes].map(plain).join("");
    });
}"""
EXAMPLES = {
    "# One *two* ##\ntext": "<h3>One <em>two</em></h3><p>text</p>",
    "a **b *c* d** __e__ f_g_h": "<p>a <strong>b <em>c</em> d</strong> <strong>e</strong> f_g_h</p>",
    "`a*b*` ``c`d`` \\*no\\* ~~e~~ 2 * 3 * 4": (
        "<p><code>a*b*</code> <code>c`d</code> *no* <del>e</del> 2 * 3 * 4</p>"
    ),
    "- a\n- b\n  - c\n1. d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol><li>d</li></ol>",
    "1. a\n  - b\n2. c": "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>",
    "- a\n\n- b": "<ul><li><p>a</p></li><li><p>b</p></li></ul>",
    "```py\nx = 1\n\n  y\n```\nz": "<figure><pre><code>x = 1\n\n  y</code></pre></figure><p>z</p>",
    "```\nnot closed": "<figure><pre><code>not closed</code></pre></figure>",
    "- ```\n  x\n  ```\n- y": "<ul><li><figure><pre><code>x</code></pre></figure></li><li>y</li></ul>",
    "> a\nb\n> - c": "<blockquote><p>a\nb</p><ul><li>c</li></ul></blockquote>",
    "a|b\n-|-\n1|`x\\|y`": (
        "<div><table><thead><tr><th>a</th><th>b</th></tr></thead>"
        "<tbody><tr><td>1</td><td><code>x\\|y</code></td></tr></tbody></table></div>"
    ),
    "[a](https://b.c/d_(e)) <https://f.g> (https://h.i/j).": (
        '<p><a https://b.c/d_(e)>a</a> <a https://f.g/>https://f.g</a> (<a https://h.i/j>https://h.i/j</a>).</p>'
    ),
    "![a picture](https://b.c/d.png)": "<p><a https://b.c/d.png>a picture</a></p>",
    "[a](javascript:alert(1)) [b](data:text/html,x) [c](/docs)": (
        "<p>[a](javascript:alert(1)) [b](data:text/html,x) [c](/docs)</p>"
    ),
    f"{EVIL} &lt;b&gt; &#65; &nope;": f"<p>{EVIL} <b> A &nope;</p>",
    "a  \nb\\\nc\nd": "<p>a<br></br>b<br></br>c\nd</p>",
    "a\n***\nb\n===": "<p>a</p><hr></hr><h3>b</h3>",
    "*": "<ul><li></li></ul>",
    "": "",
}  # fmt: skip
# Texts that are slow in parsers which try again and again, or which call themselves.
TRAPS = [
    "*a " * 6000, "**a *b " * 3000, "> " * 4000 + "x", "[" * 20_000, "[a](" * 8000, "`a``b```c````" * 3000,
    "- " * 3000, "|a" * 8000 + "\n" + "|-" * 8000, "<" * 30_000, "a|b\n" * 4000, "~~a" * 8000, "&#" * 20_000,
    "http://" * 4000, "_a__b" * 6000, "1. " * 4000, "\\" * 20_000,
]  # fmt: skip
WORDS = [
    "a", "b ", "*", "**", "_", "`", "``", "```", "\n", "\n\n", "- ", "1. ", "> ", "# ", "|", "|-", "---", "[", "](",
    ")", "https://x.y", "\\", "  ", "    ", "\t", "<b>", "&amp;", "~~", "!", "é", "🌳",
]  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def page() -> AsyncIterator[Page]:
    async with launch_browser() as browser, scripted_gateway() as gateway:
        context = await browser.new_context()
        watched = await open_page(context, gateway.url, "/")
        yield watched.page
        await context.close()
        assert watched.problems == []


async def test_examples_are_drawn_as_expected(page: Page) -> None:
    drawn = await page.evaluate(DRAW, list(EXAMPLES))
    assert dict(zip(EXAMPLES, drawn, strict=True)) == EXAMPLES


async def test_no_text_takes_long(page: Page) -> None:
    """Each takes 2 to 288 ms; a parser that tries again and again takes minutes, on any machine."""
    milliseconds = await page.evaluate(
        f"async (texts) => {{ const draw = {DRAW}; const times = [];"
        "for (const text of texts) { const start = performance.now(); await draw([text]);"
        "times.push(performance.now() - start); } return times; }",
        TRAPS,
    )
    slow = [trap[:12] for trap, ms in zip(TRAPS, milliseconds, strict=True) if ms > 20_000]
    assert slow == []


async def test_every_piece_keeps_the_traversal_that_brought_it(page: Page) -> None:
    """Each character of a text belongs to a traversal of its own; what is drawn of it says which."""
    choose = random.Random(16)
    texts = ["".join(choose.choices(WORDS, k=30)) for _ in range(300)]
    wrong = await page.evaluate(
        """async (texts) => {
            const { drawMarkdown, Trips } = await import("/pages/chat/markdown/draw.js");
            const named = { "&amp;": "&" };
            return texts.filter((text) => {
                const home = document.createElement("div");
                drawMarkdown(home, text, new Trips([...text].map((_, i) => [i + 1, i]).slice(0, text.length)));
                return [...home.querySelectorAll(".trip")].some((piece) => {
                    const at = Number(piece.dataset.trip);
                    const expected = text.startsWith("&amp;", at) ? "&" : text[at];
                    const shown = piece.textContent[0];
                    return shown !== expected && (shown.trim() || expected.trim()); // spaces and line ends
                });
            });
        }""",
        [text.replace("🌳", "t") for text in texts],
    )
    assert wrong == []


async def test_growing_text_is_drawn_as_the_whole_one(page: Page) -> None:
    """Blocks keep their elements while an answer grows; in the end nothing is left of how the text looked before."""
    choose = random.Random(17)
    texts = ["".join(choose.choices(WORDS, k=40)) for _ in range(60)]
    wrong = await page.evaluate(
        """async (texts) => {
            const { drawMarkdown, Trips } = await import("/pages/chat/markdown/draw.js");
            return texts.filter((text) => {
                const growing = document.createElement("div");
                for (let end = 0; end < text.length; end += 3) drawMarkdown(growing, text.slice(0, end), new Trips());
                drawMarkdown(growing, text, new Trips());
                const whole = document.createElement("div");
                drawMarkdown(whole, text, new Trips());
                return !growing.isEqualNode(whole);
            });
        }""",
        texts,
    )
    assert wrong == [], json.dumps(wrong[:3])

"""Spans of blocks, and the gaps between them."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treeswarm.errors import BadRequest, MissingBlocks
from treeswarm.protocol.spans import Span, missing_blocks

ROOT = Path(__file__).parents[3]
# Folders and files that visitors read or run.
WRITTEN = ("README.md", "ARCHITECTURE.md", "docs", "deploy", "swarm", "node", "client", "bench")
SUFFIXES = {".md", ".py", ".js", ".html", ".toml", ".yaml"}
# `0..2`, `0…2`, "blocks 0-2", "blocks 0 to 2", and a span put together elsewhere than in `Span`.
OTHER_FORMS = re.compile(
    r"(?<![\w.])\d+(?:\.\.|…)\d"
    r"|\}\.\.\$?\{"
    r"|\b(?:blocks?|layers?) `?(?:\d+|\{[^}\n]*\})`? ?(?:-|–|to|through|up to) ?[\d`{]"
    r"|(?<![\w.])0:\{|\{[\w.]*start\}:\{[\w.]*end\}",
    re.IGNORECASE,
)
FORMATTER = "swarm/treeswarm/protocol/spans.py"


@st.composite
def spans(draw: st.DrawFn) -> Span:
    start = draw(st.integers(0, 11))
    return Span(start, draw(st.integers(start + 1, 12)))


@given(served=st.lists(spans(), max_size=8))
def test_gaps_are_the_blocks_in_no_span(served: list[Span]) -> None:
    covered = {block for span in served for block in range(span.start, span.end)}
    gaps = {block for gap in missing_blocks(served, 12) for block in range(gap.start, gap.end)}
    assert gaps == set(range(12)) - covered


def test_the_error_names_missing_blocks_and_a_command() -> None:
    gaps = missing_blocks([Span(0, 3), Span(6, 8)], 9)
    assert re.search(r"blocks 3:6, 8:9 of 9.*--blocks 3:6", str(MissingBlocks.of(gaps, 9)))
    assert str(MissingBlocks.of([Span(3, 4)])).startswith("no node serves block 3:4: start")
    assert MissingBlocks.phrase(gaps, most=1) == "no node serves blocks 3:6 and 1 more gap"


@pytest.mark.parametrize("text", ["", "4", "4:", ":4", "4:4", "5:4", "-1:4", "a:b", "1:2:3", "0x1:4"])
def test_text_that_is_not_a_span_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        Span.parse(text)


def test_a_span_is_parsed_as_it_is_printed() -> None:
    assert Span.parse("4:8") == Span(4, 8)
    assert str(Span(4, 8)) == "4:8"


@pytest.mark.parametrize("text", ["blocks 0..2", "5…7", "blocks 0-2", "layers 3 to 4", "blocks 0 to `blocks`", "0:{n}"])
def test_the_search_finds_other_forms_of_a_span(text: str) -> None:
    assert OTHER_FORMS.search(text)
    assert not OTHER_FORMS.search("blocks 0:3 and 3:5 of 8, pages 1-2, '../0'")


def test_blocks_are_written_alike_everywhere() -> None:
    """A span is START:END in documentation, messages and pages, as `Span` prints it."""
    files = [file for name in WRITTEN for file in ([ROOT / name] if "." in name else (ROOT / name).rglob("*"))]
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in files
        if file.suffix in SUFFIXES and str(file.relative_to(ROOT)) != FORMATTER
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1)
        if OTHER_FORMS.search(line)
    ]
    assert not found, "\n".join(["spans that are not written START:END:", *found])

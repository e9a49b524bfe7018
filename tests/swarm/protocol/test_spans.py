"""Spans of blocks, and the gaps between them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treeswarm.errors import BadRequest, MissingBlocks
from treeswarm.protocol.spans import Span, missing_blocks


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

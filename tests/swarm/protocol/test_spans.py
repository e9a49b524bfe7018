"""Spans, gaps and the shortest chain."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treeswarm.errors import BadRequest, MissingBlocks
from treeswarm.protocol.spans import Span, missing_blocks, shortest_chain


@st.composite
def spans(draw: st.DrawFn) -> Span:
    start = draw(st.integers(0, 11))
    return Span(start, draw(st.integers(start + 1, 12)))


@given(served=st.lists(spans(), max_size=8))
def test_a_chain_computes_every_block_once_in_order_with_the_fewest_hops(served: list[Span]) -> None:
    covered = {block for span in served for block in range(span.start, span.end)}
    gaps = {block for gap in missing_blocks(served, 12) for block in range(gap.start, gap.end)}
    assert gaps == set(range(12)) - covered
    if gaps:
        with pytest.raises(MissingBlocks):
            shortest_chain(served, 12)
        return
    chain = shortest_chain(served, 12)
    assert [block for _, part in chain for block in range(part.start, part.end)] == list(range(12))
    assert all(part in served[index] for index, part in chain)
    assert len(chain) == fewest(served)


def fewest(served: list[Span]) -> int:
    """By exhaustive reach, block by block."""
    reached, hops = {0}, 0
    while 12 not in reached:
        reached |= {
            block
            for span in served
            if any(span.start <= r < span.end for r in reached)
            for block in range(span.end + 1)
            if block > span.start
        }
        hops += 1
    return hops


def test_missing_blocks_are_named() -> None:
    with pytest.raises(MissingBlocks, match=r"blocks 3:6, 8:9 of 9.*--blocks 3:6"):
        shortest_chain([Span(0, 3), Span(6, 8)], 9)


@pytest.mark.parametrize("text", ["", "4", "4:", ":4", "4:4", "5:4", "-1:4", "a:b", "1:2:3", "0x1:4"])
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        Span.parse(text)


def test_a_span_reads_as_it_prints() -> None:
    assert Span.parse("4:8") == Span(4, 8)
    assert str(Span(4, 8)) == "4:8"

"""Nodes that hold fewer blocks at the ends of the model choose, move and heal within what fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treeswarm.protocol.spans import Span
from treeswarm.topology.placement import choose_again, choose_span, fit_move
from treeswarm.topology.span_limits import SpanLimits
from treeswarm.topology.tables import Placed

lengths = st.integers(0, 12)
limits_of_nodes = st.builds(SpanLimits, st.integers(1, 12), lengths, lengths, st.just(False))


def placed(node: str, start: int, end: int, state: str = "online") -> Placed:
    return Placed(node, Span(start, end), 100.0, state)  # type: ignore[arg-type]


@given(limits_of_nodes, st.integers(3, 40), st.lists(st.tuples(st.integers(0, 39), st.integers(1, 12)), max_size=8))
def test_a_chosen_span_fits(limits: SpanLimits, blocks: int, others: list[tuple[int, int]]) -> None:
    spans = [Span(start, min(start + length, blocks)) for start, length in others if start < blocks]
    swarm = [Placed(f"n{i}", span, 100.0, "online") for i, span in enumerate(spans)]
    assert limits.allow(choose_span(swarm, blocks, limits, "me"), blocks)
    joining = [*swarm, placed("a", 0, 2, "joining"), placed("me", 1, 2, "joining")]
    assert limits.allow(choose_again(joining[-1], joining, blocks, limits), blocks)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(2, 40))
def test_similar_nodes_host_the_whole_model_without_gaps(middle: int, head: int, tail: int, blocks: int) -> None:
    limits = SpanLimits(max(middle, head, tail), head, tail, whole=False)
    swarm: list[Placed] = []
    hosted: set[int] = set()
    while len(hosted) < blocks:
        span = choose_span(swarm, blocks, limits, f"n{len(swarm)}")
        assert not hosted.issuperset(range(span.start, span.end)), "every node takes some block that has none"
        swarm.append(Placed(f"n{len(swarm)}", span, 100.0, "online"))
        hosted.update(range(span.start, span.end))
    between = blocks - min(head, blocks - 1) - min(tail, blocks - 1)
    fewest = 2 + max(0, -(-between // limits.middle))
    assert len(swarm) == fewest if between % limits.middle == 0 else fewest <= len(swarm) <= 2 * fewest


def test_a_node_takes_an_end_that_has_no_node_first() -> None:
    limits = SpanLimits(4, 2, 3, whole=False)
    assert choose_span([placed("a", 0, 2)], 20, limits, "me") == Span(17, 20)
    assert choose_span([placed("a", 16, 20)], 20, limits, "me") == Span(0, 2)
    both = [placed("a", 0, 2), placed("b", 17, 20)]
    assert choose_span(both, 20, limits, "me") in {Span(s, s + 4) for s in (2, 6, 10, 1, 5, 9, 13)}


def test_a_node_without_room_for_the_ends_stays_in_the_middle() -> None:
    limits = SpanLimits(3, 0, 0, whole=False)
    chosen = {choose_span([placed("a", 1, 7)], 8, limits, f"n{i}") for i in range(30)}
    assert chosen <= {Span(start, start + 3) for start in range(1, 5)}


def test_a_node_with_room_for_the_whole_model_takes_it() -> None:
    assert choose_span([placed("a", 0, 4)], 8, SpanLimits(7, 7, 7, whole=True), "me") == Span(0, 8)
    limits = SpanLimits.same(9, 8)
    assert (limits.whole, choose_span([], 8, limits, "me")) == (True, Span(0, 8))


@pytest.mark.parametrize("length", [1, 3, 7, 8])
def test_same_limits_choose_as_a_length_does(length: int) -> None:
    swarm = [placed("a", 0, 3), placed("b", 2, 5)]
    for node in ("x", "y", "z"):
        by_limits = choose_span(swarm, 8, SpanLimits.same(length, 8), node)
        assert by_limits == choose_span(swarm, 8, length, node)


@pytest.mark.parametrize(
    ("target", "swarm", "fitted"),
    [
        (Span(4, 8), [placed("a", 0, 20)], Span(4, 8)),
        (Span(0, 4), [placed("a", 2, 20)], Span(0, 2)),
        (Span(0, 4), [placed("a", 0, 3), placed("b", 4, 20)], Span(1, 4)),
        (Span(16, 20), [placed("a", 0, 19)], Span(19, 20)),
        (Span(16, 20), [placed("a", 0, 17), placed("b", 19, 20)], Span(16, 19)),
    ],
    ids=["fits", "head", "behind the head", "tail", "before the tail"],
)
def test_a_move_takes_the_part_that_fits_and_helps(target: Span, swarm: list[Placed], fitted: Span) -> None:
    assert fit_move(target, SpanLimits(4, 2, 1, whole=False), swarm, 20) == fitted


def test_a_move_takes_the_next_part_that_begins_and_ends_at_cuts() -> None:
    cuts = [*range(5), 8, *range(10, 21)]  # blocks 4 to 7, and 8 and 9, cannot be divided
    limits = SpanLimits.same(4, 20)
    hole = [placed("a", 0, 3), placed("b", 9, 20)]
    assert fit_move(Span(3, 9), limits, hole, 20) in {Span(3, 7), Span(4, 8), Span(5, 9)}
    assert fit_move(Span(3, 9), limits, hole, 20, cuts) == Span(4, 8)
    assert fit_move(Span(3, 7), limits, hole, 20, cuts) == Span(3, 4), "the part that can be cut off"
    assert fit_move(Span(5, 8), limits, hole, 20, cuts) is None


def test_a_move_that_would_fill_no_hole_is_not_made() -> None:
    hole_at_the_head = [placed("a", 1, 20)]
    assert fit_move(Span(0, 4), SpanLimits(4, 0, 1, whole=False), hole_at_the_head, 20) is None
    assert fit_move(Span(0, 1), SpanLimits(4, 0, 1, whole=False), hole_at_the_head, 20) is None
    assert fit_move(Span(0, 4), SpanLimits(4, 0, 1, whole=False), [placed("a", 0, 20)], 20) == Span(1, 4)

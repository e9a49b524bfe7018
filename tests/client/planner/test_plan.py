"""The choice of a size: no fixed size beats it under its costs, and each cost moves it the right way."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from treeswarm.protocol.messages import HopTiming
from treeswarm_client.planner.costs import (
    Costs,
    HopEstimate,
    LineFit,
    LinkEstimate,
    slowest_stage_s,
    take_apart,
    traversal_s,
)
from treeswarm_client.planner.plan import (
    cheap_size,
    extension_size,
    longest_draft_wait_s,
    plan_following,
    plan_round,
)

chance_lists = st.lists(st.floats(0, 1), max_size=60).map(lambda chances: np.sort(np.array(chances, np.float64))[::-1])
seconds = st.floats(1e-4, 0.5)


def link(latency_s: float, seconds_per_byte: float) -> LinkEstimate:
    return LinkEstimate(LineFit(seconds_per_byte, latency_s, seconds_per_byte))


@st.composite
def hop_estimates(draw: st.DrawFn) -> HopEstimate:
    start, steps = draw(seconds), draw(st.lists(st.floats(0, 0.1), min_size=3, max_size=3))
    table = np.cumsum([start, *steps])
    return replace(
        HopEstimate.begin(tuple(zip((1, 8, 32, 128), (max(1, int(1e6 * s)) for s in table), strict=True))),
        sessions=draw(st.floats(1, 8)),
        queue_s=draw(st.floats(0, 0.1)),
    )


costs_of = st.builds(
    Costs,
    link=st.builds(link, seconds, st.floats(0, 1e-6)),
    hops=st.lists(hop_estimates(), min_size=1, max_size=4).map(tuple),
    row_bytes=st.integers(1, 16384),
    inner_links=st.integers(0, 3),
    segment_rows=st.sampled_from([8, 32, 4096]),
)


def one_segment(costs: Costs) -> Costs:
    return replace(costs, segment_rows=4096)


@given(chances=chance_lists, costs=costs_of, draft_s=st.floats(0, 0.5))
def test_no_fixed_size_does_better(chances: NDArray[np.float64], costs: Costs, draft_s: float) -> None:
    plan = plan_round(chances, costs, exposed_draft_s=draft_s)
    for size in range(len(chances) + 1):
        seconds = float(traversal_s(costs, 1.0 + size)) + draft_s
        assert (1 + chances[:size].sum()) / seconds <= plan.rate * (1 + 1e-9)


@given(costs=costs_of)
def test_more_rows_never_take_less_time(costs: Costs) -> None:
    for priced in (True, False):
        assert (np.diff(traversal_s(costs, np.arange(1.0, 100), priced=priced)) >= -1e-12).all()
        assert (np.diff(slowest_stage_s(costs, np.arange(1.0, 100), priced=priced)) >= -1e-12).all()


@given(chances=chance_lists, costs=costs_of, times=st.floats(1.0, 10))
def test_dearer_rows_never_make_a_larger_tree(chances: NDArray[np.float64], costs: Costs, times: float) -> None:
    costs = one_segment(costs)
    dearer = replace(costs, hops=tuple(replace(h, sessions=h.sessions * times) for h in costs.hops))
    dearer = replace(dearer, link=link(costs.link.latency_s, costs.link.seconds_per_byte * times))
    # The link's share of the one row that is always there does not count as dearer.
    fixed = float(traversal_s(dearer, 1.0) - traversal_s(costs, 1.0))
    dearer = replace(dearer, link=link(max(0.0, costs.link.latency_s - fixed), dearer.link.seconds_per_byte))
    if costs.link.latency_s >= fixed:
        assert plan_round(chances, dearer).size <= plan_round(chances, costs).size


@given(chances=chance_lists, costs=costs_of, more=st.floats(0, 10))
def test_more_sessions_never_make_a_larger_tree(chances: NDArray[np.float64], costs: Costs, more: float) -> None:
    costs = one_segment(costs)
    first = costs.hops[0]
    alike = replace(costs, hops=(first,), link=link(costs.link.latency_s, 0.0))
    busier = replace(alike, hops=(replace(first, sessions=first.sessions + more),))
    assert plan_round(chances, busier).size <= plan_round(chances, alike).size


@given(chances=chance_lists, costs=costs_of, more=st.floats(0, 10))
def test_farther_nodes_never_make_a_smaller_tree(chances: NDArray[np.float64], costs: Costs, more: float) -> None:
    farther = replace(costs, link=link(costs.link.latency_s + more, costs.link.seconds_per_byte))
    assert plan_round(chances, farther).size >= plan_round(chances, costs).size


@given(costs=costs_of, count=st.integers(0, 50))
def test_nodes_without_any_chance_are_not_shipped(costs: Costs, count: int) -> None:
    assert plan_round(np.zeros(count), costs).size == 0
    assert extension_size(np.zeros(count), np.zeros(count), costs, 1.0) == 0


@given(chances=chance_lists, costs=costs_of, rate=st.floats(0.1, 1000), seed=st.integers(0, 99))
def test_an_extension_brings_more_than_its_time(
    chances: NDArray[np.float64], costs: Costs, rate: float, seed: int
) -> None:
    later_s = np.random.default_rng(seed).random(len(chances))
    count = extension_size(chances, later_s, costs, rate)
    late_s = (chances[:count] * later_s[:count]).sum()
    if count:
        assert chances[:count].sum() > rate * (float(slowest_stage_s(costs, float(count))) + late_s)


@given(chances=chance_lists, costs=costs_of, lag_s=st.floats(0, 1), more=st.floats(0, 1))
def test_a_later_extension_is_not_larger(chances: NDArray[np.float64], costs: Costs, lag_s: float, more: float) -> None:
    soon, late = (extension_size(chances, np.full(len(chances), s), costs, 5.0) for s in (lag_s, lag_s + more))
    assert late <= soon


@given(chances=chance_lists, costs=costs_of, draft_s=st.floats(0, 0.5), entered=st.floats(0, 1))
def test_following_never_plans_less_than_plain_and_needs_no_certain_text(
    chances: NDArray[np.float64], costs: Costs, draft_s: float, entered: float
) -> None:
    by_size = np.where(np.arange(len(chances) + 1) > 0, draft_s, 0.0)
    plan = plan_following(chances, costs, draft_s=by_size, entered=entered)
    assert plan.rate >= 1 / costs.plain_s * (1 - 1e-9)
    seldom = plan_following(chances, costs, draft_s=by_size, entered=entered / 2)
    assert seldom.rate >= plan.rate * (1 - 1e-9)
    certain = plan_following(chances, costs, draft_s=by_size, entered=1.0)
    waiting = plan_round(chances, costs, exposed_draft_s=by_size)
    assert certain.rate <= waiting.rate * (1 + 1e-9)


@given(costs=costs_of)
def test_a_draft_is_waited_for_less_than_a_plain_round(costs: Costs) -> None:
    plain_s = float(traversal_s(costs, 1.0, priced=False))
    assert 0 < longest_draft_wait_s(costs) < plain_s


@given(costs=costs_of, share=st.floats(0, 0.5))
def test_a_cheap_size_lengthens_a_round_by_at_most_its_share(costs: Costs, share: float) -> None:
    size = cheap_size(costs, share, 64)
    assert 1 <= size <= 64
    if size > 1:
        assert traversal_s(costs, 1.0 + size) <= traversal_s(costs, 1.0) * (1 + share) + 1e-9


def test_a_traversal_is_taken_apart_along_its_longest_way() -> None:
    hop = HopEstimate.begin(((1, 1000), (100, 2000)))
    costs = Costs(link(0.01, 1e-8), (hop, hop), row_bytes=1000, inner_links=1, segment_rows=50)
    first = (HopTiming(100, 1000, 50, 1), HopTiming(200, 2000, 50, 1))
    later = (HopTiming(0, 1500, 10, 1), HopTiming(900, 2500, 10, 1))
    alone = take_apart(costs, [50], 0.02, [first])
    assert (round(alone.queue_s, 6), round(alone.compute_s, 6), round(alone.wire_s, 6)) == (0.0003, 0.003, 0.0167)
    both = take_apart(costs, [50, 10], 0.02, [first, later])
    assert round(both.compute_s, 6) == 0.0055  # of the second append only the slower node
    assert both.byte_count == alone.byte_count
    slow_link = replace(costs, link=link(0.01, 1e-6))
    assert take_apart(slow_link, [50, 10], 0.02, [first, later]).byte_count == alone.byte_count + 10 * 1000

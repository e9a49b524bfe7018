"""What the estimates learn from observations alone, with late packets and shared forwards."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treeswarm.protocol.messages import HopTiming
from treeswarm_client.drafters.seam import NO_TREE, DraftTree
from treeswarm_client.planner.acceptance import LEAST_FIT, MOST_FIT, AcceptanceEstimate
from treeswarm_client.planner.costs import (
    FIRST_TIMES,
    PRIOR_LATENCY_S,
    Curve,
    HopEstimate,
    LinkEstimate,
    sum_curves,
)
from treeswarm_client.planner.draft_levels import PRIOR_LEVEL_S, DraftLevels
from treeswarm_client.planner.loss_budget import START, Exploration, LossBudget

PROFILE = ((1, 4000), (16, 5000), (64, 9000), (256, 26000))
CHAIN = DraftTree(np.array([-1, 0, 1]), np.arange(3), np.log(np.array([0.8, 0.64, 0.512], np.float32)))


def link_after_rounds(latency_s: float, seconds_per_byte: float, rounds: int = 40) -> LinkEstimate:
    rng = np.random.default_rng(1)
    link = LinkEstimate()
    for _ in range(rounds):
        byte_count = float(rng.choice([1e3, 1e5, 4e5]))
        late_s = 1.0 if rng.random() < 0.1 else 0.0
        link = link.updated(byte_count, (latency_s + byte_count * seconds_per_byte) * rng.uniform(0.97, 1.03) + late_s)
    return link


@pytest.mark.parametrize("latency_s", [0.004, 0.1])
@pytest.mark.parametrize("seconds_per_byte", [8e-9, 4e-7])
def test_latency_and_rate_are_found_although_packets_come_late(latency_s: float, seconds_per_byte: float) -> None:
    link = link_after_rounds(latency_s, seconds_per_byte)
    assert link.latency_s == pytest.approx(latency_s, rel=0.2)
    assert float(link.seconds(2e5)) == pytest.approx(latency_s + 2e5 * seconds_per_byte, rel=0.2)


def test_one_late_packet_does_not_move_the_latency() -> None:
    link = link_after_rounds(0.05, 8e-8)
    assert link.updated(1e3, 3.0).latency_s == pytest.approx(link.latency_s, rel=0.05)


def test_an_estimate_follows_a_link_that_has_changed() -> None:
    link = link_after_rounds(0.02, 8e-8)
    for _ in range(12):
        link = link.updated(1e3, 0.2)
    assert link.latency_s == pytest.approx(0.2, rel=0.05)


def test_a_slow_prompt_moves_the_latency_by_a_bounded_factor() -> None:
    link = LinkEstimate().updated(5e4, 8.0)
    assert link.latency_s <= FIRST_TIMES * PRIOR_LATENCY_S
    assert link.updated(3e3, 0.11).latency_s == pytest.approx(0.11, rel=0.05)


def test_a_link_that_jumps_is_followed_in_four_rounds_there_and_back() -> None:
    link = link_after_rounds(0.1, 8e-9)
    for latency_s in (0.6, 0.1):
        for round_number in range(4):
            link = link.updated(3e3 + 1e4 * round_number, latency_s)
        assert float(link.seconds(3e3)) == pytest.approx(latency_s, rel=0.1)


def test_another_chain_begins_with_the_latency_of_the_last_one() -> None:
    link = link_after_rounds(0.4, 8e-8)
    assumed = link.assumed_elsewhere()
    assert assumed.latency_s == link.latency_s
    assert assumed.updated(3e3, 0.1).latency_s == pytest.approx(0.1, rel=0.05)


@given(st.lists(st.tuples(st.floats(0, 1e7), st.floats(0, 100)), max_size=80))
def test_a_link_estimate_is_never_negative(measurements: list[tuple[float, float]]) -> None:
    link = LinkEstimate()
    for byte_count, seconds in measurements:
        link = link.updated(byte_count, seconds)
        assert link.seconds_per_byte >= 0
        assert link.latency_s >= 0


def test_a_profile_holds_until_timings_contradict_it() -> None:
    hop = HopEstimate.begin(PROFILE)
    assert float(hop.duration.at(64)) == pytest.approx(0.009)
    assert float(hop.duration.at(1000)) > float(hop.duration.at(256))
    for _ in range(60):
        hop = hop.updated(HopTiming(0, 18000, 64, 1))
    assert float(hop.duration.at(64)) == pytest.approx(0.018, rel=0.05)
    assert float(hop.duration.at(1)) > 0.0045  # slow for one size is slow for the others too, if less surely


def test_a_node_without_profile_is_known_by_its_first_timing() -> None:
    hop = HopEstimate.begin().updated(HopTiming(0, 40_000, 64, 1))
    assert float(hop.duration.at(64)) == pytest.approx(0.04, rel=0.01)


def hop_after(compute_us: int, rounds: int, hop: HopEstimate | None = None, rows: int = 1) -> HopEstimate:
    hop = hop or HopEstimate.begin(PROFILE)
    for _ in range(rounds):
        hop = hop.updated(HopTiming(0, compute_us, rows, 1))
    return hop


def test_a_minority_of_slow_forwards_changes_a_node_little() -> None:
    assert float(hop_after(200_000, 1).duration.at(1)) == pytest.approx(0.004, rel=0.06)
    stalled = hop_after(200_000, 3, hop_after(4_000, 8))
    assert float(stalled.duration.at(1)) == pytest.approx(0.004, rel=0.2)


def test_a_node_that_becomes_five_times_slower_is_followed_in_five_rounds() -> None:
    slow = hop_after(20_000, 5, hop_after(4_000, 20))
    assert float(slow.duration.at(1)) == pytest.approx(0.02, rel=0.35)
    assert float(slow.duration.at(64)) > 3 * 0.009
    again = hop_after(4_000, 5, slow)
    assert float(again.duration.at(1)) == pytest.approx(0.004, rel=0.35)


def test_shared_forwards_make_rows_dearer_but_no_slow_node() -> None:
    alone, shared = HopEstimate.begin(PROFILE), HopEstimate.begin(PROFILE)
    for _ in range(60):
        alone = alone.updated(HopTiming(0, 9000, 64, 1))
        shared = shared.updated(HopTiming(500, 26000, 64, 4))
    assert shared.sessions == pytest.approx(4, rel=0.05)
    assert float(shared.duration.at(64)) == pytest.approx(0.026, rel=0.05)
    rows_alone = float(alone.price.at(64) - alone.price.at(1))
    assert float(shared.price.at(64) - shared.price.at(1)) == pytest.approx(4 * rows_alone, rel=0.1)
    assert shared.table_s == pytest.approx(alone.table_s, rel=0.05)


@given(
    st.lists(
        st.builds(HopTiming, st.integers(0, 2**32), st.integers(0, 2**32), st.integers(0, 4096), st.integers(0, 1000)),
        max_size=30,
    ),
    st.booleans(),
)
def test_a_node_price_rises_with_rows_whatever_its_timings(timings: list[HopTiming], has_profile: bool) -> None:
    hop = HopEstimate.begin(PROFILE if has_profile else ())
    for timing in timings:
        hop = hop.updated(timing)
    prices = hop.price.at(np.arange(1.0, 600))
    assert np.isfinite(prices).all()
    assert (prices > 0).all()
    assert (np.diff(prices) >= -1e-9 * prices[-1]).all()


curves = st.dictionaries(st.integers(1, 4096), st.floats(0, 10), min_size=1, max_size=9).map(
    lambda points: Curve(np.array(sorted(points), np.float64), np.array([points[rows] for rows in sorted(points)]))
)


@given(st.lists(curves, max_size=5), st.lists(st.floats(0.0, 5000.0), min_size=1, max_size=20))
def test_a_sum_of_curves_is_their_sum_everywhere(several: list[Curve], rows: list[float]) -> None:
    at = np.array(rows)
    expected = sum((curve.at(at) for curve in several), start=np.zeros(len(at)))
    assert sum_curves(several).at(at) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_an_overconfident_drafter_loses_most_in_depth() -> None:
    rng = np.random.default_rng(2)
    estimate = AcceptanceEstimate()
    for _ in range(100):
        first, second, third = rng.random(3) < 0.4
        estimate = estimate.after_walk(CHAIN, np.array([first, first and second, first and second and third]))
    assert estimate.chances(CHAIN) == pytest.approx([0.4, 0.16, 0.064], rel=0.5)


def test_usual_chances_continue_beyond_drafted_ranks() -> None:
    estimate = AcceptanceEstimate().with_tree(CHAIN).with_tree(NO_TREE)
    usual = estimate.usual_chances(12)
    assert usual[:3] == pytest.approx(estimate.chances(CHAIN))
    assert (np.diff(usual) <= 0).all()
    assert usual[-1] > 0
    assert AcceptanceEstimate().usual_chances(4).sum() == 0


def levels_after(*level_s: float) -> DraftLevels:
    """Return what is known after chains of three levels that took so many seconds per level."""
    levels = DraftLevels()
    for seconds in level_s:
        levels = levels.updated(CHAIN, 3 * seconds)
    return levels


def test_entry_counts_all_first_nodes_and_no_deeper_ones() -> None:
    two_first = DraftTree(np.array([-1, -1, 0]), np.array([5, 6, 7]), np.log(np.float32([0.5, 0.25, 0.1])))
    estimate = AcceptanceEstimate()
    assert estimate.usual_entry() == 0.0
    estimate = estimate.with_tree(two_first)
    assert estimate.usual_entry() == pytest.approx(float(estimate.chances(two_first)[:2].sum()))
    for _ in range(60):
        estimate = estimate.after_walk(two_first, np.zeros(3, np.bool_))
    assert estimate.usual_entry() < 0.1


def test_a_draft_that_does_not_fit_is_known_after_five_rounds() -> None:
    """A calibration by bins alone still believes a quarter of what the drafter says then."""
    wrong, right = np.zeros(3, np.bool_), np.array([True, False, False])
    estimate = AcceptanceEstimate()
    for _ in range(5):
        estimate = estimate.after_walk(CHAIN, wrong)
    assert estimate.fit < 0.15
    for _ in range(50):
        estimate = estimate.after_walk(CHAIN, wrong)
    assert estimate.fit == LEAST_FIT
    assert estimate.after_walk(CHAIN, right).after_walk(CHAIN, right).fit > 0.5
    assert estimate.after_walk(NO_TREE, np.zeros(0, np.bool_)).fit == estimate.fit


def test_one_wrong_tree_says_little_against_a_draft_that_fitted() -> None:
    sure = DraftTree(np.array([-1]), np.array([5]), np.log(np.float32([0.999])))
    estimate = replace(AcceptanceEstimate(), fit=MOST_FIT)
    assert estimate.after_walk(sure, np.array([False])).fit > 0.9


def test_a_draft_that_is_seldom_but_as_often_right_as_it_says_fits() -> None:
    rng, fits = np.random.default_rng(3), []
    estimate = AcceptanceEstimate()
    unsure = DraftTree(np.array([-1]), np.array([5]), np.log(np.float32([0.25])))
    for _ in range(200):
        estimate = estimate.after_walk(unsure, rng.random(1) < 0.25)
        fits.append(estimate.fit)
    assert np.mean(fits) > 0.75


def test_levels_are_measured_and_extrapolated() -> None:
    levels = levels_after(0.01, 0.01)
    assert levels.level_s == pytest.approx(0.01)
    assert levels.draft_s(3) == pytest.approx([0, 0.01, 0.02, 0.03])
    assert levels.draft_s(12)[-1] == pytest.approx(0.06)
    assert CHAIN.depths().tolist() == [0, 1, 2]


@pytest.mark.parametrize("times", [10, 50, 300])
def test_a_slow_first_draft_is_no_evidence_by_itself(times: int) -> None:
    assert levels_after(times * 0.003).level_s == PRIOR_LEVEL_S
    assert levels_after(times * 0.003, 0.004).level_s == pytest.approx(0.004)
    assert levels_after(0.001).level_s == pytest.approx(0.001)


def test_a_minority_of_slow_levels_changes_nothing() -> None:
    usual = levels_after(*[0.004] * 8)
    for _ in range(3):
        usual = usual.updated(CHAIN, 3 * 0.9)
    assert usual.level_s == pytest.approx(0.004)


@pytest.mark.parametrize(("before", "after"), [(0.004, 0.04), (0.04, 0.004)])
def test_a_lasting_change_of_levels_is_followed_in_five_rounds(before: float, after: float) -> None:
    levels = levels_after(*[before] * 8, *[after] * 5)
    assert levels.level_s == pytest.approx(after)


def test_a_loss_budget_in_debt_halves_chances_until_repaid() -> None:
    budget = LossBudget()
    while not budget.in_debt:
        budget = budget.after_tree(tokens=1, seconds=1.5, plain_s=1.0)
    assert budget.discounted(np.array([0.4])) == pytest.approx([0.2])
    for _ in range(100):
        budget = budget.after_plain_round()
    assert not budget.in_debt
    assert budget.after_tree(tokens=1, seconds=1e9, plain_s=1.0).after_tree(3, 0.1, 1.0).balance > 0
    assert LossBudget().discounted(np.array([0.4])) == pytest.approx([0.4])
    assert START > 0


def test_exploration_counts_plain_rounds_down_to_the_next_try() -> None:
    exploration = Exploration().after_tree(found_hit=False)
    assert not exploration.is_due(within=100)
    for _ in range(3):
        exploration = exploration.after_plain_round(lambda: 3)
    assert exploration.is_due()


def test_a_hit_while_exploring_makes_the_next_try_due_at_once() -> None:
    assert Exploration().after_tree(found_hit=True).is_due()
    assert Exploration().skip(4).skipped_rounds == 4


def test_a_profile_of_one_row_says_nothing_of_free_trees() -> None:
    """A loaded node has no time to measure more, and straight on 256 rows would cost as much as one."""
    hop = HopEstimate.begin(((1, 40_000),))
    assert hop.duration.at(np.array([1.0, 16.0, 256.0])) == pytest.approx([0.04, 0.052, 0.2])
    for _ in range(8):
        hop = hop.updated(HopTiming(0, 320_000, 64, 1))
    assert float(hop.duration.at(64.0)) == pytest.approx(0.32, rel=0.05)
    assert float(hop.duration.at(1.0)) < 0.2
    assert HopEstimate.begin(((1, 40_000), (256, 50_000))).duration.at(256.0) == pytest.approx(0.05)

"""How much is drafted before a round leaves and while it travels, and the sentences that say why."""

from dataclasses import replace

import numpy as np
import pytest

from treeswarm_client.drafters.seam import DraftTree
from treeswarm_client.planner.acceptance import LEAST_FIT, AcceptanceEstimate
from treeswarm_client.planner.costs import Costs, HopEstimate, LineFit, LinkEstimate
from treeswarm_client.planner.draft_decision import DraftDecision, decide_draft, longest_wait_s
from treeswarm_client.planner.draft_levels import DraftLevels
from treeswarm_client.planner.explain import (
    FIRST_FOLLOWS,
    draft_follows_text,
    draft_is_late_text,
    reason_of,
    with_extension,
    with_next_try,
    would_not_pay_text,
)
from treeswarm_client.planner.loss_budget import EXPLORE_NODES, SKIPPED_ROUNDS, Exploration, LossBudget
from treeswarm_client.planner.plan import FIRST_NODES, Estimates, Plan, longest_draft_wait_s

PROFILE = ((1, 4000), (16, 5000), (64, 9000), (256, 26000))
CHAIN = DraftTree(np.arange(-1, 15), np.arange(16), np.log(0.9) * np.arange(1, 17).astype(np.float32))
LATER = Exploration(due_in=10)
LARGEST = 256


def costs(latency_s: float) -> Costs:
    link = LinkEstimate(LineFit(8e-8, latency_s, 8e-8))
    return Costs(link, (HopEstimate.begin(PROFILE),) * 3, 2048, 2)


def estimates(*, level_s: float, is_right: bool) -> Estimates:
    """Return what is known of a drafter after some rounds."""
    levels, acceptance = DraftLevels(), AcceptanceEstimate().with_tree(CHAIN)
    for _ in range(8):
        levels = levels.updated(CHAIN, 16 * level_s)
    for _ in range(200):
        acceptance = acceptance.after_walk(CHAIN, np.full(16, is_right))
    return Estimates(acceptance, levels, LossBudget(), most_drafted=LARGEST)


def decide(
    known: Estimates,
    latency_s: float = 0.1,
    exploration: Exploration = LATER,
    *,
    overlaps: bool = True,
    follows: bool = True,
    has_kept: bool = False,
) -> DraftDecision:
    return decide_draft(
        known,
        costs(latency_s),
        exploration,
        limit=64,
        largest=LARGEST,
        overlaps=overlaps,
        follows=follows,
        has_kept=has_kept,
    )


def test_a_quick_and_right_draft_is_waited_for() -> None:
    decision = decide(estimates(level_s=0.003, is_right=True))
    assert (decision.before, decision.in_flight, decision.why_plain) == (LARGEST, LARGEST, "")
    alone = decide(estimates(level_s=0.003, is_right=True), overlaps=False)
    assert 8 < alone.before <= 64
    assert alone.in_flight == 0


def test_a_slow_and_right_draft_follows_its_round() -> None:
    decision = decide(estimates(level_s=0.06, is_right=True))
    assert (decision.before, decision.in_flight) == (0, LARGEST)
    assert decision.why_plain == draft_follows_text(0.06, longest_draft_wait_s(costs(0.1)))


def test_a_draft_as_slow_as_a_round_is_waited_for_if_it_pays() -> None:
    """If the round left, it would be over before the draft is there."""
    assert decide(estimates(level_s=0.002, is_right=True), 0.001).before > 0
    assert not decide(estimates(level_s=0.1, is_right=True)).why_plain.startswith("plain at once")


def test_a_plain_round_drafts_a_few_nodes_in_flight_to_measure() -> None:
    decision = decide(estimates(level_s=0.003, is_right=False))
    assert (decision.before, decision.in_flight, decision.skipped_rounds) == (0, EXPLORE_NODES, 0)
    assert decision.why_plain.startswith("plain: a tree of ")
    fast = decide(estimates(level_s=0.003, is_right=False), 0.002, overlaps=False)
    assert (fast.before, fast.in_flight, fast.skipped_rounds) == (0, 0, SKIPPED_ROUNDS)


def test_few_nodes_before_a_round_mean_few_in_flight_on_shared_cores() -> None:
    known = estimates(level_s=0.003, is_right=True)
    many = decide(known, follows=False)
    assert (many.before, many.in_flight) == (LARGEST, LARGEST)
    few = decide(seldom_right(0.004), follows=False)
    assert 0 < few.before <= EXPLORE_NODES
    assert few.in_flight == 2 * EXPLORE_NODES


@pytest.mark.parametrize("follows", [False, True], ids=["shared cores", "own cores"])
def test_a_draft_that_seems_not_to_fit_is_neither_waited_for_nor_sent(*, follows: bool) -> None:
    known = seldom_right(0.004)
    unfit = replace(known, acceptance=replace(known.acceptance, fit=LEAST_FIT))
    decision = decide(unfit, 0.01, follows=follows)
    assert (decision.before, decision.in_flight) == (0, EXPLORE_NODES)
    assert decide(unfit, 0.002, overlaps=False, follows=follows).before == 0
    assert decide(known, 0.01, follows=follows).in_flight > EXPLORE_NODES


def seldom_right(level_s: float) -> Estimates:
    """Return what is known of a drafter of which one guess in three is right."""
    known = estimates(level_s=level_s, is_right=True)
    acceptance = AcceptanceEstimate().with_tree(CHAIN)
    for i in range(200):
        acceptance = acceptance.after_walk(CHAIN, np.arange(16) < i % 2)
    return replace(known, acceptance=acceptance)


@pytest.mark.parametrize("latency_s", [0.004, 0.1])
def test_a_draft_that_is_seldom_right_follows_its_round(latency_s: float) -> None:
    known = seldom_right(0.004)
    assert 0.25 < known.acceptance.usual_entry() < 0.45
    decision = decide(known, latency_s)
    assert (decision.before, decision.in_flight) == (0, LARGEST)
    assert decision.why_plain.endswith("% of drafts")
    assert decision.rate > 1.0 / costs(latency_s).plain_s
    assert decide(known, latency_s, overlaps=False).before > 0
    assert decide(known, latency_s, follows=False).before > 0


def test_nodes_kept_from_the_last_round_are_asked_for() -> None:
    for level_s in (0.003, 0.01):
        assert decide(seldom_right(level_s), has_kept=True).before == LARGEST


def test_a_first_draft_follows_where_drafting_goes_on_in_flight() -> None:
    unknown = Estimates(AcceptanceEstimate(), DraftLevels(), LossBudget())
    decision = decide(unknown)
    assert (decision.before, decision.in_flight, decision.why_plain) == (0, LARGEST, FIRST_FOLLOWS)
    alone = decide(unknown, overlaps=False)
    assert (alone.before, alone.in_flight) == (FIRST_NODES, 0)


def test_a_due_try_drafts_a_few_nodes_where_nothing_is_drafted_in_flight() -> None:
    for is_right in (True, False):
        known = estimates(level_s=0.9, is_right=is_right)
        decision = decide(known, exploration=Exploration(due_in=0), overlaps=False)
        assert 0 < decision.before <= EXPLORE_NODES
        assert decision.why_plain == ""
        beside = decide(known, exploration=Exploration(due_in=0), follows=False)
        assert 0 < beside.before <= EXPLORE_NODES
        assert decide(known, exploration=Exploration(due_in=0)) == decide(known)


def test_a_round_waits_longer_than_drafting_should_take_and_not_for_ever() -> None:
    for level_s in (0.003, 0.05):
        known = estimates(level_s=level_s, is_right=True)
        end_s = longest_draft_wait_s(costs(0.1))
        assert end_s + level_s < longest_wait_s(known, costs(0.1)) < end_s + 3 * level_s
    unknown = Estimates(AcceptanceEstimate(), DraftLevels(), LossBudget())
    assert longest_wait_s(unknown, costs(0.1)) < 0.2 * costs(0.1).plain_s


def test_reasons_say_what_was_decided() -> None:
    chances, slow = np.array([0.5, 0.02]), costs(0.1)
    assert "exploring" in reason_of(Plan(2, 1.5, 0.1, 15.0), chances, slow, exploring=True, in_debt=False)
    assert reason_of(Plan(0, 1.0, 0.1, 10.0), np.empty(0), slow, exploring=False, in_debt=False) == (
        "plain: the drafter had nothing to propose"
    )
    one = reason_of(Plan(1, 1.5, 0.1, 15.0), chances, slow, exploring=False, in_debt=True)
    assert one.startswith("1 nodes: one more would bring 0.020 tokens and cost 0.0")
    assert one.endswith("(doubted: trees have cost more than they brought)")
    assert reason_of(Plan(2, 1.5, 0.1, 15.0), chances, slow, exploring=False, in_debt=False) == (
        "2 nodes: all that was drafted"
    )
    none = reason_of(Plan(0, 1.0, 0.1, 10.0), chances, slow, exploring=False, in_debt=False)
    assert none.startswith("plain: the best node would bring 0.500 tokens and cost ")


def test_reasons_of_plain_rounds_tell_late_from_dear() -> None:
    assert draft_is_late_text(0.0364) == "plain: the draft was not ready within 36 ms"
    assert draft_is_late_text(0.0) == "plain: the draft of an earlier round is not ready yet"
    text = would_not_pay_text(Plan(5, 1.12, 0.155, 7.2), 0.04, 0.1, in_debt=False)
    assert (
        text == "plain: a tree of 5 would bring 0.120 tokens and cost 0.550 tokens of time, 0.400 of them for drafting"
    )
    assert with_next_try(text, 7) == f"{text}; the next try is in 7 rounds"
    assert with_next_try(text, None) == text
    assert with_extension("plain", 8) == "plain; 8 nodes were sent after it"
    assert with_extension("plain", 0) == "plain"


@pytest.mark.parametrize("overlaps", [True, False])
def test_no_tree_is_drafted_where_it_may_have_no_nodes(overlaps: bool) -> None:
    known = replace(estimates(level_s=0.003, is_right=True), outgrown=8)
    decision = decide_draft(known, costs(0.1), LATER, limit=0, largest=0, overlaps=overlaps)
    assert (decision.before, decision.in_flight) == (0, 0)

"""The automatic policy, which learns from observations only, against the best size that hindsight would have fixed."""

import numpy as np
import pytest

from treeswarm.session.walk import Walk
from treeswarm_bench.benchmarks.parts.planner_replay import (
    AGREEMENT,
    CELLS,
    LARGEST,
    ROW_BYTES,
    SEGMENT_ROWS,
    SimulatedChain,
    rate_of_fixed_size,
    rate_of_planned_sizes,
)
from treeswarm_client.drafters.seam import NO_TREE, DraftTree
from treeswarm_client.planner import draft_decision
from treeswarm_client.planner.costs import ChainHop, traversal_s
from treeswarm_client.planner.explain import RoundReport, explain_lines
from treeswarm_client.planner.loss_budget import EXPLORE_EVERY, SKIPPED_ROUNDS, Exploration
from treeswarm_client.planner.plan import plan_round
from treeswarm_client.planner.policy import AutoPolicy, PlannerMemory, Round
from treeswarm_client.planner.round_plan import departure_s

TOKENS = 600
SIZES = (0, 2, 4, 8, 16, 32, 64, 128, 256)
CHAIN_OF_8 = DraftTree(np.arange(-1, 7), np.arange(8), np.zeros(8, np.float32))


@pytest.mark.parametrize("text", AGREEMENT)
@pytest.mark.parametrize("cell", CELLS)
def test_planned_sizes_are_near_the_best_fixed_and_plain(cell: str, text: str) -> None:
    """Within five per cent of both."""
    rates = {size: rate_of_fixed_size(CELLS[cell], AGREEMENT[text], TOKENS, size) for size in SIZES}
    rate, _ = rate_of_planned_sizes(CELLS[cell], AGREEMENT[text], TOKENS)
    assert rate >= 0.95 * max(rates.values())
    assert rate >= 0.95 * rates[0]


def after_rounds(
    rounds: int, agreement: float, cell: str = "25 ms, 100 Mbit/s"
) -> tuple[AutoPolicy, SimulatedChain, list[int]]:
    """Play rounds, each as on a chain just opened.  Returns policy, world and the sizes shipped."""
    world = SimulatedChain(CELLS[cell], (agreement, agreement), 10**9)
    policy, sizes = world.policy(PlannerMemory()), []
    for _ in range(rounds):
        policy.begin(world.hops)
        assert policy.nodes_to_draft() == policy.nodes_to_draft()
        tree, shipped, report = world.play_round(policy)
        assert report is not None
        assert (report.shipped, report.drafted) == (len(shipped), len(tree))
        sizes.append(len(shipped))
    return policy, world, sizes


def choose(policy: AutoPolicy, world: SimulatedChain, tree: DraftTree, draft_s: float = 0.0) -> DraftTree:
    """Let the policy choose from a tree that took `draft_s` seconds to draft."""
    world.draft_s = 0.0
    policy.stop_drafting()
    world.draft_s = draft_s
    return policy.choose(tree)


def learn_walk(
    policy: AutoPolicy, tree: DraftTree, accepted: tuple[int, ...], bonus: int, *, unbroken: bool = False
) -> RoundReport | None:
    """Let the policy learn from a walk, without timings."""
    return policy.learn(Round(tree, Walk(accepted, bonus), len(tree), len(tree), 0.2, 0.0, (), unbroken))


def test_wrong_guesses_are_tried_only_where_nearly_free() -> None:
    policy, _, sizes = after_rounds(400, 0.0)
    late = np.array(sizes[200:], np.float64)
    assert late.any()
    extra = traversal_s(policy.costs, 1 + late).mean() / float(traversal_s(policy.costs, 1.0)) - 1
    assert extra < 0.02


def test_the_drafter_is_not_asked_when_nothing_will_be_shipped() -> None:
    _, _, sizes = after_rounds(300, 0.0, "1 ms, 1 Gbit/s")  # where drafting costs most
    assert sum(size > 0 for size in sizes[150:]) <= 150 / EXPLORE_EVERY + 1
    assert 0 in sizes


def test_costs_are_trusted_up_to_twice_the_rows_seen() -> None:
    _, _, sizes = after_rounds(5, 1.0)
    most = 16
    for size in sizes:
        assert size <= 2 * most
        most = max(most, size + 1)


def test_nodes_are_remembered_when_the_chain_changes_and_returns() -> None:
    policy, _, _ = after_rounds(30, 0.9)
    before = policy.costs
    policy.begin([ChainHop("another"), ChainHop("node1")])
    assert policy.costs.hops[1] is before.hops[1]
    assert policy.costs.inner_links == 1
    assert (policy.costs.row_bytes, policy.costs.segment_rows) == (ROW_BYTES, SEGMENT_ROWS)
    policy.begin(SimulatedChain(CELLS["25 ms, 100 Mbit/s"], (0.9, 0.9), 100).hops)
    assert policy.costs == before


def test_a_grown_tree_is_extended_while_its_first_part_travels() -> None:
    policy, world, _ = after_rounds(60, 0.95)
    _, tree, _ = SimulatedChain(CELLS["100 ms, 100 Mbit/s"], (0.95, 0.95), 100).draft(64)
    first = choose(policy, world, tree.best(4))
    assert len(first) == 4
    extended = policy.extension(first, tree, 0.01)
    added = len(extended) - 4
    assert 0 < added <= 60
    report = policy.learn(Round(extended, Walk((), -1), len(extended), 4, 0.2, 0.0, (), unbroken=True))
    assert report is not None
    assert (report.shipped, report.extended, report.got) == (4, added, 1)


def test_nodes_below_an_extension_are_late_relative_to_it() -> None:
    left = [(4, 0.05), (9, 0.06)]
    assert departure_s(np.array([-1, 3, 4, 8, 9, 30]), left).tolist() == [0.0, 0.0, 0.05, 0.05, 0.06, 0.06]
    assert departure_s(np.array([-1, 5]), []).tolist() == [0.0, 0.0]
    policy, world, _ = after_rounds(60, 0.95)
    chain = DraftTree(np.arange(-1, 63), np.arange(64), np.log(0.97) * np.arange(1, 65, dtype=np.float32))
    first = choose(policy, world, chain.best(4))
    extended = policy.extension(first, chain.best(8), 0.05)
    assert len(extended) == 8
    soon = len(policy.extension(extended, chain.best(10), 0.055))
    alone, alone_world, _ = after_rounds(60, 0.95)
    assert soon >= len(alone.extension(choose(alone, alone_world, chain.best(8)), chain.best(10), 0.055))
    # The extension considered last never left.
    report = policy.learn(Round(extended, Walk((), -1), 8, 4, 0.2, 0.0, (), unbroken=True))
    assert report is not None
    assert (report.shipped, report.extended) == (4, 4)


def test_a_round_is_explained_in_a_line_and_its_time_in_a_table() -> None:
    policy, world, _ = after_rounds(3, 0.9)
    _, tree, seconds = SimulatedChain(CELLS["25 ms, 100 Mbit/s"], (0.9, 0.9), 100).draft(32)
    choose(policy, world, tree, seconds)
    _, traversal_seconds, timings = world.traverse(9)
    report = policy.learn(Round(tree.best(8), Walk((), -1), 8, 8, traversal_seconds, 0.0, timings, unbroken=True))
    assert report is not None
    lines = explain_lines([report])
    assert "tokens 1 (" in lines[0]
    assert report.reason in lines[0]
    assert lines[1].startswith("1 traversals (without the prompt's, and any that broke): 1 tokens (")
    assert [line.split()[0] for line in lines[2:]] == ["draft", "wire", "queue", "compute"]
    parts = report.draft_s + report.wire_s + report.queue_s + report.compute_s
    assert parts == pytest.approx(report.seconds)
    assert explain_lines([]) == []


def test_a_right_node_that_was_sent_too_late_counts_as_right() -> None:
    """Its parent's answer tells whether it was right; leaving it out would count only hits that a walk waited for."""
    chain = DraftTree(np.array([-1, 0]), np.array([4, 5]), np.log(np.array([0.5, 0.25], np.float32)))
    world = SimulatedChain(CELLS["25 ms, 100 Mbit/s"], (0.9, 0.9), 100)
    late, in_time = world.policy(PlannerMemory()), world.policy(PlannerMemory())

    def chance(policy: AutoPolicy) -> float:
        return float(policy.memory.estimates.acceptance.chances(chain)[1])

    for _ in range(40):
        learn_walk(late, chain, (0,), 5)
        learn_walk(in_time, chain, (0, 1), 9)
    assert chance(late) == pytest.approx(chance(in_time))
    for _ in range(40):
        learn_walk(late, chain, (0,), 6)
    assert chance(late) < chance(in_time)


def test_a_tree_right_to_its_end_is_followed_by_a_larger_one() -> None:
    policy, _, _ = after_rounds(120, 0.0)
    before = policy.nodes_to_draft()
    learn_walk(policy, CHAIN_OF_8, tuple(range(8)), 99)
    assert policy.nodes_to_draft() >= max(before, 8)
    learn_walk(policy, CHAIN_OF_8, tuple(range(3)), 99)
    assert policy.nodes_to_draft() <= 8


def test_that_no_tree_pays_holds_for_some_plain_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only for them: a tree that was right ends it."""
    policy, _, _ = after_rounds(120, 0.0, "1 ms, 1 Gbit/s")
    policy.memory.exploration = Exploration(due_in=100)
    calls: list[int] = []
    monkeypatch.setattr(draft_decision, "plan_round", lambda *a, **k: calls.append(1) or plan_round(*a, **k))
    rounds = 3 * SKIPPED_ROUNDS
    for _ in range(rounds):
        policy.nodes_to_draft()
        policy.choose(NO_TREE)
    # Two calls per decision: the best plan is plain, and the best tree is named in the reason.
    assert 4 <= len(calls) <= 2 * (rounds / SKIPPED_ROUNDS + 1)
    learn_walk(policy, CHAIN_OF_8, tuple(range(8)), 99)
    assert policy.nodes_to_draft() > 0


def test_a_new_text_is_planned_anew_after_a_plain_last_round() -> None:
    policy, _, _ = after_rounds(120, 1.0)
    assert policy.nodes_to_draft() > 0
    policy.choose(NO_TREE)  # the last token of the text
    assert 0 < policy.nodes_to_draft() <= LARGEST

"""A planner that learns from observations only, against the best size that hindsight would have fixed."""

import numpy as np
import pytest
from tests.support.replayed_rounds import AGREEMENT, CELLS, LARGEST, ROW_BYTES, SEGMENT_ROWS, World, automatic, fixed

from treeswarm_client.drafters.seam import DraftTree
from treeswarm_client.planner import planner as planner_module
from treeswarm_client.planner.costs import ChainHop
from treeswarm_client.planner.explain import explain_lines
from treeswarm_client.planner.plan import plan_round, traversal_s
from treeswarm_client.planner.planner import EXPLORE_EVERY, NO_FOR, Planner, left_at

TOKENS = 600
SIZES = (0, 2, 4, 8, 16, 32, 64, 128, 256)


@pytest.mark.parametrize("text", AGREEMENT)
@pytest.mark.parametrize("cell", CELLS)
def test_within_five_per_cent_of_the_best_fixed_size_and_never_far_under_plain(cell: str, text: str) -> None:
    rates = {size: fixed(CELLS[cell], AGREEMENT[text], TOKENS, size) for size in SIZES}
    found, _ = automatic(CELLS[cell], AGREEMENT[text], TOKENS)
    assert found >= 0.95 * max(rates.values())
    assert found >= 0.95 * rates[0]


def planned(rounds: int, agreement: float, cell: str = "25 ms, 100 Mbit/s") -> tuple[Planner, list[int]]:
    world = World(CELLS[cell], (agreement, agreement), 10**9)
    planner, sizes = Planner(), []
    for _ in range(rounds):
        hops = [ChainHop(f"node{i}", profile) for i, profile in enumerate(world.profiles)]
        planner.begin(hops, row_bytes=ROW_BYTES, segment_rows=SEGMENT_ROWS)
        wish = planner.wish(LARGEST)
        assert planner.wants_draft() == (wish > 0)
        found, tree, seconds = world.draft(wish)
        planner.drafted(tree, seconds)
        size = planner.choose(tree).size if len(tree) else planner.plain().size
        planner.learn_traversal(*world.traverse(1 + size))
        report = planner.learn_walk(tree.best(size), np.flatnonzero(world.outcome(found, size)).tolist(), -1)
        assert report is not None
        assert (report.shipped, report.drafted) == (size, len(tree))
        sizes.append(size)
    return planner, sizes


def test_without_any_luck_only_what_costs_nearly_nothing_is_tried() -> None:
    planner, sizes = planned(400, 0.0)
    late = np.array(sizes[200:], np.float64)
    assert late.any()
    extra = traversal_s(planner.costs, 1 + late).mean() / float(traversal_s(planner.costs, 1.0)) - 1
    assert extra < 0.02


def test_a_drafter_is_not_asked_when_nothing_will_be_shipped() -> None:
    _, sizes = planned(300, 0.0, "1 ms, 1 Gbit/s")  # where drafting costs most
    assert sum(size > 0 for size in sizes[150:]) <= 150 / EXPLORE_EVERY + 1
    assert 0 in sizes


def test_costs_are_trusted_no_further_than_twice_what_was_seen() -> None:
    _, sizes = planned(5, 1.0)
    most = 16
    for size in sizes:
        assert size <= 2 * most
        most = max(most, size + 1)


def test_a_planner_remembers_nodes_when_the_chain_changes_and_comes_back() -> None:
    planner, _ = planned(30, 0.9)
    before = planner.costs
    others = [ChainHop("another"), ChainHop("node1")]
    planner.begin(others, row_bytes=ROW_BYTES, segment_rows=SEGMENT_ROWS)
    assert planner.costs.hops[1] is before.hops[1]
    assert planner.costs.inner_links == 1
    world = World(CELLS["25 ms, 100 Mbit/s"], (0.9, 0.9), 100)
    hops = [ChainHop(f"node{i}", profile) for i, profile in enumerate(world.profiles)]
    planner.begin(hops, row_bytes=ROW_BYTES, segment_rows=SEGMENT_ROWS)
    assert planner.costs == before


def test_more_of_a_grown_tree_is_sent_while_the_first_part_travels() -> None:
    planner, _ = planned(60, 0.95)
    world = World(CELLS["100 ms, 100 Mbit/s"], (0.95, 0.95), 100)
    _, tree, _ = world.draft(64)
    planner.choose(tree.best(4))
    further = planner.extension(tree, 4, 0.01)
    assert 0 < further <= 60
    planner.learn_traversal([5, further], 0.2, [])
    report = planner.learn_walk(tree.best(4 + further), [], -1)
    assert report is not None
    assert (report.shipped, report.extended, report.got) == (4, further, 1)


def test_what_hangs_below_a_further_append_is_late_by_what_it_leaves_after_that() -> None:
    left = [(4, 0.05), (9, 0.06)]
    assert left_at(np.array([-1, 3, 4, 8, 9, 30]), left).tolist() == [0.0, 0.0, 0.05, 0.05, 0.06, 0.06]
    assert left_at(np.array([-1, 5]), []).tolist() == [0.0, 0.0]
    planner, _ = planned(60, 0.95)
    chain = DraftTree(np.arange(-1, 63), np.arange(64), np.log(0.97) * np.arange(1, 65, dtype=np.float32))
    planner.choose(chain.best(4))
    sent = planner.extension(chain.best(8), 4, 0.05)
    assert sent == 4
    soon = planner.extension(chain.best(10), 8, 0.055)
    alone, _ = planned(60, 0.95)
    alone.choose(chain.best(8))
    assert soon >= alone.extension(chain.best(10), 8, 0.055)
    planner.learn_traversal([5, sent], 0.2, [])
    report = planner.learn_walk(chain.best(8), [], -1)  # what was thought of last never left
    assert report is not None
    assert (report.shipped, report.extended) == (4, 4)


def test_a_round_is_told_in_a_line_and_the_time_in_a_table() -> None:
    planner, _ = planned(3, 0.9)
    world = World(CELLS["25 ms, 100 Mbit/s"], (0.9, 0.9), 100)
    _, tree, seconds = world.draft(32)
    planner.drafted(tree, seconds)
    planner.choose(tree)
    planner.learn_traversal(*world.traverse(9))
    report = planner.learn_walk(tree.best(8), [], -1)
    assert report is not None
    lines = explain_lines([report])
    assert "tokens 1 (" in lines[0]
    assert report.reason in lines[0]
    assert lines[1].startswith("1 traversals (without the prompt's, and any that broke): 1 tokens (")
    assert [line.split()[0] for line in lines[2:]] == ["draft", "wire", "queue", "compute"]
    parts = report.draft_s + report.wire_s + report.queue_s + report.compute_s
    assert parts == pytest.approx(report.seconds)
    assert explain_lines([]) == []


def test_a_node_that_was_right_but_sent_too_late_counts_as_right() -> None:
    """Its parent's answer tells its fate; to leave it out would count only the hits that a walk waited for."""
    chain = DraftTree(np.array([-1, 0]), np.array([4, 5]), np.log(np.array([0.5, 0.25], np.float32)))
    late, right = Planner(), Planner()
    for _ in range(40):
        late.learn_walk(chain, [0], 5)
        right.learn_walk(chain, [0, 1], 9)
    assert late.outlook.chances(chain)[1] == pytest.approx(right.outlook.chances(chain)[1])
    for _ in range(40):
        late.learn_walk(chain, [0], 6)
    assert late.outlook.chances(chain)[1] < right.outlook.chances(chain)[1]


def test_a_tree_that_was_right_to_its_end_is_followed_by_a_larger_one() -> None:
    planner, _ = planned(120, 0.0)
    before = planner.wish(LARGEST)
    chain = DraftTree(np.arange(-1, 7), np.arange(8), np.zeros(8, np.float32))
    planner.learn_walk(chain, tuple(range(8)), 99)
    assert planner.wish(LARGEST) >= max(before, 8)
    planner.learn_walk(chain, tuple(range(3)), 99)
    assert planner.wish(LARGEST) <= 8


def test_that_no_tree_pays_is_believed_for_some_plain_rounds_and_only_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planner, _ = planned(120, 0.0, "1 ms, 1 Gbit/s")
    asked: list[int] = []
    monkeypatch.setattr(planner_module, "plan_round", lambda *a, **k: asked.append(1) or plan_round(*a, **k))
    rounds = 3 * NO_FOR
    for _ in range(rounds):
        planner.wish(LARGEST)
        planner.plain()
    assert 2 <= len(asked) <= rounds / NO_FOR + 1
    planner.learn_walk(DraftTree(np.arange(-1, 7), np.arange(8), np.zeros(8, np.float32)), tuple(range(8)), 99)
    assert planner.wish(LARGEST) > 0


def test_a_new_text_is_planned_anew_though_the_last_ended_plain() -> None:
    planner, _ = planned(120, 1.0)
    assert planner.wish(LARGEST) > 0
    planner.plain()  # its last token
    assert planner.wish(LARGEST) > 0

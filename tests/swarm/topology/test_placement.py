"""Placement: weak blocks are served first, similar nodes spread, and no move leaves a block without a node."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treeswarm.protocol.spans import Span
from treeswarm.topology import rebalancing
from treeswarm.topology.placement import best_possible, choose_again, choose_span, plan_move
from treeswarm.topology.tables import Placed, PlacementTable


def placed(node: str, start: int, end: int, rate: float = 100.0, state: str = "online") -> Placed:
    return Placed(node, Span(start, end), rate, state)  # type: ignore[arg-type]


def block_throughput(swarm: list[Placed], blocks: int) -> list[float]:
    """Return the rows per second that each block can compute."""
    return [float(rows) for rows in PlacementTable.of(swarm).throughput(blocks)]


def weakest_block(swarm: list[Placed], blocks: int) -> float:
    """Return what the swarm as a whole can compute: rows per second of its weakest block."""
    return min(block_throughput(swarm, blocks))


def yields(me: Placed, swarm: list[Placed], blocks: int) -> bool:
    """Return whether `me`, still joining, leaves its window to nodes that announced it at nearly the same time."""
    return choose_again(me, swarm, blocks) != me.span


def grown(nodes: int, blocks: int, seed: int) -> list[Placed]:
    """Return a swarm whose nodes joined one after another."""
    random = np.random.default_rng(seed)
    swarm: list[Placed] = []
    for number in range(nodes):
        node, rate = f"{random.integers(2**32):08x}", float(random.lognormal(10, 0.7))
        length = int(random.integers(1, blocks // 2 + 1))
        swarm.append(Placed(node + str(number), choose_span(swarm, blocks, length, node), rate, "online"))
    return swarm


def test_throughput_counts_joining_but_not_draining_nodes() -> None:
    swarm = [placed("a", 0, 2), placed("b", 1, 3, 50, "joining"), placed("c", 0, 3, 300, "draining")]
    assert block_throughput(swarm, 4) == [50, 75, 25, 0]
    assert weakest_block(swarm, 3) == 25
    assert block_throughput([], 2) == [0, 0]
    assert best_possible([100, 50], 3) == 50


def test_a_new_node_takes_the_weakest_window() -> None:
    swarm = [placed("a", 0, 4), placed("b", 0, 2), placed("c", 6, 8, 10)]
    assert choose_span(swarm, 8, 2, "new") == Span(4, 6)
    assert choose_span([*swarm, placed("d", 4, 6)], 8, 2, "new") == Span(6, 8)
    assert choose_span(swarm, 8, 8, "new") == Span(0, 8)


@pytest.mark.parametrize(("blocks", "length"), [(8, 4), (9, 3), (32, 8), (8, 8), (7, 1)])
def test_the_fewest_possible_nodes_cover_the_model(blocks: int, length: int) -> None:
    """Each node joins when the one before it serves."""
    for number in range(20):
        swarm: list[Placed] = []
        for name in (f"{number}-{i}" for i in range(blocks // length)):
            swarm.append(Placed(name, choose_span(swarm, blocks, length, name), 100.0, "online"))
        assert sorted(node.span.start for node in swarm) == list(range(0, blocks, length))


def test_two_nodes_that_join_an_empty_swarm_at_once_divide_the_model() -> None:
    joining = [placed("a", 0, 4, state="joining"), placed("b", 0, 4, state="joining")]
    assert [choose_again(node, joining, 8) for node in joining] == [Span(0, 4), Span(4, 8)]


def test_new_nodes_of_an_empty_swarm_choose_different_windows() -> None:
    chosen = {choose_span([], 32, 4, f"n{i}") for i in range(40)}
    assert chosen == {Span(start, start + 4) for start in range(0, 32, 4)}


@pytest.mark.parametrize("seed", range(3))
def test_nodes_that_join_one_by_one_are_balanced(seed: int) -> None:
    swarm = grown(300, 40, seed)
    assert weakest_block(swarm, 40) > 0.9 * best_possible([node.rate for node in swarm], 40)


@pytest.mark.parametrize("count", [10, 100])
def test_nodes_that_join_at_the_same_time_spread(count: int) -> None:
    """All nodes choose on one snapshot, see each other, and choose once more."""
    random = np.random.default_rng(count)
    before = grown(100, 40, 1)
    names = [f"{random.integers(2**32):08x}" for _ in range(count)]
    rate = float(np.mean([node.rate for node in before]))
    first = [Placed(name, choose_span(before, 40, 8, name), rate, "joining") for name in names]
    seen = [*before, *first]
    settled = [replace(node, span=choose_again(node, seen, 40)) for node in first]
    assert [yields(node, seen, 40) for node in first] == [
        node.span != other.span for node, other in zip(first, settled, strict=True)
    ]
    weakest = [weakest_block([*before, *some], 40) for some in (first, settled)]
    best = best_possible([node.rate for node in seen], 40)
    assert weakest[1] > 0.85 * best > weakest[0]


def test_of_two_nodes_that_join_at_once_the_lower_id_stays() -> None:
    swarm = [placed("x", 0, 4), placed("y", 4, 8, 50)]
    lower, higher = placed("a", 4, 8, 100, "joining"), placed("b", 4, 8, 100, "joining")
    seen = [*swarm, lower, higher]
    assert not yields(lower, seen, 8)
    assert yields(higher, seen, 8)
    assert choose_again(higher, seen, 8) == Span(0, 4)
    # Where far more is missing, the second choice equals the first node.
    assert not yields(higher, [placed("x", 0, 4, 1000), lower, higher], 8)


def test_a_node_moves_where_it_is_needed() -> None:
    swarm = [placed("a", 0, 4), placed("b", 0, 4), placed("c", 0, 4), placed("d", 4, 8, 60)]
    moves = [plan_move(node, swarm, 8) for node in swarm]
    assert sorted(map(str, moves)) == ["4:8", "None", "None", "None"]


def test_a_small_gain_is_not_worth_a_move() -> None:
    swarm = [placed("a", 0, 4), placed("b", 0, 4), placed("c", 4, 8, 160)]
    assert all(plan_move(node, swarm, 8) is None for node in swarm)


def test_an_empty_block_is_covered_by_a_node_with_a_replica() -> None:
    swarm = [placed("a", 0, 4), placed("b", 0, 4, 1), placed("d", 6, 8)]
    moves = {node.node: plan_move(node, swarm, 8) for node in swarm}
    assert {node for node, move in moves.items() if move} <= {"a", "b"}
    assert sum(move is not None and move.start <= 4 and move.end >= 6 for move in moves.values()) == 1


def test_a_node_stays_while_another_of_its_span_moves() -> None:
    swarm = [placed("a", 0, 4), placed("b", 0, 4), placed("c", 0, 4), placed("d", 4, 8, 10)]
    mover = next(node for node in swarm if plan_move(node, swarm, 8))
    stays = next(node for node in swarm if node.node in "abc" and node != mover)
    seen = [replace(node, state="draining") if node == stays else node for node in swarm]
    assert plan_move(mover, seen, 8) is None


def test_the_only_replica_of_a_block_stays() -> None:
    swarm = [placed("a", 0, 4), placed("b", 0, 3), placed("d", 4, 8, 1)]
    assert plan_move(swarm[0], swarm, 8) is None
    draining = replace(swarm[0], state="draining")
    assert plan_move(draining, [draining, *swarm[1:]], 8) is None


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6), st.floats(1, 100)), min_size=3, max_size=25),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_moves_never_uncover_a_block(shapes: list[tuple[int, int, float]], random: object, at_once: bool) -> None:
    """All nodes decide on one snapshot and announce.  Then each looks again, in turn or at once, and goes or stays."""
    blocks = 10
    swarm = [
        placed(f"n{i:02}", start, min(start + length, blocks), rate) for i, (start, length, rate) in enumerate(shapes)
    ]
    served = {block for node in swarm for block in range(node.span.start, node.span.end)}
    moves = {node.node: plan_move(node, swarm, blocks) for node in swarm}
    now = {node.node: replace(node, state="draining") if moves[node.node] else node for node in swarm}
    announced = list(now.values())
    order = list(moves)
    random.shuffle(order)  # type: ignore[attr-defined]
    for node in order:
        if now[node].state == "draining":
            again = plan_move(now[node], announced if at_once else list(now.values()), blocks)
            now[node] = replace(now[node], state="joining", span=again) if again else replace(now[node], state="online")
    online = {
        block for node in now.values() if node.state == "online" for block in range(node.span.start, node.span.end)
    }
    assert online == served


def test_an_unbalanced_swarm_is_balanced_in_three_rounds() -> None:
    blocks = 40
    swarm = [node if node.span.start > 10 else replace(node, rate=node.rate / 10) for node in grown(300, blocks, 7)]
    best = best_possible([node.rate for node in swarm], blocks)
    assert weakest_block(swarm, blocks) < 0.5 * best
    for _ in range(3):
        seen = PlacementTable.of(swarm)
        moves = {node.node: plan_move(node, seen, blocks) for node in swarm}
        swarm = [replace(node, span=moves[node.node] or node.span) for node in swarm]
    assert weakest_block(swarm, blocks) > 0.75 * best


def test_a_plan_with_too_many_moves_begins_with_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebalancing, "DONORS", 8)
    swarm = [placed(f"n{i:03}", 0, 4) for i in range(200)] + [placed(f"m{i:03}", 4, 8) for i in range(50)]
    seen = PlacementTable.of(swarm)
    moves = [plan_move(node, seen, 8) for node in swarm]
    assert moves.count(Span(4, 8)) == 8

"""Healing: a hole is filled by one node at a time, no other hole is opened, and claims end in one filler."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treeswarm.protocol.spans import Span
from treeswarm.topology.healing import find_holes, judge_claim, nodes_to_ask, plan_healing
from treeswarm.topology.placement import choose_span
from treeswarm.topology.tables import Placed, PlacementTable

BLOCKS = 8


def placed(node: str, start: int, end: int, state: str = "online") -> Placed:
    return Placed(node, Span(start, end), 100.0, state)  # type: ignore[arg-type]


def swarm_without_a_block(nodes: int, seed: int) -> list[Placed]:
    """Return a swarm grown one node after another, without the holders of one random block."""
    random, swarm = np.random.default_rng(seed), list[Placed]()
    for number in range(nodes):
        length = int(random.integers(1, 5))
        span = choose_span(swarm, BLOCKS, length, str(number))
        swarm.append(Placed(f"{random.integers(2**32):08x}", span, float(random.lognormal(5, 0.7)), "online"))
    lost = int(random.integers(BLOCKS))
    return [node for node in swarm if lost not in range(node.span.start, node.span.end)]


def test_one_of_two_spares_fills_the_hole_of_a_lost_holder() -> None:
    table = PlacementTable.of([placed("b", 4, 8), placed("c", 4, 8)])
    assert find_holes(table, BLOCKS) == [Span(0, 4)]
    moves = plan_healing(table, BLOCKS, 0)
    assert list(moves.values()) == [Span(0, 4)]
    assert len(plan_healing(table, BLOCKS, 1)) == 1, "the other one, if the first does not act"
    assert plan_healing(table, BLOCKS, 0).keys().isdisjoint(plan_healing(table, BLOCKS, 1))
    assert plan_healing(table, BLOCKS, 2) == moves, "after the last turn the first one follows"


def test_no_node_moves_without_a_hole_or_without_a_spare() -> None:
    assert plan_healing(PlacementTable.of([placed("a", 0, 4), placed("b", 4, 8), placed("c", 4, 8)]), BLOCKS, 0) == {}
    assert plan_healing(PlacementTable.of([placed("b", 4, 8)]), BLOCKS, 0) == {}
    joining = [placed("a", 0, 4, "joining"), placed("b", 4, 8), placed("c", 4, 8)]
    assert find_holes(PlacementTable.of(joining), BLOCKS) == []


def test_stated_rates_open_no_hole() -> None:
    """A thousand nodes of one liar may state the highest rate that a record can have."""
    served = [placed("a", 0, 4), placed("b", 4, 8)]
    liars = [Placed(f"liar{number}", Span(0, 1), 1e9, "online") for number in range(1000)]
    assert find_holes(PlacementTable.of([*served, *liars]), BLOCKS) == []


def test_each_turn_asks_more_nodes() -> None:
    table = PlacementTable.of([placed(f"n{number:03}", 4, 8) for number in range(40)])
    counts = [len(plan_healing(table, BLOCKS, turn)) for turn in range(5)]
    assert counts == [1, 2, 4, 8, 16]


@given(st.integers(2, 24), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_plan_only_adds_blocks(nodes: int, seed: int) -> None:
    swarm = swarm_without_a_block(nodes, seed)
    table = PlacementTable.of(swarm)
    if not swarm or not find_holes(table, BLOCKS):
        return
    moves = plan_healing(table, BLOCKS, 0)
    after = PlacementTable.of([replace(node, span=moves.get(node.node, node.span)) for node in swarm])
    served_before = set(range(BLOCKS)) - {b for hole in find_holes(table, BLOCKS) for b in range(hole.start, hole.end)}
    still_empty = {b for hole in find_holes(after, BLOCKS) for b in range(hole.start, hole.end)}
    assert not still_empty & served_before
    assert not moves or len(still_empty) < BLOCKS - len(served_before)


def test_a_claim_stands_if_the_hole_is_open_and_the_old_blocks_are_served() -> None:
    claim, former = placed("b", 0, 4, "joining"), Span(4, 8)
    assert judge_claim(claim, former, PlacementTable.of([placed("c", 4, 8)]), BLOCKS) == "load"
    back = PlacementTable.of([placed("a", 0, 4), placed("c", 4, 8)])
    assert judge_claim(claim, former, back, BLOCKS) == "withdraw", "the lost holder is back"
    assert judge_claim(claim, former, PlacementTable.of([placed("x", 0, 2)]), BLOCKS) == "withdraw"


@pytest.mark.parametrize("third", [[], [placed("z", 4, 8)]])
def test_of_two_claims_the_lower_id_stands(third: list[Placed]) -> None:
    b, c, former = placed("b", 0, 4, "joining"), placed("c", 0, 4, "joining"), Span(4, 8)
    assert judge_claim(c, former, PlacementTable.of([b, *third]), BLOCKS) == "withdraw"
    waits = "the other one withdraws, or is loading already because it asked before"
    assert judge_claim(b, former, PlacementTable.of([c, *third]), BLOCKS) == "wait", waits
    returned = replace(c, span=former, state="online")
    assert judge_claim(b, former, PlacementTable.of([returned, *third]), BLOCKS) == "load"


def test_a_claim_asks_rivals_and_enough_holders_of_the_old_blocks() -> None:
    holders = [placed(f"h{number}", 4, 8) for number in range(6)]
    table = PlacementTable.of([placed("a", 0, 2), placed("d", 4, 8, "draining"), placed("i", 6, 8), *holders])
    rivals, asked = nodes_to_ask(Span(4, 8), table, ["a", "gone", "a", "h5"])
    assert rivals == ["a", "h5"]
    assert asked == ["i", "h0", "h1", "h2"], "three of each block, and none that leaves"

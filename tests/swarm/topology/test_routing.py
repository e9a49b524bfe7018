"""The fastest chain is the best of all chains, and clients with one snapshot spread over equal ones."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treeswarm.errors import MissingBlocks
from treeswarm.protocol.spans import Span
from treeswarm.topology import routing
from treeswarm.topology.coordinates import Coordinate, distance
from treeswarm.topology.routing import END, Candidate, Route, fastest_chain, worth_changing

HERE = Coordinate(0.0, 0.0, 0.001)
Measured = dict[tuple[str, str], float]


def candidate(node: str, start: int, end: int, block_s: float = 0.01, x: float = 0.0, **other: float) -> Candidate:
    usual = Candidate(node, Span(start, end), block_s, 0.001, 1000, Coordinate(x, 0.0, 0.001))
    return replace(usual, **other)  # type: ignore[arg-type]


def chain(candidates: list[Candidate], start: int, end: int, **options: object) -> Route:
    return fastest_chain(candidates, Span(start, end), HERE, HERE, **{"room": 1, **options})  # type: ignore[arg-type]


def seconds(path: list[Candidate], start: Coordinate, end: Coordinate, measured: Measured) -> float:
    """Return the seconds of one traversal, given the node of every block: the definition as plainly as possible."""

    def half(one: str, other: str, predicted: float) -> float:
        both = measured.get((one, other), predicted if END in (one, other) else measured.get((other, one), predicted))
        return both / 2

    def first(one: Candidate) -> float:
        return half(END, one.node, distance(start, one.coordinate))

    def last(one: Candidate) -> float:
        return half(one.node, END, distance(one.coordinate, end))

    total = first(path[0]) + path[0].hop_s
    for one, other in pairwise(path):
        if one != other:
            detour = 2 * max(abs(first(one) - first(other)), abs(last(one) - last(other)))
            total += half(one.node, other.node, max(distance(one.coordinate, other.coordinate), detour)) + other.hop_s
    return total + last(path[-1]) + sum(one.block_s for one in path)


def all_paths(candidates: list[Candidate], span: Span) -> Iterator[list[Candidate]]:
    """Yield the node of every block, for every chain that visits no node twice."""

    def longer(path: list[Candidate], block: int) -> Iterator[list[Candidate]]:
        if block == span.end:
            yield path
            return
        for node in candidates:
            if Span(block, block + 1) in node.span and (node not in path or path[-1] == node):
                yield from longer([*path, node], block + 1)

    return longer([], span.start)


@st.composite
def small_swarms(draw: st.DrawFn) -> tuple[list[Candidate], Span, Measured]:
    short = st.floats(0, 0.1, allow_subnormal=False)
    place = st.builds(Coordinate, short, short, st.floats(0.0001, 0.05))
    candidates = []
    for node in "abcde"[: draw(st.integers(1, 5))]:
        start = draw(st.integers(0, 5))
        span = Span(start, draw(st.integers(start + 1, 6)))
        candidates.append(Candidate(node, span, draw(short), draw(short), draw(st.sampled_from([5, 50])), draw(place)))
    begin = draw(st.integers(0, 4))
    names = st.sampled_from(["a", "b", "c", "d", "e", END])
    pairs = draw(st.dictionaries(st.tuples(names, names).filter(lambda pair: pair[0] < pair[1]), short, max_size=3))
    flipped = draw(st.booleans())
    measured = {(other, one) if flipped else (one, other): value for (one, other), value in pairs.items()}
    return candidates, Span(begin, draw(st.integers(begin + 1, 6))), measured


@settings(max_examples=400, deadline=None)
@given(small_swarms(), st.sampled_from([1, 10]), st.sampled_from([(), ("a",)]))
def test_no_other_chain_is_faster(
    swarm: tuple[list[Candidate], Span, Measured], room: int, avoid: tuple[str, ...]
) -> None:
    candidates, span, measured = swarm
    end = Coordinate(0.05, 0.02, 0.001)
    usable = [one for one in candidates if one.free_tokens >= room and one.node not in avoid]
    best = min((seconds(path, HERE, end, measured) for path in all_paths(usable, span)), default=None)
    options = {"room": room, "avoid": avoid, "measured": measured}
    if best is None:
        with pytest.raises(MissingBlocks):
            fastest_chain(candidates, span, HERE, end, **options)  # type: ignore[arg-type]
        return
    route = fastest_chain(candidates, span, HERE, end, **options)  # type: ignore[arg-type]
    by_name = {one.node: one for one in usable}
    path = [by_name[node] for node, part in route.hops for _ in range(len(part))]
    assert [part.start for _, part in route.hops] + [span.end] == [span.start] + [part.end for _, part in route.hops]
    assert all(part in by_name[node].span for node, part in route.hops)
    assert len({node for node, _ in route.hops}) == len(route.hops)
    assert route.seconds == pytest.approx(seconds(path, HERE, end, measured), rel=1e-12)
    assert route.seconds == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("jitter_seed", [None, 1])
def test_replicas_never_share_their_span(jitter_seed: int | None) -> None:
    """It would be one more visit, and one more node that can fail."""
    random = np.random.default_rng(0)
    for _ in range(100):
        replicas = [
            candidate(node, 0, 8, random.uniform(0.005, 0.01), random.uniform(0, 0.005), hop_s=0.0005) for node in "abc"
        ]
        measured = {pair: random.uniform(0.005, 0.05) for node in "abc" for pair in ((END, node), (node, END))}
        assert len(chain(replicas, 0, 8, measured=measured, jitter_seed=jitter_seed).hops) == 1


def test_a_replica_near_the_end_does_not_share_a_span() -> None:
    """As measured on a busy machine: one replica computes faster, and the other one answers pings sooner."""
    fast, near = candidate("fast", 5, 8, 0.0100), candidate("near", 5, 8, 0.0127, x=0.002)
    round_trips = {("fast", END): 0.030, ("near", END): 0.010}
    route = chain([candidate("head", 0, 5), fast, near], 0, 8, measured=round_trips)
    assert route.hops == (("head", Span(0, 5)), ("near", Span(5, 8)))


def test_no_node_is_visited_twice_even_if_that_is_faster() -> None:
    slow, quick = candidate("slow", 0, 5, 1.0), candidate("quick", 2, 3, 0.01)
    route = chain([slow, quick], 0, 5)
    assert route.hops == (("slow", Span(0, 5)),)
    other = candidate("other", 3, 5, 0.9)
    assert [node for node, _ in chain([slow, quick, other], 0, 5).hops] == ["slow", "quick", "other"]


def test_a_search_cut_short_visits_no_node_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "BRANCHES", 1)
    assert chain([candidate("slow", 0, 5, 1.0), candidate("quick", 2, 3)], 0, 5).hops == (("slow", Span(0, 5)),)


def test_the_chain_between_two_survivors_starts_and_ends_at_them() -> None:
    near, far = candidate("near", 0, 8, x=0.2), candidate("far", 0, 8, 0.009)
    survivor = Coordinate(0.2, 0.0, 0.001)
    route = fastest_chain([near, far], Span(3, 5), survivor, survivor, room=1)
    assert route.hops == (("near", Span(3, 5)),)
    assert chain([near, far], 3, 5).hops == (("far", Span(3, 5)),)


def test_measurements_take_precedence_over_predictions() -> None:
    one, other = candidate("one", 0, 4, x=0.01), candidate("other", 0, 4, x=0.02)
    assert chain([one, other], 0, 4).hops[0][0] == "one"
    assert chain([one, other], 0, 4, measured={(END, "one"): 0.5}).hops[0][0] == "other"


def test_clients_with_one_snapshot_spread_over_equal_replicas() -> None:
    replicas = [candidate(f"n{i}", 0, 4) for i in range(8)]
    chosen = [chain(replicas, 0, 4, jitter_seed=seed).hops[0][0] for seed in range(400)]
    assert chosen == [chain(replicas, 0, 4, jitter_seed=seed).hops[0][0] for seed in range(400)]
    counts = [chosen.count(one.node) for one in replicas]
    assert min(counts) > 20
    assert chain([*replicas, candidate("slow", 0, 4, 0.02)], 0, 4, jitter_seed=3).hops[0][0] != "slow"
    assert chain(replicas, 0, 4, jitter_seed=3).seconds == chain(replicas, 0, 4).seconds


def test_the_last_place_on_a_node_is_left_to_some_clients() -> None:
    scarce, ample = candidate("scarce", 0, 4, free_tokens=10), candidate("ample", 0, 4, 0.02)
    chosen = [chain([scarce, ample], 0, 4, room=10, jitter_seed=seed).hops[0][0] for seed in range(200)]
    assert 20 < chosen.count("scarce") < 100
    assert chain([scarce], 0, 4, room=10, jitter_seed=1).hops[0][0] == "scarce"


def test_cutting_predecessors_costs_less_than_two_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    many = []
    for node in range(400):
        start, length = (int(value) for value in random.integers(1, 8, size=2))
        place = Coordinate(*random.uniform(0, 0.1, 2).tolist(), 0.002)
        span = Span(start - 1, min(start + length, 12))
        many.append(Candidate(f"n{node}", span, float(random.lognormal(-5, 0.5)), 0.005, 100, place))
    cut = chain(many, 0, 12)
    monkeypatch.setattr(routing, "PREDECESSORS", len(many))
    assert chain(many, 0, 12).seconds <= cut.seconds < 1.02 * chain(many, 0, 12).seconds


def test_a_node_with_a_queue_is_avoided() -> None:
    busy, idle = candidate("busy", 0, 4, hop_s=0.1), candidate("idle", 0, 4, 0.02)
    assert chain([busy, idle], 0, 4).hops[0][0] == "idle"


def test_gaps_are_named_with_their_reason() -> None:
    some = [candidate("a", 0, 3), candidate("b", 3, 5, free_tokens=10), candidate("c", 4, 6), candidate("d", 7, 8)]
    with pytest.raises(MissingBlocks, match=r"no node serves block 6:7: start `swarm-node MODEL --blocks 6:7`"):
        chain(some, 0, 8)
    with pytest.raises(MissingBlocks, match=r"blocks 3:4 are served only by nodes that are full \(1\): "):
        chain(some, 0, 6, room=100)
    with pytest.raises(MissingBlocks, match=r"blocks 5:6 are served only by nodes that failed lately \(1\): "):
        chain(some, 0, 6, avoid=["c"])
    with pytest.raises(MissingBlocks, match=r"blocks 3:6 .* are full \(1\) or failed lately \(1\): .* fewer tokens"):
        chain(some, 0, 6, room=100, avoid=["c"])
    with pytest.raises(MissingBlocks, match="no node serves blocks 0:2"):
        chain([], 0, 2)


def test_a_route_is_changed_only_if_that_repays() -> None:
    assert worth_changing(1.0, 0.5, change_s=10.0, rounds_left=100)
    assert not worth_changing(1.0, 0.5, change_s=10.0, rounds_left=10)
    assert not worth_changing(1.0, 0.95, change_s=0.1, rounds_left=1000)


def test_a_last_resort_serves_only_blocks_that_no_other_node_serves() -> None:
    only, fast, slow = candidate("only", 0, 2), candidate("fast", 2, 4, 0.001), candidate("slow", 2, 4, 0.1)
    banned = {"avoid": ["only", "fast"], "last_resort": ["only", "fast"]}
    assert chain([only, fast, slow], 0, 4, **banned).hops == (("only", Span(0, 2)), ("slow", Span(2, 4)))
    with pytest.raises(MissingBlocks):
        chain([only, fast, slow], 0, 4, avoid=["only"], last_resort=["fast"])

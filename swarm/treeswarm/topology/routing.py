"""Which chain of nodes answers soonest.  Pure.

One traversal goes start → hop → … → hop → end: half a round trip a link, and at every hop its queue and overhead once
and its time a block.  Every node may compute any part of its span, once and without a gap.

A dynamic programme walks the block boundaries; its state is the node that computed last.  It is exact while at most
`PREDECESSORS` nodes serve a block; beyond that a block's nodes are entered only from the `PREDECESSORS` cheapest nodes
of the block before (going on at the same node is never cut).  A node that left the chain and came back is
forbidden by branching; that too is exact, up to `BRANCHES` branches.
"""

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from treeswarm.errors import MissingBlocks
from treeswarm.protocol.spans import Span
from treeswarm.topology.coordinates import Coordinate, as_points, distances

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

# 10,000 nodes, some 1,500 a block: 47 ms with 32, 145 ms with 64 (larger arrays leave the cache), 2.5 s without a cut;
# all chains were the same, even with 8 (2026-11-21, EPYC Zen 3, CPU time).
PREDECESSORS = 32
# A chain that visits a node twice is rare; the rest of the search is bounded, and what remains is merged.
BRANCHES = 64
# Equal replicas differ by less than this in what a snapshot knows of them; clients must not all choose the same.
JITTER = 0.05
# With one place left on a node, one in 1 + RIVALS clients tries for it: the others would find it taken.  Of 100 clients
# over 1,000 simulated nodes 19 % failed at first without this, 5 % with it, for chains 1 % slower (2026-11-21).
RIVALS = 3
# Estimates are off by some percent: a route must promise this share to be worth leaving a working one.
LEAST_GAIN = 0.1
# The name of both ends in `measured`: (END, node) is from the start, (node, END) to the end.
END = ""


@dataclass(frozen=True)
class Candidate:
    """What a snapshot says of one node.

    `block_s`: seconds a block for one traversal's rows; `hop_s`: queue and overhead, seconds a visit; `free_tokens`:
    room in its cache.
    """

    node: str
    span: Span
    block_s: float
    hop_s: float
    free_tokens: int
    coordinate: Coordinate


@dataclass(frozen=True, eq=False)
class CandidateTable:
    """Candidates as arrays, [nodes] each; `points` as `coordinates.as_points` makes them."""

    nodes: NDArray[np.str_]
    start: Ints
    end: Ints
    block_s: Floats
    hop_s: Floats
    free_tokens: Ints
    points: Floats

    @classmethod
    def of(cls, candidates: "CandidateTable | Sequence[Candidate]") -> "CandidateTable":
        if isinstance(candidates, CandidateTable):
            return candidates
        return cls(
            np.array([one.node for one in candidates], np.str_),
            np.array([one.span.start for one in candidates], np.int64),
            np.array([one.span.end for one in candidates], np.int64),
            np.array([one.block_s for one in candidates], np.float64),
            np.array([one.hop_s for one in candidates], np.float64),
            np.array([one.free_tokens for one in candidates], np.int64),
            as_points(one.coordinate for one in candidates),
        )

    def only(self, kept: Mask) -> "CandidateTable":
        return CandidateTable(
            self.nodes[kept],
            self.start[kept],
            self.end[kept],
            self.block_s[kept],
            self.hop_s[kept],
            self.free_tokens[kept],
            self.points[kept],
        )


@dataclass(frozen=True)
class Route:
    """Nodes with the part of their span to use, in order, and the predicted seconds of one traversal."""

    hops: tuple[tuple[str, Span], ...]
    seconds: float


def fastest_chain(
    candidates: CandidateTable | Sequence[Candidate],
    wanted: Span,
    start: Coordinate,
    end: Coordinate,
    *,
    room: int,
    avoid: Collection[str] = (),
    measured: Mapping[tuple[str, str], float] | None = None,
    jitter_seed: int | None = None,
) -> Route:
    """The chain over blocks `wanted` with the shortest traversal from `start` to `end`.

    Only nodes with `room` free tokens that are not in `avoid`.  `measured` round trips (seconds, by pair of nodes in
    either order; `END` names the two ends) go before the coordinates' prediction.  With a `jitter_seed`, one client of
    many with the same snapshot does not choose as the others: costs are disturbed by some percent (the reported
    seconds are not) and a node's last places are often left to others; the same seed chooses the same.  Raises
    MissingBlocks.
    """
    everyone = CandidateTable.of(candidates)
    full = everyone.free_tokens < room
    banned = np.isin(everyone.nodes, list(avoid)) if avoid else np.zeros_like(full)
    overlaps = (everyone.start < wanted.end) & (wanted.start < everyone.end)
    allowed = overlaps & ~full & ~banned
    usable = everyone.only(allowed)
    _require_all(everyone, usable, wanted, full, banned)
    if jitter_seed is not None:
        left_to_others = everyone.only(allowed & _has_place(everyone.free_tokens // max(room, 1), jitter_seed))
        usable = usable if _gaps(left_to_others, wanted) else left_to_others
    graph = _Graph(usable, wanted, as_points([start, end]), measured or {})
    path = _without_returns(graph.disturbed(jitter_seed))
    return Route(graph.hops(path), graph.seconds(path))


def worth_changing(current_s: float, best_s: float, *, change_s: float, rounds_left: float) -> bool:
    """Whether a traversal of `best_s` instead of `current_s` repays `change_s` in the rounds that are left."""
    return best_s < (1 - LEAST_GAIN) * current_s and (current_s - best_s) * rounds_left > change_s


def _has_place(places: Ints, seed: int) -> Mask:
    """Where so many `places` are left, whether a client with this seed is one of those that try to get one."""
    # Not the stream that `disturbed` draws from.
    random = np.random.default_rng([seed, 1]).random(len(places))
    return random * (places + RIVALS) < places


class _Graph:
    """The candidates of one search; everything below speaks of nodes and blocks by index."""

    def __init__(
        self, field: CandidateTable, wanted: Span, ends: Floats, measured: Mapping[tuple[str, str], float]
    ) -> None:
        self.field, self.wanted = field, wanted
        blocks = np.arange(wanted.start, wanted.end)[:, None]
        self.serves: Mask = (field.start <= blocks) & (blocks < field.end)
        self.block_s, self.hop_s = field.block_s, field.hop_s
        self.first_s, self.last_s = distances(ends, field.points) / 2
        index = {str(name): i for i, name in enumerate(field.nodes)} if measured else {}
        pairs: dict[tuple[int, int], float] = {}
        for (one, other), rtt_s in measured.items():
            if one == END and other in index:
                self.first_s[index[other]] = rtt_s / 2
            elif other == END and one in index:
                self.last_s[index[one]] = rtt_s / 2
            elif one in index and other in index:
                pairs[index[one], index[other]] = pairs[index[other], index[one]] = rtt_s / 2
        self.pairs: Ints = np.array(list(pairs), np.int64).reshape(len(pairs), 2)
        self.pair_s: Floats = np.array(list(pairs.values()), np.float64)

    def disturbed(self, seed: int | None) -> "_Graph":
        """A copy whose nodes are all a little slower or faster."""
        if seed is None:
            return self
        made = copy(self)
        factor = 1 + JITTER * np.random.default_rng(seed).uniform(-1, 1, len(self.field.nodes))
        made.block_s, made.hop_s = self.block_s * factor, self.hop_s * factor
        made.first_s, made.last_s = self.first_s * factor, self.last_s * factor
        return made

    def between(self, ones: Ints, others: Ints) -> Floats:
        """One way between each of `ones` and each of `others`, seconds [ones, others]; never from a node to itself."""
        way = distances(self.field.points[ones], self.field.points[others])
        way /= 2
        row = np.full(len(self.field.nodes), -1)
        column = row.copy()
        row[ones], column[others] = np.arange(len(ones)), np.arange(len(others))
        if len(self.pairs):
            known = (row[self.pairs[:, 0]] >= 0) & (column[self.pairs[:, 1]] >= 0)
            way[row[self.pairs[known, 0]], column[self.pairs[known, 1]]] = self.pair_s[known]
        same = column[ones] >= 0
        way[row[ones[same]], column[ones[same]]] = np.inf
        return way

    def seconds(self, path: list[int]) -> float:
        """One traversal of a path: the node of every block."""
        total = float(self.first_s[path[0]] + self.hop_s[path[0]] + self.last_s[path[-1]])
        for one, other in pairwise(path):
            if one != other:
                total += float(self.between(np.array([one]), np.array([other]))[0, 0] + self.hop_s[other])
        return total + float(self.block_s[path].sum())

    def hops(self, path: list[int]) -> tuple[tuple[str, Span], ...]:
        return tuple(
            (str(self.field.nodes[node]), Span(self.wanted.start + begin, self.wanted.start + end))
            for node, begin, end in _runs(path)
        )


def _shortest(graph: _Graph, serves: Mask) -> tuple[float, list[int]] | None:
    """The cheapest node of every block where `serves` bool [blocks, nodes] allows it, and the cost; None: no way."""
    cost = np.full(serves.shape[1], np.inf)
    came_from: list[tuple[Ints, Ints]] = []
    for block, row in enumerate(serves):
        here = np.flatnonzero(row)
        parent, arrived = _arrivals(graph, block, cost, here)
        cost = np.full(serves.shape[1], np.inf)
        cost[here] = arrived + graph.block_s[here]
        came_from.append((here, parent))
        if np.isinf(cost).all():
            return None
    cost = cost + graph.last_s
    path = [int(cost.argmin())]
    for here, parent in reversed(came_from[1:]):
        path.append(int(parent[np.searchsorted(here, path[-1])]))
    return float(cost.min()), path[::-1]


def _arrivals(graph: _Graph, block: int, cost: Floats, here: Ints) -> tuple[Ints, Floats]:
    """For each node of `here`: the node of the block before, and the seconds until it may compute `block`."""
    if block == 0:
        return here, graph.first_s[here] + graph.hop_s[here]
    parent, arrived = here.copy(), cost[here]
    previous = np.flatnonzero(np.isfinite(cost))
    if len(previous) > PREDECESSORS:
        previous = previous[np.argpartition(cost[previous], PREDECESSORS)[:PREDECESSORS]]
    # Entering costs at least this; most nodes that are in the chain already stay in it for less.
    entering = np.flatnonzero(arrived > cost[previous].min() + graph.hop_s[here])
    ways = graph.between(here[entering], previous)
    ways += cost[previous]
    best = ways.argmin(axis=1)
    entered = ways[np.arange(len(entering)), best] + graph.hop_s[here[entering]]
    changes = entered < arrived[entering]
    parent[entering[changes]] = previous[best[changes]]
    arrived[entering[changes]] = entered[changes]
    return parent, arrived


def _without_returns(graph: _Graph) -> list[int]:
    """The cheapest path on which no node is visited twice.

    Where the cheapest one comes back to a node after another computed block x, that node's only visit ends before x,
    starts after x or contains x: three smaller searches, cheapest first.
    """
    found = _shortest(graph, graph.serves)
    assert found, "coverage was checked"
    waiting = [(found[0], 0, found[1], graph.serves)]
    for tried in range(1, BRANCHES):
        _, _, path, serves = waiting[0]
        returned = _first_return(path)
        if returned is None:
            return path
        heapq.heappop(waiting)
        node, block = returned
        ends_before, starts_after, contains = serves.copy(), serves.copy(), serves.copy()
        ends_before[block:, node] = False
        starts_after[: block + 1, node] = False
        contains[block] = False
        contains[block, node] = True
        for way, branch in enumerate((ends_before, starts_after, contains)):
            if found := _shortest(graph, branch):
                heapq.heappush(waiting, (found[0], 3 * tried + way, found[1], branch))
    return _merged(waiting[0][2])


def _first_return(path: list[int]) -> tuple[int, int] | None:
    """The first node that is visited again, and the first block that another computed in between."""
    left: dict[int, int] = {}
    for node, _, end in _runs(path):
        if node in left:
            return node, left[node]
        left[node] = end
    return None


def _merged(path: list[int]) -> list[int]:
    """The path with every returning node computing all between its visits: its span has no gap."""
    while (returned := _first_return(path)) is not None:
        node, _ = returned
        places = [block for block, one in enumerate(path) if one == node]
        path = [node if places[0] <= block <= places[-1] else one for block, one in enumerate(path)]
    return path


def _runs(path: Sequence[int]) -> Iterable[tuple[int, int, int]]:
    """(node, first block, block after the last) of every visit."""
    begin = 0
    for block in range(1, len(path) + 1):
        if block == len(path) or path[block] != path[begin]:
            yield path[begin], begin, block
            begin = block


def _require_all(everyone: CandidateTable, usable: CandidateTable, wanted: Span, full: Mask, banned: Mask) -> None:
    """Raise MissingBlocks with the reason unless `usable` covers `wanted`."""
    gaps = _gaps(usable, wanted)
    if not gaps:
        return
    if unserved := _gaps(everyone, wanted):
        raise MissingBlocks.of(unserved)
    serves = np.logical_or.reduce([(everyone.start < gap.end) & (gap.start < everyone.end) for gap in gaps])
    refused, failed = (serves & full & ~banned).sum(), (serves & banned).sum()
    raise MissingBlocks(
        f"blocks {', '.join(map(str, gaps))} are served only by nodes that are full ({refused}) or failed lately "
        f"({failed}): try again in a minute, ask for fewer tokens, or start `swarm-node MODEL --blocks {gaps[0]}`"
    )


def _gaps(candidates: CandidateTable, wanted: Span) -> list[Span]:
    """The parts of `wanted` that no candidate serves."""
    edges = np.zeros(len(wanted) + 1, np.int64)
    inside = (candidates.start < wanted.end) & (wanted.start < candidates.end)
    np.add.at(edges, np.maximum(candidates.start[inside], wanted.start) - wanted.start, 1)
    np.add.at(edges, np.minimum(candidates.end[inside], wanted.end) - wanted.start, -1)
    path = (edges.cumsum()[:-1] > 0).astype(int).tolist()
    return [Span(wanted.start + begin, wanted.start + end) for served, begin, end in _runs(path) if not served]

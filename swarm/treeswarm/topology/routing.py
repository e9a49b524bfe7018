"""Which chain of nodes answers soonest.  Pure.

One traversal goes start → hop → … → hop → end.  It takes half a round trip per link, and at every hop the queue and
overhead once and the compute time of each block.  Every node may compute any part of its span, once and without a gap.

A dynamic programme goes from block to block; its state is the node that computed the last one.  It is exact while at
most `PREDECESSORS` nodes serve a block.  Beyond that a block's nodes are entered only from the `PREDECESSORS` cheapest
nodes of the block before; going on at the same node is never cut.  A chain must not leave a node and come back to it.
The search branches where the cheapest one does; that too is exact, up to `BRANCHES` branches.
"""

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from treeswarm.errors import MissingBlocks
from treeswarm.protocol.spans import Span
from treeswarm.topology.coordinates import Coordinate, as_points, distances
from treeswarm.topology.tables import Floats, Ints, Mask, NodeTable

# For 10,000 nodes, some 1,500 per block: 47 ms with 32, 145 ms with 64 (larger arrays leave the cache), 2.5 s without a
# cut; all chains were the same, even with 8 (2026-11-21, EPYC Zen 3, CPU time).
PREDECESSORS = 32
# A chain that visits a node twice is rare.  The search for one without such visits tries this many branches; if it
# finds none, the visits are merged.
BRANCHES = 64
# Share by which a client disturbs costs at random.  Replicas that are equal differ by less than this in a snapshot, and
# clients must not all choose the same one.
JITTER = 0.05
# A place is room for one more session of the size asked for.  With one place left on a node, one in 1 + RIVALS clients
# tries for it: the others would find it taken.  Of 100 clients over 1,000 simulated nodes 19 % failed at first without
# this, 5 % with it, for chains 1 % slower (2026-11-21).
RIVALS = 3
# Estimates are off by some percent: a route must gain this share to be worth leaving a working one.
LEAST_GAIN = 0.1
# Stands for the start and the end of the chain, usually both the client, in `measured`: (END, node) is from the start
# to a node, (node, END) from a node to the end.
END = ""


@dataclass(frozen=True)
class Candidate:
    """What a snapshot says of one node."""

    node: str
    """Id of the node."""
    span: Span
    block_s: float
    """Seconds per block for the rows of one traversal."""
    hop_s: float
    """Seconds per visit for queue and overhead."""
    free_tokens: int
    """Number of tokens that the node's KV cache has room for."""
    coordinate: Coordinate


@dataclass(frozen=True, eq=False)
class CandidateTable(NodeTable):
    """Candidates as arrays; the fields that `Candidate` has too mean the same."""

    block_s: Floats
    hop_s: Floats
    free_tokens: Ints
    points: Floats
    """Coordinates, float64 [nodes, 3], as `coordinates.as_points` makes them."""

    @classmethod
    def of(cls, candidates: "CandidateTable | Sequence[Candidate]") -> "CandidateTable":
        """Return `candidates` as a table; a table is returned as it is."""
        if isinstance(candidates, CandidateTable):
            return candidates
        return cls(
            np.array([candidate.node for candidate in candidates], np.str_),
            np.array([candidate.span.start for candidate in candidates], np.int64),
            np.array([candidate.span.end for candidate in candidates], np.int64),
            np.array([candidate.block_s for candidate in candidates], np.float64),
            np.array([candidate.hop_s for candidate in candidates], np.float64),
            np.array([candidate.free_tokens for candidate in candidates], np.int64),
            as_points(candidate.coordinate for candidate in candidates),
        )


@dataclass(frozen=True)
class Route:
    """A chain: what `fastest_chain` found."""

    hops: tuple[tuple[str, Span], ...]
    """Ids of the nodes in order, each with the part of its span to use."""
    seconds: float
    """Predicted seconds of one traversal."""


def fastest_chain(
    candidates: CandidateTable | Sequence[Candidate],
    span: Span,
    start: Coordinate,
    end: Coordinate,
    *,
    room: int,
    avoid: Collection[str] = (),
    last_resort: Collection[str] = (),
    measured: Mapping[tuple[str, str], float] | None = None,
    jitter_seed: int | None = None,
) -> Route:
    """Return the chain over the blocks of `span` with the shortest traversal from `start` to `end`.

    Only nodes with `room` free tokens that are not in `avoid` are used; those that are in `last_resort` too, only for
    blocks that no other node serves.  `measured` round trips (seconds, by pair of
    nodes in either order; `END` names the two ends) take precedence over what the coordinates predict.

    With a `jitter_seed`, one client of many with the same snapshot chooses differently from the others; the same seed
    chooses the same.  Costs are disturbed by some percent (the reported seconds are not).  A node that has room for
    only a few more such sessions is often left to other clients.

    Raises MissingBlocks.
    """
    table = CandidateTable.of(candidates)
    full = table.free_tokens < room
    banned = np.isin(table.nodes, list(avoid)) if avoid else np.zeros_like(full)
    allowed = table.overlapping(span) & ~full & ~banned
    if last_resort and (unserved := _gaps(table.select(allowed), span)):
        needed = np.logical_or.reduce([table.overlapping(gap) for gap in unserved])
        allowed |= needed & ~full & np.isin(table.nodes, list(last_resort))
    usable = table.select(allowed)
    _require_all(table, usable, span, full, banned)
    if jitter_seed is not None:
        tried = table.select(allowed & _tries_for_place(table.free_tokens // max(room, 1), jitter_seed))
        usable = usable if _gaps(tried, span) else tried
    graph = _Graph(usable, span, as_points([start, end]), measured or {})
    path = _without_returns(graph.disturbed(jitter_seed))
    return Route(graph.hops(path), graph.seconds(path))


def worth_changing(current_s: float, best_s: float, *, change_s: float, rounds_left: float) -> bool:
    """Return whether a traversal of `best_s` seconds instead of `current_s` repays the `change_s` seconds that changing
    the route takes, in the rounds that are left."""
    return best_s < (1 - LEAST_GAIN) * current_s and (current_s - best_s) * rounds_left > change_s


def _tries_for_place(places: Ints, seed: int) -> Mask:
    """Return for each node whether a client with this seed tries to open a session there, bool [nodes].

    `places` is the number of sessions that each node has room for.
    """
    # This must not be the stream of random numbers that `disturbed` draws from.
    random = np.random.default_rng([seed, 1]).random(len(places))
    return random * (places + RIVALS) < places


class _Graph:
    """The candidates of one search.

    From here on a node is its index in the table, and a block its index in the span.
    """

    def __init__(
        self, table: CandidateTable, span: Span, ends: Floats, measured: Mapping[tuple[str, str], float]
    ) -> None:
        self.table, self.span = table, span
        blocks = np.arange(span.start, span.end)[:, None]
        self.serves: Mask = (table.start <= blocks) & (blocks < table.end)
        self.block_s, self.hop_s = table.block_s, table.hop_s
        self.first_s, self.last_s = distances(ends, table.points) / 2
        index = {str(name): i for i, name in enumerate(table.nodes)} if measured else {}
        pairs: dict[tuple[int, int], float] = {}
        for (a, b), rtt_s in measured.items():
            if a == END and b in index:
                self.first_s[index[b]] = rtt_s / 2
            elif b == END and a in index:
                self.last_s[index[a]] = rtt_s / 2
            elif a in index and b in index:
                pairs[index[a], index[b]] = pairs[index[b], index[a]] = rtt_s / 2
        self.pairs: Ints = np.array(list(pairs), np.int64).reshape(len(pairs), 2)
        self.pair_s: Floats = np.array(list(pairs.values()), np.float64)

    def disturbed(self, seed: int | None) -> "_Graph":
        """Return a copy whose nodes are all a little slower or faster; this graph if there is no seed."""
        if seed is None:
            return self
        graph = copy(self)
        factor = 1 + JITTER * np.random.default_rng(seed).uniform(-1, 1, len(self.table.nodes))
        graph.block_s, graph.hop_s = self.block_s * factor, self.hop_s * factor
        graph.first_s, graph.last_s = self.first_s * factor, self.last_s * factor
        return graph

    def between(self, senders: Ints, receivers: Ints) -> Floats:
        """Return the seconds from each of `senders` to each of `receivers`, float64 [senders, receivers].

        They are infinite from a node to itself.  A path by way of another node is at least as long as the direct one:
        what is measured to two nodes says how near to each other they can be, whatever the coordinates predict.
        Without this, two replicas would share a span that each of them serves alone, only because one seems to be
        nearer to an end of the chain than the other one.
        """
        one_way = distances(self.table.points[senders], self.table.points[receivers])
        one_way /= 2
        for to_end in (self.first_s, self.last_s):
            apart = np.subtract.outer(to_end[senders], to_end[receivers])
            np.maximum(one_way, np.abs(apart, out=apart), out=one_way)
        row = np.full(len(self.table.nodes), -1)
        column = row.copy()
        row[senders], column[receivers] = np.arange(len(senders)), np.arange(len(receivers))
        if len(self.pairs):
            here = (row[self.pairs[:, 0]] >= 0) & (column[self.pairs[:, 1]] >= 0)
            one_way[row[self.pairs[here, 0]], column[self.pairs[here, 1]]] = self.pair_s[here]
        same = column[senders] >= 0
        one_way[row[senders[same]], column[senders[same]]] = np.inf
        return one_way

    def seconds(self, path: list[int]) -> float:
        """Return the seconds of one traversal of `path`, which lists the node of every block."""
        total = float(self.first_s[path[0]] + self.hop_s[path[0]] + self.last_s[path[-1]])
        for node, following in pairwise(path):
            if node != following:
                total += float(self.between(np.array([node]), np.array([following]))[0, 0] + self.hop_s[following])
        return total + float(self.block_s[path].sum())

    def hops(self, path: list[int]) -> tuple[tuple[str, Span], ...]:
        """Return the id and the blocks of every visit of `path`, in order."""
        return tuple(
            (str(self.table.nodes[node]), Span(self.span.start + begin, self.span.start + end))
            for node, begin, end in _runs(path)
        )


def _shortest(graph: _Graph, serves: Mask) -> tuple[float, list[int]] | None:
    """Return the cost in seconds of the cheapest path that `serves`, bool [blocks, nodes], allows, and that path.

    A path lists the node of every block.  Returns None if no path is allowed.
    """
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
    """Return for each node of `here` the node of the block before, and the seconds until it may compute `block`."""
    if block == 0:
        return here, graph.first_s[here] + graph.hop_s[here]
    parent, arrived = here.copy(), cost[here]
    previous = np.flatnonzero(np.isfinite(cost))
    if len(previous) > PREDECESSORS:
        previous = previous[np.argpartition(cost[previous], PREDECESSORS)[:PREDECESSORS]]
    # Entering a node costs at least this; most nodes that computed the block before go on for less.
    entering = np.flatnonzero(arrived > cost[previous].min() + graph.hop_s[here])
    costs = graph.between(here[entering], previous)
    costs += cost[previous]
    best = costs.argmin(axis=1)
    entered = costs[np.arange(len(entering)), best] + graph.hop_s[here[entering]]
    changes = entered < arrived[entering]
    parent[entering[changes]] = previous[best[changes]]
    arrived[entering[changes]] = entered[changes]
    return parent, arrived


def _without_returns(graph: _Graph) -> list[int]:
    """Return the cheapest path on which no node is visited twice.

    If the cheapest path comes back to a node after another one computed block x, the node's only visit must end before
    x, start after x or contain x.  Those are three smaller searches; the cheapest result is looked at first.
    """
    shortest = _shortest(graph, graph.serves)
    assert shortest, "coverage was checked"
    waiting = [(shortest[0], 0, shortest[1], graph.serves)]
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
        for number, branch in enumerate((ends_before, starts_after, contains)):
            if shortest := _shortest(graph, branch):
                heapq.heappush(waiting, (shortest[0], 3 * tried + number, shortest[1], branch))
    return _merged(waiting[0][2])


def _first_return(path: list[int]) -> tuple[int, int] | None:
    """Return the first node that is visited again and the first block that another node computes in between."""
    left: dict[int, int] = {}
    for node, _, end in _runs(path):
        if node in left:
            return node, left[node]
        left[node] = end
    return None


def _merged(path: list[int]) -> list[int]:
    """Return the path with every node that is visited twice computing the blocks between its visits as well.

    The node serves them: a span has no gap.
    """
    while (returned := _first_return(path)) is not None:
        node, _ = returned
        visited = [block for block, visitor in enumerate(path) if visitor == node]
        path = [node if visited[0] <= block <= visited[-1] else visitor for block, visitor in enumerate(path)]
    return path


def _runs(path: Sequence[int]) -> Iterable[tuple[int, int, int]]:
    """Yield (node, first block, block after the last) of every visit: a run of equal entries of `path`."""
    begin = 0
    for block in range(1, len(path) + 1):
        if block == len(path) or path[block] != path[begin]:
            yield path[begin], begin, block
            begin = block


def _require_all(table: CandidateTable, usable: CandidateTable, span: Span, full: Mask, banned: Mask) -> None:
    """Raise MissingBlocks with the reason unless `usable` covers `span`."""
    gaps = _gaps(usable, span)
    if not gaps:
        return
    if unserved := _gaps(table, span):
        raise MissingBlocks.of(unserved)
    serves = np.logical_or.reduce([table.overlapping(gap) for gap in gaps])
    counts = {"are full": (serves & full & ~banned).sum(), "failed lately": (serves & banned).sum()}
    reasons = " or ".join(f"{reason} ({count})" for reason, count in counts.items() if count)
    fewer = "ask for fewer tokens, " if counts["are full"] else ""
    raise MissingBlocks(
        f"blocks {', '.join(map(str, gaps))} are served only by nodes that {reasons}: "
        f"try again in a minute, {fewer}or start `swarm-node MODEL --blocks {gaps[0]}`"
    )


def _gaps(candidates: CandidateTable, span: Span) -> list[Span]:
    """Return the parts of `span` that no candidate serves."""
    edges = np.zeros(len(span) + 1, np.int64)
    inside = candidates.overlapping(span)
    np.add.at(edges, np.maximum(candidates.start[inside], span.start) - span.start, 1)
    np.add.at(edges, np.minimum(candidates.end[inside], span.end) - span.start, -1)
    served = (edges.cumsum()[:-1] > 0).astype(int).tolist()
    return [Span(span.start + begin, span.start + end) for is_served, begin, end in _runs(served) if not is_served]

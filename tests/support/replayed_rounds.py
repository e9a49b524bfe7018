"""A world on exact virtual time for planners: links, nodes, a drafter and a target, all seeded; a planner sees only
what a client would see."""

import heapq
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.messages import HopTiming, Profile
from treeswarm_client.drafters.seam import DraftTree
from treeswarm_client.planner.costs import ChainHop
from treeswarm_client.planner.planner import Planner

LARGEST = 256
RECORDED = 48
CHILDREN = 8
ROW_BYTES = 8192
SEGMENT_ROWS = 128
LEVEL_S = 0.0015
"""One level of drafting."""


@dataclass(frozen=True)
class Cell:
    """One kind of links and nodes."""

    delay_s: float
    bytes_per_s: float
    slow: float = 1.0
    """How much slower the middle node is."""


CELLS = {
    "1 ms, 1 Gbit/s": Cell(0.001, 125e6),
    "25 ms, 100 Mbit/s": Cell(0.025, 12.5e6),
    "50 ms, 20 Mbit/s": Cell(0.050, 2.5e6),
    "100 ms, 100 Mbit/s": Cell(0.100, 12.5e6),
    "25 ms, 100 Mbit/s, one node 4 times slower": Cell(0.025, 12.5e6, 4.0),
}
AGREEMENT = {
    "good": (0.9, 0.9),
    "poor": (0.35, 0.35),
    "zero": (0.0, 0.0),
    "good, then zero": (0.9, 0.0),
    "zero, then good": (0.0, 0.9),
}
"""How often the target says something the draft thinks of, in the first and in the second half of a text."""
TABLE = np.array([[1, 16, 64, 256], [0.004, 0.005, 0.009, 0.026]])
"""A node's forward: rows, seconds."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """A tree as a drafter once grew it, and its own conditional probabilities."""

    tree: DraftTree
    conditional: NDArray[np.float64]
    depth: NDArray[np.int64]
    children: list[list[int]]
    """Of the root (place 0), then of every node."""

    def walk(self, agreement: float, rng: np.random.Generator) -> list[int]:
        """The nodes of one path of a target that agrees so often, as deep as the record goes."""
        path, place = [], 0
        while self.children[place] and rng.random() < agreement:
            below = self.children[place]
            chosen = np.flatnonzero(rng.random() < np.cumsum(self.conditional[below]))
            if not len(chosen):
                break
            path.append(below[int(chosen[0])])
            place = path[-1] + 1
        return path


@cache
def recorded() -> list[Recorded]:
    """The best nodes of some seeded trees."""
    return [_record(np.random.default_rng(seed)) for seed in range(RECORDED)]


def _record(rng: np.random.Generator) -> Recorded:
    parents: list[int] = []
    conditional: list[float] = []
    scores: list[float] = []
    waiting: list[tuple[float, int, int, float]] = []
    made = 0

    def offer(parent: int, score: float) -> None:
        nonlocal made
        sure = rng.beta(1.2, 0.6)  # often sure of one token, sometimes of none
        rest = rng.dirichlet(np.full(CHILDREN, 0.5)) * (1 - sure)
        for share in sorted([sure + rest[0], *rest[1:]], reverse=True):
            made += 1
            heapq.heappush(waiting, (-(score + float(np.log(share + 1e-6))), made, parent, float(share)))

    offer(-1, 0.0)
    while len(parents) < LARGEST:
        negative, _, parent, share = heapq.heappop(waiting)
        parents.append(parent)
        conditional.append(share)
        scores.append(min(0.0, -negative))
        offer(len(parents) - 1, scores[-1])
    children: list[list[int]] = [[] for _ in range(LARGEST + 1)]
    depth = np.zeros(LARGEST, np.int64)
    for node, parent in enumerate(parents):
        children[parent + 1].append(node)
        depth[node] = depth[parent] + 1 if parent >= 0 else 0
    tree = DraftTree(np.array(parents), np.arange(LARGEST), np.minimum.accumulate(np.array(scores, np.float32)))
    return Recorded(tree, np.array(conditional), depth, children)


@dataclass(eq=False)
class World:
    """Three nodes in a row and the client, on a clock of its own."""

    cell: Cell
    agreement: tuple[float, float]
    tokens: int
    seed: int = 0
    now: float = 0.0
    said: int = 0
    chances: np.random.Generator = field(init=False)
    noise: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.chances, self.noise = np.random.default_rng(self.seed), np.random.default_rng(self.seed + 1)

    @property
    def profiles(self) -> list[Profile]:
        """As measured on one good day."""
        rng = np.random.default_rng(self.seed + 2)
        return [
            tuple((int(r), int(1e6 * s * slow * rng.uniform(0.8, 1.2))) for r, s in TABLE.T)
            for slow in (1.0, self.cell.slow, 1.0)
        ]

    def draft(self, size: int) -> tuple[Recorded, DraftTree, float]:
        """Grow the tree of this place in the text; the time is gone."""
        found = recorded()[int(self.chances.integers(RECORDED))]
        tree = found.tree
        cut = DraftTree(tree.parents[:size], tree.tokens[:size], tree.scores[:size])
        seconds = LEVEL_S * (int(found.depth[:size].max()) + 1) * self.noise.uniform(0.9, 1.3) if size else 0.0
        self.now += seconds
        return found, cut, seconds

    def outcome(self, found: Recorded, shipped: int) -> NDArray[np.bool_]:
        """Which of the shipped nodes the target's own text passes."""
        half = 0 if self.said < self.tokens / 2 else 1
        path = found.walk(self.agreement[half], self.chances)
        on_path = np.zeros(shipped, np.bool_)
        on_path[[node for node in path if node < shipped]] = True
        self.said += 1 + int(on_path.sum())
        return on_path

    def traverse(self, rows: int) -> tuple[list[int], float, list[list[HopTiming]]]:
        """Segments through links and nodes, each busy with one at a time; the time is gone."""
        segments = [min(SEGMENT_ROWS, rows - start) for start in range(0, rows, SEGMENT_ROWS)]
        link_free, node_free = [0.0] * 4, [0.0] * 3
        timings, end = [], 0.0
        for count in segments:
            at, hops = 0.0, []
            for place in range(4):
                size = count * (ROW_BYTES if 0 < place < 3 else 24)
                at = max(at, link_free[place]) + size / self.cell.bytes_per_s
                link_free[place] = at
                at += self.cell.delay_s * float(self.noise.lognormal(0.0, 0.05))
                at += 0.08 if self.noise.random() < 0.005 else 0.0  # a late packet now and then
                if place < 3:
                    queue_s = max(0.0, node_free[place] - at)
                    slow = self.cell.slow if place == 1 else 1.0
                    compute_s = float(np.interp(count, *TABLE)) * slow * float(self.noise.lognormal(0.0, 0.05))
                    at = node_free[place] = at + queue_s + compute_s
                    hops.append(HopTiming(int(1e6 * queue_s), int(1e6 * compute_s), count, 1))
            timings.append(hops)
            end = max(end, at)
        self.now += end
        return segments, end, timings


def fixed(cell: Cell, agreement: tuple[float, float], tokens: int, size: int, seed: int = 0) -> float:
    """Tokens a second with one size of tree in every round."""
    world = World(cell, agreement, tokens, seed)
    while world.said < tokens:
        found, tree, _ = world.draft(size)
        world.traverse(1 + len(tree))
        world.outcome(found, len(tree))
    return world.said / world.now


def automatic(
    cell: Cell, agreement: tuple[float, float], tokens: int, seed: int = 0, planner: Planner | None = None
) -> tuple[float, list[int]]:
    """The same with a planner, by default one that starts from nothing; and the sizes it chose."""
    world = World(cell, agreement, tokens, seed)
    planner = planner or Planner()
    hops = [ChainHop(f"node{i}", profile) for i, profile in enumerate(world.profiles)]
    planner.begin(hops, row_bytes=ROW_BYTES, segment_rows=SEGMENT_ROWS)
    planner.learn_traversal(*world.traverse(24), prefill=True)
    world.now = 0.0
    sizes = []
    while world.said < tokens:
        found, tree, seconds = world.draft(planner.wish(LARGEST))
        planner.drafted(tree, seconds)
        size = planner.choose(tree, LARGEST).size if len(tree) else planner.plain().size
        planner.learn_traversal(*world.traverse(1 + size))
        shipped = DraftTree(tree.parents[:size], tree.tokens[:size], tree.scores[:size])
        planner.learn_walk(shipped, np.flatnonzero(world.outcome(found, size)).tolist(), -1)
        sizes.append(size)
    return world.said / world.now, sizes

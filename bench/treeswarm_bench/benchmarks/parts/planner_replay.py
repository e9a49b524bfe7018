"""Simulates links, nodes, a drafter and a target on exact virtual time, so that a tree policy can be replayed.

Everything is seeded, and the policy sees only what a client would see.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.messages import HopTiming, Profile
from treeswarm.session.walk import Walk
from treeswarm_client.drafters.seam import NO_TREE, DraftTree
from treeswarm_client.planner.costs import ChainHop
from treeswarm_client.planner.explain import RoundReport
from treeswarm_client.planner.policy import AutoPolicy, PlannerMemory, Round, TreePolicy

LARGEST = 256
RECORDED = 48
CHILDREN = 8
ROW_BYTES = 8192
SEGMENT_ROWS = 128
LEVEL_S = 0.0015
"""Seconds of one level of drafting."""


@dataclass(frozen=True)
class ReplayCell:
    """One kind of links and nodes."""

    delay_s: float
    """Seconds that a link delays a message, one way."""
    bytes_per_s: float
    slow: float = 1.0
    """Factor by which the middle node is slower than the others."""


CELLS = {
    "1 ms, 1 Gbit/s": ReplayCell(0.001, 125e6),
    "25 ms, 100 Mbit/s": ReplayCell(0.025, 12.5e6),
    "50 ms, 20 Mbit/s": ReplayCell(0.050, 2.5e6),
    "100 ms, 100 Mbit/s": ReplayCell(0.100, 12.5e6),
    "25 ms, 100 Mbit/s, one node 4 times slower": ReplayCell(0.025, 12.5e6, 4.0),
}
AGREEMENT = {
    "good": (0.9, 0.9),
    "poor": (0.35, 0.35),
    "zero": (0.0, 0.0),
    "good, then zero": (0.9, 0.0),
    "zero, then good": (0.0, 0.9),
}
"""Chance that the target's token is one that the draft considers, in the first and in the second half of a text."""
TABLE = np.array([[1, 16, 64, 256], [0.004, 0.005, 0.009, 0.026]])
"""A node's forward: rows, seconds."""


@dataclass(frozen=True, eq=False)
class RecordedTree:
    """A tree as a drafter once grew it, with the drafter's own conditional probabilities."""

    tree: DraftTree
    conditional: NDArray[np.float64]
    """Probability of each node given its parent, float64 [n]."""
    depth: NDArray[np.int64]
    """Number of nodes between the root and each node, int64 [n]."""
    children: list[list[int]]
    """Children of the root (place 0), then of every node (place node + 1)."""

    def walk(self, agreement: float, rng: np.random.Generator) -> list[int]:
        """Return the nodes of one path of a target that agrees with chance `agreement`, as deep as the record goes."""
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
def recorded_trees() -> list[RecordedTree]:
    """Return the best nodes of some seeded trees."""
    return [_record(np.random.default_rng(seed)) for seed in range(RECORDED)]


def _record(rng: np.random.Generator) -> RecordedTree:
    parents: list[int] = []
    conditional: list[float] = []
    scores: list[float] = []
    candidates: list[tuple[float, int, int, float]] = []
    offered = 0

    def offer_children(parent: int, score: float) -> None:
        nonlocal offered
        best = rng.beta(1.2, 0.6)  # often sure of one token, sometimes of none
        rest = rng.dirichlet(np.full(CHILDREN, 0.5)) * (1 - best)
        for share in sorted([best + rest[0], *rest[1:]], reverse=True):
            offered += 1
            heapq.heappush(candidates, (-(score + float(np.log(share + 1e-6))), offered, parent, float(share)))

    offer_children(-1, 0.0)
    while len(parents) < LARGEST:
        negative, _, parent, share = heapq.heappop(candidates)
        parents.append(parent)
        conditional.append(share)
        scores.append(min(0.0, -negative))
        offer_children(len(parents) - 1, scores[-1])
    children: list[list[int]] = [[] for _ in range(LARGEST + 1)]
    depth = np.zeros(LARGEST, np.int64)
    for node, parent in enumerate(parents):
        children[parent + 1].append(node)
        depth[node] = depth[parent] + 1 if parent >= 0 else 0
    tree = DraftTree(np.array(parents), np.arange(LARGEST), np.minimum.accumulate(np.array(scores, np.float32)))
    return RecordedTree(tree, np.array(conditional), depth, children)


@dataclass(eq=False)
class SimulatedChain:
    """A client and three nodes in a row, on a clock of their own."""

    cell: ReplayCell
    agreement: tuple[float, float]
    tokens: int
    """Number of tokens of the text."""
    seed: int = 0
    now: float = 0.0
    draft_s: float = 0.0
    """Seconds since drafting for the present round began; what a policy reads as its clock."""
    committed: int = 0
    chances: np.random.Generator = field(init=False)
    noise: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.chances, self.noise = np.random.default_rng(self.seed), np.random.default_rng(self.seed + 1)

    @property
    def profiles(self) -> list[Profile]:
        """Profiles of the nodes, as measured on one good day."""
        rng = np.random.default_rng(self.seed + 2)
        return [
            tuple((int(r), int(1e6 * s * slow * rng.uniform(0.8, 1.2))) for r, s in TABLE.T)
            for slow in (1.0, self.cell.slow, 1.0)
        ]

    @property
    def hops(self) -> list[ChainHop]:
        """The chain, as a policy sees it."""
        return [ChainHop(f"node{i}", profile) for i, profile in enumerate(self.profiles)]

    def policy(self, memory: PlannerMemory) -> AutoPolicy:
        """Return a policy that drafts only before it ships."""
        return AutoPolicy(memory, ROW_BYTES, SEGMENT_ROWS, LARGEST, overlaps=False, clock=lambda: self.draft_s)

    def draft(self, size: int) -> tuple[RecordedTree, DraftTree, float]:
        """Grow the tree of this place in the text, which takes time.  Returns record, tree and seconds."""
        record = recorded_trees()[int(self.chances.integers(RECORDED))]
        seconds = LEVEL_S * (int(record.depth[:size].max()) + 1) * self.noise.uniform(0.9, 1.3) if size else 0.0
        self.now += seconds
        return record, record.tree.best(size), seconds

    def outcome(self, record: RecordedTree, shipped: int) -> NDArray[np.bool_]:
        """Return which of the shipped nodes the target's own text passes, bool [shipped]."""
        half = 0 if self.committed < self.tokens / 2 else 1
        path = record.walk(self.agreement[half], self.chances)
        on_path = np.zeros(shipped, np.bool_)
        on_path[[node for node in path if node < shipped]] = True
        self.committed += 1 + int(on_path.sum())
        return on_path

    def traverse(self, rows: int) -> tuple[list[int], float, list[list[HopTiming]]]:
        """Send segments through links and nodes, each busy with one at a time, which takes time.

        Returns the rows of each segment, seconds, and timings per segment and hop.
        """
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

    def play_round(self, policy: TreePolicy) -> tuple[DraftTree, DraftTree, RoundReport | None]:
        """Play one round as the generation loop does.  Returns the tree drafted, the tree shipped, and the report."""
        nodes = policy.nodes_to_draft()
        self.draft_s = 0.0
        if nodes:
            policy.stop_drafting()
        record, tree, self.draft_s = self.draft(nodes)
        shipped = policy.choose(tree if nodes else NO_TREE)
        size = len(shipped)
        _, seconds, timings = self.traverse(1 + size)
        accepted = tuple(np.flatnonzero(self.outcome(record, size)).tolist())
        finished = Round(shipped, Walk(accepted, -1), size, size, seconds, seconds, timings, unbroken=True)
        return tree, shipped, policy.learn(finished)


def rate_of_fixed_size(
    cell: ReplayCell, agreement: tuple[float, float], tokens: int, size: int, seed: int = 0
) -> float:
    """Return the tokens per second with one size of tree in every round."""
    chain = SimulatedChain(cell, agreement, tokens, seed)
    while chain.committed < tokens:
        record, tree, _ = chain.draft(size)
        chain.traverse(1 + len(tree))
        chain.outcome(record, len(tree))
    return chain.committed / chain.now


def rate_of_planned_sizes(
    cell: ReplayCell,
    agreement: tuple[float, float],
    tokens: int,
    seed: int = 0,
    around: Callable[[AutoPolicy], TreePolicy] = lambda policy: policy,
) -> tuple[float, list[int]]:
    """Return the tokens per second of a policy that starts from nothing, and the sizes that it chose.

    `around` may put something around the policy, such as a stopwatch.
    """
    chain = SimulatedChain(cell, agreement, tokens, seed)
    policy = around(chain.policy(PlannerMemory()))
    policy.begin(chain.hops)
    _, seconds, timings = chain.traverse(24)
    policy.learn_prefill(seconds, timings, unbroken=True)
    chain.now = 0.0
    sizes = []
    while chain.committed < tokens:
        _, shipped, _ = chain.play_round(policy)
        sizes.append(len(shipped))
    return chain.committed / chain.now, sizes

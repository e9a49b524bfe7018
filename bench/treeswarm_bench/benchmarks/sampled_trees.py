"""Shapes of trees that are sampled from the draft: where the next child is drawn.  Pure: the model is a callback.

Both learn from the children that walks came to, and decide before a draw, never by dropping what was drawn: so the
rejection rule (`rejection.py`) stays exact.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from treeswarm_bench.benchmarks.rejection import ROOT, Probs, SampledTree, Trial, draw_token, without_token

# Trials' worth of trust in what a shape believes before it has seen any.
PRIOR_TRIALS = 4.0
# Siblings told apart by their rank; those behind share the last one's figures.
RANKS = 8
# Edges of the bins of draft probabilities.
CONFIDENCE = np.array([0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9])
# The prior chance of a first child, and what each rank behind it loses: about what a distilled draft shows.
FIRST_CHANCE, RANK_DECAY = 0.6, 0.6
# A forward takes along the nodes that are nearly as likely as the one that needs it; it changes no tree.
NEARLY = 0.5


class Expand(Protocol):
    """A forward of the draft."""

    def __call__(self, nodes: Sequence[int], parents: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float64]:
        """The draft's distributions after some nodes (whose parents it was asked about before), float64 [n, vocab]."""
        ...


class Shape(Protocol):
    """Decides where children are drawn."""

    def grow(self, size: int, root_probs: Probs, expand: Expand, random: np.random.Generator) -> SampledTree:
        """`size` nodes below a root; fewer only where the draft has nothing more to draw."""
        ...

    def updated(self, trials: Sequence[Trial]) -> Self:
        """After a round."""
        ...


def _prior() -> NDArray[np.float64]:
    return np.asarray(FIRST_CHANCE * RANK_DECAY ** np.arange(RANKS), np.float64)


@dataclass(frozen=True, eq=False)
class StaticShape:
    """One shape for all rounds, as SpecInfer's expansions are, but the best one: a node's value is the chance to
    get there if acceptance depends on the ranks along its path alone, and the `size` most valuable nodes make the
    tree (Sequoia, arXiv 2402.12374)."""

    tried: NDArray[np.float64] = field(default_factory=lambda: np.full(RANKS, PRIOR_TRIALS))
    accepted: NDArray[np.float64] = field(default_factory=lambda: PRIOR_TRIALS * _prior())

    def grow(self, size: int, root_probs: Probs, expand: Expand, random: np.random.Generator) -> SampledTree:
        plan_parents = self.plan_parents(size)
        growing = TreeBuilder()
        level = {ROOT: ROOT}
        """Nodes of the plan whose children are drawn now, as they are numbered in the tree."""
        probs = root_probs[None]
        while level:
            drawn: dict[int, int] = {}
            for (node, number), row in zip(level.items(), probs, strict=True):
                growing.begin(number, row)
                for child in np.flatnonzero(plan_parents == node).tolist():
                    if growing.left[number] is not None:
                        drawn[child] = growing.draw_below(number, random)[0]
            level = {child: number for child, number in drawn.items() if (plan_parents == child).any()}
            probs = growing.ask(expand, list(level.values())) if level else root_probs[:0]
        return growing.finished()

    def plan_parents(self, size: int) -> NDArray[np.int64]:
        """Parents of the most valuable nodes, or −1; siblings stand in order."""
        chances = (self.accepted / self.tried).tolist()
        parents: list[int] = []
        heap = [(-chances[0], 0, 1.0, ROOT, 0)]
        """Minus the worth of a child there, a serial number, the chance to come to it, the node above, the rank."""
        while len(parents) < size:
            _, _, reach, above, rank = heapq.heappop(heap)
            chance = chances[min(rank, RANKS - 1)]
            below, beside = reach * chance, reach * (1.0 - chance)
            behind = chances[min(rank + 1, RANKS - 1)]
            heapq.heappush(heap, (-below * chances[0], 2 * len(parents) + 1, below, len(parents), 0))
            heapq.heappush(heap, (-beside * behind, 2 * len(parents) + 2, beside, above, rank + 1))
            parents.append(above)
        return np.array(parents, np.int64)

    def updated(self, trials: Sequence[Trial]) -> "StaticShape":
        tried, accepted = self.tried.copy(), self.accepted.copy()
        for trial in trials:
            tried[min(trial.rank, RANKS - 1)] += 1
            accepted[min(trial.rank, RANKS - 1)] += trial.accepted
        return StaticShape(tried, accepted)


def _confident_prior() -> NDArray[np.float64]:
    return np.repeat(_prior()[:, None], len(CONFIDENCE) + 1, 1)


@dataclass(frozen=True, eq=False)
class BestFirstShape:
    """A shape for each round: the next child is drawn where it is likeliest to be accepted, by what was drawn so far
    (as DySpec, arXiv 2410.11744, which takes the draft's probability for the chance of acceptance; here it is
    calibrated by rank and by that probability)."""

    tried: NDArray[np.float64] = field(default_factory=lambda: np.full((RANKS, len(CONFIDENCE) + 1), PRIOR_TRIALS))
    accepted: NDArray[np.float64] = field(default_factory=lambda: PRIOR_TRIALS * _confident_prior())

    def grow(self, size: int, root_probs: Probs, expand: Expand, random: np.random.Generator) -> SampledTree:
        chances = self.accepted / self.tried
        growing = TreeBuilder()
        growing.begin(ROOT, root_probs)
        reach, rank, unknown = {ROOT: 1.0}, {ROOT: 0}, set[int]()
        heap = [(-1.0, ROOT, True)]
        """Minus the worth of one more child, the node above it, whether that worth is known or only bounded."""
        while heap and len(growing) < size:
            _, node, known = heapq.heappop(heap)
            if node in unknown:
                likely = [n for n in sorted(unknown) if reach[n] >= NEARLY * reach[node]]
                for number, probs in zip(likely, growing.ask(expand, likely), strict=True):
                    growing.begin(number, probs)
                    heapq.heappush(heap, (-reach[number] * _expected(chances, 0, probs), number, True))
                unknown.difference_update(likely)
                continue
            if not known:
                continue
            child, drawn_with = growing.draw_below(node, random)
            chance = float(chances[min(rank[node], RANKS - 1), np.digitize(drawn_with, CONFIDENCE)])
            reach[child], rank[child] = reach[node] * chance, 0
            unknown.add(child)
            heapq.heappush(heap, (-reach[child], child, False))
            reach[node] *= 1.0 - chance
            rank[node] += 1
            if (left := growing.left[node]) is not None:
                heapq.heappush(heap, (-reach[node] * _expected(chances, rank[node], left), node, True))
        return growing.finished()

    def updated(self, trials: Sequence[Trial]) -> "BestFirstShape":
        tried, accepted = self.tried.copy(), self.accepted.copy()
        for trial in trials:
            at = min(trial.rank, RANKS - 1), int(np.digitize(trial.draft_prob, CONFIDENCE))
            tried[at] += 1
            accepted[at] += trial.accepted
        return BestFirstShape(tried, accepted)


def _expected(chances: NDArray[np.float64], rank: int, draft_probs: Probs) -> float:
    """The chance that the next draw will be accepted."""
    mass = np.bincount(np.digitize(draft_probs, CONFIDENCE), draft_probs, len(CONFIDENCE) + 1)
    return float(mass @ chances[min(rank, RANKS - 1)])


class TreeBuilder:
    """A tree under way; nodes are numbered as they are drawn."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._tokens: list[int] = []
        self._draft_probs: dict[int, Probs] = {}
        self.left: dict[int, Probs | None] = {}
        """What the next child of a node is drawn from."""

    def __len__(self) -> int:
        return len(self._tokens)

    def begin(self, node: int, draft_probs: Probs) -> None:
        self._draft_probs[node] = draft_probs
        self.left[node] = draft_probs

    def ask(self, expand: Expand, nodes: list[int]) -> NDArray[np.float64]:
        return expand(nodes, [self._parents[node] for node in nodes], [self._tokens[node] for node in nodes])

    def draw_below(self, node: int, random: np.random.Generator) -> tuple[int, float]:
        """The new child, and the probability that its token was drawn with."""
        left = self.left[node]
        assert left is not None, "nothing is left to draw"
        token = draw_token(left, random)
        self.left[node] = without_token(left, token)
        self._parents.append(node)
        self._tokens.append(token)
        return len(self._tokens) - 1, float(left[token])

    def finished(self) -> SampledTree:
        return SampledTree(np.array(self._parents, np.int64), np.array(self._tokens, np.int64), self._draft_probs)

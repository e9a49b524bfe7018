"""Shapes of trees that are sampled from the draft: where the next child is drawn.

The computation is pure: the model is a callback.  Both shapes learn from the children that walks tried.  They decide
before a draw, and never drop what was drawn, so the rejection rule (`rejection.py`) stays exact.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from treeswarm_bench.benchmarks.sampling.rejection import ROOT, Probs, SampledTree, Trial, draw_token, without_token

# Weight of the prior, in trials, before a shape has seen any.
PRIOR_TRIALS = 4.0
# Number of siblings that are told apart by their rank; later ones share the last one's figures.
RANKS = 8
# Edges of the bins of draft probabilities.
CONFIDENCE = np.array([0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9])
# Prior chance of a first child, and the factor of each rank behind it: about what a distilled draft shows.
FIRST_CHANCE, RANK_DECAY = 0.6, 0.6
# A forward also takes the nodes that are nearly as likely as the one that needs it; the tree stays the same.
NEARLY = 0.5


class Expand(Protocol):
    """A forward of the draft."""

    def __call__(self, nodes: Sequence[int], parents: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float64]:
        """Return the draft's distributions after some nodes, float64 [n, vocab].

        Their parents were expanded before.
        """
        ...


class Shape(Protocol):
    """A rule that decides where children are drawn."""

    def grow(self, size: int, root_probs: Probs, expand: Expand, random: np.random.Generator) -> SampledTree:
        """Return a tree of `size` nodes, or fewer if the draft has nothing more to draw."""
        ...

    def updated(self, trials: Sequence[Trial]) -> Self:
        """Return the shape after it has learned from a round."""
        ...


def _prior() -> NDArray[np.float64]:
    return np.asarray(FIRST_CHANCE * RANK_DECAY ** np.arange(RANKS), np.float64)


@dataclass(frozen=True, eq=False)
class StaticShape:
    """One shape for all rounds, as SpecInfer's expansions are, but the best one.

    A node's value is the chance to reach it if acceptance depends only on the ranks along its path.  The `size` most
    valuable nodes make the tree (Sequoia, arXiv 2402.12374).
    """

    tried: NDArray[np.float64] = field(default_factory=lambda: np.full(RANKS, PRIOR_TRIALS))
    accepted: NDArray[np.float64] = field(default_factory=lambda: PRIOR_TRIALS * _prior())

    def grow(self, size: int, root_probs: Probs, expand: Expand, random: np.random.Generator) -> SampledTree:
        planned = self.plan_parents(size)
        builder = TreeBuilder()
        level = {ROOT: ROOT}
        """The plan's nodes whose children are drawn now, with their numbers in the tree."""
        probs = root_probs[None]
        while level:
            drawn: dict[int, int] = {}
            for (node, number), row in zip(level.items(), probs, strict=True):
                builder.begin(number, row)
                for child in np.flatnonzero(planned == node).tolist():
                    if builder.left[number] is not None:
                        drawn[child] = builder.draw_below(number, random)[0]
            level = {child: number for child, number in drawn.items() if (planned == child).any()}
            probs = builder.expand(expand, list(level.values())) if level else root_probs[:0]
        return builder.tree()

    def plan_parents(self, size: int) -> NDArray[np.int64]:
        """Return the parents of the most valuable nodes, −1 for the root; siblings stand in order."""
        chances = (self.accepted / self.tried).tolist()
        parents: list[int] = []
        heap = [(-chances[0], 0, 1.0, ROOT, 0)]
        """Entries: minus the value of a child there, serial number, chance to reach it, node above, rank."""
        while len(parents) < size:
            _, _, reach, above, rank = heapq.heappop(heap)
            chance = chances[min(rank, RANKS - 1)]
            below, beside = reach * chance, reach * (1.0 - chance)
            next_chance = chances[min(rank + 1, RANKS - 1)]
            heapq.heappush(heap, (-below * chances[0], 2 * len(parents) + 1, below, len(parents), 0))
            heapq.heappush(heap, (-beside * next_chance, 2 * len(parents) + 2, beside, above, rank + 1))
            parents.append(above)
        return np.array(parents, np.int64)

    def updated(self, trials: Sequence[Trial]) -> "StaticShape":
        tried, accepted = self.tried.copy(), self.accepted.copy()
        for trial in trials:
            tried[min(trial.rank, RANKS - 1)] += 1
            accepted[min(trial.rank, RANKS - 1)] += trial.accepted
        return StaticShape(tried, accepted)


def _prior_by_confidence() -> NDArray[np.float64]:
    return np.repeat(_prior()[:, None], len(CONFIDENCE) + 1, 1)


@dataclass(frozen=True, eq=False)
class BestFirstShape:
    """A shape for each round: the next child is drawn where it is most likely to be accepted, given all draws so far.

    DySpec (arXiv 2410.11744) does the same and takes the draft's probability for the chance of acceptance.  Here that
    chance is calibrated by rank and by that probability.
    """

    tried: NDArray[np.float64] = field(default_factory=lambda: np.full((RANKS, len(CONFIDENCE) + 1), PRIOR_TRIALS))
    accepted: NDArray[np.float64] = field(default_factory=lambda: PRIOR_TRIALS * _prior_by_confidence())

    def grow(self, size: int, root_probs: Probs, expand: Expand, random: np.random.Generator) -> SampledTree:
        chances = self.accepted / self.tried
        builder = TreeBuilder()
        builder.begin(ROOT, root_probs)
        reach, rank, unexpanded = {ROOT: 1.0}, {ROOT: 0}, set[int]()
        heap = [(-1.0, ROOT, True)]
        """Entries: minus the value of one more child, node above it, whether that value is exact or only a bound."""
        while heap and len(builder) < size:
            _, node, exact = heapq.heappop(heap)
            if node in unexpanded:
                likely = [n for n in sorted(unexpanded) if reach[n] >= NEARLY * reach[node]]
                for number, probs in zip(likely, builder.expand(expand, likely), strict=True):
                    builder.begin(number, probs)
                    heapq.heappush(heap, (-reach[number] * _next_draw_chance(chances, 0, probs), number, True))
                unexpanded.difference_update(likely)
                continue
            if not exact:
                continue
            child, drawn_with = builder.draw_below(node, random)
            chance = float(chances[min(rank[node], RANKS - 1), np.digitize(drawn_with, CONFIDENCE)])
            reach[child], rank[child] = reach[node] * chance, 0
            unexpanded.add(child)
            heapq.heappush(heap, (-reach[child], child, False))
            reach[node] *= 1.0 - chance
            rank[node] += 1
            if (left := builder.left[node]) is not None:
                heapq.heappush(heap, (-reach[node] * _next_draw_chance(chances, rank[node], left), node, True))
        return builder.tree()

    def updated(self, trials: Sequence[Trial]) -> "BestFirstShape":
        tried, accepted = self.tried.copy(), self.accepted.copy()
        for trial in trials:
            at = min(trial.rank, RANKS - 1), int(np.digitize(trial.draft_prob, CONFIDENCE))
            tried[at] += 1
            accepted[at] += trial.accepted
        return BestFirstShape(tried, accepted)


def _next_draw_chance(chances: NDArray[np.float64], rank: int, draft_probs: Probs) -> float:
    """Return the chance that the next draw will be accepted."""
    mass = np.bincount(np.digitize(draft_probs, CONFIDENCE), draft_probs, len(CONFIDENCE) + 1)
    return float(mass @ chances[min(rank, RANKS - 1)])


class TreeBuilder:
    """A tree that grows; nodes are numbered as they are drawn."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._tokens: list[int] = []
        self._draft_probs: dict[int, Probs] = {}
        self.left: dict[int, Probs | None] = {}
        """Distribution of the next child by node, or None if nothing is left."""

    def __len__(self) -> int:
        return len(self._tokens)

    def begin(self, node: int, draft_probs: Probs) -> None:
        """Set the distribution that a node's children are drawn from."""
        self._draft_probs[node] = draft_probs
        self.left[node] = draft_probs

    def expand(self, expand: Expand, nodes: list[int]) -> NDArray[np.float64]:
        """Return the draft's distributions after some nodes, float64 [n, vocab]."""
        return expand(nodes, [self._parents[node] for node in nodes], [self._tokens[node] for node in nodes])

    def draw_below(self, node: int, random: np.random.Generator) -> tuple[int, float]:
        """Draw a child; return its number and the probability that its token was drawn with."""
        left = self.left[node]
        assert left is not None, "nothing is left to draw"
        token = draw_token(left, random)
        self.left[node] = without_token(left, token)
        self._parents.append(node)
        self._tokens.append(token)
        return len(self._tokens) - 1, float(left[token])

    def tree(self) -> SampledTree:
        """Return what was drawn so far."""
        return SampledTree(np.array(self._parents, np.int64), np.array(self._tokens, np.int64), self._draft_probs)

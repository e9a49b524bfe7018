"""A lattice of guesses for the next positions, made at once, and the tree that it becomes.  Pure.

A kind that guesses a whole block in one pass knows how likely each token is at each position, but not after which
token.  So every path through the best tokens of each position is a candidate, and refining means to correct a token's
score by the tokens before it (arXiv 2404.09221).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm_node.speculator.growth import grow
from treeswarm_node.speculator.guesses import WIDTH
from treeswarm_node.speculator.seam import SpeculatedTree

LEVELS = 8
"""Number of positions that are guessed at once, and so the largest depth of a tree."""
# Number of tokens per position among which a correction chooses.
CANDIDATES = 64


@dataclass(frozen=True, eq=False)
class Lattice:
    """The best tokens of each of the next positions, and the score of all others together."""

    places: NDArray[np.int64]
    """Each candidate's index in the head's vocabulary, best first, int64 [levels, candidates]."""
    tokens: NDArray[np.int64]
    """Token ids of the candidates, int64 [levels, candidates]."""
    scores: NDArray[np.float32]
    """Scores of the candidates, whose softmax over all tokens is their chance, float32 [levels, candidates]."""
    rest: NDArray[np.float32]
    """Log of the summed exponentials of all other tokens' scores, float32 [levels]."""

    @property
    def levels(self) -> int:
        """Number of positions."""
        return len(self.tokens)


class CorrectScores(Protocol):
    """Corrects the scores of candidates by the tokens before them."""

    def __call__(self, levels: NDArray[np.int64], before: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return what to add to the scores of the candidates of n levels, float32 [n, candidates].

        `before` [n, 2] are the two tokens before them, the nearer one last.
        """
        ...


def make_lattice(scores: torch.Tensor, vocabulary: torch.Tensor) -> Lattice:
    """Return the lattice of scores [levels, tokens] of the tokens of a vocabulary."""
    count = min(CANDIDATES, scores.shape[-1])
    best = scores.topk(count)
    total = torch.logsumexp(scores, -1)
    share = torch.exp(torch.logsumexp(best.values, -1) - total)
    rest = total + torch.log1p(-share.clamp_max(1 - 1e-6))
    return Lattice(
        best.indices.cpu().numpy(),
        vocabulary[best.indices].cpu().numpy(),
        best.values.cpu().numpy(),
        rest.cpu().numpy(),
    )


@dataclass(eq=False)
class LatticeTree:
    """The growth of a tree from a lattice: a node costs a few array operations and no forward."""

    lattice: Lattice
    root: NDArray[np.int64]
    """The root's token and the one before it, which comes first, int64 [2]."""
    correct: CorrectScores | None = None

    def __post_init__(self) -> None:
        self._levels = {-1: -1}
        self._before = {-1: self.root}

    def grow(self, size: int) -> Iterator[SpeculatedTree]:
        """Yield the best trees of `size` nodes, as `growth.grow` does."""
        tokens, scores = self._children(np.zeros(1, np.int64), self.root[None])
        yield from grow(size, tokens[0], scores[0], self.expand)

    def expand(
        self, nodes: NDArray[np.int64], parents: NDArray[np.int64], tokens: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See `growth.ExpandNodes`."""
        for node, parent, token in zip(nodes.tolist(), parents.tolist(), tokens.tolist(), strict=True):
            self._levels[node] = self._levels[parent] + 1
            self._before[node] = np.array([self._before[parent][-1], token], np.int64)
        below = np.array([self._levels[node] + 1 for node in nodes.tolist()], np.int64)
        return self._children(below, np.stack([self._before[node] for node in nodes.tolist()]))

    def _children(
        self, levels: NDArray[np.int64], before: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the best tokens of n levels and their log-chances after two tokens each, [n, WIDTH], best first."""
        lattice = self.lattice
        at = np.minimum(levels, lattice.levels - 1)
        scores = lattice.scores[at]
        if self.correct is not None:
            scores = scores + self.correct(at, before)
        highest = np.maximum(scores.max(1), lattice.rest[at])
        total = highest + np.log(np.exp(scores - highest[:, None]).sum(1) + np.exp(lattice.rest[at] - highest))
        order = np.argsort(-scores, 1, kind="stable")[:, :WIDTH]
        logprobs = np.take_along_axis(scores, order, 1) - total[:, None]
        logprobs[levels >= lattice.levels] = -np.inf
        return np.take_along_axis(lattice.tokens[at], order, 1), logprobs.astype(np.float32)

"""The growth of a speculated tree by a bounded number of small forwards.  Pure: the head is a callback.

Each forward expands the best nodes that have no children yet.  A child never outranks its parent, so the best nodes by
cumulative score always form a connected tree.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treeswarm_node.speculator.seam import SpeculatedTree

# Largest number of nodes expanded in one forward, and of forwards per tree: a proposal of a small head takes some
# milliseconds of the device, which it shares with all sessions.
BEAM = 8
FORWARDS = 8
# A forward whose nodes the text passes more rarely than this brings fewer tokens than it delays.
LEAST_HITS = 0.03


class ExpandNodes(Protocol):
    """A forward of the head: it returns the children of some nodes."""

    def __call__(
        self, nodes: NDArray[np.int64], parents: NDArray[np.int64], tokens: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the best children of n nodes: token ids and conditional log-scores, [n, width] each, best first.

        A node is given by its own number, its parent's number (-1 for the root) and its token.
        """
        ...


def grow(
    size: int, tokens: NDArray[np.int64], scores: NDArray[np.float32], expand: ExpandNodes, forwards: int = FORWARDS
) -> Iterator[SpeculatedTree]:
    """Yield the best `size` nodes known, after the root's children and after each forward.

    `tokens` and `scores` [width] are the root's children, best first.
    """
    count = min(size, int(np.isfinite(scores).sum()))
    parents = np.full(count, -1)
    tokens, scores = tokens[:count], np.minimum(scores[:count], np.float32(0))
    expanded = np.zeros(count, np.bool_)
    yield _best(parents, tokens, scores, size)
    for _ in range(forwards):
        ranked = np.argsort(-scores, kind="stable")[:size]
        level = ranked[~expanded[ranked]][:BEAM]
        if not len(level) or float(np.exp(scores[level]).sum()) < LEAST_HITS:
            return
        child_tokens, child_scores = expand(level, parents[level], tokens[level])
        expanded[level] = True
        # Rounding must not let a child outrank its parent.
        cumulative = scores[level, None] + np.minimum(child_scores, np.float32(0))
        rows, columns = np.nonzero(np.isfinite(cumulative))
        parents = np.concatenate([parents, level[rows]])
        tokens = np.concatenate([tokens, child_tokens[rows, columns]])
        scores = np.concatenate([scores, cumulative[rows, columns]])
        expanded = np.concatenate([expanded, np.zeros(len(rows), np.bool_)])
        yield _best(parents, tokens, scores, size)


def _best(
    parents: NDArray[np.int64], tokens: NDArray[np.int64], scores: NDArray[np.float32], size: int
) -> SpeculatedTree:
    """Return the best `size` nodes; of equal ones the older, so that parents stay before their children."""
    order = np.argsort(-scores, kind="stable")[:size]
    rank = np.full(len(scores) + 1, -1)  # The last one is the root's, where index -1 points.
    rank[order] = np.arange(len(order))
    return SpeculatedTree(rank[parents[order]], tokens[order], scores[order].astype(np.float32))

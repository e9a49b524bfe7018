"""Best-first growth of a draft tree in batched levels (SpecExec, arXiv 2406.02532).  Pure: the model is a callback.

A child never outranks its parent.  So the best `size` nodes by cumulative score always form a connected tree, and a
node that has dropped out of them never comes back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treeswarm_client.drafters.seam import DraftTree, ShouldStop, never_stop

# Largest number of nodes of one forward: drafting that is stopped waits for no more than one forward.
BEAM = 32
# A small draft's forward on a CPU takes 2 ms and 0.04 to 0.06 ms per node.  But where each level is shipped as soon as
# it is there, depth is worth more than breadth: of 0.04 to 0.2 this gave most tokens per second (docs/decisions/).
ROW_SHARE = 0.2


@dataclass(frozen=True)
class ModelTreeOptions:
    """How a tree grows."""

    beam: int = BEAM
    """Largest number of nodes expanded in one forward."""
    width: int = 32
    """Largest number of children of a node."""
    depth: int = 48
    """Largest number of levels; each takes a forward of the draft."""
    row_share: float = ROW_SHARE
    """Time that one more node adds to a forward, as a share of the time of a forward."""


class ExpandLevel(Protocol):
    """A forward of the draft: it returns the children of some nodes."""

    def __call__(
        self, nodes: NDArray[np.int64], parents: NDArray[np.int64], tokens: NDArray[np.int64], depth: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the best children of n new nodes: token ids and conditional log-scores, [n, width] each, best first.

        A new node is given by its own number, its parent's number (-1 for the root), its token and its level.  Levels
        below the root are counted from 1.
        """
        ...


IsFree = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]
"""Given nodes by parents' numbers (-1 for the root) and tokens, returns whose children cost no forward, bool [n]."""


def nothing_free(parents: NDArray[np.int64], _tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return False for every node: the children of each cost a forward."""
    return np.zeros(len(parents), np.bool_)


class ModelTree:
    """The best `size` nodes below a root whose children are given, best first.

    They are exactly the best nodes of the whole tree of `options.width` and `options.depth`.  The beam says only how
    many nodes share a forward.
    """

    def __init__(
        self, size: int, options: ModelTreeOptions, first_tokens: NDArray[np.int64], first_scores: NDArray[np.float32]
    ) -> None:
        """Start with the root's children: their tokens and log-scores, [width] each, best first."""
        self.size, self.options = size, options
        self._pool = _Pool.of_root(first_tokens, first_scores).best(size)

    def grow(
        self, expand: ExpandLevel, should_stop: ShouldStop = never_stop, is_free: IsFree = nothing_free
    ) -> DraftTree:
        """Continue from the present state and return the best `size` nodes.

        Once `should_stop` returns true, return the best nodes known so far; all that was expanded before is among them.
        `should_stop` is given the chance that the text passes the nodes of the next forward.  More tokens than that the
        forward cannot bring.
        """
        while len(level := self._pool.promising(self.size, self.options)):
            pool = self._pool
            free = is_free(pool.parent[level], pool.token[level])
            if free.any():
                level = level[free]
            else:
                level = level[: worth_a_forward(pool.score[level][: self.options.beam], self.options.row_share)]
                if should_stop(float(np.exp(pool.score[level]).sum())):
                    break
            tokens, scores = expand(pool.number[level], pool.parent[level], pool.token[level], pool.level[level])
            self._pool = pool.with_children(level, tokens, scores, self.size).best(self.size)
        return self._pool.as_tree()


def worth_a_forward(scores: NDArray[np.float32], row_share: float) -> int:
    """Return how many of the next nodes, best first, to compute in one forward.

    It is the number for which most nodes on the text's path are expected per second, if one more row adds `row_share`
    of the time of a forward.
    """
    expected = np.cumsum(np.exp(scores.astype(np.float64)))
    return int(np.argmax(expected / (1.0 + row_share * np.arange(1.0, len(scores) + 1)))) + 1


@dataclass(frozen=True, eq=False)
class _Pool:
    """All nodes that may still be in the tree, one column per quantity, [n] each.

    A node's number never changes; `parent` holds such numbers, and -1 for the root.
    """

    number: NDArray[np.int64]
    parent: NDArray[np.int64]
    token: NDArray[np.int64]
    level: NDArray[np.int64]
    score: NDArray[np.float32]
    expanded: NDArray[np.bool_]
    next_number: int

    @classmethod
    def of_root(cls, tokens: NDArray[np.int64], scores: NDArray[np.float32]) -> "_Pool":
        real = np.isfinite(scores)
        count = int(real.sum())
        return cls(
            number=np.arange(count),
            parent=np.full(count, -1),
            token=tokens[real],
            level=np.ones(count, np.int64),
            score=np.minimum(scores[real], np.float32(0)),
            expanded=np.zeros(count, np.bool_),
            next_number=count,
        )

    def best(self, size: int) -> "_Pool":
        """Return the `size` best nodes; of equal ones the older, so that parents stay before their children."""
        order = np.lexsort((self.number, -self.score))[:size]
        return _Pool(
            self.number[order],
            self.parent[order],
            self.token[order],
            self.level[order],
            self.score[order],
            self.expanded[order],
            self.next_number,
        )

    def promising(self, size: int, options: ModelTreeOptions) -> NDArray[np.int64]:
        """Return the indices of the nodes whose children are unknown and may still be in the tree, best first."""
        eligible = ~self.expanded & (self.level < options.depth)
        if len(self.score) >= size:
            # A child is no better than its parent, and an older node wins a tie.
            eligible &= self.score > self.score[-1:]
        return np.flatnonzero(eligible)

    def with_children(
        self, level: NDArray[np.int64], tokens: NDArray[np.int64], scores: NDArray[np.float32], size: int
    ) -> "_Pool":
        """Return the pool with the children of the nodes at indices `level`, except those that cannot be among the best
        `size`.  A score of −inf stands for a missing child."""
        eligible = np.isfinite(scores)
        if len(self.score) >= size:
            eligible &= self.score[level, None] + np.minimum(scores, np.float32(0)) > self.score[-1]
        rows, columns = np.nonzero(eligible)
        expanded = self.expanded.copy()
        expanded[level] = True
        count = len(rows)
        parents = level[rows]
        # Rounding must not let a child outrank its parent.
        cumulative = self.score[parents] + np.minimum(scores[rows, columns], 0.0)
        return _Pool(
            number=np.concatenate([self.number, np.arange(self.next_number, self.next_number + count)]),
            parent=np.concatenate([self.parent, self.number[parents]]),
            token=np.concatenate([self.token, tokens[rows, columns]]),
            level=np.concatenate([self.level, self.level[parents] + 1]),
            score=np.concatenate([self.score, cumulative.astype(np.float32)]),
            expanded=np.concatenate([expanded, np.zeros(count, np.bool_)]),
            next_number=self.next_number + count,
        )

    def as_tree(self) -> DraftTree:
        """Return the pool as a tree, with parents' indices in place of numbers.

        The pool is sorted by score, so parents come before their children.
        """
        order = np.argsort(self.number)
        indices = order[np.searchsorted(self.number, self.parent, sorter=order).clip(max=max(len(order) - 1, 0))]
        parents = np.where(self.parent < 0, -1, indices) if len(order) else self.parent
        return DraftTree(parents, self.token, self.score)

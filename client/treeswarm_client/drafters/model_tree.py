"""Best-first growth of a draft tree in batched levels (SpecExec, arXiv 2406.02532).  Pure: the model is a callback.

A child never outranks its parent, so the best `size` nodes by cumulative score are always a connected tree, and a
node once outside them never comes back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treeswarm_client.drafters.seam import DraftTree, ShouldStop, never_stop

# Nodes of one forward, at most: whoever stops waits for no more than one.
BEAM = 32
# A small draft's forward on a CPU takes 2 ms and 0.04 to 0.06 ms a node, but where each level is shipped as soon as it
# is there, deep is worth more than broad: of 0.04 to 0.2 this brought most tokens a second (docs/log.md).
ROW_SHARE = 0.2


@dataclass(frozen=True)
class ModelTreeOptions:
    """How a tree grows."""

    beam: int = BEAM
    """Nodes expanded in one forward, at most."""
    width: int = 32
    """Children of a node, at most."""
    depth: int = 48
    """Levels, at most: each costs a forward of the draft."""
    row_share: float = ROW_SHARE
    """What a further node takes, of what a forward takes anyway."""


class ExpandLevel(Protocol):
    """One level through the draft: children of some nodes."""

    def __call__(
        self, nodes: NDArray[np.int64], parents: NDArray[np.int64], tokens: NDArray[np.int64], depth: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """For new nodes (numbers of their own, parents' numbers or -1, tokens, levels below the root from 1 on) the
        best children: token ids [n, width] and conditional log-scores [n, width], best first."""
        ...


Known = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.bool_]]
"""Of nodes (parents' numbers or -1, tokens), those whose children cost no forward."""


def nothing_known(parents: NDArray[np.int64], _tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Every node costs one."""
    return np.zeros(len(parents), np.bool_)


class ModelTree:
    """The best `size` nodes below a root whose children are given, best first: exactly those of the whole tree of
    `growth.width` and `growth.depth`, whatever the beam (it only says how many nodes share a forward)."""

    def __init__(
        self, size: int, growth: ModelTreeOptions, first_tokens: NDArray[np.int64], first_scores: NDArray[np.float32]
    ) -> None:
        self.size, self.growth = size, growth
        self._pool = _Pool.of_root(first_tokens, first_scores).best(size)

    def grow(
        self, expand: ExpandLevel, should_stop: ShouldStop = never_stop, known: Known = nothing_known
    ) -> DraftTree:
        """On from where it was.  Once `should_stop` says so, the best of those known so far: whatever was worked out before
        is among them.  It is told the chance that the text passes the nodes of the next forward: more tokens than
        that it cannot bring."""
        while len(level := self._pool.promising(self.size, self.growth)):
            pool = self._pool
            free = known(pool.parent[level], pool.token[level])
            if free.any():
                level = level[free]
            else:
                level = level[: worth_a_forward(pool.score[level][: self.growth.beam], self.growth.row_share)]
                if should_stop(float(np.exp(pool.score[level]).sum())):
                    break
            tokens, scores = expand(pool.number[level], pool.parent[level], pool.token[level], pool.level[level])
            self._pool = pool.with_children(level, tokens, scores, self.size).best(self.size)
        return self._pool.finished()


def worth_a_forward(scores: NDArray[np.float32], row_share: float) -> int:
    """How many of the next nodes, best first, to compute at once so that the chance to be on the text's path that is
    gone through in a second is largest, where a further row takes `row_share` of what a forward takes anyway."""
    passed = np.cumsum(np.exp(scores.astype(np.float64)))
    return int(np.argmax(passed / (1.0 + row_share * np.arange(1.0, len(scores) + 1)))) + 1


@dataclass(frozen=True, eq=False)
class _Pool:
    """All nodes that may still be in the tree, in columns; `parent` is a node's number, -1 for the root."""

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
        """The `size` best; of equals the one made first, so that parents stay before children."""
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

    def promising(self, size: int, growth: ModelTreeOptions) -> NDArray[np.int64]:
        """Places of the best nodes whose children are unknown and may still be in the tree."""
        hopeful = ~self.expanded & (self.level < growth.depth)
        if len(self.score) >= size:
            # A child is no better than its parent, and loses a tie with a node made before it.
            hopeful &= self.score > self.score[-1:]
        return np.flatnonzero(hopeful)

    def with_children(
        self, level: NDArray[np.int64], tokens: NDArray[np.int64], scores: NDArray[np.float32], size: int
    ) -> "_Pool":
        """The children of the nodes at `level` joined, but for those that cannot be among the best `size`; a score of
        −inf is no child."""
        hopeful = np.isfinite(scores)
        if len(self.score) >= size:
            hopeful &= self.score[level, None] + np.minimum(scores, np.float32(0)) > self.score[-1]
        rows, columns = np.nonzero(hopeful)
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

    def finished(self) -> DraftTree:
        """Numbers become places; the pool is sorted, so a parent's place comes before its children's."""
        order = np.argsort(self.number)
        places = order[np.searchsorted(self.number, self.parent, sorter=order).clip(max=max(len(order) - 1, 0))]
        parents = np.where(self.parent < 0, -1, places) if len(order) else self.parent
        return DraftTree(parents, self.token, self.score)

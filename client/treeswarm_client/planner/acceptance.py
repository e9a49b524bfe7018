"""The chances of a tree's nodes, and of the trees to come.  Pure.

A node is on the target's path if its parent is and the target then says its token.  So what is calibrated is the step
from parent to child: the drafter's conditional score, against how often the target took such a step where it stood at
the parent.  A drafter that is too sure of itself is so again at every step, and its deep nodes lose most.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from treeswarm_client.drafters.calibration import Calibration
from treeswarm_client.drafters.seam import DraftTree

# Trees differ from round to round; the text turns within some dozens.
REMEMBERED = 8


@dataclass(frozen=True, eq=False)
class AcceptanceEstimate:
    """What a drafter's trees are worth here."""

    steps: Calibration = field(default_factory=Calibration)
    trees: tuple[DraftTree, ...] = ()
    """Drafted lately."""

    def chances(self, tree: DraftTree) -> NDArray[np.float64]:
        """Of each node to be on the target's path, float64 [n]; never above its parent's."""
        return _along_paths(tree, self.steps.chances(_steps(tree)))

    @cached_property
    def _chances_of_trees(self) -> list[NDArray[np.float64]]:
        """Asked some times a round; a calibration takes most of its time to begin."""
        if not self.trees:
            return []
        forest = _forest(self.trees)
        chances = _along_paths(forest, self.steps.chances(_steps(forest)))
        return np.split(chances, np.cumsum([len(tree) for tree in self.trees])[:-1])

    def usual(self, count: int) -> NDArray[np.float64]:
        """By rank, of the best `count` nodes of a tree like the last ones, float64 [count].  Beyond those known a
        node's chance falls with its rank; nothing is known: nothing is expected."""
        known = [chances[:count] for chances in self._chances_of_trees]
        longest = max(map(len, known), default=0)
        if not longest:
            return np.zeros(count)
        sums, seen = np.zeros(longest), np.zeros(longest)
        for chances in known:
            sums[: len(chances)] += chances
            seen[: len(chances)] += 1
        mean = sums / seen
        # A single node's chance is chance; of the last quarter together the tail goes on.
        last = float(mean[-max(1, longest // 4) :].mean())
        further = np.arange(longest + 1, count + 1)
        return np.concatenate([mean, last * longest / further])

    def drafted(self, tree: DraftTree) -> "AcceptanceEstimate":
        """With one more tree."""
        return replace(self, trees=(*self.trees, tree)[-REMEMBERED:])

    def regrown(self, tree: DraftTree) -> "AcceptanceEstimate":
        """The last tree was drafted on: so it looks now."""
        return replace(self, trees=(*self.trees[:-1], tree))

    def learned(self, tree: DraftTree, on_path: NDArray[np.bool_]) -> "AcceptanceEstimate":
        """After a walk: the nodes whose fate it told, and which of them were on the path, bool [n]."""
        stood = np.concatenate([on_path, [True]])[tree.parents]  # the root's place is the last one, as -1 says
        return replace(self, steps=self.steps.learned(_steps(tree)[stood], on_path[stood]))


def _forest(trees: Sequence[DraftTree]) -> DraftTree:
    """All of them below one root, one after the other."""
    starts = np.cumsum([0, *(len(tree) for tree in trees)])
    return DraftTree(
        np.concatenate([np.where(t.parents < 0, -1, t.parents + at) for t, at in zip(trees, starts, strict=False)]),
        np.concatenate([tree.tokens for tree in trees]),
        np.concatenate([tree.scores for tree in trees]),
    )


def _along_paths(tree: DraftTree, steps: NDArray[np.float64]) -> NDArray[np.float64]:
    """The product of the steps down to each node."""
    # Every node holds the product of the last 1, 2, 4, … steps above it and points past them; the root's place is last.
    chances, above = np.append(steps, 1.0), np.append(tree.parents, -1)
    while (above >= 0).any():
        chances, above = chances * chances[above], above[above]
    return chances[:-1]


def _steps(tree: DraftTree) -> NDArray[np.float64]:
    """Conditional scores, float64 [n]."""
    scores = tree.scores.astype(np.float64)
    return np.asarray(np.minimum(scores - np.concatenate([scores, [0.0]])[tree.parents], 0.0))

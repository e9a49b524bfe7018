"""The chances that a tree's nodes are on the target's path, and those of the trees to come.  Pure.

A node is on the target's path if its parent is and the target then chooses its token.  So the step from parent to child
is calibrated: the drafter's conditional score, against how often the target took such a step where it stood at the
parent.  A drafter that is too sure of itself is so again at every step, and its deep nodes lose most.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from treeswarm_client.drafters.calibration import Calibration
from treeswarm_client.drafters.seam import DraftTree

# Number of trees averaged: trees differ from round to round, and a text changes within some dozens of rounds.
REMEMBERED = 8
# A draft that does not fit a text is right this many times as often as a calibrated one.
UNFIT = 0.1
# Before calibration a drafter may be far too sure of itself: a wrong tree counts as if it had been this sure at most.
SUREST = 0.6
# Chance that a draft fits a text of which nothing is known, and bounds of the estimate.  At the upper bound five or six
# wrong trees in a row, at the lower one two right ones, turn it.
FIRST_FIT, MOST_FIT, LEAST_FIT = 0.75, 0.97, 0.03


@dataclass(frozen=True, eq=False)
class AcceptanceEstimate:
    """What a drafter's trees are worth on this text."""

    steps: Calibration = field(default_factory=Calibration)
    """Calibration of conditional scores, from parent to child."""
    trees: tuple[DraftTree, ...] = ()
    """Trees drafted lately, the newest last."""
    fit: float = FIRST_FIT
    """Chance that the draft fits this text at all.  A calibration by bins needs dozens of rounds to tell."""

    @property
    def trust(self) -> float:
        """Factor for what the draft promises: 1 where it fits the text as surely as can be known, else less."""
        return self.fit / MOST_FIT

    def chances(self, tree: DraftTree) -> NDArray[np.float64]:
        """Return the chance of each node to be on the target's path, float64 [n]; never above its parent's."""
        return _products_along_paths(tree, self.steps.chances(_step_scores(tree)))

    @cached_property
    def _chances_of_trees(self) -> list[NDArray[np.float64]]:
        """Chances of the trees drafted lately, all calibrated at once: a call costs more than its rows, and each round
        reads this several times."""
        if not self.trees:
            return []
        forest = _forest(self.trees)
        chances = _products_along_paths(forest, self.steps.chances(_step_scores(forest)))
        return np.split(chances, np.cumsum([len(tree) for tree in self.trees])[:-1])

    def usual_chances(self, count: int) -> NDArray[np.float64]:
        """Return the chances of the best `count` nodes of a tree like the last ones, by rank, float64 [count].

        Beyond the ranks that were drafted a node's chance falls with its rank.  Without any tree all are 0.
        """
        chances_of_trees = [chances[:count] for chances in self._chances_of_trees]
        longest = max(map(len, chances_of_trees), default=0)
        if not longest:
            return np.zeros(count)
        sums, trees = np.zeros(longest), np.zeros(longest)
        for chances in chances_of_trees:
            sums[: len(chances)] += chances
            trees[: len(chances)] += 1
        mean = sums / trees
        # A single node's chance is noise, so the tail continues from the mean of the last quarter.
        last = float(mean[-max(1, longest // 4) :].mean())
        ranks_beyond = np.arange(longest + 1, count + 1)
        return np.concatenate([mean, last * longest / ranks_beyond])

    def usual_entry(self) -> float:
        """Return the chance that the text enters a tree like the last ones at all; 0 without any."""
        pairs = zip(self.trees, self._chances_of_trees, strict=True)
        entries = [min(1.0, float(chances[tree.parents < 0].sum())) for tree, chances in pairs]
        return sum(entries) / max(1, len(entries))

    def with_tree(self, tree: DraftTree) -> "AcceptanceEstimate":
        """Return the estimate with one more drafted tree."""
        return replace(self, trees=(*self.trees, tree)[-REMEMBERED:])

    def with_grown_tree(self, tree: DraftTree) -> "AcceptanceEstimate":
        """Return the estimate after the last tree was drafted further and became `tree`."""
        return replace(self, trees=(*self.trees[:-1], tree))

    def after_walk(self, tree: DraftTree, on_path: NDArray[np.bool_]) -> "AcceptanceEstimate":
        """Return the estimate after a walk through `tree`; `on_path` says which nodes were right, bool [n].

        Only nodes whose parent is on the path count: the target did not judge the rest.
        """
        judged = np.concatenate([on_path, [True]])[tree.parents]  # the root's place is the last one, as -1 says
        steps = self.steps.with_round(_step_scores(tree)[judged], on_path[judged])
        return replace(self, steps=steps, fit=self._fit_after(tree, on_path))

    def _fit_after(self, tree: DraftTree, on_path: NDArray[np.bool_]) -> float:
        """Return the chance that the draft fits, by Bayes' rule: the text entered `tree`, or did not."""
        first = tree.parents < 0
        entry = min(SUREST, float(self.steps.chances(tree.scores[first].astype(np.float64)).sum()))
        # Ratio of what a draft that does not fit makes of the outcome to what one that fits does.
        ratio = UNFIT if on_path[first].any() else (1 - UNFIT * entry) / (1 - entry)
        return min(MOST_FIT, max(LEAST_FIT, self.fit / (self.fit + (1 - self.fit) * ratio)))


def _forest(trees: Sequence[DraftTree]) -> DraftTree:
    """Return all the trees below one root, one after the other."""
    starts = np.cumsum([0, *(len(tree) for tree in trees)])
    return DraftTree(
        np.concatenate([np.where(t.parents < 0, -1, t.parents + at) for t, at in zip(trees, starts, strict=False)]),
        np.concatenate([tree.tokens for tree in trees]),
        np.concatenate([tree.scores for tree in trees]),
    )


def _products_along_paths(tree: DraftTree, step_chances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the product of the steps from the root down to each node, float64 [n]."""
    # Every node holds the product of the last 1, 2, 4, … steps above it and points past them; the root's place is last.
    chances, above = np.append(step_chances, 1.0), np.append(tree.parents, -1)
    while (above >= 0).any():
        chances, above = chances * chances[above], above[above]
    return chances[:-1]


def _step_scores(tree: DraftTree) -> NDArray[np.float64]:
    """Return each node's log-probability given its parent, float64 [n]."""
    scores = tree.scores.astype(np.float64)
    return np.asarray(np.minimum(scores - np.concatenate([scores, [0.0]])[tree.parents], 0.0))

"""Several drafters in one tree: the best of all their nodes.

A node's chance is the largest that any member gives it, each member's scores read by how often such scores turned out
right.  So the best `size` nodes of the union are among the best `size` of each member, and a member that is wrong in
this text loses its place by its own account alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_client.drafters.calibration import Calibration
from treeswarm_client.drafters.seam import (
    NO_NODE,
    NO_TREE,
    UNANSWERED,
    Drafter,
    DraftTree,
    ShouldStop,
    Verification,
    never_stop,
)

LEAST_CHANCE = 1e-9


class UnionMember(Drafter, Protocol):
    """A drafter that a union may have."""

    def copy_for_new_generation(self) -> "UnionMember":
        """One for a generation beside this one."""
        ...


@dataclass(eq=False)
class UnionDrafter:
    """Members in the order in which they are asked: the quick ones first."""

    members: Sequence[UnionMember]
    name: str = "union"
    _calibrations: list[Calibration] = field(init=False)
    _trees: list[DraftTree] = field(default_factory=list)
    """What each member proposed last, below the present root."""
    _tree: DraftTree = NO_TREE
    """What was proposed below the present root so far: it may have been shipped, so larger trees hold it."""
    _depth: int = 0

    def __post_init__(self) -> None:
        self._calibrations = [Calibration() for _ in self.members]

    @property
    def alternatives(self) -> int:
        """As many as the member that wants most."""
        return max((member.alternatives for member in self.members), default=0)

    def copy_for_new_generation(self) -> "UnionDrafter":
        """One for a generation beside this one: what is known so far, and contexts of its own."""
        copied = UnionDrafter([member.copy_for_new_generation() for member in self.members], self.name)
        copied._calibrations = list(self._calibrations)
        return copied

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        for member in self.members:
            member.begin(prompt, settings)
        self._trees, self._tree = [], NO_TREE

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        if depth != self._depth:
            self._tree, self._depth = NO_TREE, depth
        if size <= len(self._tree):
            return self._tree.best(max(size, 0))
        hurry = _Hurry(should_stop)
        self._trees = [member.propose(size, depth, hurry) for member in self.members]
        chances = [believed(c, tree.scores) for c, tree in zip(self._calibrations, self._trees, strict=True)]
        tree = united(self._tree, self._trees, chances, size)
        # A tree that was cut short has many nodes only because better ones, further down, were not found yet.
        self._tree = NO_TREE if hurry.ended else tree
        return tree

    def observe(self, verification: Verification) -> None:
        known, on_path = fates(verification)
        for i, tree in enumerate(self._trees):
            places = verification.tree.match(tree.index)
            counted = known & (places != NO_NODE)
            scores = tree.scores[places[counted]]
            self._calibrations[i] = self._calibrations[i].learned(scores, on_path[counted])
        for member in self.members:
            member.observe(verification)
        self._trees, self._tree = [], NO_TREE


@dataclass(eq=False)
class _Hurry:
    """Somebody's `should_stop`, and whether it ever said so."""

    should_stop: ShouldStop
    ended: bool = False

    def __call__(self, promise: float) -> bool:
        ended = self.should_stop(promise)
        self.ended = self.ended or ended
        return ended


def believed(record: Calibration, scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """The chance of each of a member's nodes: half way, in logs, between what it says and its record.

    Members fit their own rates to far more than the nodes that were shipped, so their word is finer than the record of
    some bins; the record knows what a text does to them.  Either alone was seen to be worth some percent less.
    """
    return np.sqrt(record.chances(scores) * np.exp(scores.astype(np.float64)))


def united(
    before: DraftTree, trees: Sequence[DraftTree], chances: Sequence[NDArray[np.float64]], size: int
) -> DraftTree:
    """All of `before` and the best of what `trees` have more, best first; `size` nodes in all, or as many as there are.

    `chances[i]` [nodes of tree i] never rise along a path.
    """
    merged = before
    for tree, chance in zip(trees, chances, strict=True):
        merged = merged.union(replace(tree, scores=np.log(np.maximum(chance, LEAST_CHANCE)).astype(np.float32)))
    # What was proposed may have been shipped: it stays, but has no claim to be better than what was found since.
    ranked = np.argsort(-merged.scores, kind="stable")
    order = ranked[np.sort(np.argsort(ranked >= len(before), kind="stable")[:size])]
    rank = np.full(len(merged) + 1, -1)  # the root's is the last, where −1 points
    rank[order] = np.arange(len(order))
    return DraftTree(rank[merged.parents[order]], merged.tokens[order], merged.scores[order])


def fates(verification: Verification) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Of each node shipped, whether its fate is known, and whether the target's path runs through it.

    It is unknown only below a node of the path that nobody has answered.
    """
    tree, answers = verification.tree, verification.answers
    known, on_path = np.ones(len(tree), np.bool_), np.zeros(len(tree), np.bool_)
    for i, (parent, token) in enumerate(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)):
        above = parent < 0 or bool(on_path[parent])
        said = int(answers[parent + 1])
        known[i] = (parent < 0 or bool(known[parent])) and not (above and said == UNANSWERED)
        on_path[i] = above and said == token
    return known, on_path

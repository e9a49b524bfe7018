"""Several drafters in one tree: the best of all their nodes.

A node's chance is the largest that any member gives it; each member's scores are read by how often such scores turned
out right.  So the best `size` nodes of the union are among the best `size` of each member.  Nodes that a member alone
has found are read by a record of their own: tables are right where the draft model is right too, and their other nodes
must not displace its own.  A member that is wrong in this text loses its share of the tree by its own record alone.
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
    ObeysRules,
    ProposalReceiver,
    ShouldStop,
    Verification,
    never_stop,
)
from treeswarm_client.generation.draft_rules import DraftRules

LEAST_CHANCE = 1e-9


class UnionMember(Drafter, Protocol):
    """A drafter that a union may have as a member."""

    def copy_for_new_generation(self) -> "UnionMember":
        """See `CopyableDrafter`."""
        ...


@dataclass(frozen=True, eq=False)
class MemberRecord:
    """How often a member's nodes turned out right, by their scores."""

    every: Calibration = field(default_factory=Calibration)
    """Record of all its nodes."""
    alone: Calibration = field(default_factory=Calibration)
    """Record of the nodes that no other member had found."""

    def chances(self, scores: NDArray[np.float32], is_alone: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the chance of each of the member's nodes, float64 [n]; it never rises along a path.

        `is_alone` [n] says which nodes no other member has found.
        """
        usual = member_chances(self.every, scores)
        return np.where(is_alone, np.minimum(usual, self.alone.chances(scores)), usual)

    def with_round(
        self, scores: NDArray[np.float32], is_alone: NDArray[np.bool_], on_path: NDArray[np.bool_]
    ) -> "MemberRecord":
        """Return the record after one more round; the arrays [n] are for the member's nodes that were judged."""
        return MemberRecord(
            self.every.with_round(scores, on_path), self.alone.with_round(scores[is_alone], on_path[is_alone])
        )


@dataclass(eq=False)
class UnionDrafter:
    """A drafter that merges the trees of its members."""

    members: Sequence[UnionMember]
    """Drafters in the order in which they are asked: the quick ones first."""
    name: str = "union"
    _records: list[MemberRecord] = field(init=False)
    _trees: list[DraftTree] = field(default_factory=list)
    """The tree that each member proposed last, below the present root."""
    _tree: DraftTree = NO_TREE
    """The tree proposed so far below the present root.  It may have been shipped, so larger trees must contain it."""
    _depth: int = 0

    def __post_init__(self) -> None:
        self._records = [MemberRecord() for _ in self.members]

    @property
    def alternatives(self) -> int:
        """The largest number that any member needs."""
        return max((member.alternatives for member in self.members), default=0)

    @property
    def proposal_nodes(self) -> int:
        """The largest number that any member needs; see `ProposalReceiver`."""
        return max((member.proposal_nodes for member in self._receivers), default=0)

    @property
    def _receivers(self) -> list[ProposalReceiver]:
        return [member for member in self.members if isinstance(member, ProposalReceiver)]

    def receive(self, tree: DraftTree) -> None:
        """See `ProposalReceiver`."""
        for member in self._receivers:
            member.receive(tree)

    def copy_for_new_generation(self) -> "UnionDrafter":
        """See `CopyableDrafter`."""
        copied = UnionDrafter([member.copy_for_new_generation() for member in self.members], self.name)
        copied._records = list(self._records)
        return copied

    def obey(self, rules: DraftRules | None) -> None:
        """See `ObeysRules`."""
        for member in self.members:
            if isinstance(member, ObeysRules):
                member.obey(rules)

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        """See `Drafter`."""
        for member in self.members:
            member.begin(prompt, settings)
        self._trees, self._tree = [], NO_TREE

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        """See `Drafter`."""
        if depth != self._depth:
            self._tree, self._depth = NO_TREE, depth
        if size <= len(self._tree):
            return self._tree.best(max(size, 0))
        watched = _WatchedStop(should_stop)
        self._trees = [member.propose(size, depth, watched) for member in self.members]
        found = zip(self._records, self._trees, found_alone(self._trees), strict=True)
        chances = [record.chances(tree.scores, is_alone) for record, tree, is_alone in found]
        tree = best_of_all(self._tree, self._trees, chances, size)
        # If drafting was stopped, some nodes are in the tree only because better ones, further down, are missing.
        self._tree = NO_TREE if watched.stopped else tree
        return tree

    def observe(self, verification: Verification) -> None:
        """See `Drafter`."""
        judged, on_path = walk_outcomes(verification)
        nodes_of = [verification.tree.match(tree.index) for tree in self._trees]
        finders = sum((nodes != NO_NODE for nodes in nodes_of), np.zeros(len(judged), np.int64))
        for i, (tree, nodes) in enumerate(zip(self._trees, nodes_of, strict=True)):
            counted = judged & (nodes != NO_NODE)
            scores = tree.scores[nodes[counted]]
            self._records[i] = self._records[i].with_round(scores, finders[counted] == 1, on_path[counted])
        for member in self.members:
            member.observe(verification)
        self._trees, self._tree = [], NO_TREE


@dataclass(eq=False)
class _WatchedStop:
    """A `ShouldStop` that remembers whether it ever returned true."""

    should_stop: ShouldStop
    stopped: bool = False

    def __call__(self, tokens_per_second: float) -> bool:
        stop = self.should_stop(tokens_per_second)
        self.stopped = self.stopped or stop
        return stop


def member_chances(calibration: Calibration, scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the chance of each of a member's nodes, float64 [n]: half way, in logs, between its scores and its record.

    Members fit their own rates to far more than the nodes that were shipped, so their scores are finer than a record of
    some bins.  The record knows how well they do in this text.  Either alone was seen to be worth some percent less.
    """
    return np.sqrt(calibration.chances(scores) * np.exp(scores.astype(np.float64)))


def found_alone(trees: Sequence[DraftTree]) -> list[NDArray[np.bool_]]:
    """Return for each tree which of its nodes no other tree has, bool [nodes of the tree]."""
    alone = []
    for tree in trees:
        others = (other for other in trees if other is not tree)
        alone.append(np.all([np.ones(len(tree), np.bool_), *(tree.match(o.index) == NO_NODE for o in others)], axis=0))
    return alone


def best_of_all(
    before: DraftTree, trees: Sequence[DraftTree], chances: Sequence[NDArray[np.float64]], size: int
) -> DraftTree:
    """Return all nodes of `before` and the best others of `trees`, best first: at most `size` nodes in all.

    `chances[i]` [nodes of tree i] must never rise along a path.
    """
    merged = before
    for tree, chance in zip(trees, chances, strict=True):
        merged = merged.union(replace(tree, scores=np.log(np.maximum(chance, LEAST_CHANCE)).astype(np.float32)))
    # Nodes proposed before may have been shipped.  They stay, but nodes found since may come before them.
    ranked = np.argsort(-merged.scores, kind="stable")
    order = ranked[np.sort(np.argsort(ranked >= len(before), kind="stable")[:size])]
    rank = np.full(len(merged) + 1, -1)  # The last one is the root's, where index -1 points.
    rank[order] = np.arange(len(order))
    return DraftTree(rank[merged.parents[order]], merged.tokens[order], merged.scores[order])


def walk_outcomes(verification: Verification) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return for each node shipped whether its outcome is known, and whether it is on the target's path, bool [n] each.

    An outcome is unknown only below a node of the path that has no answer.
    """
    tree, answers = verification.tree, verification.answers
    judged, on_path = np.ones(len(tree), np.bool_), np.zeros(len(tree), np.bool_)
    for i, (parent, token) in enumerate(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)):
        parent_on_path = parent < 0 or bool(on_path[parent])
        answer = int(answers[parent + 1])
        judged[i] = (parent < 0 or bool(judged[parent])) and not (parent_on_path and answer == UNANSWERED)
        on_path[i] = parent_on_path and answer == token
    return judged, on_path

"""The drafter that proposes what the chain's tail proposed: it needs no model and no torch."""

from collections.abc import Sequence

import numpy as np

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_client.drafters.seam import NO_TREE, DraftTree, ShouldStop, Verification, never_stop
from treeswarm_client.generation.draft_rules import DraftRules

# Number of nodes to ask the tail for, 12 bytes each.  A proposal's best nodes are the children of at most 64 expanded
# ones, so more would be worth little.
PROPOSAL_NODES = 128


class TailDrafter:
    """A drafter that keeps the last tree that the tail proposed below the text's last token."""

    name = "tail"
    alternatives = 0
    proposal_nodes = PROPOSAL_NODES

    def __init__(self) -> None:
        self._tree = NO_TREE
        self._rules: DraftRules | None = None

    def copy_for_new_generation(self) -> "TailDrafter":
        """See `CopyableDrafter`: a drafter without a tree."""
        return TailDrafter()

    def obey(self, rules: DraftRules | None) -> None:
        """See `ObeysRules`."""
        self._rules = rules

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        """See `Drafter`."""
        self._tree = NO_TREE

    def receive(self, tree: DraftTree) -> None:
        """See `ProposalReceiver`."""
        self._tree = tree if self._rules is None else without_excluded(tree, self._rules)

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        """See `Drafter`."""
        return up_to_depth(self._tree, depth).best(max(size, 0))

    def observe(self, verification: Verification) -> None:
        """See `Drafter`: the tree below the new last token is still on its way."""
        self._tree = NO_TREE


def up_to_depth(tree: DraftTree, depth: int) -> DraftTree:
    """Return the nodes of a tree's first `depth` levels."""
    kept = tree.depths() < depth
    if kept.all():
        return tree
    places = np.append(np.cumsum(kept) - 1, -1)  # The last one is the root's, where index -1 points.
    return DraftTree(places[tree.parents[kept]], tree.tokens[kept], tree.scores[kept])


def without_excluded(tree: DraftTree, rules: DraftRules) -> DraftTree:
    """Return a tree without the nodes that the rules of the text exclude, and without those below them."""
    if not rules.request.rules.banning:
        return tree
    paths: list[list[int] | None] = []
    for parent, token in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True):
        above = paths[parent] if parent >= 0 else []
        paths.append(None if above is None or not rules.allowed(above, [token])[0] else [*above, token])
    kept = np.array([path is not None for path in paths], np.bool_)
    places = np.append(np.cumsum(kept) - 1, -1)  # The last one is the root's, where index -1 points.
    return DraftTree(places[tree.parents[kept]], tree.tokens[kept], tree.scores[kept])

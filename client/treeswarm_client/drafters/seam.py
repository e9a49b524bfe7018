"""The drafter seam: a context goes in, a scored tree comes out.

Adapters are `none.py`, `model.py`, `suffix.py`, `token_recycling.py`, `tail/tail_drafter.py` and `union.py`; one
conformance suite runs against all of them.  One generation at a time uses a drafter, in a worker thread and never in
the event loop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.walk import child_index

if TYPE_CHECKING:
    from treeswarm_client.generation.draft_rules import DraftRules

NO_NODE = -2
"""Stands for the place of a node that the other tree lacks; -1 is the root."""


@dataclass(frozen=True, eq=False)
class DraftTree:
    """Guesses below a root, best first.  The root is the context's last token and not part of the tree.

    Parents come before their children, siblings have different tokens, and scores never rise along a path.  In a tree
    that a drafter proposes they never rise along the array either, so any prefix is the best tree of its size.
    """

    parents: NDArray[np.int64]
    """Index of each node's parent, or -1 for the root, int64 [n]."""
    tokens: NDArray[np.int64]
    """Token of each node, int64 [n]."""
    scores: NDArray[np.float32]
    """Log of the probability that the target's choices follow the path to each node, float32 [n]."""

    def __len__(self) -> int:
        """Return the number of nodes."""
        return len(self.tokens)

    def best(self, size: int) -> "DraftTree":
        """Return the tree of the best `size` nodes, which are the first `size`."""
        return DraftTree(self.parents[:size], self.tokens[:size], self.scores[:size])

    @cached_property
    def index(self) -> Mapping[tuple[int, int], int]:
        """Index of each node, by its parent's index (-1 for the root) and its token."""
        return child_index(self.parents, self.tokens)

    def depths(self) -> NDArray[np.int64]:
        """Return the number of nodes between the root and each node, int64 [n]: 0 for the root's children."""
        depths: list[int] = []
        for parent in self.parents.tolist():
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return np.array(depths, np.int64)

    def match(self, index: Mapping[tuple[int, int], int]) -> NDArray[np.int64]:
        """Find every node's path in another structure below the same root.

        `index` gives a place by the parent's place (-1 for the root) and a token, as `DraftTree.index` does.  Returns
        int64 [n]: the place of each node, or NO_NODE where its path leads out of that structure.
        """
        places: list[int] = []
        for parent, token in zip(self.parents.tolist(), self.tokens.tolist(), strict=True):
            above = places[parent] if parent >= 0 else -1
            places.append(NO_NODE if above == NO_NODE else index.get((above, token), NO_NODE))
        return np.array(places, np.int64)

    def union(self, other: "DraftTree", most: int | None = None) -> "DraftTree":
        """Return this tree and, after its nodes, those of `other` that it lacks, best first.

        Both trees grow below the same root.  With `most`, no nodes are added beyond that size in all, and a node of
        `other` is left out if its parent is.  A node of both trees gets the higher of its two scores, because it would
        otherwise score lower than its children.  The scores of the union never rise along a path, but they may rise
        along the array.
        """
        # Python's lists, because this loop reads single values, which takes several times as long in arrays.
        index, scores = dict(self.index), self.scores.tolist()
        places: list[int] = []
        parents: list[int] = []
        tokens: list[int] = []
        columns = zip(other.parents.tolist(), other.tokens.tolist(), other.scores.tolist(), strict=True)
        for parent, token, score in columns:
            above = places[parent] if parent >= 0 else -1
            place = index.get((above, token), NO_NODE)
            if place != NO_NODE:
                scores[place] = max(scores[place], score)
            elif above != NO_NODE and (most is None or len(index) < most):
                place = index[above, token] = len(index)
                parents.append(above)
                tokens.append(token)
                scores.append(score)
            places.append(place)
        united = DraftTree(
            np.concatenate([self.parents, np.array(parents, np.int64)]),
            np.concatenate([self.tokens, np.array(tokens, np.int64)]),
            np.array(scores, np.float32),
        )
        united.__dict__["index"] = index  # known already; the next union of several need not build it
        return united


NO_TREE = DraftTree(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
UNANSWERED = -1
"""Stands for an answer that had not come when the walk was over."""


def _no_alternatives() -> NDArray[np.int64]:
    return np.empty((0, 0), np.int64)


@dataclass(frozen=True, eq=False)
class Verification:
    """The target's answers to a tree that was shipped."""

    tree: DraftTree
    """The nodes that were shipped, all of them proposed before; parents come before their children."""
    answers: NDArray[np.int64]
    """The target's token after the root, then after each node, int64 [nodes + 1]; UNANSWERED if none came in time."""
    accepted: Sequence[int]
    """Indices of the nodes of the walked path, in order."""
    bonus: int
    """The target's token after the last of them."""
    alternatives: NDArray[np.int64] = field(default_factory=_no_alternatives)
    """The target's best tokens at the same places, best first and before any noise, int64 [nodes + 1, k] or [0, 0]."""


ShouldStop = Callable[[float], bool]
"""Given the tokens per second that more drafting would bring at best, returns whether to stop drafting."""


def never_stop(_promise: float) -> bool:
    """Return False: the drafter may take as long as it needs."""
    return False


class Drafter(Protocol):
    """Guesses which tokens the target will generate."""

    @property
    def name(self) -> str:
        """Name of the drafter, for statistics and for users."""
        ...

    @property
    def alternatives(self) -> int:
        """Number of the target's best tokens, 0 to 8, that a verification should have for every node."""
        ...

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        """Begin a new generation: forget the last one's context, but keep what was learned."""
        ...

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        """Return up to `size` nodes below the context's last token, in at most `depth` levels.

        There are fewer nodes where no more are worth anything, or once `should_stop` returns true: the drafter then
        returns soon with what it has.  This may be called again for the same root; a larger size gives a larger tree
        and costs only its new nodes.
        """
        ...

    def observe(self, verification: Verification) -> None:
        """Extend the context by the accepted tokens and the bonus, and learn from the answers.

        What was drafted below the bonus is kept.
        """
        ...


@runtime_checkable
class ProposalReceiver(Protocol):
    """A drafter that uses what the chain's tail proposes."""

    @property
    def proposal_nodes(self) -> int:
        """Largest number of nodes that a proposal of the tail should have; 0 for no proposals."""
        ...

    def receive(self, tree: DraftTree) -> None:
        """Take the tree that the tail proposed below the context's last token."""
        ...


@runtime_checkable
class ObeysRules(Protocol):
    """A drafter whose guesses obey the rules of a text."""

    def obey(self, rules: "DraftRules | None") -> None:
        """Draft under these rules from the next `begin` on, or under none."""
        ...


@runtime_checkable
class CopyableDrafter(Protocol):
    """A drafter that several generations can use at a time, each a copy of its own."""

    def copy_for_new_generation(self) -> Drafter:
        """Return a drafter with the same weights and what was learned so far, but a context of its own."""
        ...

"""The drafter seam: context in, scored tree out.

Adapters: `none.py`, `model.py`, `suffix.py`, `recycling.py`, `union.py`; one conformance suite runs against all.  A
drafter is used by one generation at a time and runs in a worker thread, never in the event loop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.walk import child_index

NO_NODE = -2
"""Stands for the place of a node that the other tree lacks; -1 is the root."""


@dataclass(frozen=True, eq=False)
class DraftTree:
    """Guesses below the context's last token (the root, which is not part of it), best first.

    Node i is `tokens[i]` below node `parents[i]`, or below the root where that is -1.  `parents[i] < i`, siblings
    differ, and `scores` (cumulative log-probabilities that the target's choice follows the path) never rise along a
    path nor along the array: any prefix is the best tree of its size.
    """

    parents: NDArray[np.int64]
    tokens: NDArray[np.int64]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.tokens)

    def best(self, size: int) -> "DraftTree":
        """Return the tree of the best `size` nodes, which are the first `size`."""
        return DraftTree(self.parents[:size], self.tokens[:size], self.scores[:size])

    @cached_property
    def index(self) -> Mapping[tuple[int, int], int]:
        """Each node's number by its parent's number (-1 for the root) and its token."""
        return child_index(self.parents, self.tokens)

    def depths(self) -> NDArray[np.int64]:
        """Return the number of nodes between the root and each node, int64 [n]: 0 for the root's children."""
        depths = np.zeros(len(self), np.int64)
        for node, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                depths[node] = depths[parent] + 1
        return depths

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

        Both trees grow below the same root.  With `most`, the union has at most that many nodes: a node of `other` is
        left out where its parent is.  A node of both trees gets the higher of its two scores; otherwise its children
        would keep the lower chance.  The scores of the union do not fall along the array, only along paths.
        """
        index, scores = dict(self.index), self.scores.copy()
        places: list[int] = []
        new: list[tuple[int, int, float]] = []
        columns = zip(other.parents.tolist(), other.tokens.tolist(), other.scores.tolist(), strict=True)
        for parent, token, score in columns:
            above = places[parent] if parent >= 0 else -1
            place = index.get((above, token), NO_NODE)
            if place != NO_NODE:
                scores[place] = max(scores[place], score)
            elif above != NO_NODE and (most is None or len(index) < most):
                place = index[above, token] = len(index)
                new.append((above, token, score))
            places.append(place)
        if not new:
            return replace(self, scores=scores)
        parents, tokens, further = zip(*new, strict=True)
        return DraftTree(
            np.concatenate([self.parents, np.array(parents, np.int64)]),
            np.concatenate([self.tokens, np.array(tokens, np.int64)]),
            np.concatenate([scores, np.array(further, np.float32)]),
        )


NO_TREE = DraftTree(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
UNANSWERED = -1
"""Among answers: the walk was over before this one came."""


def _none_known() -> NDArray[np.int64]:
    return np.empty((0, 0), np.int64)


@dataclass(frozen=True, eq=False)
class Verification:
    """What the target said of a tree as it was shipped: nodes that were proposed, parents before children."""

    tree: DraftTree
    answers: NDArray[np.int64]
    """[nodes + 1]: the target's token after the root, then after each node; UNANSWERED where none came in time."""
    accepted: Sequence[int]
    """Nodes of the walked path, in order."""
    bonus: int
    """The target's token after the last of them."""
    alternatives: NDArray[np.int64] = field(default_factory=_none_known)
    """[nodes + 1, k], or nothing: the target's best tokens at the same places, best first, before any noise."""


ShouldStop = Callable[[float], bool]
"""Told how many tokens a second going on would bring at best, whether to end with what there is."""


def never_stop(_promise: float) -> bool:
    """Whoever asks may take its time."""
    return False


class Drafter(Protocol):
    """Guesses what the target will say."""

    @property
    def name(self) -> str:
        """For statistics and for a user's eyes."""
        ...

    @property
    def alternatives(self) -> int:
        """How many of the target's best tokens, 0 to 8, its verdicts should bring for every node."""
        ...

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        """A new generation: forget the last one's context, keep what was learned."""
        ...

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        """Up to `size` nodes below the context's last token, at most `depth` levels; fewer where no more are worth
        anything.

        May be asked again for the same root: a larger size gives a larger tree, and costs only what is new.  Once
        `should_stop` says so, it ends soon with what it has.
        """
        ...

    def observe(self, verification: Verification) -> None:
        """The context grows by the accepted tokens and the bonus; what was drafted below the bonus is kept."""
        ...


@runtime_checkable
class Copyable(Protocol):
    """A drafter of which there may be several."""

    def copy_for_new_generation(self) -> Drafter:
        """One for a generation beside this one: the same weights and what was learned, a context of its own."""
        ...

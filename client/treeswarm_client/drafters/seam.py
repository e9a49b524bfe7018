"""The drafter seam: context in, scored tree out.

Adapters: `none.py`, `model.py`, `suffix.py`, `recycling.py`, `union.py`; one conformance suite runs against all.  A
drafter is used by one generation at a time and runs in a worker thread, never in the event loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.sampling import SamplingSettings


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
        """The tree of its best `size` nodes."""
        return DraftTree(self.parents[:size], self.tokens[:size], self.scores[:size])


NO_TREE = DraftTree(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
UNANSWERED = -1
"""Among answers: the walk was over before this one came."""


def _none_known() -> NDArray[np.int64]:
    return np.empty((0, 0), np.int64)


@dataclass(frozen=True, eq=False)
class Verdict:
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


Enough = Callable[[float], bool]
"""Told how many tokens a second going on would bring at best, whether to end with what there is."""


def in_no_hurry(_promise: float) -> bool:
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

    def propose(self, size: int, depth: int, enough: Enough = in_no_hurry) -> DraftTree:
        """Up to `size` nodes below the context's last token, at most `depth` levels; fewer where no more are worth
        anything.

        May be asked again for the same root: a larger size gives a larger tree, and costs only what is new.  Once
        `enough` says so, it ends soon with what it has.
        """
        ...

    def observe(self, verdict: Verdict) -> None:
        """The context grows by the accepted tokens and the bonus; what was drafted below the bonus is kept."""
        ...


@runtime_checkable
class Copyable(Protocol):
    """A drafter of which there may be several."""

    def another(self) -> Drafter:
        """One for a generation beside this one: the same weights and what was learned, a context of its own."""
        ...

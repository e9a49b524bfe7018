"""The drafter seam: context in, scored tree out.

Adapters: `none.py` and `model.py`; one conformance suite runs against all.  A drafter is used by one
generation at a time and runs in a worker thread, never in the event loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treeswarm.sampling import SamplingSettings


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


NO_TREE = DraftTree(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


class Drafter(Protocol):
    """Guesses what the target will say."""

    @property
    def name(self) -> str:
        """For statistics and for a user's eyes."""
        ...

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        """A new generation: forget the last one's context, keep what was learned."""
        ...

    def propose(self, size: int, depth: int) -> DraftTree:
        """Up to `size` nodes below the context's last token, at most `depth` levels; fewer where no more are worth
        anything."""
        ...

    def observe(self, tree: DraftTree, answers: NDArray[np.int64], accepted: Sequence[int], bonus: int) -> None:
        """What the target said of the last proposal; the context grows by the accepted tokens and the bonus.

        `answers[0]` is the target's token after the root, `answers[i + 1]` after node i; `accepted` are the node
        indices of the walked path, in order; `bonus` the target's token after the last of them.
        """
        ...

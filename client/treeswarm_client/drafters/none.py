"""The drafter that guesses nothing: plain decoding."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from treeswarm.sampling import SamplingSettings
from treeswarm_client.drafters.seam import NO_TREE, DraftTree


class NoneDrafter:
    """Proposes empty trees."""

    name = "none"

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        """Nothing to remember."""

    def propose(self, size: int, depth: int) -> DraftTree:
        return NO_TREE

    def observe(self, tree: DraftTree, answers: NDArray[np.int64], accepted: Sequence[int], bonus: int) -> None:
        """Nothing to learn."""

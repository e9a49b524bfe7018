"""The drafter that guesses nothing: plain decoding."""

from collections.abc import Sequence
from typing import Self

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_client.drafters.seam import NO_TREE, DraftTree, ShouldStop, Verification, never_stop


class NoneDrafter:
    """Proposes empty trees."""

    name = "none"
    alternatives = 0

    def copy_for_new_generation(self) -> Self:
        return self

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        """Nothing to remember."""

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        return NO_TREE

    def observe(self, verification: Verification) -> None:
        """Nothing to learn."""

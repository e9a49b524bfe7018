"""The drafter that proposes nothing: plain decoding."""

from collections.abc import Sequence
from typing import Self

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_client.drafters.seam import NO_TREE, DraftTree, ShouldStop, Verification, never_stop


class NoneDrafter:
    """A drafter whose trees are empty."""

    name = "none"
    alternatives = 0

    def copy_for_new_generation(self) -> Self:
        """Return this drafter: it keeps nothing between calls."""
        return self

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        """Do nothing: there is nothing to remember."""

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        """Return an empty tree."""
        return NO_TREE

    def observe(self, verification: Verification) -> None:
        """Do nothing: there is nothing to learn."""

"""A tree policy for comparisons: every tree has the same size, whatever it costs."""

from collections.abc import Sequence
from dataclasses import dataclass

from treeswarm.protocol.messages import HopTiming
from treeswarm_client.drafters.seam import DraftTree, ShouldStop, never_stop
from treeswarm_client.planner.costs import ChainHop
from treeswarm_client.planner.policy import AHEAD, Round


@dataclass(frozen=True)
class FixedSizePolicy:
    """Ships trees of one size and learns nothing.  Drafting in flight only saves time in the next round."""

    size: int
    """Number of nodes of every tree."""
    drafts_ahead: bool = True
    """Whether to draft while a tree is in flight."""

    def begin(self, hops: Sequence[ChainHop]) -> None:
        """Do nothing: the size is the same on every chain."""

    def learn_prefill(self, seconds: float, timings: Sequence[Sequence[HopTiming]], *, unbroken: bool) -> None:
        """Do nothing: the size does not depend on times."""

    def nodes_to_draft(self) -> int:
        return self.size

    def stop_drafting(self) -> ShouldStop:
        return never_stop

    def longest_wait_s(self) -> None:
        """Return None: every round waits for its tree."""

    def record_draft(self, tree: DraftTree, seconds: float) -> None:
        """Do nothing: the size does not depend on times."""

    def choose(self, tree: DraftTree, *, is_late: bool = False) -> DraftTree:
        return tree

    def nodes_to_draft_in_flight(self) -> int:
        return AHEAD * self.size if self.drafts_ahead else 0

    def extension(self, shipped: DraftTree, wider: DraftTree, elapsed_s: float) -> DraftTree:
        return shipped

    def learn(self, finished: Round) -> None:
        """Do nothing: the size does not depend on the outcome of a round."""

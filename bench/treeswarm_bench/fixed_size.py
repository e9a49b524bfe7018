"""A tree policy for comparisons: trees of one size, whatever they cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from treeswarm.protocol.messages import HopTiming
from treeswarm_client.drafters.seam import DraftTree, Enough, in_no_hurry
from treeswarm_client.planner.costs import ChainHop
from treeswarm_client.planner.policy import AHEAD, Round


@dataclass(frozen=True)
class FixedSizePolicy:
    """Trees of one size; what is drafted ahead only saves time in the next round."""

    size: int
    drafts_ahead: bool = True

    def begin(self, hops: Sequence[ChainHop]) -> None:
        """Any chain will do."""

    def learn_prefill(self, seconds: float, timings: Sequence[Sequence[HopTiming]], *, unbroken: bool) -> None:
        """However long it took."""

    def nodes_to_draft(self) -> int:
        return self.size

    def stop_drafting(self) -> Enough:
        return in_no_hurry

    def choose(self, tree: DraftTree) -> DraftTree:
        return tree

    def nodes_to_draft_in_flight(self) -> int:
        return AHEAD * self.size if self.drafts_ahead else 0

    def extension(self, shipped: DraftTree, wider: DraftTree, elapsed_s: float) -> DraftTree:
        return shipped

    def learn(self, flown: Round) -> None:
        """It knows what it wants."""

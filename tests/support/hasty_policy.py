"""A policy that ships every tree in parts."""

from collections.abc import Sequence
from dataclasses import dataclass

from treeswarm.protocol.messages import HopTiming
from treeswarm_client.drafters.seam import DraftTree, ShouldStop, never_stop
from treeswarm_client.planner.costs import ChainHop
from treeswarm_client.planner.policy import Round


@dataclass
class HastyPolicy:
    """Ships a part of the nodes at once, and the others in two further appends."""

    size: int

    def begin(self, hops: Sequence[ChainHop]) -> None:
        assert hops

    def learn_prefill(self, seconds: float, timings: Sequence[Sequence[HopTiming]], *, unbroken: bool) -> None:
        assert timings

    def nodes_to_draft(self) -> int:
        return (self.size + 1) // 2

    def stop_drafting(self) -> ShouldStop:
        return never_stop

    def longest_wait_s(self) -> None:
        """Return None: every round waits for its tree."""

    def record_draft(self, tree: DraftTree, seconds: float) -> None:
        assert len(tree)

    def choose(self, tree: DraftTree, *, is_late: bool = False) -> DraftTree:
        return tree.best(len(tree) - 1)

    def nodes_to_draft_in_flight(self) -> int:
        return 4 * self.size

    def extension(self, shipped: DraftTree, wider: DraftTree, elapsed_s: float) -> DraftTree:
        return shipped.union(wider, min(self.size, len(shipped) + 1 + self.size // 4))

    def learn(self, finished: Round) -> None:
        assert finished.first_shipped <= len(finished.draft) <= self.size
        assert len(finished.walk.accepted) <= finished.answered <= len(finished.draft)

"""How much to speculate, round by round: the seam between the loop that ships and whoever decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from treeswarm.protocol.messages import HopTiming, Profile
from treeswarm.session.walk import Walk
from treeswarm_client.drafters.seam import DraftTree, Enough, in_no_hurry
from treeswarm_client.planner.explain import RoundReport

# While a tree travels, this many times its nodes are drafted: what the walk does not reach is wasted work on the
# client's own machine, and the chance that it reaches a node falls quickly with the node's rank.
AHEAD = 4


@dataclass(frozen=True)
class ChainHop:
    """One node of a chain, for what its time is known by."""

    node: str
    """Its id, with the span it computes here."""
    profile: Profile = ()
    """As the node told it when it opened the session."""


@dataclass(frozen=True, eq=False)
class Round:
    """What one traversal was and brought."""

    draft: DraftTree
    found: Walk
    answered: int
    """Nodes of the draft whose answers came before the walk was over."""
    first: int
    """Nodes of the draft in the first shipment; the others went after it."""
    seconds: float
    """From the first append to the end of the walk."""
    first_seconds: float
    """From the first append to the last answer of the first shipment; 0 where the walk was over before."""
    timings: Sequence[Sequence[HopTiming]]
    """Per append answered, per hop."""
    whole: bool
    """Nothing broke on the way: its times mean something."""


class Pace(Protocol):
    """Decides; learns from what came of it."""

    def begin(self, hops: Sequence[ChainHop]) -> None:
        """A generation begins, or its chain has changed."""
        ...

    def prefilled(self, seconds: float, timings: Sequence[Sequence[HopTiming]], *, whole: bool) -> None:
        """The prompt has been through; `whole`: nothing broke on the way."""
        ...

    def wanted(self) -> int:
        """Nodes to draft before anything is shipped; 0: plain decoding."""
        ...

    def patience(self) -> Enough:
        """To be asked, from now on, whether to draft on before shipping."""
        ...

    def choose(self, tree: DraftTree) -> DraftTree:
        """What to ship of a tree: a prefix of it.  Asked every round, also where nothing was drafted."""
        ...

    def ahead(self) -> int:
        """Nodes to draft, those shipped included, while a tree is on its way."""
        ...

    def further(self, shipped: DraftTree, wider: DraftTree, elapsed_s: float) -> DraftTree:
        """`shipped`, and after it what is worth an append of its own of what `wider` has beyond it, so many seconds
        after it left."""
        ...

    def learn(self, flown: Round) -> RoundReport | None:
        """What came of it; returns what there is to tell."""
        ...


@dataclass(frozen=True)
class FixedPace:
    """Trees of one size; what is drafted ahead only saves time in the next round."""

    size: int
    drafts_ahead: bool = True

    def begin(self, hops: Sequence[ChainHop]) -> None:
        """Any chain will do."""

    def prefilled(self, seconds: float, timings: Sequence[Sequence[HopTiming]], *, whole: bool) -> None:
        """However long it took."""

    def wanted(self) -> int:
        return self.size

    def patience(self) -> Enough:
        return in_no_hurry

    def choose(self, tree: DraftTree) -> DraftTree:
        return tree

    def ahead(self) -> int:
        return AHEAD * self.size if self.drafts_ahead else 0

    def further(self, shipped: DraftTree, wider: DraftTree, elapsed_s: float) -> DraftTree:
        return shipped

    def learn(self, flown: Round) -> None:
        """It knows what it wants."""

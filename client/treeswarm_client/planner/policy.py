"""The seam between the generation loop and the decision how much to speculate, and the automatic policy behind it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from treeswarm.protocol.messages import HopTiming
from treeswarm.session.walk import Walk
from treeswarm_client.drafters.seam import DraftTree, Enough, in_no_hurry
from treeswarm_client.planner.costs import ChainHop
from treeswarm_client.planner.explain import RoundReport
from treeswarm_client.planner.plan import patience_s
from treeswarm_client.planner.planner import EXPLORE_NODES, Planner

# What `auto` reserves on every node and may ship: over the dearest links that its planner was tried on (100 ms one way)
# it chose 30 to 80 nodes and hardly ever more than 100; a larger reservation only keeps others out.
LARGEST = 256
# Drafting goes on before shipping while it promises so many times the tokens that its time is worth.  A promise is the
# chance that the text passes a node, and half of those bring a token; and what is not waited for may follow the tree.
# Of 2 to 8, 3 to 5 were best on links of 1 to 100 ms.
PROMISE = 4.0
# While a tree travels, this many times its nodes are drafted: what the walk does not reach is wasted work on the
# client's own machine, and the chance that it reaches a node falls quickly with the node's rank.
AHEAD = 4


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


class TreePolicy(Protocol):
    """Decides; learns from what came of it."""

    def begin(self, hops: Sequence[ChainHop]) -> None:
        """A generation begins, or its chain has changed."""
        ...

    def learn_prefill(self, seconds: float, timings: Sequence[Sequence[HopTiming]], *, whole: bool) -> None:
        """The prompt has been through; `whole`: nothing broke on the way."""
        ...

    def nodes_to_draft(self) -> int:
        """Nodes to draft before anything is shipped; 0: plain decoding."""
        ...

    def stop_drafting(self) -> Enough:
        """To be asked, from now on, whether to draft on before shipping."""
        ...

    def choose(self, tree: DraftTree) -> DraftTree:
        """What to ship of a tree: a prefix of it.  Asked every round, also where nothing was drafted."""
        ...

    def nodes_to_draft_in_flight(self) -> int:
        """Nodes to draft, those shipped included, while a tree is on its way."""
        ...

    def extension(self, shipped: DraftTree, wider: DraftTree, elapsed_s: float) -> DraftTree:
        """`shipped`, and after it what is worth an append of its own of what `wider` has beyond it, so many seconds
        after it left."""
        ...

    def learn(self, flown: Round) -> RoundReport | None:
        """What came of it; returns what there is to tell."""
        ...


@dataclass(eq=False)
class AutoPolicy:
    """Trees that fit the links, the nodes and the text; or all of one size, and then the planner only learns."""

    planner: Planner
    row_bytes: int
    segment_rows: int
    largest: int = LARGEST
    size: int | None = None
    """Somebody else decided."""
    overlaps: bool = True
    """Draft while a tree travels, where links leave time for it; ship on where the size is the planner's."""
    clock: Callable[[], float] = time.perf_counter
    _asked_at: float | None = None

    def begin(self, hops: Sequence[ChainHop]) -> None:
        self.planner.begin(hops, row_bytes=self.row_bytes, segment_rows=self.segment_rows)

    def learn_prefill(self, seconds: float, timings: Sequence[Sequence[HopTiming]], *, whole: bool) -> None:
        if whole:
            rows = [hops[0].rows if hops else 0 for hops in timings]
            self.planner.learn_traversal(rows, seconds, timings, prefill=True)

    def nodes_to_draft(self) -> int:
        """What was drafted ahead costs nothing, and `stop_drafting` ends what does: if a tree is wanted at all, any."""
        if self.size is not None:
            return self.size
        wish = self.planner.wish(self.largest)
        return self.largest if wish > EXPLORE_NODES and self._overlapping else wish

    def stop_drafting(self) -> Enough:
        """What is not drafted now may follow the tree, or is left to the next round."""
        self._asked_at = self.clock()
        if self.size is not None:
            return in_no_hurry
        end = self._asked_at + patience_s(self.planner.costs)
        worth = PROMISE * self.planner.rate
        return lambda promise: promise < worth or self.clock() > end

    def choose(self, tree: DraftTree) -> DraftTree:
        if self._asked_at is None:
            self.planner.plain()
            return tree
        self.planner.drafted(tree, self.clock() - self._asked_at)
        self._asked_at = None
        plan = self.planner.choose(tree, self.largest) if self.size is None else self.planner.told(tree)
        return tree.best(plan.size)

    def nodes_to_draft_in_flight(self) -> int:
        """As many as may be shipped; where guesses are worth nothing, only what the next round tries."""
        if self.size is not None:
            return AHEAD * self.size if self.overlaps else 0
        if not self._overlapping:
            return 0
        if self.planner.wish(self.largest):
            return self.largest
        return EXPLORE_NODES if self.planner.explores_next else 0

    @property
    def _overlapping(self) -> bool:
        return self.overlaps and self.planner.waits_for_links

    def extension(self, shipped: DraftTree, wider: DraftTree, elapsed_s: float) -> DraftTree:
        self.planner.regrown(wider)
        both = shipped.union(wider, self.largest) if self.size is None else shipped
        if len(both) == len(shipped):
            return shipped
        return both.best(len(shipped) + self.planner.extension(both, len(shipped), elapsed_s))

    def learn(self, flown: Round) -> RoundReport | None:
        if flown.whole:
            self.planner.learn_traversal(*_first_trip(flown))
        return self.planner.learn_walk(
            flown.draft,
            flown.found.accepted,
            flown.found.bonus,
            waited_s=max(0.0, flown.seconds - flown.first_seconds) if flown.first_seconds else 0.0,
        )


def _first_trip(flown: Round) -> tuple[list[int], float, list[Sequence[HopTiming]]]:
    """Rows of each append, seconds, timings: of what was shipped at once, as far as it came back."""
    rows: list[int] = []
    for timings in flown.timings:
        if sum(rows) > flown.first:
            break
        rows.append(timings[0].rows if timings else 0)
    whole = sum(rows) > flown.first
    return (
        rows,
        flown.first_seconds if whole and flown.first_seconds else flown.seconds,
        list(flown.timings[: len(rows)]),
    )

"""`--tree-size auto`: the planner's decisions, behind the seam of whoever ships."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from treeswarm.protocol.messages import HopTiming
from treeswarm_client.drafters.seam import DraftTree, Enough, in_no_hurry
from treeswarm_client.planner.explain import RoundReport
from treeswarm_client.planner.pace import AHEAD, ChainHop, Round
from treeswarm_client.planner.plan import patience_s
from treeswarm_client.planner.planner import EXPLORE_NODES, Planner

# What `auto` reserves on every node and may ship: over the dearest links that its planner was tried on (100 ms one way)
# it chose 30 to 80 nodes and hardly ever more than 100; a larger reservation only keeps others out.
LARGEST = 256
# Drafting goes on before shipping while it promises so many times the tokens that its time is worth.  A promise is the
# chance that the text passes a node, and half of those bring a token; and what is not waited for may follow the tree.
# Of 2 to 8, 3 to 5 were best on links of 1 to 100 ms.
PROMISE = 4.0


@dataclass(eq=False)
class AutoPace:
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

    def prefilled(self, seconds: float, timings: Sequence[Sequence[HopTiming]], *, whole: bool) -> None:
        if whole:
            rows = [hops[0].rows if hops else 0 for hops in timings]
            self.planner.learn_traversal(rows, seconds, timings, prefill=True)

    def wanted(self) -> int:
        """What was drafted ahead costs nothing, and `patience` ends what does: where a tree is wanted at all, any."""
        if self.size is not None:
            return self.size
        wish = self.planner.wish(self.largest)
        return self.largest if wish > EXPLORE_NODES and self._overlapping else wish

    def patience(self) -> Enough:
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

    def ahead(self) -> int:
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

    def further(self, shipped: DraftTree, wider: DraftTree, elapsed_s: float) -> DraftTree:
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

"""`--tree-size auto`: the planner's decisions, behind the seam of whoever ships."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from treeswarm.messages import HopTiming
from treeswarm_client.drafters.seam import DraftTree
from treeswarm_client.pace import AHEAD, ChainHop, Round, joined, prefix
from treeswarm_client.planner.explain import RoundReport
from treeswarm_client.planner.plan import slowest_s
from treeswarm_client.planner.planner import Planner

# Nodes alive at once that a session asks room for.  In all cells measured the best tree was smaller (docs/benchmarks.md),
# and a crown's rows are reserved on every node whether they are used or not.
LARGEST = 256


@dataclass(eq=False)
class AutoPace:
    """Trees that fit the links, the nodes and the text."""

    planner: Planner
    row_bytes: int
    segment_rows: int
    largest: int = LARGEST
    overlaps: bool = True
    """Draft while a tree travels, and ship on."""
    reports: list[RoundReport] = field(default_factory=list)
    _asked_at: float | None = None

    def begin(self, hops: Sequence[ChainHop]) -> None:
        self.planner.begin(hops, row_bytes=self.row_bytes, segment_rows=self.segment_rows)

    def prefilled(self, seconds: float, timings: Sequence[Sequence[HopTiming]], *, whole: bool) -> None:
        if whole:
            rows = [hops[0].rows if hops else 0 for hops in timings]
            self.planner.learn_traversal(rows, seconds, timings, prefill=True)

    def wanted(self) -> int:
        wish = self.planner.wish(self.largest)
        if not wish:
            self.planner.plain()
        return wish

    def patience(self) -> Callable[[], bool]:
        """What is not drafted now may follow the tree, at the price of a further append: no longer than that takes."""
        self._asked_at = time.perf_counter()
        pays_no_more = self.planner.enough()
        if not self.overlaps:
            return pays_no_more
        end = self._asked_at + float(slowest_s(self.planner.costs, 1.0))
        return lambda: pays_no_more() or time.perf_counter() > end

    def choose(self, tree: DraftTree) -> DraftTree:
        assert self._asked_at is not None, "nobody asked for a draft"
        self.planner.drafted(tree, time.perf_counter() - self._asked_at)
        self._asked_at = None
        return prefix(tree, self.planner.choose(tree, self.largest).size)

    def ahead(self, shipped: int) -> int:
        """As many as the next round may want, twice; nothing where guesses are worth nothing."""
        wish = self.planner.wish(self.largest) if self.overlaps else 0
        return max(AHEAD * shipped, 2 * wish) if wish else 0

    def further(self, shipped: DraftTree, wider: DraftTree) -> DraftTree:
        both = joined(shipped, wider, self.largest)
        if len(both) == len(shipped):
            return shipped
        return prefix(both, len(shipped) + self.planner.extension(both, len(shipped)))

    def learn(self, flown: Round) -> None:
        if flown.whole:
            self.planner.learn_traversal(*_first_trip(flown))
        answered = prefix(flown.draft, flown.answered)
        report = self.planner.learn_walk(answered, flown.found.accepted)
        if report is not None:
            self.reports.append(report)


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

"""What drafting a tree takes, by its number of nodes, estimated from the trees drafted lately.  Pure."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm_client.drafters.seam import DraftTree
from treeswarm_client.recent_samples import RecentSamples

# Deeper than any tree of a usual drafter; deeper nodes count to the last level.
DEPTHS = 64
# Weight of one drafted tree in the average number of levels.
STEP = 1 / 8
# Seconds of a level before any was measured: a forward of a small draft model on an idle CPU core.  It is meant to be
# low: a draft that is believed to be cheap is tried, and trying it once more tells what it costs.
PRIOR_LEVEL_S = 0.003


@dataclass(frozen=True, eq=False)
class DraftLevels:
    """What a level of drafting takes, and how many levels trees have."""

    times: RecentSamples = RecentSamples()
    """Seconds per level of the trees drafted lately.  A level is one forward of the draft, whatever its nodes."""
    levels: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Number of levels of the best 1, 2, … nodes of a tree, a running average, float64 [nodes]."""

    @property
    def level_s(self) -> float:
        """Seconds of one level."""
        return self.times.location(PRIOR_LEVEL_S)

    def updated(self, tree: DraftTree, seconds: float) -> "DraftLevels":
        """Return the estimate with one more tree, which took `seconds` to draft."""
        if not len(tree):
            return self
        depths = np.minimum(tree.depths(), DEPTHS - 1)
        level_s = seconds / (int(depths.max()) + 1)
        return DraftLevels(
            self.times.updated(level_s), _moving_average(self.levels, np.maximum.accumulate(depths) + 1.0)
        )

    def draft_s(self, largest: int) -> NDArray[np.float64]:
        """Return the seconds that drafting 0 to `largest` nodes takes, float64 [largest + 1].

        A tree larger than any seen is deeper by the square root of the ratio of their sizes.
        """
        seen = np.maximum.accumulate(self.levels[:largest])
        if not len(seen):
            return np.zeros(largest + 1)
        beyond = seen[-1] * np.sqrt(np.arange(len(seen) + 1, largest + 1) / len(seen))
        return self.level_s * np.concatenate([[0.0], seen, beyond])


def _moving_average(average: NDArray[np.float64], new: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the exponential moving average, element by element; the longer of the two supplies the rest."""
    if not len(average):
        return new
    common = min(len(average), len(new))
    longer = average if len(average) > common else new
    return np.concatenate([average[:common] + STEP * (new[:common] - average[:common]), longer[common:]])

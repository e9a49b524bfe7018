"""What a level of drafting takes, by running averages.  Pure."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm_client.drafters.seam import DraftTree

STEP = 1 / 8
# Deeper than any tree of a usual drafter; what lies below counts to the last.
DEPTHS = 64


@dataclass(frozen=True, eq=False)
class Levels:
    """Of the trees drafted lately."""

    level_s: float = 0.0
    deep: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Levels of the best 1, 2, … nodes of a tree."""
    samples: int = 0

    def learned(self, tree: DraftTree, seconds: float) -> "Levels":
        """With one more tree and the seconds it took."""
        if not len(tree):
            return self
        depths = np.minimum(tree.depths(), DEPTHS - 1)
        step = max(STEP, 1 / (self.samples + 1))
        level_s = seconds / (int(depths.max()) + 1)
        return Levels(
            self.level_s + step * (level_s - self.level_s),
            mixed(self.deep, np.maximum.accumulate(depths) + 1.0),
            self.samples + 1,
        )

    def draft_s(self, largest: int) -> NDArray[np.float64]:
        """What drafting 0 to `largest` nodes takes, float64 [largest + 1].

        A level is one forward of the draft, however many nodes it has; a tree larger than any seen is deeper by the
        root of how much larger.
        """
        known = np.maximum.accumulate(self.deep[:largest])
        if not len(known):
            return np.zeros(largest + 1)
        further = known[-1] * np.sqrt(np.arange(len(known) + 1, largest + 1) / len(known))
        return self.level_s * np.concatenate([[0.0], known, further])


def mixed(usual: NDArray[np.float64], new: NDArray[np.float64]) -> NDArray[np.float64]:
    """By rank, the usual moved towards the new, as far as both go; where one goes further, that one."""
    if not len(usual):
        return new
    common = min(len(usual), len(new))
    longer = usual if len(usual) > common else new
    return np.concatenate([usual[:common] + STEP * (new[:common] - usual[:common]), longer[common:]])

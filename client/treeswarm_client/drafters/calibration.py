"""From a drafter's scores to chances.  Pure.

A cumulative score is the drafter's opinion; what the planner and a union of drafters need is how often nodes of such a
score really turn out to be on the target's path.  The opinions are sorted into bins, the hits in each are counted, and
old ones are forgotten: a text changes its nature half way.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

# Edges of the bins, in log-probability: fine where most nodes lie that are worth shipping, down to one in 3,000.
EDGES = np.linspace(-8.0, 0.0, 17)
MIDDLES = (EDGES[1:] + EDGES[:-1]) / 2
CENTRES = np.exp(MIDDLES)
# How many nodes' worth of trust a drafter's own opinion starts with, in each bin.
PRIOR_NODES = 6.0
# Rounds after which an older one counts half: in a bin, and in what is thought of the drafter as a whole.  Were that as
# short, one that is never right would be believed to be so at every 30th node for ever, and shipped.
HALF_LIFE = 24.0
LONG_HALF_LIFE = 192.0


def _nothing() -> NDArray[np.float64]:
    return np.zeros(len(CENTRES))


@dataclass(frozen=True, eq=False)
class Calibration:
    """Per bin of scores, how many nodes were shipped and how many were on the target's path."""

    shipped: NDArray[np.float64] = field(default_factory=_nothing)
    hit: NDArray[np.float64] = field(default_factory=_nothing)
    promised: float = 0.0
    """Hits that all its scores came to, by its own opinion."""
    kept: float = 0.0
    """And how many there were."""

    def chances(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """The chance of each node to be on the target's path, [n]; a better score never has a lower chance."""
        if not len(scores):
            return np.empty(0)
        found = np.exp(np.interp(scores, MIDDLES, self._log_chances))
        below = np.exp(np.minimum(scores - EDGES[0], 0.0))
        return np.asarray(np.minimum(found * below, 1.0))

    @cached_property
    def _log_chances(self) -> NDArray[np.float64]:
        """In the middle of each bin."""
        # The whole drafter's optimism, of all bins, is what a bin is believed to share until it has its own figures.
        optimism = (self.kept + PRIOR_NODES) / (self.promised + PRIOR_NODES)
        expected = np.minimum(CENTRES * optimism, 1.0)
        rising = _rising(self.hit + PRIOR_NODES * expected, self.shipped + PRIOR_NODES)
        return np.asarray(np.log(np.maximum(rising, 1e-9)))

    def learned(self, scores: NDArray[np.floating], on_path: NDArray[np.bool_]) -> "Calibration":
        """After a round: the scores of the nodes shipped whose fate is known, and which of them were on the path."""
        if not len(scores):
            return self
        bins = np.clip(np.digitize(scores, EDGES) - 1, 0, len(CENTRES) - 1)
        shipped = np.bincount(bins, minlength=len(CENTRES))
        hit = np.bincount(bins[on_path], minlength=len(CENTRES))
        stays, stays_long = 0.5 ** (1 / HALF_LIFE), 0.5 ** (1 / LONG_HALF_LIFE)
        return Calibration(
            self.shipped * stays + shipped,
            self.hit * stays + hit,
            self.promised * stays_long + float(shipped @ CENTRES),
            self.kept * stays_long + float(hit.sum()),
        )


def _rising(hit: NDArray[np.float64], shipped: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rates that never fall from bin to bin: bins that would are pooled.  (To lift the later one instead would let a
    lucky hit among bad scores speak for all better ones.)"""
    pools: list[tuple[float, float, int]] = []
    for hits, nodes in zip(hit.tolist(), shipped.tolist(), strict=True):
        pool = (hits, nodes, 1)
        while pools and pools[-1][0] * pool[1] >= pool[0] * pools[-1][1]:
            before = pools.pop()
            pool = (before[0] + pool[0], before[1] + pool[1], before[2] + pool[2])
        pools.append(pool)
    return np.repeat([hits / nodes for hits, nodes, _ in pools], [bins for _, _, bins in pools])

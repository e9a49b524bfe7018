"""Calibration: from a drafter's scores to chances.  Pure.

A cumulative score is the drafter's own estimate.  The planner and a union of drafters need to know how often nodes with
such a score really are on the target's path.  Scores are sorted into bins and the hits in each are counted.  Old rounds
count less and less, because a text may change its nature half way.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

# Edges of the bins, in log-probability: fine where most of the nodes worth shipping are, down to one in 3,000.
EDGES = np.linspace(-8.0, 0.0, 17)
MIDDLES = (EDGES[1:] + EDGES[:-1]) / 2
CENTRES = np.exp(MIDDLES)
# Number of nodes in each bin that the drafter's own estimate counts as at first.
PRIOR_NODES = 6.0
# Number of rounds after which an older one counts half: in a bin, and for the drafter as a whole.  If the second were
# as short as the first, a drafter that is never right would for ever be assumed right at every 30th node, and shipped.
HALF_LIFE = 24.0
LONG_HALF_LIFE = 192.0


def _zeros() -> NDArray[np.float64]:
    return np.zeros(len(CENTRES))


@dataclass(frozen=True, eq=False)
class Calibration:
    """Counts of shipped nodes by bin of their scores, float64 [bins]."""

    shipped: NDArray[np.float64] = field(default_factory=_zeros)
    """Number of nodes shipped."""
    hit: NDArray[np.float64] = field(default_factory=_zeros)
    """Number of them that were on the target's path."""
    expected_hits: float = 0.0
    """Number of hits in all bins that the drafter's own scores predicted."""
    total_hits: float = 0.0
    """Number of hits in all bins."""

    def chances(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the chance that each node is on the target's path, float64 [n]; it never falls with a better score."""
        if not len(scores):
            return np.empty(0)
        interpolated = np.exp(np.interp(scores, MIDDLES, self._log_chances))
        below = np.exp(np.minimum(scores - EDGES[0], 0.0))
        return np.asarray(np.minimum(interpolated * below, 1.0))

    @property
    def optimism(self) -> float:
        """Number of hits over what the drafter's own scores predicted, in all bins."""
        return (self.total_hits + PRIOR_NODES) / (self.expected_hits + PRIOR_NODES)

    @cached_property
    def _log_chances(self) -> NDArray[np.float64]:
        """Log of the chance in the middle of each bin."""
        # Until a bin has counts of its own, it is assumed to be as optimistic as the drafter is over all bins.
        expected = np.minimum(CENTRES * self.optimism, 1.0)
        rising = _rising(self.hit + PRIOR_NODES * expected, self.shipped + PRIOR_NODES)
        return np.asarray(np.log(np.maximum(rising, 1e-9)))

    def with_round(self, scores: NDArray[np.floating], on_path: NDArray[np.bool_]) -> "Calibration":
        """Return the calibration after one more round.

        `scores` [n] are those of the shipped nodes whose outcome is known, and `on_path` [n] says which of them were on
        the target's path.
        """
        if not len(scores):
            return self
        bins = np.clip(np.digitize(scores, EDGES) - 1, 0, len(CENTRES) - 1)
        shipped = np.bincount(bins, minlength=len(CENTRES))
        hit = np.bincount(bins[on_path], minlength=len(CENTRES))
        stays, stays_long = 0.5 ** (1 / HALF_LIFE), 0.5 ** (1 / LONG_HALF_LIFE)
        return Calibration(
            self.shipped * stays + shipped,
            self.hit * stays + hit,
            self.expected_hits * stays_long + float(shipped @ CENTRES),
            self.total_hits * stays_long + float(hit.sum()),
        )


def _rising(hit: NDArray[np.float64], shipped: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return rates that never fall from bin to bin: neighbouring bins whose rates would fall are pooled.

    Raising the later bin instead would let one lucky hit among bad scores count for all better ones.
    """
    pools: list[tuple[float, float, int]] = []
    for hits, nodes in zip(hit.tolist(), shipped.tolist(), strict=True):
        pool = (hits, nodes, 1)
        while pools and pools[-1][0] * pool[1] >= pool[0] * pools[-1][1]:
            before = pools.pop()
            pool = (before[0] + pool[0], before[1] + pool[1], before[2] + pool[2])
        pools.append(pool)
    return np.repeat([hits / nodes for hits, nodes, _ in pools], [bins for _, _, bins in pools])

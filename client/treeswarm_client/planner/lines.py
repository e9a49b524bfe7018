"""A straight line through noisy measurements that come one by one, some of them far off.  Pure."""

import math
from dataclasses import dataclass, replace
from functools import cache
from statistics import median

import numpy as np
from numpy.typing import NDArray

# Measurements remembered, and how many of about the same size: a session's rounds are often all alike, and the few
# of another size are what the slope is known by.
KEPT = 64
KEPT_ALIKE = 16
# Of the largest, two sizes must be so far apart to say anything of the slope.
APART = 1 / 8
# A slope begins with the trust of so many pairs of measurements.
PRIOR_PAIRS = 4
# Late measurements are a minority among so many of the newest: of these the height is the median.
NEWEST = 16


@dataclass(frozen=True)
class LineFit:
    """`height + x · slope`, both ≥ 0: the slope is the median of those between any two measurements (Theil and Sen),
    each as heavy as the two are apart; the height is the median of what the slope leaves."""

    prior_slope: float
    height: float = 0.0
    slope: float = 0.0
    seen: tuple[tuple[float, float], ...] = ()
    """(x, y), oldest first."""

    def learned(self, x: float, y: float) -> "LineFit":
        """With one more measurement; the first is believed to be no more than half slope."""
        if not self.seen:
            slope = min(self.prior_slope, 0.5 * y / x) if x > 0 else self.prior_slope
            return replace(self, height=max(0.0, y - slope * x), slope=slope, seen=((x, y),))
        seen = _kept([*self.seen, (x, y)])
        xs, ys = np.array(seen).T
        slope = self._slope(xs, ys)
        newest = slice(-NEWEST, None)
        height = median((ys[newest] - slope * xs[newest]).tolist())
        return replace(self, height=max(0.0, height), slope=slope, seen=tuple(seen))

    def at(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The line's values, of the same shape."""
        return self.height + self.slope * x

    def _slope(self, xs: NDArray[np.float64], ys: NDArray[np.float64]) -> float:
        least = max(APART * float(xs.max()), 1e-9)
        if np.ptp(xs) < least:  # as in a session that ships nothing but single rows
            return self.slope
        earlier, later = _pairs(len(xs))
        run, rise = xs[later] - xs[earlier], ys[later] - ys[earlier]
        apart = np.abs(run) >= least
        weights = np.abs(run[apart])
        slopes = np.append(rise[apart] / run[apart], self.prior_slope)
        weights = np.append(weights, PRIOR_PAIRS * weights.mean())
        order = np.argsort(slopes)
        half = np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)
        return max(0.0, float(slopes[order][half]))


@cache
def _pairs(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The earlier and the later of any two of so many (at most `KEPT`)."""
    earlier, later = np.triu_indices(count, 1)
    return earlier, later


def _kept(seen: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The newest, and of those of one size (within a factor of two) only so many."""
    alike: dict[int, int] = {}
    kept = []
    for x, y in reversed(seen[-KEPT:]):
        size = int(math.log2(x + 1))
        alike[size] = alike.get(size, 0) + 1
        if alike[size] <= KEPT_ALIKE:
            kept.append((x, y))
    return kept[::-1]

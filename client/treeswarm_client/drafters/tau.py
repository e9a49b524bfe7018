"""τ: how sharply a draft's scores should be read.  Pure.

A draft's probability is not the chance that the *target's* choice is this token.  One scalar mends most of that: scores
divided by τ before the softmax, τ fitted by maximum likelihood of the tokens the target really chose.  Every verified
node is a label, rejected ones included.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Log-spaced; the optimum is interpolated between.  Greedy targets of distilled drafts were seen near 0.5.
GRID = np.geomspace(0.1, 2.5, 28)
# Labels after which an older one counts half: some dozens of traversals, so that τ follows the text.
HALF_LIFE = 2000.0
# The prior's precision of log τ.  A label's is between a half and one: a round of a mid-size tree outweighs it.
PRIOR_PRECISION = 40.0


@dataclass(frozen=True, eq=False)
class TauEstimate:
    """Negative log-likelihoods of the labels so far at each τ of the grid, and the prior's centre."""

    prior: float
    losses: NDArray[np.float64]

    @classmethod
    def fresh(cls, prior: float) -> "TauEstimate":
        """Nothing learned yet."""
        return cls(prior, np.zeros(len(GRID)))

    @property
    def value(self) -> float:
        """The best τ: the grid's minimum, refined by the parabola through it and its neighbours."""
        total = self.losses + PRIOR_PRECISION * np.log(GRID / self.prior) ** 2 / 2
        best = int(np.clip(np.argmin(total), 1, len(GRID) - 2))
        left, middle, right = total[best - 1 : best + 2]
        bend = left - 2 * middle + right
        shift = 0.5 * (left - right) / bend if bend > 0 else 0.0
        step = np.log(GRID[1] / GRID[0])
        return float(GRID[best] * np.exp(np.clip(shift, -1, 1) * step))

    def learned(self, scores: NDArray[np.float32], chosen: NDArray[np.int64]) -> "TauEstimate":
        """After labels: `scores` [n, m] of each node's best candidates before τ, `chosen[i]` the column of the token
        that the target chose.  Nodes where it chose none of them teach nothing about τ and are not passed."""
        if not len(chosen):
            return self
        scaled = scores[:, :, None].astype(np.float64) / GRID
        scaled -= scaled.max(1, keepdims=True)
        picked = np.take_along_axis(scaled, chosen[:, None, None], 1)[:, 0]
        losses = (np.log(np.exp(scaled).sum(1)) - picked).sum(0)
        return TauEstimate(self.prior, self.losses * 0.5 ** (len(chosen) / HALF_LIFE) + losses)

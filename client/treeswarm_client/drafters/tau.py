"""τ: the temperature that turns a draft model's scores into the target's chances.  Pure.

A draft's probability is not the chance that the *target* chooses this token.  One scalar corrects most of that: scores
are divided by τ before the softmax, and τ is fitted by maximum likelihood of the tokens that the target really chose.
Every verified node is a label, rejected ones included.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Values of τ at which the likelihood is kept, log-spaced; the optimum is interpolated between them.  Greedy targets of
# distilled drafts were seen near 0.5.
GRID = np.geomspace(0.1, 2.5, 28)
# Number of labels after which an older one counts half: some dozens of traversals, so that τ follows the text.
HALF_LIFE = 2000.0
# The prior's precision of log τ.  A label's is between a half and one, so a round of a mid-size tree outweighs it.
PRIOR_PRECISION = 40.0


@dataclass(frozen=True, eq=False)
class TauEstimate:
    """The likelihood of the labels so far, by τ."""

    prior: float
    """Centre of the prior."""
    losses: NDArray[np.float64]
    """Negative log-likelihood of the labels so far at each τ of GRID."""

    @classmethod
    def fresh(cls, prior: float) -> "TauEstimate":
        """Return an estimate without labels."""
        return cls(prior, np.zeros(len(GRID)))

    @property
    def value(self) -> float:
        """Best τ: the minimum on the grid, refined by the parabola through it and its neighbours."""
        total = self.losses + PRIOR_PRECISION * np.log(GRID / self.prior) ** 2 / 2
        best = int(np.clip(np.argmin(total), 1, len(GRID) - 2))
        left, middle, right = total[best - 1 : best + 2]
        bend = left - 2 * middle + right
        shift = 0.5 * (left - right) / bend if bend > 0 else 0.0
        step = np.log(GRID[1] / GRID[0])
        return float(GRID[best] * np.exp(np.clip(shift, -1, 1) * step))

    def with_labels(self, scores: NDArray[np.float32], chosen: NDArray[np.int64]) -> "TauEstimate":
        """Return the estimate after n more labels.

        `scores` [n, m] are each node's best candidates before τ, and `chosen` [n] is the column of the token that the
        target chose.  Nodes where it chose none of them say nothing about τ and must not be passed.
        """
        if not len(chosen):
            return self
        scaled = scores[:, :, None].astype(np.float64) / GRID
        scaled -= scaled.max(1, keepdims=True)
        picked = np.take_along_axis(scaled, chosen[:, None, None], 1)[:, 0]
        losses = (np.log(np.exp(scaled).sum(1)) - picked).sum(0)
        return TauEstimate(self.prior, self.losses * 0.5 ** (len(chosen) / HALF_LIFE) + losses)

"""Speculation must not lose to not speculating: an account of what trees brought beyond plain rounds.  Pure.

In units of a plain round.  A tree's round adds the tokens it brought and takes away the plain rounds that would have
fitted into its time.  A plain round adds the small share that may be risked again.  In debt, what a tree promises is
doubted: calibrated chances lag behind a text that turned.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# What may be lost to learning at the start of a text, and of every round after it: with exploration's own share a
# text of 128 tokens stays above 0.95 of plain decoding.
START, STAKE = 2.5, 0.02
# What was won long ago is no licence to lose it all, and one stall of the network no reason never to try again.
MOST, LEAST = 6.0, -1.0
# Of a promise, in debt: a tree must promise twice its cost.
DOUBT = 0.5


@dataclass(frozen=True)
class LossBudget:
    """The account."""

    balance: float = START

    @property
    def in_debt(self) -> bool:
        return self.balance < 0

    def believed(self, chances: NDArray[np.float64]) -> NDArray[np.float64]:
        """What to plan by: chances [n] as calibrated, or less."""
        return chances * DOUBT if self.in_debt else chances

    def after_tree(self, tokens: int, seconds: float, plain_s: float) -> "LossBudget":
        """A tree was drafted or shipped: `tokens` came in `seconds`, a plain round would have taken `plain_s`."""
        return self._with(tokens - seconds / plain_s + STAKE)

    def after_plain(self) -> "LossBudget":
        """Nothing was drafted."""
        return self._with(STAKE)

    def _with(self, change: float) -> "LossBudget":
        return LossBudget(min(MOST, max(LEAST, self.balance + change)))

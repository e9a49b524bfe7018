"""Hit rates: how often guesses of each kind turn out right, counted online; old guesses count less and less."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# Number of guesses that the prior counts as.
PRIOR_GUESSES = 8.0
# Number of guesses of one kind after which an older one counts half.
HALF_LIFE = 400.0
# No rate is certain or impossible: a kind that has always been right is not right for ever.
LEAST, MOST = 0.001, 0.99


@dataclass(eq=False)
class HitRates:
    """The hit rate of each kind of guess; kinds are numbered from 0."""

    prior: NDArray[np.float64]
    """Rate that is assumed at first, float64 [kinds]."""
    _tried: list[float] = field(init=False)
    _right: list[float] = field(init=False)
    _log_rates: list[float] | None = None

    def __post_init__(self) -> None:
        self._tried = [PRIOR_GUESSES] * len(self.prior)
        self._right = (PRIOR_GUESSES * self.prior).tolist()

    @property
    def log_rates(self) -> list[float]:
        """Log of each kind's rate."""
        if self._log_rates is None:
            rates = np.array(self._right) / np.array(self._tried)
            self._log_rates = np.log(np.clip(rates, LEAST, MOST)).tolist()
        return self._log_rates

    def copy(self) -> "HitRates":
        """Return a copy that learns independently of this one."""
        copied = HitRates(self.prior)
        copied._tried, copied._right = list(self._tried), list(self._right)
        return copied

    def record(self, guesses: Iterable[tuple[int, bool]]) -> None:
        """Learn from guesses, each as its kind and whether it was right."""
        kept = 0.5 ** (1 / HALF_LIFE)
        for kind, right in guesses:
            self._tried[kind] = self._tried[kind] * kept + 1.0
            self._right[kind] = self._right[kind] * kept + right
        self._log_rates = None

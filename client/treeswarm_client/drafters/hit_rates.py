"""How often guesses of a kind turn out right, counted as they are; old ones are forgotten."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# How many guesses' worth of trust a prior has.
PRIOR_GUESSES = 8.0
# Guesses of one kind after which an older one counts half.
HALF_LIFE = 400.0
# Never certain, never impossible: a kind that was always right is not right for ever.
LEAST, MOST = 0.001, 0.99


@dataclass(eq=False)
class HitRates:
    """By kind, from 0 on; `prior` [kinds] is what is believed at first."""

    prior: NDArray[np.float64]
    _tried: list[float] = field(init=False)
    _right: list[float] = field(init=False)
    _logs: list[float] | None = None

    def __post_init__(self) -> None:
        self._tried = [PRIOR_GUESSES] * len(self.prior)
        self._right = (PRIOR_GUESSES * self.prior).tolist()

    @property
    def logs(self) -> list[float]:
        """The log of each kind's rate."""
        if self._logs is None:
            rates = np.array(self._right) / np.array(self._tried)
            self._logs = np.log(np.clip(rates, LEAST, MOST)).tolist()
        return self._logs

    def copy(self) -> "HitRates":
        """As they are now."""
        copied = HitRates(self.prior)
        copied._tried, copied._right = list(self._tried), list(self._right)
        return copied

    def saw(self, guesses: Iterable[tuple[int, bool]]) -> None:
        """Kinds of guesses, and whether each was right."""
        kept = 0.5 ** (1 / HALF_LIFE)
        for kind, right in guesses:
            self._tried[kind] = self._tried[kind] * kept + 1.0
            self._right[kind] = self._right[kind] * kept + right
        self._logs = None

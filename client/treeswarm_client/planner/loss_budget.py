"""Speculation must not be slower than plain decoding: a budget of what it may lose, and when to try again.  Pure.

The budget is an account in units of a plain round.  A round with a tree adds the tokens it brought and takes away the
plain rounds that would have fitted into its time.  A plain round adds the small share that may be risked again.  In
debt, what a tree promises is doubted: calibrated chances lag behind a text that has changed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

# Plain rounds that may be lost to learning at the start of a text, and share of a plain round that every round adds:
# with exploration's own share a text of 128 tokens stays above 0.95 of plain decoding.
START, STAKE = 2.5, 0.02
# Bounds of the account: what was won long ago must not be lost all at once, and one stall of the network must not
# forbid trees for ever.
MOST, LEAST = 6.0, -1.0
# Factor for a promise in debt: a tree must promise twice its cost.
DOUBT = 0.5

# A text that has changed is noticed after this many plain rounds; later where a try costs more than its share.
EXPLORE_EVERY = 8
# Share of the time of plain rounds that exploring may take.
EXPLORE_SHARE = 0.02
# Trees that would nearly pay are tried sooner: perhaps it was chance, and little is lost.
EXPLORE_SOON, NEARLY = 4, 0.6
# Share by which an exploring tree may lengthen a round: enough for the few best nodes, where chances show first.
EXPLORE_LONGER = 0.025
# Most nodes of an exploring tree: no more are needed to show that.
EXPLORE_NODES = 8
# A plain round teaches nothing about trees, only what links and nodes take.  So the decision that no tree pays holds
# for this many of them, and the last one is learned from.  Planning each took a fiftieth of a round at 1 ms.
SKIPPED_ROUNDS = 4


@dataclass(frozen=True)
class LossBudget:
    """The account of what trees brought beyond plain rounds."""

    balance: float = START
    """Number of plain rounds that may still be lost; negative in debt."""

    @property
    def in_debt(self) -> bool:
        return self.balance < 0

    def discounted(self, chances: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the chances to plan with, float64 [n]: as calibrated, or less in debt."""
        return chances * DOUBT if self.in_debt else chances

    def after_tree(self, tokens: int, seconds: float, plain_s: float) -> "LossBudget":
        """Return the budget after a round with a drafted tree.

        It brought `tokens` in `seconds`; a plain round would have taken `plain_s`.
        """
        return self._changed_by(tokens - seconds / plain_s + STAKE)

    def after_plain_round(self) -> "LossBudget":
        """Return the budget after a round for which nothing was drafted."""
        return self._changed_by(STAKE)

    def _changed_by(self, change: float) -> "LossBudget":
        return LossBudget(min(MOST, max(LEAST, self.balance + change)))


@dataclass(frozen=True)
class Exploration:
    """When to ship a few nodes only to see whether guesses hit again, and when to skip planning altogether."""

    due_in: int | None = EXPLORE_EVERY
    """Number of rounds until the next try; None just after a tree, when the next plain round sets it."""
    skipped_rounds: int = 0
    """Number of plain rounds to come before whether a tree pays is planned again."""

    def is_due(self, within: int = 0) -> bool:
        """Whether a try is due within `within` rounds after the coming one."""
        return self.due_in is not None and self.due_in <= within

    def after_tree(self, *, found_hit: bool) -> "Exploration":
        """Return the state after a round with a tree; `found_hit`: it was a try, and a guess was right.

        After a hit where none were expected, the next try is due at once.
        """
        return replace(self, due_in=0 if found_hit else None)

    def after_plain_round(self, interval: Callable[[], int]) -> "Exploration":
        """Return the state after a plain round.

        `interval` returns the number of rounds between tries; it is called only for the first one after a tree.
        """
        return replace(self, due_in=(interval() if self.due_in is None else self.due_in) - 1)

    def skip(self, rounds: int) -> "Exploration":
        """Return the state in which the next `rounds` plain rounds are not planned."""
        return replace(self, skipped_rounds=rounds)

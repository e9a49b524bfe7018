"""Best-first trees from guesses that cost microseconds: grown one node at a time, and resumable.  Pure.

`model_tree.py` asks a model for whole levels at once.  Here a table is asked for the children of one node whenever that
node is the best one left.  How often its guesses of each kind turn out right is counted online, and old guesses count
less and less.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from treeswarm_client.drafters.seam import NO_NODE, UNANSWERED, DraftTree, ShouldStop, Verification, never_stop
from treeswarm_client.generation.draft_rules import DraftRules

ContextT = TypeVar("ContextT")
# Log of one in 3,000: no node with such a chance is worth its bytes, and no calibration tells two of them apart.
WORTHLESS = -8.0
# Seconds that one node takes; 10 to 40 µs were seen on one core of an AMD EPYC (Zen 3).
NODE_S = 30e-6
# Number of guesses that the prior counts as.
PRIOR_GUESSES = 8.0
# Number of guesses of one kind after which an older one counts half.
HALF_LIFE = 400.0
# No rate is certain or impossible: a kind that has always been right is not right for ever.
LEAST, MOST = 0.001, 0.99


class GuessSource(Protocol[ContextT]):
    """A table of guesses.  A context is all that the table needs to know of a node and the path to it."""

    def context_after(self, context: ContextT, token: int) -> ContextT:
        """Return the context of the child `token` of a node with `context`."""
        ...

    def guesses(self, context: ContextT) -> Sequence[tuple[int, float]]:
        """Return tokens that may follow, all different, each with the log of its chance (at most 0)."""
        ...


class TableTree(Generic[ContextT]):
    """The tree below one root, as far as it has been asked for.  Nodes are numbered from 0, the root is -1."""

    def __init__(
        self, source: GuessSource[ContextT], root: ContextT, depth: int, rules: DraftRules | None = None
    ) -> None:
        """Start with the root alone; `depth` is the largest number of levels below it.

        Guesses that `rules` exclude are left out.
        """
        self.depth = depth
        self._rules = rules
        self._source = source
        self._parents: list[int] = []
        self._tokens: list[int] = []
        self._scores: list[float] = []
        self._levels: list[int] = []
        self._index: dict[tuple[int, int], int] = {}
        """Number of each node, by its parent's number and its token."""
        self._contexts: dict[int, ContextT] = {-1: root}
        self._expanded = 0
        """Number of nodes that have offered their children; the root has from the start."""
        self._open: list[tuple[float, int, int, int]] = []
        """Heap of offered children: −score, a count that settles ties, the parent's number, the token."""
        self._count = 0
        if depth > 0:
            self._offer_children(-1, 0.0)

    def grow(self, size: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        """Return the best `size` nodes, or fewer where no more are worth anything.

        Once `should_stop` returns true, return the nodes found so far.
        """
        while len(self._tokens) < size:
            self._expand()
            if not self._open or should_stop(math.exp(-self._open[0][0]) / NODE_S):
                break
            negative, _, parent, token = heapq.heappop(self._open)
            self._index[parent, token] = len(self._tokens)
            self._parents.append(parent)
            self._tokens.append(token)
            self._scores.append(-negative)
            self._levels.append(self._levels[parent] + 1 if parent >= 0 else 1)
        size = max(size, 0)
        return DraftTree(
            np.array(self._parents[:size], np.int64),
            np.array(self._tokens[:size], np.int64),
            np.array(self._scores[:size], np.float32),
        )

    def answered(self, verification: Verification) -> list[tuple[ContextT, int]]:
        """Return the context and the target's token of every answered node of this tree, the root first."""
        nodes = [-1, *verification.tree.match(self._index).tolist()]
        pairs = zip(nodes, verification.answers.tolist(), strict=True)
        return [(self._context(node), answer) for node, answer in pairs if node != NO_NODE and answer != UNANSWERED]

    def _expand(self) -> None:
        """Offer the children of the nodes added since the last call."""
        while self._expanded < len(self._tokens):
            node = self._expanded
            self._expanded += 1
            if self._levels[node] < self.depth:
                self._offer_children(node, self._scores[node])

    def _offer_children(self, node: int, score: float) -> None:
        for token, chance in self._allowed(node, self._source.guesses(self._context(node))):
            total = score + min(chance, 0.0)
            if total >= WORTHLESS:
                self._count += 1
                heapq.heappush(self._open, (-total, self._count, node, token))

    def _allowed(self, node: int, guesses: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
        """Return the guesses for the children of a node that the rules of the text allow."""
        if self._rules is None:
            return guesses
        path: list[int] = []
        while node >= 0:
            path.append(self._tokens[node])
            node = self._parents[node]
        allowed = self._rules.allowed(path[::-1], [token for token, _ in guesses])
        return [guess for guess, is_allowed in zip(guesses, allowed, strict=True) if is_allowed]

    def _context(self, node: int) -> ContextT:
        if node not in self._contexts:
            above = self._context(self._parents[node])
            self._contexts[node] = self._source.context_after(above, self._tokens[node])
        return self._contexts[node]


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

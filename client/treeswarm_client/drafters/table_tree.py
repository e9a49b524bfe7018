"""Best-first trees from guesses that cost microseconds: one node at a time, and resumable.  Pure.

`growth.py` asks a model for whole levels at once; a table is asked for one node whenever that node is the best left.
"""

import heapq
import math
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from treeswarm_client.drafters.seam import NO_NODE, UNANSWERED, DraftTree, ShouldStop, Verification, never_stop

State = TypeVar("State")
# Log of one in 3,000: no node of such a chance is worth its bytes, and a calibration tells none of them apart.
WORTHLESS = -8.0
# What one node takes; 10 to 40 µs were seen on one core of an AMD EPYC (Zen 3).
NODE_S = 30e-6


class GuessSource(Protocol[State]):
    """What follows a node, from what is known at it."""

    def after(self, state: State, token: int) -> State:
        """What is known at the child `token` of a node."""
        ...

    def guesses(self, state: State) -> Sequence[tuple[int, float]]:
        """Tokens that may follow, all different, each with the log of its chance (at most 0)."""
        ...


class TableTree(Generic[State]):
    """The tree below one root, as far as anybody has asked."""

    def __init__(self, source: GuessSource[State], root: State, depth: int) -> None:
        self.depth = depth
        self._source = source
        self._parents: list[int] = []
        self._tokens: list[int] = []
        self._scores: list[float] = []
        self._levels: list[int] = []
        self._places: dict[tuple[int, int], int] = {}
        """Of nodes, by parent's place and token."""
        self._states: dict[int, State] = {-1: root}
        self._expanded = 0
        """Places below it have offered their children; the root has from the start."""
        self._open: list[tuple[float, int, int, int]] = []
        """A heap of −score, a count that settles ties, parent's place, token."""
        self._count = 0
        if depth > 0:
            self._offer(-1, 0.0)

    def grow(self, size: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        """The best `size` nodes, or fewer where no more are worth anything; once `should_stop` says so, what is there."""
        while len(self._tokens) < size:
            self._expand()
            if not self._open or should_stop(math.exp(-self._open[0][0]) / NODE_S):
                break
            negative, _, parent, token = heapq.heappop(self._open)
            self._places[parent, token] = len(self._tokens)
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

    def answered(self, verification: Verification) -> list[tuple[State, int]]:
        """What was known at every answered node of this tree, the root first, and the target's token there."""
        places = [-1, *verification.tree.match(self._places).tolist()]
        pairs = zip(places, verification.answers.tolist(), strict=True)
        return [(self._state(p), answer) for p, answer in pairs if p != NO_NODE and answer != UNANSWERED]

    def _expand(self) -> None:
        """The nodes added since the last time offer their children."""
        while self._expanded < len(self._tokens):
            place = self._expanded
            self._expanded += 1
            if self._levels[place] < self.depth:
                self._offer(place, self._scores[place])

    def _offer(self, place: int, score: float) -> None:
        for token, chance in self._source.guesses(self._state(place)):
            total = score + min(chance, 0.0)
            if total >= WORTHLESS:
                self._count += 1
                heapq.heappush(self._open, (-total, self._count, place, token))

    def _state(self, place: int) -> State:
        if place not in self._states:
            above = self._state(self._parents[place])
            self._states[place] = self._source.after(above, self._tokens[place])
        return self._states[place]

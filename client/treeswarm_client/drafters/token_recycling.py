"""Token Recycling (arXiv 2408.08696): after this token, what did the target think of last time?

A table of successors, filled from the target's best tokens at every verified node, rejected ones too; how often each
rank is right is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

import numpy as np

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_client.drafters.hit_rates import HitRates
from treeswarm_client.drafters.seam import NO_TREE, UNANSWERED, DraftTree, ShouldStop, Verification, never_stop
from treeswarm_client.drafters.table_tree import TableTree

SUCCESSORS = 8
# How often a rank's token was the target's next, in the demo pair's code; what is seen soon outweighs it.
PRIOR = (0.36, 0.13, 0.07, 0.05, 0.035, 0.03, 0.025, 0.02)


@dataclass(eq=False)
class TokenRecyclingDrafter:
    """What the target said outlives a generation; what the prompt said does not."""

    name: str = "recycling"
    alternatives: int = SUCCESSORS
    _last: int | None = None
    """The context's last token."""
    _said: dict[int, list[int]] = field(default_factory=dict)
    """By token: successors in the target's own words, best first."""
    _read: dict[int, list[int]] = field(default_factory=dict)
    """The same of the prompt, the latest first."""
    _rates: HitRates = field(default_factory=lambda: HitRates(np.array(PRIOR)))
    """By rank."""
    _tree: TableTree[int] | None = None

    def copy_for_new_generation(self) -> Self:
        """One for a generation beside this one: what is known so far, and a text of its own."""
        return type(self)(_said=dict(self._said), _rates=self._rates.copy())

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        self._read, self._tree = {}, None
        for token, following in pairwise(prompt):
            self._read[token] = _in_front(following, self._read.get(token, ()))
        self._last = prompt[-1] if prompt else None

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        if self._last is None:
            return NO_TREE
        if self._tree is None or self._tree.depth != depth:
            self._tree = TableTree(self, self._last, depth)
        return self._tree.grow(size, should_stop)

    def observe(self, verification: Verification) -> None:
        if self._last is None:
            return
        answers = verification.answers.tolist()
        best = verification.alternatives.tolist() or [()] * len(answers)
        tokens = [self._last, *verification.tree.tokens.tolist()]
        told = [each for each in zip(tokens, answers, best, strict=True) if each[1] != UNANSWERED]
        for token, answer, _ in told:
            known = self._successors(token)
            self._rates.saw([(rank, answer == guess) for rank, guess in enumerate(known)])
        for token, answer, alternatives in told:
            self._learn(token, answer, alternatives)
        self._last, self._tree = verification.bonus, None

    def after(self, state: int, token: int) -> int:
        """All that is known at a node is its token."""
        return token

    def guesses(self, state: int) -> list[tuple[int, float]]:
        """Its successors, by rank."""
        return list(zip(self._successors(state), self._rates.logs, strict=False))

    def _successors(self, token: int) -> list[int]:
        said = self._said.get(token, [])
        return [*said, *(t for t in self._read.get(token, ()) if t not in said)][:SUCCESSORS]

    def _learn(self, token: int, answer: int, alternatives: Sequence[int]) -> None:
        self._said[token] = _in_front(answer, alternatives or self._said.get(token, ()))


def _in_front(token: int, others: Sequence[int]) -> list[int]:
    """A new list: copies of a drafter share the old ones."""
    return [token, *(other for other in others if other != token)][:SUCCESSORS]

"""Token Recycling (arXiv 2408.08696): guess what the target found likely the last time after the same token.

A table of successors is filled from the target's best tokens at every verified node, rejected ones too.  How often each
rank is right is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

import numpy as np

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_client.drafters.seam import NO_TREE, UNANSWERED, DraftTree, ShouldStop, Verification, never_stop
from treeswarm_client.drafters.table_tree import HitRates, TableTree
from treeswarm_client.generation.draft_rules import DraftRules

SUCCESSORS = 8
# How often the token of each rank was the target's next, in the demo pair's code.  Guesses seen soon outweigh it.
PRIOR = (0.36, 0.13, 0.07, 0.05, 0.035, 0.03, 0.025, 0.02)


@dataclass(eq=False)
class TokenRecyclingDrafter:
    """A drafter with a table of successors.

    Successors from the target outlive a generation; those from the prompt do not.
    """

    name: str = "recycling"
    alternatives: int = SUCCESSORS
    _last: int | None = None
    """Last token of the context."""
    _from_target: dict[int, list[int]] = field(default_factory=dict)
    """Successors that the target chose or found likely, by token, best first."""
    _from_prompt: dict[int, list[int]] = field(default_factory=dict)
    """Successors in the prompt, by token, the latest first."""
    _rates: HitRates = field(default_factory=lambda: HitRates(np.array(PRIOR)))
    """Hit rate by rank."""
    _tree: TableTree[int] | None = None
    _rules: DraftRules | None = None

    def copy_for_new_generation(self) -> Self:
        """See `CopyableDrafter`."""
        return type(self)(_from_target=dict(self._from_target), _rates=self._rates.copy())

    def obey(self, rules: DraftRules | None) -> None:
        """See `ObeysRules`."""
        self._rules = rules

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        """See `Drafter`."""
        self._from_prompt, self._tree = {}, None
        for token, following in pairwise(prompt):
            self._from_prompt[token] = _in_front(following, self._from_prompt.get(token, ()))
        self._last = prompt[-1] if prompt else None

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        """See `Drafter`."""
        if self._last is None:
            return NO_TREE
        if self._tree is None or self._tree.depth != depth:
            self._tree = TableTree(self, self._last, depth, self._rules)
        return self._tree.grow(size, should_stop)

    def observe(self, verification: Verification) -> None:
        """See `Drafter`."""
        if self._last is None:
            return
        answers = verification.answers.tolist()
        best = verification.alternatives.tolist() or [()] * len(answers)
        tokens = [self._last, *verification.tree.tokens.tolist()]
        labels = [label for label in zip(tokens, answers, best, strict=True) if label[1] != UNANSWERED]
        for token, answer, _ in labels:
            self._rates.record([(rank, answer == guess) for rank, guess in enumerate(self._successors(token))])
        for token, answer, alternatives in labels:
            self._learn(token, answer, alternatives)
        self._last, self._tree = verification.bonus, None

    def context_after(self, context: int, token: int) -> int:
        """Return `token`: the context of a node is its token alone."""
        return token

    def guesses(self, context: int) -> list[tuple[int, float]]:
        """Return the successors of the token, with the log of the hit rate of each rank."""
        return list(zip(self._successors(context), self._rates.log_rates, strict=False))

    def _successors(self, token: int) -> list[int]:
        from_target = self._from_target.get(token, [])
        from_prompt = (t for t in self._from_prompt.get(token, ()) if t not in from_target)
        return [*from_target, *from_prompt][:SUCCESSORS]

    def _learn(self, token: int, answer: int, alternatives: Sequence[int]) -> None:
        self._from_target[token] = _in_front(answer, alternatives or self._from_target.get(token, ()))


def _in_front(token: int, others: Sequence[int]) -> list[int]:
    """Return `token` and the others after it, at most SUCCESSORS.  The list is new: copies of a drafter share the old
    ones."""
    return [token, *(other for other in others if other != token)][:SUCCESSORS]

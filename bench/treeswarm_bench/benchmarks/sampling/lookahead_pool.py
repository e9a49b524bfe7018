"""Lookahead decoding's pool of n-grams as a drafter: what followed a token before, in trees that were rejected too.

Lookahead decoding (arXiv 2402.02057) fills its pool from a Jacobi window that travels with every step.  Here the pool
is filled from the text and from what the target answered along all branches of a tree, which costs no row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_client.drafters.seam import NO_TREE, UNANSWERED, DraftTree, ShouldStop, Verification, never_stop
from treeswarm_client.drafters.table_tree import HitRates, TableTree

# Tokens of an n-gram after its first one, and n-grams kept per first token: the paper's N = 5 and G = 15.
FOLLOWING, KEPT = 4, 15
PRIOR = tuple(0.3 * 0.7**rank for rank in range(KEPT))

Path = tuple[int, ...]
"""The root's token, and the tokens down to a node."""


@dataclass(eq=False)
class LookaheadPoolDrafter:
    """A drafter that proposes the n-grams that begin with the last token, the latest first."""

    name: str = "pool"
    alternatives: int = 0
    _text: list[int] = field(default_factory=list)
    _pool: dict[int, list[Path]] = field(default_factory=dict)
    _rates: HitRates = field(default_factory=lambda: HitRates(np.array(PRIOR)))
    """Hit rate by age of the n-gram."""
    _tree: TableTree[Path] | None = None

    def copy_for_new_generation(self) -> Self:
        return type(self)(_pool={token: list(grams) for token, grams in self._pool.items()}, _rates=self._rates.copy())

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        self._text, self._tree = list(prompt), None
        for end in range(2, len(prompt) + 1):
            self._learn(prompt[max(0, end - 1 - FOLLOWING) : end])

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        if not self._text:
            return NO_TREE
        if self._tree is None or self._tree.depth != depth:
            self._tree = TableTree(self, (self._text[-1],), depth)
        return self._tree.grow(size, should_stop)

    def observe(self, verification: Verification) -> None:
        tree, answers = verification.tree, verification.answers.tolist()
        paths: list[list[int]] = [self._text[-FOLLOWING:]]
        for parent, token in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True):
            paths.append([*paths[parent + 1], token])
        guesses = self.guesses((self._text[-1],)) if self._text else []
        self._rates.record([(rank, token == answers[0]) for rank, (token, _) in enumerate(guesses)])
        for path, answer in zip(paths, answers, strict=True):
            if answer != UNANSWERED:
                self._learn([*path, answer][-1 - FOLLOWING :])
        self._text += [*(int(tree.tokens[node]) for node in verification.accepted), verification.bonus]
        self._tree = None

    def context_after(self, context: Path, token: int) -> Path:
        return (*context, token)

    def guesses(self, context: Path) -> list[tuple[int, float]]:
        """Return the tokens that continue a path within an n-gram, each with the log of its rate."""
        after = len(context) - 1
        found: dict[int, float] = {}
        for rank, gram in enumerate(self._pool.get(context[0], ())):
            if gram[:after] == context[1:] and after < len(gram):
                found.setdefault(gram[after], self._rates.log_rates[rank])
        return sorted(found.items(), key=lambda guess: -guess[1])

    def _learn(self, tokens: Sequence[int]) -> None:
        """Keep the n-grams that end with the last of `tokens`, each below its first token."""
        for start in range(len(tokens) - 1):
            first, gram = tokens[start], tuple(tokens[start + 1 :])
            others = [old for old in self._pool.get(first, ()) if old != gram and gram[: len(old)] != old]
            self._pool[first] = [gram, *others][:KEPT]

"""Suffix drafting: guess what followed earlier occurrences of the text's end.

As in SuffixDecoding (arXiv 2411.04975), earlier occurrences of the text's end, in this text and in past outputs, vote
for what comes next.  The tree is grown best-first by the product of the shares of votes.  A third source is the useful
part of lookahead decoding (arXiv 2402.02057): n-grams of the target's tokens along branches that were not walked.

Occurrences are found by their last two tokens and then followed.  So every match length is known without a tree of all
suffixes, which would need a node for each length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import log
from typing import Self

import numpy as np

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_client.drafters.ngram_index import SEPARATOR, IndexedText
from treeswarm_client.drafters.seam import NO_TREE, UNANSWERED, DraftTree, ShouldStop, Verification, never_stop
from treeswarm_client.drafters.table_tree import HitRates, TableTree
from treeswarm_client.generation.draft_rules import DraftRules

# Number of the latest occurrences of two tokens that are looked at in each source.
LOOKED_AT = 16
# Length in tokens beyond which a longer match counts no more.
LONGEST = 24
# Factor by which the vote of a match one token longer counts more: two tokens more outvote LOOKED_AT occurrences.
LONGER = 4.0
# Numbers of tokens kept of past outputs and of branches: about 10 MB if no two pairs of tokens are the same.
PAST, POOL = 1 << 16, 1 << 14
# Weights of the votes of this text, past outputs and branches; branches come from texts that were never generated.
TRUST = (1.0, 0.7, 0.4)
# Number of tokens of a branch that are kept before the target's own.
LEAD = 3
# Kinds of guesses: by the length of the longest match, and by whether all occurrences agree.  The priors are the
# chances that a guess of each kind is right.
KINDS = (2, 3, 4, 5, 7, 10, 16)
PRIOR_AGREED = (0.35, 0.5, 0.6, 0.7, 0.8, 0.87, 0.93)
PRIOR_SPLIT = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
VOTE = [LONGER**length for length in range(LONGEST + 1)]
_KIND = [max(0, sum(length >= least for least in KINDS) - 1) for length in range(LONGEST + 1)]


@dataclass(frozen=True, slots=True)
class Matches:
    """The context of a node: its token, and where the path to it occurred before."""

    token: int
    occurrences: tuple[tuple[int, int, int], ...]
    """Source, position of the token in it, and number of tokens that match."""


@dataclass(eq=False)
class SuffixDrafter:
    """A drafter that repeats texts.

    Past outputs, branches and hit rates outlive a generation; its text becomes a past output.
    """

    name: str = "suffix"
    alternatives: int = 0
    _text: IndexedText = field(default_factory=IndexedText)
    _past: IndexedText = field(default_factory=lambda: IndexedText(PAST))
    _pool: IndexedText = field(default_factory=lambda: IndexedText(POOL))
    _output: int = 0
    """Position in the text where the target's own tokens begin."""
    _rates: HitRates = field(default_factory=lambda: HitRates(np.array(PRIOR_AGREED + PRIOR_SPLIT)))
    _end: Matches | None = None
    """Occurrences of the end of the text, or None if they have to be found anew."""
    _tree: TableTree[Matches] | None = None
    _rules: DraftRules | None = None

    @property
    def _sources(self) -> tuple[IndexedText, IndexedText, IndexedText]:
        return self._text, self._past, self._pool

    def copy_for_new_generation(self) -> Self:
        """See `CopyableDrafter`."""
        return type(self)(_past=self._past.copy(), _pool=self._pool.copy(), _rates=self._rates.copy())

    def obey(self, rules: DraftRules | None) -> None:
        """See `ObeysRules`."""
        self._rules = rules

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        """See `Drafter`."""
        if output := self._text.tokens[self._output :]:
            self._past.add([*output, SEPARATOR])
        self._text, self._end, self._tree, self._output = IndexedText(), None, None, len(prompt)
        self._text.add(prompt)

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        """See `Drafter`."""
        if not len(self._text):
            return NO_TREE
        if self._tree is None or self._tree.depth != depth:
            self._end = self._end or self._matches_of_end()
            self._tree = TableTree(self, self._end, depth, self._rules)
        return self._tree.grow(size, should_stop)

    def observe(self, verification: Verification) -> None:
        """See `Drafter`."""
        if self._tree is not None:
            for matches, answer in self._tree.answered(verification):
                votes, kind = self._votes(matches)
                if votes:
                    self._rates.record([(kind, answer in votes)])
        for branch in branches(self._text.tokens[-LEAD:].tolist(), verification):
            if self._pool.add([*branch, SEPARATOR]):
                self._end = None
        for token in (*verification.tree.tokens[list(verification.accepted)].tolist(), verification.bonus):
            self._end = self._end and self.context_after(self._end, token)
            self._text.add([token])
        self._tree = None

    def context_after(self, context: Matches, token: int) -> Matches:
        """Return the occurrences that continue with `token`, and other occurrences of the last two tokens."""
        occurrences = [
            (source, position + 1, min(length + 1, LONGEST))
            for source, position, length in context.occurrences
            if position + 1 < len(self._sources[source]) and self._sources[source].tokens[position + 1] == token
        ]
        followed = {(source, position) for source, position, _ in occurrences}
        occurrences += [
            (source, position, 2)
            for source, text in enumerate(self._sources)
            for position in text.ended_by(context.token, token, LOOKED_AT)
            if (source, position) not in followed
        ]
        return Matches(token, tuple(occurrences))

    def guesses(self, context: Matches) -> list[tuple[int, float]]:
        """Return the tokens that followed, each with the log of its share of the votes times their hit rate."""
        votes, kind = self._votes(context)
        log_total, log_rate = log(sum(votes.values()) or 1.0), self._rates.log_rates[kind]
        return [(token, log_rate + log(vote) - log_total) for token, vote in votes.items()]

    def _votes(self, matches: Matches) -> tuple[dict[int, float], int]:
        """Return the votes for each token that followed, and the kind of these guesses."""
        votes: dict[int, float] = {}
        longest = 0
        for source, position, length in matches.occurrences:
            tokens = self._sources[source].tokens
            if position + 1 < len(tokens) and (token := tokens[position + 1]) != SEPARATOR:
                votes[token] = votes.get(token, 0.0) + TRUST[source] * VOTE[length]
                longest = max(longest, length)
        return votes, _KIND[longest] + (len(KINDS) if len(votes) > 1 else 0)

    def _matches_of_end(self) -> Matches:
        """Return the occurrences of the text's end, found from its last LONGEST tokens."""
        end = self._text.tokens[-LONGEST:].tolist()
        matches = Matches(end[0], ())
        for token in end[1:]:
            matches = self.context_after(matches, token)
        return matches


def branches(end: Sequence[int], verification: Verification) -> Iterator[list[int]]:
    """Yield the target's own tokens along branches off its path.

    A branch begins at each node that is not the target's choice, and goes as far as the tree has answers.  It includes
    the `LEAD` tokens before; `end` are the last tokens of the text.
    """
    answers, tree = verification.answers.tolist(), verification.tree
    paths: list[list[int]] = []
    for node, (parent, token) in enumerate(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)):
        paths.append([*(paths[parent] if parent >= 0 else end), token][-LEAD:])
        if answers[parent + 1] == token or answers[node + 1] == UNANSWERED:
            continue
        branch: list[int] = list(paths[node])
        last: int | None = node
        while last is not None and answers[last + 1] != UNANSWERED:
            branch.append(answers[last + 1])
            last = tree.index.get((last, answers[last + 1]))
        yield branch

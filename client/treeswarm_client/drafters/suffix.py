"""What followed the last time the text went like this?

As SuffixDecoding (arXiv 2411.04975): earlier occurrences of the text's end, in this text and in past outputs, vote for
what comes next, and the tree is grown best-first by the product of the shares.  A third source is what is worth
keeping of lookahead decoding (arXiv 2402.02057): n-grams that the target said along branches that were not walked.

Occurrences are found by their last two tokens and followed, so every match length is known without a tree of all
suffixes, which would cost a node for each length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import log
from typing import Self

import numpy as np

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_client.drafters.hit_rates import HitRates
from treeswarm_client.drafters.ngram_index import SEPARATOR, IndexedText
from treeswarm_client.drafters.seam import NO_TREE, UNANSWERED, DraftTree, ShouldStop, Verification, never_stop
from treeswarm_client.drafters.table_tree import TableTree

# Of each source, the latest occurrences of two tokens that are looked at.
LOOKED_AT = 16
# Longer matches say nothing more.
LONGEST = 24
# A vote of a match one token longer counts so much more: two of these lengths outvote any crowd of LOOKED_AT.
LONGER = 4.0
# Tokens.  About 10 MB where no two pairs of tokens are the same.
PAST, POOL = 1 << 16, 1 << 14
# Votes of text, past outputs and branches: the target said the last of these in texts that never were.
TRUST = (1.0, 0.7, 0.4)
# Tokens of a branch before those that the target said.
LEAD = 3
# Kinds of guesses: by the longest match, and whether all occurrences agree.  Chances that one of them is right.
KINDS = (2, 3, 4, 5, 7, 10, 16)
PRIOR_AGREED = (0.35, 0.5, 0.6, 0.7, 0.8, 0.87, 0.93)
PRIOR_SPLIT = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
VOTE = [LONGER**length for length in range(LONGEST + 1)]
_KIND = [max(0, sum(length >= least for least in KINDS) - 1) for length in range(LONGEST + 1)]


@dataclass(frozen=True, slots=True)
class Matches:
    """A node: its token, and where the path to it occurred: (source, place of its token, tokens that match)."""

    token: int
    found: tuple[tuple[int, int, int], ...]


@dataclass(eq=False)
class SuffixDrafter:
    """Past outputs, branches and hit rates outlive a generation; its text becomes a past output."""

    name: str = "suffix"
    alternatives: int = 0
    _text: IndexedText = field(default_factory=IndexedText)
    _past: IndexedText = field(default_factory=lambda: IndexedText(PAST))
    _pool: IndexedText = field(default_factory=lambda: IndexedText(POOL))
    _output: int = 0
    """Where in the text the target's own words begin."""
    _rates: HitRates = field(default_factory=lambda: HitRates(np.array(PRIOR_AGREED + PRIOR_SPLIT)))
    _end: Matches | None = None
    """Of the text so far; None where it has to be found anew."""
    _tree: TableTree[Matches] | None = None

    @property
    def _sources(self) -> tuple[IndexedText, IndexedText, IndexedText]:
        return self._text, self._past, self._pool

    def copy_for_new_generation(self) -> Self:
        """One for a generation beside this one: what is known so far, and a text of its own."""
        return type(self)(_past=self._past.copy(), _pool=self._pool.copy(), _rates=self._rates.copy())

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        if said := self._text.tokens[self._output :]:
            self._past.add([*said, SEPARATOR])
        self._text, self._end, self._tree, self._output = IndexedText(), None, None, len(prompt)
        self._text.add(prompt)

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        if not len(self._text):
            return NO_TREE
        if self._tree is None or self._tree.depth != depth:
            self._end = self._end or self._found()
            self._tree = TableTree(self, self._end, depth)
        return self._tree.grow(size, should_stop)

    def observe(self, verification: Verification) -> None:
        if self._tree is not None:
            for matches, answer in self._tree.answered(verification):
                votes, kind = self._votes(matches)
                if votes:
                    self._rates.saw([(kind, answer in votes)])
        for branch in branches(self._text.tokens[-LEAD:].tolist(), verification):
            if self._pool.add([*branch, SEPARATOR]):
                self._end = None
        for token in (*verification.tree.tokens[list(verification.accepted)].tolist(), verification.bonus):
            self._end = self._end and self.after(self._end, token)
            self._text.add([token])
        self._tree = None

    def after(self, state: Matches, token: int) -> Matches:
        """The occurrences that go on with this token, and others of the last two."""
        found = [
            (source, place + 1, min(length + 1, LONGEST))
            for source, place, length in state.found
            if place + 1 < len(self._sources[source]) and self._sources[source].tokens[place + 1] == token
        ]
        followed = {(source, place) for source, place, _ in found}
        found += [
            (source, place, 2)
            for source, text in enumerate(self._sources)
            for place in text.ended_by(state.token, token, LOOKED_AT)
            if (source, place) not in followed
        ]
        return Matches(token, tuple(found))

    def guesses(self, state: Matches) -> list[tuple[int, float]]:
        """What followed, by its share of the votes and by how often such votes are right."""
        votes, kind = self._votes(state)
        total, right = log(sum(votes.values()) or 1.0), self._rates.logs[kind]
        return [(token, right + log(vote) - total) for token, vote in votes.items()]

    def _votes(self, matches: Matches) -> tuple[dict[int, float], int]:
        votes: dict[int, float] = {}
        longest = 0
        for source, place, length in matches.found:
            tokens = self._sources[source].tokens
            if place + 1 < len(tokens) and (token := tokens[place + 1]) != SEPARATOR:
                votes[token] = votes.get(token, 0.0) + TRUST[source] * VOTE[length]
                longest = max(longest, length)
        return votes, _KIND[longest] + (len(KINDS) if len(votes) > 1 else 0)

    def _found(self) -> Matches:
        """At the end of the text, from as far back as matters."""
        end = self._text.tokens[-LONGEST:].tolist()
        matches = Matches(end[0], ())
        for token in end[1:]:
            matches = self.after(matches, token)
        return matches


def branches(end: Sequence[int], verification: Verification) -> Iterator[list[int]]:
    """What the target said along branches off its path: each from where a node is not its own choice, as far as the
    tree answers, with the `LEAD` tokens before (`end` are the text's last)."""
    answers, tree = verification.answers.tolist(), verification.tree
    parents, tokens = tree.parents.tolist(), tree.tokens.tolist()
    paths: list[list[int]] = []
    for node, (parent, token) in enumerate(zip(parents, tokens, strict=True)):
        paths.append([*(paths[parent] if parent >= 0 else end), token][-LEAD:])
        if answers[parent + 1] == token or answers[node + 1] == UNANSWERED:
            continue
        said: list[int] = list(paths[node])
        at: int | None = node
        while at is not None and answers[at + 1] != UNANSWERED:
            said.append(answers[at + 1])
            at = tree.index.get((at, answers[at + 1]))
        yield said

"""The rules of a text as its drafts obey them: the same function as at the tail.  Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.text_rules import RulesRequest
from treeswarm.session.grammars import GrammarPaths
from treeswarm.session.logit_edits import LogitEdits, RuledText
from treeswarm.session.paths import RowPaths

Places = NDArray[np.int64]


@dataclass(eq=False)
class DraftRules:
    """Rules, and the text below whose last token drafts grow.  Only the drafter's thread uses it."""

    request: RulesRequest
    text: list[int]
    """The prompt and all tokens since; it only grows."""
    grammar: GrammarPaths | None = None
    """What follows the request's grammar, or None if there is none or this machine has no library for it."""
    _ruled: RuledText = field(init=False)

    def __post_init__(self) -> None:
        self._ruled = RuledText(self.request)

    def edits(self, parents: Places, tokens: Places, rows: Places) -> LogitEdits:
        """Return what the rules change after some nodes of a tree below the text.

        Nodes are given by the index of their parent (-1 for the text's last token) and their token; `rows` are indices
        of nodes, -1 for the text's last token itself.
        """
        paths = RowPaths(self.text, len(self.text), parents, tokens, rows)
        return self._ruled.edits(paths, None if self.grammar is None else self.grammar.allowed(paths))

    def allowed(self, path: Sequence[int], guesses: Sequence[int]) -> list[bool]:
        """Return which guesses the rules allow after a path of tokens below the text."""
        if not self.request.rules.banning or not guesses:
            return [True] * len(guesses)
        nodes = np.arange(len(path))
        end = np.array([len(path) - 1])  # -1 without a path: the text's own end
        paths = RowPaths(self.text, len(self.text), nodes - 1, np.array(path, np.int64), end)
        return self._ruled.allowed(paths, guesses, None if self.grammar is None else self.grammar.allowed(paths))

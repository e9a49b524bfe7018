"""A grammar for toy swarms: what may follow depends on all tokens generated before."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.errors import BadRequest
from treeswarm.protocol.text_rules import RulesRequest
from treeswarm.session.grammars import packed_words
from treeswarm.session.paths import RowPaths


def toy_allowed(generated: list[int], vocab_size: int) -> list[int]:
    """Return the tokens that may follow: those that differ in parity from the sum so far, and 0."""
    return [token for token in range(vocab_size) if token == 0 or token % 2 != sum(generated) % 2]


@dataclass(eq=False)
class ToyGrammarPaths:
    """Follows one text."""

    vocab_size: int
    prompt_length: int
    rows: int = 0
    """Number of rows for which masks were computed."""

    def allowed(self, paths: RowPaths) -> NDArray[np.uint32]:
        masks = np.zeros((len(paths), packed_words(self.vocab_size)), np.uint32)
        for row, text in enumerate(paths.whole()):
            for token in toy_allowed(text[self.prompt_length :], self.vocab_size):
                masks[row, token // 32] |= np.uint32(1 << token % 32)
        self.rows += len(paths)
        return masks


@dataclass(eq=False)
class ToyLibrary:
    """Compiles every grammar but those whose text is "broken"."""

    vocab_size: int
    name: str = "toy grammars 1"
    opened: list[ToyGrammarPaths] = field(default_factory=list)

    def open(self, request: RulesRequest) -> ToyGrammarPaths:
        assert request.rules.grammar is not None
        if request.rules.grammar.text == "broken":
            raise BadRequest("the grammar is broken")
        self.opened.append(ToyGrammarPaths(self.vocab_size, request.prompt_length))
        return self.opened[-1]

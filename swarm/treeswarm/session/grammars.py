"""The seam between the texts of a tree and a library of grammars."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.text_rules import RulesRequest
from treeswarm.session.paths import RowPaths


class GrammarPaths(Protocol):
    """One text under a grammar, and the trees below it.  One thread at a time uses it."""

    def allowed(self, paths: RowPaths) -> NDArray[np.uint32]:
        """Return which tokens may follow each path, as packed bits, uint32 [rows, ceil(vocabulary / 32)].

        Bit i of word w stands for token 32 · w + i.  The text of later calls usually begins with that of earlier ones;
        after a repair it may be shorter, or start anew.  A path that the grammar itself excludes allows no token: its
        row is never reached.  A row that the grammar completes allows the rules' end tokens.
        """
        ...


class GrammarLibrary(Protocol):
    """Compiles grammars for the vocabulary of one model."""

    @property
    def name(self) -> str:
        """Name and version of the library, at most 40 characters: others may allow other tokens."""
        ...

    def open(self, request: RulesRequest) -> GrammarPaths:
        """Compile the grammar of a request, whose text begins after `prompt_length` tokens.

        Raises BadRequest with the reason for a grammar that it cannot take.
        """
        ...


def packed_words(vocab_size: int) -> int:
    """Return the number of 32-bit words that hold one bit per token."""
    return -(-vocab_size // 32)


def unpack_bits(masks: NDArray[np.uint32], vocab_size: int) -> NDArray[np.bool_]:
    """Return packed bits as bool [rows, vocab_size]."""
    words = np.ascontiguousarray(masks, "<u4").view(np.uint8)
    return np.unpackbits(words, axis=1, count=vocab_size, bitorder="little").view(np.bool_)

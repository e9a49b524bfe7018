"""A language model of counted trigrams, which refines lattices.  Pure.

A trigram's share is mixed with the bigram's, and that with the token's own, by the number of different tokens that were
seen there (Witten and Bell, 1991).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

# Trigrams that were seen once say little and are most of them.
LEAST_COUNT = 2


@dataclass(frozen=True, eq=False)
class CountedTokens:
    """How often tokens followed contexts."""

    keys: NDArray[np.int64]
    """context · vocabulary + token, rising, int64 [n]."""
    counts: NDArray[np.int32]
    contexts: NDArray[np.int64]
    """Contexts, rising, int64 [m]."""
    totals: NDArray[np.int32]
    """Number of tokens seen after each context."""
    kinds: NDArray[np.int32]
    """Number of different tokens seen after each context."""

    @classmethod
    def count(cls, contexts: NDArray[np.int64], tokens: NDArray[np.int64], vocab_size: int, least: int = 1) -> Self:
        """Count tokens after their contexts, both int64 [n]; pairs seen less than `least` times are dropped."""
        keys, counts = np.unique(contexts * vocab_size + tokens, return_counts=True)
        kept = counts >= least
        keys, counts = keys[kept], counts[kept].astype(np.int32)
        known, first = np.unique(keys // vocab_size, return_index=True)
        totals = np.add.reduceat(counts, first) if len(counts) else counts
        kinds = np.diff(np.append(first, len(keys)))
        return cls(keys, counts, known, totals.astype(np.int32), kinds.astype(np.int32))

    def mixed(
        self, contexts: NDArray[np.int64], tokens: NDArray[np.int64], lower: NDArray[np.float64], vocab_size: int
    ) -> NDArray[np.float64]:
        """Return the chance of tokens [n, m] after contexts [n], mixed with the `lower` order's chances [n, m]."""
        counts = _found(self.keys, self.counts, contexts[:, None] * vocab_size + tokens)
        totals = _found(self.contexts, self.totals, contexts)[:, None]
        kinds = _found(self.contexts, self.kinds, contexts)[:, None]
        return np.where(totals > 0, (counts + kinds * lower) / np.maximum(totals + kinds, 1), lower)


@dataclass(frozen=True, eq=False)
class TrigramModel:
    """Chances of tokens after two others."""

    vocab_size: int
    single: NDArray[np.float64]
    """Share of each token, float64 [vocabulary]."""
    pairs: CountedTokens
    triples: CountedTokens

    @classmethod
    def count(cls, texts: Iterable[NDArray[np.int64]], vocab_size: int) -> Self:
        """Count the tokens of some texts."""
        # Two tokens that no vocabulary has stand between texts, so that no trigram crosses their ends.
        rows = np.concatenate([np.append(text, [-1, -1]) for text in texts]).astype(np.int64)
        known = rows >= 0
        single = np.bincount(rows[known], minlength=vocab_size) + 0.5
        two, three = known[:-1] & known[1:], known[:-2] & known[1:-1] & known[2:]
        pairs = CountedTokens.count(rows[:-1][two], rows[1:][two], vocab_size)
        contexts = (rows[:-2] * vocab_size + rows[1:-1])[three]
        triples = CountedTokens.count(contexts, rows[2:][three], vocab_size, LEAST_COUNT)
        return cls(vocab_size, single / single.sum(), pairs, triples)

    def logprobs(self, before: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the log of the chance of tokens [n, m] after two tokens `before` [n, 2], float32 [n, m]."""
        pair = self.pairs.mixed(before[:, 1], tokens, self.single[tokens], self.vocab_size)
        context = before[:, 0] * self.vocab_size + before[:, 1]
        triple = self.triples.mixed(context, tokens, pair, self.vocab_size)
        return np.log(triple).astype(np.float32)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything as named tensors."""
        named = {"single": self.single}
        for name, counted in (("pairs", self.pairs), ("triples", self.triples)):
            named |= {f"{name}.{field}": getattr(counted, field) for field in CountedTokens.__dataclass_fields__}
        return {f"ngram.{name}": torch.from_numpy(np.ascontiguousarray(value)) for name, value in named.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> Self:
        """Take what `tensors` returned out of a dictionary."""
        arrays = {name: tensors.pop(name).numpy() for name in list(tensors) if name.startswith("ngram.")}
        single = arrays["ngram.single"]
        counted = [
            CountedTokens(*(arrays[f"ngram.{name}.{field}"] for field in CountedTokens.__dataclass_fields__))
            for name in ("pairs", "triples")
        ]
        return cls(len(single), single, *counted)


def _found(keys: NDArray[np.int64], values: NDArray[np.int32], wanted: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the values of wanted keys, 0 where there is none."""
    if not len(keys):
        return np.zeros(wanted.shape, np.int32)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)

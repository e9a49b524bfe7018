"""The learner of kinds that guess a block of positions at once: all positions below some rows of each text."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm_bench.speculators.kinds.block_heads import NGRAM_WEIGHT
from treeswarm_bench.speculators.kinds.ngram_model import TrigramModel
from treeswarm_bench.speculators.learning import HeadLearner
from treeswarm_bench.speculators.reads import TextReading
from treeswarm_node.speculator.parallel.lattice import make_lattice

# Every so many rows of a text a block begins.  A step then scores as many guesses as one of the autoregressive head.
STRIDE = 4
# Weight of each position's loss over that of the one before: a later one counts only if all before it are right.
DECAY = 0.8
# One in so many guesses is made without the token before it, so that a lattice's candidates are good as well.
UNFOLLOWED = 3
# Weights of n-grams of which the likeliest is written into the file, and how many rows of a text decide.
NGRAM_WEIGHTS = np.linspace(0.0, 1.5, 16)
WEIGHED_EVERY = 4


class BlockModule(Protocol):
    """The weights of a head that guesses blocks."""

    @property
    def levels(self) -> int:
        """Number of positions of a block."""
        ...

    def block(self, states: torch.Tensor, embedded: torch.Tensor, roots: slice = ...) -> torch.Tensor:
        """Return the results [batch, roots, levels, hidden] below some rows of texts."""
        ...

    def followed(self, results: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Return results as they are after tokens with the embeddings `previous`."""
        ...

    def logits(self, result: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
        """Return the scores of the tokens at the results' positions."""
        ...


@dataclass(eq=False)
class BlockLearner(HeadLearner):
    """A head that guesses blocks, its target, and the optimizers."""

    @property
    def levels(self) -> int:
        """See `HeadLearner`."""
        return self._module.levels

    @property
    def _module(self) -> BlockModule:
        return cast(BlockModule, self.head)

    def loss(self, reading: TextReading) -> torch.Tensor:
        """See `HeadLearner`; the blocks begin at some rows, others for other texts."""
        count, levels, module = reading.tokens.shape[1] - 1, self.levels, self._module
        roots = torch.arange(int(reading.tokens.sum()) % STRIDE, count, STRIDE, device=reading.tokens.device)
        rows = roots[:, None] + torch.arange(levels, device=roots.device)
        counted = rows < count
        rows = rows.clamp_max(count - 1)
        embedded = self.target.embedding[reading.tokens[:, 1:]].float()
        with self._autocast():
            results = module.block(reading.states[:, :-1].float(), embedded, slice(int(roots[0]), None, STRIDE))
            followed = module.followed(results, embedded[:, rows])
            alone = (rows + roots[:, None]) % UNFOLLOWED == 0
            results = torch.where(alone[None, ..., None], results, followed)
            logprobs = torch.log_softmax(module.logits(results, self._lm_head).float(), -1)
        likely, probabilities = reading.likely[:, 1:].long()[:, rows], reading.probabilities[:, 1:].float()[:, rows]
        entropies = -(probabilities * logprobs.gather(-1, likely)).sum(-1)
        weights = reading.real[:, 1:][:, rows] * counted * DECAY ** torch.arange(levels, device=roots.device)
        return (entropies * weights).sum() / weights.sum().clamp_min(1)

    def _guesses(self, reading: TextReading) -> Iterator[torch.Tensor]:
        """See `HeadLearner`: every guess follows the text's own tokens."""
        embedded = self.target.embedding[reading.tokens[:, 1:]].float()
        with self._autocast():
            results = self._module.block(reading.states[:, :-1].float(), embedded)
            for level in range(self.levels):
                # Row i guesses the token after next: in a block that began `level` rows before.
                aligned = torch.nn.functional.pad(results[:, : results.shape[1] - level, level], (0, 0, level, 0))
                followed = self._module.followed(aligned, embedded)
                yield self._module.logits(followed, self._lm_head).float()


class LatticeLearner(BlockLearner):
    """A learner that also counts trigrams, and fits what they count."""

    @torch.no_grad()
    def extra_tensors(
        self, texts: Sequence[NDArray[np.int64]], readings: Iterable[TextReading], greedy_tau: float
    ) -> dict[str, torch.Tensor]:
        """See `HeadLearner`."""
        trigrams = TrigramModel.count(texts, len(self.target.lm_head))
        losses = sum((self._losses_by_weight(reading, trigrams, greedy_tau) for reading in readings), np.zeros(1))
        weight = float(NGRAM_WEIGHTS[losses.argmin()])
        return trigrams.tensors() | {NGRAM_WEIGHT: torch.tensor(weight)}

    def _losses_by_weight(self, reading: TextReading, trigrams: TrigramModel, tau: float) -> NDArray[np.float64]:
        """Return how unlikely the texts' own tokens are among the refined candidates, by weight, in nats."""
        losses = np.zeros(len(NGRAM_WEIGHTS))
        tokens = reading.tokens.cpu().numpy()
        for level, logits in enumerate(self._guesses(reading)):
            if level == 0:
                continue
            counted = self._counted(reading.real, level)
            counted[:, -1:] = False  # what the last row guesses is not in the text
            counted[:, :-1] &= reading.real[:, 2:]
            texts, rows = (index.cpu().numpy()[::WEIGHED_EVERY] for index in counted.nonzero(as_tuple=True))
            lattice = make_lattice(logits[texts, rows] / tau, self.vocabulary.to(logits.device))
            before = np.stack([tokens[texts, rows], tokens[texts, rows + 1]], 1)
            added = trigrams.logprobs(before, lattice.tokens) / tau
            is_next = lattice.tokens == tokens[texts, rows + 2][:, None]
            for i, weight in enumerate(NGRAM_WEIGHTS):
                scores = lattice.scores + np.float32(weight) * added
                total = np.logaddexp(np.logaddexp.reduce(scores, 1), lattice.rest)
                losses[i] += float((total[:, None] - scores)[is_next].sum())
        return losses

"""The lattice kind: a head of its own for each of the next positions (Medusa), refined by counted trigrams.

All heads read the target's state and the bonus token, which is known when they guess, and nothing of one another.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import linear, rms_norm, silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from treeswarm_bench.speculators.kinds.ngram_model import TrigramModel
from treeswarm_node.speculator.files import SpeculatorConfig
from treeswarm_node.speculator.guesses import ConfiguredSpeculator, GuessScorer, HeadWeights, read_saved_head
from treeswarm_node.speculator.head import EPSILON
from treeswarm_node.speculator.parallel.lattice import LEVELS, CorrectScores, LatticeTree, make_lattice
from treeswarm_node.speculator.seam import SpeculatedTree, SpeculationRequest

LATTICE = "lattice"
NGRAM_WEIGHT = "ngram_weight"
"""Name of the tensor with what the trigrams' log-chances count beside the heads' logits."""


class BlockHeads(torch.nn.Module):
    """The heads of all positions, one residual layer each."""

    def __init__(self, hidden: int, taps: int, levels: int = LEVELS) -> None:
        super().__init__()
        self.taps, self.levels = taps, levels
        self.fuse = torch.nn.Linear(taps * hidden, hidden, bias=False)
        self.state_norm = LlamaRMSNorm(hidden, EPSILON)
        self.token_norm = LlamaRMSNorm(hidden, EPSILON)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(2 * hidden, hidden, bias=False) for _ in range(levels))
        self.result_norm = LlamaRMSNorm(hidden, EPSILON)

    @classmethod
    def of(cls, config: SpeculatorConfig) -> Self:
        """Return heads of a config's sizes, without their weights."""
        return cls(config.hidden_size, len(config.taps))

    def block(self, states: torch.Tensor, embedded: torch.Tensor, roots: slice = slice(None)) -> torch.Tensor:
        """Return the results [batch, roots, levels, hidden] below some rows of texts.

        `states` [batch, n, taps · hidden] are the target's, and `embedded` [batch, n, hidden] are the embeddings of the
        token after each row.
        """
        rows = states[:, roots].to(self.fuse.weight.dtype)
        each = rows.view(*rows.shape[:-1], self.taps, -1)
        state = self.fuse(rms_norm(each, each.shape[-1:], eps=EPSILON).flatten(-2))
        inputs = torch.cat([self.state_norm(state), self.token_norm(embedded[:, roots])], -1)
        return torch.stack([state + silu(head(inputs)) for head in self.heads], -2)

    def followed(self, results: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Return results as they are after the tokens before them: these heads see none but the bonus token."""
        return results

    def logits(self, result: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
        """Return the scores [..., tokens] of the tokens at the results' positions, by an LM head [tokens, hidden]."""
        return linear(self.result_norm(result), lm_head)


class LatticeSpeculator(ConfiguredSpeculator[BlockHeads]):
    """Trained heads that propose trees."""

    name = LATTICE

    def __init__(
        self,
        config: SpeculatorConfig,
        head: BlockHeads,
        weights: HeadWeights,
        trigrams: TrigramModel,
        ngram_weight: float,
    ) -> None:
        self.config, self.weights, self.trigrams = config, weights, trigrams
        self.ngram_weight = ngram_weight
        """What the trigrams' log-chances count beside the heads' logits."""
        self.is_refined = True
        """Whether they count."""
        self.head = head.eval().requires_grad_(False)
        self._scorer = GuessScorer(config, weights.vocabulary)

    @classmethod
    def load(cls, folder: Path, lm_head: torch.Tensor, *, is_tied: bool, dtype: torch.dtype) -> Self:
        """Load a folder; see `AutoregressiveSpeculator.load`."""
        saved = read_saved_head(folder, lm_head, is_tied=is_tied, dtype=dtype, kinds=(LATTICE,))
        trigrams = TrigramModel.from_tensors(saved.tensors)
        ngram_weight = float(saved.tensors.pop(NGRAM_WEIGHT))
        return cls(saved.config, saved.fill(BlockHeads.of(saved.config)), saved.weights, trigrams, ngram_weight)

    @property
    def window(self) -> int:
        """See `Speculator`: the last row, and the one before it for its next token, which a trigram needs."""
        return 2

    def new_memory(self) -> dict[str, int]:
        """See `Speculator`: the last token before the rows that are still to be read."""
        return {}

    @torch.inference_mode()
    def propose(self, request: SpeculationRequest) -> Iterator[SpeculatedTree]:
        """See `Speculator`."""
        device = self.weights.lm_head.device
        states = request.states[-1:].to(device)[None]
        results = self.head.block(states, self.weights.embed(request.next_tokens[-1:]))[0, 0]
        positions = request.root_position + 1 + np.arange(len(results))
        scores = self._scorer.scores(self.head.logits(results, self.weights.lm_head), positions, request.settings)
        lattice = make_lattice(scores, self.weights.vocabulary)
        before = request.memory.get("last", 0) if len(request.next_tokens) < 2 else int(request.next_tokens[-2])
        request.memory["last"] = int(request.next_tokens[-1])
        root = np.array([before, request.next_tokens[-1]], np.int64)
        weight = self.ngram_weight * self._scorer.sharpness(request.settings)

        def correct(levels: NDArray[np.int64], before: NDArray[np.int64]) -> NDArray[np.float32]:
            return np.float32(weight) * self.trigrams.logprobs(before, lattice.tokens[levels])

        chosen: CorrectScores | None = correct if self.is_refined else None
        yield from LatticeTree(lattice, root, chosen).grow(request.size)

"""What every kind of speculator does alike: load its weights, share the target's matrices, and score children."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import linear

from treeswarm.errors import ModelError
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.noise import NoiseRows
from treeswarm_node.model.quantization.packed_products import pack_products
from treeswarm_node.model.quantization.quantized_linear import QuantizedLinear, quantize_loaded, quantized_weight
from treeswarm_node.model.quantization.weight_kinds import Int8, has_integer_products
from treeswarm_node.speculator.files import KINDS, SpeculatorConfig, read_speculator_config, read_speculator_weights
from treeswarm_node.speculator.head import FIRST_MATRIX

# Number of children of a node.  Deeper in a tree of 64 nodes, no node was seen with more than a dozen.
WIDTH = 16
VOCABULARY = "vocabulary"
"""Name of the tensor with the token ids that the head can guess."""
EMBEDDING = "embedding"
"""Name of the tensor with the target's embedding, where its LM head is another matrix."""
# Sampling below this temperature is practically greedy, and logits divided by it would overflow.
COLDEST = 1e-4

Module = TypeVar("Module", bound=torch.nn.Module)


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """The matrices that a head shares with the target."""

    vocabulary: torch.Tensor
    """Token ids that the head can guess, int64 [n]."""
    lm_head: torch.Tensor
    """Rows of the target's LM head for these ids, [n, hidden]."""
    embedding: torch.Tensor
    """The target's embedding, [vocabulary, hidden]."""

    integers: QuantizedLinear | None = None
    """The rows of the LM head in eight bits, or None if scores are computed with `lm_head` itself."""

    def score(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the scores [..., n] of the tokens that the head can guess, for normed results [..., hidden]."""
        return linear(rows, self.lm_head) if self.integers is None else self.integers.multiply(rows)

    def embed(self, tokens: NDArray[np.int64]) -> torch.Tensor:
        """Return the embeddings [1, n, hidden] of tokens."""
        ids = torch.from_numpy(tokens).to(self.embedding.device)
        return self.embedding[ids].to(self.lm_head.dtype)[None]


@torch.no_grad()
def compute_in_eight_bits(head: torch.nn.Module, weights: HeadWeights) -> HeadWeights:
    """Let a head on a CPU that multiplies integers compute with 8-bit weights; return its LM head alike.

    The matrix over the states of all taps stays as it is, because other nodes have columns of it.  SmolLM2's head
    guessed the same tokens per traversal (2.50 greedy, 2.16 at T = 1; float32 had 2.49 and 2.16), and a proposal took
    32 and 39 ms of processor time, not 85 and 97 (8 texts of 96 tokens, 64 nodes, 2026-12-01).
    """
    if weights.lm_head.device.type != "cpu" or not has_integer_products():
        return weights
    for name, module in list(head.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != FIRST_MATRIX.removesuffix(".weight"):
            owner, _, child = name.rpartition(".")
            quantize_loaded(head.get_submodule(owner), child, Int8.name)
    scoring = torch.nn.Module()
    scoring.lm_head = QuantizedLinear(quantized_weight(weights.lm_head, Int8.name), None)
    pack_products([head, scoring])
    return replace(weights, integers=scoring.lm_head)


@dataclass(eq=False)
class GuessScorer:
    """Scores tokens by a head's logits, with the noise with which the target will choose."""

    config: SpeculatorConfig
    vocabulary: torch.Tensor
    """Token ids that the head can guess, int64 [n]."""

    def __post_init__(self) -> None:
        self._noise = NoiseRows(self.config.vocab_size)
        self._ids = self.vocabulary.cpu().numpy()

    def sharpness(self, settings: SamplingSettings) -> float:
        """Return by how much a difference of logits counts in the scores."""
        if settings.greedy:
            return 1.0 / self.config.greedy_tau
        return 1.0 / (self.config.sampled_tau * max(settings.temperature, COLDEST))

    def scores(self, logits: torch.Tensor, positions: NDArray[np.int64], settings: SamplingSettings) -> torch.Tensor:
        """Return the scores [n, tokens] of tokens at `positions` [n]; their softmax is their chance.

        The noise is added here, before the best are taken, because a target that samples often chooses tokens that are
        not among the likeliest few.
        """
        scores = logits.float() * self.sharpness(settings)
        if settings.greedy:
            return scores
        noise = np.stack([self._noise.row(settings, int(position))[self._ids] for position in positions])
        return scores + torch.from_numpy(noise).to(scores.device) / self.config.sampled_tau

    def children(
        self, logits: torch.Tensor, positions: NDArray[np.int64], settings: SamplingSettings
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the best tokens at `positions` [n], and their log-scores, [n, WIDTH] each, best first."""
        scores = self.scores(logits, positions, settings)
        best = scores.topk(min(WIDTH, scores.shape[-1]))
        logprobs = best.values - torch.logsumexp(scores, -1, keepdim=True)
        return self.vocabulary[best.indices].cpu().numpy(), logprobs.cpu().numpy()


class ConfiguredSpeculator(Generic[Module]):
    """What a speculator that was trained here says of itself: its config knows it."""

    config: SpeculatorConfig
    head: Module
    weights: HeadWeights

    def compute_in_eight_bits(self) -> None:
        """Compute with 8-bit weights from now on, where this processor is faster with them."""
        self.weights = compute_in_eight_bits(self.head, self.weights)

    @property
    def agreement(self) -> float:
        """See `Speculator`."""
        return self.config.first_agreement

    @property
    def taps(self) -> tuple[int, ...]:
        """See `Speculator`."""
        return self.config.taps

    @property
    def window(self) -> int:
        """See `Speculator`."""
        return self.config.window


@dataclass(frozen=True, eq=False)
class SavedHead:
    """What the two files of a speculator hold, checked against a target."""

    folder: Path
    config: SpeculatorConfig
    weights: HeadWeights
    tensors: dict[str, torch.Tensor]
    """Weights of the head itself."""
    dtype: torch.dtype
    """Dtype in which the head computes."""

    def fill(self, head: Module) -> Module:
        """Load the weights into a new head, and move it to the target's device.  Raises ModelError."""
        try:
            head.load_state_dict(self.tensors)
        except RuntimeError as error:
            raise ModelError(f"the weights in '{self.folder}' are not those of its config: {error}") from None
        return head.to(self.weights.lm_head.device, self.dtype)


def read_saved_head(
    folder: Path, lm_head: torch.Tensor, *, is_tied: bool, dtype: torch.dtype, kinds: tuple[str, ...] = KINDS
) -> SavedHead:
    """Read a folder that `swarm train-speculator` wrote, for a target with this LM head [vocabulary, hidden].

    Raises ModelError.
    """
    config, tensors = read_speculator_config(folder, kinds), read_speculator_weights(folder)
    if tuple(lm_head.shape) != (config.vocab_size, config.hidden_size):
        raise ModelError(
            f"the speculator in '{folder}' is for an LM head of {config.vocab_size} tokens and "
            f"{config.hidden_size} values, this model's has {lm_head.shape[0]} and {lm_head.shape[1]}"
        )
    ids = tensors.pop(VOCABULARY, torch.arange(config.vocab_size)).to(torch.int64)
    embedding = tensors.pop(EMBEDDING, None)
    if embedding is None and not is_tied:
        raise ModelError(f"the speculator in '{folder}' lacks the target's embedding: train it again")
    if ids.ndim != 1 or not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise ModelError(f"the speculator in '{folder}' guesses tokens outside the vocabulary: train it again")
    device = lm_head.device
    rows = lm_head if len(ids) == len(lm_head) and bool((ids == torch.arange(len(ids))).all()) else lm_head[ids]
    shared = HeadWeights(ids.to(device), rows.to(dtype), lm_head if embedding is None else embedding.to(device))
    return SavedHead(folder, config, shared, tensors, dtype)

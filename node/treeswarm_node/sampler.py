"""The tail's choice: `argmax(log p̃ + gumbel)`, with p̃ after temperature, top-k, top-p in Hugging Face's order."""

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.errors import Refused
from treeswarm.messages import FaultCode
from treeswarm.noise import NoiseRows
from treeswarm.sampling import SamplingSettings

# Sorting a whole vocabulary costs some ten times a top-k of this size, which nearly always holds the mass
# that top-p asks for.
NUCLEUS_GUESS = 1024


class Sampler:
    """Chooses tokens; keeps the noise rows of the positions it was last asked about."""

    def __init__(self, vocab_size: int) -> None:
        self._noise = NoiseRows(vocab_size)

    def choose(
        self, logits: torch.Tensor, positions: NDArray[np.int64], settings: SamplingSettings
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Tokens int64 [n] and their log-probabilities under p̃, float32 [n].

        `logits` are float32 [n, vocab]; `positions[i]` is the place in the text of the token that row i chooses.
        Ties go to the lowest id.  Raises Refused where a row is not finite.
        """
        if not bool(torch.isfinite(logits).all()):
            raise Refused("the model's logits are not finite", FaultCode.NOT_FINITE)
        logprobs = filtered_logprobs(logits, settings)
        scores = logprobs if settings.greedy else logprobs + self._noise_for(positions, settings, logits.device)
        tokens = first_argmax(scores)
        chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
        return tokens.cpu().numpy(), chosen.cpu().numpy()

    def _noise_for(
        self, positions: NDArray[np.int64], settings: SamplingSettings, device: torch.device
    ) -> torch.Tensor:
        distinct, inverse = np.unique(positions, return_inverse=True)
        rows = np.stack([self._noise.row(settings, int(position)) for position in distinct])
        return torch.from_numpy(rows).to(device)[torch.from_numpy(inverse).to(device)]


def filtered_logprobs(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """log p̃, float32 [n, vocab]; −inf for what a filter removed.  Greedy settings filter nothing."""
    if settings.greedy:
        return torch.log_softmax(logits, -1)
    warm = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        smallest = warm.topk(settings.top_k).values[:, -1:]
        warm = warm.masked_fill(warm < smallest, -torch.inf)
    if settings.top_p < 1.0:
        warm = warm.masked_fill(~_nucleus(warm, settings.top_p), -torch.inf)
    return torch.log_softmax(warm, -1)


def first_argmax(scores: torch.Tensor) -> torch.Tensor:
    """The lowest index of each row's maximum, int64 [n]; `torch.argmax` promises none."""
    best = scores.amax(-1, keepdim=True)
    ids = torch.arange(scores.shape[-1], device=scores.device)
    return torch.where(scores == best, ids, scores.shape[-1]).amin(-1)


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Which tokens make the smallest set of mass ≥ `top_p`, bool [n, vocab]; the best token always does."""
    probabilities = torch.softmax(logits, -1)
    count = min(NUCLEUS_GUESS, logits.shape[-1])
    kept = _largest_until(probabilities, count, top_p)
    if kept is None:
        kept = _largest_until(probabilities, logits.shape[-1], top_p)
    assert kept is not None
    return kept


def _largest_until(probabilities: torch.Tensor, count: int, top_p: float) -> torch.Tensor | None:
    """The nucleus if its tokens are among each row's `count` largest, else None."""
    values, ids = probabilities.topk(count)
    before = values.cumsum(-1) - values
    if count < probabilities.shape[-1] and bool((before[:, -1] + values[:, -1] < top_p).any()):
        return None
    inside = before < top_p
    inside[:, 0] = True
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter_(-1, ids, inside)

"""The tail's choice: `argmax(log p̃ + gumbel)`, with p̃ after temperature, top-k, top-p in Hugging Face's order."""

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.errors import Refused
from treeswarm.protocol.messages import FaultCode
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.noise import NoiseRows

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
        Ties go to the lowest id.  A row's result does not depend on the other rows.  Raises Refused where a row is
        not finite.
        """
        if not len(positions):
            return np.empty(0, np.int64), np.empty(0, np.float32)
        if not bool(torch.isfinite(logits).all()):
            raise Refused(
                "the model's logits are not finite: its weights are damaged, or overflow their dtype; try other nodes "
                "or another dtype",
                FaultCode.NOT_FINITE,
            )
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
    warm = _tempered(logits, settings.temperature)
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


def best_tokens(logits: torch.Tensor, count: int) -> NDArray[np.int64]:
    """The tokens of each row's largest logits, best first, of equal ones the lowest id first; [n, count], or all of
    the vocabulary where that is smaller.

    Which of equal logits are the last inside is the device's choice: these are hints to a drafter, and no text depends
    on them, so a sort of the vocabulary would buy nothing.
    """
    ids = logits.topk(min(count, logits.shape[-1])).indices.sort(-1).values
    order = logits.gather(-1, ids).sort(stable=True, dim=-1, descending=True).indices
    return np.asarray(ids.gather(-1, order).cpu().numpy())


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits / temperature; rows that overflow there are moved first, so that their largest becomes 0: the same
    distribution, and no other row's rounding changes."""
    warm = logits / temperature
    if bool(torch.isfinite(warm).all()):
        return warm
    below = logits - logits.amax(-1, keepdim=True)
    moved = below / max(temperature, torch.finfo(torch.float32).tiny)
    return torch.where(torch.isfinite(warm).all(-1, keepdim=True), warm, moved)


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Which tokens make the smallest set of mass ≥ `top_p`, bool [n, vocab]; the best token always does.

    Hugging Face leaves open which of equal logits fall outside; here the lowest ids stay.  Sorting alone would choose
    otherwise for another number of candidates, and then a text would depend on its tree.
    """
    total = torch.logsumexp(logits, -1, keepdim=True)
    likeliest = logits.topk(min(NUCLEUS_GUESS, logits.shape[-1])).values
    size, least, covered = _largest_until(likeliest, total, top_p)
    if not bool(covered.all()):
        wide = ~covered[:, 0]
        by_size = logits[wide].sort(-1, descending=True).values
        size[wide], least[wide], _ = _largest_until(by_size, total[wide], top_p)
    kept = logits >= least
    crowded = kept.sum(-1) > size[:, 0]
    if bool(crowded.any()):
        kept[crowded] = _lowest_ids(logits[crowded], size[crowded], least[crowded])
    return kept


def _largest_until(
    falling: torch.Tensor, total: torch.Tensor, top_p: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How many of each row's largest logits make mass `top_p`, the least of them, and whether they do; each [n, 1]."""
    # In float64, since a sum over many thousand float32 would move the boundary.
    mass = (falling.double() - total).exp().cumsum(-1)
    # A token is inside if what stands before it falls short.
    size = (mass[:, :-1] < top_p).sum(-1, keepdim=True) + 1
    return size, falling.gather(-1, size - 1), mass[:, -1:] >= top_p


def _lowest_ids(logits: torch.Tensor, size: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """The `size` tokens from `least` up, where too many equal it: those of the lowest ids, bool [n, vocab]."""
    above, level = logits > least, logits == least
    return above | (level & (level.cumsum(-1) <= size - above.sum(-1, keepdim=True)))

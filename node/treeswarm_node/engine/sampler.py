"""Choose tokens at the tail: `argmax(log p̃ + gumbel)`.

p̃ is the target's distribution after a request's rules, temperature, top-k, top-p, min-p and typical-p, in Hugging
Face's order.  The log-probability of a token is the model's own, before all of them: so it means the same at every
temperature.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.errors import Refused
from treeswarm.protocol.messages import NO_TOKEN, FaultCode
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.text_rules import TextRules
from treeswarm.session.logit_edits import LogitEdits
from treeswarm.session.noise import NoiseRows
from treeswarm_node.engine.edited_logits import edited

NO_RULES = TextRules()

# Sorting a whole vocabulary takes some ten times as long as a top-k of this size, which nearly always holds the mass
# that top-p requires.
NUCLEUS_GUESS = 1024


class Sampler:
    """Chooses tokens, and caches the noise rows of the last positions."""

    def __init__(self, vocab_size: int) -> None:
        self._noise = NoiseRows(vocab_size)

    def choose(
        self,
        logits: torch.Tensor,
        positions: NDArray[np.int64],
        settings: SamplingSettings,
        edits: LogitEdits | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the chosen tokens int64 [n], and their log-probabilities under the model's own distribution, float32
        [n].

        `logits` are float32 [n, vocab], and may be changed where `edits` say so; `positions[i]` is the position in the
        text of the token that row i chooses.  Ties go to the lowest id.  A row's result does not depend on the other
        rows.  A row whose rules allow no token gets NO_TOKEN.  Raises Refused if a row is not finite.
        """
        if not len(positions):
            return np.empty(0, np.int64), np.empty(0, np.float32)
        if not bool(torch.isfinite(logits).all()):
            raise Refused(
                "the model's logits are not finite, because its weights are damaged or overflow their dtype: try other "
                "nodes or another dtype",
                FaultCode.NOT_FINITE,
            )
        totals = torch.logsumexp(logits, -1)
        with edited(logits, edits) as ruled:
            none_allowed = None if edits is None else ruled.amax(-1) == -torch.inf
            scores = ruled
            if not settings.greedy:
                noise = self._noise_rows(positions, settings, logits.device)
                scores = filtered_logprobs(ruled, settings, NO_RULES if edits is None else edits.rules) + noise
            if none_allowed is not None:  # such a row has no distribution to choose from
                scores = scores.masked_fill(none_allowed[:, None], 0.0)
            tokens = first_argmax(scores)
        logprobs = logits.gather(-1, tokens[:, None])[:, 0] - totals
        if none_allowed is not None and bool(none_allowed.any()):
            tokens, logprobs = tokens.masked_fill(none_allowed, NO_TOKEN), logprobs.masked_fill(none_allowed, 0.0)
        return tokens.cpu().numpy(), logprobs.cpu().numpy()

    def _noise_rows(
        self, positions: NDArray[np.int64], settings: SamplingSettings, device: torch.device
    ) -> torch.Tensor:
        """Return the noise of each position, float32 [n, vocab]."""
        distinct, inverse = np.unique(positions, return_inverse=True)
        rows = np.stack([self._noise.row(settings, int(position)) for position in distinct])
        return torch.from_numpy(rows).to(device)[torch.from_numpy(inverse).to(device)]


def filtered_logprobs(logits: torch.Tensor, settings: SamplingSettings, rules: TextRules = NO_RULES) -> torch.Tensor:
    """Return log p̃, float32 [n, vocab]; it is −inf for tokens that a filter removed.

    Greedy settings filter nothing.
    """
    if settings.greedy:
        return torch.log_softmax(logits, -1)
    scaled = _apply_temperature(logits, settings.temperature)
    if 0 < settings.top_k < logits.shape[-1]:
        smallest = scaled.topk(settings.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    if settings.top_p < 1.0:
        scaled = scaled.masked_fill(~_nucleus(scaled, settings.top_p), -torch.inf)
    if rules.min_p > 0.0:
        chances = torch.softmax(scaled, -1)
        scaled = scaled.masked_fill(chances < rules.min_p * chances.amax(-1, keepdim=True), -torch.inf)
    if rules.typical_p < 1.0:
        scaled = scaled.masked_fill(~_typical(scaled, rules.typical_p), -torch.inf)
    return torch.log_softmax(scaled, -1)


def first_argmax(scores: torch.Tensor) -> torch.Tensor:
    """Return the lowest index of each row's maximum, int64 [n].

    `torch.argmax` does not say which of equal maxima it returns.
    """
    best = scores.amax(-1, keepdim=True)
    ids = torch.arange(scores.shape[-1], device=scores.device)
    return torch.where(scores == best, ids, scores.shape[-1]).amin(-1)


def best_logprobs(logits: torch.Tensor, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the log-probability of some tokens of each row under the model's own distribution, float32 [n, k].

    `logits` are float32 [n, vocab], `tokens` int64 [n, k].
    """
    chosen = logits.gather(-1, torch.from_numpy(tokens).to(logits.device))
    return np.asarray((chosen - torch.logsumexp(logits, -1, keepdim=True)).cpu().numpy(), np.float32)


def best_tokens(logits: torch.Tensor, count: int) -> NDArray[np.int64]:
    """Return the tokens of each row's largest logits, int64 [n, min(count, vocab)].

    The best token is first, and among equal logits the lowest id.  Which of the equal logits at the end are included
    depends on the device.  The result only helps a drafter and no text depends on it, so sorting the whole vocabulary
    would gain nothing.
    """
    ids = logits.topk(min(count, logits.shape[-1])).indices.sort(-1).values
    order = logits.gather(-1, ids).sort(stable=True, dim=-1, descending=True).indices
    return np.asarray(ids.gather(-1, order).cpu().numpy())


def _apply_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return logits / temperature.

    Rows that would overflow are shifted first, so that their largest logit is 0.  Their distribution stays the same,
    and no other row's rounding changes.  A token at −inf stays there.
    """
    scaled = logits / temperature
    overflows = ~torch.isfinite(scaled.amax(-1, keepdim=True))
    if not bool(overflows.any()):
        return scaled
    shifted = logits - logits.amax(-1, keepdim=True)
    shifted_scaled = shifted / max(temperature, torch.finfo(torch.float32).tiny)
    return torch.where(overflows, shifted_scaled, scaled)


def _typical(logits: torch.Tensor, typical_p: float) -> torch.Tensor:
    """Return a mask of the tokens whose information is nearest to the entropy, up to mass `typical_p`, bool [n, vocab].

    It is transformers' own filter; of equally typical tokens it keeps all.
    """
    logprobs = torch.log_softmax(logits, -1)
    entropy = -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)
    distance, order = (-logprobs - entropy).abs().sort(-1)
    mass = logits.gather(-1, order).softmax(-1).cumsum(-1)
    last = (mass < typical_p).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    included = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, distance <= distance.gather(-1, last))
    return included.scatter(-1, order[:, :1], True)  # of a tensor's method


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return a mask of the smallest set of tokens with mass ≥ `top_p`, bool [n, vocab]; it includes the best token.

    Hugging Face leaves open which of equal logits are excluded; here those with the lowest ids are included.  Sorting
    alone would choose differently for another number of candidates, and then a text would depend on its draft tree.
    """
    total = torch.logsumexp(logits, -1, keepdim=True)
    likeliest = logits.topk(min(NUCLEUS_GUESS, logits.shape[-1])).values
    size, smallest, covered = _largest_until(likeliest, total, top_p)
    if not bool(covered.all()):
        wide = ~covered[:, 0]
        by_size = logits[wide].sort(-1, descending=True).values
        size[wide], smallest[wide], _ = _largest_until(by_size, total[wide], top_p)
    included = logits >= smallest
    tied = included.sum(-1) > size[:, 0]
    if bool(tied.any()):
        included[tied] = _lowest_ids(logits[tied], size[tied], smallest[tied])
    return included


def _largest_until(
    descending: torch.Tensor, total: torch.Tensor, top_p: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return how many of each row's largest logits make mass `top_p`, the smallest of them, and whether they do.

    `descending` holds each row's largest logits in order, [n, k], `total` the log-sum-exp of the whole row, [n, 1].
    Each result is [n, 1].
    """
    # In float64, because a sum over many thousand float32 would shift the boundary.
    mass = (descending.double() - total).exp().cumsum(-1)
    # A token is included if the mass of the tokens before it is too small.
    size = (mass[:, :-1] < top_p).sum(-1, keepdim=True) + 1
    return size, descending.gather(-1, size - 1), mass[:, -1:] >= top_p


def _lowest_ids(logits: torch.Tensor, size: torch.Tensor, smallest: torch.Tensor) -> torch.Tensor:
    """Return a mask of `size` tokens per row with logits ≥ `smallest`, bool [n, vocab].

    Among the logits equal to `smallest`, those with the lowest ids are included.
    """
    above, equal = logits > smallest, logits == smallest
    return above | (equal & (equal.cumsum(-1) <= size - above.sum(-1, keepdim=True)))

"""Figures from generations that were measured side by side.  Pure.

Rates are of decoding: from the first token, which ends the prefill, to the last.  What generations cost to begin is
told apart, so that a short one and a long one may be compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeswarm_bench.benchmarks.common import spread
from treeswarm_client.generation.stats import Stats

RESAMPLES = 2000
INTERVAL = (5.0, 95.0)
PARTS = ("draft", "wire", "queue", "compute")


@dataclass(frozen=True)
class Sample:
    """One generation."""

    tokens: int
    """After the first."""
    seconds: float
    """From the first token to the last."""
    rounds: int
    """Traversals after the prefill; each ended at a miss, since its last token was known only from its answers."""
    nodes: int
    """Drafted and shipped."""
    first_token_s: float
    acceptance: float | None
    draft_s: float
    wire_s: float
    queue_s: float
    compute_s: float

    @classmethod
    def of(cls, stats: Stats, first_token_s: float) -> "Sample":
        """Of a generation that is over."""
        return cls(
            tokens=stats.committed - 1,
            seconds=max(1e-9, stats.seconds - first_token_s),
            rounds=stats.traversals - 1,
            nodes=stats.drafted,
            first_token_s=first_token_s,
            acceptance=stats.acceptance,
            draft_s=stats.time.draft,
            wire_s=stats.time.wire,
            queue_s=stats.time.queue,
            compute_s=stats.time.compute,
        )

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


Samples = Sequence[Sample]
"""One a prompt, in the order of the prompts."""


@dataclass(frozen=True, eq=False)
class Ratio:
    """An estimate, and what resampling the prompts made of it."""

    value: float
    draws: NDArray[np.float64]
    """Empty where one prompt cannot be resampled."""

    def as_dict(self) -> dict[str, Any]:
        """With the interval that holds nine of ten draws; none where there are no draws."""
        low, high = np.percentile(self.draws, INTERVAL).tolist() if self.draws.size else (None, None)
        return {"value": self.value, "low": low, "high": high}


def rate(samples: Samples) -> float:
    """Tokens a second over all prompts."""
    return sum(s.tokens for s in samples) / sum(s.seconds for s in samples)


def paired(over: Samples, under: Samples, *, seed: int = 0) -> Ratio:
    """The ratio of two rates measured on the same prompts: those are resampled in pairs (bootstrap).  The same seed
    draws the same prompts, so that several ratios may be averaged draw by draw."""
    assert len(over) == len(under)
    value = rate(over) / rate(under)
    if len(over) < 2:
        return Ratio(value, np.empty(0))
    drawn = np.random.default_rng(seed).integers(0, len(over), (RESAMPLES, len(over)))
    return Ratio(value, _rates(over, drawn) / _rates(under, drawn))


def mean_of(ratios: Sequence[Ratio]) -> Ratio:
    """Of ratios measured apart; the draws are those of each, averaged."""
    draws = [ratio.draws for ratio in ratios]
    together = np.mean(draws, 0) if all(d.size for d in draws) else np.empty(0)
    return Ratio(float(np.mean([ratio.value for ratio in ratios])), together)


def least_of(ratios: Sequence[Ratio]) -> Ratio:
    """The smallest of some, with its own interval."""
    return min(ratios, key=lambda ratio: ratio.value)


def miss_share(samples: Samples, ring_s: float) -> float:
    """How much of the time is misses × ring latency: 1 is what no client can exceed with so many misses."""
    return sum(s.rounds for s in samples) * ring_s / sum(s.seconds for s in samples)


def summary(samples: Samples, ring_s: float) -> dict[str, Any]:
    """What one strategy came to on one text."""
    whole = sum(s.seconds + s.first_token_s for s in samples)
    rounds = sum(s.rounds for s in samples)
    told = [s.acceptance for s in samples if s.acceptance is not None]
    return {
        "tokens_per_prompt": samples[0].tokens + 1,
        "tokens_per_second": spread([s.rate for s in samples]),
        "tokens_per_second_pooled": rate(samples),
        "tokens_per_traversal": sum(s.tokens for s in samples) / rounds if rounds else None,
        "nodes_per_traversal": sum(s.nodes for s in samples) / rounds if rounds else None,
        "acceptance": float(np.mean(told)) if told else None,
        "first_token_ms": spread([1e3 * s.first_token_s for s in samples]),
        "miss_share": miss_share(samples, ring_s),
        "time_share": {name: sum(getattr(s, f"{name}_s") for s in samples) / whole for name in PARTS},
        "runs": [s.as_dict() for s in samples],
    }


def same_text(texts: Mapping[str, Sequence[int]]) -> bool:
    """Whether each of some texts is the beginning of the longest."""
    longest = max(texts.values(), key=len, default=())
    return all(list(text) == list(longest[: len(text)]) for text in texts.values())


def _rates(samples: Samples, drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    tokens, seconds = (np.array([getattr(s, name) for s in samples], np.float64) for name in ("tokens", "seconds"))
    rates: NDArray[np.float64] = tokens[drawn].sum(1) / seconds[drawn].sum(1)
    return rates

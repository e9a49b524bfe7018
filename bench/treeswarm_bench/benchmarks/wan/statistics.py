"""Figures of generations that were measured side by side.  Pure computation.

Rates are of decoding: from the first token, which ends the prefill, to the last.  What it costs to begin a generation
is reported separately, so that a short generation and a long one can be compared.
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
    """Figures of one generation."""

    tokens: int
    """Number of tokens after the first."""
    seconds: float
    """Seconds from the first token to the last."""
    rounds: int
    """Number of traversals after the prefill.

    Each ended at a miss, since its last token was known only from its answers.
    """
    nodes: int
    """Number of draft nodes shipped."""
    first_token_s: float
    acceptance: float | None
    draft_s: float
    wire_s: float
    queue_s: float
    compute_s: float

    @classmethod
    def of(cls, stats: Stats, first_token_s: float) -> "Sample":
        """Return the figures of a generation that has ended."""
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
        """Tokens per second."""
        return self.tokens / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


Samples = Sequence[Sample]
"""One sample per prompt, in the order of the prompts."""


@dataclass(frozen=True, eq=False)
class Ratio:
    """An estimate, and the estimates from resampled prompts."""

    value: float
    draws: NDArray[np.float64]
    """Estimates from resampled prompts, float64 [RESAMPLES]; empty if there is one prompt only."""

    def as_dict(self) -> dict[str, Any]:
        """Return the value and the interval that holds nine of ten draws, for JSON; without draws its ends are None."""
        low, high = np.percentile(self.draws, INTERVAL).tolist() if self.draws.size else (None, None)
        return {"value": self.value, "low": low, "high": high}


def rate(samples: Samples) -> float:
    """Return the tokens per second over all prompts."""
    return sum(s.tokens for s in samples) / sum(s.seconds for s in samples)


def paired(over: Samples, under: Samples, *, seed: int = 0) -> Ratio:
    """Return the ratio of two rates measured on the same prompts, which are resampled in pairs (bootstrap).

    The same seed draws the same prompts, so that several ratios may be averaged draw by draw.
    """
    assert len(over) == len(under)
    value = rate(over) / rate(under)
    if len(over) < 2:
        return Ratio(value, np.empty(0))
    drawn = np.random.default_rng(seed).integers(0, len(over), (RESAMPLES, len(over)))
    return Ratio(value, _rates(over, drawn) / _rates(under, drawn))


def mean_of(ratios: Sequence[Ratio]) -> Ratio:
    """Return the mean of ratios that were measured separately; the draws are averaged one by one."""
    draws = [ratio.draws for ratio in ratios]
    together = np.mean(draws, 0) if all(d.size for d in draws) else np.empty(0)
    return Ratio(float(np.mean([ratio.value for ratio in ratios])), together)


def least_of(ratios: Sequence[Ratio]) -> Ratio:
    """Return the smallest ratio, with its own interval."""
    return min(ratios, key=lambda ratio: ratio.value)


def miss_share(samples: Samples, ring_s: float) -> float:
    """Return misses × ring latency as a share of the time: no client can exceed 1 with as many misses."""
    return sum(s.rounds for s in samples) * ring_s / sum(s.seconds for s in samples)


def summary(samples: Samples, ring_s: float) -> dict[str, Any]:
    """Return the figures of one strategy on one text, for JSON."""
    whole = sum(s.seconds + s.first_token_s for s in samples)
    rounds = sum(s.rounds for s in samples)
    acceptances = [s.acceptance for s in samples if s.acceptance is not None]
    return {
        "tokens_per_prompt": samples[0].tokens + 1,
        "tokens_per_second": spread([s.rate for s in samples]),
        "tokens_per_second_pooled": rate(samples),
        "tokens_per_traversal": sum(s.tokens for s in samples) / rounds if rounds else None,
        "nodes_per_traversal": sum(s.nodes for s in samples) / rounds if rounds else None,
        "acceptance": float(np.mean(acceptances)) if acceptances else None,
        "first_token_ms": spread([1e3 * s.first_token_s for s in samples]),
        "miss_share": miss_share(samples, ring_s),
        "time_share": {name: sum(getattr(s, f"{name}_s") for s in samples) / whole for name in PARTS},
        "runs": [s.as_dict() for s in samples],
    }


def same_text(texts: Mapping[str, Sequence[int]]) -> bool:
    """Return whether each text is the beginning of the longest one."""
    longest = max(texts.values(), key=len, default=())
    return all(list(text) == list(longest[: len(text)]) for text in texts.values())


def _rates(samples: Samples, drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    tokens, seconds = (np.array([getattr(s, name) for s in samples], np.float64) for name in ("tokens", "seconds"))
    rates: NDArray[np.float64] = tokens[drawn].sum(1) / seconds[drawn].sum(1)
    return rates

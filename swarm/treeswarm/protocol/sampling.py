"""Sampling settings: how a token is chosen from logits, the same for target and draft."""

import math
from dataclasses import dataclass

from treeswarm.errors import BadRequest

LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class SamplingSettings:
    """Settings with Hugging Face's names and order: temperature, then top-k, then top-p.

    Raises BadRequest for a value outside its range.
    """

    temperature: float = 0.0
    """Divisor of the logits, 0 to 100; 0 is greedy."""
    top_k: int = 0
    """Number of best tokens kept, or 0 for all."""
    top_p: float = 1.0
    """Probability that the best tokens kept have together, or 1.0 for all tokens."""
    seed: int = 0
    sample: int = 0
    """Number of this sample among several of one prompt."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise BadRequest(f"temperature {self.temperature} is out of range: give 0 (greedy) up to 100")
        if not 0 <= self.top_k < 2**31:
            raise BadRequest(f"top_k {self.top_k} is out of range: give 0 (off) or a positive number")
        if not 0.0 < self.top_p <= 1.0:
            raise BadRequest(f"top_p {self.top_p} is out of range: give more than 0, up to 1 (off)")
        if not 0 <= self.seed <= LARGEST_SEED or not 0 <= self.sample < 2**32:
            raise BadRequest("seed and sample index must be non-negative and fit 64 and 32 bits")

    @property
    def greedy(self) -> bool:
        """True if the token with the highest logit is always chosen."""
        return self.temperature == 0.0

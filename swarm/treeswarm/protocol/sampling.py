"""How a token is chosen from logits: the settings, the same for target and draft."""

import math
from dataclasses import dataclass

from treeswarm.errors import BadRequest

LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class SamplingSettings:
    """Hugging Face's names and order: temperature, then top-k, then top-p.  Temperature 0 is greedy.

    `top_k` 0 and `top_p` 1.0 switch their filter off.  `sample` numbers several samples of one prompt.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    sample: int = 0

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
        return self.temperature == 0.0

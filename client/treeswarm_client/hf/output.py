"""The output object of `generate` with `return_dict_in_generate=True`."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from treeswarm_client.generation.run import Run


@dataclass(frozen=True)
class TransitionScores:
    """Log-probabilities of the new tokens, from which `compute_transition_scores` makes its result."""

    logprobs: tuple[tuple[float, ...], ...]
    """Log-probability that the model gave each new token, row by row."""
    are_processed: bool
    """Whether transformers' scores would be others: those after temperature, filters and penalties."""

    def as_tensor(self) -> torch.Tensor:
        """Return float32 [rows × samples, new tokens], with 0 after the end of a row."""
        width = max(map(len, self.logprobs), default=0)
        return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in self.logprobs], dtype=torch.float32)


@dataclass
class SwarmGenerateOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]  # transformers has no types here
    """What `generate` returns with `return_dict_in_generate=True`."""

    sequences: torch.Tensor | None = None
    """Token ids, int64 [rows × samples, length], prompts included."""
    logprobs: tuple[tuple[float, ...], ...] | None = None
    """Log-probability that the model gave each new token, row by row."""
    scores: Any = None
    """What `compute_transition_scores` takes, with `output_scores=True`: a TransitionScores, in place of logits."""
    runs: tuple[Run, ...] | None = None
    """The generations, each with `stats`, `prefix_tokens`, `text` and `finish_reason`."""

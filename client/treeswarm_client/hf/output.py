"""The output object of `generate` with `return_dict_in_generate=True`."""

from dataclasses import dataclass

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from treeswarm_client.generation.run import Run


@dataclass
class SwarmGenerateOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]  # transformers has no types here
    """What `generate` returns with `return_dict_in_generate=True`."""

    sequences: torch.Tensor | None = None
    """Token ids, int64 [rows × samples, length], prompts included."""
    logprobs: tuple[tuple[float, ...], ...] | None = None
    """Log-probability that the model gave each new token, row by row."""
    runs: tuple[Run, ...] | None = None
    """The generations, each with `stats`, `prefix_tokens`, `text` and `finish_reason`."""

"""A tiny draft model, plain computations to check it against, and a target that sometimes agrees with a tree."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.noise import gumbel_row
from treeswarm_client.drafters import draft_model
from treeswarm_client.drafters.model import DraftOptions, ModelDrafter
from treeswarm_client.drafters.seam import DraftTree

VOCAB = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """Return a random model with weights so large that mistakes show."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.25)
    return model.requires_grad_(False)


def drafter_of(model: PreTrainedModel, options: DraftOptions | None = None) -> ModelDrafter:
    """Return a drafter as `load` would make it."""
    draft_model.register()
    model.set_attn_implementation(draft_model.IMPLEMENTATION)
    config = model.config
    return ModelDrafter(model, int(config.vocab_size), int(config.max_position_embeddings), options or DraftOptions())


@torch.inference_mode()
def plain_logprobs(model: PreTrainedModel, text: Sequence[int], settings: SamplingSettings) -> NDArray[np.float64]:
    """Return the log-probabilities of the token after `text` at the settings' temperature, float64 [vocab].

    `model` must be one that no drafter uses.
    """
    logits = model(torch.tensor([list(text)]), use_cache=False).logits[0, -1].double()
    return torch.log_softmax(logits / (settings.temperature or 1.0), -1).numpy()


def noised(logprobs: NDArray[np.float64], position: int, settings: SamplingSettings) -> NDArray[np.float64]:
    """Return the values of which the target takes the argmax."""
    if settings.greedy:
        return logprobs
    return logprobs + gumbel_row(settings.seed, settings.sample, position, len(logprobs))


def paths_of(tree: DraftTree) -> list[tuple[int, ...]]:
    """Return the tokens from the root down to each node."""
    paths: list[tuple[int, ...]] = []
    for parent, token in zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


def half_agreeing(tree: DraftTree, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return answers of a target that three times in four chooses one of a node's children."""
    answers = rng.integers(0, VOCAB, len(tree) + 1)
    for i in range(-1, len(tree)):
        children = tree.tokens[tree.parents == i]
        if len(children) and rng.random() < 0.75:
            answers[i + 1] = rng.choice(children)
    return answers

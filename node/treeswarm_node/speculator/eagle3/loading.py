"""Make a speculator of a published EAGLE-3 head, after its sizes and its names have been compared with the target's."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from treeswarm.errors import ModelError
from treeswarm.model_files import is_hub_id, read_config
from treeswarm_node.speculator.autoregressive import AutoregressiveSpeculator, head_shape
from treeswarm_node.speculator.eagle3.config import EAGLE3, Eagle3Config, is_eagle3, read_eagle3_config
from treeswarm_node.speculator.eagle3.tensors import Eagle3Tensors, read_eagle3_tensors
from treeswarm_node.speculator.files import SpeculatorConfig
from treeswarm_node.speculator.guesses import HeadWeights, SavedHead
from treeswarm_node.speculator.head import SpeculatorHead

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class HeadTarget:
    """What a head has to know of the model that it guesses for."""

    name: str
    """Name of the model, as given on the command line."""
    architectures: tuple[str, ...]
    """Names of its class in transformers, in its config."""
    blocks: int
    """Number of decoder blocks."""
    hidden_size: int
    """Number of values in one state."""
    lm_head: torch.Tensor
    """LM head, [vocabulary, hidden]."""
    read_embedding: Callable[[], torch.Tensor]
    """Returns the embedding [vocabulary, hidden]; called only for a head that has none of its own."""
    dtype: torch.dtype
    """Dtype in which the model computes."""
    config_digest: str = ""
    weights_digest: str = ""


def read_head_config(folder: Path) -> Eagle3Config:
    """Read the config of a head in either public format.  Raises ModelError."""
    content: Mapping[str, Any] = read_config(folder)
    if not is_eagle3(content):
        kind = content.get("speculators_model_type") or content["model_type"]
        raise ModelError(
            f"'{folder}' holds no EAGLE-3 head but '{kind}': give a folder that `swarm train-speculator` wrote, or "
            "an EAGLE-3 head in the format of EAGLE, SpecForge or speculators"
        )
    return read_eagle3_config(content)


def load_eagle3(folder: Path, target: HeadTarget, dtype: torch.dtype) -> AutoregressiveSpeculator:
    """Load a head that computes in `dtype`, for a target.  Raises ModelError."""
    config = read_head_config(folder)
    check_target(folder, config, target)
    tensors = read_eagle3_tensors(folder, config)
    own = _speculator_config(config, target)
    shape = replace(head_shape(own), state_size=config.target_hidden_size)
    saved = SavedHead(folder, own, _share(folder, config, tensors, target, dtype), tensors.head, dtype)
    return AutoregressiveSpeculator(own, saved.fill(SpeculatorHead(shape, config.recipe)), saved.weights)


def check_target(folder: Path, config: Eagle3Config, target: HeadTarget) -> None:
    """Raise ModelError if a head was made for another model, as far as its config tells.

    Published heads carry no digest.  Fine-tuned models have the sizes of their base: a check of what the head guesses
    (`self_check`) tells those apart.
    """
    vocabulary = target.lm_head.shape[0]
    if (config.vocab_size, config.target_hidden_size) != (vocabulary, target.hidden_size):
        raise ModelError(
            f"the head in '{folder}' is for a model of {config.vocab_size} tokens and {config.target_hidden_size} "
            f"values per state, this one has {vocabulary} and {target.hidden_size}"
        )
    named = set(config.verifier_architectures)
    if named and target.architectures and not named.intersection(target.architectures):
        raise ModelError(
            f"the head in '{folder}' is for a {' or '.join(sorted(named))}, this model is a "
            f"{' or '.join(target.architectures)}"
        )
    if config.verifier and is_hub_id(target.name) and _last(config.verifier) != _last(target.name):
        log.warning(
            "the head in '%s' was made for %s: it may guess worse for %s, but the text is exact",
            folder, config.verifier, target.name,
        )  # fmt: skip


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _share(
    folder: Path, config: Eagle3Config, tensors: Eagle3Tensors, target: HeadTarget, dtype: torch.dtype
) -> HeadWeights:
    """Return the matrices of a head: its own, or the target's where it has none."""
    has_all = tensors.embedding is not None and tensors.lm_head is not None
    if not has_all and config.hidden_size != config.target_hidden_size:
        raise ModelError(
            f"the head in '{folder}' computes with {config.hidden_size} values per state and has no embedding or LM "
            f"head of its own, the model's have {config.target_hidden_size}: download it again"
        )
    device = target.lm_head.device
    lm_head = target.lm_head[tensors.vocabulary] if tensors.lm_head is None else tensors.lm_head
    embedding = target.read_embedding() if tensors.embedding is None else tensors.embedding.to(target.dtype)
    return HeadWeights(tensors.vocabulary.to(device), lm_head.to(device, dtype), embedding.to(device))


def _speculator_config(config: Eagle3Config, target: HeadTarget) -> SpeculatorConfig:
    return SpeculatorConfig(
        kind=EAGLE3,
        config_digest=target.config_digest,
        weights_digest=target.weights_digest,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        taps=config.tapped_blocks(target.blocks),
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        window=config.window,
        # Its scores are the chances that it was trained to give.
        greedy_tau=1.0,
        sampled_tau=1.0,
    )

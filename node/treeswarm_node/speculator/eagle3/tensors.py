"""The tensors of a published EAGLE-3 head, and the vocabulary that it guesses.  Nothing is pickled or executed.

A tensor that no part of the head takes is refused: a head that ignores a norm guesses badly, and says nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from treeswarm.errors import ModelError
from treeswarm.model_files import read_header, weight_files
from treeswarm_node.speculator.eagle3.config import Eagle3Config
from treeswarm_node.speculator.head import TapNorm

EMBEDDING, LM_HEAD, OFFSETS, CHOSEN = "embed_tokens.weight", "lm_head.weight", "d2t", "t2d"
# Names of a head's modules in the files of both formats, once the prefix of the layer is the same, and in ours.
MODULES = {
    "fc": "fuse",
    "input_norm": "joined_norm",
    "layers.0.input_layernorm": "token_norm",
    "layers.0.hidden_norm": "state_norm",
    "layers.0.self_attn.q_proj": "q_proj",
    "layers.0.self_attn.k_proj": "k_proj",
    "layers.0.self_attn.v_proj": "v_proj",
    "layers.0.self_attn.o_proj": "o_proj",
    "layers.0.self_attn.q_norm": "query_norm",
    "layers.0.self_attn.k_norm": "key_norm",
    "layers.0.post_attention_layernorm": "mlp_norm",
    "layers.0.mlp.gate_proj": "mlp.gate_proj",
    "layers.0.mlp.up_proj": "mlp.up_proj",
    "layers.0.mlp.down_proj": "mlp.down_proj",
    "norm": "result_norm",
}
# Tensors that trainers leave behind: the target's own norm and LM head, and tables computed from the config.
UNUSED = re.compile(r"^verifier_(norm|lm_head)\.weight$|rotary_emb\.inv_freq$")
TAP_NORM = re.compile(r"^fc_norms?\.(\d+)$")


@dataclass(frozen=True, eq=False)
class Eagle3Tensors:
    """The tensors of one head."""

    head: dict[str, torch.Tensor]
    """Weights of `SpeculatorHead`, by their names there."""
    vocabulary: torch.Tensor
    """Token ids that the head can guess, int64 [n]."""
    lm_head: torch.Tensor | None
    """The head's own LM head [n, hidden], or None if it has the target's."""
    embedding: torch.Tensor | None
    """The head's own embedding [vocabulary, hidden], or None if it has the target's."""


def read_eagle3_tensors(folder: Path, config: Eagle3Config) -> Eagle3Tensors:
    """Read and sort the tensors of a head.  Raises ModelError for one that is missing, unknown or contradictory."""
    tensors = {standard_name(name): tensor for name, tensor in _read(folder).items() if not UNUSED.search(name)}
    embedding, lm_head = tensors.pop(EMBEDDING, None), tensors.pop(LM_HEAD, None)
    offsets, chosen = tensors.pop(OFFSETS, None), tensors.pop(CHOSEN, None)
    vocabulary = find_vocabulary(folder, config, offsets, chosen)
    if lm_head is None and config.ties_embeddings and embedding is not None:
        lm_head = embedding[vocabulary]
    if lm_head is not None and tuple(lm_head.shape) != (len(vocabulary), config.hidden_size):
        raise ModelError(
            f"the LM head in '{folder}' scores {lm_head.shape[0]} tokens, its vocabulary has {len(vocabulary)}: "
            "download it again"
        )
    if embedding is not None and tuple(embedding.shape) != (config.vocab_size, config.hidden_size):
        raise ModelError(f"the embedding in '{folder}' has another shape than its config says: download it again")
    return Eagle3Tensors(_rename(folder, tensors, config), vocabulary, lm_head, embedding)


def standard_name(name: str) -> str:
    """Return a tensor's name in the nested format."""
    return re.sub(r"^midlayer\.", "layers.0.", name.removeprefix("model."))


def find_vocabulary(
    folder: Path, config: Eagle3Config, offsets: torch.Tensor | None, chosen: torch.Tensor | None
) -> torch.Tensor:
    """Return the token ids that a head can guess, int64 [n]: token i of the head is token i + offsets[i].

    `chosen` says of each token of the target whether it is among them.  Raises ModelError.
    """
    count = config.draft_vocab_size
    if offsets is None and count != config.vocab_size:
        raise ModelError(f"'{folder}' guesses {count} of {config.vocab_size} tokens and lacks d2t, which says which")
    ids = torch.arange(count)
    if offsets is not None:
        if tuple(offsets.shape) != (count,):
            raise ModelError(f"d2t in '{folder}' has {offsets.numel()} tokens, its config says {count}")
        ids = ids + offsets.to(torch.int64)
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size or len(set(ids.tolist())) < count:
        raise ModelError(f"d2t in '{folder}' names tokens twice or outside the vocabulary: download it again")
    # Trainers leave `t2d` unfilled where the head guesses every token.
    if offsets is not None and chosen is not None and count < config.vocab_size:
        named = torch.zeros(config.vocab_size, dtype=torch.bool)
        named[ids] = True
        if tuple(chosen.shape) != tuple(named.shape) or not torch.equal(chosen.to(torch.bool), named):
            raise ModelError(f"d2t and t2d in '{folder}' choose different tokens: download it again")
    return ids


def _rename(folder: Path, tensors: Mapping[str, torch.Tensor], config: Eagle3Config) -> dict[str, torch.Tensor]:
    """Return the tensors by their names in `SpeculatorHead`.  Raises ModelError for those that it does not have."""
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if match := TAP_NORM.match(module):
            renamed[f"tap_norms.{match[1]}.{kind}"] = tensor
        elif module in MODULES and kind in {"weight", "bias"}:
            renamed[f"{MODULES[module]}.{kind}"] = tensor
        else:
            raise ModelError(f"tensor {name} in '{folder}' is no part of a head that is known here")
    for prefix, norm, field in (("tap_norms.", TapNorm.EACH, "fc_norm"), ("joined_", TapNorm.JOINED, "norm_before_fc")):
        if any(name.startswith(prefix) for name in renamed) and config.recipe.tap_norm is not norm:
            raise ModelError(f"'{folder}' has the norm of {field}, and its config does not say so: download it again")
    return renamed


def _read(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors by name.  Raises ModelError, also for weights that are not safetensors."""
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        read_header(folder / file)
        try:
            with safe_open(folder / file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError) as error:
            raise ModelError(f"'{folder / file}' cannot be read ({error}): download it again") from None
    return tensors

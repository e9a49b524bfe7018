"""Compute latent attention (MLA) from the compressed rows that all heads share.

A layer computes one latent and one rotated key per row, and `kv_b_proj` expands them into every head's key and value.
A node keeps only the latent and the rotated key.  It applies `kv_b_proj` to queries and outputs instead: all heads then
share one key, the latent and the rotated key together, whose beginning is the value.  Decision record 059 has the
measurements against expanding the trunk piece by piece.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from treeswarm_node.attention.base import Attention, LayerInputs
from treeswarm_node.attention.metadata import Batch

# Name of the linear layer that expands latents.
EXPANSION = "kv_b_proj"


def is_latent(attention: Any) -> bool:
    """Return whether an attention module keeps latents: it expands them by `kv_b_proj` in a function of its own."""
    return all(hasattr(attention, name) for name in ("expand_kv", EXPANSION, "kv_lora_rank", "qk_rope_head_dim"))


@contextlib.contextmanager
def unexpanded(attentions: Sequence[Any]) -> Iterator[None]:
    """Let latent attention modules hand on their latents and rotated keys in place of all heads' keys and values."""
    latent = [attention for attention in attentions if is_latent(attention)]
    for attention in latent:
        attention.expand_kv = _hand_on
    try:
        yield
    finally:
        for attention in latent:
            del attention.expand_kv


def _hand_on(latent: torch.Tensor, rotated: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return latent, rotated


def attend_latent(
    module: Any,
    query: torch.Tensor,
    latent: torch.Tensor,
    rotated: torch.Tensor,
    batch: Batch,
    attention: Attention,
    **options: Any,
) -> torch.Tensor:
    """Write the batch's latents [1, ΣT, rank] and rotated keys [1, ΣT, rope] to the pool, and attend.

    Returns [ΣT, heads, value_dim] for queries [heads, ΣT, nope + rope].
    """
    weights = _weights_by_head(module, query.dtype)
    nope_dim = query.shape[-1] - rotated.shape[-1]
    absorbed = torch.cat([torch.bmm(query[..., :nope_dim], weights[:, :nope_dim]), query[..., nope_dim:]], -1)
    keys = torch.cat([latent, rotated], -1)
    layer = LayerInputs.with_kv_written(module.layer_idx, absorbed, keys, latent, batch, **options)
    attended = attention.attend(layer).transpose(0, 1)
    return torch.bmm(attended, weights[:, nope_dim:].transpose(1, 2)).transpose(0, 1)


def _weights_by_head(module: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight of `kv_b_proj` by head [heads, nope + value, rank], whatever form it is kept in."""
    linear, rank = module.kv_b_proj, int(module.kv_lora_rank)
    if type(linear) is torch.nn.Linear:
        weight = linear.weight
    elif hasattr(linear, "dequantize"):
        weight = linear.dequantize(dtype)
    else:
        weight = linear(torch.eye(rank, dtype=dtype, device=module.kv_a_layernorm.weight.device)).t()
    return weight.view(int(module.num_heads), -1, rank)

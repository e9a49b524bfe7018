"""Let transformers' layers call this node's attention, as an attention implementation of transformers."""

from typing import Any, cast

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from treeswarm.errors import UnsupportedModel
from treeswarm_node.attention.base import Attention, LayerInputs
from treeswarm_node.attention.latent import attend_latent
from treeswarm_node.attention.metadata import Batch

IMPLEMENTATION = "treeswarm"
# Arguments that layers pass to attention and that change neither which keys are seen nor how scores are computed.
IGNORED_ARGUMENTS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "dropout",
    "is_causal",
    "position_embeddings",
}


def _attend_from_transformers(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    treeswarm: "tuple[Attention, Batch] | None" = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute one layer's attention; transformers calls this with tensors [1, heads, ΣT, dim].

    Raises UnsupportedModel if the layer passes an argument that is not implemented here.
    """
    unsupported = sorted(name for name, value in others.items() if name not in IGNORED_ARGUMENTS and value is not None)
    if unsupported or attention_mask is not None:
        raise UnsupportedModel(
            f"its attention takes {', '.join(unsupported) or 'a mask of its own'}, which this node does not implement"
        )
    if treeswarm is None:
        raise UnsupportedModel("its layers do not pass extra arguments on to attention")
    attention, batch = treeswarm
    index = int(cast(int, module.layer_idx))
    options: dict[str, Any] = {
        "scaling": query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        "window": sliding_window,
        "softcap": softcap,
        "sinks": s_aux,
    }
    if batch.store.layers[index].shape.is_latent:
        return attend_latent(module, query[0], key[0], value[0], batch, attention, **options)[None], None
    layer = LayerInputs.with_kv_written(index, query[0], key[0], value[0], batch, **options)
    return attention.attend(layer)[None], None


def register() -> None:
    """Register the implementation with transformers; registering it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, _attend_from_transformers)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)

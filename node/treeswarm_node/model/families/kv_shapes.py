"""Find the shape of the keys and values that a layer keeps."""

from collections.abc import Sequence
from typing import Any

import torch

from treeswarm.errors import UnsupportedModel
from treeswarm_node.kv_cache.kv_store import KVShape
from treeswarm_node.model.loaded_span import LoadedSpan


def kv_shape(layers: Sequence[torch.nn.Module], loaded: LoadedSpan) -> KVShape:
    """Return the KV row shape that all layers share.  Raises UnsupportedModel if they differ."""
    shapes = set()
    for layer in layers:
        inner: Any = getattr(layer, "self_attn", None)
        dim = getattr(inner, "head_dim", None)
        config: Any = loaded.config
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if inner is None or dim is None:
            raise UnsupportedModel(
                f"layer {type(layer).__name__} has no standard self-attention (recurrent or hybrid models)"
            )
        shapes.add(KVShape(int(kv_heads), int(dim), int(dim)))
    if len(shapes) != 1:
        raise UnsupportedModel("its layers have KV rows of different shapes")
    return shapes.pop()

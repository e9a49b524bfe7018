"""Find the attention modules of a layer, and the shape of the keys and values that each of them keeps."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from treeswarm.errors import BadRequest, UnsupportedModel
from treeswarm.protocol.spans import Span
from treeswarm.topology.span_limits import SpanLimits
from treeswarm_node.attention.latent import is_latent
from treeswarm_node.kv_cache.layer_state import KVShape


def attentions_of(layer: torch.nn.Module) -> list[Any]:
    """Return the layer's attention modules in the order in which they run; most layers have one.

    Raises UnsupportedModel if the layer keeps something else than keys and values of its rows.
    """
    inner: Any = getattr(layer, "self_attn", None)
    attentions = list(inner) if isinstance(inner, torch.nn.ModuleList) else [inner]
    for attention in attentions:
        if getattr(attention, "indexer", None) is not None or getattr(attention, "skip_topk", False):
            raise UnsupportedModel("its attention chooses keys by a learned indexer, which is not supported yet")
        if attention is None or not (hasattr(attention, "layer_idx") and hasattr(attention, "config")):
            raise UnsupportedModel(
                f"layer {type(layer).__name__} has no standard self-attention (recurrent or hybrid models)"
            )
    return attentions


def latent_attentions(layer: torch.nn.Module) -> list[Any]:
    """Return those attention modules of a layer that keep compressed latents, in the order in which they run."""
    inner: Any = getattr(layer, "self_attn", None)
    return [module for module in (inner if isinstance(inner, torch.nn.ModuleList) else [inner]) if is_latent(module)]


def latent_shape(inner: Any) -> KVShape:
    """Return the shape of the rows of an attention module that keeps compressed latents."""
    rank, rope_dim = int(inner.kv_lora_rank), int(inner.qk_rope_head_dim)
    return KVShape(1, rank + rope_dim, rank, is_latent=True)


def kv_shapes(layers: Sequence[torch.nn.Module]) -> dict[int, KVShape]:
    """Return the shape of a KV row of each attention module of the layers, by its index in the model.

    Raises UnsupportedModel if a layer keeps something else.
    """
    return {
        int(inner.layer_idx): _shape_of(inner)
        for layer in layers
        for inner in attentions_of(layer)
        if not _reuses_kv(inner)
    }


def kv_givers(layers: Iterable[torch.nn.Module]) -> dict[int, int]:
    """Return which layer's keys and values each layer reads that keeps none of its own, both as indices in the model.

    `layers` are all layers of the model.
    """
    givers: dict[int, int] = {}
    stored: dict[str, int] = {}
    for index, layer in enumerate(layers):
        inner: Any = getattr(layer, "self_attn", None)
        if getattr(inner, "store_full_length_kv", False):
            stored[inner.layer_type] = index
        if _reuses_kv(inner):
            givers[index] = stored[inner.layer_type]
    return givers


def check_cuts(span: Span, givers: Mapping[int, int], blocks: int) -> None:
    """Raise BadRequest if a block of the span reads keys and values that a block outside it keeps."""
    hosted = range(span.start, span.end)
    outside = [taker for taker, giver in givers.items() if taker in hosted and giver not in hosted]
    if not outside:
        return
    allowed = allowed_cuts(givers, blocks)
    raise BadRequest(
        f"block {outside[0]} reads the keys and values that block {givers[outside[0]]} keeps, which is not among the "
        f"blocks {span}: this model can be cut at {', '.join(map(str, allowed))} only, so give --blocks accordingly"
    )


def allowed_cuts(givers: Mapping[int, int], blocks: int) -> list[int]:
    """Return where spans may begin and end, so that no block reads keys and values that a block outside its span keeps.

    The list rises from 0 to `blocks`.  This function is pure.
    """
    return [cut for cut in range(blocks + 1) if not any(giver < cut <= taker for taker, giver in givers.items())]


def fit_to_cuts(span: Span, cuts: Sequence[int], limits: SpanLimits) -> Span:
    """Return the span with its ends at allowed cuts: within `span` if possible, else around it.

    This function is pure.  Raises BadRequest if the blocks around it are more than fit.
    """
    inside = [cut for cut in cuts if span.start <= cut <= span.end]
    if len(inside) > 1:
        return Span(inside[0], inside[-1])
    around = Span(max(cut for cut in cuts if cut <= span.start), min(cut for cut in cuts if cut >= span.end))
    if not limits.allow(around, cuts[-1]):
        raise BadRequest(
            f"blocks {around} share keys and values and cannot be divided, but only {limits.longest} blocks are to be "
            "hosted here: give this node more memory, or --blocks elsewhere"
        )
    return around


def _reuses_kv(inner: Any) -> bool:
    return bool(getattr(inner, "is_kv_shared_layer", False))


def _shape_of(inner: Any) -> KVShape:
    if is_latent(inner):
        return latent_shape(inner)
    key_dim = getattr(inner, "head_dim", None)
    if key_dim is None:
        raise UnsupportedModel(
            f"{type(inner).__name__} says no head_dim: it is no attention that keeps keys and values"
        )
    value_dim = getattr(inner, "v_head_dim", None) or key_dim
    return KVShape(_kv_heads(inner, int(key_dim)), int(key_dim), int(value_dim))


def _kv_heads(inner: Any, key_dim: int) -> int:
    """Return the number of KV heads, by the key projection where there is one, because layers of a model may differ."""
    projection = getattr(inner, "k_proj", None)
    if projection is not None:
        rows = projection.out_features if isinstance(projection, torch.nn.Linear) else projection.weight.shape[0]
        return int(rows) // key_dim
    config = inner.config
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[inner.layer_idx]
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

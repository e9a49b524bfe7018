"""Let transformers' layers call this node's attention, as an attention implementation of transformers."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from treeswarm.errors import UnsupportedModel
from treeswarm_node.attention.base import Attention, LayerInputs
from treeswarm_node.attention.latent import attend_latent
from treeswarm_node.attention.metadata import Batch, Chunk, Window

IMPLEMENTATION = "treeswarm"
# Arguments that layers pass to attention and that change neither which keys are seen nor how scores are computed.
IGNORED_ARGUMENTS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "dropout",
    "is_causal",
    "position_embeddings",
    "sliding_window",
}


@dataclass(frozen=True)
class TreeMask:
    """Replaces the mask tensors that transformers passes to layers: a tree's mask is the batch's, by window alone."""

    window: Window
    """Number of positions in the sliding window, or the chunk, or None if rows see their whole path."""
    dtype: torch.dtype | None = None
    """Dtype that the model converts its masks to, or None if it does not."""
    ndim = 0
    shape = (1 << 40,)
    """Numbers of rows and keys, which are never fewer than a model asks for: no mask is padded."""

    def to(self, *options: Any, **_: Any) -> "TreeMask":
        """Return the mask with the dtype that is among the options."""
        return replace(self, dtype=next((value for value in options if isinstance(value, torch.dtype)), self.dtype))

    def __getitem__(self, _: Any) -> "TreeMask":
        """Return the mask itself: layers cut masks to the keys that they have."""
        return self


HandleAttention = Callable[["AttentionCall"], torch.Tensor]
"""Returns a call's output [ΣT, heads, value_dim]."""
_handler: "ContextVar[HandleAttention | None]" = ContextVar("attention_handler", default=None)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Holds what a layer passes to attention."""

    layer: int
    """Index of the attention in the model."""
    module: Any
    """The layer's attention module."""
    query: torch.Tensor
    key: torch.Tensor
    """Keys, or the latents of a module that keeps latents."""
    value: torch.Tensor
    """Values, or the rotated keys of a module that keeps latents."""
    options: dict[str, Any]
    """Options of `LayerInputs`: scaling, window, softcap and sinks."""


@contextlib.contextmanager
def attention_handled_by(handle: HandleAttention) -> Iterator[None]:
    """Let `handle` compute the attention of all layers that run in this context."""
    token = _handler.set(handle)
    try:
        yield
    finally:
        _handler.reset(token)


def attend_in(batch: Batch, attention: Attention) -> HandleAttention:
    """Return a handler that computes attention over the batch's trees."""

    def handle(call: AttentionCall) -> torch.Tensor:
        rows = (call.query, call.key, call.value, batch)
        if batch.store.layers[call.layer].shape.is_latent:
            return attend_latent(call.module, *rows, attention, **call.options)
        return attention.attend(LayerInputs.with_kv_written(call.layer, *rows, **call.options))

    return handle


def _attend_from_transformers(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: TreeMask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute one layer's attention; transformers calls this with tensors [1, heads, ΣT, dim].

    What a row sees follows from the mask alone, as in transformers' eager attention.  Raises UnsupportedModel if the
    layer passes an argument that is not implemented here.
    """
    unsupported = sorted(name for name, value in others.items() if name not in IGNORED_ARGUMENTS and value is not None)
    if unsupported or not isinstance(attention_mask, TreeMask):
        raise UnsupportedModel(
            f"its attention takes {', '.join(unsupported) or 'a mask of its own'}, which this node does not implement"
        )
    handle = _handler.get()
    assert handle is not None
    options = {
        "scaling": query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        "window": attention_mask.window,
        "softcap": softcap,
        "sinks": s_aux,
    }
    call = AttentionCall(int(cast(int, module.layer_idx)), module, query[0], key[0], value[0], options)
    return handle(call)[None], None


def attend_tree(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: TreeMask, scaling: float
) -> torch.Tensor:
    """Compute plain attention of rows [heads, ΣT, dim] over the batch's trees; return [ΣT, heads, value_dim]."""
    handle = _handler.get()
    assert handle is not None
    options = {"scaling": scaling, "window": mask.window}
    return handle(AttentionCall(module.layer_idx, module, query, key, value, options))


def _make_tree_mask(
    mask_function: Callable[..., Any], local_size: int | None = None, attention_mask: Any = None, **_: Any
) -> TreeMask:
    """Return the mask that stands for transformers' mask function; raise UnsupportedModel if it is none of the usual.

    Transformers builds windows and chunks as an overlay over the causal mask, and says their size.  A mask that was
    made before is used as it is, as transformers does.
    """
    if isinstance(attention_mask, TreeMask):
        return attention_mask
    mask_function = _without_images(mask_function)
    if local_size is None and mask_function is causal_mask_function:
        return TreeMask(None)
    names = [getattr(part, "__qualname__", "") for part in _parts_of(mask_function, "and_masks")]
    if local_size is not None and len(names) == 2 and names[1] == causal_mask_function.__qualname__:
        if names[0].startswith("sliding_window_overlay."):
            return TreeMask(int(local_size))
        if names[0].startswith("chunked_overlay."):
            return TreeMask(Chunk(int(local_size)))
    raise UnsupportedModel("its attention takes a mask of its own, which this node does not implement")


def _without_images(mask_function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a mask function without what it adds for images, if there are none: blocks whose rows see each other."""
    parts = _parts_of(mask_function, "or_masks")
    if len(parts) != 2 or not getattr(parts[1], "__qualname__", "").startswith("blockwise_overlay."):
        return mask_function
    (block_of_row,) = (cell.cell_contents for cell in parts[1].__closure__)
    return mask_function if (block_of_row >= 0).any() else parts[0]


def _parts_of(mask_function: Callable[..., Any], combination: str) -> tuple[Any, ...]:
    """Return the mask functions that transformers combined to this one, or nothing if it is no such combination."""
    contents = [cell.cell_contents for cell in mask_function.__closure__ or ()]
    is_combination = mask_function.__qualname__.startswith(f"{combination}.") and len(contents) == 1
    return tuple(contents[0]) if is_combination else ()


def register() -> None:
    """Register the implementation with transformers; registering it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, _attend_from_transformers)
    AttentionMaskInterface.register(IMPLEMENTATION, _make_tree_mask)

"""Which attention adapter a node computes with: what its owner wants, what the kernels can, what the proof says."""

import logging

import torch

from treeswarm.errors import BadRequest
from treeswarm_node.attention.adapter_check import TOLERANCES, measure_disagreement
from treeswarm_node.attention.base import Attention
from treeswarm_node.attention.flash import FlashAttention, KernelInputs, explain_unsupported, get_capability
from treeswarm_node.kv_cache.kv_store import KVShape
from treeswarm_node.model.span_model import SpanModel

log = logging.getLogger(__name__)


def should_use_flash(wanted: str, demand: KernelInputs) -> bool:
    """Pure.  `auto` takes the kernels on CUDA alone.  Raises BadRequest where `flash` is wanted and cannot be."""
    refusal = explain_unsupported(demand)
    if wanted == "flash" and refusal is not None:
        raise _cannot(refusal)
    return wanted == "flash" or (wanted == "auto" and demand.device == "cuda" and refusal is None)


def check_attention_choice(wanted: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether flash is to be tried, before the model is known.  Raises BadRequest as `should_use_flash` does."""
    return should_use_flash(wanted, KernelInputs(device.type, get_capability(device), dtype))


def choose_attention(model: SpanModel, wanted: str) -> None:
    """Give a proven span the adapter it computes with from now on.

    Raises BadRequest where `flash` is wanted and cannot be, or does not agree with the reference.
    """
    shape, device = model.kv_shape, model.device
    demand = KernelInputs(device.type, get_capability(device), model.dtype, shape.key_dim, shape.value_dim)
    if should_use_flash(wanted, demand):
        use_if_correct(model, FlashAttention(device), insisted=wanted == "flash")


def use_if_correct(model: SpanModel, adapter: Attention, *, insisted: bool) -> None:
    """Else it stays with what it has, and says so in one line; where its owner `insisted`, raises BadRequest."""
    heads = int(model.loaded.config.num_attention_heads)
    failure = find_adapter_fault(adapter, heads, model.kv_shape, model.dtype, model.device)
    if failure is None:
        model.attention = adapter
    elif insisted:
        raise _cannot(failure)
    else:
        log.warning("attention: %s in place of %s, because %s", model.attention.name, adapter.name, failure)


def find_adapter_fault(
    adapter: Attention, heads: int, shape: KVShape, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why the adapter must not compute there, for people; None where it agrees with the reference."""
    try:
        off = measure_disagreement(adapter, heads, shape, dtype, device)
    except RuntimeError as error:
        return f"its check ended with: {(str(error) or type(error).__name__).splitlines()[0]}"
    if off > TOLERANCES[dtype]:
        return f"it differs from plain attention by {off:.1e}, more than {TOLERANCES[dtype]:.0e}"
    return None


def _cannot(why: str) -> BadRequest:
    return BadRequest(f"--attention flash cannot be honoured ({why}): give --attention auto")

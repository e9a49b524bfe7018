"""Select the attention adapter of a node: by its configuration, by what the kernels support, and by a check."""

import logging

import torch

from treeswarm.errors import BadRequest
from treeswarm_node.attention.adapter_check import TOLERANCES, measure_disagreement
from treeswarm_node.attention.base import Attention
from treeswarm_node.attention.flash import FlashAttention, KernelInputs, explain_unsupported, get_capability
from treeswarm_node.attention.sdpa import SdpaAttention
from treeswarm_node.kv_cache.layer_state import KVShape
from treeswarm_node.model.span_model import SpanModel

log = logging.getLogger(__name__)


def should_use_flash(choice: str, inputs: KernelInputs) -> bool:
    """Return whether to use the flash kernels for the choice `auto`, `flash` or `torch`.

    This function is pure.  `auto` uses the kernels on CUDA only.  Raises BadRequest if the choice is `flash` and the
    kernels do not support `inputs`.
    """
    reason = explain_unsupported(inputs)
    if choice == "flash" and reason is not None:
        raise _unusable(reason)
    return choice == "flash" or (choice == "auto" and inputs.device == "cuda" and reason is None)


def check_attention_choice(choice: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether to try flash, before the model is known.  Raises BadRequest as `should_use_flash` does."""
    return should_use_flash(choice, KernelInputs(device.type, get_capability(device), dtype))


def choose_attention(model: SpanModel, choice: str) -> None:
    """Set the attention adapter of a span that passed its family check.

    Raises BadRequest if the choice is `flash` and the kernels do not support the model, or disagree with the
    reference.
    """
    # The adapter computes layers that the kernels do not support as the reference does: one supported layer is enough.
    inputs = [_kernel_inputs(model, shape) for shape in model.kv_shapes]
    best = next((each for each in inputs if explain_unsupported(each) is None), inputs[0])
    if should_use_flash(choice, best):
        use_if_correct(model, FlashAttention(model.device), required=choice == "flash")
    elif choice == "auto" and model.device.type == "cpu":
        use_if_correct(model, SdpaAttention(), required=False)


def _kernel_inputs(model: SpanModel, shape: KVShape) -> KernelInputs:
    device = model.device
    return KernelInputs(device.type, get_capability(device), model.dtype, shape.key_dim, shape.value_dim)


def use_if_correct(model: SpanModel, adapter: Attention, *, required: bool) -> None:
    """Set the adapter if it agrees with the reference.

    Otherwise the span keeps its adapter and a warning is logged; if the adapter is `required`, raises BadRequest.
    """
    heads = int(model.loaded.config.num_attention_heads)
    faults = (find_adapter_fault(adapter, heads, shape, model.dtype, model.device) for shape in model.kv_shapes)
    fault = next((fault for fault in faults if fault is not None), None)
    if fault is None:
        model.attention = adapter
    elif required:
        raise _unusable(fault)
    else:
        log.warning("attention: using %s instead of %s, because %s", model.attention.name, adapter.name, fault)


def find_adapter_fault(
    adapter: Attention, heads: int, shape: KVShape, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Return why the adapter must not be used, as text for users, or None if it agrees with the reference."""
    try:
        difference = measure_disagreement(adapter, heads, shape, dtype, device)
    except RuntimeError as error:
        return f"its check failed: {(str(error) or type(error).__name__).splitlines()[0]}"
    if difference > TOLERANCES[dtype]:
        return f"it differs from plain attention by {difference:.1e}, more than {TOLERANCES[dtype]:.0e}"
    return None


def _unusable(reason: str) -> BadRequest:
    return BadRequest(f"--attention flash cannot be used ({reason}): give --attention auto")

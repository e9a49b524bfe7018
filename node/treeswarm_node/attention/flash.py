"""Compute attention in parts: the trunk by torch's flash kernels, the crown in plain torch, merged in float32.

The flash kernels take no mask, which the trunk does not need.  A part's log-sum-exp gives its share of the whole
softmax, so parts can be computed independently.  K and V are stored heads first, so a run of the trunk is a view that
the kernels read in place.  Folding a KV head's query heads into rows fills the kernels' tiles, and no head is ever
expanded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from treeswarm_node.attention.base import (
    AttentionPart,
    LayerInputs,
    QueryRows,
    attend_reference,
    compute_scores,
    sum_values,
)

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
"""Takes query [kv_heads, rows, dim], key and value [kv_heads, C, dim] and the scaling; returns the output [kv_heads,
rows, dim] and the natural log-sum-exp of its scores, float32 [kv_heads, rows]."""
# FlashAttention 2, as it comes with torch, uses instructions of Ampere.  Its heads must be multiples of 16 bytes and
# fit into the chip's memory.
MIN_CAPABILITY = (8, 0)
MAX_HEAD_DIM, HEAD_STEP = 256, 8


@dataclass(frozen=True)
class KernelInputs:
    """Describes an attention computation, to decide whether the flash kernels can do it."""

    device: str
    """Type of the device, such as `cuda`."""
    capability: tuple[int, int]
    """Compute capability of a CUDA device; (0, 0) for others."""
    dtype: torch.dtype
    key_dim: int = HEAD_STEP
    value_dim: int = HEAD_STEP
    softcap: bool = False
    """Whether the layer caps its scores."""
    sinks: bool = False
    """Whether the layer has attention sinks."""


def explain_unsupported(inputs: KernelInputs) -> str | None:
    """Return why the flash kernels cannot compute `inputs`, as text for users, or None if they can.

    This function is pure.
    """
    on_cuda = inputs.device == "cuda"
    halves = (torch.float16, torch.bfloat16)
    dtype = str(inputs.dtype).removeprefix("torch.")
    for unsupported, reason in (
        (inputs.device not in ("cpu", "cuda"), f"torch has no flash kernel for {inputs.device}"),
        (
            on_cuda and inputs.capability < MIN_CAPABILITY,
            f"the flash kernel needs compute capability 8.0, this device has {'.'.join(map(str, inputs.capability))}",
        ),
        (
            inputs.dtype not in (halves if on_cuda else (*halves, torch.float32)),
            f"the flash kernel for {inputs.device} does not compute in {dtype}",
        ),
        (inputs.key_dim != inputs.value_dim, "the model's keys and values differ in size"),
        (
            on_cuda and (inputs.key_dim > MAX_HEAD_DIM or inputs.key_dim % HEAD_STEP != 0),
            f"the flash kernel does not support heads of {inputs.key_dim}, only multiples of {HEAD_STEP} up to "
            f"{MAX_HEAD_DIM}",
        ),
        (inputs.softcap, "the flash kernel does not cap scores"),
        (inputs.sinks, "the flash kernel does not support attention sinks"),
    ):
        if unsupported:
            return reason
    return None


def get_capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device; (0, 0) for others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def flash_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel that `scaled_dot_product_attention` uses on this device; return its output and log-sum-exp.

    The shapes are those of `Kernel`.
    """
    ops = torch.ops.aten
    run = ops._scaled_dot_product_flash_attention if query.is_cuda else ops._scaled_dot_product_flash_attention_for_cpu
    output, logsumexp = run(query[None], key[None], value[None], scale=scaling)[:2]
    return output[0], logsumexp[0]


class FlashAttention:
    """Computes attention by the flash kernels, or by `attend_reference` if they do not support the model."""

    name = "torch-flash"

    def __init__(self, device: torch.device, kernel: Kernel = flash_kernel) -> None:
        self._capability = get_capability(device)
        self._kernel = kernel

    def attend(self, layer: LayerInputs) -> torch.Tensor:
        query = layer.query
        inputs = KernelInputs(
            query.device.type, self._capability, query.dtype, layer.key.shape[-1], layer.value.shape[-1],
            softcap=layer.softcap is not None, sinks=layer.sinks is not None,
        )  # fmt: skip
        use_reference = layer.keys.dtype != query.dtype or explain_unsupported(inputs) is not None
        return layer.attend_segments(attend_reference if use_reference else self._attend_in_parts, layer.batch.segments)

    def _attend_in_parts(self, rows: QueryRows) -> torch.Tensor:
        """Return float32 [T, heads, value_dim].

        Runs of the trunk that a sliding window cuts need a mask, so they are computed with the crown.
        """
        unmasked = [part for part in rows.trunk if part[2] is None]
        if not unmasked:
            return attend_reference(rows)
        folded = rows.fold_heads()
        parts = [self._kernel(folded, key, value, rows.scaling) for key, value, _ in unmasked]
        parts.append(_attend_masked([*(part for part in rows.trunk if part[2] is not None), rows.crown], rows))
        return rows.unfold_heads(merge_parts(parts))


def _attend_masked(parts: Sequence[AttentionPart], rows: QueryRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and the log-sum-exp of masked parts, in the shapes of a `Kernel`."""
    scores = compute_scores(rows, parts)
    logsumexp = scores.logsumexp(-1)
    weights = torch.exp(scores - logsumexp[..., None])
    return sum_values(torch.split(weights, [part[0].shape[1] for part in parts], -1), parts), logsumexp


def merge_parts(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return attention under one softmax over the keys of all parts, float32 [..., rows, dim].

    Each part is its output [..., rows, dim] under a softmax of its own, and that softmax's log-sum-exp [..., rows].
    The log-sum-exp is -inf for a row that sees no key of the part.
    """
    shares = torch.stack([logsumexp for _, logsumexp in parts]).float().softmax(0)
    total = parts[0][0].float() * shares[0][..., None]
    for (output, _), share in zip(parts[1:], shares[1:], strict=True):
        total = torch.addcmul(total, output.float(), share[..., None])
    return total

"""Attention in parts: the trunk by torch's flash kernels, which take no mask, the crown plainly, merged in float32.

A part's log-sum-exp says what share of the whole softmax is its own, so parts need not know each other.  Heads first,
a trunk's run is a view that the kernels read in place; folding a KV head's query heads into rows fills them, and no
head is ever expanded.
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

# query [kv_heads, rows, dim], key and value [kv_heads, C, dim], scaling; returns the output [kv_heads, rows, dim] and
# its scores' natural log-sum-exp, float32 [kv_heads, rows].
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
# FlashAttention 2, as it comes with torch: instructions of Ampere, heads of whole 16-byte pieces that fit on the chip.
LEAST_CAPABILITY = (8, 0)
LARGEST_HEAD, HEAD_STEP = 256, 8


@dataclass(frozen=True)
class KernelInputs:
    """What a kernel would have to compute."""

    device: str
    """Its type, such as `cuda`."""
    capability: tuple[int, int]
    """Of a CUDA device; of others (0, 0)."""
    dtype: torch.dtype
    key_dim: int = HEAD_STEP
    value_dim: int = HEAD_STEP
    softcap: bool = False
    sinks: bool = False


def explain_unsupported(demand: KernelInputs) -> str | None:
    """Why the kernels cannot do it, for people; None where they can.  Pure."""
    on_cuda = demand.device == "cuda"
    halves = (torch.float16, torch.bfloat16)
    name = str(demand.dtype).removeprefix("torch.")
    for wrong, why in (
        (demand.device not in ("cpu", "cuda"), f"torch has no flash kernel for {demand.device}"),
        (
            on_cuda and demand.capability < LEAST_CAPABILITY,
            f"the flash kernel needs compute capability 8.0, this device has {'.'.join(map(str, demand.capability))}",
        ),
        (
            demand.dtype not in (halves if on_cuda else (*halves, torch.float32)),
            f"the flash kernel for {demand.device} does not compute in {name}",
        ),
        (demand.key_dim != demand.value_dim, "the model's keys and values differ in size"),
        (
            on_cuda and (demand.key_dim > LARGEST_HEAD or demand.key_dim % HEAD_STEP != 0),
            f"heads of {demand.key_dim} do not fit the flash kernel: multiples of {HEAD_STEP} up to {LARGEST_HEAD} do",
        ),
        (demand.softcap, "the flash kernel caps no scores"),
        (demand.sinks, "the flash kernel knows no sinks"),
    ):
        if wrong:
            return why
    return None


def get_capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device; (0, 0) for others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def flash_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `Kernel`: the one that `scaled_dot_product_attention` takes on this device, with its log-sum-exp."""
    ops = torch.ops.aten
    run = ops._scaled_dot_product_flash_attention if query.is_cuda else ops._scaled_dot_product_flash_attention_for_cpu
    output, level = run(query[None], key[None], value[None], scale=scaling)[:2]
    return output[0], level[0]


class FlashAttention:
    """The kernels where they can, `attend_reference` where not: every model is served."""

    name = "torch-flash"

    def __init__(self, device: torch.device, kernel: Kernel = flash_kernel) -> None:
        self._capability = get_capability(device)
        self._kernel = kernel

    def attend(self, layer: LayerInputs) -> torch.Tensor:
        query = layer.query
        demand = KernelInputs(
            query.device.type, self._capability, query.dtype, layer.key.shape[-1], layer.value.shape[-1],
            softcap=layer.softcap is not None, sinks=layer.sinks is not None,
        )  # fmt: skip
        plainly = layer.keys.dtype != query.dtype or explain_unsupported(demand) is not None
        return layer.attend_segments(attend_reference if plainly else self._in_parts, layer.batch.segments)

    def _in_parts(self, rows: QueryRows) -> torch.Tensor:
        """float32 [T, heads, value_dim].  What a window cuts into is masked, and goes with the crown."""
        whole = [part for part in rows.trunk if part[2] is None]
        if not whole:
            return attend_reference(rows)
        folded = rows.fold_heads()
        parts = [self._kernel(folded, key, value, rows.scaling) for key, value, _ in whole]
        parts.append(_attend_masked([*(part for part in rows.trunk if part[2] is not None), rows.crown], rows))
        return rows.unfold_heads(merge_parts(parts))


def _attend_masked(parts: Sequence[AttentionPart], rows: QueryRows) -> tuple[torch.Tensor, torch.Tensor]:
    """As a kernel would return it."""
    scores = compute_scores(rows, parts)
    level = scores.logsumexp(-1)
    weights = torch.exp(scores - level[..., None])
    return sum_values(torch.split(weights, [part[0].shape[1] for part in parts], -1), parts), level


def merge_parts(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """One softmax over the keys of all parts, in float32, from each part's output [..., rows, dim] under a softmax of
    its own and that softmax's log-sum-exp [..., rows].  A part whose keys a row does not see has -inf there."""
    shares = torch.stack([level for _, level in parts]).float().softmax(0)
    total = parts[0][0].float() * shares[0][..., None]
    for (output, _), share in zip(parts[1:], shares[1:], strict=True):
        total = torch.addcmul(total, output.float(), share[..., None])
    return total

"""Merge the matrices of a layer's experts into one tensor, without holding them twice."""

from collections.abc import Iterable
from copy import copy
from typing import Any

import torch
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter


class FuseExperts(ConversionOps):  # type: ignore[misc]
    """Stacks experts along a new first dimension, and their gate and up projections along the second.

    It computes what transformers' MergeModulelist and Concatenate do, but copies matrix by matrix and frees each one.
    Those hold gate and up three times for a moment, which is twice a block's memory.
    """

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, torch.Tensor]:
        """Return the fused tensor [experts, …] under the target's name; the lists in `input_dict` are emptied."""
        parts = [input_dict.pop(pattern) for pattern in source_patterns if pattern in input_dict]
        if len({len(matrices) for matrices in parts}) != 1:
            raise ValueError(f"{source_patterns} have {[len(matrices) for matrices in parts]} tensors")
        first, heights = parts[0][0], [matrices[0].shape[0] for matrices in parts]
        fused = torch.empty((len(parts[0]), sum(heights), *first.shape[1:]), dtype=first.dtype, device=first.device)
        start = 0
        for matrices, height in zip(parts, heights, strict=True):
            for expert in range(len(matrices)):
                target = fused[expert, start : start + height]
                if matrices[expert].shape != target.shape:
                    raise ValueError(f"expert {expert} is {list(matrices[expert].shape)}, not {list(target.shape)}")
                target.copy_(matrices[expert])
                matrices[expert] = None
            start += height
        return {target_patterns[0]: fused}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError


def fuse_in_place(conversions: Iterable[Any]) -> list[Any]:
    """Return the conversions with `FuseExperts` in place of transformers' own operations, where they do the same."""
    return [_with_fusion(conversion) if _merges_experts(conversion) else conversion for conversion in conversions]


def _merges_experts(conversion: Any) -> bool:
    if not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) != 1:
        return False
    merge, *rest = conversion.operations
    if type(merge) is not MergeModulelist or merge.dim != 0:
        return False
    if not rest:
        return len(conversion.source_patterns) == 1
    return len(rest) == 1 and type(rest[0]) is Concatenate and rest[0].dim == 1 and not rest[0].num_shards_attribute


def _with_fusion(conversion: WeightConverter) -> WeightConverter:
    changed = copy(conversion)
    changed.operations = [FuseExperts()]
    return changed

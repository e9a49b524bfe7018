"""A speculator's matrices in eight bits: a head is half as large to ship, and guesses may lose bits where text may not.

A matrix is kept as int8 with one scale per row, in a tensor of its own beside it.
"""

from collections.abc import Mapping

import torch

SCALES = ".scales"
"""What the name of a matrix's scales ends with."""


def packed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights with all floating-point matrices in eight bits, and the rest as they are."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not tensor.is_floating_point():
            result[name] = tensor
            continue
        rows = tensor.float()
        scales = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        result[name] = (rows / scales).round().to(torch.int8)
        result[name + SCALES] = scales[:, 0]
    return result


def unpacked(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights that `packed` was given, as far as eight bits keep them, in float32."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALES):
            continue
        scales = tensors.get(name + SCALES)
        result[name] = tensor if scales is None else tensor.float() * scales[:, None]
    return result

"""Quantize the weights of a decoder layer's linear layers to 8 or 4 bits with bitsandbytes.

A weight is stored quantized and dequantized into the model's dtype when its layer runs.  The product is torch's own, so
a row depends on the rows beside it no more than without quantization.  CPU and GPU dequantize to the same numbers.
"""

import copy
from typing import Any

import torch

from treeswarm.errors import BadRequest, UnsupportedModel
from treeswarm.extras import install_command, missing_modules

BITS = {"int8": 8, "nf4": 4}
# Number of weights that share a scale (float32).  4 bits need smaller blocks; at 8 bits the scales of blocks of 256 are
# 1.6 % of the bytes.
BLOCK = {"int8": 256, "nf4": 64}
# Smallest share of a layer's weights that must be quantized.  A layer below it has most of its weights elsewhere (fused
# experts), and quantization would save nothing.
MIN_SHARE = 0.5


class QuantizedLinear(torch.nn.Module):
    """Computes a linear layer from rows [..., in] to [..., out] in their dtype; the weight is dequantized per call."""

    packed: torch.Tensor
    scales: torch.Tensor
    code: torch.Tensor

    def __init__(self, linear: torch.nn.Linear, kind: str) -> None:
        super().__init__()
        functional = _library()
        weight = linear.weight.data.contiguous()
        self.kind, self.shape = kind, weight.shape
        self.bias = linear.bias
        if kind == "nf4":
            packed, state = functional.quantize_4bit(weight.float(), blocksize=BLOCK[kind], quant_type="nf4")
        else:
            # Evenly spaced levels: the library's own 8-bit code is made for optimisers, and its error for weights is
            # half again as large (0.0108 against 0.0070 of their norm).
            code = functional.create_linear_map(signed=True, total_bits=8).to(weight.device)
            packed, state = functional.quantize_blockwise(weight.float(), code=code, blocksize=BLOCK[kind])
        for name, tensor in (("packed", packed), ("scales", state.absmax), ("code", state.code)):
            self.register_buffer(name, tensor, persistent=False)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [out, in] in `dtype`."""
        functional = _library()
        state = functional.QuantState(
            absmax=self.scales, shape=self.shape, code=self.code, blocksize=BLOCK[self.kind], dtype=dtype,
            quant_type="nf4" if self.kind == "nf4" else None,
        )  # fmt: skip
        dequantize = functional.dequantize_4bit if self.kind == "nf4" else functional.dequantize_blockwise
        weight: torch.Tensor = dequantize(self.packed, state)
        return weight.view(self.shape)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(rows, self.dequantize(rows.dtype), self.bias)


def check_library(quantization: str) -> None:
    """Raise BadRequest if the library for this quantization is not installed."""
    if quantization != "none" and missing_modules("quantization"):
        raise BadRequest(
            f"--quantization {quantization} needs bitsandbytes: {install_command('node', 'quantization')}, "
            "or go without --quantization"
        )


@torch.no_grad()
def quantize(layer: torch.nn.Module, kind: str) -> None:
    """Replace a decoder layer's linear layers with quantized ones of kind `int8` or `nf4`.

    Raises UnsupportedModel if they hold less than `MIN_SHARE` of the layer's weights.
    """
    total = sum(parameter.numel() for parameter in layer.parameters())
    replaced = 0
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                replaced += child.weight.numel()
                setattr(parent, name, QuantizedLinear(child, kind))
    if replaced < MIN_SHARE * total:
        raise UnsupportedModel(
            f"only {replaced / max(1, total):.0%} of a decoder layer's weights can be quantized (fused experts "
            "cannot): go without --quantization"
        )


def dequantized_copy(layer: torch.nn.Module) -> torch.nn.Module:
    """Return a float32 copy in which quantized linear layers are plain ones with the same dequantized weights."""
    dequantized = copy.deepcopy(layer).float()
    for parent in list(dequantized.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                weight = child.dequantize(torch.float32)
                plain = torch.nn.Linear(
                    child.shape[1], child.shape[0], bias=child.bias is not None, device=weight.device
                )
                plain.weight.data, plain.bias = weight, child.bias
                setattr(parent, name, plain.requires_grad_(False))
    return dequantized


def _library() -> Any:
    import bitsandbytes.functional  # noqa: PLC0415  # optional, and 100 MB

    return bitsandbytes.functional

"""Make a float32 copy of a decoder block to check it with, which takes little memory also if the block is large."""

import copy
from typing import Any

import torch

from treeswarm_node.attention.latent import EXPANSION
from treeswarm_node.model.checkpoint.parts import fused_experts
from treeswarm_node.model.quantization.quantized_linear import (
    PackedLinear,
    QuantizedExperts,
    QuantizedLinear,
    dequantized_copy,
)

# Bytes of the largest copy that is held whole.  In a larger one every large matrix is converted whenever it is used.
# The check runs a block some ten times, so a whole copy is faster.
WHOLE_BYTES = 256 << 20
# Bytes in float32 of the smallest matrix that is converted whenever it is used.
LARGE_BYTES = 32 << 20


def plain_copy(layer: torch.nn.Module) -> torch.nn.Module:
    """Return a block that computes what a float32 copy with plain weights would, and shares none of its modules."""
    return _Copier().copy(layer) if is_large(layer) else dequantized_copy(layer)


def is_large(layer: torch.nn.Module) -> bool:
    """Return whether a block is too large for a whole copy."""
    return _float32_bytes(layer) > WHOLE_BYTES


def _float32_bytes(layer: torch.nn.Module) -> int:
    """Return the bytes of a float32 copy of a block."""
    numbers = sum(parameter.numel() for parameter in layer.parameters())
    for module in layer.modules():
        if isinstance(module, QuantizedLinear):
            numbers += module.weight.shape.numel()
        elif isinstance(module, PackedLinear):
            numbers += module.shape.numel()
        elif isinstance(module, QuantizedExperts):
            numbers += len(module) * module.shape.numel()
    return numbers * torch.float32.itemsize


def copy_bytes(layer: torch.nn.Module) -> int:
    """Return the bytes that checking a block with a copy of it takes; the block may be without weights."""
    if not is_large(layer):
        return _float32_bytes(layer)
    fused = fused_experts(layer)
    sizes = {name: parameter.numel() * torch.float32.itemsize for name, parameter in layer.named_parameters()}
    held = sum(size for name, size in sizes.items() if size <= LARGE_BYTES and name not in fused)
    return held + max(size // fused.get(name, 1) for name, size in sizes.items())


class ConvertedLinear(torch.nn.Module):
    """Computes a linear layer in float32, and converts its matrix for every product."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.__dict__["_linear"] = linear  # not as a module of its own: its weights are not this one's

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        linear = self.__dict__["_linear"]
        bias = None if linear.bias is None else linear.bias.float()
        return torch.nn.functional.linear(rows, _matrix_of(linear), bias)


class ConvertedExperts(torch.nn.Module):
    """Stands for the fused parameter [experts, …] of a module, and converts an expert's matrix whenever it is read."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["_module"], self.__dict__["_name"] = module, name

    def __getitem__(self, expert: Any) -> torch.Tensor:
        weights = getattr(self.__dict__["_module"], self.__dict__["_name"])
        weight = weights[int(expert)]
        return weight.float() if isinstance(weight, torch.Tensor) else weight.as_parameter(torch.float32)


class _Copier:
    """Copies modules, each once; small weights are converted, and large ones stay where they are."""

    def __init__(self) -> None:
        self._copies: dict[int, torch.nn.Module] = {}

    def copy(self, module: torch.nn.Module, name: str = "") -> torch.nn.Module:
        if id(module) not in self._copies:
            self._copies[id(module)] = self._copy(module, name)
        return self._copies[id(module)]

    def _copy(self, module: torch.nn.Module, name: str) -> torch.nn.Module:
        if isinstance(module, QuantizedLinear | PackedLinear) or type(module) is torch.nn.Linear:
            return _plain_linear(module, converted=name != EXPANSION)
        changed = copy.copy(module)
        fused = [
            n for n, p in module.named_parameters(recurse=False) if hasattr(module, "is_transposed") and p.ndim > 2
        ]
        changed._parameters = {n: _as_float32(p) for n, p in module._parameters.items() if n not in fused}
        changed._buffers = {
            n: b.float() if b is not None and b.is_floating_point() else b for n, b in module._buffers.items()
        }
        changed._modules = {
            n: ConvertedExperts(module, n) if isinstance(child, QuantizedExperts) else child and self.copy(child, n)
            for n, child in module._modules.items()
        }
        for parameter in fused:
            changed._modules[parameter] = ConvertedExperts(module, parameter)
        return changed


def _as_float32(parameter: torch.nn.Parameter | None) -> torch.nn.Parameter | None:
    return None if parameter is None else torch.nn.Parameter(parameter.data.float(), requires_grad=False)


def _plain_linear(linear: Any, *, converted: bool) -> torch.nn.Module:
    """Return a linear layer with a float32 copy of the matrix, or one that converts it if it is large."""
    shape = linear.shape if isinstance(linear, PackedLinear) else linear.weight.shape
    if converted and shape.numel() * torch.float32.itemsize > LARGE_BYTES:
        return ConvertedLinear(linear)
    plain = torch.nn.Linear(shape[1], shape[0], bias=False, device="meta")
    plain.weight = torch.nn.Parameter(_matrix_of(linear).clone(), requires_grad=False)
    plain.register_parameter("bias", _as_float32(linear.bias))
    return plain


def _matrix_of(linear: Any) -> torch.Tensor:
    weight: torch.Tensor = (
        linear.weight.float() if type(linear) is torch.nn.Linear else linear.dequantize(torch.float32)
    )
    return weight

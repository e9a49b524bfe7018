"""Check packed matrices at load: their kernels' products against those of the dequantized matrices."""

import torch

from treeswarm.errors import UnsupportedModel
from treeswarm_node.model.quantization.quantized_linear import (
    ExpertWeight,
    PackedLinear,
    QuantizedExperts,
    QuantizedLinear,
)
from treeswarm_node.model.span_model import SpanModel

# Largest accepted difference, relative to the product's norm, by the dtype that the kernel rounds rows to.  Seen: 2e-5
# for rows in 15 bits, 0.003 in bfloat16.  A kernel that takes a wrong scale or column is off by about 1.
TOLERANCES = {"packed": 1e-3, "published": 1e-3, "int8": 1e-3, "int4": 0.02, "nf4": 1e-3}
ROUNDING = {torch.float32: 0.0, torch.float16: 0.005, torch.bfloat16: 0.02}
ROWS = 3
SEED = 20261130


@torch.inference_mode()
def check_kernels(model: SpanModel) -> float:
    """Compare one matrix of each shape in a span, and return the largest difference.  Raises UnsupportedModel."""
    worst: dict[tuple[str, torch.Size], float] = {}
    for index, layer in enumerate(model.layers, model.loaded.span.start):
        for module in layer.modules():
            if isinstance(module, QuantizedLinear | QuantizedExperts | PackedLinear):
                key = _kind_and_shape(module)
                if key not in worst:
                    model.loaded.load_block(index)
                    matrix = module[len(module) - 1] if isinstance(module, QuantizedExperts) else module
                    worst[key] = _measure_error(matrix, key[1][1], model.dtype)
    for (kind, shape), error in worst.items():
        tolerance = TOLERANCES[kind] + ROUNDING[model.dtype]
        if not error <= tolerance:
            raise UnsupportedModel(
                f"products with {kind} weights of shape {tuple(shape)} are off by {error:.1e} on this device, more "
                f"than {tolerance:.0e}: give another --quantization, or none"
            )
    return max(worst.values(), default=0.0)


def _kind_and_shape(module: QuantizedLinear | QuantizedExperts | PackedLinear) -> tuple[str, torch.Size]:
    if isinstance(module, PackedLinear):
        return "packed", module.shape
    weight = module.weight if isinstance(module, QuantizedLinear) else module
    return weight.kind, weight.shape


def _measure_error(matrix: QuantizedLinear | ExpertWeight | PackedLinear, inputs: int, dtype: torch.dtype) -> float:
    """Return the norm of the difference of the products with some random rows, relative to their norm."""
    weight = matrix.dequantize(torch.float32)
    rows = torch.randn(ROWS, inputs, generator=torch.Generator().manual_seed(SEED)).to(weight.device, dtype)
    product, expected = matrix.multiply(rows).float(), rows.float() @ weight.t()
    return float((product - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))

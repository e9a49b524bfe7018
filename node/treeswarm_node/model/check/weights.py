"""Compare the weights that this node holds with those that transformers loads from the same checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from treeswarm.errors import SwarmError, UnsupportedModel
from treeswarm_node.model.check.family_check import layer_kind
from treeswarm_node.model.check.stock_slice import load_slice, spread
from treeswarm_node.model.checkpoint.parts import LoadedPart, join
from treeswarm_node.model.loaded_span import LoadedSpan
from treeswarm_node.model.quantization.quantized_linear import PackedLinear, QuantizedExperts, QuantizedLinear
from treeswarm_node.model.span_model import SpanModel

# Largest accepted error of quantized weights by their kind, relative to their norm.  Seen for normally distributed
# weights: 0.007 to 0.01 in 8 bits, 0.09 to 0.12 in 4 bits; weights of another matrix have an error of about 1.4.
QUANTIZED_TOLERANCE = {"int8": 0.03, "int4": 0.3, "nf4": 0.3}
# The same for codes that are held as they were published.  They are expanded to the very numbers.  Kernels multiply
# with what is rounded to 16 bits: below 0.002 for 8 bits and 0.005 for 4 bits.  A zero that is wrong by one makes 0.3.
HELD_TOLERANCE = {"published": 0.0, "int8": 0.01, "int4": 0.02}
# Bytes of a block that are compared at once, unless one tensor is larger.  Transformers builds all modules of the model
# for each slice, so few large slices take less time than many small ones.
COMPARED_BYTES = 128 << 20
# Number of a matrix's rows whose error is computed at once.
ERROR_ROWS = 1024


@torch.inference_mode()
def check_weights(model: SpanModel) -> int:
    """Compare one block of each kind, and embedding and head where they are hosted; return the number of tensors.

    Parameters and persistent buffers must be those of `from_pretrained`, bit for bit unless this node quantized them.
    Raises UnsupportedModel, which names the tensor.
    """
    kinds: dict[object, int] = {}
    for index in range(model.loaded.span.start, model.loaded.span.end):
        kinds.setdefault(layer_kind(model, index), index)
    if model.loaded.weights is None:
        return 0
    weights, compared = model.loaded.weights.open(), 0
    for block in kinds.values():
        of_block = [part for part in model.loaded.weights.parts if part.part.block == block]
        for part in join(of_block, COMPARED_BYTES):
            compared += _compare(model, block, part, _load_stock(model, weights, block, part))
    if model.loaded.span.start == 0 or model.loaded.is_tail:
        compared += _compare(model, None, None, _load_stock(model, weights, None, None))
    return compared


def _load_stock(
    model: SpanModel, weights: Mapping[str, Any], block: int | None, part: LoadedPart | None
) -> PreTrainedModel:
    """Return a slice of the model as transformers loads it.  Raises UnsupportedModel if it cannot."""
    try:
        return load_slice(model.loaded, weights, block, part)
    except SwarmError:
        raise
    except Exception as error:  # A model's own constructor raises errors of every kind when blocks are left out.
        whole = "what is besides blocks" if block is None else f"block {block}"
        reason = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
        raise UnsupportedModel(
            f"models of type '{model.loaded.config.model_type}' are not supported: transformers does not load {whole} "
            f"alone, so weights cannot be compared with its own ({type(error).__name__}: {reason})"
        ) from error


def _compare(model: SpanModel, block: int | None, part: LoadedPart | None, stock: PreTrainedModel) -> int:
    """Compare what a part, or what belongs to no block, has become; return the number of tensors."""
    loaded = model.loaded
    path, tensors = f"{model.frame.blocks.path}.", stock.state_dict()
    if block is None or part is None:
        names = [name for name in tensors if not name.startswith(path) and _is_held(loaded.skeleton, name)]
    else:
        loaded.load_block(block)
        names = [name for name in tensors if name.startswith(f"{path}{block}.") and _is_in(loaded, part, name)]
    for name in names:
        experts = part.part.experts if part is not None else None
        some = slice(experts.start, experts.end) if experts is not None and experts.parameter == name else None
        problem = _find_difference(loaded, name, tensors[name], some)
        if problem:
            raise UnsupportedModel(f"models of type '{loaded.config.model_type}' are not supported: {problem}")
    return len(names)


def _is_in(loaded: LoadedSpan, part: LoadedPart, name: str) -> bool:
    """Return whether a tensor of a block was loaded with a part; what was loaded with none belongs to the first."""
    assert loaded.weights is not None
    parts = [other for other in loaded.weights.parts if other.part.block == part.part.block]
    is_first = part.part.tensors[0] == parts[0].part.tensors[0]
    return name in part.names or (is_first and not any(name in other.names for other in parts))


def _is_held(skeleton: PreTrainedModel, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    held = getattr(skeleton.get_submodule(owner), leaf, None)
    return isinstance(held, torch.Tensor) and not held.is_meta


def _find_difference(loaded: LoadedSpan, name: str, expected: torch.Tensor, some: slice | None = None) -> str | None:
    """Return how a tensor of this node differs from the one that transformers loaded, or None.

    Of a fused parameter, `some` experts were loaded.
    """
    tolerances = HELD_TOLERANCE if loaded.holds_codes else QUANTIZED_TOLERANCE
    owner, _, leaf = name.rpartition(".")
    module: Any = loaded.skeleton.get_submodule(owner)
    held: Any = getattr(module, leaf, None)
    if isinstance(module, QuantizedLinear) and leaf == "weight":
        error = _squared_error(module.dequantize(torch.float32), expected)
        return _describe_error(name, module.weight.kind, error, expected, tolerances[module.weight.kind])
    if isinstance(held, QuantizedExperts):
        experts = range(len(held))[some or slice(None)]
        pairs = zip(experts, expected, strict=True)
        error = sum(_squared_error(held[i].as_parameter(torch.float32), weight) for i, weight in pairs)
        return _describe_error(name, held.kind, error, expected, tolerances[held.kind])
    if isinstance(module, PackedLinear) and leaf == "weight":
        held = module.dequantize(expected.dtype)
    if not isinstance(held, torch.Tensor):
        return f"tensor {name} is missing in this node's module"
    held = held if some is None else held[some]
    if held.shape != expected.shape and len(held) > len(expected):
        held = held[spread(len(held))]
    # The head is computed in float32, whatever the dtype of its weights is.
    expected = expected.to(held.device, held.dtype) if held.dtype == torch.float32 else expected.to(held.device)
    equal = held.dtype == expected.dtype and torch.equal(held, expected)
    return None if equal else f"tensor {name} is not what transformers loads from the checkpoint"


def _squared_error(held: torch.Tensor, expected: torch.Tensor) -> float:
    pairs = zip(torch.split(held, ERROR_ROWS), torch.split(expected, ERROR_ROWS), strict=True)
    return sum(float((part - other.to(held.device, torch.float32)).square().sum()) for part, other in pairs)


def _describe_error(name: str, kind: str, squared_error: float, expected: torch.Tensor, tolerance: float) -> str | None:
    error = (squared_error / max(float(torch.linalg.vector_norm(expected, dtype=torch.float32)) ** 2, 1e-30)) ** 0.5
    if error <= tolerance:
        return None
    return f"tensor {name} in {kind} differs by {error:.1e} from the checkpoint's"

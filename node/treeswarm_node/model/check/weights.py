"""Compare the weights that this node holds with those that transformers loads from the same checkpoint."""

from typing import Any

import torch
from transformers import PreTrainedModel

from treeswarm.errors import SwarmError, UnsupportedModel
from treeswarm_node.model.check.family_check import layer_kind
from treeswarm_node.model.check.stock_slice import load_slice, spread
from treeswarm_node.model.quantization.quantized_linear import PackedLinear, QuantizedExperts, QuantizedLinear
from treeswarm_node.model.quantization.weight_kinds import KINDS
from treeswarm_node.model.span_model import SpanModel

# Largest accepted error of quantized weights by their bits, relative to their norm.  Seen for normally distributed
# weights: 0.007 to 0.01 in 8 bits, 0.09 to 0.12 in 4 bits; weights of another matrix have an error of about 1.4.
QUANTIZED_TOLERANCE = {8: 0.03, 4: 0.3}


@torch.inference_mode()
def check_weights(model: SpanModel) -> int:
    """Compare one block of each kind, and embedding and head where they are hosted; return the number of tensors.

    Parameters and persistent buffers must be those of `from_pretrained`, bit for bit unless they are quantized.  Raises
    UnsupportedModel, which names the tensor.
    """
    kinds: dict[object, int] = {}
    for index in range(model.loaded.span.start, model.loaded.span.end):
        kinds.setdefault(layer_kind(model, index), index)
    compared = 0
    for block in [*kinds.values(), None]:
        if block is None and not (model.loaded.span.start == 0 or model.loaded.is_tail):
            continue
        compared += _compare(model, block, _load_stock(model, block))
    return compared


def _load_stock(model: SpanModel, block: int | None) -> PreTrainedModel:
    """Return a slice of the model as transformers loads it.  Raises UnsupportedModel if it cannot."""
    try:
        return load_slice(model.loaded, block)
    except SwarmError:
        raise
    except Exception as error:  # A model's own constructor raises errors of every kind when blocks are left out.
        part = "what is besides blocks" if block is None else f"block {block}"
        reason = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
        raise UnsupportedModel(
            f"models of type '{model.loaded.config.model_type}' are not supported: transformers does not load {part} "
            f"alone, so weights cannot be compared with its own ({type(error).__name__}: {reason})"
        ) from error


def _compare(model: SpanModel, block: int | None, stock: PreTrainedModel) -> int:
    loaded = model.loaded
    if block is not None:
        loaded.load_block(block)
    path, tensors = f"{model.frame.blocks.path}.", stock.state_dict()
    names = [name for name in tensors if name.startswith(f"{path}{block}.")]
    if block is None:
        names = [name for name in tensors if not name.startswith(path) and _is_held(loaded.skeleton, name)]
    for name in names:
        problem = _find_difference(loaded.skeleton, name, tensors[name])
        if problem:
            raise UnsupportedModel(f"models of type '{loaded.config.model_type}' are not supported: {problem}")
    return len(names)


def _is_held(skeleton: PreTrainedModel, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    held = getattr(skeleton.get_submodule(owner), leaf, None)
    return isinstance(held, torch.Tensor) and not held.is_meta


def _find_difference(skeleton: PreTrainedModel, name: str, expected: torch.Tensor) -> str | None:
    """Return how a tensor of this node differs from the one that transformers loaded, or None."""
    owner, _, leaf = name.rpartition(".")
    module: Any = skeleton.get_submodule(owner)
    held: Any = getattr(module, leaf, None)
    if isinstance(module, QuantizedLinear) and leaf == "weight":
        error = _squared_error(module.dequantize(torch.float32), expected)
        return _describe_error(name, module.weight.kind, error, expected)
    if isinstance(held, QuantizedExperts):
        experts = range(len(held))
        error = sum(_squared_error(held[i].as_parameter(torch.float32), expected[i]) for i in experts)
        return _describe_error(name, held.kind, error, expected)
    if isinstance(module, PackedLinear) and leaf == "weight":
        held = module.dequantize(expected.dtype)
    if not isinstance(held, torch.Tensor):
        return f"tensor {name} is missing in this node's module"
    if held.shape != expected.shape and len(held) > len(expected):
        held = held[spread(len(held))]
    # The head is computed in float32, whatever the dtype of its weights is.
    expected = expected.to(held.device, held.dtype) if held.dtype == torch.float32 else expected.to(held.device)
    equal = held.dtype == expected.dtype and torch.equal(held, expected)
    return None if equal else f"tensor {name} is not what transformers loads from the checkpoint"


def _squared_error(held: torch.Tensor, expected: torch.Tensor) -> float:
    return float((held - expected.to(held.device, torch.float32)).square().sum())


def _describe_error(name: str, kind: str, squared_error: float, expected: torch.Tensor) -> str | None:
    error = (squared_error / max(float(torch.linalg.vector_norm(expected, dtype=torch.float32)) ** 2, 1e-30)) ** 0.5
    if error <= QUANTIZED_TOLERANCE[KINDS[kind].bits]:
        return None
    return f"tensor {name} in {kind} differs by {error:.1e} from the checkpoint's"

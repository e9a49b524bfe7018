"""Compute plain decoder blocks in few operations, on CPUs.

Transformers' layers run some 60 operations per block.  On a CPU each costs several microseconds, more than the
products of a small model.  A block that consists of RMS norms, rotary attention and a gated MLP, and of nothing else,
is computed here in about 25: query, key and value are one product and are rotated at once, gate and up are one.

Whether a block is of that kind is read from its modules and from the names that its code uses.  A check at load
(`check/fused_check.py`) compares what is computed here with the block's own forward.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from treeswarm_node.attention.interface import TreeMask, attend_tree
from treeswarm_node.model.quantization.packed_products import IntegerProduct
from treeswarm_node.model.quantization.quantized_linear import PackedLinear, QuantizedLinear

# Modules of a plain block, of its attention (the norms of query and key are optional) and of its MLP.
BLOCK_MODULES = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
QUERY_KEY_NORMS = ("q_norm", "k_norm")
MLP_MODULES = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Names that the code of a plain attention uses besides its modules.  Any other name may change what is computed: a
# clamp, a factor by position, layers without rotation.
ATTENTION_NAMES = {
    "ALL_ATTENTION_FUNCTIONS", "_attn_implementation", "apply_rotary_pos_emb", "attention_dropout", "config",
    "contiguous", "eager_attention_forward", "get_interface", "getattr", "head_dim", "layer_idx", "o_proj", "reshape",
    "scaling", "shape", "sliding_window", "training", "transpose", "update", "view", *PROJECTIONS, *QUERY_KEY_NORMS,
}  # fmt: skip

Product = Callable[[torch.Tensor], torch.Tensor]
"""Returns the products [n, out] of rows [n, in] with the matrices of one or several linear layers."""


def is_plain_block(block: torch.nn.Module) -> bool:
    """Return whether a block has the modules of a plain one, and code that uses nothing besides them."""
    if not (_has_only(block, BLOCK_MODULES) and _uses_only(block, BLOCK_MODULES)):
        return False
    attention, mlp = block.get_submodule("self_attn"), block.get_submodule("mlp")
    names = {name for name, _ in attention.named_children()} & set(QUERY_KEY_NORMS)
    return (
        _has_only(attention, {*PROJECTIONS, "o_proj", *names})
        and len(names) in (0, 2)
        and _uses_only(attention, ATTENTION_NAMES)
        and _has_only(mlp, MLP_MODULES)
        and _uses_only(mlp, MLP_MODULES)
        and all(_is_rms_norm(block.get_submodule(name)) for name in BLOCK_MODULES if "norm" in name)
        and all(_is_rms_norm(attention.get_submodule(name)) for name in names)
    )


def _has_only(module: torch.nn.Module, names: set[str]) -> bool:
    return set(module._modules) == names and not module._parameters and not module._buffers


def _uses_only(module: torch.nn.Module, names: set[str]) -> bool:
    return set(inspect.unwrap(type(module).forward).__code__.co_names) <= names


def _is_rms_norm(norm: Any) -> bool:
    """Return whether a norm divides rows by their root mean square and multiplies them by its weight, as it is."""
    if set(norm._parameters) != {"weight"} or _eps_of(norm) is None:
        return False
    rows = torch.linspace(-2, 3, 3 * len(norm.weight)).view(3, -1).to(norm.weight.dtype)
    return torch.allclose(norm(rows), _Norm(norm)(rows), rtol=0.02, atol=0.02)


def _eps_of(norm: torch.nn.Module) -> float | None:
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return float(eps) if isinstance(eps, float) else None


class FusedBlock:
    """Computes a plain decoder block; weights of plain linear layers that are one product are held once."""

    def __init__(self, block: Any) -> None:
        attention, mlp = block.self_attn, block.mlp
        self._attention = attention
        self._head_dim, self._scaling = int(attention.head_dim), float(attention.scaling)
        projections = [getattr(attention, name) for name in PROJECTIONS]
        self._integers = any(_integer_product(linear) for linear in projections)
        heads = [_outputs_of(linear) // self._head_dim for linear in projections]
        self._heads, self._rotated = heads[0], heads[0] + heads[1]
        self._project, self._output = join_products(projections), join_products([attention.o_proj])
        self._gate_and_up = join_products([mlp.gate_proj, mlp.up_proj])
        self._down = join_products([mlp.down_proj])
        self._activate: Callable[[torch.Tensor], torch.Tensor] = mlp.act_fn
        self._width = _outputs_of(mlp.gate_proj)
        self._norms = [_Norm(block.input_layernorm), _Norm(block.post_attention_layernorm)]
        self._query_norm = self._key_norm = None
        if hasattr(attention, QUERY_KEY_NORMS[0]):
            self._query_norm, self._key_norm = _Norm(attention.q_norm), _Norm(attention.k_norm)

    def run(self, arguments: dict[str, Any]) -> torch.Tensor:
        """Return the activations [1, n, hidden] that the block passes on, for the arguments that its model gives it."""
        hidden: torch.Tensor = next(iter(arguments.values()))
        # Integer products take and return float32: rounding in between would only cost time.
        rows = hidden[0].float() if self._integers else hidden[0]
        rows = rows + self._output(self._attend(self._norms[0](rows), hidden.dtype, arguments))
        both = self._gate_and_up(self._norms[1](rows))
        rows = rows + self._down(self._activate(both[:, : self._width]).mul_(both[:, self._width :]))
        return rows.to(hidden.dtype)[None]

    def _attend(self, rows: torch.Tensor, dtype: torch.dtype, arguments: dict[str, Any]) -> torch.Tensor:
        """Return the attention output [n, heads · dim] of normed rows."""
        heads = self._project(rows).view(len(rows), -1, self._head_dim)
        cos, sin = arguments["position_embeddings"]
        cos, signed_sin = rotation_tables(cos, sin, heads.dtype)
        turned = self._norm_heads(heads.narrow(1, 0, self._rotated))
        turned = torch.addcmul(turned * cos, turned.roll(self._head_dim // 2, -1), signed_sin).to(dtype).transpose(0, 1)
        value = heads[:, self._rotated :].to(dtype).transpose(0, 1)
        query, key = turned[: self._heads], turned[self._heads :]
        mask: TreeMask = arguments["attention_mask"]
        return attend_tree(self._attention, query, key, value, mask, self._scaling).reshape(len(rows), -1)

    def _norm_heads(self, heads: torch.Tensor) -> torch.Tensor:
        if self._query_norm is None or self._key_norm is None:
            return heads
        query, key = heads[:, : self._heads], heads[:, self._heads :]
        return torch.cat([self._query_norm(query), self._key_norm(key)], 1)


class _Norm:
    def __init__(self, norm: torch.nn.Module) -> None:
        self._eps = _eps_of(norm)
        self._norm: Any = norm

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        weight = self._norm.weight
        return torch.nn.functional.rms_norm(rows, weight.shape, weight.to(rows.dtype), self._eps)


_last_tables: list[tuple[Any, Any, torch.dtype, torch.Tensor, torch.Tensor]] = []


def rotation_tables(cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines [n, 1, dim] by which rolled halves are turned; blocks of one forward share them."""
    last = _last_tables[0] if _last_tables else (None, None, dtype, cos, sin)
    if last[0] is cos and last[1] is sin and last[2] == dtype:
        return last[3:]
    signed = sin[0, :, None].to(dtype, copy=True)
    signed[..., : signed.shape[-1] // 2].neg_()
    made = cos[0, :, None].to(dtype), signed
    _last_tables[:] = [(cos, sin, dtype, *made)]
    return made


def join_products(linears: Sequence[Any]) -> Product:
    """Return one product for linear layers that take the same rows."""
    bias = _joined_bias(linears)
    multiply = _join_weights(linears)
    return multiply if bias is None else lambda rows: multiply(rows) + bias


def _join_weights(linears: Sequence[Any]) -> Product:
    shared = [getattr(linear, "_product", None) for linear in linears]
    products = [part[0] if isinstance(part, tuple) else part for part in shared]
    if products[0] is not None and all(product is products[0] for product in products):
        product: Product = products[0].multiply_all
        return product
    if all(type(linear) is torch.nn.Linear for linear in linears):
        weight = _joined_weight(linears)
        return lambda rows: torch.nn.functional.linear(rows, weight)
    if len(linears) == 1:
        return _multiply_of(linears[0])
    parts = [_multiply_of(linear) for linear in linears]
    return lambda rows: torch.cat([part(rows) for part in parts], -1)


def _multiply_of(linear: Any) -> Product:
    if isinstance(linear, QuantizedLinear | PackedLinear):
        return linear.multiply
    if type(linear) is torch.nn.Linear:
        return lambda rows: torch.nn.functional.linear(rows, linear.weight)
    product: Product = linear  # a check's copy of a large layer, which adds its bias itself
    return product


def _joined_weight(linears: Sequence[torch.nn.Linear]) -> torch.Tensor:
    """Return one weight for all linear layers, whose own become views of it.  Their layout in memory stays."""
    if len(linears) == 1:
        return linears[0].weight
    if all(linear.weight.stride(0) == 1 for linear in linears):
        joined = torch.cat([linear.weight.data.t() for linear in linears], 1).t()
    else:
        joined = torch.cat([linear.weight.data for linear in linears])
    sizes = [len(linear.weight) for linear in linears]
    for linear, part in zip(linears, torch.split(joined, sizes), strict=True):
        linear.weight.data = part
    return joined


def _joined_bias(linears: Sequence[Any]) -> torch.Tensor | None:
    biases = [getattr(linear, "bias", None) for linear in linears]
    dtypes = [bias.dtype for bias in biases if bias is not None]
    if not dtypes:
        return None
    zeros = [torch.zeros(_outputs_of(linear), dtype=dtypes[0]) for linear in linears]
    return torch.cat([zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)])


def _outputs_of(linear: Any) -> int:
    original = linear.__dict__.get("_linear", linear)
    return int(original.shape[0] if isinstance(original, PackedLinear) else original.weight.shape[0])


def _integer_product(linear: Any) -> bool:
    product = getattr(linear, "_product", None)
    return isinstance(product, tuple) and isinstance(product[0], IntegerProduct)

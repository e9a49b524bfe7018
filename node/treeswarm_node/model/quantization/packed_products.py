"""Pack the weights of linear layers for a CPU's kernels, and make one product for layers that take the same rows.

Kernels of oneDNN read a weight in a layout of their own.  Torch converts a bfloat16 weight at every call, which took
twice as long as the product (SmolLM2, one row, 2026-11-30); here it is converted once.  A decoder layer multiplies the
same rows with several matrices, query, key and value, or gate and up.  They become one.
"""

import abc
from collections.abc import Iterable, Sequence
from typing import TypeGuard

import torch

from treeswarm_node.attention.latent import EXPANSION
from treeswarm_node.model.quantization.quantized_linear import PackedLinear, QuantizedLinear
from treeswarm_node.model.quantization.weight_kinds import has_packed_integer_products, join_digits, split_digits

# Names by which transformers' layers call the linear layers that take the same rows.
SHARED_ROWS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Number of rows for which oneDNN chooses the layout of bfloat16 weights; 1 and 64 rows were as fast with this one.
PACKED_FOR_ROWS = 16
# Number of a matrix's columns that are read at once.
UNIT_ROWS = 256

Packable = QuantizedLinear | torch.nn.Linear


class PackedProduct(abc.ABC):
    """Multiplies rows with several matrices at once, and hands each matrix's part to its layer."""

    def __init__(self, sizes: Sequence[int], inputs: int) -> None:
        self._sizes, self._inputs, self._outputs = list(sizes), inputs, sum(sizes)
        self._starts = [sum(sizes[:part]) for part in range(len(sizes))]
        self._rows: torch.Tensor | None = None
        self._products = self._nothing = torch.empty(0)
        self._missing: set[int] = set()

    @abc.abstractmethod
    def multiply_all(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the products [n, sum of outputs] of rows [n, in] with all matrices, in the rows' dtype."""

    @abc.abstractmethod
    def multiply_units(self, units: torch.Tensor) -> torch.Tensor:
        """Return the exact products [n, sum of outputs] of int8 rows [n, in] of zeros and a one with all matrices."""

    def multiply(self, rows: torch.Tensor, part: int) -> torch.Tensor:
        """Return the product [..., out] of rows [..., in] with the `part`-th matrix, in the rows' dtype.

        The other matrices' products with these rows are kept until they are asked for.
        """
        if self._rows is not rows or part not in self._missing:
            products = self.multiply_all(rows.reshape(-1, self._inputs)).view(*rows.shape[:-1], self._outputs)
            if len(self._sizes) == 1:
                return products
            self._rows, self._products, self._missing = rows, products, set(range(len(self._sizes)))
        product = self._products.narrow(-1, self._starts[part], self._sizes[part])
        self._missing.remove(part)
        if not self._missing:
            self._rows, self._products = None, self._nothing
        return product

    def dequantize(self, part: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the `part`-th matrix [out, in] in `dtype`; products with unit rows read the kernel's layout."""
        weight = torch.empty(self._sizes[part], self._inputs, dtype=dtype)
        for start in range(0, self._inputs, UNIT_ROWS):
            units = torch.zeros(min(UNIT_ROWS, self._inputs - start), self._inputs, dtype=torch.int8)
            units.diagonal(start).fill_(1)
            columns = self.multiply_units(units).narrow(-1, self._starts[part], self._sizes[part])
            weight[:, start : start + len(units)] = columns.t()
        return weight

    def __deepcopy__(self, memo: object) -> "PackedProduct":
        return self  # the matrices never change, and oneDNN's tensors cannot be copied


class IntegerProduct(PackedProduct):
    """Multiplies rows with matrices of kind int8, as integers.  Results are those of the kind to the last bit."""

    def __init__(self, layers: Sequence[QuantizedLinear]) -> None:
        super().__init__([layer.weight.shape[0] for layer in layers], layers[0].weight.shape[1])
        parts = [layer.weight.parts() for layer in layers]
        self._scales = torch.cat([part["scales"] for part in parts])
        self._zeros = torch.zeros(len(self._scales), dtype=torch.int64)
        self._packed = torch.ops.onednn.qlinear_prepack(torch.cat([part["integers"] for part in parts]), None)

    def multiply_all(self, rows: torch.Tensor) -> torch.Tensor:
        digits, steps = split_digits(rows)
        return join_digits(self._sum(digits), steps).to(rows.dtype)

    def multiply_units(self, units: torch.Tensor) -> torch.Tensor:
        return self._sum(units)

    def _sum(self, digits: torch.Tensor) -> torch.Tensor:
        """Return the products float32 [n, out] of int8 rows [n, in] with the matrices."""
        products: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            digits, 1.0, 0, self._packed, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return products


class Bfloat16Product(PackedProduct):
    """Multiplies rows with bfloat16 matrices."""

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        super().__init__([layer.out_features for layer in layers], layers[0].in_features)
        weight = torch.cat([layer.weight.data for layer in layers])
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)

    def multiply_all(self, rows: torch.Tensor) -> torch.Tensor:
        products: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, None, "none", [], "")
        return products

    def multiply_units(self, units: torch.Tensor) -> torch.Tensor:
        return self.multiply_all(units.bfloat16())


@torch.no_grad()
def pack_products(layers: Iterable[torch.nn.Module]) -> int:
    """Pack the linear layers of decoder layers on a CPU that has kernels for them; return how many products are left.

    Weights move, so those that are offloaded must not be packed.
    """
    packed = 0
    for layer in layers:
        for parent in list(layer.modules()):
            for names in _groups(parent):
                _pack_group(parent, names)
                packed += 1
    return packed


def _pack_group(parent: torch.nn.Module, names: Sequence[str]) -> None:
    linears = [getattr(parent, name) for name in names]
    if isinstance(linears[0], QuantizedLinear):
        integers = IntegerProduct(linears)
        for part, linear in enumerate(linears):
            linear.use_product(integers, part)
        return
    product = Bfloat16Product(linears)
    for part, (name, linear) in enumerate(zip(names, linears, strict=True)):
        setattr(parent, name, PackedLinear(product, part, linear.weight.shape, linear.bias))


def _groups(parent: torch.nn.Module) -> list[Sequence[str]]:
    """Return the names of a module's children that can be packed, in groups that take the same rows.

    The expansion of latents is left as it is: attention multiplies with it from both sides.
    """
    children = {
        name: child for name, child in parent.named_children() if name != EXPANSION and _can_be_packed(child)
    }  # fmt: skip
    groups: list[Sequence[str]] = []
    for names in SHARED_ROWS:
        shared = [children[name] for name in names if name in children]
        inputs = {(type(linear), linear.weight.shape[1]) for linear in shared}
        if len(shared) == len(names) and len(inputs) == 1:
            groups.append(names)
            children = {name: child for name, child in children.items() if name not in names}
    return [*groups, *((name,) for name in children)]


def _can_be_packed(module: torch.nn.Module) -> TypeGuard[Packable]:
    if isinstance(module, QuantizedLinear):
        integers = module.weight.parts().get("integers")
        return integers is not None and integers.device.type == "cpu" and has_packed_integer_products()
    if type(module) is not torch.nn.Linear or module.weight.device.type != "cpu":
        return False
    return module.weight.dtype == torch.bfloat16 and _has_bfloat16_products()


def _has_bfloat16_products() -> bool:
    """Return whether oneDNN has bfloat16 kernels for this CPU, and torch the functions to pack for them."""
    ops = torch.ops.mkldnn
    return hasattr(ops, "_reorder_linear_weight") and bool(ops._is_mkldnn_bf16_supported())

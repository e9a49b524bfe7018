"""Prepare the integer products of a layer on a CPU: packed for oneDNN, and one product for layers that share rows.

A decoder layer multiplies the same rows with several matrices: query, key and value, or gate and up.  Rounding the
rows takes longer than a small product, so those matrices become one.
"""

from collections.abc import Iterable, Sequence
from typing import TypeGuard

import torch

from treeswarm_node.model.quantization.quantized_linear import QuantizedLinear
from treeswarm_node.model.quantization.weight_kinds import has_integer_products, join_digits, split_digits

# Names by which transformers' layers call the linear layers that take the same rows.
SHARED_ROWS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class IntegerProduct:
    """Multiplies rows with several 8-bit matrices at once, and hands each matrix's part to its layer."""

    def __init__(self, layers: Sequence[QuantizedLinear]) -> None:
        parts = [layer.weight.parts() for layer in layers]
        self._scales = torch.cat([part["scales"] for part in parts])
        self._sizes = [layer.weight.shape[0] for layer in layers]
        self._inputs = layers[0].weight.shape[1]
        self._zeros = torch.zeros(len(self._scales), dtype=torch.int64)
        self._packed = torch.ops.onednn.qlinear_prepack(torch.cat([part["integers"] for part in parts]), None)
        self._rows: torch.Tensor | None = None
        self._products: dict[int, torch.Tensor] = {}

    def multiply(self, rows: torch.Tensor, part: int) -> torch.Tensor:
        """Return the product [..., out] of rows [..., in] with the `part`-th matrix, in the rows' dtype.

        The other matrices' products with these rows are kept until they are asked for.
        """
        if self._rows is not rows or part not in self._products:
            self._rows, self._products = rows, dict(enumerate(self._multiply(rows)))
        product = self._products.pop(part)
        if not self._products:
            self._rows = None
        return product

    def _multiply(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        digits, steps = split_digits(rows.reshape(-1, self._inputs))
        products = join_digits(self._sum(digits), steps).to(rows.dtype)
        return torch.split(products.view(*rows.shape[:-1], -1), self._sizes, -1)

    def _sum(self, digits: torch.Tensor) -> torch.Tensor:
        """Return the products float32 [n, out] of int8 rows [n, in] with the matrices."""
        products: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            digits, 1.0, 0, self._packed, self._scales, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return products

    def dequantize(self, part: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the `part`-th matrix [out, in]; products with unit rows read oneDNN's own layout."""
        matrices = torch.split(self._sum(torch.eye(self._inputs, dtype=torch.int8)), self._sizes, -1)
        return matrices[part].t().contiguous().to(dtype)

    def __deepcopy__(self, memo: object) -> "IntegerProduct":
        return self  # the matrices never change, and oneDNN's tensors cannot be copied


@torch.no_grad()
def pack_integer_products(layers: Iterable[torch.nn.Module]) -> int:
    """Pack the 8-bit linear layers of decoder layers on a CPU, and return how many products are left.

    Weights move, so those that are offloaded must not be packed.  Results stay the same to the last bit.
    """
    packed = 0
    for layer in layers:
        for parent in layer.modules():
            for group in _groups(parent):
                product = IntegerProduct(group)
                packed += 1
                for part, linear in enumerate(group):
                    linear.use_product(product, part)
    return packed


def _groups(parent: torch.nn.Module) -> list[list[QuantizedLinear]]:
    """Return the children of a module that can be packed, in groups that take the same rows."""
    children = {name: child for name, child in parent.named_children() if _can_be_packed(child)}
    groups = []
    for names in SHARED_ROWS:
        shared = [children[name] for name in names if name in children]
        if len(shared) == len(names) and len({linear.weight.shape[1] for linear in shared}) == 1:
            groups.append(shared)
            children = {name: child for name, child in children.items() if name not in names}
    return [*groups, *([child] for child in children.values())]


def _can_be_packed(module: torch.nn.Module) -> TypeGuard[QuantizedLinear]:
    if not isinstance(module, QuantizedLinear) or module.weight.kind != "int8" or not has_integer_products():
        return False
    integers = module.weight.parts().get("integers")
    return integers is not None and integers.device.type == "cpu" and integers.numel() > 0

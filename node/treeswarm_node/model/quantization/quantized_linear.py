"""Replace the matrices of a decoder layer by quantized ones: its linear layers and its fused experts."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeGuard

import torch

from treeswarm.errors import UnsupportedModel
from treeswarm_node.attention.latent import EXPANSION
from treeswarm_node.model.quantization.weight_kinds import KINDS, Parts, WeightKind

# Smallest share of a layer's weights that must be quantized; below it, quantization would save little.
MIN_SHARE = 0.5


class QuantizedWeight(torch.nn.Module):
    """Holds a matrix, or one per expert, packed in a kind; the parts are its buffers."""

    def __init__(self, packing: WeightKind, shape: torch.Size, parts: Parts) -> None:
        super().__init__()
        self.packing, self.kind, self.shape = packing, packing.name, shape
        for name, tensor in parts.items():
            self.register_buffer(name, tensor, persistent=False)

    def parts(self) -> dict[str, torch.Tensor]:
        return dict(self.named_buffers())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedWeight":
        """Move the parts as `fn` does, and keep their dtypes: `layer.float()` must not change a kernel's arguments."""
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self


class SharedProduct(Protocol):
    """Multiplies rows with the matrices of several layers at once."""

    def multiply(self, rows: torch.Tensor, part: int) -> torch.Tensor:
        """Return the product [..., out] of rows [..., in] with the `part`-th matrix."""
        ...

    def dequantize(self, part: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the `part`-th matrix [out, in] in `dtype`."""
        ...


class QuantizedLinear(torch.nn.Module):
    """Computes a linear layer from rows [..., in] to [..., out] in their dtype."""

    def __init__(self, weight: QuantizedWeight, bias: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self._product: tuple[SharedProduct, int] | None = None

    def use_product(self, product: "SharedProduct", part: int) -> None:
        """Multiply with the `part`-th matrix of `product` from now on, and free the weight's own parts."""
        self._product = product, part
        for name in self.weight.parts():
            setattr(self.weight, name, None)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [out, in] in `dtype`."""
        if self._product is not None:
            return self._product[0].dequantize(self._product[1], dtype)
        return self.weight.packing.dequantize(self.weight.parts(), self.weight.shape, dtype)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the product [..., out] of rows [..., in] with the weight."""
        if self._product is not None:
            return self._product[0].multiply(rows, self._product[1])
        return self.weight.packing.multiply(rows, self.weight.parts(), self.weight.shape)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        product = self.multiply(rows)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class PackedLinear(torch.nn.Module):
    """Computes a linear layer whose weight is packed in a shared product."""

    def __init__(self, product: SharedProduct, part: int, shape: torch.Size, bias: torch.nn.Parameter | None) -> None:
        super().__init__()
        self._product, self._part, self.shape, self.bias = product, part, shape, bias

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [out, in] in `dtype`."""
        return self._product.dequantize(self._part, dtype)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the product [..., out] of rows [..., in] with the weight."""
        return self._product.multiply(rows, self._part)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        product = self.multiply(rows)
        return product if self.bias is None else product + self.bias


class QuantizedExperts(QuantizedWeight):
    """Holds the matrices of a layer's experts in place of a parameter [experts, …].

    Layers index it by expert, as they index the parameter, so only experts that are hit are computed.
    """

    def __init__(
        self, packing: WeightKind, shape: torch.Size, parts: Parts, dtype: torch.dtype, *, transposed: bool
    ) -> None:
        """`shape` is one matrix's [out, in], `parts` have a first dimension of experts, `dtype` is the parameter's.

        If the parameter is `transposed`, it has the matrices as [in, out].
        """
        super().__init__(packing, shape, parts)
        self.transposed, self.dtype = transposed, dtype

    @classmethod
    def pack(cls, parameter: torch.Tensor, packing: WeightKind, *, transposed: bool) -> "QuantizedExperts":
        """Pack the matrices of a parameter one by one."""
        matrices = [packing.pack(weight.t() if transposed else weight) for weight in parameter]
        stacked = {name: torch.stack([parts[name] for parts in matrices]) for name in matrices[0]}
        shape = parameter[0].t().shape if transposed else parameter[0].shape
        return cls(packing, shape, stacked, parameter.dtype, transposed=transposed)

    def __getitem__(self, expert: Any) -> "ExpertWeight":
        return ExpertWeight(self, {name: tensor[int(expert)] for name, tensor in self.parts().items()})

    def __len__(self) -> int:
        return len(next(iter(self.parts().values())))

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return what the parameter would be: [experts, out, in], or [experts, in, out] if it is transposed."""
        return torch.stack([self[expert].as_parameter(dtype) for expert in range(len(self))])


class ExpertWeight:
    """Stands for one expert's matrix in the products that torch computes."""

    def __init__(self, experts: QuantizedExperts, parts: Parts) -> None:
        self._experts, self.parts = experts, parts

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix [out, in] in `dtype`."""
        return self._experts.packing.dequantize(self.parts, self._experts.shape, dtype)

    def as_parameter(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix as the layer's parameter would hold it."""
        weight = self.dequantize(dtype)
        return weight.t() if self._experts.transposed else weight

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the product [..., out] of rows [..., in] with the matrix."""
        return self._experts.packing.multiply(rows, self.parts, self._experts.shape)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute a function of torch that has an expert's matrix among its arguments."""
        kwargs = kwargs or {}
        if len(args) == 2 and not kwargs and isinstance(args[1], cls) and isinstance(args[0], torch.Tensor):
            rows, weight = args
            transposed = weight._experts.transposed
            if function is torch.nn.functional.linear and not transposed:
                return weight.multiply(rows)
            if function in MATRIX_PRODUCTS and transposed:
                return weight.multiply(rows)
        dtype = next((arg.dtype for arg in args if isinstance(arg, torch.Tensor)), None)
        plain = [arg.as_parameter(dtype or arg._experts.dtype) if isinstance(arg, cls) else arg for arg in args]
        return function(*plain, **kwargs)


MATRIX_PRODUCTS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__)


@torch.no_grad()
def quantize(layer: torch.nn.Module, kind: str) -> None:
    """Replace a decoder layer's linear layers and fused experts with quantized ones.

    Matrices of a shape that the kind cannot pack keep their weights, and so does the expansion of latents, which
    attention multiplies with from both sides.  Raises UnsupportedModel if less than `MIN_SHARE`
    of the layer's weights can be quantized.
    """
    check_quantizable(layer, kind)
    packing = KINDS[kind]
    for parent in list(layer.modules()):
        for name, child in list(parent.named_children()):
            if _is_quantizable(child, name, kind):
                weight = child.weight.data
                packed = QuantizedWeight(packing, weight.shape, packing.pack(weight))
                setattr(parent, name, QuantizedLinear(packed, child.bias))
        for name, parameter in _expert_weights(parent, kind):
            delattr(parent, name)
            setattr(parent, name, QuantizedExperts.pack(parameter.data, packing, transposed=bool(parent.is_transposed)))
            compute_expert_by_expert(parent)


def compute_expert_by_expert(experts: torch.nn.Module) -> None:
    """Let a module of fused experts index its parameters by expert, and multiply with those that are hit."""
    config: Any = experts.config
    config._experts_implementation = "eager"


def check_quantizable(layer: torch.nn.Module, kind: str) -> None:
    """Raise UnsupportedModel if less than `MIN_SHARE` of a decoder layer's weights can be quantized.

    The layer's weights may be on meta.
    """
    total = sum(parameter.numel() for parameter in layer.parameters())
    weights: list[torch.Tensor] = []
    for parent in layer.modules():
        weights += [child.weight for name, child in parent.named_children() if _is_quantizable(child, name, kind)]
        weights += [parameter for _, parameter in _expert_weights(parent, kind)]
    share = sum(weight.numel() for weight in weights) / max(1, total)
    if share < MIN_SHARE:
        raise UnsupportedModel(
            f"only {share:.0%} of a decoder layer's weights can be quantized to {kind}: give another --quantization, "
            "or none"
        )


def _is_quantizable(module: torch.nn.Module, name: str, kind: str) -> TypeGuard[torch.nn.Linear]:
    return name != EXPANSION and type(module) is torch.nn.Linear and KINDS[kind].fits(module.weight.shape)


def _expert_weights(module: torch.nn.Module, kind: str) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the stacked matrices of a module whose experts transformers can compute in several ways."""
    if hasattr(module, "is_transposed"):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 3:
                shape = parameter.shape[:0:-1] if module.is_transposed else parameter.shape[1:]
                if KINDS[kind].fits(shape):
                    yield name, parameter


def dequantized_copy(layer: torch.nn.Module) -> torch.nn.Module:
    """Return a float32 copy whose matrices are plain ones with the same dequantized weights."""
    dequantized = copy.deepcopy(layer).float()
    for parent in list(dequantized.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear | PackedLinear):
                weight = child.dequantize(torch.float32)
                plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
                plain.weight.data = weight
                if child.bias is not None:
                    plain.bias = torch.nn.Parameter(child.bias.float())
                setattr(parent, name, plain.requires_grad_(False))
            elif isinstance(child, QuantizedExperts):
                delattr(parent, name)
                parameter = torch.nn.Parameter(child.dequantize(torch.float32), requires_grad=False)
                parent.register_parameter(name, parameter)
    return dequantized

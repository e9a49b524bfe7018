"""Replace the matrices of a decoder layer by quantized ones: its linear layers and its fused experts."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeGuard

import torch

from treeswarm.errors import UnsupportedModel
from treeswarm_node.attention.latent import EXPANSION
from treeswarm_node.model.quantization.weight_kinds import KINDS, HeldMatrix, Parts

# Smallest share of a layer's weights that must be quantized; below it, quantization would save little.
MIN_SHARE = 0.5


class QuantizedWeight(torch.nn.Module):
    """Holds a matrix, or one per expert, packed in a kind; the parts are its buffers."""

    def __init__(self, packing: HeldMatrix, shape: torch.Size, parts: Parts) -> None:
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
        self, packing: HeldMatrix, shape: torch.Size, parts: Parts, dtype: torch.dtype, *, transposed: bool
    ) -> None:
        """`shape` is one matrix's [out, in], `parts` have a first dimension of experts, `dtype` is the parameter's.

        If the parameter is `transposed`, it has the matrices as [in, out].
        """
        super().__init__(packing, shape, parts)
        self.transposed, self.dtype = transposed, dtype

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


class ExpertPacker:
    """Packs the matrices of a fused parameter [experts, …], some experts at a time."""

    def __init__(self, parameter: torch.Tensor, kind: str, *, transposed: bool) -> None:
        """`parameter` may be on meta: its matrices are given to `put`."""
        self._packing, self._count, self._dtype = KINDS[kind], len(parameter), parameter.dtype
        self._transposed = transposed
        self._shape = torch.Size(parameter.shape[:0:-1] if transposed else parameter.shape[1:])
        self._parts: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def put(self, start: int, matrices: torch.Tensor) -> None:
        """Pack the matrices of the experts from `start` on."""
        for expert, weight in enumerate(matrices, start):
            for name, part in self._packing.pack(weight.t() if self._transposed else weight).items():
                if name not in self._parts:
                    self._parts[name] = part.new_empty(self._count, *part.shape)
                self._parts[name][expert] = part

    def replace(self, module: torch.nn.Module, name: str) -> None:
        """Replace a module's parameter by the packed matrices."""
        delattr(module, name)
        packed = QuantizedExperts(self._packing, self._shape, self._parts, self._dtype, transposed=self._transposed)
        setattr(module, name, packed)
        compute_expert_by_expert(module)


MATRIX_PRODUCTS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__)


def quantized_weight(weight: torch.Tensor, kind: str) -> QuantizedWeight:
    """Return a matrix [out, in], packed in a kind."""
    return QuantizedWeight(KINDS[kind], weight.shape, KINDS[kind].pack(weight))


@torch.no_grad()
def quantize(layer: torch.nn.Module, kind: str) -> None:
    """Replace a decoder layer's linear layers and fused experts with quantized ones.

    Matrices of a shape that the kind cannot pack keep their weights, and so does the expansion of latents, which
    attention multiplies with from both sides.  Raises UnsupportedModel if less than `MIN_SHARE`
    of the layer's weights can be quantized.
    """
    check_quantizable(layer, kind)
    for path, _ in list(layer.named_modules()):
        owner, _, name = path.rpartition(".")
        if path:
            quantize_loaded(layer.get_submodule(owner), name, kind)
    _quantize_experts(layer, kind)


@torch.no_grad()
def quantize_loaded(parent: torch.nn.Module, name: str, kind: str) -> None:
    """Replace a module's child by a quantized one if it is a linear layer, or the child's fused experts if it has some.

    Weights that are not loaded, and those that the kind cannot pack, stay as they are.
    """
    child = parent.get_submodule(name)
    if _is_quantizable(child, name, kind) and not child.weight.is_meta:
        setattr(parent, name, QuantizedLinear(quantized_weight(child.weight.data, kind), child.bias))
    else:
        _quantize_experts(child, kind)


def _quantize_experts(module: torch.nn.Module, kind: str) -> None:
    for name, parameter in expert_weights(module, kind):
        if not parameter.is_meta:
            packer = ExpertPacker(parameter, kind, transposed=bool(module.is_transposed))
            packer.put(0, parameter.data)
            packer.replace(module, name)


def compute_expert_by_expert(experts: torch.nn.Module) -> None:
    """Let a module of fused experts index its parameters by expert, and multiply with those that are hit."""
    config: Any = experts.config
    config._experts_implementation = "eager"


def check_quantizable(layer: torch.nn.Module, kind: str) -> None:
    """Raise UnsupportedModel if less than `MIN_SHARE` of a decoder layer's weights can be quantized.

    The layer's weights may be on meta.
    """
    total = sum(parameter.numel() for parameter in layer.parameters())
    quantized = sum(count * shape.numel() for count, shape in quantizable_matrices(layer, kind))
    share = quantized / max(1, total)
    if share < MIN_SHARE:
        raise UnsupportedModel(
            f"only {share:.0%} of a decoder layer's weights can be quantized to {kind}: give another --quantization, "
            "or none"
        )


def quantizable_matrices(layer: torch.nn.Module, kind: str) -> list[tuple[int, torch.Size]]:
    """Return the matrices of a layer that a kind packs, each as [out, in] and with how many of them are one tensor."""
    matrices: list[tuple[int, torch.Size]] = []
    for parent in layer.modules():
        linears = [child for name, child in parent.named_children() if _is_quantizable(child, name, kind)]
        matrices += [(1, linear.weight.shape) for linear in linears]
        matrices += [(len(experts), _matrix_shape(parent, experts)) for _, experts in expert_weights(parent, kind)]
    return matrices


def _is_quantizable(module: torch.nn.Module, name: str, kind: str) -> TypeGuard[torch.nn.Linear]:
    return name != EXPANSION and type(module) is torch.nn.Linear and KINDS[kind].fits(module.weight.shape)


def expert_weights(module: torch.nn.Module, kind: str) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the stacked matrices of a module whose experts transformers can compute in several ways."""
    if hasattr(module, "is_transposed"):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 3 and KINDS[kind].fits(_matrix_shape(module, parameter)):
                yield name, parameter


def _matrix_shape(module: torch.nn.Module, experts: torch.Tensor) -> torch.Size:
    """Return the shape [out, in] of the matrices of a fused parameter."""
    return torch.Size(experts.shape[:0:-1] if module.is_transposed else experts.shape[1:])


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

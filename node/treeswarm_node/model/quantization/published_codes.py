"""Hold matrices in the bits in which they were published: expanded where they are used, or multiplied by a kernel."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from treeswarm_node.model.checkpoint.dequantize import formulas
from treeswarm_node.model.checkpoint.dequantize.formulas import Codes
from treeswarm_node.model.quantization.weight_kinds import KINDS, HeldMatrix, Int4, Parts


@dataclass(frozen=True)
class ExpandedAtUse:
    """Expands a matrix in every product, to the numbers that loading would expand it to."""

    expand: "partial[torch.Tensor]"
    """Computes the matrix from its parts and a dtype."""
    dtype: torch.dtype
    """Dtype to which loading would expand it."""

    name = "published"

    def dequantize(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        matrix: torch.Tensor = self.expand(parts, self.dtype)
        return matrix.to(dtype)

    def multiply(self, rows: torch.Tensor, parts: Parts, shape: torch.Size) -> torch.Tensor:
        return torch.nn.functional.linear(rows, self.dequantize(parts, shape, rows.dtype))

    def __eq__(self, other: object) -> bool:
        """Return whether another matrix is expanded in the same way."""
        if not isinstance(other, ExpandedAtUse) or self.dtype != other.dtype:
            return False
        return (self.expand.func, self.expand.keywords) == (other.expand.func, other.expand.keywords)

    def __hash__(self) -> int:
        return hash((self.expand.func, self.dtype))


class Stacked:
    """Holds several matrices, one above the other, as fused gate and up projections are.

    The parts of the n-th are named `role_n`.
    """

    def __init__(self, pieces: Sequence[tuple[HeldMatrix, torch.Size]]) -> None:
        self._pieces = tuple(pieces)
        self.name = pieces[0][0].name

    def __repr__(self) -> str:
        return f"Stacked({self._pieces!r})"

    def dequantize(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([piece.dequantize(parts, shape, dtype) for piece, shape, parts in self._each(parts)])

    def multiply(self, rows: torch.Tensor, parts: Parts, shape: torch.Size) -> torch.Tensor:
        return torch.cat([piece.multiply(rows, parts, shape) for piece, shape, parts in self._each(parts)], -1)

    def _each(self, parts: Parts) -> list[tuple[HeldMatrix, torch.Size, Parts]]:
        return [(piece, shape, _named(parts, index)) for index, (piece, shape) in enumerate(self._pieces)]


def _named(parts: Parts, piece: int) -> Parts:
    end = f"_{piece}"
    return {name.removesuffix(end): tensor for name, tensor in parts.items() if name.endswith(end)}


def hold(codes: Codes, dtype: torch.dtype, *, by_kernel: bool) -> tuple[HeldMatrix, Parts]:
    """Return how a matrix is held, and its parts: for a kernel, or to be expanded to `dtype` where it is used."""
    packed = _for_kernel(codes) if by_kernel else None
    return packed or (ExpandedAtUse(codes.expand, dtype), codes.parts)


def _for_kernel(codes: Codes) -> tuple[HeldMatrix, Parts] | None:
    """Return the codes as a kernel reads them, or None if there is none for them."""
    if codes.expand.func is formulas.block_scaled:
        return _as_int8(codes.parts, codes.expand.keywords["block"])
    if codes.expand.func is formulas.grouped_integers and codes.expand.keywords["bits"] == 4:
        return _as_int4(codes.parts, codes.expand.keywords["inputs"])
    return None


def _as_int8(parts: Parts, block: tuple[int, int]) -> tuple[HeldMatrix, Parts] | None:
    """Return int8 codes with a scale per row, or None if `block` is not a row of a matrix."""
    integers, scale, kind = parts["weight"], parts["scale"], KINDS["int8"]
    if integers.dtype != torch.int8 or "zero_point" in parts or scale.numel() != len(integers):
        return None
    if integers.ndim != 2 or block != (1, integers.shape[1]):
        return None
    return (kind, {"integers": integers, "scales": scale.flatten().float()}) if kind.fits(integers.shape) else None


def _as_int4(parts: Parts, inputs: int) -> tuple[HeldMatrix, Parts] | None:
    """Return 4-bit codes with a scale and a zero per group of neighbours.

    The kernel takes the scale, and the offset `(8 - zero) * scale`, in bfloat16.
    """
    codes, scale = parts["codes"], parts["scale"].float()
    shape = torch.Size((len(codes), inputs))
    if codes.device.type != "cpu" or "group_of" in parts or inputs % scale.shape[1]:
        return None
    kind = Int4(inputs // scale.shape[1])
    if kind.explain_unsupported(codes.device) is not None or not kind.fits(shape):
        return None
    integers = torch.stack([codes & 15, codes >> 4], -1).flatten(1)[:, :inputs]
    zeros = parts["zero"].float() if "zero" in parts else torch.full_like(scale, 8)
    return kind, kind.pack_integers(integers, torch.stack([scale, (8 - zeros) * scale], -1).bfloat16())

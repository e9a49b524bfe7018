"""Pack matrices in 8 or 4 bits, and multiply rows with them: one kind for every way to store a weight.

A kind's parts are plain tensors, so that they can be stacked over experts, moved between devices and offloaded.  No
product depends on the rows beside a row more than it would with plain weights.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from treeswarm.errors import BadRequest
from treeswarm.extras import install_command, missing_modules

Parts = Mapping[str, torch.Tensor]
"""The tensors that a kind stores for one matrix, by name."""
# Rows are rounded to this many steps on either side of zero for integer products: two digits of 7 bits and a sign.
# Rounding costs 3e-5 of a row's largest value.  In one digit of 8 bits SmolLM2 chose another token than with plain rows
# in 12 % of positions, in two digits in 4 %, which is what the weights alone cost (1,024 tokens, 2026-11-30).
DIGIT = 128
ROW_STEPS = 127 * DIGIT
# Largest number of inputs for which the sum of products of two 8-bit numbers stays below 2^31.
MAX_INPUTS = (1 << 31) // (127 * 128)
# Sizes of groups that torch's kernel for 4 bits takes.
INT4_GROUPS = (32, 64, 128, 256)


# Number of weights that are packed at once, so that packing needs little memory beside the weight.
CHUNK = 1 << 22


class HeldMatrix(Protocol):
    """Multiplies with a matrix [out, in] that is held in few bits."""

    name: str
    """Name of the kind."""

    def dequantize(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix [out, in] in `dtype`."""
        ...

    def multiply(self, rows: torch.Tensor, parts: Parts, shape: torch.Size) -> torch.Tensor:
        """Return the product [..., out] of rows [..., in] with the matrix, in the rows' dtype."""
        ...


class WeightKind(HeldMatrix, Protocol):
    """Packs a matrix [out, in] in few bits; `name` is what `--quantization` takes."""

    bits: int
    """Number of bits per weight, without scales."""

    def explain_unsupported(self, device: torch.device) -> str | None:
        """Return why this kind cannot be used on the device, as text for users, or None if it can."""
        ...

    def fits(self, shape: torch.Size) -> bool:
        """Return whether matrices of this shape can be packed."""
        ...

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the parts of a matrix [out, in]."""
        ...

    def count_bytes(self, outputs: int, inputs: int) -> int:
        """Return the number of bytes of a matrix's parts."""
        ...


def _row_chunks(weight: torch.Tensor) -> list[slice]:
    """Return slices of a matrix's rows that are packed one after another, in float32: of 64 rows, or multiples."""
    rows = max(1, CHUNK // (64 * weight.shape[1])) * 64
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]


class Int8:
    """Stores 8-bit integers with one scale per output.  CPUs with VNNI or AMX multiply them as integers, by oneDNN.

    A row is rounded to `ROW_STEPS` steps of its largest value and multiplied as two digits of 8 bits.  Sums of integers
    do not depend on their order, so a row's product is the same beside any other rows and on any processor.  Elsewhere
    the matrix is dequantized per call.
    """

    name = "int8"
    bits = 8

    def explain_unsupported(self, device: torch.device) -> str | None:
        return None

    def fits(self, shape: torch.Size) -> bool:
        return shape[1] <= MAX_INPUTS

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scales = weight.new_empty(len(weight), dtype=torch.float32)
        integers = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
        for rows in _row_chunks(weight):
            part = weight[rows].float()
            scales[rows] = part.abs().amax(1).div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
            integers[rows] = part.div(scales[rows, None]).round_()
        return {"integers": integers, "scales": scales}

    def dequantize(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return parts["integers"].float().mul_(parts["scales"][:, None]).to(dtype)

    def multiply(self, rows: torch.Tensor, parts: Parts, shape: torch.Size) -> torch.Tensor:
        if rows.device.type != "cpu" or not has_integer_products():
            return torch.nn.functional.linear(rows, self.dequantize(parts, shape, rows.dtype))
        flat = rows.reshape(-1, shape[1])
        digits, steps = split_digits(flat)
        sums = torch._int_mm(digits, parts["integers"].t()).float().mul_(parts["scales"])
        return join_digits(sums, steps).to(rows.dtype).view(*rows.shape[:-1], shape[0])

    def count_bytes(self, outputs: int, inputs: int) -> int:
        return outputs * inputs + outputs * 4


def split_digits(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows [n, in] as integers int8 [2 · n, in], high digits first, and the size of a step, float32 [n, 1].

    A row is `(128 · high + low) · step`.
    """
    # Two operations, because the norm that is the largest value took six times as long for 16 rows.
    rows = rows.float()
    steps = rows.abs().amax(-1, keepdim=True).mul_(1 / ROW_STEPS)
    # A row of zeros is divided by zero: whatever its digits are, they are worth zero steps.
    integers = torch.div(rows, steps).round_()
    high = torch.mul(integers, 1 / DIGIT).round_()
    return torch.cat([high, integers.sub_(high, alpha=DIGIT)]).to(torch.int8), steps


def join_digits(sums: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Return the products float32 [n, out] of rows whose digits have the products `sums`, float32 [2 · n, out]."""
    count = len(steps)
    return torch.add(sums[count:], sums[:count], alpha=DIGIT).mul_(steps)


@functools.cache
def has_integer_products() -> bool:
    """Return whether this CPU multiplies 8-bit integers exactly, and has instructions for it: VNNI or AMX.

    Without them oneDNN adds pairs of products in 16 bits, where large ones are cut off, or loops over single numbers.
    """
    rows, expected = _test_integers()
    try:
        products = torch._int_mm(rows, rows.t())
        capable = _has_integer_instructions()
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return capable and torch.equal(products.double(), expected)


@functools.cache
def has_packed_integer_products() -> bool:
    """Return whether this CPU multiplies 8-bit integers that oneDNN has packed: with AMX.

    Torch packs for unsigned rows.  Only AMX's kernel takes signed ones there as well; elsewhere, with VNNI too, oneDNN
    uses its reference kernel: 60 to 110 ms for two rows and a matrix of 1,536 x 576, where `torch._int_mm` takes
    0.05 ms (torch 2.13 with ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI, 2026-11-30).
    """
    rows, expected = _test_integers()
    try:
        if not (has_integer_products() and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()):
            return False
        packed = torch.ops.onednn.qlinear_prepack(rows, None)
        ones, zeros = torch.ones(len(rows)), torch.zeros(len(rows), dtype=torch.int64)
        linear = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(linear.double(), expected)


def _test_integers() -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of the largest numbers, int8 [3, in], and their products with each other, float64 [3, 3]."""
    inputs = 64
    rows = torch.tensor([[127] * inputs, [-128] * inputs, [127, -128] * (inputs // 2)], dtype=torch.int8)
    return rows, rows.double() @ rows.double().t()


def _has_integer_instructions() -> bool:
    """Return whether this CPU has VNNI, which every CPU with AMX has too."""
    if hasattr(torch.cpu, "get_capabilities"):  # older ones do not tell VNNI without AVX512
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_vnni") or found.get("avx_vnni"))
    return bool(torch.cpu._is_vnni_supported())


@dataclass(frozen=True)
class Int4:
    """Stores 4-bit integers with a scale and an offset per group; torch's CPU kernel multiplies rows in bfloat16.

    The kernel computes every row by itself: a row's product is the same beside any other rows.
    """

    group: int = 32
    """Number of neighbouring weights that share a scale."""

    name = "int4"
    bits = 4

    def explain_unsupported(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"its kernel is for CPUs, not for {device.type}"
        return None if _has_int4_kernel() else "this torch or this processor has no kernel for it"

    def fits(self, shape: torch.Size) -> bool:
        return shape[0] % 16 == 0 and shape[1] % self.group == 0 and self.group in INT4_GROUPS

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        integers = torch.empty_like(weight, dtype=torch.int32, memory_format=torch.contiguous_format)
        both = torch.empty(len(weight), weight.shape[1] // self.group, 2, dtype=torch.bfloat16, device=weight.device)
        for rows in _row_chunks(weight):
            grouped = weight[rows].float().view(-1, weight.shape[1] // self.group, self.group)
            least, most = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
            # The kernel computes `(integer - 8) · scale + offset`, with both in bfloat16.
            scales = ((most - least) / 15).clamp_min_(1e-30).bfloat16()
            offsets = (least + 8 * scales.float()).bfloat16()
            codes = ((grouped - offsets.float()) / scales.float() + 8).round_().clamp_(0, 15)
            integers[rows], both[rows] = codes.flatten(1), torch.cat([scales, offsets], -1)
        return self.pack_integers(integers, both)

    def pack_integers(self, integers: torch.Tensor, both: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the parts of a matrix of integers 0 to 15, with scales and offsets bfloat16 [out, groups, 2]."""
        packed = torch._convert_weight_to_int4pack_for_cpu(integers.to(torch.int32), 1)
        return {"packed": packed, "scales": both.transpose(0, 1).contiguous()}

    def dequantize(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        # The kernel's own layout depends on the processor: products with unit rows read it.
        units = torch.eye(shape[1], dtype=torch.bfloat16)
        return self.multiply(units, parts, shape).t().to(dtype)

    def multiply(self, rows: torch.Tensor, parts: Parts, shape: torch.Size) -> torch.Tensor:
        flat = rows.reshape(-1, shape[1]).bfloat16()
        product = torch._weight_int4pack_mm_for_cpu(flat, parts["packed"], self.group, parts["scales"])
        return product.to(rows.dtype).view(*rows.shape[:-1], shape[0])

    def count_bytes(self, outputs: int, inputs: int) -> int:
        return outputs * inputs // 2 + outputs * inputs // self.group * 4


@functools.cache
def _has_int4_kernel() -> bool:
    try:
        packed = torch._convert_weight_to_int4pack_for_cpu(torch.full((64, 32), 9, dtype=torch.int32), 1)
        both = torch.ones(1, 64, 2, dtype=torch.bfloat16)
        product = torch._weight_int4pack_mm_for_cpu(torch.ones(1, 32, dtype=torch.bfloat16), packed, 32, both)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool((product == 64).all())


class Nf4:
    """Stores 4-bit codes of bitsandbytes with a scale per 64 weights; the matrix is dequantized per call.

    The product is torch's own.  CPU and GPU dequantize to the same numbers.
    """

    name = "nf4"
    bits = 4
    block = 64

    def explain_unsupported(self, device: torch.device) -> str | None:
        if not missing_modules("quantization"):
            return None
        return f"it needs bitsandbytes: {install_command('node', 'quantization')}"

    def fits(self, shape: torch.Size) -> bool:
        return True

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        quantize = _bitsandbytes().quantize_4bit
        each = [
            quantize(weight[rows].contiguous().float(), blocksize=self.block, quant_type="nf4")
            for rows in _row_chunks(weight)
        ]
        packed = torch.cat([packed for packed, _ in each])
        return {"packed": packed, "scales": torch.cat([state.absmax for _, state in each]), "code": each[0][1].code}

    def dequantize(self, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        functional = _bitsandbytes()
        state = functional.QuantState(
            absmax=parts["scales"], shape=shape, code=parts["code"], blocksize=self.block, dtype=dtype, quant_type="nf4"
        )
        weight: torch.Tensor = functional.dequantize_4bit(parts["packed"], state)
        return weight.view(shape)

    def multiply(self, rows: torch.Tensor, parts: Parts, shape: torch.Size) -> torch.Tensor:
        return torch.nn.functional.linear(rows, self.dequantize(parts, shape, rows.dtype))

    def count_bytes(self, outputs: int, inputs: int) -> int:
        return outputs * inputs // 2 + outputs * inputs // self.block * 4


def _bitsandbytes() -> Any:
    import bitsandbytes.functional  # noqa: PLC0415  # optional, and 100 MB

    return bitsandbytes.functional


KINDS: Mapping[str, WeightKind] = {"int8": Int8(), "int4": Int4(), "nf4": Nf4()}
"""The kinds by the name that `--quantization` takes; each is a numerics class."""


def explain_unsupported(quantization: str, device: torch.device) -> str | None:
    """Return why a quantization cannot be used on the device, or None if it can.

    Published integers of 4 bits have the kernel of int4.
    """
    if quantization == "none":
        return None
    return KINDS["int4" if quantization == "published" else quantization].explain_unsupported(device)


def check_kind(quantization: str, device: torch.device) -> None:
    """Raise BadRequest if weights of this kind cannot be used on the device; `none` always can."""
    reason = explain_unsupported(quantization, device)
    if reason is not None:
        raise BadRequest(f"--quantization {quantization} cannot be used ({reason}): give another or none")

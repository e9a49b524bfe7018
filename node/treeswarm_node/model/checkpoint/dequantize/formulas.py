"""Compute a weight from the tensors that store it in fewer bits, by each format's published definition.

Each function that expands gets the tensors by their role and returns the weight [..., out, in] in `dtype`.  Rows are
computed in chunks, so that the temporary memory is far smaller than the weight.  A product is computed, and rounded, in
the dtype in which the format's own library computes it.  A format whose tensors are packed for one library's kernels is
first brought into a form that is read along rows.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from treeswarm.errors import UnsupportedModel

Parts = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Codes:
    """Holds a weight in the bits in which it was published."""

    parts: Parts
    """Tensors by their role."""
    expand: "partial[torch.Tensor]"
    """Computes the weight from the parts and a dtype."""


# Number of weights per chunk.  Of 2^14, 2^16, 2^17, 2^18 and 2^20 this took the least time per weight in most formats:
# 1.3 to 1.6 ns for FP8, 1.2 for FP4, 1.7 to 2.4 for int4 on one shared core (2026-11-30).
CHUNK = 1 << 18
# Values of the 16 codes of FP4 (E2M1: sign, two bits of exponent, one of mantissa).
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Position in an int32 of AWQ of the n-th of eight neighbouring columns.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
# bitsandbytes maps the largest value of a row of 8-bit weights to this.
LARGEST_INT8 = 127.0
MXFP4_SCALE_BIAS = 127
BITS_PER_WORD = 32


def _by_rows(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    step: int,
    rows: Callable[[int, int], torch.Tensor],
) -> torch.Tensor:
    """Return a matrix of this shape whose rows start:stop are `rows(start, stop)`; start is a multiple of `step`."""
    weight = torch.empty(shape, dtype=dtype, device=device)
    height = max(1, CHUNK // max(1, shape[1] * step)) * step
    for start in range(0, shape[0], height):
        stop = min(start + height, shape[0])
        weight[start:stop] = rows(start, stop)
    return weight


def _read_scale(scale: torch.Tensor) -> torch.Tensor:
    """Return a scale's numbers; scales that are one byte hold a power of two (E8M0)."""
    if scale.dtype in {torch.uint8, torch.float8_e8m0fnu}:
        return torch.exp2(scale.view(torch.uint8).float() - MXFP4_SCALE_BIAS)
    return scale


def _spread_bytes(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return the pair of float32 numbers in `table` [codes, 2] for each code: [..., n] becomes [..., 2 · n].

    Selecting pairs took 1 ns per weight, a sixth of torch's own conversion of FP8 and of selecting single numbers.
    """
    pairs = torch.index_select(table.view(torch.int64).flatten(), 0, codes.flatten().int())
    return pairs.view(torch.float32).view(*codes.shape[:-1], -1)


@functools.cache
def _fp8_pairs(dtype: torch.dtype) -> torch.Tensor:
    """Return the values float32 [65536, 2] of two neighbouring FP8 codes, read as a signed number plus 32768."""
    values = torch.arange(256).to(torch.uint8).view(dtype).float()
    return torch.stack([values.repeat(256), values.repeat_interleave(256)], -1).roll(32768, 0).contiguous()


@functools.cache
def _half_byte_pairs(device: torch.device) -> torch.Tensor:
    """Return the two numbers float32 [256, 2] in each byte, lower bits first."""
    return _pair_up(torch.arange(16.0, device=device))


def _pair_up(values: torch.Tensor) -> torch.Tensor:
    """Return the values float32 [256, 2] of the two 4-bit codes in each byte, lower bits first."""
    return torch.stack([values.repeat(16), values.repeat_interleave(16)], -1).contiguous()


def _read_codes(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return FP8 or int8 codes as numbers in `dtype`."""
    if codes.dtype == torch.int8 or codes.device.type != "cpu" or codes.shape[-1] % 2:
        return codes.to(dtype)
    return _spread_bytes(codes.view(torch.int16).int().add_(32768), _fp8_pairs(codes.dtype)).to(dtype)


def block_scaled(
    parts: Parts, dtype: torch.dtype, *, block: tuple[int, int], product: torch.dtype | None
) -> torch.Tensor:
    """Return codes [..., out, in] times the scale of their block of `block` rows and columns.

    The codes are FP8 or int8; int8 may have a `zero_point` of the scale's shape.  The last blocks of a matrix may be
    smaller.  The product is computed in `product`, or in the scale's dtype if that is None.
    """
    codes, scale = parts["weight"].contiguous(), _read_scale(parts["scale"])
    if codes.ndim > 2:  # fused experts
        per_expert = scale if scale.ndim > 1 else scale.expand(len(codes), 1)
        pairs = zip(codes, per_expert, strict=True)
        return torch.stack(
            [block_scaled({"weight": c, "scale": s}, dtype, block=block, product=product) for c, s in pairs]
        )
    grid = scale.to(product or scale.dtype).reshape(-(-codes.shape[0] // block[0]), -(-codes.shape[1] // block[1]))
    zero = parts["zero_point"].reshape(grid.shape) if "zero_point" in parts else None

    def spread(values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        if values.shape[0] > 1:
            values = values[start // block[0] : -(-stop // block[0])].repeat_interleave(block[0], 0)[: stop - start]
        return values.repeat_interleave(block[1], 1)[:, : codes.shape[1]] if values.shape[1] > 1 else values

    def rows(start: int, stop: int) -> torch.Tensor:
        values = _read_codes(codes[start:stop], grid.dtype)
        if zero is not None:
            values -= spread(zero, start, stop).to(grid.dtype)
        if (stop - start) % block[0] or codes.shape[1] % block[1]:
            return values.mul_(spread(grid, start, stop))
        tiles = values.view(-1, block[0], grid.shape[1], block[1])
        tiles.mul_(grid[start // block[0] : stop // block[0], None, :, None])
        return values

    step = block[0] if len(grid) > 1 else 1
    return _by_rows((codes.shape[0], codes.shape[1]), dtype, codes.device, step, rows)


def packed_fp4(
    parts: Parts, dtype: torch.dtype, *, divide: bool = False, rounded: torch.dtype | None = None
) -> torch.Tensor:
    """Return FP4 codes, two per byte with the lower bits first, times their group's scale.

    The `scale` [out, groups] is itself multiplied by `second`, one number per weight, or divided by it with `divide`.
    The product is rounded to `rounded` before it becomes `dtype`.
    """
    packed, scale = parts["weight"].view(torch.uint8), _read_scale(parts["scale"]).float()
    if packed.ndim > 2:  # fused experts
        each = [{role: tensor[i] for role, tensor in parts.items()} for i in range(len(packed))]
        return torch.stack([packed_fp4(part, dtype, divide=divide, rounded=rounded) for part in each])
    if "second" in parts:
        scale = scale / parts["second"].float() if divide else scale * parts["second"].float()
    table = _pair_up(torch.tensor(FP4, dtype=torch.float32, device=packed.device))

    def rows(start: int, stop: int) -> torch.Tensor:
        product = _spread_bytes(packed[start:stop], table)
        product.view(stop - start, scale.shape[1], -1).mul_(scale[start:stop, :, None])
        return product if rounded is None else product.to(rounded)

    return _by_rows((packed.shape[0], 2 * packed.shape[1]), dtype, packed.device, 1, rows)


def mxfp4(parts: Parts) -> Codes:
    """Read fused experts of gpt-oss.

    Blocks [experts, out, groups, 16] hold the codes, and scales [experts, out, groups] their powers of two.
    """
    return Codes({"weight": parts["blocks"].flatten(2), "scale": parts["scale"]}, partial(mxfp4_experts))


def mxfp4_experts(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Return fused experts [experts, in, out] whose codes are those of `packed_fp4`, [experts, out, in / 2]."""
    packed, scales = parts["weight"], parts["scale"]
    experts, outputs, size = packed.shape
    weight = torch.empty(experts, size * 2, outputs, dtype=dtype, device=packed.device)
    for expert in range(experts):
        weight[expert] = packed_fp4({"weight": packed[expert], "scale": scales[expert]}, dtype).t()
    return weight


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the unsigned numbers in int32 words [..., n], lowest bits first: [..., n * 32 / bits]."""
    shifts = torch.arange(0, BITS_PER_WORD, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def grouped_integers(parts: Parts, dtype: torch.dtype, *, inputs: int, bits: int) -> torch.Tensor:
    """Return (code - zero) * scale, rounded to the scale's dtype.

    Bytes [out, n] hold the codes of a row, one or, with 4 `bits`, two each with the lower bits first.  A group's
    `scale` [out, groups] and `zero` uint8 [out, groups] apply to neighbouring columns, or to those that `group_of` [in]
    names.  Without `zero`, it is the middle of the range.
    """
    codes, scale = parts["codes"], parts["scale"]
    group_of = parts.get("group_of")

    def rows(start: int, stop: int) -> torch.Tensor:
        packed = codes[start:stop]
        values = _spread_bytes(packed, _half_byte_pairs(packed.device)) if bits == 4 else packed.float()
        values = values[:, :inputs]
        scales = scale[start:stop].float()
        zeros = parts["zero"][start:stop].float() if "zero" in parts else torch.full_like(scales, 1 << (bits - 1))
        if group_of is None and inputs % scale.shape[1] == 0:
            grouped = values.view(stop - start, scale.shape[1], -1)
            grouped.sub_(zeros[:, :, None]).mul_(scales[:, :, None])
        else:
            values = (values - _spread_groups(zeros, inputs, group_of)) * _spread_groups(scales, inputs, group_of)
        return values.to(scale.dtype)

    return _by_rows((len(codes), inputs), dtype, codes.device, 1, rows)


def _spread_groups(numbers: torch.Tensor, columns: int, group_of: torch.Tensor | None) -> torch.Tensor:
    """Return the numbers [rows, groups] for each of the columns: [rows, columns]."""
    if group_of is not None:
        return numbers[:, group_of.long()]
    return numbers.repeat_interleave(-(-columns // numbers.shape[1]), 1)[:, :columns]


def _in_groups(
    codes: torch.Tensor, bits: int, scale: torch.Tensor, zero: torch.Tensor | None, group_of: torch.Tensor | None,
    inputs: int,
) -> Codes:  # fmt: skip
    """Return the parts of `grouped_integers`; groups of neighbours need no `group_of`."""
    parts = {"codes": codes, "scale": scale.contiguous()}
    if zero is not None:
        parts["zero"] = zero.to(torch.uint8).contiguous()
    if group_of is not None:
        neighbours = torch.arange(inputs, device=group_of.device) // -(-inputs // scale.shape[1])
        if not torch.equal(group_of.long(), neighbours):
            parts["group_of"] = group_of
    return Codes(parts, partial(grouped_integers, inputs=inputs, bits=bits))


def _row_bytes(words: torch.Tensor, bits: int) -> tuple[torch.Tensor, int]:
    """Return int32 words [out, n] of codes, lowest bits first, as bytes, and the number of bits of each code in them.

    Codes of 2 bits become bytes.
    """
    if bits == 2:
        return unpack_words(words, bits).to(torch.uint8), 8
    return words.contiguous().view(torch.uint8), bits


def packed_integers(parts: Parts, *, bits: int) -> Codes:
    """Read the weight of compressed-tensors' pack-quantized format: (code - zero) * scale, in the scale's dtype.

    Words [out, in * bits / 32] hold the codes.  A group's `scale` [out, groups] and its zero apply to neighbouring
    columns, or to those that `group_of` [in] names.  Without `zero_point`, zero is the middle of the range.  `shape`
    holds the two sizes of the weight.
    """
    outputs, inputs = int(parts["shape"][0]), int(parts["shape"][1])
    scale = parts["scale"].reshape(outputs, -1)
    zero = None
    if "zero_point" in parts:
        zero = unpack_words(parts["zero_point"].t().contiguous(), bits).t()[:outputs]
    elif bits == 2:
        zero = torch.full_like(scale, 2, dtype=torch.uint8)
    codes, width = _row_bytes(parts["weight"], bits)
    return _in_groups(codes, width, scale, zero, parts.get("group_of"), inputs)


def gptq(parts: Parts, *, bits: int, zero_offset: int) -> Codes:
    """Read the weight of GPTQ: scale * (code - zero), in the scale's dtype; zeros are stored less `zero_offset`.

    Words [in * bits / 32, out] hold the codes, `zero_point` [groups, out * bits / 32] the zeros and `scale`
    [groups, out] the scales.  `group_of` [in] names each input's group; without it groups are neighbours.
    """
    words, scale = parts["weight"], parts["scale"]
    inputs, outputs = words.shape[0] * BITS_PER_WORD // bits, words.shape[1]
    zero = unpack_words(parts["zero_point"], bits)[:, :outputs].add_(zero_offset).bitwise_and_((1 << bits) - 1)
    codes, width = _row_bytes(words.t(), bits)
    return _in_groups(codes, width, scale.t(), zero.t(), parts.get("group_of"), inputs)


def awq(parts: Parts) -> Codes:
    """Read the weight of AWQ's GEMM layout: (code - zero) * scale, in the scale's dtype.

    Words [in, out / 8] hold eight columns in `AWQ_ORDER`, `zero_point` [groups, out / 8] the zeros and `scale`
    [groups, out] the scales.
    """
    words, scale = parts["weight"], parts["scale"]
    codes = torch.empty(words.shape[1] * 8, -(-words.shape[0] // 2), dtype=torch.uint8, device=words.device)
    height = max(2, CHUNK // len(codes) // 2 * 2)
    for start in range(0, len(words), height):
        some = _unpack_awq(words[start : start + height]).to(torch.uint8)
        low, high = some[0::2], some[1::2]
        packed = low.clone()
        packed[: len(high)] |= high << 4
        codes[:, start // 2 : start // 2 + len(low)] = packed.t()
    zero = _unpack_awq(parts["zero_point"])
    return _in_groups(codes, 4, scale.t(), zero.t(), None, len(words))


def _unpack_awq(words: torch.Tensor) -> torch.Tensor:
    order = torch.tensor(AWQ_ORDER, device=words.device)
    return unpack_words(words, 4).reshape(*words.shape, len(AWQ_ORDER))[..., order].flatten(-2)


def bitsandbytes_8bit(parts: Parts) -> Codes:
    """Read int8 codes times the largest absolute value of their row, divided by 127."""
    codes, largest = parts["weight"], parts["scale"].float()
    if "layout" in parts and int(parts["layout"].max()) != 0:
        raise UnsupportedModel("bitsandbytes 8-bit weights that are not stored by rows: save the model again")
    scaled = {"weight": codes, "scale": largest / LARGEST_INT8}
    return Codes(scaled, partial(block_scaled, block=(1, codes.shape[1]), product=torch.float32))


def bitsandbytes_4bit(parts: Parts) -> Codes:
    """Read 4-bit codes, two per byte with the higher bits first, looked up in `code` and times their block's scale.

    The scales may be stored in 8 bits themselves (`nested`).  `state` is the library's JSON, which names sizes and the
    dtype to which the product is rounded.
    """
    state = dict(json.loads(bytes(parts["state"].tolist())))
    packed, size, scale = parts["weight"].flatten().view(torch.uint8), int(state["blocksize"]), parts["scale"]
    if "nested_scale" in parts:
        inner = int(state["nested_blocksize"])
        spread = parts["nested_scale"].repeat_interleave(inner)[: scale.numel()]
        scale = parts["nested_code"][scale.int()] * spread + float(state["nested_offset"])
    shape, rounded = tuple(state["shape"]), getattr(torch, str(state["dtype"]))
    held = {"codes": packed, "scale": scale.float(), "code": parts["code"].float()}
    return Codes(held, partial(table_coded, shape=shape, block=size, rounded=rounded))


def table_coded(
    parts: Parts, dtype: torch.dtype, *, shape: tuple[int, ...], block: int, rounded: torch.dtype
) -> torch.Tensor:
    """Return numbers in a table by 4-bit codes, two per byte with the higher bits first, times their block's scale.

    The product is rounded to `rounded` before it becomes `dtype`.
    """
    codes, scale = parts["codes"], parts["scale"]
    table = _pair_up(parts["code"]).flip(1).contiguous()
    weight = torch.empty(math.prod(shape), dtype=dtype, device=codes.device)
    step = CHUNK // block * block
    for start in range(0, weight.numel(), step):
        stop = min(start + step, weight.numel())
        values = _spread_bytes(codes[start // 2 : -(-stop // 2)], table)[: stop - start]
        scales = scale[start // block : -(-stop // block)]
        if (stop - start) % block:
            values *= scales.repeat_interleave(block)[: stop - start]
        else:
            values.view(-1, block).mul_(scales[:, None])
        weight[start:stop] = values.to(rounded)
    return weight.view(shape)

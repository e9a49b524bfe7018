"""Compute a weight from the tensors that store it in fewer bits, by each format's published definition.

Each function gets the tensors by their role and returns the weight [..., out, in] in `dtype`.  Rows are computed in
chunks, so that the temporary memory is far smaller than the weight.  A product is computed, and rounded, in the dtype
in which the format's own library computes it.
"""

import json
import math
from collections.abc import Callable, Mapping

import torch

from treeswarm.errors import UnsupportedModel

Parts = Mapping[str, torch.Tensor]
Unpack = Callable[[Parts, torch.dtype], torch.Tensor]

# Number of weights per chunk.  Of 2^16, 2^18, 2^20 and 2^22 this took the least time per weight in most formats: 7 ns
# for FP8, 6 for int4, 16 for GPTQ on one shared core (2026-11-30).  transformers expands in four threads at once.
CHUNK = 1 << 20
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
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """Return a matrix of this shape whose rows start:stop are `rows(start, stop)`; start is a multiple of `step`.

    With `transposed` its columns lie together in memory.
    """
    weight = torch.empty(shape[::-1] if transposed else shape, dtype=dtype, device=device)
    weight = weight.t() if transposed else weight
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
        values = codes[start:stop].to(grid.dtype)
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
    table = torch.tensor(FP4, dtype=torch.float32, device=packed.device)
    group = 2 * packed.shape[1] // scale.shape[1]

    def rows(start: int, stop: int) -> torch.Tensor:
        bytes_ = packed[start:stop]
        values = table[torch.stack([bytes_ & 15, bytes_ >> 4], dim=-1).int()].flatten(1)
        product = values * scale[start:stop].repeat_interleave(group, 1)
        return product if rounded is None else product.to(rounded)

    return _by_rows((packed.shape[0], 2 * packed.shape[1]), dtype, packed.device, 1, rows)


def mxfp4_experts(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Return fused experts [experts, in, out].

    Blocks [experts, out, groups, 16] hold the codes, and scales [experts, out, groups] their powers of two.
    """
    blocks, scales = parts["blocks"], parts["scale"]
    experts, outputs, groups, size = blocks.shape
    weight = torch.empty(experts, groups * size * 2, outputs, dtype=dtype, device=blocks.device)
    for expert in range(experts):
        weight[expert] = packed_fp4({"weight": blocks[expert].flatten(1), "scale": scales[expert]}, dtype).t()
    return weight


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the unsigned numbers in int32 words [..., n], lowest bits first: [..., n * 32 / bits]."""
    shifts = torch.arange(0, BITS_PER_WORD, bits, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def packed_integers(parts: Parts, dtype: torch.dtype, *, bits: int) -> torch.Tensor:
    """Return the weight of compressed-tensors' pack-quantized format: (code - zero) * scale, in the scale's dtype.

    Words [out, in * bits / 32] hold the codes.  A group's `scale` [out, groups] and its zero apply to neighbouring
    columns, or to those that `group_of` [in] names.  Without `zero_point`, zero is the middle of the range.  `shape`
    holds the two sizes of the weight.
    """
    shape = (int(parts["shape"][0]), int(parts["shape"][1]))
    words, scale = parts["weight"], parts["scale"].reshape(shape[0], -1)
    middle = 1 << (bits - 1)
    zero = None
    if "zero_point" in parts:
        zero = unpack_words(parts["zero_point"].t().contiguous(), bits).t()[: shape[0]] - middle

    def rows(start: int, stop: int) -> torch.Tensor:
        values = unpack_words(words[start:stop], bits)[:, : shape[1]].sub_(middle).to(scale.dtype)
        if zero is not None:
            values -= _spread_groups(zero[start:stop].to(scale.dtype), values, parts.get("group_of"))
        return values.mul_(_spread_groups(scale[start:stop], values, parts.get("group_of")))

    return _by_rows(shape, dtype, words.device, 1, rows)


def _spread_groups(numbers: torch.Tensor, values: torch.Tensor, group_of: torch.Tensor | None) -> torch.Tensor:
    """Return the numbers [rows, groups] for each of the values [rows, columns]."""
    if group_of is not None:
        return numbers[:, group_of.long()]
    size = -(-values.shape[1] // numbers.shape[1])
    spread = numbers[:, :, None].expand(-1, -1, size).reshape(len(numbers), -1)
    return spread[:, : values.shape[1]]


def gptq(parts: Parts, dtype: torch.dtype, *, bits: int, zero_offset: int) -> torch.Tensor:
    """Return the weight of GPTQ: scale * (code - zero), in the scale's dtype; zeros are stored less `zero_offset`.

    Words [in * bits / 32, out] hold the codes, `zero_point` [groups, out * bits / 32] the zeros and `scale`
    [groups, out] the scales.  `group_of` [in] names each input's group; without it groups are neighbours.
    """
    words, scale = parts["weight"], parts["scale"]
    per_word = BITS_PER_WORD // bits
    inputs, outputs = words.shape[0] * per_word, words.shape[1]
    if "group_of" in parts:
        groups = parts["group_of"].long()
    else:
        groups = torch.arange(inputs, device=words.device) // -(-inputs // scale.shape[0])
    largest = (1 << bits) - 1
    zero = unpack_words(parts["zero_point"], bits)[:, :outputs].add_(zero_offset).bitwise_and_(largest)
    shifts = torch.arange(0, BITS_PER_WORD, bits, dtype=torch.int32, device=words.device)[:, None]

    def columns(start: int, stop: int) -> torch.Tensor:
        packed = words[start // per_word : stop // per_word, None]
        values = ((packed >> shifts) & largest).reshape(-1, outputs).sub_(zero[groups[start:stop]])
        return values.to(scale.dtype).mul_(scale[groups[start:stop]])

    return _by_rows((inputs, outputs), dtype, words.device, per_word, columns, transposed=True).t()


def awq(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight of AWQ's GEMM layout: (code - zero) * scale, in the scale's dtype.

    Words [in, out / 8] hold eight columns in `AWQ_ORDER`, `zero_point` [groups, out / 8] the zeros and `scale`
    [groups, out] the scales.
    """
    words, scale = parts["weight"], parts["scale"]
    inputs, outputs = words.shape[0], words.shape[1] * 8
    groups = torch.arange(inputs, device=words.device) // (inputs // scale.shape[0])
    zero = _unpack_awq(parts["zero_point"])

    def columns(start: int, stop: int) -> torch.Tensor:
        values = _unpack_awq(words[start:stop]).sub_(zero[groups[start:stop]])
        return values.to(scale.dtype).mul_(scale[groups[start:stop]])

    return _by_rows((inputs, outputs), dtype, words.device, 1, columns, transposed=True).t()


def _unpack_awq(words: torch.Tensor) -> torch.Tensor:
    order = torch.tensor(AWQ_ORDER, device=words.device)
    return unpack_words(words, 4).reshape(*words.shape, len(AWQ_ORDER))[..., order].flatten(-2)


def bitsandbytes_8bit(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Return int8 codes times the largest absolute value of their row, divided by 127."""
    codes, largest = parts["weight"], parts["scale"].float()
    if "layout" in parts and int(parts["layout"].max()) != 0:
        raise UnsupportedModel("bitsandbytes 8-bit weights that are not stored by rows: save the model again")

    def rows(start: int, stop: int) -> torch.Tensor:
        return codes[start:stop].float() * (largest[start:stop, None] / LARGEST_INT8)

    return _by_rows((codes.shape[0], codes.shape[1]), dtype, codes.device, 1, rows)


def bitsandbytes_4bit(parts: Parts, dtype: torch.dtype) -> torch.Tensor:
    """Return 4-bit codes, two per byte with the higher bits first, looked up in `code` and times their block's scale.

    The scales may be stored in 8 bits themselves (`nested`).  `state` is the library's JSON, which names sizes and the
    dtype to which the product is rounded.
    """
    state = dict(json.loads(bytes(parts["state"].tolist())))
    packed, size = parts["weight"].flatten().view(torch.uint8), int(state["blocksize"])
    scale = parts["scale"]
    if "nested_scale" in parts:
        inner = int(state["nested_blocksize"])
        spread = parts["nested_scale"].repeat_interleave(inner)[: scale.numel()]
        scale = parts["nested_code"][scale.int()] * spread + float(state["nested_offset"])
    rounded = getattr(torch, str(state["dtype"]))
    weight = torch.empty(math.prod(state["shape"]), dtype=dtype, device=packed.device)
    step = CHUNK // size * size
    for start in range(0, weight.numel(), step):
        stop = min(start + step, weight.numel())
        bytes_ = packed[start // 2 : -(-stop // 2)]
        values = parts["code"].float()[torch.stack([bytes_ >> 4, bytes_ & 15], dim=-1).int()].flatten()[: stop - start]
        scales = scale[start // size : -(-stop // size)].float().repeat_interleave(size)[: stop - start]
        weight[start:stop] = (values * scales).to(rounded)
    return weight.view(state["shape"])

"""Recognize the format of one weight that several tensors store in fewer bits, and check their shapes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from treeswarm.errors import ModelError, UnsupportedModel
from treeswarm_node.model.checkpoint.dequantize import formulas
from treeswarm_node.model.checkpoint.dequantize.formulas import Codes, Parts

FP8 = {"F8_E4M3", "F8_E5M2"}
ONE_BYTE_POWERS = {"U8", "F8_E8M0"}
# Number of bytes per value of safetensors' dtypes, where it is not one.
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
# Number of neighbouring weights that share a scale in the MX formats, and in NVFP4.
MX_GROUP, NVFP4_GROUP = 32, 16
# Numbers of weights that may share a scale in 4-bit formats of bitsandbytes, and of scales that share one themselves.
BITSANDBYTES_BLOCKS, NESTED_BLOCK = (32, 64, 128, 256, 512, 1024, 2048, 4096), 256


@dataclass(frozen=True)
class TensorEntry:
    """Describes a tensor in a checkpoint's header."""

    dtype: str
    """Name of its dtype in safetensors: `F32`, `F8_E4M3`, `I32`, …"""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return the number of bytes of its values."""
        return math.prod(self.shape) * BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class StoredWeight:
    """Describes a weight that several tensors store in fewer bits."""

    name: str
    """Name that the weight would have in a checkpoint of 16 bits."""
    kind: str
    """Name of the format, for people."""
    shape: tuple[int, ...]
    """Shape of the weight; of a 4-bit weight of bitsandbytes the headers say only how many numbers it has."""
    parts: Mapping[str, str]
    """Name of each tensor that is read, by its role for `read`."""
    read: Callable[[Parts], Codes]
    """Reads the tensors, by role, into the form in which the weight is expanded, or held in its bits."""
    stored_bytes: int
    """Number of bytes of its tensors in the files."""
    is_stacked: bool = False
    """Whether it is the weight of several experts, and every tensor has them as its first dimension."""

    scales: int = 0
    """Number of its scales."""
    unpacked_bytes: int = 0
    """Number of bytes that its tensors but for its codes take more where they are held than in the files."""

    def count_held(self, *, by_kernel: bool = False) -> int:
        """Return the number of bytes of its tensors where they are held, also `by_kernel` where one takes its codes.

        Codes of 2 bits take a byte each.  The kernel for 4 bits takes a scale and an offset of 16 bits per group.
        """
        numbers = math.prod(self.shape)
        held = self.stored_bytes + self.unpacked_bytes + (numbers * 3 // 4 if "int2" in self.kind else 0)
        if not by_kernel or "int4" not in self.kind:
            return held
        packed = numbers // 2 + 4 * self.scales
        return max(packed, held) if "group_of" in self.parts else packed  # groups that are no neighbours have no kernel

    @property
    def has_kernel(self) -> bool:
        """Whether a CPU's kernel may multiply with its codes: 4-bit integers in groups, or 8-bit ones by rows."""
        return "int4" in self.kind or self.kind in {"bitsandbytes int8", "int8 per channel"}

    def unpack(self, parts: Parts, dtype: torch.dtype) -> torch.Tensor:
        """Compute the weight from its tensors by role."""
        codes = self.read(parts)
        return codes.expand(codes.parts, dtype)


@dataclass(frozen=True)
class _Group:
    """Holds the tensors of one weight, and answers questions about them."""

    name: str
    parts: Mapping[str, str]
    entries: Mapping[str, TensorEntry]
    settings: Mapping[str, Any]

    def entry(self, role: str) -> TensorEntry:
        """Return the header's entry of a tensor.  Raises ModelError if the checkpoint has none."""
        if role not in self.parts:
            raise ModelError(
                f"weight {self.name} is stored as {self._described()} without its {MISSING[role]}: the checkpoint is "
                "partial, download it again"
            )
        return self.entries[self.parts[role]]

    def weight(
        self, kind: str, sizes: tuple[int, ...], read: Callable[[Parts], Codes], /, **roles: str
    ) -> StoredWeight:
        """Return the weight, read from the tensors that `roles` names.  Raises UnsupportedModel if one is left over."""
        used = {role: self.parts[of] for role, of in roles.items() if of in self.parts}
        unknown = sorted(set(self.parts.values()) - set(used.values()))
        if unknown:
            raise UnsupportedModel(f"tensor {unknown[0]} is not known in {kind} weights: use another checkpoint")
        tensors = [self.entries[name] for name in used.values()]
        is_stacked = len(sizes) == 3 and all(entry.shape[:1] == sizes[:1] for entry in tensors)
        scales = math.prod(self.entries[used["scale"]].shape)
        stored, unpacked = sum(entry.size for entry in tensors), self._unpacked_bytes(kind, used, scales)
        return StoredWeight(self.name, kind, sizes, used, read, stored, is_stacked, scales, unpacked)

    def _unpacked_bytes(self, kind: str, used: Mapping[str, str], scales: int) -> int:
        """Return the bytes that a weight's tensors take more where they are held, but for its codes.

        Zeros take one byte each.  Scales of bitsandbytes in 4 bits take four, and what they are nested in is dropped.
        """
        if "state" in used:
            sizes = {role: self.entries[name].size for role, name in used.items()}
            return 4 * scales - sum(size for role, size in sizes.items() if role not in {"weight", "code"})
        if "zero_point" in used and self.entries[used["zero_point"]].dtype == "I32":
            return scales - self.entries[used["zero_point"]].size
        return scales if "int2" in kind else 0

    def mismatch(self, role: str, expected: str) -> ModelError:
        """Return the error about a tensor whose shape does not fit the weight."""
        return ModelError(
            f"tensor {self.parts[role]} has the shape {list(self.entry(role).shape)}, but {self._described()} "
            f"needs {expected}: the checkpoint is damaged, download it again"
        )

    def _described(self) -> str:
        first = next((role for role in CODES if role in self.parts), next(iter(self.parts)))
        entry = self.entries[self.parts[first]]
        return f"{entry.dtype} {list(entry.shape)}"


# Roles that hold a weight's codes.
CODES = ("weight", "words", "packed", "blocks")
# What the errors call the tensor of a role that is missing.
MISSING = {
    "scale": "scale",
    "scales": "scales",
    "group_scale": "scales",
    "zeros": "qzeros",
    "packed": "packed codes",
    "blocks": "blocks",
    "weight": "codes",
    "words": "qweight",
    "shape": "weight_shape",
    "divisor": "weight_global_scale",
    "absmax": "absmax",
    "code": "quant_map",
    "state": "quant_state",
    "nested_scale": "nested_absmax",
    "nested_code": "nested_quant_map",
    "second": "weight_scale_2",
    "zero_point": "zero_point",
    "group_of": "g_idx",
}


def recognize(
    name: str, parts: Mapping[str, str], entries: Mapping[str, TensorEntry], settings: Mapping[str, Any]
) -> StoredWeight:
    """Return the weight that the tensors `parts`, by role, store; `settings` is the config's section.

    Raises ModelError if a tensor is missing or has another shape than the weight implies, and UnsupportedModel for a
    format that is not known.
    """
    group = _Group(name, parts, entries, settings)
    for role, read in READERS.items():
        if role in parts:
            return read(group)
    return _read_codes(group)


def _as_stored(expand: Callable[..., torch.Tensor], **options: Any) -> Callable[[Parts], Codes]:
    """Return how to read a weight that is expanded from its tensors as they are stored."""
    return lambda parts: Codes(parts, partial(expand, **options))


def _read_codes(group: _Group) -> StoredWeight:
    """Return a weight `…weight` with a scale: FP8, int8 or FP4 by its dtype."""
    codes, scale = group.entry("weight"), group.entry("scale")
    powers = scale.dtype in ONE_BYTE_POWERS
    if codes.dtype in FP8 or (codes.dtype == "I8" and not powers):
        return _read_scaled(group)
    if codes.dtype == "U8" and scale.dtype == "F8_E4M3":
        group.entry("second")
        _check_groups(group, "weight", NVFP4_GROUP)
        shape = (*codes.shape[:-1], 2 * codes.shape[-1])
        return group.weight(
            "NVFP4", shape, _as_stored(formulas.packed_fp4), weight="weight", scale="scale", second="second"
        )
    if codes.dtype in {"U8", "I8", "F4"} and powers:
        _check_groups(group, "weight", MX_GROUP)
        shape = (*codes.shape[:-1], 2 * codes.shape[-1])
        return group.weight("MXFP4", shape, _as_stored(formulas.packed_fp4), weight="weight", scale="scale")
    raise _unknown(group)


def _read_scaled(group: _Group) -> StoredWeight:
    codes, scale = group.entry("weight"), group.entry("scale")
    block = _find_block(group, codes.shape, scale)
    asymmetric = any(scheme.get("symmetric") is False for scheme in _weight_schemes(group.settings))
    if (asymmetric or "zero_point" in group.parts) and group.entry("zero_point").shape != scale.shape:
        raise group.mismatch("zero_point", f"{list(scale.shape)}")
    bits = "FP8" if codes.dtype in FP8 else "int8"
    # compressed-tensors multiplies in the dtype of its scales, and so does transformers, except for fused experts in
    # FP8; block-scaled FP8 (`weight_scale_inv`) is multiplied in float32.
    exact = not group.parts["scale"].endswith("_scale") or (bits == "FP8" and ".experts." in group.name)
    read = _as_stored(formulas.block_scaled, block=block, product=torch.float32 if exact else None)
    kind = f"{bits} {_describe_block(block, codes.shape)}"
    return group.weight(kind, codes.shape, read, weight="weight", scale="scale", zero_point="zero_point")


def _find_block(group: _Group, shape: tuple[int, ...], scale: TensorEntry) -> tuple[int, int]:
    """Return the number of rows and columns that share a scale.  Raises ModelError if the scale's shape fits none."""
    *lead, rows, columns = shape
    sizes = [(rows, columns), (1, columns), *_configured_blocks(group.settings)]
    if scale.dtype in ONE_BYTE_POWERS:
        sizes.append((1, MX_GROUP))
    for height, width in sizes:
        grid = (*lead, -(-rows // height), -(-columns // width))
        if scale.shape in {grid, grid[:-1] if width == columns else grid}:
            return height, width
    if not scale.shape or set(scale.shape) == {1}:
        return rows, columns
    expected = " or ".join(str([*lead, -(-rows // height), -(-columns // width)]) for height, width in sizes)
    raise group.mismatch("scale", expected)


def _configured_blocks(settings: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the block sizes that the config's section about quantization names."""
    found = [settings.get("weight_block_size")]
    for scheme in _weight_schemes(settings):
        found += [scheme.get("block_structure"), [1, scheme["group_size"]] if scheme.get("group_size") else None]
    return [(int(size[0]), int(size[1])) for size in found if isinstance(size, list) and min(size) > 0]


def _weight_schemes(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return how compressed-tensors stores weights, by group of layers."""
    groups = settings.get("config_groups") or {}
    return [group["weights"] for group in groups.values() if isinstance(group, dict) and group.get("weights")]


def _describe_block(block: tuple[int, int], shape: tuple[int, ...]) -> str:
    if block == shape[-2:]:
        return "per tensor"
    return "per channel" if block == (1, shape[-1]) else f"in blocks of {block[0]}×{block[1]}"


def _check_groups(group: _Group, codes: str, size: int, scale: str = "scale") -> None:
    """Raise ModelError unless the scale has one number per `size` FP4 codes, of which each byte holds two."""
    *lead, columns = group.entry(codes).shape
    expected = (*lead, 2 * columns // size)
    if group.entry(scale).shape != expected or 2 * columns % size:
        raise group.mismatch(scale, str(list(expected)))


def _read_packed(group: _Group) -> StoredWeight:
    """Return a weight of compressed-tensors in `…weight_packed`: integers, NVFP4 or MXFP4."""
    packed, scale = group.entry("packed"), group.entry("scale")
    if packed.dtype == "I32":
        group.entry("shape")
        scheme = _find_scheme(group)
        if scheme.get("symmetric") is False:
            group.entry("zero_point")
        if scheme.get("actorder") in {True, "group", "dynamic"}:
            group.entry("group_of")
        bits = _check_bits(group, int(scheme["num_bits"]))
        shape = (packed.shape[0], packed.shape[1] * formulas.BITS_PER_WORD // bits)
        return group.weight(
            f"int{bits} in groups", shape, partial(formulas.packed_integers, bits=bits),
            weight="packed", scale="scale", zero_point="zero_point", group_of="group_of", shape="shape",
        )  # fmt: skip
    shape = (packed.shape[0], 2 * packed.shape[1])
    if packed.dtype == "U8" and scale.dtype in ONE_BYTE_POWERS:
        _check_groups(group, "packed", MX_GROUP)
        return group.weight("MXFP4", shape, _as_stored(formulas.packed_fp4), weight="packed", scale="scale")
    if packed.dtype == "U8" and scale.dtype == "F8_E4M3":
        group.entry("divisor")
        _check_groups(group, "packed", NVFP4_GROUP)
        # The library computes this format in bfloat16.
        read = _as_stored(formulas.packed_fp4, divide=True, rounded=torch.bfloat16)
        return group.weight("NVFP4", shape, read, weight="packed", scale="scale", second="divisor")
    raise _unknown(group)


def _find_scheme(group: _Group) -> Mapping[str, Any]:
    """Return the config's description of a packed weight: only it says the number of bits, and whether zeros exist."""
    words, scales = group.entry("packed").shape[1], group.entry("scale").shape
    groups = scales[1] if len(scales) > 1 else 1
    found: list[Mapping[str, Any]] = []
    for scheme in _weight_schemes(group.settings):
        bits, size = int(scheme.get("num_bits") or 0), int(scheme.get("group_size") or 0)
        one_word = formulas.BITS_PER_WORD
        fits = groups == 1 if size <= 0 else words == -(-groups * size * bits // one_word)
        if bits and fits and scheme.get("type", "int") == "int":
            found.append(scheme)
    if not found or any(_layout_of(scheme) != _layout_of(found[0]) for scheme in found):
        raise group.mismatch("scale", "one group of quantization_config's config_groups")
    return found[0]


def _layout_of(scheme: Mapping[str, Any]) -> tuple[Any, ...]:
    return scheme.get("num_bits"), scheme.get("symmetric", True), scheme.get("actorder")


def _check_bits(group: _Group, bits: int) -> int:
    if bits not in {2, 4, 8}:
        raise UnsupportedModel(f"{bits}-bit integers ({group.name}) are not supported: use a checkpoint of 4 or 8 bits")
    return bits


def _read_words(group: _Group) -> StoredWeight:
    """Return a weight of GPTQ or AWQ, which differ in the direction in which `…qweight` is packed."""
    words, scale, zeros = group.entry("words").shape, group.entry("group_scale").shape, group.entry("zeros").shape
    if group.entry("words").dtype != "I32":
        raise _unknown(group)
    per_word = formulas.BITS_PER_WORD // 4
    if words[1] * per_word == scale[1]:
        if str(group.settings.get("version", "gemm")).lower() != "gemm":
            raise UnsupportedModel(f"AWQ weights of version '{group.settings['version']}': only 'gemm' is supported")
        if zeros != (scale[0], words[1]) or words[0] % scale[0]:
            raise group.mismatch("zeros", f"{[scale[0], words[1]]}")
        shape = (scale[1], words[0])
        _check_group_size(group, words[0], scale[0])
        return group.weight("AWQ int4", shape, formulas.awq, weight="words", scale="group_scale", zero_point="zeros")
    if words[1] != scale[1]:
        raise group.mismatch("group_scale", f"[groups, {words[1]}]")
    if group.settings.get("desc_act"):
        group.entry("group_of")
    bits = _check_bits(group, formulas.BITS_PER_WORD * zeros[1] // words[1])
    if zeros != (scale[0], words[1] * bits // formulas.BITS_PER_WORD):
        raise group.mismatch("zeros", f"{[scale[0], words[1] * bits // formulas.BITS_PER_WORD]}")
    inputs = words[0] * formulas.BITS_PER_WORD // bits
    if "group_of" in group.parts and group.entry("group_of").shape != (inputs,):
        raise group.mismatch("group_of", f"[{inputs}]")
    if "group_of" not in group.parts:
        _check_group_size(group, inputs, scale[0])
    layout = str(group.settings.get("checkpoint_format") or "gptq").lower()
    if layout not in {"gptq", "gptq_v2"}:
        raise UnsupportedModel(f"GPTQ weights in the layout '{layout}': only 'gptq' and 'gptq_v2' are supported")
    # The first version of the format stores zeros that are smaller by one.
    read = partial(formulas.gptq, bits=bits, zero_offset=0 if layout == "gptq_v2" else 1)
    return group.weight(
        f"GPTQ int{bits}", (words[1], inputs), read,
        weight="words", scale="group_scale", zero_point="zeros", group_of="group_of",
    )  # fmt: skip


def _check_group_size(group: _Group, inputs: int, groups: int) -> None:
    """Raise UnsupportedModel unless inputs in groups of neighbours have a size that the config names."""
    settings = group.settings
    parts = [settings, *(settings.get("dynamic") or {}).values(), *(settings.get("extra_config") or {}).values()]
    named = [part.get("group_size", part.get("q_group_size")) for part in parts if isinstance(part, Mapping)]
    sizes = {int(size) for size in named if size is not None}
    fits = any(groups == 1 if size <= 0 or size >= inputs else groups * size == inputs for size in sizes)
    if inputs % groups or (sizes and not fits):
        raise UnsupportedModel(
            f"weight {group.name} has {inputs} inputs in {groups} groups, but quantization_config has groups of "
            f"{' or '.join(map(str, sorted(sizes))) or 'no size'}: use another checkpoint"
        )


def _read_blocks(group: _Group) -> StoredWeight:
    """Return fused experts of gpt-oss."""
    blocks, scales = group.entry("blocks").shape, group.entry("scales").shape
    if len(blocks) != 4 or scales != blocks[:3]:  # experts, outputs, groups, bytes
        raise group.mismatch("scales", f"{list(blocks[:3])}")
    shape = (blocks[0], 2 * blocks[2] * blocks[3], blocks[1])
    return group.weight("MXFP4", shape, formulas.mxfp4, blocks="blocks", scale="scales")


def _read_bitsandbytes_4bit(group: _Group) -> StoredWeight:
    count, scales = 2 * group.entry("weight").size, group.entry("absmax")
    group.entry("code"), group.entry("state")
    if scales.shape not in {(-(-count // size),) for size in BITSANDBYTES_BLOCKS}:
        raise group.mismatch("absmax", "a scale per block")
    if scales.dtype == "U8" and group.entry("nested_scale").shape != (-(-scales.shape[0] // NESTED_BLOCK),):
        raise group.mismatch("nested_scale", f"[{-(-scales.shape[0] // NESTED_BLOCK)}]")
    if scales.dtype == "U8":
        group.entry("nested_code")
    kind = "bitsandbytes fp4" if group.parts["state"].endswith("fp4") else "bitsandbytes nf4"
    return group.weight(
        kind, (count // 64, 64) if count % 64 == 0 else (count, 1), formulas.bitsandbytes_4bit,
        weight="weight", scale="absmax", code="code", state="state",
        nested_scale="nested_scale", nested_code="nested_code",
    )  # fmt: skip


def _read_bitsandbytes_8bit(group: _Group) -> StoredWeight:
    codes, rows = group.entry("weight"), group.entry("row_scale").shape
    if rows != codes.shape[:1]:
        raise group.mismatch("row_scale", f"{list(codes.shape[:1])}")
    return group.weight(
        "bitsandbytes int8", codes.shape, formulas.bitsandbytes_8bit,
        weight="weight", scale="row_scale", layout="layout",
    )  # fmt: skip


# How a weight is read, by the role of a tensor that only its format has.
READERS: Mapping[str, Callable[[_Group], StoredWeight]] = {
    "packed": _read_packed,
    "words": _read_words,
    "blocks": _read_blocks,
    "absmax": _read_bitsandbytes_4bit,
    "row_scale": _read_bitsandbytes_8bit,
}


def _unknown(group: _Group) -> UnsupportedModel:
    stored = ", ".join(f"{name} ({group.entries[name].dtype})" for name in sorted(group.parts.values()))
    return UnsupportedModel(f"weight {group.name} is stored in a format that is not known: {stored}")

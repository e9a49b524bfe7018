"""Write tiny checkpoints in the formats in which models are published, beside the same weights as plain numbers.

Each writer follows the format's published definition with NumPy and Python's integers, not the product's code.  It
rounds a weight to codes, stores the codes, and returns what the codes mean.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BLOCK = 32
GROUP = 32
FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# bitsandbytes' table of the 16 values of nf4, as QLoRA's paper prints it.
NF4_VALUES = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
# bitsandbytes' table of the 16 values of fp4: sign, two bits of exponent, one of mantissa, divided by the largest.
FP4_TWELFTHS = np.array([0, 1 / 16, 8, 12, 4, 6, 2, 3, 0, -1 / 16, -8, -12, -4, -6, -2, -3], np.float32)
AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]

Tensors = dict[str, torch.Tensor]
Writer = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]


@dataclass(frozen=True)
class PublishedFormat:
    """Describes one format: how a weight is written, and what config.json says about it."""

    settings: Mapping[str, Any]
    write: Writer
    """Returns the tensors that store the weight of a name, and the weight that they mean."""


def random_model(model_type: str, *sizes: Mapping[str, Any]) -> PreTrainedModel:
    """Return a random float32 model, with weights large enough that mistakes change the output."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{key: value for part in sizes for key, value in part.items()})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    return model.requires_grad_(False)


def random_git() -> PreTrainedModel:
    """Return a model whose decoder blocks have an unusual name, and whose image part has layers with the usual one."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    image = {**sizes, "num_hidden_layers": 5, "image_size": 32, "patch_size": 16}
    tokens = {"vocab_size": 128, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    return random_model("git", sizes, tokens, {"num_hidden_layers": 3, "vision_config": image})


def is_git_projection(name: str) -> bool:
    """Return whether a tensor is a matrix of a decoder block of `random_git`."""
    return "git.encoder.layer." in name and name.endswith(".weight") and "LayerNorm" not in name


def write_checkpoint(
    model: PreTrainedModel, published: PublishedFormat, folder: Path, chosen: Callable[[str], bool] | None = None
) -> Path:
    """Write the model's projections in a format to `folder`, and return a folder with the same weights in float32.

    `chosen` names the tensors to be stored in the format; without it, all projections of blocks are.
    """
    plain = folder.parent / f"{folder.name}-plain"
    model.save_pretrained(plain, max_shard_size="100GB")
    stored, meant = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if chosen(name) if chosen is not None else name.endswith("_proj.weight"):
            tensors, weight = published.write(name, tensor.float())
            stored |= {key: value.contiguous().clone() for key, value in tensors.items()}
            meant[name] = weight.float().contiguous()
        else:
            stored[name] = meant[name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(published.settings)}))
    return plain


def _fp8(values: NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn)


def fp8_blocks(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Store blocks of 32×32 with a float32 scale each, as DeepSeek's format does with 128×128."""
    rows, columns = weight.shape
    values, meant = weight.numpy(), np.empty(weight.shape, np.float32)
    scales = np.empty((-(-rows // BLOCK), -(-columns // BLOCK)), np.float32)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = np.s_[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
            scales[i, j] = np.abs(values[part]).max() / 448
            codes[part] = _fp8(values[part] / scales[i, j])
            meant[part] = codes[part].float().numpy() * scales[i, j]
    return {name: codes, f"{name}_scale_inv": torch.from_numpy(scales)}, torch.from_numpy(meant)


def fp8_channels(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Store a scale per row in bfloat16; the product is bfloat16, but float32 in experts, as transformers has it."""
    scales = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = _fp8((weight / scales.float()).numpy())
    meant = codes.float() * scales.float()
    if ".experts." not in name:
        meant = meant.bfloat16().float()
    static = torch.tensor([0.5])
    return {name: codes, f"{name}_scale": scales, name.replace("weight", "input_scale"): static}, meant


def fp8_tensor(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Store one scale per weight, as ModelOpt does."""
    scale = weight.abs().max() / 448
    codes = _fp8((weight / scale).numpy())
    return {name: codes, f"{name}_scale": scale, name.replace("weight", "input_scale"): scale}, codes.float() * scale


def fp8_inverse_tensor(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Store one scale per weight under DeepSeek's name, and a static scale of activations."""
    scale = weight.abs().max() / 448
    codes = _fp8((weight / scale).numpy())
    static = name.replace("weight", "activation_scale")
    return {name: codes, f"{name}_scale_inv": scale, static: torch.tensor(0.5)}, codes.float() * scale


def fp8_rows(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Store a float32 scale per row, as FBGEMM does for Llama 3.1 405B."""
    scales = weight.abs().amax(1, keepdim=True) / 448
    codes = _fp8((weight / scales).numpy())
    return {name: codes, f"{name}_scale": scales}, codes.float() * scales


def int8_channels(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Store int8 codes with a scale per row, as compressed-tensors' int-quantized format does."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round().to(torch.int8)
    return {name: codes, f"{name}_scale": scales}, codes.float() * scales


def _pack(codes: NDArray[np.int64], bits: int) -> torch.Tensor:
    """Pack unsigned codes along the last axis into int32 words, lowest bits first."""
    per_word = 32 // bits
    words = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // per_word)), np.uint32)
    for column in range(codes.shape[-1]):
        words[..., column // per_word] |= (codes[..., column] << (bits * (column % per_word))).astype(np.uint32)
    return torch.from_numpy(words.view(np.int32))


def packed_groups(name: str, weight: torch.Tensor, *, bits: int = 4) -> tuple[Tensors, torch.Tensor]:
    """Store signed codes plus 2^(bits-1) in words, with a bfloat16 scale per 32 columns (Kimi-K2-Thinking: 4)."""
    grouped, middle = weight.unflatten(1, (-1, GROUP)), 2 ** (bits - 1)
    scales = (grouped.abs().amax(2, keepdim=True) / (middle - 1)).bfloat16()
    codes = (grouped / scales.float()).round().clamp(-middle, middle - 1)
    meant = (codes.bfloat16() * scales).float().flatten(1)
    stem = name.removesuffix("weight")
    return {
        f"{stem}weight_packed": _pack(codes.flatten(1).numpy().astype(np.int64) + middle, bits),
        f"{stem}weight_scale": scales[..., 0],
        f"{stem}weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }, meant


def int4_asymmetric(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Store 4-bit codes with a float32 scale and a zero per group; groups are of interleaved columns."""
    count = weight.shape[1] // GROUP
    group_of = torch.arange(weight.shape[1]) % count
    scales, zeros, codes, meant = [], [], torch.empty(weight.shape), torch.empty(weight.shape)
    for group in range(count):
        part = weight[:, group_of == group]
        scale = (part.amax(1, keepdim=True) - part.amin(1, keepdim=True)) / 15
        zero = (-part.amin(1, keepdim=True) / scale).round()
        code = ((part / scale).round() + zero).clamp(0, 15)
        codes[:, group_of == group], meant[:, group_of == group] = code, (code - zero) * scale
        scales.append(scale)
        zeros.append(zero)
    stem = name.removesuffix("weight")
    packed_zeros = _pack(torch.cat(zeros, 1).t().numpy().astype(np.int64).copy(), 4).t()
    return {
        f"{stem}weight_packed": _pack(codes.numpy().astype(np.int64), 4),
        f"{stem}weight_scale": torch.cat(scales, 1),
        f"{stem}weight_zero_point": packed_zeros,
        f"{stem}weight_g_idx": group_of.int(),
        f"{stem}weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }, meant


def gptq(
    name: str, weight: torch.Tensor, *, bits: int = 4, offset: int = 1, interleaved: bool = True
) -> tuple[Tensors, torch.Tensor]:
    """Store GPTQ's layout with float16 scales; zeros are stored smaller by `offset`; groups may be interleaved."""
    codes, scales, zeros, group_of, meant = _quantize_groups(weight, 2**bits - 1, interleaved=interleaved)
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": _pack(codes.numpy().astype(np.int64), bits).t(),
        f"{stem}qzeros": _pack((zeros.t().numpy().astype(np.int64) - offset) & (2**bits - 1), bits),
        f"{stem}scales": scales.t(),
        f"{stem}g_idx": group_of.int(),
    }, meant


def awq(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Store AWQ's GEMM layout: words of eight output columns in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    codes, scales, zeros, _, meant = _quantize_groups(weight, 15, interleaved=False)

    def shuffled(matrix: torch.Tensor) -> torch.Tensor:
        return _pack(matrix.t().unflatten(1, (-1, 8))[..., AWQ_COLUMNS].flatten(1).numpy().astype(np.int64), 4)

    stem = name.removesuffix("weight")
    return {f"{stem}qweight": shuffled(codes), f"{stem}qzeros": shuffled(zeros), f"{stem}scales": scales.t()}, meant


def _quantize_groups(
    weight: torch.Tensor, largest: int, *, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes [out, in], float16 scales and zeros [out, groups], each column's group, and the meant weight."""
    count = weight.shape[1] // GROUP
    columns = torch.arange(weight.shape[1])
    group_of = columns % count if interleaved else columns // GROUP
    weight = weight.clone()
    weight[0].abs_()  # a row without negative weights has zeros that are 0
    low = torch.stack([weight[:, group_of == g].amin(1) for g in range(count)], 1).clamp(max=0)
    high = torch.stack([weight[:, group_of == g].amax(1) for g in range(count)], 1)
    scales = ((high - low) / largest).half()
    zeros = (-low / scales.float()).round().clamp(0, largest)
    codes = ((weight / scales.float()[:, group_of]).round() + zeros[:, group_of]).clamp(0, largest)
    meant = ((codes - zeros[:, group_of]).half() * scales[:, group_of]).float()
    return codes, scales, zeros, group_of, meant


def _nearest(values: torch.Tensor, table: NDArray[np.float32]) -> NDArray[np.int64]:
    distances = np.abs(values.numpy()[..., None] - table)
    return distances.argmin(-1).astype(np.int64)


def nvfp4(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Store FP4 codes with an FP8 scale per 16 columns and one float32 scale per weight, as ModelOpt does."""
    second = weight.abs().max() / (448 * 6)
    grouped = weight.unflatten(1, (-1, 16))
    scales = (grouped.abs().amax(2) / 6 / second).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    full = (scales.float() * second)[..., None]
    codes = _nearest(grouped / full, FP4_VALUES).reshape(weight.shape)
    meant = torch.from_numpy(FP4_VALUES[codes]) * full.expand(grouped.shape).flatten(1)
    packed = torch.from_numpy((codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8))
    return {name: packed, f"{name}_scale": scales, f"{name}_scale_2": second}, meant


def nvfp4_packed(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Store the same as compressed-tensors, whose scale of the weight divides and whose product is bfloat16."""
    tensors, meant = nvfp4(name, weight)
    divisor = (1 / tensors[f"{name}_scale_2"]).reshape(1)
    scale = tensors[f"{name}_scale"]
    scales = (scale.float() / divisor).repeat_interleave(16, 1)
    codes = meant / (scale.float() * tensors[f"{name}_scale_2"]).repeat_interleave(16, 1)
    exact = torch.from_numpy(FP4_VALUES[_nearest(codes, FP4_VALUES)]) * scales
    return {
        f"{name}_packed": tensors[name],
        f"{name}_scale": scale,
        f"{name}_global_scale": divisor,
    }, exact.bfloat16().float()


def mxfp4_experts(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Store fused experts [experts, in, out] of gpt-oss as blocks of 32 FP4 codes with a power of two each."""
    grouped = weight.transpose(1, 2).unflatten(2, (-1, 32))
    exponents = torch.floor(torch.log2(grouped.abs().amax(3))) - 2
    scales = torch.exp2(exponents)[..., None]
    codes = _nearest(grouped / scales, FP4_VALUES)
    meant = (torch.from_numpy(FP4_VALUES[codes]) * scales).flatten(2).transpose(1, 2)
    blocks = torch.from_numpy((codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8))
    return {f"{name}_blocks": blocks, f"{name}_scales": (exponents + 127).to(torch.uint8)}, meant


def mxfp4_packed(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Store FP4 codes with a power of two per 32 columns, as compressed-tensors does."""
    grouped = weight.unflatten(1, (-1, 32))
    exponents = torch.floor(torch.log2(grouped.abs().amax(2))) - 2
    scales = torch.exp2(exponents)[..., None]
    codes = _nearest(grouped / scales, FP4_VALUES)
    meant = (torch.from_numpy(FP4_VALUES[codes]) * scales).flatten(1)
    flat = codes.reshape(weight.shape)
    packed = torch.from_numpy((flat[:, 0::2] | flat[:, 1::2] << 4).astype(np.uint8))
    return {f"{name}_packed": packed, f"{name}_scale": (exponents + 127).to(torch.uint8)}, meant


def mxfp8(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Store FP8 codes with a power of two per 32 columns."""
    grouped = weight.unflatten(1, (-1, 32))
    exponents = torch.floor(torch.log2(grouped.abs().amax(2))) - 8
    scales = torch.exp2(exponents)[..., None]
    codes = _fp8((grouped / scales).flatten(1).numpy())
    meant = (codes.float().unflatten(1, (-1, 32)) * scales).flatten(1)
    return {name: codes, f"{name}_scale_inv": (exponents + 127).to(torch.uint8)}, meant


def bitsandbytes_8bit(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Store int8 codes with the largest absolute value of each row."""
    largest = weight.abs().amax(1)
    codes = (weight / largest[:, None] * 127).round().to(torch.int8)
    layout = torch.tensor(0, dtype=torch.uint8)
    stem = name.removesuffix("weight")
    return {name: codes, f"{stem}SCB": largest, f"{stem}weight_format": layout}, codes.float() * largest[:, None] / 127


def bitsandbytes_4bit(
    name: str, weight: torch.Tensor, *, kind: str = "nf4", nested: bool = False
) -> tuple[Tensors, torch.Tensor]:
    """Store 4-bit codes, higher bits first, with a scale per 64 weights, which `nested` stores in 8 bits itself."""
    values = {"nf4": NF4_VALUES, "fp4": FP4_TWELFTHS / 12}[kind]
    flat = weight.reshape(-1, 64)
    scales = flat.abs().amax(1)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    extra: Tensors = {}
    stored = scales
    if nested:
        table = torch.linspace(-1, 1, 256)
        offset = float(scales.mean())
        spread = (scales - offset).abs().reshape(-1)
        blocks = [spread[i : i + 256].max() for i in range(0, len(spread), 256)]
        per_scale = torch.stack(blocks).repeat_interleave(256)[: len(scales)]
        stored = ((scales - offset) / per_scale * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        scales = table[stored.long()] * per_scale + offset
        extra = {f"{name}.nested_absmax": torch.stack(blocks), f"{name}.nested_quant_map": table}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    codes = _nearest(flat / scales[:, None], values).reshape(-1)
    meant = (torch.from_numpy(values[codes]).reshape(-1, 64) * scales[:, None]).reshape(weight.shape)
    packed = torch.from_numpy((codes[0::2] << 4 | codes[1::2]).astype(np.uint8))[:, None]
    described = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        name: packed,
        f"{name}.absmax": stored,
        f"{name}.quant_map": torch.from_numpy(values),
        f"{name}.quant_state.bitsandbytes__{kind}": described,
        **extra,
    }, meant


def _compressed(layout: str, **weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": 8, "symmetric": True, "dynamic": False, "group_size": None, **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


FORMATS: dict[str, PublishedFormat] = {
    "fp8 blocks": PublishedFormat(
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        },
        fp8_blocks,
    ),
    "fp8 tensors": PublishedFormat({"quant_method": "fp8", "activation_scheme": "static"}, fp8_inverse_tensor),
    "fbgemm fp8": PublishedFormat({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fp8_rows),
    "mxfp8": PublishedFormat({"quant_method": "mxfp8", "scale_fmt": "ue8m0", "weight_block_size": [1, 32]}, mxfp8),
    "compressed fp8": PublishedFormat(
        _compressed("float-quantized", type="float", strategy="channel"), fp8_channels
    ),
    "compressed int8": PublishedFormat(_compressed("int-quantized", type="int", strategy="channel"), int8_channels),
    "compressed int4": PublishedFormat(
        _compressed("pack-quantized", type="int", num_bits=4, strategy="group", group_size=GROUP), packed_groups
    ),
    "compressed int4 asymmetric": PublishedFormat(
        _compressed(
            "pack-quantized", type="int", num_bits=4, strategy="group", group_size=GROUP, symmetric=False,
            actorder="group",
        ),
        int4_asymmetric,
    ),
    "compressed int8 packed": PublishedFormat(
        _compressed("pack-quantized", type="int", num_bits=8, strategy="group", group_size=GROUP),
        lambda name, weight: packed_groups(name, weight, bits=8),
    ),
    "compressed mxfp4": PublishedFormat(
        _compressed("mxfp4-pack-quantized", type="float", num_bits=4, strategy="group", group_size=32), mxfp4_packed
    ),
    "compressed nvfp4": PublishedFormat(
        _compressed("nvfp4-pack-quantized", type="float", num_bits=4, strategy="tensor_group", group_size=16),
        nvfp4_packed,
    ),
    "modelopt fp8": PublishedFormat({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_tensor),
    "modelopt nvfp4": PublishedFormat({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4),
    "gptq": PublishedFormat({"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}, gptq),
    "gptq 2 bits": PublishedFormat(
        {"quant_method": "gptq", "bits": 2, "group_size": GROUP, "desc_act": True},
        lambda name, weight: gptq(name, weight, bits=2),
    ),
    "gptq 8 bits, v2": PublishedFormat(
        {
            "quant_method": "gptq", "bits": 8, "group_size": GROUP, "desc_act": True, "checkpoint_format": "gptq_v2",
        },
        lambda name, weight: gptq(name, weight, bits=8, offset=0),
    ),
    "awq": PublishedFormat(
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq
    ),
    "bitsandbytes 8 bits": PublishedFormat(
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, bitsandbytes_8bit
    ),
    "bitsandbytes nf4": PublishedFormat(
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, bitsandbytes_4bit
    ),
    "bitsandbytes fp4": PublishedFormat(
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        lambda name, weight: bitsandbytes_4bit(name, weight, kind="fp4"),
    ),
    "bitsandbytes nf4, nested": PublishedFormat(
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        lambda name, weight: bitsandbytes_4bit(name, weight, nested=True),
    ),
}  # fmt: skip
MXFP4_EXPERTS = PublishedFormat(
    {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}, mxfp4_experts
)

"""Find out in which number format a checkpoint's weights are published, from its config alone.

This module imports no torch, so that a program can refuse a format before it loads anything.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treeswarm.errors import UnsupportedModel

# Names for users of `quant_method` in a checkpoint's config.
METHOD_NAMES = {
    "aqlm": "AQLM weights",
    "auto-round": "AutoRound weights",
    "awq": "AWQ weights",
    "bitnet": "BitNet weights",
    "bitsandbytes": "bitsandbytes weights",
    "compressed-tensors": "compressed-tensors weights",
    "eetq": "EETQ weights",
    "fbgemm_fp8": "FBGEMM FP8 weights",
    "fp8": "FP8 weights",
    "gptq": "GPTQ weights",
    "higgs": "HIGGS weights",
    "hqq": "HQQ weights",
    "mxfp4": "MXFP4 weights",
    "mxfp8": "MXFP8 weights",
    "quanto": "Quanto weights",
    "quark": "Quark weights",
    "torchao": "torchao weights",
    "vptq": "VPTQ weights",
}
# Methods whose weights `dequantize/` reads.
READABLE = {
    "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "modelopt", "mxfp4", "mxfp8",
}  # fmt: skip
# Formats of compressed-tensors that are read.  The others store a pattern of zeros beside the weights.
READABLE_COMPRESSED = {
    "dense", "float-quantized", "int-quantized", "mixed-precision", "mxfp4-pack-quantized", "mxfp8-quantized",
    "naive-quantized", "nvfp4-pack-quantized", "pack-quantized",
}  # fmt: skip


@dataclass(frozen=True)
class WeightFormat:
    """Describes the number format in which a checkpoint's weights are published."""

    method: str
    """Name of the method as the config gives it (`quant_method`), or `none` if the weights are plain numbers."""
    name: str
    """Name for users, such as "FP8 block-scaled weights"."""


PLAIN = WeightFormat("none", "unquantized weights")


def weight_format(config: dict[str, Any]) -> WeightFormat:
    """Return the format of a checkpoint's weights, from the content of its config.json."""
    settings = quantization_settings(config)
    if settings is None:
        return PLAIN
    method = _method(settings)
    return WeightFormat(method, _name(method, settings))


def check_format(folder: Path, config: dict[str, Any]) -> None:
    """Raise UnsupportedModel if the checkpoint's weights are in a format that this program does not read."""
    found = weight_format(config)
    if found != PLAIN and not _is_readable(found.method, quantization_settings(config) or {}):
        raise UnsupportedModel(f"{found.name}: not supported yet ('{folder}'): use the model's unquantized checkpoint")


def _is_readable(method: str, settings: dict[str, Any]) -> bool:
    """Return whether `dequantize/` reads the method.  Rotated weights need code in the model's forward."""
    if method == "compressed-tensors":
        known = {settings.get("format") or "dense", *_group_formats(settings)} <= READABLE_COMPRESSED
        return known and not settings.get("transform_config")
    return method in READABLE


def _group_formats(settings: dict[str, Any]) -> set[str]:
    groups = (settings.get("config_groups") or {}).values()
    return {group["format"] for group in groups if isinstance(group, dict) and group.get("format")}


def _method(settings: dict[str, Any]) -> str:
    method = str(settings.get("quant_method", "unknown")).lower()
    if method == "unknown" and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        return "bitsandbytes"
    return {"compressed_tensors": "compressed-tensors", "modelopt_fp4": "modelopt"}.get(method, method)


def quantization_settings(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the config's section about quantization, or None if there is none."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(section.get(key), dict):
                return dict(section[key])
        if isinstance(section.get("quantization"), dict):  # MLX writes this key
            return {"quant_method": "mlx", **section["quantization"]}
    return None


def _name(method: str, settings: dict[str, Any]) -> str:
    if method == "fp8":
        return "FP8 block-scaled weights" if settings.get("weight_block_size") else "FP8 weights"
    if method == "compressed-tensors":
        return f"compressed-tensors weights ({settings.get('format') or 'unnamed format'})"
    if method == "bitsandbytes":
        return f"bitsandbytes {4 if settings.get('load_in_4bit') else 8}-bit weights"
    if method == "modelopt":
        return f"ModelOpt {settings.get('quant_algo') or 'quantized'} weights"
    if method == "mlx":
        return f"MLX {settings.get('bits', '?')}-bit weights"
    return METHOD_NAMES.get(method, f"weights quantized with '{method}'")

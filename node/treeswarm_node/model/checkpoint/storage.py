"""Tell what a checkpoint's weights are stored as, and how large they are in the files and in memory."""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from treeswarm.model_files import block_of, read_config, read_header, tensor_shapes, weight_files
from treeswarm.model_sources.gguf_files import is_gguf_folder, read_table
from treeswarm.programs.units import format_bytes
from treeswarm_node.model.checkpoint.dequantize.recognition import StoredWeight, TensorEntry
from treeswarm_node.model.checkpoint.dequantize.stored_weights import find_stored_weights
from treeswarm_node.model.checkpoint.formats import quantization_settings


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight of the checkpoint by name, from the files' headers.

    A weight that is stored in fewer bits has its full shape.  Raises ModelError, and UnsupportedModel for a format that
    is not known.
    """
    if is_gguf_folder(folder):
        return {name: tuple(shape) for name, shape in tensor_shapes(folder).items()}
    entries = _read_entries(folder)
    found = find_stored_weights(entries, quantization_settings(read_config(folder)) or {})
    return {name: entries[name].shape for name in found.plain} | {
        name: weight.shape for name, weight in found.weights.items()
    }


def stored_sizes(folder: Path) -> dict[str, int]:
    """Return the number of bytes of every tensor in the checkpoint's files, by its name there.  Raises ModelError."""
    if is_gguf_folder(folder):
        return {name: tensor.size for name, tensor in read_table(folder).items()}
    return {name: entry.size for name, entry in _read_entries(folder).items()}


def _read_entries(folder: Path) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for file in weight_files(folder):
        for name, entry in read_header(folder / file).items():
            if name != "__metadata__":
                entries[name] = TensorEntry(entry["dtype"], tuple(entry["shape"]))
    return entries


def describe_storage(weights: Iterable[StoredWeight], dtype: torch.dtype, quantization: str) -> str | None:
    """Say in one line what loading makes of blocks that are stored in fewer bits, or None if there are none."""
    stored, expanded = Counter[int](), Counter[int]()
    kinds = set()
    for weight in weights:
        block = block_of(weight.name)
        if block is not None:
            kinds.add(weight.kind)
            stored[block] += weight.stored_bytes
            expanded[block] += math.prod(weight.shape) * dtype.itemsize
    if not kinds:
        return None
    again = "" if quantization == "none" else f", block by block, and quantized to {quantization}"
    return (
        f"weights are published as {' and '.join(sorted(kinds))}: {format_bytes(max(stored.values()))} per block, "
        f"expanded while they are loaded to {str(dtype).removeprefix('torch.')}, "
        f"{format_bytes(max(expanded.values()))} per block{again}"
    )

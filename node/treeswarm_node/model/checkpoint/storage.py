"""Tell what a checkpoint's weights are stored as, and how large they are in the files and in memory."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from treeswarm.errors import ModelError
from treeswarm.model_files import block_of, read_header, weight_files
from treeswarm.model_sources.gguf_files import is_gguf_folder, read_table
from treeswarm.programs.units import format_bytes
from treeswarm_node.model.checkpoint.dequantize.recognition import StoredWeight, TensorEntry


def stored_sizes(folder: Path) -> dict[str, int]:
    """Return the number of bytes of every tensor in the checkpoint's files, by its name there.  Raises ModelError."""
    if is_gguf_folder(folder):
        return {name: tensor.size for name, tensor in read_table(folder).items()}
    return {name: entry.size for name, entry in read_entries(folder, weight_files(folder)).items()}


def read_entries(folder: Path, names_of: Mapping[str, Iterable[str]]) -> dict[str, TensorEntry]:
    """Return the headers' entries of the tensors that are named by file.  Raises ModelError if one is missing."""
    entries: dict[str, TensorEntry] = {}
    for file, tensors in names_of.items():
        header = read_header(folder / file)
        for tensor in tensors:
            if tensor not in header:
                raise ModelError(f"tensor {tensor} is missing in {folder / file}: download it again")
            entries[tensor] = TensorEntry(header[tensor]["dtype"], tuple(header[tensor]["shape"]))
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

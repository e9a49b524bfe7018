"""Tell what a checkpoint's weights are stored as, and how large they are in the files and in memory."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from treeswarm.errors import ModelError
from treeswarm.model_files import read_header, weight_files
from treeswarm.model_sources.gguf_files import is_gguf_folder, read_table
from treeswarm.programs.units import format_bytes
from treeswarm_node.attention.latent import EXPANSION
from treeswarm_node.model.checkpoint.dequantize.recognition import StoredWeight, TensorEntry
from treeswarm_node.model.families.blocks import DecoderBlocks


@dataclass(frozen=True)
class BlockWeight:
    """Names a weight of a decoder block that is stored in fewer bits."""

    block: int
    """Number of the block."""
    target: str
    """Name in the model of what the weight becomes, or a part of."""
    stored: StoredWeight

    @property
    def can_be_held(self) -> bool:
        """Whether the weight can be held in its bits, by its name.

        The expansion of latents is expanded: attention multiplies with it from both sides.
        """
        return f".{EXPANSION}." not in self.target


def find_block_weights(
    stored: Mapping[str, StoredWeight], targets: Mapping[str, str], blocks: DecoderBlocks
) -> list[BlockWeight]:
    """Return those of the weights that belong to decoder blocks; `targets` has their names in the model."""
    found = ((blocks.block_of(targets[name]), targets[name], weight) for name, weight in stored.items())
    return [BlockWeight(block, target, weight) for block, target, weight in found if block is not None]


@dataclass(frozen=True)
class HeldBlock:
    """Holds the sizes of a block's weights that can be held in the bits in which they were published."""

    numbers: int = 0
    """Number of values that they have."""
    size: int = 0
    """Number of their bytes."""
    largest: int = 0
    """Number of values of the largest matrix."""


def held_blocks(weights: Iterable[BlockWeight], *, by_kernel: bool = False) -> dict[int, HeldBlock]:
    """Return the sizes of those of the weights that can be held in their published bits, by block.

    `by_kernel` says whether kernels multiply with codes where there are some.
    """
    blocks: dict[int, HeldBlock] = {}
    for weight in weights:
        if weight.can_be_held:
            held, shape = blocks.get(weight.block, HeldBlock()), weight.stored.shape
            numbers = math.prod(shape)
            matrix = numbers if len(shape) < 3 else numbers // shape[0]
            size = weight.stored.count_held(by_kernel=by_kernel)
            blocks[weight.block] = HeldBlock(held.numbers + numbers, held.size + size, max(held.largest, matrix))
    return blocks


def explain_no_kernel(weights: Iterable[StoredWeight]) -> str | None:
    """Return why no kernel multiplies with any of these weights as they are published, or None if one does."""
    kinds: set[str] = set()
    for weight in weights:
        if weight.has_kernel:
            return None
        kinds.add(weight.kind)
    formats = " and ".join(sorted(kinds)) or "plain numbers"
    return (
        f"--quantization published: no kernel multiplies with {formats}: leave it out; --expand use holds weights of "
        "fewer bits as they are"
    )


def stored_sizes(folder: Path, is_loaded: Callable[[str], bool]) -> dict[str, int]:
    """Return the number of bytes in the files of each tensor that nodes load, by its name there.  Raises ModelError."""
    if is_gguf_folder(folder):
        return {name: tensor.size for name, tensor in read_table(folder).items()}
    loaded = {file: [name for name in tensors if is_loaded(name)] for file, tensors in weight_files(folder).items()}
    entries = read_entries(folder, {file: tensors for file, tensors in loaded.items() if tensors})
    return {name: entry.size for name, entry in entries.items()}


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


def describe_storage(
    weights: Sequence[BlockWeight], dtype: torch.dtype, quantization: str, *, holds_codes: bool = False
) -> str | None:
    """Say in one line what loading makes of blocks that are stored in fewer bits, or None if there are none."""
    if not weights:
        return None
    stored, expanded = Counter[int](), Counter[int]()
    for weight in weights:
        stored[weight.block] += weight.stored.stored_bytes
        expanded[weight.block] += math.prod(weight.stored.shape) * dtype.itemsize
    kinds = {weight.stored.kind for weight in weights}
    published = (
        f"weights are published as {' and '.join(sorted(kinds))}: {format_bytes(max(stored.values()))} per block"
    )
    to, size = str(dtype).removeprefix("torch."), format_bytes(max(expanded.values()))
    if quantization == "published":
        return (
            f"{published}, held so: kernels multiply with the integers, and what has none is expanded where it is used"
        )
    if holds_codes:
        return f"{published}, held so, and expanded to {to} one matrix at a time in every forward, instead of {size}"
    again = "" if quantization == "none" else f", and quantized to {quantization} part by part"
    return f"{published}, expanded while they are loaded to {to}, {size} per block{again}"

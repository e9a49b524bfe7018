"""Compute how many decoder blocks fit into this machine's memory, from the checkpoint's tensor sizes."""

import math
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from treeswarm.errors import BadRequest, UnsupportedModel
from treeswarm.model_files import block_of
from treeswarm.programs.units import format_bytes
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.model.checkpoint.storage import weight_shapes
from treeswarm_node.model.families.blocks import find_blocks
from treeswarm_node.model.families.extra_inputs import ExtraInputs
from treeswarm_node.model.families.kv_shapes import kv_shapes
from treeswarm_node.model.quantization.weight_kinds import KINDS

# Share of the free memory that is planned with.  The rest is for the allocator's waste and for what else the owner does
# meanwhile.
USABLE_SHARE = 0.85
# Number of values per row that a forward holds in a decoder layer, as a multiple of the hidden size.  They are query,
# key, value, gate, up and residual; the widest families seen need less than this.
ACTIVATION_COPIES = 24
# Number of blocks on the device when weights are offloaded: one computes while the next one is loaded.
SLOTS = 2


@dataclass(frozen=True)
class Footprint:
    """Holds the number of bytes that parts of a model need."""

    block: int
    """Bytes of the weights of the largest decoder block."""
    ends: int
    """Bytes of the weights that head and tail hold besides their blocks."""
    kv_row: int
    """Bytes of one KV cache row in the block that keeps most."""
    forward_row: int
    """Bytes of activations per row of a forward."""
    loading: int = 0
    """Bytes of one block before it is quantized, which must fit beside the blocks that are; 0 without quantization."""


def count_blocks_that_fit(
    room: int, footprint: Footprint, *, kv_tokens: int, forward_rows: int, blocks: int, store: int | None = None
) -> int:
    """Return how many of `blocks` blocks fit into `room` bytes.

    Each block has `kv_tokens` KV rows, and a forward at most `forward_rows` rows.  If weights are offloaded, `store` is
    the number of bytes for them, and `room` holds the weights of only two blocks, however many are hosted.  Memory for
    the ends is always included, because any node may become head or tail.  Raises BadRequest if not one block fits.
    """
    available = room * USABLE_SHARE - footprint.ends - footprint.loading - footprint.forward_row * forward_rows
    per_block = footprint.block + footprint.kv_row * kv_tokens
    if store is None:
        fit = min(blocks, math.floor(available / per_block))
    else:
        in_room = math.floor((available - SLOTS * footprint.block) / (footprint.kv_row * kv_tokens))
        fit = min(blocks, in_room, math.floor(store * USABLE_SHARE / footprint.block))
    if fit < 1:
        if store is not None and store * USABLE_SHARE < footprint.block:
            raise BadRequest(
                f"not one block fits: {format_bytes(store)} are free to keep weights in, one block needs "
                f"{format_bytes(footprint.block / USABLE_SHARE)}: free some, or choose a smaller --dtype"
            )
        weights = footprint.block * (1 if store is None else SLOTS)
        needed = weights + footprint.kv_row * kv_tokens + footprint.ends + footprint.forward_row * forward_rows
        needed += footprint.loading
        raise BadRequest(
            f"not one block fits: {format_bytes(room)} are free, one block with {kv_tokens} KV rows needs "
            f"{format_bytes(needed / USABLE_SHARE)}: lower --kv-tokens, choose a smaller --dtype or another --device"
        )
    return fit


def read_footprint(
    folder: Path, dtype: torch.dtype, quantization: str = "none", skeleton: PreTrainedModel | None = None
) -> Footprint:
    """Return the footprint of a model, read from its checkpoint's headers and its modules without weights.

    `skeleton` is the model without weights, in any dtype, if it has been built.  Raises ModelError, and
    UnsupportedModel.
    """
    skeleton = build_skeleton(folder, dtype) if skeleton is None else skeleton
    width = dtype.itemsize
    by_block: Counter[int] = Counter()
    unquantized: Counter[int] = Counter()
    ends, embeddings = 0, 0
    embedding_shape = tuple(skeleton.get_output_embeddings().weight.shape)
    for name, shape in weight_shapes(folder).items():
        size = math.prod(shape) * width
        block = block_of(name)
        if block is not None:
            unquantized[block] += size
            by_block[block] += _quantized_size(shape, size, quantization)
        else:
            ends += size
            embeddings += tuple(shape) == embedding_shape
    blocks = find_blocks(skeleton)
    kv_numbers = [_kv_numbers(layer, skeleton.config) for layer in blocks.layers]
    return Footprint(
        block=max(by_block.values(), default=0),
        ends=ends + _head_bytes(embedding_shape, embeddings, width),
        kv_row=max(kv_numbers) * width,
        forward_row=ACTIVATION_COPIES * int(skeleton.config.hidden_size) * ExtraInputs(skeleton, blocks).streams * 4,
        loading=0 if quantization == "none" else max(unquantized.values(), default=0),
    )


def _kv_numbers(layer: torch.nn.Module, config: Any) -> int:
    """Return how many numbers a block keeps per token: by its attentions, or keys and values of the hidden size."""
    try:
        return sum(shape.numbers for shape in kv_shapes([layer]).values())
    except UnsupportedModel:  # Other names: what blocks keep is seen when they are loaded.
        return 2 * int(config.hidden_size)


def _head_bytes(shape: tuple[int, ...], stored: int, width: int) -> int:
    """Return what the LM head needs besides the `stored` matrices of the embedding's shape in the checkpoint.

    It computes in float32: in 16 bits it is a copy in place of its own matrix, or beside the embedding it is tied to.
    """
    size = math.prod(shape)
    return 0 if width == torch.float32.itemsize else size * torch.float32.itemsize - max(0, stored - 1) * size * width


def _quantized_size(shape: tuple[int, ...], size: int, quantization: str) -> int:
    """Return the bytes of a block's tensor that has `size` bytes unquantized.

    Matrices are quantized, and so are those of experts, [experts, out, in].
    """
    if quantization == "none" or len(shape) not in (2, 3) or not KINDS[quantization].fits(torch.Size(shape[-2:])):
        return size
    return math.prod(shape[:-2]) * KINDS[quantization].count_bytes(shape[-2], shape[-1])


def offload_room(offload: str) -> int | None:
    """Return the bytes available for offloaded weights, or None if nothing is offloaded."""
    if offload == "disk":
        return shutil.disk_usage(tempfile.gettempdir()).free
    return free_memory(torch.device("cpu")) if offload == "ram" else None


def free_memory(device: torch.device) -> int:
    """Return the bytes that a new program could use on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

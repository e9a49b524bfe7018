"""How many decoder blocks does this machine hold?  Sizes are read from the checkpoint, room from the machine."""

import math
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from treeswarm.errors import BadRequest
from treeswarm.model_files import BLOCK, read_config, read_header, weight_files
from treeswarm_node.model.quantization import BITS
from treeswarm_node.model.quantization import BLOCK as BLOCK_OF_WEIGHTS

# Of the memory that is free now: the allocator's own waste, and whatever else the owner does meanwhile.
USABLE = 0.85
# Activations of one forward live several times over in a decoder layer (query, key, value, gate, up, residual); the
# widest families seen need less than this many times the hidden size.
ACTIVATION_COPIES = 24
# Offloaded weights pass through two of them: one computes, one is filled.
SLOTS = 2


@dataclass(frozen=True)
class Footprint:
    """Bytes.  `block` is the largest decoder block's weights, `ends` what head and tail hold besides."""

    block: int
    ends: int
    kv_row: int
    """One KV cache row in one block."""
    forward_row: int
    """One row of a forward."""


def count_blocks_that_fit(
    room: int, footprint: Footprint, *, kv_tokens: int, forward_rows: int, blocks: int, store: int | None = None
) -> int:
    """How many blocks `room` bytes hold, with `kv_tokens` KV rows in each and forwards of `forward_rows`.

    `store`: weights are offloaded there, so many bytes; then `room` holds two blocks' weights, whatever their number.
    Whoever may become head or tail must have room for the ends.  Raises BadRequest if not even one fits.
    """
    left = room * USABLE - footprint.ends - footprint.forward_row * forward_rows
    each = footprint.block + footprint.kv_row * kv_tokens
    if store is None:
        fit = min(blocks, math.floor(left / each))
    else:
        kept = math.floor((left - SLOTS * footprint.block) / (footprint.kv_row * kv_tokens))
        fit = min(blocks, kept, math.floor(store * USABLE / footprint.block))
    if fit < 1:
        raise BadRequest(
            f"not one block fits: {room / 2**30:.1f} GiB are free, one block with {kv_tokens} KV rows needs "
            f"{(each + footprint.ends) / 2**30:.1f}: lower --kv-tokens, choose a smaller --dtype or another --device"
        )
    return fit


def read_footprint(folder: Path, dtype: torch.dtype, quantization: str = "none") -> Footprint:
    """From the checkpoint's headers and config.  Raises ModelError."""
    config = read_config(folder)
    text = config.get("text_config") or config
    width = dtype.itemsize
    by_block: Counter[int] = Counter()
    ends = 0
    for file in weight_files(folder):
        for name, entry in read_header(folder / file).items():
            if name == "__metadata__":
                continue
            size = math.prod(entry["shape"]) * width
            block = BLOCK.search(name)
            if block:
                size = _quantized(entry["shape"], size, quantization)
                by_block[int(block[1])] += size
            else:
                ends += size
    heads = int(text.get("num_key_value_heads") or text["num_attention_heads"])
    head_dim = int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])
    return Footprint(
        block=max(by_block.values(), default=0),
        ends=ends,
        kv_row=2 * heads * head_dim * width,
        forward_row=ACTIVATION_COPIES * int(text["hidden_size"]) * 4,
    )


def _quantized(shape: list[int], size: int, quantization: str) -> int:
    """Bytes of a block's tensor of that shape, `size` as it is: matrices are quantized, and have scales."""
    if quantization == "none" or len(shape) != 2:
        return size
    return math.prod(shape) * BITS[quantization] // 8 + math.prod(shape) // BLOCK_OF_WEIGHTS[quantization] * 4


def offload_room(offload: str) -> int | None:
    """Bytes that offloaded weights may take; None: nothing is offloaded."""
    if offload == "disk":
        return shutil.disk_usage(tempfile.gettempdir()).free
    return free_memory(torch.device("cpu")) if offload == "ram" else None


def free_memory(device: torch.device) -> int:
    """Bytes that a new program could use on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

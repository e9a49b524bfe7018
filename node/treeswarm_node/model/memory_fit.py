"""Compute how many decoder blocks fit into this machine's memory, from the sizes of a model's parts."""

import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from treeswarm.errors import BadRequest
from treeswarm.programs.units import format_bytes
from treeswarm.protocol.spans import Span
from treeswarm.topology.span_limits import SpanLimits

# Share of the free memory that is planned with.  The rest is for the allocator's waste and for what else the owner does
# meanwhile.
USABLE_SHARE = 0.85
# Number of blocks on the device when weights are offloaded: one computes while the next one is loaded.
SLOTS = 2


@dataclass(frozen=True)
class EndWeights:
    """Holds the number of bytes of weights besides the blocks, by the ends of the model that a span includes."""

    middle: int = 0
    """Bytes that every node holds: nothing in most families."""
    head: int = 0
    """Bytes with the first block: the embedding."""
    tail: int = 0
    """Bytes with the last block: final norm and LM head."""
    whole: int = 0
    """Bytes with both; tied embeddings may be one matrix."""

    def of(self, span: Span, blocks: int) -> int:
        """Return the bytes with a span of a model of `blocks` blocks."""
        if len(span) == blocks:
            return self.whole
        return self.head if span.start == 0 else self.tail if span.end == blocks else self.middle


@dataclass(frozen=True)
class Footprint:
    """Holds the number of bytes that parts of a model need."""

    block: int
    """Bytes of the weights of the largest decoder block."""
    ends: EndWeights
    """Bytes of the weights that nodes hold besides their blocks."""
    kv_row: int
    """Bytes of one KV cache row in the block that keeps most."""
    forward_row: int
    """Bytes of activations per row of a forward."""
    loading: int = 0
    """Bytes that loading needs beside the weights that are loaded already."""
    checking: int = 0
    """Bytes that preparing and checking the loaded blocks needs beside weights and KV cache."""
    expanding: int = 0
    """Bytes of the largest matrix that is expanded where it is used; 0 if all are expanded while they are loaded."""


@dataclass(frozen=True)
class NodeRoom:
    """Holds what a node has for its blocks, and what it computes with them."""

    memory: int
    """Number of bytes on the device."""
    store: int | None
    """Number of bytes for offloaded weights, or None if nothing is offloaded."""
    kv_tokens: int
    """Number of rows of the KV cache."""
    forward_rows: int
    """Most rows of a forward."""
    speculator: int = 0
    """Number of bytes of a speculator, which the node needs with the last block."""
    speculator_gives_way: bool = False
    """Whether the speculator is left out where the last block, or the whole model, would not fit with it."""
    taps: int = 0
    """Number of bytes that a node without the last block may need to add its taps to those of other nodes."""


def count_blocks_that_fit(room: NodeRoom, footprint: Footprint, blocks: int) -> SpanLimits:
    """Return how many of a model's `blocks` blocks fit at most, by the ends of the model that a span includes.

    If weights are offloaded, the device holds the weights of only two blocks, however many are hosted.  Raises
    BadRequest if not one block fits.
    """
    ends, speculator, most = footprint.ends, room_for_speculator(room, footprint, blocks), blocks - 1
    middle, head = (_count(room, footprint, of_span + room.taps) for of_span in (ends.middle, ends.head))
    tail, whole = (_count(room, footprint, of_span + speculator) for of_span in (ends.tail, ends.whole))
    limits = SpanLimits(min(middle, most), min(head, most), min(tail, most), whole=whole >= blocks)
    if not (limits.longest or limits.whole):
        raise BadRequest(_explain_no_room(room, footprint))
    return limits


def room_for_speculator(room: NodeRoom, footprint: Footprint, blocks: int) -> int:
    """Return the bytes that are planned for the speculator, or 0 if it gives way."""
    ends = footprint.ends
    if not room.speculator_gives_way:
        return room.speculator
    for of_span, needed in ((ends.tail, 1), (ends.whole, blocks)):
        without, beside = (_count(room, footprint, of_span + more) for more in (0, room.speculator))
        if without >= needed > beside:
            return 0
    return room.speculator


def peak_bytes(blocks: int, room: NodeRoom, footprint: Footprint, ends: int) -> int:
    """Return the most bytes that a node needs on its device, for a span with `ends` bytes besides its blocks."""
    held = blocks if room.store is None else min(blocks, SLOTS)
    cache = footprint.kv_row * room.kv_tokens * blocks
    computing = max(footprint.checking, footprint.forward_row * room.forward_rows + footprint.expanding)
    return footprint.block * held + ends + max(footprint.loading, cache + computing)


def _count(room: NodeRoom, footprint: Footprint, ends: int) -> int:
    """Return how many blocks fit beside `ends` bytes of other weights."""
    available = room.memory * USABLE_SHARE - ends
    computing = available - max(footprint.checking, footprint.forward_row * room.forward_rows + footprint.expanding)
    cache = footprint.kv_row * room.kv_tokens
    if room.store is None:
        loaded = math.floor((available - footprint.loading) / footprint.block)
        return max(0, min(loaded, math.floor(computing / (footprint.block + cache))))
    if available - footprint.loading < SLOTS * footprint.block:
        return 0
    in_room = math.floor((computing - SLOTS * footprint.block) / cache)
    return max(0, min(in_room, math.floor(room.store * USABLE_SHARE / footprint.block)))


def _explain_no_room(room: NodeRoom, footprint: Footprint) -> str:
    if room.store is not None and room.store * USABLE_SHARE < footprint.block:
        return (
            f"not one block fits: {format_bytes(room.store)} are free to keep weights in, one block needs "
            f"{format_bytes(footprint.block / USABLE_SHARE)}: free some, or choose a smaller --dtype"
        )
    blocks = 1 if room.store is None else SLOTS
    needed = peak_bytes(blocks, room, footprint, min(footprint.ends.middle, footprint.ends.head, footprint.ends.tail))
    return (
        f"not one block fits: {format_bytes(room.memory)} are free, one block with {room.kv_tokens} KV rows needs "
        f"{format_bytes(needed / USABLE_SHARE)}: lower --kv-tokens, choose a smaller --dtype or another --device"
    )


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

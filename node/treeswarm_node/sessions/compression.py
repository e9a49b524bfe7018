"""Decide which rows are compressed on their way to the next node; `treeswarm.wire.byte_planes` compresses them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from treeswarm.errors import BadRequest
from treeswarm.protocol.address import Address, is_loopback
from treeswarm.protocol.messages import Append, NumericsClass
from treeswarm.wire.byte_planes import compress, decompress

# Compressing and decompressing 32 KiB of bfloat16 took 0.1 to 0.2 ms and saved 22 %, 58 kbit (2026-11-21,
# docs/decisions/).  It breaks even at 300 to 600 Mbit/s; below this rate it pays clearly.
SLOW_BITS_PER_S = 200e6
# Compressing this many bytes takes about half a millisecond: other tasks should not wait longer for the event loop.
LARGE_BYTES = 1 << 17


@dataclass(frozen=True)
class LinkCompression:
    """The owner's choice of compression, and what is known about this node's line."""

    mode: str = "none"
    """`auto` (compress where it pays), `none` (never) or `lossless` (always)."""
    rate: float | None = None
    """Rate of the line out in bits per second, or None if the owner gave none."""
    host: str = ""
    """Host under which other machines find this node."""

    def value_bytes(self, numerics: NumericsClass, next_hop: str) -> int:
        """Return the bytes per value of rows to compress for the node at `next_hop`, or 0 to leave them as they are."""
        if self.mode == "none":
            return 0
        size = _value_bytes(numerics)
        # In float32, compression saves 7 %; 8-bit rows were not measured.
        pays = size == 2 and self._slow_to(next_hop)
        return size if pays or self.mode == "lossless" else 0

    def _slow_to(self, address: str) -> bool:
        if self.rate is not None:
            return self.rate < SLOW_BITS_PER_S
        try:
            host = Address.parse(address).host
        except BadRequest:
            return False  # Dialling the address reports the error.
        return host != self.host and not is_loopback(host)


def _value_bytes(numerics: NumericsClass) -> int:
    if numerics.activations:
        return 1
    return 4 if numerics.dtype == "float32" else 2


async def run_by_size(work: Callable[[Append, int], Append], append: Append, argument: int, size: int) -> Append:
    """Return `work(append, argument)`, computed in a thread if the rows have at least LARGE_BYTES.

    `work` is `compress_rows` or `decompress_rows`, and `size` is the number of bytes of the plain rows.  Raises what
    `work` raises.
    """
    if size < LARGE_BYTES:
        return work(append, argument)
    return await asyncio.to_thread(work, append, argument)


def compress_rows(append: Append, value_bytes: int) -> Append:
    """Return the append with its rows compressed, or the append itself if that would not make it smaller."""
    compressed = compress(append.hidden, value_bytes)
    return append if compressed is None else replace(append, hidden=compressed, planes=value_bytes)


def decompress_rows(append: Append, row_bytes: int) -> Append:
    """Return the append with its rows as they were before compression.

    `row_bytes` is the number of bytes of each row, 0 towards the head.  Raises Malformed.
    """
    size = int((~append.skipped).sum()) * row_bytes
    return replace(append, hidden=decompress(append.hidden, append.planes, size), planes=0)

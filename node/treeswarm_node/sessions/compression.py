"""Whether rows are worth packing on their way to the next node; `treeswarm.wire.byte_planes` packs."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from treeswarm.errors import BadRequest
from treeswarm.protocol.address import Address, is_loopback
from treeswarm.protocol.messages import Append, NumericsClass
from treeswarm.wire.byte_planes import compress, decompress

# Packing and unpacking 32 KiB of bfloat16 took 0.1 to 0.2 ms and saved 22 %, 58 kbit (2026-11-21, docs/log.md): even at
# 300 to 600 Mbit/s.  Below this rate it pays clearly.
SLOW_BITS_PER_S = 200e6
# As much takes about half a millisecond: longer than others should wait for the event loop.
LARGE_BYTES = 1 << 17


@dataclass(frozen=True)
class LinkCompression:
    """What an owner said of it, and what is known of the line."""

    compression: str = "none"
    """`auto`, `none` or `lossless`: where it pays, never, always."""
    rate: float | None = None
    """Bits a second of the line out, where somebody said so."""
    host: str = ""
    """Under which others find this machine."""

    def value_bytes(self, numerics: NumericsClass, next_hop: str) -> int:
        """Of each value in the rows to be packed for the node at `next_hop`; 0: they go as they are."""
        if self.compression == "none":
            return 0
        size = _value_bytes(numerics)
        # In float32, 7 % is saved, and 8-bit rows were not measured.
        worth = size == 2 and self._slow_to(next_hop)
        return size if worth or self.compression == "lossless" else 0

    def _slow_to(self, address: str) -> bool:
        if self.rate is not None:
            return self.rate < SLOW_BITS_PER_S
        try:
            host = Address.parse(address).host
        except BadRequest:
            return False  # dialling it will say so
        return host != self.host and not is_loopback(host)


def _value_bytes(numerics: NumericsClass) -> int:
    if numerics.activations:
        return 1
    return 4 if numerics.dtype == "float32" else 2


async def by_size(work: Callable[[Append, int], Append], append: Append, argument: int, size: int) -> Append:
    """`packed` or `unpacked` of rows of so many bytes; large ones in a thread.  Raises what `work` does."""
    if size < LARGE_BYTES:
        return work(append, argument)
    return await asyncio.to_thread(work, append, argument)


def packed(append: Append, value_bytes: int) -> Append:
    """With its rows packed, where that makes them smaller."""
    small = compress(append.hidden, value_bytes)
    return append if small is None else replace(append, hidden=small, planes=value_bytes)


def unpacked(append: Append, row_bytes: int) -> Append:
    """With its rows as they were before; `row_bytes` each, 0 towards the head.  Raises Malformed."""
    size = int((~append.skipped).sum()) * row_bytes
    return replace(append, hidden=decompress(append.hidden, append.planes, size), planes=0)

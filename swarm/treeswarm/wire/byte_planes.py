"""Rows of activations in fewer bytes, losing nothing: byte planes, then zstd.  Of nodes alone; the codec only says how.

The values' first bytes come first, then their second bytes, and so on: a float's sign and exponent change little from
value to value and compress, its mantissa does not.
"""

import numpy as np
import zstandard

from treeswarm.errors import Malformed
from treeswarm.protocol.messages import MAX_MESSAGE_BYTES

# Higher levels take several times as long and save next to nothing: what repeats is the exponents alone.
LEVEL = 1


def compress(data: bytes, value_bytes: int) -> bytes | None:
    """`data` as one zstd frame of its byte planes; None where that is not smaller."""
    if not data or len(data) % value_bytes:
        return None
    packed = zstandard.ZstdCompressor(level=LEVEL).compress(_transposed(data, -1, value_bytes))
    return packed if len(packed) < len(data) else None


def decompress(packed: bytes, value_bytes: int, size: int) -> bytes:
    """The `size` bytes that were packed.  Raises Malformed when anything else is in there; no more memory than `size`
    is taken to find out."""
    # Unpacked rows would have had to fit a message as well.
    if not 0 < size <= MAX_MESSAGE_BYTES or size % value_bytes:
        raise Malformed(f"hidden: packed activations where {size} bytes of them belong")
    try:
        # zstd believes the frame's own word about its size before any limit it is given, so that is read first.
        told = zstandard.get_frame_parameters(packed).content_size
        if told != size:
            raise Malformed(f"hidden: packed activations of {told} bytes, expected {size}")
        planes = zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Malformed(f"hidden: packed activations that cannot be unpacked: {error}") from None
    if len(planes) != size:
        raise Malformed(f"hidden: packed activations of {len(planes)} bytes, expected {size}")
    return _transposed(planes, value_bytes, -1)


def _transposed(data: bytes, rows: int, columns: int) -> bytes:
    return np.frombuffer(data, np.uint8).reshape(rows, columns).T.tobytes()

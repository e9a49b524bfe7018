"""Lossless compression of activation rows: byte planes, then zstd.

Only nodes use this module; the codec merely carries how the rows are compressed.  In the planes, the first bytes of all
values come first, then their second bytes, and so on.  A float's sign and exponent change little from value to value
and compress well; its mantissa does not.
"""

import numpy as np
import zstandard

from treeswarm.errors import Malformed
from treeswarm.protocol.messages import MAX_MESSAGE_BYTES

# Higher levels take several times as long and save almost nothing more, because only the exponents repeat.
LEVEL = 1


def compress(data: bytes, value_bytes: int) -> bytes | None:
    """Return `data`, values of `value_bytes` bytes, as one zstd frame of its byte planes.

    Return None if `data` is empty or not a whole number of values, or if the frame is not smaller.
    """
    if not data or len(data) % value_bytes:
        return None
    compressed = zstandard.ZstdCompressor(level=LEVEL).compress(_transposed(data, -1, value_bytes))
    return compressed if len(compressed) < len(data) else None


def decompress(compressed: bytes, value_bytes: int, size: int) -> bytes:
    """Return the `size` bytes that were compressed.

    Raises Malformed if the frame contains anything else, without using more memory than `size` bytes.
    """
    # Uncompressed rows would have had to fit a message as well.
    if not 0 < size <= MAX_MESSAGE_BYTES or size % value_bytes:
        raise Malformed(f"hidden: compressed activations where {size} bytes of activations belong")
    try:
        # zstd allocates what the frame declares as its size, whatever limit it is given.  So the declared size is
        # checked first.
        declared = zstandard.get_frame_parameters(compressed).content_size
        if declared != size:
            raise Malformed(f"hidden: compressed activations of {declared} bytes, expected {size}")
        planes = zstandard.ZstdDecompressor().decompress(compressed, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Malformed(f"hidden: compressed activations that cannot be decompressed: {error}") from None
    if len(planes) != size:
        raise Malformed(f"hidden: compressed activations of {len(planes)} bytes, expected {size}")
    return _transposed(planes, value_bytes, -1)


def _transposed(data: bytes, rows: int, columns: int) -> bytes:
    return np.frombuffer(data, np.uint8).reshape(rows, columns).T.tobytes()

"""Tests of row compression: it is lossless, and a frame with other content is Malformed without using memory."""

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from treeswarm.errors import Malformed
from treeswarm.protocol.messages import MAX_MESSAGE_BYTES
from treeswarm.wire.byte_planes import compress, decompress

widths = st.sampled_from([1, 2, 4])


def activations(rows: int, width: int = 64) -> bytes:
    """Return normally distributed values in bfloat16, as a model's activations are."""
    values = np.random.default_rng(rows).standard_normal((rows, width)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


ROWS = activations(64)
COMPRESSED = compress(ROWS, 2) or b""


def test_activations_are_compressed_without_loss() -> None:
    assert 0 < len(COMPRESSED) < 0.85 * len(ROWS)
    assert decompress(COMPRESSED, 2, len(ROWS)) == ROWS


@settings(max_examples=200, deadline=None)
@given(
    data=st.one_of(
        st.binary(max_size=400),
        st.tuples(st.binary(min_size=1, max_size=8), st.integers(1, 500)).map(lambda pair: pair[0] * pair[1]),
    ),
    width=widths,
)
def test_compression_is_lossless_for_any_bytes(data: bytes, width: int) -> None:
    compressed = compress(data, width)
    if compressed is not None:
        assert len(compressed) < len(data)
        assert decompress(compressed, width, len(data)) == data


def test_incompressible_rows_are_not_compressed() -> None:
    assert compress(b"", 2) is None
    assert compress(np.random.default_rng(0).bytes(4096), 2) is None
    assert compress(bytes(4097), 2) is None, "not a whole number of values"


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=100),
    place=st.integers(0, len(COMPRESSED) - 1),
    byte=st.integers(0, 255),
    width=widths,
)
def test_corrupt_frame_is_malformed_or_has_the_right_size(data: bytes, place: int, byte: int, width: int) -> None:
    corrupt = COMPRESSED[:place] + bytes([byte]) + COMPRESSED[place + 1 :]
    for candidate in (data, corrupt, COMPRESSED[:place], COMPRESSED + data):
        try:
            assert len(decompress(candidate, width, len(ROWS))) == len(ROWS)
        except Malformed as error:
            assert str(error).startswith("hidden")


@pytest.mark.parametrize("end", [0, 1, 4, 5, 8, len(COMPRESSED) // 2, len(COMPRESSED) - 1])
def test_truncated_frame_is_malformed(end: int) -> None:
    with pytest.raises(Malformed, match="hidden"):
        decompress(COMPRESSED[:end], 2, len(ROWS))


def zstd_frame(declared: int, blocks: bytes) -> bytes:
    """Return a hand-made zstd frame of one segment that declares a content of `declared` bytes."""
    return bytes.fromhex("28b52ffde0") + declared.to_bytes(8, "little") + blocks


def repeat_block(count: int) -> bytes:
    """Return a last block, four bytes long, that stands for one byte repeated `count` times."""
    return (count << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"


@pytest.mark.parametrize(
    "compressed",
    [
        zstd_frame(1 << 40, repeat_block(1 << 17)),
        zstd_frame(1 << 62, repeat_block(1 << 17)),
        zstd_frame(len(ROWS), repeat_block(1 << 17)),
        zstd_frame(len(ROWS), repeat_block(1)),
        zstandard.ZstdCompressor().compress(bytes(1 << 24)),
        zstandard.ZstdCompressor(write_content_size=False).compress(ROWS),
        COMPRESSED + COMPRESSED,
        COMPRESSED + b"\0",
        bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + bytes(4),
    ],
    ids=[
        "huge",
        "hugest",
        "longer than declared",
        "shorter than declared",
        "zeros",
        "undeclared",
        "two",
        "more",
        "skippable",
    ],
)
def test_frame_of_wrong_size_is_malformed(compressed: bytes) -> None:
    with pytest.raises(Malformed, match="hidden"):
        decompress(compressed, 2, len(ROWS))


def test_hand_made_frame_is_valid() -> None:
    assert decompress(zstd_frame(4096, repeat_block(4096)), 2, 4096) == bytes(4096)


@pytest.mark.parametrize(("size", "width"), [(0, 2), (-2, 2), (1, 2), (6, 4), (MAX_MESSAGE_BYTES + 4, 4)], ids=range(5))
def test_impossible_sizes_are_malformed(size: int, width: int) -> None:
    compressed = zstandard.ZstdCompressor().compress(bytes(max(0, size)))
    with pytest.raises(Malformed, match=f"where {size} bytes"):
        decompress(compressed, width, size)

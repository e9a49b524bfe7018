"""Packed rows: what comes back is what went in; whatever else is in a frame is Malformed, and costs nothing."""

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
    """As a model's: normal, in bfloat16."""
    values = np.random.default_rng(rows).standard_normal((rows, width)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()


ROWS = activations(64)
PACKED = compress(ROWS, 2) or b""


def test_activations_become_smaller_and_come_back() -> None:
    assert 0 < len(PACKED) < 0.85 * len(ROWS)
    assert decompress(PACKED, 2, len(ROWS)) == ROWS


@settings(max_examples=200, deadline=None)
@given(
    data=st.one_of(
        st.binary(max_size=400),
        st.tuples(st.binary(min_size=1, max_size=8), st.integers(1, 500)).map(lambda pair: pair[0] * pair[1]),
    ),
    width=widths,
)
def test_whatever_is_packed_comes_back(data: bytes, width: int) -> None:
    packed = compress(data, width)
    if packed is not None:
        assert len(packed) < len(data)
        assert decompress(packed, width, len(data)) == data


def test_what_would_not_become_smaller_is_left_alone() -> None:
    assert compress(b"", 2) is None
    assert compress(np.random.default_rng(0).bytes(4096), 2) is None
    assert compress(bytes(4097), 2) is None, "no whole values"


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=100),
    place=st.integers(0, len(PACKED) - 1),
    byte=st.integers(0, 255),
    width=widths,
)
def test_garbled_frames_are_malformed_or_as_long_as_they_should_be(
    data: bytes, place: int, byte: int, width: int
) -> None:
    garbled = PACKED[:place] + bytes([byte]) + PACKED[place + 1 :]
    for tried in (data, garbled, PACKED[:place], PACKED + data):
        try:
            assert len(decompress(tried, width, len(ROWS))) == len(ROWS)
        except Malformed as error:
            assert str(error).startswith("hidden")


@pytest.mark.parametrize("end", [0, 1, 4, 5, 8, len(PACKED) // 2, len(PACKED) - 1])
def test_a_truncated_frame_is_malformed(end: int) -> None:
    with pytest.raises(Malformed, match="hidden"):
        decompress(PACKED[:end], 2, len(ROWS))


def frame(told: int, blocks: bytes) -> bytes:
    """By hand: a zstd frame of one segment that says its content has `told` bytes."""
    return bytes.fromhex("28b52ffde0") + told.to_bytes(8, "little") + blocks


def repeated(count: int) -> bytes:
    """A last block: one byte, `count` times; four bytes on the wire."""
    return (count << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"


@pytest.mark.parametrize(
    "packed",
    [
        frame(1 << 40, repeated(1 << 17)),
        frame(1 << 62, repeated(1 << 17)),
        frame(len(ROWS), repeated(1 << 17)),
        frame(len(ROWS), repeated(1)),
        zstandard.ZstdCompressor().compress(bytes(1 << 24)),
        zstandard.ZstdCompressor(write_content_size=False).compress(ROWS),
        PACKED + PACKED,
        PACKED + b"\0",
        bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + bytes(4),
    ],
    ids=["huge", "hugest", "longer than told", "shorter than told", "zeros", "untold", "two", "more", "skippable"],
)
def test_a_frame_of_another_size_than_its_rows_is_malformed(packed: bytes) -> None:
    with pytest.raises(Malformed, match="hidden"):
        decompress(packed, 2, len(ROWS))


def test_the_frame_made_by_hand_is_one() -> None:
    assert decompress(frame(4096, repeated(4096)), 2, 4096) == bytes(4096)


@pytest.mark.parametrize(("size", "width"), [(0, 2), (-2, 2), (1, 2), (6, 4), (MAX_MESSAGE_BYTES + 4, 4)], ids=range(5))
def test_rows_that_cannot_have_been_packed_are_malformed(size: int, width: int) -> None:
    packed = zstandard.ZstdCompressor().compress(bytes(max(0, size)))
    with pytest.raises(Malformed, match=f"where {size} bytes"):
        decompress(packed, width, size)

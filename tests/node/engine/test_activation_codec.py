"""Activation rows are encoded as bytes and decoded again."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treeswarm.protocol.messages import ACTIVATION_BLOCK, NumericsClass
from treeswarm_node.engine.activation_codec import make_row_codec


@st.composite
def activation_rows(draw: st.DrawFn) -> np.ndarray:
    """Draw rows float32 [n, 100] with values from tiny to huge, some of them zero."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = random.standard_normal((draw(st.integers(0, 5)), 100)) * 10.0 ** draw(st.integers(-9, 5))
    return (rows * (random.random(rows.shape) < draw(st.floats(0, 1)))).astype(np.float32)


@given(rows=activation_rows(), activations=st.sampled_from(["", "int8"]))
def test_row_length_is_that_of_the_numerics_class(rows: np.ndarray, activations: str) -> None:
    data = make_row_codec(activations, 100).encode(torch.from_numpy(rows))
    assert len(data) == len(rows) * NumericsClass("00", "float32", activations=activations).row_bytes(100)


@given(activation_rows())
def test_int8_error_is_at_most_half_a_level(rows: np.ndarray) -> None:
    codec = make_row_codec("int8", 100)
    decoded = codec.decode(codec.encode(torch.from_numpy(rows)), torch.float32).numpy()
    largest = np.pad(np.abs(rows), ((0, 0), (0, 28))).reshape(len(rows), 2, ACTIVATION_BLOCK).max(-1)
    # Half a level, and the rounding of the scale to float16, which is absolute below its normal range.
    allowed = (largest / 127 * (0.5 + 127 * 2**-11) + 127 * 2**-24).repeat(ACTIVATION_BLOCK, 1)[:, :100]
    assert (np.abs(decoded - rows) <= allowed * 1.001).all()


@given(activation_rows())
def test_native_rows_round_trip(rows: np.ndarray) -> None:
    codec = make_row_codec("", 100)
    for dtype in (torch.float32, torch.bfloat16):
        sent = torch.from_numpy(rows).to(dtype)
        assert torch.equal(codec.decode(codec.encode(sent), dtype), sent)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_stay_so(value: float) -> None:
    rows = torch.ones(2, 100)
    rows[1, 70] = value
    codec = make_row_codec("int8", 100)
    decoded = codec.decode(codec.encode(rows), torch.float32)
    assert torch.isfinite(decoded[0]).all()
    assert not torch.isfinite(decoded[1]).all()


def test_encoding_a_row_does_not_depend_on_other_rows() -> None:
    rows, codec = torch.randn(4, 100), make_row_codec("int8", 100)
    assert codec.encode(rows) == b"".join(codec.encode(row[None]) for row in rows)

"""Rows as bytes and back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treeswarm.protocol.messages import ACTIVATION_BLOCK, NumericsClass
from treeswarm_node.engine.activation_codec import make_row_codec


@st.composite
def many_rows(draw: st.DrawFn) -> np.ndarray:
    """float32 [n, 100], from tiny to huge, some of it zero."""
    chance = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = chance.standard_normal((draw(st.integers(0, 5)), 100)) * 10.0 ** draw(st.integers(-9, 5))
    return (rows * (chance.random(rows.shape) < draw(st.floats(0, 1)))).astype(np.float32)


@given(rows=many_rows(), activations=st.sampled_from(["", "int8"]))
def test_every_row_has_the_bytes_that_its_class_says(rows: np.ndarray, activations: str) -> None:
    packed = make_row_codec(activations, 100).encode(torch.from_numpy(rows))
    assert len(packed) == len(rows) * NumericsClass("00", "float32", activations=activations).row_bytes(100)


@given(many_rows())
def test_8_bits_are_off_by_half_a_level_at_most(rows: np.ndarray) -> None:
    codec = make_row_codec("int8", 100)
    back = codec.decode(codec.encode(torch.from_numpy(rows)), torch.float32).numpy()
    padded = np.pad(np.abs(rows), ((0, 0), (0, 28))).reshape(len(rows), 2, ACTIVATION_BLOCK).max(-1)
    # Half a level, and what float16 rounds off the scale; below its normal range that is an absolute amount.
    allowed = (padded / 127 * (0.5 + 127 * 2**-11) + 127 * 2**-24).repeat(ACTIVATION_BLOCK, 1)[:, :100]
    assert (np.abs(back - rows) <= allowed * 1.001).all()


@given(many_rows())
def test_native_rows_come_back_as_they_were(rows: np.ndarray) -> None:
    codec = make_row_codec("", 100)
    for dtype in (torch.float32, torch.bfloat16):
        sent = torch.from_numpy(rows).to(dtype)
        assert torch.equal(codec.decode(codec.encode(sent), dtype), sent)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    rows = torch.ones(2, 100)
    rows[1, 70] = bad
    codec = make_row_codec("int8", 100)
    back = codec.decode(codec.encode(rows), torch.float32)
    assert torch.isfinite(back[0]).all()
    assert not torch.isfinite(back[1]).all()


def test_a_row_does_not_depend_on_the_others() -> None:
    rows, codec = torch.randn(4, 100), make_row_codec("int8", 100)
    assert codec.encode(rows) == b"".join(codec.encode(row[None]) for row in rows)

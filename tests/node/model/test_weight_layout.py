"""Changing the memory layout of weights does not change their products."""

import pytest
import torch

from treeswarm_node.model import weight_layout
from treeswarm_node.model.weight_layout import choose_layouts, to_column_major


def make_linear(rows: int, columns: int, **options: torch.dtype) -> torch.nn.Linear:
    return torch.nn.Linear(columns, rows, bias=False, **options)


def test_column_major_weight_has_the_same_values() -> None:
    weight = torch.randn(5, 3)
    converted = to_column_major(weight)
    assert converted.equal(weight)
    assert converted.stride() == (1, 5)


@pytest.mark.parametrize("column_major_is_faster", [True, False])
def test_every_shape_gets_the_layout_measured_as_faster(
    column_major_is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def time_ratio(weight: torch.Tensor, other: torch.Tensor) -> float:
        assert other.equal(weight)
        measured.append(tuple(weight.shape))
        wide = weight.shape[0] > weight.shape[1]
        return 0.5 if wide and column_major_is_faster else 0.99

    monkeypatch.setattr(weight_layout, "_time_ratio", time_ratio)
    linears = [make_linear(64, 16), make_linear(16, 64), make_linear(64, 16)]
    hidden = {16: torch.randn(7, 16), 64: torch.randn(7, 64)}
    before = [linear(hidden[linear.in_features]) for linear in linears]
    assert choose_layouts(linears) == (2 if column_major_is_faster else 0)
    assert measured == [(64, 16), (16, 64)]
    assert [linear.weight.is_contiguous() for linear in linears] == [
        not column_major_is_faster,
        True,
        not column_major_is_faster,
    ]
    for linear, product in zip(linears, before, strict=True):
        torch.testing.assert_close(linear(hidden[linear.in_features]), product)


def test_measured_choice_does_not_change_products() -> None:
    """The test holds whichever layout is measured as faster."""
    linear, hidden = make_linear(32, 8), torch.randn(3, 8)
    product = linear(hidden)
    assert choose_layouts([linear]) in (0, 1)
    torch.testing.assert_close(linear(hidden), product)


def test_16_bit_and_large_weights_keep_their_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_layout, "_time_ratio", lambda weight, other: 0.1)
    monkeypatch.setattr(weight_layout, "MAX_BYTES", 4 * 32 * 8)
    halves, large, small = make_linear(32, 8, dtype=torch.bfloat16), make_linear(32, 9), make_linear(32, 8)
    assert choose_layouts([halves, large, small]) == 1
    assert [linear.weight.is_contiguous() for linear in (halves, large, small)] == [True, True, False]

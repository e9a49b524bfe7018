"""Weights by rows or by columns: the same products, faster."""

import pytest
import torch

from treeswarm_node.model import weight_layout as layout
from treeswarm_node.model.weight_layout import choose_layouts, to_column_major


def linear(out: int, into: int, **how: torch.dtype) -> torch.nn.Linear:
    return torch.nn.Linear(into, out, bias=False, **how)


def test_by_columns_the_numbers_are_the_same() -> None:
    weight = torch.randn(5, 3)
    turned = to_column_major(weight)
    assert turned.equal(weight)
    assert turned.stride() == (1, 5)


@pytest.mark.parametrize("columns_are_faster", [True, False])
def test_every_weight_of_a_shape_gets_the_layout_that_was_faster(
    columns_are_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def share(weight: torch.Tensor, other: torch.Tensor) -> float:
        assert other.equal(weight)
        measured.append(tuple(weight.shape))
        wide = weight.shape[0] > weight.shape[1]
        return 0.5 if wide and columns_are_faster else 0.99

    monkeypatch.setattr(layout, "_time_ratio", share)
    linears = [linear(64, 16), linear(16, 64), linear(64, 16)]
    hidden = {16: torch.randn(7, 16), 64: torch.randn(7, 64)}
    before = [each(hidden[each.in_features]) for each in linears]
    assert choose_layouts(linears) == (2 if columns_are_faster else 0)
    assert measured == [(64, 16), (16, 64)]
    assert [each.weight.is_contiguous() for each in linears] == [not columns_are_faster, True, not columns_are_faster]
    for each, product in zip(linears, before, strict=True):
        torch.testing.assert_close(each(hidden[each.in_features]), product)


def test_the_clock_decides() -> None:
    """Whatever it says, products stay."""
    each, hidden = linear(32, 8), torch.randn(3, 8)
    product = each(hidden)
    assert choose_layouts([each]) in (0, 1)
    torch.testing.assert_close(each(hidden), product)


def test_16_bits_and_what_has_no_room_twice_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_time_ratio", lambda weight, other: 0.1)
    monkeypatch.setattr(layout, "MAX_BYTES", 4 * 32 * 8)
    halves, large, small = linear(32, 8, dtype=torch.bfloat16), linear(32, 9), linear(32, 8)
    assert choose_layouts([halves, large, small]) == 1
    assert [each.weight.is_contiguous() for each in (halves, large, small)] == [True, True, False]

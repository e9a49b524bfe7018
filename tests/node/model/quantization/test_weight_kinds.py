"""Packed matrices multiply as their dequantized copies do, whatever rows stand beside a row."""

import pytest
import torch

from treeswarm.errors import BadRequest
from treeswarm_node.model.quantization import weight_kinds
from treeswarm_node.model.quantization.weight_kinds import (
    KINDS,
    ROW_STEPS,
    check_kind,
    has_integer_products,
    join_digits,
    split_digits,
)

CPU = torch.device("cpu")
SHAPE = torch.Size((96, 64))
# Largest difference of a kernel's product from float32's with the dequantized matrix, relative to its norm.
TOLERANCES = {"int8": 3e-4, "int4": 0.01, "nf4": 1e-5}
WEIGHT_ERRORS = {"int8": 0.01, "int4": 0.1, "nf4": 0.12}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    if KINDS[request.param].explain_unsupported(CPU) is not None:
        pytest.skip(f"{request.param} cannot be used here")
    return str(request.param)


def matrix_and_rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(40, SHAPE[1], generator=generator)
    rows[3, 5] = 300.0  # as in trained models, a few values are far larger than all others
    return torch.randn(*SHAPE, generator=generator) * torch.linspace(0.1, 3, SHAPE[0])[:, None], rows


def test_dequantized_weights_are_near_the_original(kind: str) -> None:
    weight, _ = matrix_and_rows()
    packing = KINDS[kind]
    error = (packing.dequantize(packing.pack(weight), SHAPE, torch.float32) - weight).norm() / weight.norm()
    assert 0 < error < WEIGHT_ERRORS[kind]


def test_products_equal_those_of_the_dequantized_weights(kind: str) -> None:
    weight, rows = matrix_and_rows()
    packing = KINDS[kind]
    parts = packing.pack(weight)
    expected = rows @ packing.dequantize(parts, SHAPE, torch.float32).t()
    error = (packing.multiply(rows, parts, SHAPE) - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < TOLERANCES[kind]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_row_s_product_is_the_same_beside_any_rows(name: str) -> None:
    packing = KINDS[name]
    if packing.explain_unsupported(CPU) is not None or not has_integer_products():
        pytest.skip("no such kernel here")
    weight, rows = matrix_and_rows()
    parts = packing.pack(weight)
    together = packing.multiply(rows, parts, SHAPE)
    for count in (1, 2, 3, 5, 17, 33):
        for first in range(0, len(rows) - count, 7):
            alone = packing.multiply(rows[first : first + count], parts, SHAPE)
            assert torch.equal(alone, together[first : first + count])


def test_int8_without_integer_products_dequantizes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows = matrix_and_rows()
    packing = KINDS["int8"]
    parts = packing.pack(weight)
    fast = packing.multiply(rows, parts, SHAPE)
    monkeypatch.setattr(weight_kinds, "has_integer_products", lambda: False)
    slow = packing.multiply(rows, parts, SHAPE)
    assert ((slow - fast).norm(dim=-1) / slow.norm(dim=-1)).max() < TOLERANCES["int8"]


def test_digits_hold_a_row_to_half_a_step() -> None:
    rows = torch.tensor([[1.0, -1.0, 0.3, 1e-9], [0.0, 0.0, 0.0, 0.0], [-5e4, 7.0, 0.1, 2.0]])
    digits, steps = split_digits(rows)
    assert digits.dtype == torch.int8
    restored = join_digits(digits.float(), steps)
    assert ((restored - rows).abs() <= steps / 2 * (1 + 1e-3)).all()
    assert torch.equal(restored[1], rows[1])
    torch.testing.assert_close(steps[:, 0], rows.abs().amax(1) / ROW_STEPS)


def test_bytes_of_a_kind_are_those_of_its_parts(kind: str) -> None:
    parts = KINDS[kind].pack(matrix_and_rows()[0])
    size = sum(tensor.nbytes for name, tensor in parts.items() if name != "code")
    assert KINDS[kind].count_bytes(*SHAPE) == size


def test_int4_is_refused_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadRequest, match="for CPUs, not for meta"):
        check_kind("int4", torch.device("meta"))
    monkeypatch.setattr(weight_kinds, "_has_int4_kernel", lambda: False)
    with pytest.raises(BadRequest, match="no kernel for it"):
        check_kind("int4", CPU)


def test_nf4_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_kinds, "missing_modules", lambda *_: ["bitsandbytes"])
    with pytest.raises(BadRequest, match="needs bitsandbytes: pip install"):
        check_kind("nf4", CPU)
    check_kind("none", CPU)
    check_kind("int8", CPU)


def test_int4_cannot_pack_every_shape() -> None:
    assert KINDS["int4"].fits(torch.Size((16, 32)))
    assert not KINDS["int4"].fits(torch.Size((16, 48)))
    assert not KINDS["int4"].fits(torch.Size((24, 32)))

"""Packed products are those of the plain weights, and layers that share rows compute them once."""

import copy
from pathlib import Path

import pytest
import torch
from tests.node.conftest import CPU, SpanChain, append_of, tiny_model

from treeswarm.protocol.spans import Span
from treeswarm_node.model.check.family_check import check_family
from treeswarm_node.model.check.kernel_check import check_kernels
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.quantization.packed_products import IntegerProduct, _has_bfloat16_products, pack_products
from treeswarm_node.model.quantization.quantized_linear import dequantized_copy, quantize
from treeswarm_node.model.quantization.weight_kinds import has_integer_products, has_packed_integer_products
from treeswarm_node.model.span_model import SpanModel

integers = pytest.mark.skipif(not has_packed_integer_products(), reason="this CPU does not multiply packed integers")
bfloat16 = pytest.mark.skipif(not _has_bfloat16_products(), reason="this CPU has no bfloat16 kernels")


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = torch.nn.Linear(64, 96), torch.nn.Linear(64, 32, bias=False)
        self.v_proj, self.o_proj = torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(64, 64, bias=False)


def quantized_layer() -> Attention:
    torch.manual_seed(0)
    layer = Attention().requires_grad_(False)
    quantize(layer, "int8")
    return layer


@integers
def test_packed_products_are_the_same_to_the_last_bit() -> None:
    plain, packed = quantized_layer(), quantized_layer()
    assert pack_products([packed]) == 2, "query, key and value at once, and the output"
    for count in (1, 2, 17):
        rows = torch.randn(1, count, 64)
        for name in ("q_proj", "v_proj", "k_proj", "o_proj", "q_proj"):
            assert torch.equal(getattr(packed, name)(rows), getattr(plain, name)(rows))
    assert not list(packed.q_proj.weight.buffers()), "the weight is not held twice"


@integers
def test_integers_are_packed_with_amx_alone_and_multiplied_with_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert has_integer_products.__wrapped__()
    assert not has_packed_integer_products.__wrapped__(), "oneDNN would use its reference kernel"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True}, raising=False)
    assert not has_integer_products.__wrapped__()


@integers
def test_shared_rows_are_multiplied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = quantized_layer()
    pack_products([layer])
    counts: list[int] = []
    multiply = IntegerProduct.multiply_all

    def counted(self: IntegerProduct, rows: torch.Tensor) -> torch.Tensor:
        counts.append(len(rows))
        return multiply(self, rows)

    monkeypatch.setattr(IntegerProduct, "multiply_all", counted)
    first, second = torch.randn(3, 64), torch.randn(5, 64)
    layer.q_proj(first), layer.k_proj(first), layer.v_proj(first)
    assert counts == [3]
    layer.q_proj(second), layer.k_proj(first)
    assert counts == [3, 5, 3], "other rows are not taken for those"


@integers
def test_packed_weights_can_be_dequantized_and_copied() -> None:
    plain, packed = quantized_layer(), quantized_layer()
    pack_products([packed])
    expected, actual = dequantized_copy(plain), dequantized_copy(copy.deepcopy(packed))
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, actual.get_parameter(name))


@integers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_span_computes_the_same_packed(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    outputs = []
    for pack in (False, True):
        model = SpanModel(load_span(tmp_path, Span(0, 4), dtype, CPU, quantization="int8"), 1024)
        if pack:
            assert pack_products(model.layers) == 4 * 4
            check_family(model)
            check_kernels(model)
        chain = SpanChain([model])
        chain.open("a", 64)
        outputs.append(chain.run({"a": append_of(0, 1, range(9), range(20, 29), prefill=True)})["a"])
    assert torch.equal(*outputs)


@bfloat16
def test_bfloat16_weights_are_packed_and_compute_the_same(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path)  # with biases
    outputs = []
    for pack in (False, True):
        model = SpanModel(load_span(tmp_path, Span(0, 4), torch.bfloat16, CPU), 1024)
        if pack:
            assert pack_products(model.layers) == 4 * 4
            assert check_family(model).worst_difference < 1e-4
            assert 0 <= check_kernels(model) < 0.01
        chain = SpanChain([model])
        chain.open("a", 64)
        outputs.append(chain.run({"a": append_of(0, 1, range(9), range(20, 29), prefill=True)})["a"])
    assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 0.02


def test_float32_weights_are_left_to_their_layout(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert pack_products(SpanModel(load_span(tmp_path, Span(0, 1), torch.float32, CPU), 1024).layers) == 0

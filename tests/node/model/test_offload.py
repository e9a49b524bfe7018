"""Offloaded weights give identical results; quantized weights give nearly the same."""

from pathlib import Path

import pytest
import torch
from tests.node.conftest import SpanChain, append_of, tiny_model

from treeswarm.errors import BadRequest, UnsupportedModel
from treeswarm.protocol.spans import Span
from treeswarm_node.model.check.family_check import check_family
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.model.footprint import read_footprint
from treeswarm_node.model.memory_fit import EndWeights, Footprint, NodeRoom, count_blocks_that_fit
from treeswarm_node.model.offload import Offload
from treeswarm_node.model.quantization.quantized_linear import QuantizedLinear, dequantized_copy, quantize
from treeswarm_node.model.span_model import SpanModel

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def chain_of(folder: Path, *, offloading: bool = False, quantization: str = "none") -> tuple[SpanChain, list[Offload]]:
    models, opened = [], []
    for span in (Span(0, 1), Span(1, 4)):
        offload = Offload(CPU, "disk") if offloading else None
        opened += [offload] if offload else []
        loaded = load_span(folder, span, torch.float32, CPU, quantization=quantization, offload=offload)
        models.append(SpanModel(loaded, kv_tokens=2048))
    chain = SpanChain(models)
    chain.open("a", 64)
    return chain, opened


def logits_of(chain: SpanChain) -> torch.Tensor:
    """Return the logits of a prefill and of a tree after it, so that every block runs twice."""
    prefill = chain.run({"a": append_of(0, 1, range(9), range(20, 29), prefill=True)})["a"]
    return torch.cat([prefill, chain.run({"a": append_of(1, 10, [9, 10, 10, 9], [3, 4, 5, 6])})["a"]])


def test_offloaded_weights_give_identical_results(folder: Path) -> None:
    plain, _ = chain_of(folder)
    streamed, offloads = chain_of(folder, offloading=True)
    try:
        for model in streamed.models:
            check_family(model)
        assert torch.equal(logits_of(streamed), logits_of(plain))
        loaded = sum(p.numel() for p in streamed.models[1].layers[0].parameters())
        resident = {p.untyped_storage().data_ptr() for layer in streamed.models[1].layers for p in layer.parameters()}
        assert loaded
        assert len(resident) <= 2, "three blocks share two slots"
    finally:
        for offload in offloads:
            offload.close()


def test_blocks_can_be_loaded_in_any_order(folder: Path) -> None:
    offload = Offload(CPU, "disk")
    whole = load_span(folder, Span(0, 4), torch.float32, CPU)
    loaded = load_span(folder, Span(0, 4), torch.float32, CPU, offload=offload)
    try:
        for block in (2, 2, 0, 3, 1, 0, 2, 1):
            loaded.load_block(block)
            pairs = zip(
                loaded.skeleton.base_model.layers[block].parameters(),
                whole.skeleton.base_model.layers[block].parameters(),
                strict=True,
            )
            assert all(torch.equal(actual, expected) for actual, expected in pairs)
    finally:
        offload.close()


def test_offloading_to_ram_on_a_cpu_is_refused() -> None:
    with pytest.raises(BadRequest, match="--offload disk"):
        Offload(CPU, "ram")


def test_offloaded_blocks_are_bounded_by_store_and_kv() -> None:
    size = Footprint(block=100, ends=EndWeights(), kv_row=1, forward_row=0)

    def fit(memory: int, store: int | None = None) -> int:
        limits = count_blocks_that_fit(NodeRoom(memory, store, kv_tokens=10, forward_rows=0), size, blocks=99)
        assert limits.is_same
        return limits.middle

    assert [fit(1000), fit(1000, 10_000), fit(1000, 1_000)] == [7, 65, 8]
    with pytest.raises(BadRequest, match="not one block fits"):
        fit(200, 10_000)


@pytest.mark.parametrize(("quantization", "max_error"), [("int8", 0.03), ("nf4", 0.6)])
def test_quantized_weights_give_nearly_the_same_results(folder: Path, quantization: str, max_error: float) -> None:
    pytest.importorskip("bitsandbytes")
    plain, _ = chain_of(folder)
    quantized, _ = chain_of(folder, quantization=quantization)
    for model in quantized.models:
        assert check_family(model).worst_difference < 1e-4
        assert any(isinstance(module, QuantizedLinear) for module in model.layers[0].modules())
    expected, actual = logits_of(plain), logits_of(quantized)
    error = float((actual - expected).norm() / expected.norm())
    assert 1e-4 < error < max_error


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_weights_can_be_offloaded(folder: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    resident, _ = chain_of(folder, quantization=quantization)
    streamed, offloads = chain_of(folder, quantization=quantization, offloading=True)
    try:
        assert torch.equal(logits_of(streamed), logits_of(resident))
    finally:
        for offload in offloads:
            offload.close()


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_dequantized_copy_equals_the_quantized_layer(quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(96, 64, bias=True)).requires_grad_(False)
    quantize(layer, quantization)
    rows = torch.randn(3, 96)
    torch.testing.assert_close(dequantized_copy(layer)(rows), layer(rows), rtol=1e-3, atol=1e-3)


def test_layer_with_few_linear_weights_is_refused() -> None:
    pytest.importorskip("bitsandbytes")
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Embedding(100, 4))
    with pytest.raises(UnsupportedModel, match="another --quantization, or none"):
        quantize(layer, "int8")


def test_quantization_reduces_the_footprint(folder: Path) -> None:
    skeleton = build_skeleton(folder, torch.float32)
    sizes = [read_footprint(skeleton, torch.float32, kind, "cpu").block for kind in ("none", "int8", "nf4")]
    assert sizes[0] > 3.5 * sizes[1] > 6 * sizes[2]

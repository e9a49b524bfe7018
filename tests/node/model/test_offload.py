"""Weights that wait elsewhere, in fewer bits, and rows that travel in fewer: what changes, and what must not."""

from pathlib import Path

import pytest
import torch
from tests.node.conftest import SpanChain, append_of, tiny_model

from treeswarm.errors import BadRequest, UnsupportedModel
from treeswarm.protocol.spans import Span
from treeswarm_node.engine.loaded_stage import choose_dtype
from treeswarm_node.model.family_check import check_family
from treeswarm_node.model.loader import load_span
from treeswarm_node.model.memory_fit import Footprint, count_blocks_that_fit, read_footprint
from treeswarm_node.model.offload import Offload
from treeswarm_node.model.quantization import QuantizedLinear, dequantized_copy, quantize
from treeswarm_node.model.span_model import SpanModel

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def chain_of(folder: Path, *, offloads: bool = False, quantization: str = "none") -> tuple[SpanChain, list[Offload]]:
    models, made = [], []
    for span in (Span(0, 1), Span(1, 4)):
        offload = Offload(CPU, "disk") if offloads else None
        made += [offload] if offload else []
        loaded = load_span(folder, span, torch.float32, CPU, quantization=quantization, offload=offload)
        models.append(SpanModel(loaded, kv_tokens=2048))
    chain = SpanChain(models)
    chain.open("a", 64)
    return chain, made


def logits_of(chain: SpanChain) -> torch.Tensor:
    """Of a prefill and a tree behind it, so that every block runs twice."""
    first = chain.run({"a": append_of(0, 1, range(9), range(20, 29), prefill=True)})["a"]
    return torch.cat([first, chain.run({"a": append_of(1, 10, [9, 10, 10, 9], [3, 4, 5, 6])})["a"]])


def test_offloaded_weights_compute_the_very_same(folder: Path) -> None:
    plain, _ = chain_of(folder)
    streamed, made = chain_of(folder, offloads=True)
    try:
        for model in streamed.models:
            check_family(model)
        assert torch.equal(logits_of(streamed), logits_of(plain))
        held = sum(p.numel() for p in streamed.models[1].layers[0].parameters())
        resident = {p.untyped_storage().data_ptr() for layer in streamed.models[1].layers for p in layer.parameters()}
        assert held
        assert len(resident) <= 2, "three blocks share two slots"
    finally:
        for offload in made:
            offload.close()


def test_blocks_may_be_placed_in_any_order(folder: Path) -> None:
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
            assert all(torch.equal(ours, plain) for ours, plain in pairs)
    finally:
        offload.close()


def test_offloading_to_the_ram_one_computes_from_is_refused() -> None:
    with pytest.raises(BadRequest, match="--offload disk"):
        Offload(CPU, "ram")


def test_offloaded_blocks_are_bounded_by_the_store_and_by_kv() -> None:
    size = Footprint(block=100, ends=0, kv_row=1, forward_row=0)
    assert count_blocks_that_fit(1000, size, kv_tokens=10, forward_rows=0, blocks=99) == 7
    assert count_blocks_that_fit(1000, size, kv_tokens=10, forward_rows=0, blocks=99, store=10_000) == 65
    assert count_blocks_that_fit(1000, size, kv_tokens=10, forward_rows=0, blocks=99, store=1_000) == 8
    with pytest.raises(BadRequest, match="not one block fits"):
        count_blocks_that_fit(200, size, kv_tokens=10, forward_rows=0, blocks=99, store=10_000)


@pytest.mark.parametrize(("quantization", "close"), [("int8", 0.03), ("nf4", 0.6)])
def test_quantized_weights_compute_nearly_the_same(folder: Path, quantization: str, close: float) -> None:
    pytest.importorskip("bitsandbytes")
    plain, _ = chain_of(folder)
    quantized, _ = chain_of(folder, quantization=quantization)
    for model in quantized.models:
        assert check_family(model).worst_difference < 1e-4
        assert any(isinstance(module, QuantizedLinear) for module in model.layers[0].modules())
    wanted, got = logits_of(plain), logits_of(quantized)
    off = float((got - wanted).norm() / wanted.norm())
    assert 1e-4 < off < close


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantized_weights_may_be_offloaded_too(folder: Path, quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    resident, _ = chain_of(folder, quantization=quantization)
    streamed, made = chain_of(folder, quantization=quantization, offloads=True)
    try:
        assert torch.equal(logits_of(streamed), logits_of(resident))
    finally:
        for offload in made:
            offload.close()


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_layer_unfolds_to_what_it_computes_with(quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(96, 64, bias=True)).requires_grad_(False)
    quantize(layer, quantization)
    rows = torch.randn(3, 96)
    torch.testing.assert_close(dequantized_copy(layer)(rows), layer(rows))


def test_a_layer_whose_weights_are_elsewhere_is_not_quantized() -> None:
    pytest.importorskip("bitsandbytes")
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Embedding(100, 4))
    with pytest.raises(UnsupportedModel, match="without --quantization"):
        quantize(layer, "int8")


def test_fewer_bits_count_for_less_room(folder: Path) -> None:
    sizes = [read_footprint(folder, torch.float32, kind).block for kind in ("none", "int8", "nf4")]
    assert sizes[0] > 3.5 * sizes[1] > 6 * sizes[2]


def test_auto_is_bfloat16_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_dtype("float16", CPU) == "float16"
    for has, wanted in (({"avx512_bf16": True}, "bfloat16"), ({"avx512_bf16": False, "avx2": True}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert choose_dtype("auto", CPU) == wanted

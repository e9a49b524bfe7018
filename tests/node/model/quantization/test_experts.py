"""Mixture models in few bits: experts are packed one by one, and compute as their dequantized copies do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.node.conftest import SMALL, SpanChain, append_of, random_model

from treeswarm.errors import UnsupportedModel
from treeswarm.protocol.spans import Span
from treeswarm_node.model.check.family_check import check_family
from treeswarm_node.model.check.kernel_check import check_kernels
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.model.footprint import read_footprint
from treeswarm_node.model.memory_fit import Footprint
from treeswarm_node.model.quantization.quantized_linear import QuantizedExperts, dequantized_copy, quantize
from treeswarm_node.model.quantization.weight_kinds import KINDS, Int8
from treeswarm_node.model.span_model import SpanModel

CPU = torch.device("cpu")
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24},
    "glm4_moe": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    },
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    if KINDS[request.param].explain_unsupported(CPU) is not None:
        pytest.skip(f"{request.param} cannot be used here")
    return str(request.param)


@pytest.fixture(params=MIXTURES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    random_model(request.param, **{**SMALL, **MIXTURES[request.param]}).save_pretrained(tmp_path)
    return tmp_path


def logits_of(model: SpanModel) -> torch.Tensor:
    """Return the logits of a prefill and of a tree after it."""
    chain = SpanChain([model])
    chain.open("a", 64)
    prefill = chain.run({"a": append_of(0, 1, range(9), range(20, 29), prefill=True)})["a"]
    return torch.cat([prefill, chain.run({"a": append_of(1, 10, [9, 10, 10, 9], [3, 4, 5, 6])})["a"]])


def test_a_mixture_computes_as_its_dequantized_copy(folder: Path, kind: str) -> None:
    model = SpanModel(load_span(folder, Span(0, 4), torch.float32, CPU, quantization=kind), kv_tokens=1024)
    packed = [module for layer in model.layers for module in layer.modules() if isinstance(module, QuantizedExperts)]
    assert len(packed) in (6, 8), "both matrices of every layer with experts"
    assert check_family(model).worst_difference < 1e-4
    assert check_kernels(model) < (0.02 if kind == "int4" else 1e-3)
    actual = logits_of(model)
    layers = model.frame.blocks.layers
    for index in range(4):
        layers[index] = dequantized_copy(layers[index])
    model.layers = list(layers)
    expected = logits_of(model)
    error = float((actual - expected).norm() / expected.norm())
    assert error < (0.1 if kind == "int4" else 1e-3)


def test_only_experts_that_are_hit_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model("qwen3_moe", **{**SMALL, **MIXTURES["qwen3_moe"]}).save_pretrained(tmp_path)
    model = SpanModel(load_span(tmp_path, Span(0, 4), torch.float32, CPU, quantization="int8"), kv_tokens=1024)
    shapes: list[torch.Size] = []
    multiply = Int8.multiply

    def counted(self: Int8, rows: torch.Tensor, parts: Any, shape: torch.Size) -> torch.Tensor:
        shapes.append(shape)
        return multiply(self, rows, parts, shape)

    monkeypatch.setattr(Int8, "multiply", counted)
    chain = SpanChain([model])
    chain.open("a", 8)
    chain.run({"a": append_of(0, 1, [0], [5], prefill=True)})
    assert shapes.count(torch.Size((192, 64))) == 4 * 2, "two of four experts in each layer"


def footprint_of(folder: Path, kind: str) -> Footprint:
    return read_footprint(build_skeleton(folder, torch.float32), torch.float32, kind, "cpu")


def test_experts_reduce_the_footprint(folder: Path) -> None:
    plain, eight, four = (footprint_of(folder, kind) for kind in ("none", "int8", "nf4"))
    assert plain.block > 3 * eight.block
    assert eight.block > 1.6 * four.block


def test_the_footprint_is_what_a_block_takes(folder: Path, kind: str) -> None:
    loaded = load_span(folder, Span(1, 2), torch.float32, CPU, quantization=kind)
    layer = loaded.skeleton.base_model.layers[1]
    tensors = [*layer.parameters(), *(b for name, b in layer.named_buffers() if not name.endswith("code"))]
    persistent = [layer.state_dict()[name] for name in layer.state_dict().keys() - dict(layer.named_parameters())]
    size = sum(tensor.nbytes for tensor in tensors) - sum(tensor.nbytes for tensor in persistent)
    assert footprint_of(folder, kind).block == pytest.approx(size, rel=0.001)


def test_a_layer_of_matrices_that_cannot_be_packed_is_refused() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Embedding(100, 4))
    with pytest.raises(UnsupportedModel, match="another --quantization, or none"):
        quantize(layer, "int8")

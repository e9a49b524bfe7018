"""A span that is loaded expert by expert is what it is when loaded whole, and needs no more than a part beside it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.node.conftest import SMALL, random_model
from tests.node.model.quantization.test_experts import MIXTURES
from tests.node.model.test_formats import save_in, stock
from tests.support.gguf_models import BLOCKS, write_gguf
from tests.support.quantized_checkpoints import FORMATS, MXFP4_EXPERTS

from treeswarm.errors import ModelError, UnsupportedModel
from treeswarm.model_files import resolve_model
from treeswarm.model_sources import conversion_process, gguf_files
from treeswarm.protocol.spans import Span
from treeswarm_node.model.check import stock_slice
from treeswarm_node.model.check.weights import check_weights
from treeswarm_node.model.checkpoint import part_loader, parts
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.loaded_span import LoadedSpan
from treeswarm_node.model.quantization.quantized_linear import QuantizedExperts
from treeswarm_node.model.quantization.weight_kinds import KINDS
from treeswarm_node.model.span_model import SpanModel

CPU = torch.device("cpu")
# Bytes of a part in these tests: that of one matrix or of one expert in every model here.
PART_BYTES = 1


@pytest.fixture(autouse=True)
def smallest_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(stock_slice, "SMALL_BYTES", 0)


@pytest.fixture(params=MIXTURES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    random_model(request.param, **{**SMALL, **MIXTURES[request.param]}).save_pretrained(tmp_path)
    return tmp_path


def ranges_of(loaded: LoadedSpan) -> int:
    """Return the number of parts that are some experts of a fused parameter."""
    assert loaded.weights is not None
    return sum(part.part.experts is not None for part in loaded.weights.parts)


def assert_is_stock(loaded: LoadedSpan, expected: torch.nn.Module) -> None:
    found = dict(loaded.skeleton.named_parameters())
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found[name], parameter, rtol=0, atol=1e-7, msg=name)


def test_experts_loaded_one_by_one_are_those_of_transformers(folder: Path) -> None:
    loaded = load_span(folder, Span(0, 4), torch.float32, CPU)
    assert ranges_of(loaded) in (4 * 2 * 3, 4 * 2 * 4), "two parameters of four experts in each mixture layer"
    assert_is_stock(loaded, stock(folder))
    assert check_weights(SpanModel(loaded, 128)) > 4


@pytest.mark.parametrize("kind", KINDS)
def test_experts_quantized_one_by_one_have_the_same_codes(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if KINDS[kind].explain_unsupported(CPU) is not None:
        pytest.skip(f"{kind} cannot be used here")
    loaded = load_span(folder, Span(1, 3), torch.float32, CPU, quantization=kind)
    assert ranges_of(loaded) == 2 * 2 * 4
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 30)
    whole = load_span(folder, Span(1, 3), torch.float32, CPU, quantization=kind)
    assert ranges_of(whole) == 0
    expected = dict(whole.skeleton.named_buffers())
    assert len(expected) > 4 * 2
    for name, buffer in loaded.skeleton.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    monkeypatch.setattr(parts, "PART_BYTES", PART_BYTES)
    assert check_weights(SpanModel(loaded, 128)) > 4


@pytest.mark.parametrize(
    ("published", "family", "sliced"),
    [("fp8 blocks", "qwen3-moe", 32), ("gptq", "qwen3-moe", 32), ("mxfp4", "gpt-oss", 32)],
)
def test_experts_of_published_formats_are_expanded_one_by_one(
    published: str, family: str, sliced: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = save_in(FORMATS.get(published, MXFP4_EXPERTS), family, tmp_path)
    loaded = load_span(folder, Span(0, 4), torch.float32, CPU)
    assert ranges_of(loaded) == sliced
    assert_is_stock(loaded, stock(plain))


def test_only_the_codes_of_some_experts_are_read(tmp_path: Path) -> None:
    folder, _ = save_in(MXFP4_EXPERTS, "gpt-oss", tmp_path)
    loaded = load_span(folder, Span(1, 2), torch.float32, CPU)
    assert loaded.weights is not None
    lazy = loaded.weights.open()["model.layers.1.mlp.experts.down_proj"]
    read: list[tuple[int, ...]] = []
    read_all = lazy._weight.read
    object.__setattr__(lazy._weight, "read", lambda p: read.append(tuple(len(t) for t in p.values())) or read_all(p))
    assert torch.equal(part_loader.SomeExperts(lazy, 1, 3)[...], lazy[...][1:3])
    assert read == [(2, 2), (4, 4)]


def test_experts_of_a_gguf_file_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gguf_files, "convert", lambda _, source, target: conversion_process.convert_gguf(source, target)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "tiny.gguf", architecture="qwen3moe", kind="Q4_0")
    folder = resolve_model(str(file))
    loaded = load_span(folder, Span(0, BLOCKS), torch.float32, CPU)
    assert ranges_of(loaded) > 2 * BLOCKS
    monkeypatch.setattr(parts, "PART_BYTES", 1 << 30)
    assert_is_stock(loaded, load_span(folder, Span(0, BLOCKS), torch.float32, CPU).skeleton)


@pytest.fixture
def converted_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the bytes of what is given to transformers to convert at once."""
    seen: list[int] = []
    convert = part_loader.convert_and_load_state_dict_in_model

    def counted(model: Any, weights: dict[str, Any], config: Any) -> Any:
        seen.append(sum(tensor[...].nbytes for tensor in weights.values()))
        return convert(model, weights, config)

    monkeypatch.setattr(part_loader, "convert_and_load_state_dict_in_model", counted)
    return seen


def test_no_more_than_one_matrix_or_expert_is_unquantized(folder: Path, converted_bytes: list[int]) -> None:
    loaded = load_span(folder, Span(1, 2), torch.float32, CPU, quantization="int8")
    layer = stock(folder).base_model.layers[1]
    experts = [p[0].nbytes for p in layer.parameters() if p.ndim == 3]
    module = max(sum(p.nbytes for p in m.parameters(recurse=False) if p.ndim < 3) for m in layer.modules())
    assert max(converted_bytes) <= max(*experts, module)
    assert sum(converted_bytes) == sum(p.nbytes for p in (*layer.parameters(), *_persistent(layer)))
    assert all(not isinstance(m, torch.nn.Linear) for n, m in loaded.skeleton.base_model.layers[1].named_modules())


def _persistent(layer: torch.nn.Module) -> list[torch.Tensor]:
    names = layer.state_dict().keys() - dict(layer.named_parameters()).keys()
    return [layer.state_dict()[name] for name in names]


def test_a_wrong_expert_is_refused_by_name(tmp_path: Path) -> None:
    random_model("qwen3_moe", **{**SMALL, **MIXTURES["qwen3_moe"]}).save_pretrained(tmp_path)
    for kind, expert in (("none", 3), ("int8", 2)):
        loaded = load_span(tmp_path, Span(1, 2), torch.float32, CPU, quantization=kind)
        model = SpanModel(loaded, 128)
        held = loaded.skeleton.base_model.layers[1].mlp.experts.gate_up_proj
        with torch.no_grad():
            (held.scales if isinstance(held, QuantizedExperts) else held)[expert] *= 1.1
        with pytest.raises(UnsupportedModel, match=r"tensor model\.layers\.1\.mlp\.experts\.gate_up_proj"):
            check_weights(model)


def test_a_missing_expert_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    random_model("qwen3_moe", **{**SMALL, **MIXTURES["qwen3_moe"]}).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj.*cannot be converted"):
        load_span(tmp_path, Span(1, 2), torch.float32, CPU, quantization="int8")

"""A block is checked with a copy that takes little memory, and the check says the same as with a whole copy."""

from pathlib import Path

import pytest
import torch
from tests.node.conftest import SMALL, random_model, tiny_model
from tests.node.model.quantization.test_experts import MIXTURES
from tests.node.model.test_latent_attention import latent_model

from treeswarm.protocol.spans import Span
from treeswarm_node.model.check import plain_copy as module
from treeswarm_node.model.check.family_check import check_family
from treeswarm_node.model.check.plain_copy import ConvertedExperts, ConvertedLinear, copy_bytes, plain_copy
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.offload import open_offload
from treeswarm_node.model.span_model import SpanModel

CPU = torch.device("cpu")


@pytest.fixture
def converting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert all matrices whenever they are used, as those of large blocks are."""
    monkeypatch.setattr(module, "WHOLE_BYTES", 0)
    monkeypatch.setattr(module, "LARGE_BYTES", 0)


@pytest.fixture(params=["llama", "gemma2", *MIXTURES, "deepseek_v3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    name = request.param
    if name in MIXTURES:
        random_model(name, **{**SMALL, **MIXTURES[name]}).save_pretrained(tmp_path)
    elif name == "deepseek_v3":
        latent_model(name).save_pretrained(tmp_path)
    else:
        tiny_model(name).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.float32, "int8")]
)
def test_converted_matrices_give_the_same_verdict(
    folder: Path, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SpanModel(load_span(folder, Span(0, 4), dtype, CPU, quantization=kind), 512)
    whole = check_family(model)
    monkeypatch.setattr(module, "WHOLE_BYTES", 0)
    monkeypatch.setattr(module, "LARGE_BYTES", 0)
    converted = check_family(model)
    assert converted.layer_kinds == whole.layer_kinds
    assert converted.worst_difference < 1e-4


@pytest.mark.usefixtures("converting")
def test_no_large_matrix_is_held_by_the_copy(folder: Path) -> None:
    loaded = load_span(folder, Span(2, 3), torch.float32, CPU, quantization="int8")
    layer = loaded.skeleton.base_model.layers[2]
    copied = plain_copy(layer)
    linears = [child for child in copied.modules() if isinstance(child, torch.nn.Linear)]
    assert len(linears) == (1 if hasattr(layer.self_attn, "kv_b_proj") else 0), "the expansion of latents stays plain"
    assert any(isinstance(child, ConvertedLinear) for child in copied.modules())
    has_experts = any(hasattr(child, "is_transposed") for child in layer.modules())
    assert any(isinstance(child, ConvertedExperts) for child in copied.modules()) == has_experts
    held = [parameter for parameter in copied.parameters() if parameter.ndim > 1]
    shared = {parameter.data_ptr() for parameter in layer.parameters()}
    assert all(parameter.dtype == torch.float32 for parameter in held)
    assert sum(p.nbytes for p in held if p.data_ptr() not in shared) <= 4 * 96 * 64 * 4


@pytest.mark.usefixtures("converting")
def test_a_copy_reads_offloaded_weights_when_it_runs(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with open_offload(CPU, "disk") as offload:
        model = SpanModel(load_span(tmp_path, Span(0, 4), torch.float32, CPU, offload=offload), 512)
        assert check_family(model).worst_difference < 1e-4


def test_bytes_of_a_copy_are_bounded_for_large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_model("qwen3_moe", **{**SMALL, **MIXTURES["qwen3_moe"]}).base_model.layers[1]
    assert copy_bytes(layer) == 4 * sum(parameter.numel() for parameter in layer.parameters())
    monkeypatch.setattr(module, "WHOLE_BYTES", 0)
    monkeypatch.setattr(module, "LARGE_BYTES", 4 * 64 * 64)
    small = sum(parameter.numel() for parameter in layer.parameters() if parameter.numel() <= 64 * 64)
    assert copy_bytes(layer) == 4 * (small + 192 * 64)

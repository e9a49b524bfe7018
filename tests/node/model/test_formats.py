"""A checkpoint in every published format is loaded as transformers loads the same weights as plain numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.node.conftest import SMALL, SpanChain, tiny_model
from tests.node.model.test_families import worst_difference
from tests.support.quantized_checkpoints import (
    FORMATS,
    MXFP4_EXPERTS,
    PublishedFormat,
    random_model,
    write_checkpoint,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from treeswarm.errors import ModelError, UnsupportedModel
from treeswarm.identity import config_digest, weights_digest
from treeswarm.model_files import read_config
from treeswarm.protocol.spans import Span
from treeswarm_node.model.check.weights import check_weights
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.offload import open_offload
from treeswarm_node.model.span_model import SpanModel

CPU = torch.device("cpu")
SPANS = [Span(0, 1), Span(1, 3), Span(3, 4)]
TOLERANCE = 1e-4
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24, "intermediate_size": 64}


def save_in(published: PublishedFormat, family: str, tmp_path: Path) -> tuple[Path, Path]:
    """Save a tiny model in the format, and return its folder and that of the same weights as plain numbers."""
    folder = tmp_path / "model"
    if family == "gpt-oss":
        return folder, write_checkpoint(
            random_model("gpt_oss", SMALL, GPT_OSS), published, folder, lambda name: name.endswith("_proj")
        )
    sizes = {"intermediate_size": 128, "moe_intermediate_size": 64} if family == "qwen3-moe" else {}
    return folder, write_checkpoint(tiny_model(family, **sizes), published, folder)


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("published", FORMATS)
def test_every_tensor_equals_what_transformers_loads(published: str, tmp_path: Path) -> None:
    folder, plain = save_in(FORMATS[published], "qwen3-moe", tmp_path)
    _assert_equal(load_span(folder, Span(0, 4), torch.float32, CPU).skeleton, stock(plain), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("published", "family"), [("fp8 blocks", "qwen3-moe"), ("mxfp4", "gpt-oss")])
def test_tensors_equal_what_transformers_expands(
    published: str, family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder, _ = save_in(FORMATS.get(published, MXFP4_EXPERTS), family, tmp_path)
    _assert_equal(load_span(folder, Span(0, 4), dtype, CPU).skeleton, stock(folder, dtype), dtype)


def _assert_equal(loaded: PreTrainedModel, expected: PreTrainedModel, dtype: torch.dtype) -> None:
    found = dict(loaded.named_parameters())
    assert found.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name], parameter.to(dtype), rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize(("published", "family"), [("fp8 blocks", "qwen3-moe"), ("mxfp4", "gpt-oss")])
def test_trees_over_spans_from_disk_equal_stock(published: str, family: str, tmp_path: Path) -> None:
    folder, plain = save_in(FORMATS.get(published, MXFP4_EXPERTS), family, tmp_path)
    chain = SpanChain([SpanModel(load_span(folder, span, torch.float32, CPU), 2048) for span in SPANS])
    assert worst_difference(stock(plain), chain, {"short": 9, "long": 61}) < TOLERANCE


def test_offloaded_blocks_are_expanded_too(tmp_path: Path) -> None:
    folder, plain = save_in(FORMATS["fp8 blocks"], "qwen3-moe", tmp_path)
    expected = dict(stock(plain).named_parameters())
    with open_offload(CPU, "disk") as offload:
        loaded = load_span(folder, Span(1, 3), torch.float32, CPU, offload=offload)
        for block in (1, 2):
            loaded.load_block(block)
            for name, parameter in loaded.skeleton.base_model.layers[block].named_parameters():
                assert torch.equal(parameter, expected[f"model.layers.{block}.{name}"]), name


@pytest.mark.parametrize("published", ["fp8 blocks", "compressed int4", "gptq", "bitsandbytes nf4"])
def test_weights_are_compared_with_a_slice_of_transformers(published: str, tmp_path: Path) -> None:
    folder, _ = save_in(FORMATS[published], "qwen3-moe", tmp_path)
    model = SpanModel(load_span(folder, Span(1, 2), torch.float32, CPU), 256)
    assert check_weights(model) == 11
    model.layers[0].mlp.experts.down_proj[1, 2, 3] += 0.01
    with pytest.raises(UnsupportedModel, match=r"experts\.down_proj is not what transformers loads"):
        check_weights(model)


@pytest.mark.parametrize("published", ["fp8 blocks", "compressed int4", "gptq", "bitsandbytes nf4"])
def test_missing_scale_is_refused_by_name(published: str, tmp_path: Path) -> None:
    folder, _ = save_in(FORMATS[published], "qwen3-moe", tmp_path)
    path, expert = folder / "model.safetensors", "model.layers.2.mlp.experts.1.up_proj"
    tensors = load_file(path)
    scale = next(
        name for name in tensors if name.startswith(expert) and name.endswith(("scale", "_inv", "s", "absmax"))
    )
    del tensors[scale]
    save_file(tensors, path, {"format": "pt"})
    load_span(folder, Span(0, 2), torch.float32, CPU)
    with pytest.raises(ModelError, match=rf"{expert}.* is stored as .* without its"):
        load_span(folder, Span(2, 3), torch.float32, CPU)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_only_a_bias_of_zeros_may_be_left_over_beside_gptq(value: float, tmp_path: Path) -> None:
    folder, _ = save_in(FORMATS["gptq"], "qwen3", tmp_path)
    path, name = folder / "model.safetensors", "model.layers.1.self_attn.q_proj.bias"
    save_file(load_file(path) | {name: torch.full((64,), value)}, path, {"format": "pt"})
    if value:
        with pytest.raises(ModelError, match=name):
            load_span(folder, Span(1, 2), torch.float32, CPU)
    else:
        load_span(folder, Span(1, 2), torch.float32, CPU)


def test_numbers_of_eight_bits_without_any_settings_are_refused(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight is stored as F8_E4M3 .* without its scale"):
        load_span(tmp_path, Span(0, 4), torch.float32, CPU)


def test_what_loading_does_and_costs_is_said_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, _ = save_in(FORMATS["fp8 blocks"], "qwen3-moe", tmp_path)
    with caplog.at_level("INFO"):
        load_span(folder, Span(1, 2), torch.bfloat16, CPU)
    assert caplog.messages == [
        "weights are published as FP8 in blocks of 32×32: 60.2 KiB per block, expanded while they are loaded to "
        "bfloat16, 120 KiB per block"
    ]


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_expanded_weights_are_quantized_again(quantization: str, tmp_path: Path) -> None:
    folder, plain = save_in(FORMATS["compressed int4"], "qwen3", tmp_path)
    loaded, expected = (
        load_span(path, Span(1, 3), torch.float32, CPU, quantization=quantization) for path in (folder, plain)
    )
    for name, buffer in expected.skeleton.base_model.layers[1].named_buffers():
        assert torch.equal(loaded.skeleton.base_model.layers[1].get_buffer(name), buffer), name


def test_formats_are_numerics_classes_of_their_own(tmp_path: Path) -> None:
    folder, plain = save_in(FORMATS["fp8 blocks"], "qwen3", tmp_path)
    assert weights_digest(folder, read_config(folder)) != weights_digest(plain, read_config(plain))
    assert config_digest(read_config(folder)) != config_digest(read_config(plain))

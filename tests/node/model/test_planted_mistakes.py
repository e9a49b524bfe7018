"""A node does not start with a checkpoint from which a tensor was dropped or renamed, whatever its format is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.node.conftest import SMALL, tiny_model
from tests.node.model.test_completeness import BIAS, MOE
from tests.support.gguf_models import write_gguf
from tests.support.quantized_checkpoints import FORMATS, MXFP4_EXPERTS, random_model, write_checkpoint

from treeswarm.errors import ModelError
from treeswarm.protocol.spans import Span
from treeswarm_node.config import DeviceConfig, ModelConfig, NodeConfig
from treeswarm_node.engine import loaded_stage

WEIGHT = "model.layers.1.mlp.up_proj"
# Ends of names of tensors without which a weight is the same: scales of activations, which stay numbers here, and the
# layout of bitsandbytes' codes, of which one is ever read.
NOT_NEEDED = ("activation_scale", "input_scale", "weight_format")
QUICK = ("fp8 blocks", "compressed int4", "gptq", "bitsandbytes nf4, nested")
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "intermediate_size": 64}
Tensors = Mapping[str, torch.Tensor]


def start(name: Path, span: Span) -> None:
    """Load, check and measure a span as `swarm-node` does."""
    config = NodeConfig(
        ModelConfig(str(name), dtype="float32", quantization="none", activations="native"),
        DeviceConfig("cpu", kv_tokens=256),
    )
    loaded_stage._load(config, loaded_stage.ModelInfo.find(str(name)), span, None, None)


def refusal_of(folder: Path, tensors: Tensors) -> str:
    """Return what a node of the second block says of the tensors, or an empty string if it starts."""
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    try:
        start(folder, Span(1, 2))
    except ModelError as error:
        return str(error)
    return ""


def check_refusals(folder: Path, weight: str) -> None:
    """Assert that every needed tensor of a weight is missed by name, also if it is there under another name."""
    whole = load_file(folder / "model.safetensors")
    own = [name for name in whole if name.startswith(weight)]
    needed = [name for name in own if not name.endswith(NOT_NEEDED)]
    assert len(needed) > 1
    start(folder, Span(1, 2))
    for name in needed:
        left = {key: value for key, value in whole.items() if key != name}
        for tensors in (left, left | {f"{name}_of_old": whole[name]}):
            refusal = refusal_of(folder, tensors)
            assert weight in refusal, f"{name}: {refusal or 'it starts'}"
            assert "\n" not in refusal
    assert not refusal_of(folder, {key: value for key, value in whole.items() if key in needed or key not in own})


@pytest.mark.parametrize(
    "published", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FORMATS]
)
def test_dropped_or_renamed_tensor_is_refused(published: str, tmp_path: Path) -> None:
    write_checkpoint(tiny_model("qwen3", **SIZES), FORMATS[published], tmp_path / "model")
    check_refusals(tmp_path / "model", WEIGHT)


def test_dropped_or_renamed_experts_of_mxfp4_are_refused(tmp_path: Path) -> None:
    model = random_model("gpt_oss", SMALL, SIZES, {"num_local_experts": 4, "num_experts_per_tok": 2})
    write_checkpoint(model, MXFP4_EXPERTS, tmp_path / "model", lambda name: name.endswith("_proj"))
    check_refusals(tmp_path / "model", "model.layers.1.mlp.experts.down_proj")


@pytest.mark.parametrize("planted", ["dropped", "renamed", "of another shape"])
def test_routing_bias_beside_fp8_weights_is_needed(planted: str, tmp_path: Path) -> None:
    model = random_model("glm4_moe", SMALL, SIZES, MOE)
    write_checkpoint(model, FORMATS["fp8 blocks"], tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    bias = tensors.pop(BIAS)
    if planted == "renamed":
        tensors[BIAS.replace("e_score", "score")] = bias
    elif planted == "of another shape":
        tensors[BIAS] = bias[:-1]
    assert "score_correction_bias" in refusal_of(tmp_path / "model", tensors)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
@pytest.mark.parametrize("planted", ["dropped", "renamed"])
def test_dropped_or_renamed_tensor_of_a_gguf_file_is_refused(
    planted: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = None if planted == "dropped" else "blk.1.ffn_upper.weight"
    file = write_gguf(
        tmp_path / "tiny.gguf", kind=kind, rename=lambda name: other if name == "blk.1.ffn_up.weight" else name
    )
    if planted == "dropped":
        start(file, Span(0, 1))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj|blk\.1\.ffn_upper") as refusal:
        start(file, Span(1, 2))
    assert "\n" not in str(refusal.value)

"""A span is ready only if checkpoint and hosted modules match: nothing is left over on either side."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.node.conftest import SMALL
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from treeswarm.errors import ModelError, UnsupportedModel
from treeswarm.protocol.spans import Span
from treeswarm_node.model.checkpoint.formats import PLAIN, check_format, weight_format
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.offload import open_offload

CPU = torch.device("cpu")
WHOLE = Span(0, 4)
MOE: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], object]


def save_tiny(folder: Path, model_type: str, **changes: Any) -> PreTrainedModel:
    """Save a random model with buffers that are not the initial ones, and return it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for tensor in (*model.parameters(), *_persistent_buffers(model).values()):
        tensor.data.normal_(0, 0.15)
    model.requires_grad_(False).save_pretrained(folder)
    return model


def _persistent_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    state = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in state}


def edit_tensors(folder: Path, edit: Edit) -> None:
    """Change the tensors of a checkpoint with a single file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("span", [Span(0, 2), Span(1, 3), WHOLE], ids=str)
def test_persistent_buffers_are_loaded(tmp_path: Path, span: Span) -> None:
    model = save_tiny(tmp_path, "glm4_moe", **MOE)
    loaded = dict(load_span(tmp_path, span, torch.float32, CPU).skeleton.named_buffers())
    expected = _persistent_buffers(model)
    hosted = [name for name in expected if int(name.split(".")[2]) in range(span.start, span.end)]
    assert BIAS in hosted
    for name in hosted:
        assert torch.equal(loaded[name], expected[name]), name


def test_buffer_keeps_the_dtype_that_transformers_loads(tmp_path: Path) -> None:
    save_tiny(tmp_path, "glm4_moe", **MOE)
    loaded = load_span(tmp_path, WHOLE, torch.bfloat16, CPU).skeleton
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype, name


PLANTED: dict[str, tuple[Edit, str]] = {
    "a buffer is missing": (lambda t: t.pop(BIAS), BIAS),
    "a parameter is missing": (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), "layers.0.mlp.up_proj"),
    "one expert is missing": (lambda t: t.pop("model.layers.3.mlp.experts.3.up_proj.weight"), r"layers\.3\.mlp\.exp"),
    "a tensor has another name": (
        lambda t: t.update({"model.layers.0.mlp.upper.weight": t.pop("model.layers.0.mlp.up_proj.weight")}),
        r"layers\.0\.mlp\.up",
    ),
    "a buffer has another shape": (lambda t: t.update({BIAS: torch.zeros(7)}), BIAS),
    "a parameter has another shape": (
        lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
        "model.norm.weight",
    ),
    "a scale is left over": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)}),
        "up_proj.weight_scale_inv",
    ),
    "a bias is left over": (lambda t: t.update({"lm_head.bias": torch.ones(199)}), "lm_head.bias"),
    "a norm is left over": (
        lambda t: t.update({"model.layers.3.extra_norm.weight": torch.ones(64)}),
        "extra_norm.weight",
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("where", ["none", "disk"])
def test_planted_mistake_is_refused_by_name(tmp_path: Path, planted: str, where: str) -> None:
    save_tiny(tmp_path, "glm4_moe", **MOE)
    edit, name = PLANTED[planted]
    edit_tensors(tmp_path, edit)
    with open_offload(CPU, where) as offload, pytest.raises(ModelError, match=f"tensor .*{name}") as refusal:
        load_span(tmp_path, WHOLE, torch.float32, CPU, offload=offload)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.4.eh_proj.weight", (64, 128)),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (8,)),
        ("model.vision_tower.patch.weight", (8, 8)),
    ],
    ids=["extra layer", "old rotary buffer", "a module that is not hosted"],
)
def test_tensors_of_no_hosted_module_are_left_out(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    save_tiny(tmp_path, "glm4_moe", **MOE)
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: torch.ones(shape)}))
    load_span(tmp_path, WHOLE, torch.float32, CPU)


@pytest.mark.parametrize("stored", ["embedding", "head", "both", "both, different"])
def test_tied_head_is_what_transformers_loads(tmp_path: Path, stored: str) -> None:
    save_tiny(tmp_path, "llama", tie_word_embeddings=True)

    def edit(tensors: Tensors) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        if stored != "embedding":
            tensors["lm_head.weight"] = embedding * (2 if stored == "both, different" else 1)
        if stored == "head":
            del tensors["model.embed_tokens.weight"]

    edit_tensors(tmp_path, edit)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for span in (Span(0, 1), Span(3, 4)):
        loaded = load_span(tmp_path, span, torch.float32, CPU).skeleton
        assert torch.equal(loaded.get_output_embeddings().weight, stock.get_output_embeddings().weight)
        assert torch.equal(loaded.get_input_embeddings().weight, stock.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "hqq"}, "HQQ weights"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, r"compressed-tensors weights \(marlin-24"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "transform_config": {"R1": {}}},
            r"compressed-tensors weights \(pack-q",
        ),
        ({"bits": 4, "group_size": 64}, "weights quantized with 'unknown'"),
        ({"quant_method": "of-tomorrow"}, "weights quantized with 'of-tomorrow'"),
    ],
)
def test_unknown_format_is_refused_by_name(settings: dict[str, Any], name: str) -> None:
    for config in ({"quantization_config": settings}, {"text_config": {"quantization_config": settings}}):
        with pytest.raises(UnsupportedModel, match=f"^{name}.*not supported yet"):
            check_format(Path("model"), config)
    assert weight_format({"model_type": "llama", "quantization_config": None}) == PLAIN


def test_format_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    edit_config(tmp_path, quantization_config={"quant_method": "aqlm"})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match="AQLM weights: not supported yet"):
        load_span(tmp_path, WHOLE, torch.float32, CPU)


def test_auto_map_of_a_known_type_is_ignored_and_never_run(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    edit_config(tmp_path, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (tmp_path / "evil.py").write_text("raise SystemExit('code of the repository ran')\n")
    assert type(load_span(tmp_path, WHOLE, torch.float32, CPU).skeleton).__module__.startswith("transformers.")


def test_kimi_k2_is_built_as_deepseek_v3(tmp_path: Path) -> None:
    mla = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    save_tiny(tmp_path, "deepseek_v3", **MOE, **mla)
    edit_config(tmp_path, model_type="kimi_k2", auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"})
    loaded = load_span(tmp_path, WHOLE, torch.float32, CPU)
    assert type(loaded.skeleton).__name__ == "DeepseekV3ForCausalLM"

"""`--dry-run` says what a start would say: its refusals, its sizes and its number of blocks."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from tests.node.conftest import SMALL, random_model, tiny_model
from tests.support.gguf_models import write_gguf
from tests.support.local_hub import local_hub
from tests.support.quantized_checkpoints import FORMATS, is_git_projection, random_git, write_checkpoint

from treeswarm.errors import ModelError, SwarmError
from treeswarm.model_files import read_header
from treeswarm.programs.devices import Machine
from treeswarm.protocol.spans import Span
from treeswarm_node.config import DeviceConfig, ModelConfig, NodeConfig
from treeswarm_node.dry_run.appraisal import Appraisal, Sizes, appraise
from treeswarm_node.dry_run.node_plan import NodePlan, NumberFormat
from treeswarm_node.dry_run.report import as_dict, as_text
from treeswarm_node.engine.loaded_stage import ModelInfo
from treeswarm_node.model.checkpoint import lazy_weights
from treeswarm_node.model.checkpoint.headers import FROM_CONFIG, HERE
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.span_choice import read_hosting_limits

# The public numbers of GLM-4.6, and the format of its FP8 checkpoint.
GLM = {
    "model_type": "glm4_moe", "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "num_hidden_layers": 92, "first_k_dense_replace": 3, "n_routed_experts": 160, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
    "attention_bias": True, "use_qk_norm": True, "vocab_size": 151552, "max_position_embeddings": 202752,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "num_nextn_predict_layers": 1,
    "quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"},
}  # fmt: skip
MEMORY = 24 << 30


def config_for(model: Path | str, memory: int | None = MEMORY, dtype: str = "auto", kind: str = "auto") -> NodeConfig:
    return NodeConfig(ModelConfig(str(model), dtype=dtype, quantization=kind), DeviceConfig("cpu", memory=memory))


def look_at(model: Path | str, **options: Any) -> Appraisal:
    return appraise(config_for(model, **options), Machine(cpu_bf16=True))


def sizes_of(appraisal: Appraisal) -> Sizes:
    assert appraisal.sizes is not None, appraisal.refusal
    return appraisal.sizes


def plan_of(sizes: Sizes, dtype: str, quantization: str = "none") -> NodePlan:
    return next(plan for plan in sizes.plans if plan.format == NumberFormat(dtype, quantization))


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a test reads a tensor's values, unless it says so."""
    monkeypatch.setattr(lazy_weights, "safe_open", None)


def write_config(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_config_alone_gives_the_sizes_of_a_large_model(tmp_path: Path) -> None:
    appraisal = look_at(write_config(tmp_path / "glm", GLM))
    sizes = sizes_of(appraisal)
    expert = 3 * 5120 * 1536
    attention = 2 * 5120 * 96 * 128 + 2 * 5120 * 8 * 128 + (96 + 2 * 8) * 128 + 2 * 128
    router, norms = 160 * 5120 + 160, 2 * 5120
    mixture = 161 * expert + attention + router + norms
    dense = 3 * 5120 * 12288 + attention + norms
    assert sizes.parameters == 89 * (mixture - 160) + 3 * dense + 2 * 151552 * 5120 + 5120  # the router's bias is none
    assert plan_of(sizes, "bfloat16").footprint.block == 2 * (mixture - 160)
    assert plan_of(sizes, "bfloat16").footprint.kv_row == 2 * 8 * 128 * 2
    assert appraisal.source == FROM_CONFIG
    assert appraisal.test.result == "exact"
    assert "float-quantized" in appraisal.weights
    assert "expanded to bfloat16" in appraisal.weights
    # Two, five and nine blocks per node, and in few bits one less beside embedding or LM head.
    plans = [plan_of(sizes, "bfloat16", kind) for kind in ("none", "int8", "nf4")]
    assert [(plan.limits.middle, plan.limits.head, plan.limits.tail) for plan in plans] == [
        (2, 2, 2),
        (5, 4, 4),
        (9, 8, 8),
    ]
    assert [len(plan.spans) for plan in plans] == [46, 19, 11]
    assert all(plan.peak < 0.85 * MEMORY for plan in plans)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_config_alone_says_what_the_weights_say(family: str, tmp_path: Path) -> None:
    folder = tmp_path / family
    tiny_model(family).save_pretrained(folder)
    full = look_at(folder)
    assert full.source == HERE
    (folder / "model.safetensors").unlink()
    bare = look_at(folder)
    assert bare.source == FROM_CONFIG
    assert sizes_of(bare).parameters == sizes_of(full).parameters
    assert sizes_of(bare).kv_rows == sizes_of(full).kv_rows
    assert sizes_of(bare).plans == sizes_of(full).plans


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "none"), ("bfloat16", "int8"), ("float32", "nf4")])
def test_a_node_counts_the_blocks_that_the_dry_run_counts(dtype: str, kind: str, tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    config = config_for(tmp_path, memory=36 << 20, dtype=dtype, kind=kind)
    plan = sizes_of(appraise(config, Machine())).chosen_plan
    assert plan.format == NumberFormat(dtype, kind)
    skeleton = build_skeleton(tmp_path, getattr(torch, dtype))
    assert plan.limits == read_hosting_limits(config, ModelInfo.find(str(tmp_path)), skeleton).spans


def test_weights_that_keep_their_published_bits_are_rows_of_the_table(tmp_path: Path) -> None:
    fp8 = tmp_path / "fp8"
    write_checkpoint(tiny_model("qwen3"), FORMATS["modelopt fp8"], fp8)
    write_checkpoint(tiny_model("qwen3"), FORMATS["awq"], tmp_path / "model")
    config = config_for(tmp_path / "model", dtype="bfloat16")
    appraisal = appraise(config, Machine(cpu_int4=True))
    sizes = sizes_of(appraisal)
    held = next(plan for plan in sizes.plans if plan.format == NumberFormat("bfloat16", holds_codes=True))
    kernels, expanded = plan_of(sizes, "bfloat16", "published"), plan_of(sizes, "bfloat16")
    assert held.footprint.block < kernels.footprint.block < 0.6 * expanded.footprint.block, "offsets beside scales"
    assert sizes.chosen == NumberFormat("bfloat16"), "it fits expanded, which computes faster"
    text = as_text(appraise(replace(config, device=replace(config.device, expand="use")), Machine()))
    assert "* bfloat16, expanded at use" in text
    assert "published, bfloat16" in text
    assert "held so, and expanded to bfloat16 one matrix at a time in every forward" in " ".join(text.split())
    refused = plan_of(sizes_of(look_at(fp8, dtype="bfloat16", kind="published")), "bfloat16", "published")
    assert "no kernel multiplies with FP8 per tensor" in str(refused.refusal)
    assert {"holds_codes": True}.items() <= as_dict(appraisal)["formats"][1].items()


def without_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def with_unknown_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.extra.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")


def with_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))

    return change


def as_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "spoil",
    [
        without_tensor,
        with_unknown_tensor,
        as_bin,
        with_config(quantization_config={"quant_method": "aqlm"}),
        with_config(model_type="not_a_type", auto_map={"AutoModel": "code.Model"}),
        with_config(num_hidden_layers=None),
    ],
    ids=["missing", "unknown", "bin", "format", "type", "config"],
)
def test_refusal_is_that_of_a_start(
    spoil: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    spoil(tmp_path)
    appraisal = look_at(tmp_path)
    monkeypatch.undo()  # a start reads values
    with pytest.raises(SwarmError) as refused:
        load_span(ModelInfo.find(str(tmp_path)).folder, Span(0, 4), torch.float32, torch.device("cpu"))
    assert appraisal.refusal == str(refused.value)
    assert appraisal.sizes is None
    assert not appraisal.can_start
    assert f"no: {refused.value}" in " ".join(as_text(appraisal).split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without the device that is planned for")
def test_given_memory_plans_for_a_device_of_another_machine(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    machine = Machine(cuda=1, cuda_bf16=True)
    config = NodeConfig(ModelConfig(str(tmp_path), dtype="bfloat16"), DeviceConfig("cuda", memory=1 << 30))
    assert sizes_of(appraise(config, machine)).room.memory == 1 << 30
    free = appraise(replace(config, device=DeviceConfig("cuda")), machine)
    assert free.refusal.startswith("device 'cuda' cannot be used here")
    unknown = appraise(replace(config, device=DeviceConfig("abacus", memory=1 << 30)), machine)
    assert unknown.refusal.startswith("device 'abacus' cannot be used here")


def test_recurrent_model_is_refused_from_its_config(tmp_path: Path) -> None:
    appraisal = look_at(write_config(tmp_path / "next", {"model_type": "qwen3_next", **SMALL}))
    assert appraisal.test.result == "refused"
    assert appraisal.refusal
    assert appraisal.sizes is None


def test_published_format_is_told_from_the_headers(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=96)
    write_checkpoint(model, FORMATS["fp8 blocks"], tmp_path / "fp8")
    appraisal = look_at(tmp_path / "fp8", dtype="float32")
    sizes, header = sizes_of(appraisal), read_header(tmp_path / "fp8" / "model.safetensors")
    stored = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    assert sizes.published is not None
    assert sizes.published.total == sum(end - start for start, end in stored)
    assert sizes.published.block < plan_of(sizes, "float32").footprint.block / 3
    assert "FP8 in blocks of 32×32" in appraisal.weights


@pytest.mark.parametrize("is_fp8", [False, True], ids=["plain", "fp8"])
def test_blocks_are_those_that_loading_finds_whatever_their_names(is_fp8: bool, tmp_path: Path) -> None:
    """GIT's decoder has `layer`; the layers of its image part are larger here, and are no blocks."""
    plain = write_checkpoint(random_git(), FORMATS["fp8 blocks"], tmp_path / "fp8", is_git_projection)
    appraisal = look_at(tmp_path / "fp8" if is_fp8 else plain, dtype="float32")
    sizes, rest = sizes_of(appraisal), 4 * (2 * 2 * 64 + 6 * 64)  # norms and biases
    assert sizes.published is not None
    assert sizes.published.block == rest + (6 * (64 * 64 + 4 * 4) if is_fp8 else 4 * 6 * 64 * 64)
    if is_fp8:
        held = next(plan for plan in sizes.plans if plan.format == NumberFormat("float32", holds_codes=True))
        assert held.footprint.block == sizes.published.block
        assert "FP8 in blocks of 32×32" in appraisal.weights


def test_gguf_file_is_appraised_from_its_own_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "tiny.gguf", kind="Q8_0")
    appraisal = look_at(file)
    sizes = sizes_of(appraisal)
    assert sizes.published is not None
    assert sizes.published.total < file.stat().st_size
    assert sizes.published.block < plan_of(sizes, "bfloat16").footprint.block
    assert appraisal.weights.startswith("GGUF")


def test_latent_attention_keeps_latents(tmp_path: Path) -> None:
    config = {
        **SMALL, "model_type": "deepseek_v3", "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": 32, "kv_lora_rank": 24, "q_lora_rank": 32, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1,
    }  # fmt: skip
    sizes = sizes_of(look_at(write_config(tmp_path / "mla", config)))
    assert plan_of(sizes, "bfloat16").footprint.kv_row == (24 + 8) * 2
    assert sizes.kv_rows == ["latents of 32 + 24"]


def test_biases_beside_gptq_codes_count_as_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tmp_path / "gptq"
    write_checkpoint(tiny_model("llama"), FORMATS["gptq"], whole)
    tensors = load_file(whole / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.bias"] = torch.zeros(64)
    save_file(tensors, whole / "model.safetensors")
    with local_hub() as hub:
        hub.add_folder("org/model", whole)
        hub.use_here(tmp_path, monkeypatch)
        appraisal = look_at("org/model")
    assert appraisal.refusal is None
    assert "GPTQ int4" in appraisal.weights


def test_hub_without_headers_leaves_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network")

    tiny_model("llama").save_pretrained(tmp_path / "whole")
    monkeypatch.setattr(HfApi, "get_safetensors_metadata", fail)
    with local_hub() as hub:
        hub.add_folder("org/model", tmp_path / "whole")
        hub.use_here(tmp_path, monkeypatch)
        appraisal = look_at("org/model")
    assert sizes_of(appraisal).published is None
    assert FROM_CONFIG in appraisal.source
    assert "ConnectionError no network" in appraisal.source


def test_report_names_the_chosen_format_and_its_spans(tmp_path: Path) -> None:
    random_model("llama", **SMALL).save_pretrained(tmp_path)
    appraisal = look_at(tmp_path, memory=36 << 20, dtype="float32")
    plan = sizes_of(appraisal).chosen_plan
    text, data = as_text(appraisal), json.loads(json.dumps(as_dict(appraisal)))
    chosen = next(entry for entry in data["formats"] if entry["chosen"])
    assert chosen["spans"] == [str(span) for span in plan.spans]
    assert (data["can_start"], data["blocks"], data["refusal"]) == (appraisal.can_start, 4, None)
    assert "\n* float32" in text
    assert "yes; its config, headers and modules are accepted" in " ".join(text.split())


def test_too_little_memory_is_said_and_is_no_refusal_of_the_model(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    appraisal = look_at(tmp_path, memory=1 << 20)
    assert appraisal.refusal is None
    assert not appraisal.can_start
    assert "It hosts nothing here: not one block fits: 1.00 MiB are free" in " ".join(as_text(appraisal).split())


def test_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no model"):
        look_at(tmp_path / "nothing")

"""Write the table of models in docs/models.md: what `swarm-node MODEL --dry-run` says of the public numbers of each.

No weight of these models is read here: the configs below are their architectures, as published.
"""

import json
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers

from treeswarm.programs.devices import Machine
from treeswarm.programs.units import format_bytes
from treeswarm_node.config import DeviceConfig, ModelConfig, NodeConfig
from treeswarm_node.dry_run.appraisal import Appraisal, appraise
from treeswarm_node.dry_run.node_plan import NodePlan

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- sizes: begin -->", "<!-- sizes: end -->"
MEMORY = 24 << 30
# A machine whose cards compute in 16 bits, and that has the library for 4 bits.
CARDS = Machine(cuda=1, cuda_bf16=True, bitsandbytes=True)
FORMATS = ("none", "int8", "nf4")


@dataclass(frozen=True)
class PublicModel:
    """Names a model, and holds the numbers of its architecture."""

    name: str
    published: str
    """Formats in which it is published."""
    model_type: str
    billions: float
    """Number of parameters that its publisher names, in units of 10^9, of the text decoder alone."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """Fields of its config where they are not the defaults of transformers."""


def _attention(layers: int, hidden: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "tie_word_embeddings": False, **more,
    }  # fmt: skip


GLM = _attention(
    92, 5120, 96, 8, 151552, head_dim=128, intermediate_size=12288, moe_intermediate_size=1536, n_routed_experts=160,
    n_shared_experts=1, num_experts_per_tok=8, first_k_dense_replace=3, use_qk_norm=True, attention_bias=True,
)  # fmt: skip
KIMI = {"num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384, "first_k_dense_replace": 1,
        "vocab_size": 163840, "n_group": 1, "topk_group": 1}  # fmt: skip
GEMMA4 = {"head_dim": 256, "global_head_dim": 512, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
          "final_logit_softcapping": 30.0, "sliding_window": 1024, "max_position_embeddings": 262144,
          "tie_word_embeddings": True}  # fmt: skip
MODELS = [
    PublicModel("Qwen3-32B", "bf16, FP8, AWQ, GGUF", "qwen3", 32.8,
                _attention(64, 5120, 64, 8, 151936, head_dim=128, intermediate_size=25600)),
    PublicModel("Llama 3.3 70B", "bf16, GGUF", "llama", 70.6,
                _attention(80, 8192, 64, 8, 128256, intermediate_size=28672)),
    PublicModel("Llama 3.1 405B", "bf16, FP8", "llama", 405,
                _attention(126, 16384, 128, 8, 128256, intermediate_size=53248)),
    PublicModel("Mistral Large 2", "bf16", "mistral", 123,
                _attention(88, 12288, 96, 8, 32768, head_dim=128, intermediate_size=28672)),
    PublicModel("Command A", "bf16", "cohere2", 111,
                {**_attention(64, 12288, 96, 8, 256000, head_dim=128, intermediate_size=36864),
                 "tie_word_embeddings": True}),
    PublicModel("Seed-OSS-36B", "bf16", "seed_oss", 36.2,
                _attention(64, 5120, 80, 8, 155136, head_dim=128, intermediate_size=27648)),
    PublicModel("gpt-oss-120b", "MXFP4", "gpt_oss", 117, {}),
    PublicModel("GLM-4.5-Air", "bf16, FP8", "glm4_moe", 106,
                _attention(46, 4096, 96, 8, 151552, head_dim=128, intermediate_size=10944, moe_intermediate_size=1408)),
    PublicModel("GLM-4.5, 4.6, 4.7", "bf16, FP8", "glm4_moe", 355, GLM),
    PublicModel("MiniMax-M2, M2.1, M2.5", "FP8", "minimax_m2", 230,
                _attention(62, 3072, 48, 8, 200064, head_dim=128, intermediate_size=1536, num_local_experts=256)),
    PublicModel("Qwen3-235B-A22B", "bf16, FP8", "qwen3_moe", 235,
                _attention(94, 4096, 64, 4, 151936, head_dim=128, moe_intermediate_size=1536, num_experts=128)),
    PublicModel("Qwen3-Coder-480B-A35B", "bf16, FP8", "qwen3_moe", 480,
                _attention(62, 6144, 96, 8, 151936, head_dim=128, moe_intermediate_size=2560, num_experts=160)),
    PublicModel("dots.llm1", "bf16", "dots1", 142,
                _attention(62, 4096, 32, 32, 152064, intermediate_size=10944, moe_intermediate_size=1408,
                           n_routed_experts=128, n_shared_experts=2, first_k_dense_replace=1)),
    PublicModel("ERNIE-4.5-300B-A47B", "bf16", "ernie4_5_moe", 300,
                _attention(54, 8192, 64, 8, 103424, intermediate_size=28672, moe_intermediate_size=3584,
                           moe_num_experts=64, moe_num_shared_experts=0, moe_layer_start_index=3)),
    PublicModel("DeepSeek-V3, R1, V3.1", "FP8", "deepseek_v3", 671, {}),
    PublicModel("Kimi-K2", "FP8, int4", "kimi_k2", 1026, KIMI),
    PublicModel("Gemma 3 27B", "bf16", "gemma3", 27.0, {"text_config": {
        **_attention(62, 5376, 32, 16, 262208, head_dim=128, intermediate_size=21504, sliding_window=1024),
        "model_type": "gemma3_text", "tie_word_embeddings": True}}),
    PublicModel("Gemma 4 31B", "bf16", "gemma4", 30.7, {"text_config": {
        **_attention(60, 5376, 32, 16, 262144, intermediate_size=21504, num_global_key_value_heads=4),
        "model_type": "gemma4_text", **GEMMA4}}),
    PublicModel("Gemma 4 26B-A4B", "bf16", "gemma4", 25.2, {"text_config": {
        **_attention(30, 2816, 16, 8, 262144, intermediate_size=2112, num_global_key_value_heads=2,
                     enable_moe_block=True, num_experts=128, moe_intermediate_size=704, top_k_experts=8),
        "model_type": "gemma4_text", **GEMMA4}}),
    PublicModel("Mistral Small 3.1, 3.2", "bf16, FP8", "mistral3", 23.6, {"tie_word_embeddings": False, "text_config": {
        **_attention(40, 5120, 32, 8, 131072, head_dim=128, intermediate_size=32768), "model_type": "mistral"}}),
    PublicModel("Llama 4 Scout", "bf16", "llama4", 107, {"text_config": {"model_type": "llama4_text"}}),
    PublicModel("Llama 4 Maverick", "bf16, FP8", "llama4", 400, {"text_config": {
        "model_type": "llama4_text", "num_local_experts": 128, "interleave_moe_layer_step": 2}}),
    PublicModel("Hunyuan-A13B", "bf16, FP8, GPTQ", "hunyuan_v1_moe", 80,
                {**_attention(32, 4096, 32, 8, 128167, head_dim=128, intermediate_size=3072, num_experts=64,
                              moe_topk=8), "tie_word_embeddings": True}),
    PublicModel("Hy3", "bf16, FP8", "hy_v3", 295, {}),
    PublicModel("MiMo-V2-Flash", "FP8", "mimo_v2_flash", 309, {}),
    PublicModel("Step-3.7-Flash", "bf16, FP8", "step3p7", 196, {}),
    PublicModel("GLM-4.7-Flash", "bf16", "glm4_moe_lite", 30, {}),
    PublicModel("K-EXAONE-236B-A23B", "bf16, FP8", "exaone_moe", 236,
                _attention(48, 6144, 64, 8, 153600, head_dim=128, intermediate_size=18432,
                           moe_intermediate_size=2048, num_experts=128, num_experts_per_tok=8)),
    PublicModel("Solar-Open-100B", "bf16", "solar_open", 102, {}),
    PublicModel("Kimi-K2.5", "int4", "kimi_k25", 1026, {"text_config": {"model_type": "deepseek_v3", **KIMI}}),
    PublicModel("Mistral Small 4", "FP8", "mistral3", 119, {
        "tie_word_embeddings": False, "text_config": {"model_type": "mistral4"}}),
    PublicModel("DeepSeek-V4-Flash", "FP8, FP4", "deepseek_v4", 284, {}),
    PublicModel("Qwen3.5-397B-A17B", "bf16, FP8", "qwen3_5_moe", 397, {}),
    PublicModel("Kimi-Linear-48B-A3B", "bf16", "kimi_linear", 48, {}),
    PublicModel("DeepSeek-V3.2", "FP8", "deepseek_v32", 671, {}),
    PublicModel("GLM-5", "bf16, FP8", "glm_moe_dsa", 744, {}),
    PublicModel("Qwen3-Next-80B-A3B", "bf16, FP8", "qwen3_next", 80, {}),
    PublicModel("Nemotron-H", "bf16", "nemotron_h", 56, {}),
]  # fmt: skip
HEAD = (
    "| model | type | published as | parameters | blocks | per block in 16, 8, 4 bits | KV per token and block "
    "| nodes of 24 GiB in 16, 8, 4 bits | today |\n|---|---|---|---|---|---|---|---|---|"
)


def appraise_numbers(model: PublicModel) -> Appraisal:
    """Return what a node with a 24 GiB card would do with a model of these numbers."""
    if model.model_type in transformers.CONFIG_MAPPING:
        content = transformers.CONFIG_MAPPING[model.model_type](**model.numbers).to_dict()
    else:
        content = transformers.CONFIG_MAPPING["deepseek_v3"](**model.numbers).to_dict()
    content |= {"model_type": model.model_type, "dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(content))
        return appraise(NodeConfig(ModelConfig(folder), DeviceConfig("cuda", memory=MEMORY)), CARDS)


def table_row(model: PublicModel, found: Appraisal) -> str:
    """Return the model's row."""
    cells = [model.name, model.model_type, model.published]
    today = {"exact": "works", "refused": f"refused: {found.test.reason}", "open": "not exact yet"}
    if found.sizes is None:
        return f"| {' | '.join([*cells, '', '', '', '', '', today.get(found.test.result, 'refused')])} |"
    plans = {plan.format.quantization: plan for plan in found.sizes.plans if plan.format.dtype == "bfloat16"}
    cells += [f"{found.sizes.parameters / 1e9:.0f} B", str(found.sizes.shape.blocks)]
    cells.append(", ".join(format_bytes(plans[kind].footprint.block) for kind in FORMATS))
    cells.append(format_bytes(plans["none"].footprint.kv_row))
    cells.append(", ".join(_nodes(plans[kind]) for kind in FORMATS))
    return f"| {' | '.join([*cells, today.get(found.test.result, 'untested')])} |"


def _nodes(plan: NodePlan) -> str:
    return str(len(plan.spans)) if plan.spans else "none fits"


def describe() -> str:
    """Return the section of the page."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    return "\n".join([HEAD, *(table_row(model, appraise_numbers(model)) for model in MODELS)]) + "\n"


def main() -> int:
    """Write the section, and return 0."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{describe()}{END}{after}", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
MODELS = [
    PublicModel("Qwen3-32B", "bf16, FP8, AWQ, GGUF", "qwen3",
                _attention(64, 5120, 64, 8, 151936, head_dim=128, intermediate_size=25600)),
    PublicModel("Llama 3.3 70B", "bf16, GGUF", "llama", _attention(80, 8192, 64, 8, 128256, intermediate_size=28672)),
    PublicModel("Llama 3.1 405B", "bf16, FP8", "llama",
                _attention(126, 16384, 128, 8, 128256, intermediate_size=53248)),
    PublicModel("Mistral Large 2", "bf16", "mistral",
                _attention(88, 12288, 96, 8, 32768, head_dim=128, intermediate_size=28672)),
    PublicModel("Command A", "bf16", "cohere2",
                {**_attention(64, 12288, 96, 8, 256000, head_dim=128, intermediate_size=36864),
                 "tie_word_embeddings": True}),
    PublicModel("Seed-OSS-36B", "bf16", "seed_oss",
                _attention(64, 5120, 80, 8, 155136, head_dim=128, intermediate_size=27648)),
    PublicModel("gpt-oss-120b", "MXFP4", "gpt_oss", {}),
    PublicModel("GLM-4.5-Air", "bf16, FP8", "glm4_moe",
                _attention(46, 4096, 96, 8, 151552, head_dim=128, intermediate_size=10944, moe_intermediate_size=1408)),
    PublicModel("GLM-4.5, 4.6, 4.7", "bf16, FP8", "glm4_moe", GLM),
    PublicModel("MiniMax-M2", "FP8", "minimax_m2",
                _attention(62, 3072, 48, 8, 200064, head_dim=128, intermediate_size=1536, num_local_experts=256)),
    PublicModel("Qwen3-235B-A22B", "bf16, FP8", "qwen3_moe",
                _attention(94, 4096, 64, 4, 151936, head_dim=128, moe_intermediate_size=1536, num_experts=128)),
    PublicModel("Qwen3-Coder-480B-A35B", "bf16, FP8", "qwen3_moe",
                _attention(62, 6144, 96, 8, 151936, head_dim=128, moe_intermediate_size=2560, num_experts=160)),
    PublicModel("dots.llm1", "bf16", "dots1",
                _attention(62, 4096, 32, 32, 152064, intermediate_size=10944, moe_intermediate_size=1408,
                           n_routed_experts=128, n_shared_experts=2, first_k_dense_replace=1)),
    PublicModel("ERNIE-4.5-300B-A47B", "bf16", "ernie4_5_moe",
                _attention(54, 8192, 64, 8, 103424, intermediate_size=28672, moe_intermediate_size=3584,
                           moe_num_experts=64, moe_num_shared_experts=0, moe_layer_start_index=3)),
    PublicModel("DeepSeek-V3, R1, V3.1", "FP8", "deepseek_v3", {}),
    PublicModel("Kimi-K2", "FP8, int4", "kimi_k2", KIMI),
    PublicModel("DeepSeek-V3.2", "FP8", "deepseek_v32", {}),
    PublicModel("GLM-5", "bf16, FP8", "glm_moe_dsa", {}),
    PublicModel("Qwen3-Next-80B-A3B", "bf16, FP8", "qwen3_next", {}),
    PublicModel("Nemotron-H", "bf16", "nemotron_h", {}),
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


def table_row(model: PublicModel) -> str:
    """Return the model's row."""
    found = appraise_numbers(model)
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
    return "\n".join([HEAD, *map(table_row, MODELS)]) + "\n"


def main() -> int:
    """Write the section, and return 0."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{describe()}{END}{after}", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

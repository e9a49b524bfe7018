"""Real nodes that hold weights in published bits and nodes that expand them serve one text, stock transformers'."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.support.quantized_checkpoints import FORMATS, MXFP4_EXPERTS, write_checkpoint
from tests.support.quantized_checkpoints import random_model as make_model

from treeswarm.protocol.spans import Span
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import local_swarm
from treeswarm_client.reference import stock_greedy

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]  # three processes load torch for each format
TOKENS = 24
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "eos_token_id": 0, "bos_token_id": 0,
    "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 24},
}


def write_model(published: str, tokenizer: Path, folder: Path) -> Path:
    """Save a tiny mixture in a format, and return the folder of the same weights as plain numbers."""
    kind = "gpt_oss" if published == "mxfp4" else "qwen3_moe"
    vocabulary = {"vocab_size": json.loads((tokenizer / "config.json").read_text())["vocab_size"]}
    model = make_model(kind, SIZES, vocabulary, MIXTURES[kind])
    if published == "mxfp4":
        plain = write_checkpoint(model, MXFP4_EXPERTS, folder, lambda name: name.endswith("_proj"))
    else:
        plain = write_checkpoint(model, FORMATS[published], folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, folder)
        shutil.copy(tokenizer / file, plain)
    return plain


@pytest.mark.parametrize("published", ["mxfp4", "fp8 blocks", "gptq", "compressed int4", "bitsandbytes nf4"])
async def test_nodes_that_hold_codes_and_nodes_that_expand_form_a_chain(
    published: str, random_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    plain = write_model(published, random_model, folder)
    async with (
        local_swarm(str(folder), [Span(0, 1), Span(1, 3)], own_flags=[("--expand", "use"), ()]) as swarm,
        SwarmClient(model=str(folder), peers=swarm.peers) as client,
    ):
        prompts = [client.encode("the 7 quick brown foxes")]
        stock = await stock_greedy(plain, prompts, TOKENS, "float32")
        for size in (0, 8):
            run = await client.generate(prompts[0], max_new_tokens=TOKENS, tree_size=size, ignore_eos=True)
            assert run.token_ids == stock.token_ids[0], f"tree size {size}"
    errors = [(await node.errors).decode() for node in swarm.nodes]
    assert "held so, and expanded to float32" in errors[0]
    assert "expanded while they are loaded to float32" in errors[1]

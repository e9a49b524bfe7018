"""Real nodes load every published format, and their text is stock transformers' on the same weights as numbers."""

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
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
MOE: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 64}


@pytest.mark.parametrize("published", ["mxfp4", *FORMATS])
async def test_text_is_stock_transformers_on_the_same_weights(
    published: str, random_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    vocabulary = {"vocab_size": json.loads((random_model / "config.json").read_text())["vocab_size"]}
    if published == "mxfp4":
        model = make_model("gpt_oss", SIZES, vocabulary, {"num_local_experts": 4, "sliding_window": 24})
        plain = write_checkpoint(model, MXFP4_EXPERTS, folder, lambda name: name.endswith("_proj"))
    else:
        plain = write_checkpoint(make_model("qwen3_moe", SIZES, vocabulary, MOE), FORMATS[published], folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(random_model / file, folder)
        shutil.copy(random_model / file, plain)
    async with (
        local_swarm(str(folder), [Span(0, 1), Span(1, 3)]) as swarm,
        SwarmClient(model=str(folder), peers=swarm.peers) as client,
    ):
        prompts = [client.encode(text) for text in ("the 7 quick brown foxes", "lazy dogs jump", "over 21 foxes")]
        stock = await stock_greedy(plain, prompts, TOKENS, "float32")
        assert len({token for text in stock.token_ids for token in text}) > 8  # no text of one token
        for prompt, expected in zip(prompts, stock.token_ids, strict=True):
            for size in (0, 8):
                run = await client.generate(prompt, max_new_tokens=TOKENS, tree_size=size, ignore_eos=True)
                assert run.token_ids == expected, f"tree size {size}"
    for node in swarm.nodes:
        assert "weights are published as " in (await node.errors).decode()

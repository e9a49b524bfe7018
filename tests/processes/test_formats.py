"""Real nodes load every published format, and their text is stock transformers' on the same weights as numbers."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.gguf_models import write_gguf
from tests.support.quantized_checkpoints import FORMATS, MXFP4_EXPERTS, write_checkpoint
from tests.support.quantized_checkpoints import random_model as make_model
from transformers import AutoModelForCausalLM

from treeswarm.protocol.spans import Span
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import local_swarm

pytestmark = pytest.mark.asyncio
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
QUICK = "fp8 blocks"
MOE: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 64}


def all_but_one_slow(published: str) -> Any:
    """Return the parameter: a process loads torch for each format."""
    return pytest.param(published, marks=[] if published == QUICK else pytest.mark.slow)


@pytest.mark.parametrize("published", [all_but_one_slow(name) for name in ("mxfp4", *FORMATS)])
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
    spans = [Span(0, 1), Span(1, 3)] if published == QUICK else [Span(0, 3)]
    await compare_texts(str(folder), plain, spans, "weights are published as ")


async def compare_texts(model: str, plain: Path, spans: list[Span], said: str) -> None:
    """Assert that nodes of these spans write stock transformers' texts of the `plain` weights, and log `said`."""
    async with local_swarm(model, spans) as swarm, SwarmClient(model=model, peers=swarm.peers) as client:
        prompts = [client.encode(text) for text in ("the 7 quick brown foxes", "lazy dogs jump", "over 21 foxes")]
        texts = await asyncio.to_thread(greedy_texts, plain, prompts)
        assert len({token for text in texts for token in text}) > 8  # no text of one token
        for prompt, expected in zip(prompts, texts, strict=True):
            for size in (0, 8):
                run = await client.generate(prompt, max_new_tokens=TOKENS, tree_size=size, ignore_eos=True)
                assert run.token_ids == expected, f"tree size {size}"
    for node in swarm.nodes:
        assert said in (await node.errors).decode()


@torch.inference_mode()
def greedy_texts(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return the tokens that stock transformers chooses; nothing of this project's nodes is imported here."""
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    texts = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(TOKENS):
            tokens.append(int(stock(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        texts.append(tokens[len(prompt) :])
    return texts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama", "F16"), ("llama", "Q4_0"), ("llama", "Q4_1"), ("llama", "Q8_0"), ("llama", "Q4_K"),
        ("llama", "Q6_K"), ("qwen2", "Q8_0"), ("qwen3moe", "Q4_0"),
    ],
)  # fmt: skip
async def test_text_of_a_gguf_file_is_stock_transformers_own(
    architecture: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "tiny.gguf", architecture=architecture, kind=kind, change=widen)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    # A model that was loaded from a GGUF file cannot be saved: its tensors are copied into one that can.
    plain = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(tmp_path / "plain")
    await compare_texts(str(file), tmp_path / "plain", [Span(0, 1), Span(1, 2)] if kind == "Q4_K" else [Span(0, 2)], "")


def widen(name: str, tensor: np.ndarray) -> np.ndarray:
    """Return matrices that are large enough that no text of one token comes out."""
    return tensor if "norm" in name else 2 * tensor

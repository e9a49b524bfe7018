"""A node whose memory holds the quantized blocks, but not one of them unquantized, starts and writes exact text."""

from pathlib import Path

import pytest
import torch
from tests.processes.conftest import save_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from treeswarm.protocol.spans import Span
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import HostCommand, local_swarm
from treeswarm_client.reference import stock_greedy
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.footprint import read_footprint
from treeswarm_node.model.memory_fit import NodeRoom, peak_bytes
from treeswarm_node.model.quantization.quantized_linear import dequantized_copy

CPU = torch.device("cpu")
TOKENS = 12
KV_TOKENS = 512
KIND = "int8"
# Bytes of data that a node's process has besides the model, its threads' stacks among them: less than 700 MiB were seen
# (2026-11-30).
PROGRAM = 768 << 20


def save_mixture(folder: Path) -> None:
    """Save a model whose second block has 128 experts: 1.2 GB in float32, a quarter of that in 8 bits."""
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=1024, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=4,
        num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=64, intermediate_size=512,
        mlp_only_layers=[0], vocab_size=save_tokenizer(folder), max_position_embeddings=512, eos_token_id=0,
        bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def save_dequantized(folder: Path, plain: Path, blocks: Span) -> None:
    """Save the model as it is with the weights of `blocks` in few bits, as float32 numbers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for block in range(blocks.start, blocks.end):
        loaded = load_span(folder, Span(block, block + 1), torch.float32, CPU, quantization=KIND)
        layer = dequantized_copy(loaded.skeleton.base_model.layers[block])
        model.base_model.layers[block].load_state_dict(layer.state_dict())
    model.save_pretrained(plain)


@pytest.mark.timeout(900)
@pytest.mark.slow  # two processes load torch, and 2 GB are written
async def test_a_node_with_room_for_quantized_blocks_alone_serves_exact_text(tmp_path: Path) -> None:
    folder, plain = tmp_path / "model", tmp_path / "plain"
    folder.mkdir()
    save_mixture(folder)
    save_dequantized(folder, plain, Span(0, 2))
    save_tokenizer(plain)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    unquantized = read_footprint(skeleton, torch.float32, "none", "cpu").block
    footprint = read_footprint(skeleton, torch.float32, KIND, "cpu")
    needed = peak_bytes(1, NodeRoom(0, None, KV_TOKENS, 2048), footprint, footprint.ends.tail)
    assert needed < unquantized - (400 << 20), "what is said before loading is less than one block unquantized"
    mapped = (folder / "model.safetensors").stat().st_size  # The limit counts it, although no page of it is written.
    limit = PROGRAM + mapped + needed
    hosts = [HostCommand(), HostCommand(through=("prlimit", f"--data={limit}"))]
    flags = ["--quantization", KIND, "--kv-tokens", str(KV_TOKENS)]
    async with (
        local_swarm(str(folder), [Span(0, 1), Span(1, 2)], hosts=hosts, flags=flags) as swarm,
        SwarmClient(str(folder), peers=swarm.peers) as client,
    ):
        prompt = client.encode("the 7 quick brown foxes jump")
        (stock,) = (await stock_greedy(plain, [prompt], TOKENS, "float32")).token_ids
        for size in (0, 6):
            run = await client.generate(prompt, max_new_tokens=TOKENS, tree_size=size, ignore_eos=True)
            assert run.token_ids == stock

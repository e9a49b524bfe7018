"""Plain blocks are computed in few operations and give what their own forward gives; all others keep theirs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.node.conftest import CPU, SpanChain, append_of, tiny_model

from treeswarm.protocol.spans import Span
from treeswarm_node.model.attention_selection import choose_attention
from treeswarm_node.model.check.fused_check import fuse_blocks
from treeswarm_node.model.check.weights import check_weights
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.fused_block import FusedBlock
from treeswarm_node.model.quantization.packed_products import pack_products
from treeswarm_node.model.span_model import SpanModel
from treeswarm_node.model.weight_layout import to_column_major

BLOCKS = 4


def load(folder: Path, dtype: torch.dtype, quantization: str = "none") -> SpanModel:
    model = SpanModel(load_span(folder, Span(0, BLOCKS), dtype, CPU, quantization=quantization), 1024)
    pack_products(model.layers)
    return model


def run_tree(model: SpanModel) -> torch.Tensor:
    """Return the activations of a prompt and of a tree below it."""
    chain = SpanChain([model])
    chain.open("a", 64)
    prompt = chain.run({"a": append_of(0, 1, range(9), range(20, 29), prefill=True)})["a"]
    tree = chain.run({"a": append_of(1, 10, [9, 9, 10, 11, 10], [3, 4, 5, 6, 7])})["a"]
    return torch.cat([prompt, tree]).float()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_plain_blocks_compute_what_their_own_forward_computes(tmp_path: Path, model_type: str) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    model = load(tmp_path, torch.float32)
    expected = run_tree(model)
    choose_attention(model, "auto")
    assert fuse_blocks(model) == BLOCKS
    assert 0 < difference(run_tree(model), expected) < 1e-5
    assert check_weights(model) > 0, "weights that became views of one are the checkpoint's"


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_blocks_in_few_bits_compute_what_their_own_forward_computes(tmp_path: Path, quantization: str) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    model = load(tmp_path, torch.bfloat16, quantization)
    expected = run_tree(model)
    choose_attention(model, "auto")
    assert fuse_blocks(model) == BLOCKS
    assert 0 < difference(run_tree(model), expected) < 0.03


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "olmo2", "mixtral"])
def test_other_blocks_keep_their_own_forward(tmp_path: Path, model_type: str) -> None:
    tiny_model(model_type).save_pretrained(tmp_path)
    model = load(tmp_path, torch.float32)
    assert fuse_blocks(model) == 0


def test_a_block_that_differs_keeps_its_own_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    model = load(tmp_path, torch.float32)
    run = FusedBlock.run

    def wrong(self: FusedBlock, arguments: dict[str, Any]) -> torch.Tensor:
        return run(self, arguments) * 1.001

    monkeypatch.setattr(FusedBlock, "run", wrong)
    assert fuse_blocks(model) == 0


def test_joined_weights_keep_their_layout_and_are_held_once(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    model = load(tmp_path, torch.float32)
    layer: Any = model.layers[0]
    for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        linear.weight.data = to_column_major(linear.weight.data)
    before = layer.self_attn.k_proj.weight.clone()
    assert fuse_blocks(model) == BLOCKS
    query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
    assert torch.equal(key, before)
    assert key.stride(0) == 1
    assert key.untyped_storage().data_ptr() == query.untyped_storage().data_ptr()

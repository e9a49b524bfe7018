"""Models whose layers differ in heads, widths, shared keys and values or inputs of their own are exact under trees."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.node.conftest import CPU, SpanChain, random_model
from tests.node.model.test_families import TOLERANCE, worst_difference

from treeswarm.errors import BadRequest
from treeswarm.protocol.spans import Span
from treeswarm.topology.span_limits import SpanLimits
from treeswarm_node.attention.base import Attention
from treeswarm_node.config import ModelConfig, NodeConfig
from treeswarm_node.engine.loaded_stage import ModelInfo
from treeswarm_node.model.check.family_check import check_family
from treeswarm_node.model.checkpoint.skeleton import build_skeleton
from treeswarm_node.model.families.kv_shapes import fit_to_cuts, kv_shapes
from treeswarm_node.model.loaded_span import LoadedSpan
from treeswarm_node.model.quantization.quantized_linear import quantize
from treeswarm_node.model.span_model import SpanModel
from treeswarm_node.span_choice import read_hosting_limits

SMALL: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 24,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
KINDS = ["sliding_attention", "full_attention"] * 3
GEMMA4: dict[str, Any] = {"layer_types": KINDS, "global_head_dim": 32, "vocab_size_per_layer_input": 199}
SHARED: dict[str, Any] = {**GEMMA4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
MIDDLE, EARLY = [Span(0, 1), Span(1, 4), Span(4, 6)], [Span(0, 1), Span(1, 2), Span(2, 6)]
MODELS: dict[str, tuple[str, dict[str, Any], list[Span]]] = {
    "global heads of other widths": ("gemma4_unified_text", GEMMA4, MIDDLE),
    "global values that are keys": (
        "gemma4_unified_text", {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}, MIDDLE,
    ),
    "shared keys and values": ("gemma4_unified_text", SHARED, EARLY),
    "inputs per layer": ("gemma4_text", {**GEMMA4, "hidden_size_per_layer_input": 8}, MIDDLE),
    "inputs per layer, shared keys and values": ("gemma4_text", {**SHARED, "hidden_size_per_layer_input": 8}, EARLY),
    "several rows of activations per token": (
        "gemma3n_text",
        {
            "layer_types": KINDS, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 199,
            "hidden_size_per_layer_input": 8, "laurel_rank": 8, "intermediate_size": [96] * 6,
            "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0, 0.0, 0.0],
        },
        EARLY,
    ),
    "experts": (
        "gemma4_text",
        {
            **GEMMA4, "hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4,
            "top_k_experts": 2, "moe_intermediate_size": 32,
        },
        MIDDLE,
    ),
    "values narrower than keys, sinks": (
        "mimo_v2_flash",
        {
            "layer_types": KINDS[::-1], "v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
        MIDDLE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_trees_on_a_cut_model_equal_the_plain_model(name: str, adapter: Attention) -> None:
    model_type, config, spans = MODELS[name]
    model = random_model(model_type, **{**SMALL, **config})
    loaded = [LoadedSpan(copy.deepcopy(model), span, torch.float32, CPU) for span in spans]
    chain = SpanChain([SpanModel(span, 2048, adapter) for span in loaded])
    for span in chain.models:
        assert check_family(span).worst_difference < TOLERANCE
    assert worst_difference(model, chain, {"short": 9, "long": 61}, size=6, room=23) < TOLERANCE
    for span in chain.models:
        span.store.check()


@pytest.mark.parametrize("span", [Span(3, 6), Span(4, 6), Span(5, 6)], ids=str)
def test_span_without_the_block_whose_rows_it_reads_is_refused(span: Span) -> None:
    model = random_model("gemma4_unified_text", **SMALL, **SHARED)
    with pytest.raises(BadRequest, match=r"block . reads the keys .* block . keeps.*cut at 0, 1, 2, 6 only"):
        SpanModel(LoadedSpan(model, span, torch.float32, CPU), 2048)


@pytest.mark.parametrize("name", ["values narrower than keys, sinks", "global heads of other widths"])
def test_kv_shapes_of_quantized_layers_are_those_of_plain_ones(name: str) -> None:
    model_type, config, _ = MODELS[name]
    layers = random_model(model_type, **{**SMALL, **config}).base_model.layers
    plain = kv_shapes(layers)
    for layer in layers:
        quantize(layer, "int8")
    assert len(set(plain.values())) == 2
    assert kv_shapes(layers) == plain


@pytest.mark.parametrize(
    ("chosen", "length", "fitted"),
    [((0, 2), 2, (0, 2)), ((0, 5), 5, (0, 2)), ((1, 6), 5, (1, 6)), ((2, 5), 4, (2, 6)), ((3, 4), 6, (2, 6))],
)
def test_chosen_span_is_fitted_to_allowed_cuts(chosen: tuple[int, int], length: int, fitted: tuple[int, int]) -> None:
    assert fit_to_cuts(Span(*chosen), [0, 1, 2, 6], SpanLimits.same(length, 6)) == Span(*fitted)


def test_blocks_that_cannot_be_divided_must_fit_together() -> None:
    with pytest.raises(BadRequest, match=r"blocks 2:6 share keys and values.*only 3 blocks"):
        fit_to_cuts(Span(2, 5), [0, 1, 2, 6], SpanLimits.same(3, 6))


def test_cuts_are_read_from_the_config(tmp_path: Path) -> None:
    random_model("gemma4_unified_text", **SMALL, **SHARED).config.save_pretrained(tmp_path)
    config = NodeConfig(ModelConfig(str(tmp_path), num_blocks=2, dtype="float32", quantization="none"))
    skeleton = build_skeleton(tmp_path, torch.float32)
    assert read_hosting_limits(config, ModelInfo.find(str(tmp_path)), skeleton).cuts == [0, 1, 2, 6]

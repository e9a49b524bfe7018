"""Models with latent attention (MLA) are exact under trees, although a node keeps one latent per row for all heads."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.node.conftest import CPU, SpanChain, append_of, random_model
from tests.node.model.test_families import TOLERANCE, worst_difference
from transformers import PreTrainedModel

from treeswarm.protocol.messages import Resumption
from treeswarm.protocol.spans import Span
from treeswarm_node.kv_cache.page_pool import PAGE
from treeswarm_node.model.check.family_check import check_family
from treeswarm_node.model.loaded_span import LoadedSpan
from treeswarm_node.model.quantization.packed_products import _has_bfloat16_products, pack_products
from treeswarm_node.model.quantization.quantized_linear import quantize
from treeswarm_node.model.span_model import SpanModel

SMALL: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**EXPERTS, "topk_method": "group_limited_greedy"},
    "deepseek_v3": EXPERTS,
    "glm4_moe_lite": EXPERTS,
    "axk1": EXPERTS,
    "minicpm3": {},
    "youtu": {},
    "longcat_flash": {
        "num_hidden_layers": 8, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32, "n_routed_experts": 8,
        "zero_expert_num": 4, "moe_topk": 2, "head_dim": 8,
    },
}  # fmt: skip
CutModel = Callable[[PreTrainedModel], SpanChain]


def latent_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """Return a tiny random model of the type."""
    return random_model(model_type, **{**SMALL, **FAMILIES[model_type], **changes})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_trees_on_a_cut_model_equal_the_plain_model(model_type: str, cut_in_three: CutModel) -> None:
    model = latent_model(model_type)
    chain = cut_in_three(model)
    attentions = 2 if model_type == "longcat_flash" else 1
    for span in chain.models:
        assert check_family(span).worst_difference < TOLERANCE
        # A row of each attention is one latent of 24 and one rotated key of 8, and not 4 heads of 24 + 20.
        assert span.store.row_bytes == 4 * (24 + 8) * attentions * len(span.layers)
    assert worst_difference(model, chain, {"short": 9, "long": 61}, size=6, room=23) < TOLERANCE
    for span in chain.models:
        span.store.check()


def test_latents_are_shared_cut_and_computed_again(cut_in_three: CutModel) -> None:
    """A second session reads the first one's page, outlives it, loses its trunk's end and has it computed again."""
    model = latent_model("deepseek_v3")
    chain, random = cut_in_three(model), np.random.default_rng(5)
    tokens = random.integers(1, 199, PAGE + 30).tolist()
    expected = model(torch.tensor([tokens]), use_cache=False).logits[0]

    def feed(name: str, first: int, tip: int, **changes: Any) -> float:
        """Send the tokens from position `first` on as children of the node `tip`, and return the largest difference."""
        parents = range(tip, tip + len(tokens) - first)
        append = append_of(0, tip + 1, parents, tokens[first:], prefill=True)
        logits = chain.run({name: replace(append, **changes)})[name]
        return float((logits - expected[first:]).abs().max())

    chain.open("first", trunk_room=200)
    assert feed("first", 0, 0) < TOLERANCE
    chain.open("second", trunk_room=200, shared_with="first")
    for kv in chain.sessions["first"][1]:
        kv.close()
    assert feed("second", PAGE, 0, prefix=PAGE) < TOLERANCE
    session, caches = chain.sessions["second"]
    for kv in caches:
        kv.truncate(PAGE - 10)
    session.resume(2, Resumption(PAGE - 10, PAGE - 10))
    assert feed("second", PAGE - 10, PAGE - 10, epoch=2) < TOLERANCE
    for span in chain.models:
        span.store.check()


def test_quantized_latent_layers_pass_their_check() -> None:
    model = latent_model("deepseek_v3")
    for layer in model.base_model.layers:
        quantize(layer, "int8")
        assert type(layer.self_attn.kv_b_proj) is torch.nn.Linear
        assert type(layer.self_attn.kv_a_proj_with_mqa) is not torch.nn.Linear
    span = SpanModel(LoadedSpan(model, Span(0, 4), torch.float32, CPU), 512)
    assert check_family(span).worst_difference < TOLERANCE


@pytest.mark.skipif(not _has_bfloat16_products(), reason="this CPU has no kernels for bfloat16")
def test_expansion_of_latents_is_not_packed() -> None:
    model = latent_model("deepseek_v3").bfloat16()
    assert pack_products(model.base_model.layers) > 0
    assert all(type(layer.self_attn.kv_b_proj) is torch.nn.Linear for layer in model.base_model.layers)

"""The text decoder of a multimodal wrapper computes what the wrapper computes for text alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.families.checkpoint import randomise
from tests.node.conftest import SpanChain
from tests.support.texts import Text
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from treeswarm.model_files import read_shape
from treeswarm.protocol.spans import Span
from treeswarm_node.model.check.family_check import check_family
from treeswarm_node.model.check.weights import check_weights
from treeswarm_node.model.checkpoint.loader import load_span
from treeswarm_node.model.checkpoint.skeleton import _auto_class
from treeswarm_node.model.span_model import SpanModel

CPU = torch.device("cpu")
BLOCKS, VOCABULARY, IMAGE_TOKEN = 3, 256, 250
SPANS = [Span(0, 1), Span(1, 2), Span(2, BLOCKS)]
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "moe_num_experts": 4,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "embed_dim": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "projection_dim": 32,
    "vocab_size": VOCABULARY,
}
SPECIAL_TOKENS = (
    "image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id",
    "boi_token_index", "eoi_token_index", "audio_token_id",
)  # fmt: skip
QUICK = ("gemma3", "cohere2_vision", "internvl", "llava", "qwen3_vl")


def _tiny_config(model_type: str) -> Any:
    whole = CONFIG_MAPPING[model_type]()
    text = whole.get_text_config(decoder=True)
    parts: dict[str, Any] = {}
    for name in whole.sub_configs:
        part = getattr(whole, name)
        known = part.to_dict()
        sizes = TEXT if part is text else VISION
        parts[name] = {key: value for key, value in sizes.items() if known.get(key) is not None}
        parts[name]["model_type"] = part.model_type
        if model_type.startswith("qwen") and part is text:
            parts[name]["rope_parameters"] = {**known["rope_parameters"], "mrope_section": [2, 3, 3]}
    known = whole.to_dict()
    special = {name: IMAGE_TOKEN for name in SPECIAL_TOKENS if known.get(name) is not None}
    return CONFIG_MAPPING[model_type](**parts, **special)


def save_wrapper(folder: Path, model_type: str) -> PreTrainedModel:
    """Save a tiny random wrapper, and return it as transformers loads it."""
    torch.manual_seed(0)
    config = _tiny_config(model_type)
    model = _auto_class(config).from_config(config, dtype=torch.float32)
    randomise(model)
    model.save_pretrained(folder)
    stock: PreTrainedModel = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return stock.eval().requires_grad_(False)


def worst_difference(model: PreTrainedModel, chain: SpanChain) -> float:
    """Return the largest difference for a tree below a long prompt, relative to the largest logit."""
    random = np.random.default_rng(1)
    text = Text(random.integers(3, IMAGE_TOKEN, 61).tolist(), random, IMAGE_TOKEN)
    chain.open("text", trunk_room=80)
    for append in text.prefill(29):
        chain.run({"text": append})
    append, ids = text.tree(8, [])
    worst = 0.0
    for row, node in zip(chain.run({"text": append})["text"], ids, strict=True):
        tokens = torch.tensor([[text.tokens[i] for i in text.path(node)]])
        expected = model(input_ids=tokens, use_cache=False).logits[0, -1]
        worst = max(worst, float((expected - row).abs().max() / expected.abs().max()))
    return worst


def _assert_exact(folder: Path, model_type: str) -> None:
    model = save_wrapper(folder, model_type)
    chain = SpanChain([SpanModel(load_span(folder, span, torch.float32, CPU), 256) for span in SPANS])
    for span in chain.models:
        check_family(span)
        assert check_weights(span) > 0
    assert worst_difference(model, chain) < 1e-4
    assert read_shape(folder).vocab_size == VOCABULARY
    assert read_shape(folder).blocks == BLOCKS


@pytest.mark.parametrize("model_type", QUICK)
def test_text_of_a_wrapper_is_exact(tmp_path: Path, model_type: str) -> None:
    _assert_exact(tmp_path, model_type)

"""Tiny configs of every causal-LM type of the installed transformers."""

import dataclasses
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS, HIDDEN, VOCAB, WINDOW = 6, 64, 256, 24
# Values by the names that config classes have for them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "dim_head", "v_head_dim", "qk_rope_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "dff", "dim_ff", "n_inner"), 96),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp", "prefix_dense_intermediate_size"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 512),
    **dict.fromkeys(
        ("sliding_window", "sliding_window_size", "window_size", "local_attention", "attention_chunk_size"), WINDOW
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size"), 48
    ),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("num_mtp_layers", "num_nextn_predict_layers"), 0),
    "vocab_size": VOCAB,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "index_n_heads": 4,
    "index_topk": 16,
    "rotary_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sep_token_id": 3,
    "cls_token_id": 3,
    "eod_token_id": 3,
    "decoder_start_token_id": 1,
}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
_SSM: dict[str, Any] = {"state_size": 8, "num_heads": 8, "n_groups": 2, "chunk_size": 16}
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
_LINEAR_TYPES = ["linear_attention", "full_attention"] * 3
_CONV_TYPES = ["conv", "full_attention"] * 3
_KINDS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
_BYTES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
# Changes to `SIZES` that a type needs to be built, or to be as small as the others.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "blt": {f"{part}_config": _BYTES for part in ("patcher", "encoder", "decoder", "global")}
    | {"encoder_hash_byte_group_vocab": 64},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_v4": {"o_lora_rank": 32, "o_groups": 2},
    "falcon": {"alibi": False},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    # Shared keys and values, which forbid these cuts, are in tests/node/model/test_layer_kinds.py.
    "gemma3n_text": {"layer_types": _KINDS, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 256}
    | {"hidden_size_per_layer_input": 16, "laurel_rank": 8},
    "gemma4_text": {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "granitemoehybrid": _MAMBA | {"shared_intermediate_size": 48},
    "inkling2_text": {"unpadded_vocab_size": 250, "rel_extent": 32, "log_scaling_n_floor": 64}
    | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    "inkling_text": {"rel_extent": 32, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2": {"layer_types": _CONV_TYPES},
    "lfm2_moe": {"layer_types": _CONV_TYPES},
    "longcat_flash": {"zero_expert_num": 4},
    "mamba2": _SSM | {"head_dim": 16},
    "minimax_m3_vl_text": {"shared_intermediate_size": 48},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp_text": _LINEAR
    | {"layer_types": _LINEAR_TYPES, "hc_lowrank": 16, "ngram_vocab_size_base": 256, "split_ngram_parts": 2}
    | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64}
    | {"ple_layer_ids": [], "ple_embed_dim": 16, "indexer_compress_ratio": 4},
    # As published.  Stock transformers resets the padding token's embedding to zero when it loads this type.
    "youtu": {"pad_token_id": None},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 3, "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 3, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}
# Forms of a type that published models have too, as `type@form`.  They are tested, and not counted as types.
FORMS: dict[str, dict[str, Any]] = {
    "falcon@alibi": {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "falcon@new": {"new_decoder_architecture": True, "bias": True},
    "gpt2@scaled": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode@heads": {"multi_query": False},
    "granitemoehybrid@attention": {"layer_types": ["full_attention"] * LAYERS},
    "granitemoehybrid@rope": {"layer_types": ["full_attention"] * LAYERS, "position_embedding_type": "rope"},
    "llama@bias-tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "opt@350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "phimoe@full": {"sliding_window": None},
    "qwen2@window": {"use_sliding_window": True, "max_window_layers": 3},
    "qwen2_moe@window": {"use_sliding_window": True},
    "qwen3_next@attention": {"layer_types": ["full_attention"] * LAYERS},
    "stablelm@parallel": {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
}


def tiny_config(case: str) -> PretrainedConfig:
    """Return the tiny config of a type, or of a form `type@form` of it."""
    model_type = case.partition("@")[0]
    sizes = sizes_of(CONFIG_MAPPING[model_type])
    return AutoConfig.for_model(model_type, **sizes | CHANGES.get(model_type, {}) | FORMS.get(case, {}))


def sizes_of(config_class: Any) -> dict[str, Any]:
    """Return the values of `SIZES` that a config class of a text decoder has names for."""
    names = {field.name for field in dataclasses.fields(config_class)}
    sizes = {name: value for name, value in SIZES.items() if name in names}
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]  # latent attention has keys for every head
    return sizes

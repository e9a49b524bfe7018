"""Say why a model's blocks cannot be hosted, for those kinds of blocks that are known by their config."""

from typing import Any

# Layer types of transformers' configs whose blocks keep keys and values alone, or nothing.
ATTENTION_TYPES = {
    "full_attention", "sliding_attention", "chunked_attention", "attention", "global", "local", "mlp", "moe",
}  # fmt: skip
# Layer type whose blocks keep a recurrent state although it is called attention.
LINEAR = "linear_attention"
# Fields of configs that a kind of block has, and what such blocks need.
NEEDS = {
    # Falcon: with ALiBi, a tiny random model's logits in transformers 5.23 differ by a tenth between eager and sdpa.
    "alibi": "add ALiBi once or twice, depending on the attention that transformers is told to use",
    "index_topk": "choose their keys by a learned indexer (sparse attention)",
    "index_topk_blocks": "choose their keys by a learned indexer (sparse attention)",
    "compress_rates": "attend to compressed keys (sparse attention)",
    "hc_mult": "have several streams of activations (hyper-connections)",
    "cross_attention_layers": "attend to an image in layers of their own (cross attention)",
    "cross_layer_interval": "attend to an image in layers of their own (cross attention)",
    "prompt_types": "see later tokens, and have prompts and segments besides the text",
    "rel_extent": "take a learned bias of scores by position",
}
# Fields of configs of models with blocks that keep a recurrent state, of which some configs name no layer types.
RECURRENT = (
    "cca_time0",
    "conv_L_cache",
    "linear_head_dim",
    "lru_width",
    "mamba_d_state",
    "qk_dim_factor",
    "rescale_every",
    "ssm_state_size",
    "state_size",
)


def explain_blocks(config: Any) -> str | None:
    """Return what a model's blocks need that nodes do not have, as text for users, or None if it is not known."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    others = sorted({str(kind) for kind in kinds} - ATTENTION_TYPES)
    needs = next((need for field, need in NEEDS.items() if getattr(config, field, None)), None)
    if needs is None and others and all(kind.endswith("_attention") and kind != LINEAR for kind in others):
        needs = f"attend in a way of their own ({', '.join(others)})"
    if needs is None and (others or any(getattr(config, field, None) for field in RECURRENT)):
        named = f" ({', '.join(others)})" if others else ""
        return f"some of their blocks keep a recurrent state{named}, which is not supported yet"
    return needs and f"their blocks {needs}, which is not supported yet"

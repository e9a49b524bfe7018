"""Find the settings of a model's text decoder in a config.json; those of multimodal wrappers leave some out."""

from typing import Any

# Type of the text decoder of a wrapper whose config does not name it.
TEXT_TYPES = {
    "aria": "aria_text",
    "aya_vision": "cohere2",
    "cohere2_vision": "cohere2",
    "deepseek_vl": "llama",
    "gemma3": "gemma3_text",
    "hyperclovax_vision_v2": "hyperclovax",
    "idefics3": "llama",
    "internvl": "qwen2",
    "llava": "llama",
    "llava_next": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "paligemma": "gemma",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen2_vl": "qwen2_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
    "smolvlm": "llama",
}
FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
# Values of FIELDS in transformers' config class of a text decoder, which stand for what a config.json leaves out.  A
# client reads config.json without transformers.
DEFAULTS: dict[str, tuple[int | None, ...]] = {
    "aria_text": (4096, 32, 32, 32, 128, 32000, 2048),
    "cohere2": (8192, 40, 64, 64, 128, 256000, 8192),
    "gemma": (3072, 28, 16, 16, 256, 256000, 8192),
    "gemma3_text": (2304, 26, 8, 4, 256, 262208, 131072),
    "hyperclovax": (4096, 32, 32, 32, 128, 32000, 2048),
    "llama": (4096, 32, 32, 32, None, 32000, 2048),
    "mistral": (4096, 32, 32, 8, None, 32000, 131072),
    "qwen2": (4096, 32, 32, 32, None, 151936, 32768),
    "qwen2_5_vl_text": (8192, 80, 64, 8, None, 152064, 32768),
    "qwen2_vl_text": (8192, 80, 64, 8, None, 152064, 32768),
    "qwen3_vl_moe_text": (2048, 24, 16, 16, 128, 151936, 128000),
    "qwen3_vl_text": (4096, 32, 32, 32, 128, 151936, 128000),
}


def text_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the text decoder that a config.json describes.

    What a wrapper leaves out has transformers' default; a model that is no wrapper describes itself completely.
    """
    text = config.get("text_config")
    if not isinstance(text, dict) or not text:
        return config
    text_type = str(text.get("model_type") or TEXT_TYPES.get(str(config.get("model_type")), ""))
    return dict(zip(FIELDS, DEFAULTS.get(text_type, ()), strict=False)) | text

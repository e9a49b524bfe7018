"""Tiny configs of every multimodal type of the installed transformers."""

import dataclasses
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.families.configs import CHANGES, HIDDEN, LAYERS, VOCAB, sizes_of

# Token that stands for an image, a sound or a part of one; texts do not contain it.
MEDIA_TOKEN = VOCAB - 1
# Fields of configs that end as those of such tokens do, and name other ones.
TEXT_TOKENS = ("bos", "eos", "pad", "decoder", "sep", "cls")
# Values for towers of images and sound, by the names that config classes have for them.
TOWER_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "projection_dim", "dim", "width"), 32),
    **dict.fromkeys(("downsample_hidden_size", "projector_input_dim", "projector_output_dim", "decoder_dim"), 32),
    **dict.fromkeys(("projector_hidden_size", "upsample_initial_channel", "enc_dim"), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "ffn_dim", "mlp_dim", "vision_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers", "num_layers", "layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("out_hidden_size", "output_dim", "text_hidden_size", "vision_output_dim"), HIDDEN),
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
    "vocab_size": VOCAB,
}
Changes = dict[str, dict[str, Any]]
"""Values by the path of the part that has them; the path of the whole config is empty."""


def _rope(*sections: int, **others: Any) -> dict[str, Any]:
    """Return the rope parameters of positions with several axes, on all of which text has the same position."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **others}


def _axes(*sections: int, **others: Any) -> Changes:
    return {"text_config": {"rope_parameters": _rope(*sections, **others)}}


_TEXT_64: dict[str, Any] = {"embed_dim": HIDDEN, "layers": LAYERS, "ffn_dim": 96, "attention_heads": 4}
_SMALL_VQ: dict[str, Any] = {"embed_dim": 8, "base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 64}
_SMALL_CODEC: dict[str, Any] = {"num_filters": 2, "depths": [1] * 7, "hidden_size": 16}
_SMALL_SPEECH: Changes = {
    "encoder_config": {"hidden_dim": 32, "num_layers": 1, "dim_head": 16, "num_heads": 2},
    "projector_config": {"encoder_hidden_size": 32},
}
# Published configs have this field; transformers' class reads it and has no default.  Texts have no such token.
_VISION_START: Changes = {"": {"vision_start_token_id": MEDIA_TOKEN}}
_IMAGE_NAME: dict[str, Any] = {"vocabulary_map": {"<image>": MEDIA_TOKEN}}
# Changes to the generic sizes that a type needs to be built, or to be as small as the others.
WRAPPER_CHANGES: dict[str, Changes] = {
    "chameleon": {"": _IMAGE_NAME, "vq_config": _SMALL_VQ | {"latent_channels": 8}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _rope(2, 3, 3)}}},
    "cosmos3_edge": _axes(2, 3, 3),
    "cosmos3_omni": _axes(2, 3, 3),
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * 5]}},
    "dots3_note": {
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": HIDDEN},
        "vision_config": {"num_hidden_layers": 42, "mlp_layer_types": ["dense"] * 42}
        | {"adapter_in_dim": 32, "adapter_out_dim": HIDDEN},
    },
    "emu3": {
        "": _IMAGE_NAME,
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "codebook_size": 64, "num_res_blocks": 1},
    },
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _rope(3, 3, 2), "moe_intermediate_size": [48, 32]}},
    "fast_vlm": {"vision_config": {"hidden_size": 32, "architecture": "fastvit_mci3"}},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": HIDDEN, "intermediate_size": HIDDEN // 4}},
    "glm46v": _axes(2, 3, 3),
    "glm4v": _axes(2, 3, 3),
    "glm4v_moe": _axes(1, 1, 2, partial_rotary_factor=0.5),
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "head_dim": 0, "linear_head_dim": 16, "linear_num_heads": 4}},
    "glm_ocr": _axes(2, 3, 3),
    "glmga": _axes(2, 3, 3),
    "granite4_vision": {
        "": {"deepstack_layer_map": [[0, 1]], "downsample_rate": "1/2", "spatial_target_layers": [1]},
        "vision_config": {"hidden_size": 64},
    },
    "granite_speech": _SMALL_SPEECH,
    "granite_speech_plus": _SMALL_SPEECH,
    "hunyuan_vl": _axes(2, 2, 2, 2),
    "inkling_mm_model": {"vision_config": {"n_layers": 2}},
    "janus": {"vq_config": _SMALL_VQ},
    "kosmos-2": {"text_config": _TEXT_64},
    "kosmos-2.5": {"text_config": _TEXT_64},
    "molmo2": {"vision_config": {"image_size": [28, 28]}, "adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_glimmer": {"": {"out_hidden_size": HIDDEN, "projector_hidden_size": 32}},
    "muse_spark": {
        "": {"out_hidden_size": HIDDEN, "projector_hidden_size": 32},
        "text_config": {"moe_hidden_size": HIDDEN},
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 16, 16, 32], "patch_sizes": [4, 2, 2, 2]}
        | {"out_hidden_size": HIDDEN},
    },
    "nemo_speechlm": {"audio_config.diarization_config.head_config": {"audio_hidden_size": 32}},
    "nemotron_h_omni": {"": {"projector_hidden_size": 32}, "vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": _axes(2, 3, 3),
    "perception_lm": {"vision_config": {"model_args": {"embed_dim": 32}}},
    "phi4_multimodal": {
        "audio_config": {"num_blocks": 1, "ext_pw_out_channel": 32, "nemo_conv_channels": 32, "hidden_size": 32},
    },
    "qwen2_5_omni_thinker": _axes(2, 3, 3) | _VISION_START,
    "qwen2_5_vl": _axes(2, 3, 3),
    "qwen2_vl": _axes(2, 3, 3),
    "qwen3_omni_moe": {
        "code2wav_config": {"decoder_dim": 32, "hidden_size": 32},
        "talker_config": {"spatial_merge_size": 2},
        "talker_config.text_config": {"shared_expert_intermediate_size": 48, "num_experts": 4, "hidden_size": HIDDEN},
    },
    "qwen3_omni_moe_thinker": _VISION_START,
    "qwen3_vl": _axes(2, 3, 3),
    "qwen3_vl_moe": _axes(2, 3, 3),
    "vibevoice": dict.fromkeys(("semantic_model_config", "audio_config"), _SMALL_CODEC),
    "vibevoice_asr": dict.fromkeys(
        ("semantic_tokenizer_encoder_config", "acoustic_tokenizer_encoder_config"), _SMALL_CODEC
    ),
}
# Forms of a type that published models have too, as `type@form`.  They are tested, and not counted as types.
WRAPPER_FORMS: dict[str, Changes] = {}


def wrapper_types() -> list[str]:
    """Return the types that take more than text and write text, as transformers' auto classes list them."""
    others = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
    names = {name for other in others for name in getattr(modeling_auto, f"MODEL_FOR_{other}_MAPPING_NAMES")}
    composite = {name for name in names if name in CONFIG_MAPPING and "text_config" in CONFIG_MAPPING[name].sub_configs}
    return sorted({*modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES} | composite)


def tiny_wrapper_config(case: str) -> PretrainedConfig:
    """Return the tiny config of a multimodal type, or of a form `type@form` of it."""
    model_type = case.partition("@")[0]
    changes = WRAPPER_CHANGES.get(model_type, {}) | WRAPPER_FORMS.get(case, {})
    whole = CONFIG_MAPPING[model_type]()
    text = whole.get_text_config(decoder=True)
    config: PretrainedConfig = CONFIG_MAPPING[model_type](**_tiny(whole, type(text), changes, ""))
    return config


def _tiny(config: Any, text: type, changes: Changes, path: str) -> dict[str, Any]:
    """Return the arguments of a tiny config of the class of `config`, which is at `path` in the whole one."""
    if type(config) is text:
        values = sizes_of(text) | CHANGES.get(config.model_type, {})
    else:
        known, fields = config.to_dict(), {field.name for field in dataclasses.fields(config)}
        sizes = {} if config.sub_configs else TOWER_SIZES
        values = {name: value for name, value in sizes.items() if name in fields and isinstance(known.get(name), int)}
        values |= {name: MEDIA_TOKEN for name in fields if _is_media_token(name, known.get(name))}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            inner = _tiny(part, text, changes, f"{path}.{name}".lstrip("."))
            values[name] = inner | {"model_type": part.model_type}
    return values | changes.get(path, {})


def _is_media_token(name: str, value: Any) -> bool:
    """Return whether a config's field is the id of a token that stands for something else than text."""
    is_id = isinstance(value, int) and name.endswith(("_token_id", "_token_index"))
    return is_id and name.partition("_")[0] not in TEXT_TOKENS

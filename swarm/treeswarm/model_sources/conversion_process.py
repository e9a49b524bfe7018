"""Convert a model's small files with transformers' own converters.

Run as a program, in a process of its own, so that neither a node nor a client imports these converters:

    python conversion_process.py gguf FILE FOLDER         config, tokenizer, chat template and table of a GGUF file
    python conversion_process.py tokenizer FOLDER FOLDER  tokenizer.json of a tokenizer in another form

No weight is read and torch is not needed.  If it fails, it prints `{"error": "…"}` and ends with status 1.
"""

import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

# Architectures that a table of transformers has under another name.
RENAMED = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2"}
# Values of metadata keys that change nothing: for these a config has no field, or the tensors' shapes say the same.
NEUTRAL: Mapping[str, object] = {"rope.scaling.type": "none", "attention.causal": True, "expert_weights_scale": 1.0}
# Metadata keys whose value shows in the shapes of tensors, which are compared when the weights are loaded.
SHAPES = {
    "attention.key_length",
    "attention.value_length",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "feed_forward_length",
    "vocab_size",
}
# Metadata keys that transformers does not read, and the field of the config whose default must be the same value.
DEFAULTS = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "expert_weights_norm": "norm_topk_prob",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
}
# Metadata keys that transformers does not read, and the field of the config that they are.
ADDED = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
# Sizes of models, as architecture and number of blocks, whose attention scale no GGUF file states: llama.cpp knows it.
UNSTATED_SCALE = {("gemma2", 46), ("gemma3", 62)}
TOKENS = "tokenizer.ggml.tokens"
LONG_LISTS = {"tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"}
ROPE_FACTORS = "rope_freqs.weight"
# Numbers of every Llama 3 model with scaled rotary embeddings; only the factor differs.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class ConversionError(Exception):
    """Says why a file cannot be converted, and what to do."""


def main() -> None:
    """Convert as the arguments say, and print an error as JSON."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything lies on this machine
    kind, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    try:
        {"gguf": convert_gguf, "tokenizer": convert_tokenizer}[kind](source, target)
    except Exception as error:  # The libraries raise errors of every kind.
        print(json.dumps({"error": describe(error)}))
        sys.exit(1)


def describe(error: Exception) -> str:
    """Return an error as one line."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return line if isinstance(error, ConversionError) else f"{type(error).__name__}: {line[:300]}"


def convert_gguf(source: Path, target: Path) -> None:
    """Write config, generation config, tokenizer, chat template and table of tensors of a GGUF file."""
    import transformers  # noqa: PLC0415  # this file is also imported for its path alone
    from gguf import GGUFReader  # noqa: PLC0415

    transformers.utils.logging.set_verbosity_error()
    try:
        reader = GGUFReader(source)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ConversionError(f"it is no whole GGUF file ({describe(error)}): download it again") from None
    metadata = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    architecture = str(_value(metadata, "general.architecture"))
    if int(_value(metadata, "split.count") or 1) > 1:
        raise ConversionError(
            "it is one of several parts, which are not read: join them with llama.cpp's `llama-gguf-split --merge`"
        )
    config = _config_of(source, architecture, reader)
    table = {
        t.name: ([int(n) for n in reversed(t.shape)], t.tensor_type.name, int(t.data_offset), int(t.n_bytes))
        for t in reader.tensors
    }
    if ROPE_FACTORS in table:
        factors = next(tensor.data for tensor in reader.tensors if tensor.name == ROPE_FACTORS)
        config["rope_scaling"] = llama3_rope(factors, float(config["rope_theta"]), int(config["head_dim"]))
    config |= _added_fields(metadata, architecture, config)
    _check_metadata(metadata, architecture, config)
    _write_json(target / "config.json", config)
    ends = {config.get("eos_token_id"), _value(metadata, "tokenizer.ggml.eot_token_id")} - {None}
    _write_json(target / "generation_config.json", {"eos_token_id": sorted(int(str(end)) for end in ends)})
    _write_tokenizer(metadata, architecture, target)
    _write_json(target / "gguf-tensors.json", {"architecture": architecture, "tensors": table})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), "utf-8")


def _value(metadata: Mapping[str, Any], name: str) -> Any:
    return metadata[name].contents() if name in metadata else None


def _config_of(source: Path, architecture: str, reader: Any) -> dict[str, Any]:
    """Return the config as transformers reads it from the file.

    It is given the file as it was read here, without the tokenizer's long lists, of which it keeps at most a length:
    reading and copying them again would take as long as all else.
    """
    import gguf  # noqa: PLC0415

    loader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    loader.is_torch_available = lambda: True  # it asks for torch although it reads no tensor here
    if architecture not in loader.GGUF_SUPPORTED_ARCHITECTURES and architecture not in RENAMED:
        known = ", ".join(sorted(loader.GGUF_SUPPORTED_ARCHITECTURES))
        raise ConversionError(
            f"transformers does not read GGUF files of architecture '{architecture}' (it reads {known}): use the "
            "model's safetensors form"
        )
    has_size = f"{architecture}.vocab_size" in reader.fields
    dropped = LONG_LISTS | ({TOKENS} if has_size else set())
    fields = {name: field for name, field in reader.fields.items() if name not in dropped}
    short = SimpleNamespace(fields=fields, tensors=reader.tensors)
    with mock.patch.object(gguf, "GGUFReader", return_value=short):
        config: dict[str, Any] = loader.load_gguf_checkpoint(str(source), return_tensors=False)["config"]
    return {key: value for key, value in config.items() if key != "_model_name_or_path"}


def _added_fields(metadata: Mapping[str, Any], architecture: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return sizes that the file states and transformers does not read, where the config has a field for them."""
    from transformers import AutoConfig  # noqa: PLC0415

    known = AutoConfig.for_model(**config).to_dict()
    found = {field: _value(metadata, f"{architecture}.{key}") for key, field in ADDED.items()}
    return {field: int(size) for field, size in found.items() if size is not None and field in known}


def _check_metadata(metadata: Mapping[str, Any], architecture: str, config: Mapping[str, Any]) -> None:
    """Raise ConversionError if the file states something of the computation that the config does not say."""
    from transformers import AutoConfig  # noqa: PLC0415
    from transformers.integrations import GGUF_CONFIG_MAPPING  # noqa: PLC0415

    if (architecture, config["num_hidden_layers"]) in UNSTATED_SCALE:
        raise ConversionError("GGUF files of this model do not state its attention scale: use its safetensors form")
    model = AutoConfig.for_model(**config)
    read = {
        key
        for name in (architecture, RENAMED.get(architecture, architecture))
        for key, field in GGUF_CONFIG_MAPPING.get(name, {}).items()
        if field is not None
    }
    for name in metadata:
        prefix, _, key = name.partition(".")
        if prefix != architecture or key in read or key in SHAPES:
            continue
        value = _value(metadata, name)
        if key in NEUTRAL and value == NEUTRAL[key]:
            continue
        if key in DEFAULTS and value == _field_of(model, DEFAULTS[key]):
            continue
        if key == "rope.dimension_count" and value == _rotary_width(model):
            continue
        raise ConversionError(
            f"its metadata say {name} = {value!r}, which transformers does not read from GGUF files: use the model's "
            "safetensors form"
        )


def _field_of(model: Any, field: str) -> Any:
    rope = getattr(model, "rope_parameters", None) or {}
    return rope.get(field) if field in rope else getattr(model, field, None)


def _rotary_width(model: Any) -> int:
    """Return the number of values of a head that are rotated."""
    width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    return int(width * (_field_of(model, "partial_rotary_factor") or 1.0))


def llama3_rope(factors: Any, theta: float, width: int) -> dict[str, Any]:
    """Return the parameters of Llama 3's scaled rotary embedding that have these `factors` (float32 [width / 2]).

    A GGUF file stores by what every frequency is divided.  Raises ConversionError if no parameters give that.
    """
    import numpy as np  # noqa: PLC0415

    low, high, context = LLAMA3_ROPE.values()
    factor = round(float(factors.max()), 3)
    wavelengths = 2 * np.pi * theta ** (np.arange(0, width, 2) / width)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
    if factors.shape != smooth.shape or not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise ConversionError(f"its {ROPE_FACTORS} are not those of Llama 3: use the model's safetensors form")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}


def _write_tokenizer(metadata: Mapping[str, Any], architecture: str, target: Path) -> None:
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (  # noqa: PLC0415
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    grouped = {
        group: {
            field: _value(metadata, f"tokenizer.{key}")
            for key, field in names.items()
            if f"tokenizer.{key}" in metadata
        }
        for group, names in GGUF_TOKENIZER_MAPPING.items()
    }
    settings, vocabulary = grouped["tokenizer_config"], grouped["tokenizer"]
    kind = vocabulary.get("tokenizer_type")
    if kind == "llama":
        settings.setdefault("add_bos_token", True)  # as transformers and llama.cpp read files that do not say it
    elif kind == "gemma4":
        settings["add_bos_token"] = False
    for token, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = _value(metadata, f"tokenizer.ggml.{key}_token_id")
        settings[f"{token}_token"] = None if number is None else vocabulary["tokens"][int(number)]
    backend, more = convert_gguf_tokenizer(architecture, vocabulary)
    PreTrainedTokenizerFast(tokenizer_object=backend, **settings, **more).save_pretrained(target)


def convert_tokenizer(source: Path, target: Path) -> None:
    """Write `tokenizer.json` of a tokenizer that a model directory has in another form."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    # Mistral's own package has another kind of tokenizer, which cannot be saved as tokenizer.json.
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, local_files_only=True, trust_remote_code=False, mistral_format=False
        )
    except Exception:
        if any(source.glob("*.model")):
            _check_sentencepiece()
        raise
    tokenizer.save_pretrained(target)
    if not (target / "tokenizer.json").exists():
        raise ConversionError(f"transformers has no fast form of its {type(tokenizer).__name__}")


def _check_sentencepiece() -> None:
    """Raise ConversionError if the package cannot be used: transformers then says only what it tried next."""
    try:
        importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except ModuleNotFoundError:
        return
    except Exception as error:
        raise ConversionError(
            f"the package sentencepiece does not work with the installed protobuf ({describe(error)}): install "
            "sentencepiece 0.2.2 or a newer protobuf"
        ) from None


if __name__ == "__main__":
    main()

"""Write tiny GGUF files with random weights, as llama.cpp's converters lay them out."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

BLOCKS, HIDDEN, FEED, HEADS, KV_HEADS, CONTEXT = 2, 256, 256, 4, 2, 512
EXPERTS = 4
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "i n", "Ġ the")


def byte_alphabet() -> list[str]:
    """Return the 256 letters in which byte-level vocabularies write bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in kept)}
    return [moved.get(byte, chr(byte)) for byte in range(256)]


TOKENS = [*SPECIAL, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    expert_width: int = 768,
    kind: str = "Q8_0",
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    change: Callable[[str, np.ndarray], np.ndarray] = lambda _, tensor: tensor,
    rename: Callable[[str], str | None] = lambda name: name,
) -> Path:
    """Write a model whose matrices are stored as `kind`, with further metadata and tensors, and return the path.

    Tensors for which `rename` returns None are left out.
    """
    writer, random = GGUFWriter(path, architecture), np.random.default_rng(7)
    writer.add_block_count(BLOCKS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if architecture == "llama":
        writer.add_rope_dimension_count(HIDDEN // HEADS)
        writer.add_vocab_size(len(TOKENS))
    if architecture == "qwen3moe":
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(expert_width)
        writer.add_key_length(HIDDEN // HEADS)
    _add_tokenizer(writer)
    for name, value in (metadata or {}).items():
        writer.add_key_value(name, value, _type_of(value))
    for name, shape in tensor_shapes(architecture, expert_width).items():
        tensor = change(name, random.normal(1.0 if "norm" in name else 0.0, 0.1, shape).astype(np.float32))
        written = rename(name)
        if written is None:
            continue
        if len(shape) == 1 or "gate_inp" in name:
            writer.add_tensor(written, tensor)
        else:
            data, stored = _stored(tensor, kind, random)
            writer.add_tensor(written, data, raw_dtype=stored)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensor_shapes(architecture: str, expert_width: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its name in the file."""
    width = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,)}
    for block in range(BLOCKS):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (HIDDEN,),
            "ffn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HEADS * width, HIDDEN),
            "attn_k.weight": (KV_HEADS * width, HIDDEN),
            "attn_v.weight": (KV_HEADS * width, HIDDEN),
            "attn_output.weight": (HIDDEN, HEADS * width),
        }
        if architecture == "qwen2":
            layer |= {"attn_q.bias": (HIDDEN,), "attn_k.bias": (KV_HEADS * width,), "attn_v.bias": (KV_HEADS * width,)}
        if architecture.startswith("qwen3"):
            layer |= {"attn_q_norm.weight": (width,), "attn_k_norm.weight": (width,)}
        if architecture == "qwen3moe":
            layer |= {
                "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
                "ffn_gate_exps.weight": (EXPERTS, expert_width, HIDDEN),
                "ffn_up_exps.weight": (EXPERTS, expert_width, HIDDEN),
                "ffn_down_exps.weight": (EXPERTS, HIDDEN, expert_width),
            }
        else:
            layer |= {
                "ffn_gate.weight": (FEED, HIDDEN),
                "ffn_up.weight": (FEED, HIDDEN),
                "ffn_down.weight": (HIDDEN, FEED),
            }
        shapes |= {f"blk.{block}.{name}": shape for name, shape in layer.items()}
    return shapes


def _type_of(value: Any) -> Any:
    from gguf import GGUFValueType

    if isinstance(value, float):
        return GGUFValueType.FLOAT32
    return GGUFValueType.get_type(value)


def _add_tokenizer(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _stored(tensor: np.ndarray, kind: str, random: np.random.Generator) -> tuple[np.ndarray, GGMLQuantizationType]:
    """Return a matrix as the file stores it.  The k-quants have no quantizer in Python, so their bytes are drawn."""
    stored = GGMLQuantizationType[kind]
    if kind not in {"Q4_K", "Q6_K"}:
        return quants.quantize(tensor, stored), stored
    shape = quants.quant_shape_to_byte_shape(tensor.shape, stored)
    data = random.integers(0, 256, shape, dtype=np.uint8).reshape(-1, {"Q4_K": 144, "Q6_K": 210}[kind])

    def repeat(value: float) -> np.ndarray:
        return np.full(len(data), value, np.float16).view(np.uint8).reshape(-1, 2)

    # Matrices of mean zero and a deviation of 0.26: with another mean, every text is a single token.
    if kind == "Q4_K":  # scale and minimum at the start of each block of 256; codes are 0 to 15
        data[:, 0:2], data[:, 2:4] = repeat(1e-3), repeat(7.5e-3)
    else:
        data[:, 208:210] = repeat(2e-4)
    return data.reshape(shape), stored

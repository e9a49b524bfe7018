"""Published EAGLE-3 heads: a writer of both formats, and a second implementation of what such a head computes.

The second implementation reads the published files themselves.  It follows the public descriptions of both formats in
plain torch, and shares nothing with the product.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear, scaled_dot_product_attention, silu

FLAT, NESTED = "flat", "nested"


@dataclass(frozen=True)
class HeadFiles:
    """What a head is written from.  The defaults are those of the formats."""

    hidden: int = 64
    target_hidden: int = 64
    vocab: int = 199
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 96
    draft_vocab: int = 50
    tap_ids: Sequence[int] | None = None
    taps: int = 3
    flags: Sequence[str] = ()
    """Names of the flags that are true in the config."""
    layer_type: str = "llama"
    own_embedding: bool = False
    epsilon: float = 1e-5
    layer: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the layer's config."""
    verifier: str = "org/model"
    architectures: Sequence[str] = ("LlamaForCausalLM",)

    def tensors(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return random tensors by their names in the nested format, large enough that every norm matters."""
        random = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, generator=random) * 0.2

        def norm(size: int) -> torch.Tensor:
            return 1 + 0.5 * torch.randn(size, generator=random)

        width, kv_width, joined = self.heads * self.head_dim, self.kv_heads * self.head_dim, 2 * self.hidden
        attention = "layers.0.self_attn"
        tensors = {
            "fc.weight": matrix(self.hidden, self.taps * self.target_hidden),
            "layers.0.input_layernorm.weight": norm(self.hidden),
            "layers.0.hidden_norm.weight": norm(self.hidden),
            f"{attention}.q_proj.weight": matrix(width, joined),
            f"{attention}.k_proj.weight": matrix(kv_width, joined),
            f"{attention}.v_proj.weight": matrix(kv_width, joined),
            f"{attention}.o_proj.weight": matrix(self.hidden, width),
            "layers.0.post_attention_layernorm.weight": norm(self.hidden),
            "layers.0.mlp.gate_proj.weight": matrix(self.intermediate, self.hidden),
            "layers.0.mlp.up_proj.weight": matrix(self.intermediate, self.hidden),
            "layers.0.mlp.down_proj.weight": matrix(self.hidden, self.intermediate),
            "norm.weight": norm(self.hidden),
            "lm_head.weight": matrix(self.draft_vocab, self.hidden),
        }
        if self.draft_vocab != self.vocab:
            chosen = torch.randperm(self.vocab, generator=random)[: self.draft_vocab].sort().values
            tensors["d2t"] = chosen - torch.arange(self.draft_vocab)
            tensors["t2d"] = torch.isin(torch.arange(self.vocab), chosen)
        if self.own_embedding:
            tensors["embed_tokens.weight"] = matrix(self.vocab, self.hidden)
        if "norm_before_fc" in self.flags:
            tensors["input_norm.weight"] = norm(self.taps * self.target_hidden)
        if "fc_norm" in self.flags:
            tensors |= {f"fc_norm.{i}.weight": norm(self.target_hidden) for i in range(self.taps)}
        if self.layer_type == "qwen3":
            tensors |= {f"{attention}.{name}.weight": norm(self.head_dim) for name in ("q_norm", "k_norm")}
        return tensors

    def config(self, form: str) -> dict[str, Any]:
        """Return the content of config.json in one format."""
        layer = {
            "model_type": self.layer_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 512,
            "rms_norm_eps": self.epsilon,
            "rope_theta": 10000.0,
            "vocab_size": self.vocab,
            **self.layer,
        }
        own: dict[str, Any] = {"draft_vocab_size": self.draft_vocab, **dict.fromkeys(self.flags, True)}
        if self.target_hidden != self.hidden:
            own["target_hidden_size"] = self.target_hidden
        ids = None if self.tap_ids is None else list(self.tap_ids)
        if form == FLAT:
            eagle = {} if ids is None else {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ids}}
            return {"architectures": ["LlamaForCausalLMEagle3"], **layer, **own, **eagle}
        verifier = {"name_or_path": self.verifier, "architectures": list(self.architectures)}
        return {
            "architectures": ["Eagle3Speculator"],
            "model_type": "speculators",
            "speculators_model_type": "eagle3",
            "speculators_config": {"algorithm": "eagle3", "verifier": verifier},
            "eagle_aux_hidden_state_layer_ids": ids,
            "transformer_layer_config": layer,
            **own,
        }

    def write(self, folder: Path, form: str, tensors: Mapping[str, torch.Tensor] | None = None) -> Path:
        """Write a head in one format, with random weights if none are given."""
        folder.mkdir(parents=True, exist_ok=True)
        named = self.tensors() if tensors is None else tensors
        if form == FLAT:
            named = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in named.items()}
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config(form)), "utf-8")
        return folder

    def with_flags(self, *flags: str) -> "HeadFiles":
        return replace(self, flags=flags)


class PlainHead:
    """A head as the two public descriptions have it, over one text whose rows come in order."""

    def __init__(self, folder: Path, embedding: torch.Tensor) -> None:
        """`embedding` is the target's, for a head that has none of its own."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        layer = config.get("transformer_layer_config", config)
        self.flags = {**config.get("eagle_config", {}), **config}
        self.eps, self.theta = layer["rms_norm_eps"], layer["rope_theta"]
        self.heads, self.kv_heads = layer["num_attention_heads"], layer["num_key_value_heads"]
        self.dim = layer["head_dim"]
        named = load_file(folder / "model.safetensors")
        self.w = {name.replace("midlayer.", "layers.0.").removeprefix("layers.0."): t for name, t in named.items()}
        self.embedding = self.w.get("embed_tokens.weight", embedding)
        self.keys, self.values = torch.empty(0), torch.empty(0)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.w[f"{name}.weight"] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """Return the head's states [n, hidden] of the target's at all taps [n, taps · target hidden]."""
        if self.flags.get("norm_before_fc"):
            states = self.norm("input_norm", states)
        if self.flags.get("fc_norm"):
            taps = sum(name.startswith("fc_norm") for name in self.w)
            states = torch.cat([self.norm(f"fc_norm.{i}", part) for i, part in enumerate(states.chunk(taps, -1))], -1)
        return linear(states, self.w["fc.weight"])

    def rows(self, states: torch.Tensor, tokens: torch.Tensor, first: int) -> torch.Tensor:
        """Return the states after the layer [n, hidden], of rows at positions `first` and up with the next tokens."""
        count, before = len(tokens), self.keys.shape[1] if self.keys.ndim == 3 else 0
        normed = self.norm("hidden_norm", states)
        inputs = torch.cat([self.norm("input_layernorm", self.embedding[tokens]), normed], -1)
        query, key, value = (self.project(name, inputs) for name in "qkv")
        query, key = (self.rotate(part, first) for part in (query, key))
        self.keys, self.values = (key, value) if not before else (
            torch.cat([self.keys, key], 1), torch.cat([self.values, value], 1)
        )  # fmt: skip
        seen = torch.arange(before + count) <= torch.arange(before, before + count)[:, None]
        groups = self.heads // self.kv_heads
        attended = scaled_dot_product_attention(
            query[None], self.keys.repeat_interleave(groups, 0)[None], self.values.repeat_interleave(groups, 0)[None],
            attn_mask=seen,
        )[0]  # fmt: skip
        attended = linear(attended.transpose(0, 1).reshape(count, -1), self.w["self_attn.o_proj.weight"])
        states = (normed if self.flags.get("norm_before_residual") else states) + attended
        inner = self.norm("post_attention_layernorm", states)
        gate, up = (linear(inner, self.w[f"mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        states = states + linear(silu(gate) * up, self.w["mlp.down_proj.weight"])
        return self.norm("norm", states) if self.flags.get("norm_output") else states

    def project(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        projected = linear(inputs, self.w[f"self_attn.{name}_proj.weight"])
        projected = projected.view(len(inputs), -1, self.dim).transpose(0, 1)
        is_normed = f"self_attn.{name}_norm.weight" in self.w
        return self.norm(f"self_attn.{name}_norm", projected) if is_normed else projected

    def rotate(self, x: torch.Tensor, first: int) -> torch.Tensor:
        half = self.dim // 2
        frequency = 1.0 / (self.theta ** (torch.arange(0, self.dim, 2, dtype=torch.float) / self.dim))
        angle = torch.arange(first, first + x.shape[1])[:, None].float() * frequency
        low, high = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the scores [n, draft vocabulary] of the tokens that `target_ids` names."""
        normed = states if self.flags.get("norm_output") else self.norm("norm", states)
        return linear(normed, self.w["lm_head.weight"])

    def target_ids(self) -> list[int]:
        count = len(self.w["lm_head.weight"])
        offsets = self.w.get("d2t", torch.zeros(count, dtype=torch.int64)).tolist()
        return [draft + offset for draft, offset in enumerate(offsets)]

"""Understand the config of a published EAGLE-3 head, in either public format.  Pure.

The flat format is a config of a Llama model with a few fields more.  The nested format has the layer's config in
`transformer_layer_config`, and names the model that the head guesses for (its verifier).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from treeswarm.errors import ModelError
from treeswarm_node.speculator.head import HeadRecipe, TapNorm

EAGLE3 = "eagle3"
"""Name of this kind of speculator."""
NESTED = "transformer_layer_config"
"""Field that only the nested format has."""
# Types of layers that heads are made of: others compute something else than `SpeculatorHead`.
LAYER_TYPES = ("llama", "qwen3")
# Rotary embeddings whose frequencies depend on no text's length.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Number of rows, itself included, that a row attends to at most.  EAGLE's and SpecForge's training cuts texts at 2,048
# tokens, and a session's keys and values of so many rows take 17 MB with the 8 heads of 128 values of a head for 8B.
LONGEST_WINDOW = 2048
# Number of taps where a config does not say which.
DEFAULT_TAPS = 3
# Sizes above this are mistakes: they are refused before any memory is taken for them.
LARGEST_SIZE = 1 << 20
FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


@dataclass(frozen=True)
class Eagle3Config:
    """What a config says."""

    vocab_size: int
    """Number of token ids of the target."""
    target_hidden_size: int
    """Number of values in one state of the target."""
    hidden_size: int
    """Number of values in one of the head's own states."""
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    window: int
    """Number of rows, itself included, that a row attends to."""
    recipe: HeadRecipe
    tap_ids: tuple[int, ...] | None
    """Numbers of the tapped layers as the config gives them, or None for the default ones."""
    is_nested: bool
    draft_vocab_size: int
    """Number of tokens that the head can guess."""
    ties_embeddings: bool
    """Whether the LM head is the head's own embedding."""
    verifier: str = ""
    """Name of the model that the head was made for, or an empty string."""
    verifier_architectures: tuple[str, ...] = ()

    @property
    def taps(self) -> int:
        """Number of tapped blocks."""
        return len(self.tap_ids or range(DEFAULT_TAPS))

    @property
    def weights(self) -> int:
        """Number of values in the head's layer and in its LM head."""
        attention = 2 * self.hidden_size * (self.heads + 2 * self.kv_heads) * self.head_dim
        output = self.heads * self.head_dim * self.hidden_size
        fuse = self.taps * self.target_hidden_size * self.hidden_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        return attention + output + fuse + mlp + self.draft_vocab_size * self.hidden_size

    def tapped_blocks(self, blocks: int) -> tuple[int, ...]:
        """Return the indices of the blocks whose results are tapped, of a target of `blocks` blocks, rising.

        A layer's id counts the embedding as 0, so that id n is the result of block n - 1; some heads count blocks.
        Raises ModelError.
        """
        ids = sorted(self.tap_ids or (2, blocks // 2, blocks - 3))
        counted = [tap if self._counts_blocks(ids, blocks) else tap - 1 for tap in ids]
        if len(set(counted)) < len(counted) or counted[0] < 0 or counted[-1] >= blocks:
            raise ModelError(
                f"a head taps layers {', '.join(map(str, ids))}, and this model has {blocks} blocks: the head is for "
                "another model"
            )
        return tuple(counted)

    def _counts_blocks(self, ids: Sequence[int], blocks: int) -> bool:
        """Return whether ids count blocks alone.

        No trainer taps the first block's result by default.  So a flat head whose lowest id is 1 counts blocks, as
        SpecForge does.  In the nested format an id counts the embedding.  Only ids that are exactly the default ones
        counted without it are not: they were copied from a flat head.
        """
        if self.tap_ids is None or ids[-1] >= blocks:
            return False
        return tuple(ids) == (1, blocks // 2 - 1, blocks - 4) if self.is_nested else ids[0] == 1


def is_eagle3(content: Mapping[str, Any]) -> bool:
    """Return whether the content of a config.json is that of an EAGLE-3 head."""
    if NESTED in content:
        return content.get("speculators_model_type") == EAGLE3
    named = any("eagle3" in str(name).lower() for name in content.get("architectures") or ())
    return named or "draft_vocab_size" in content


def read_eagle3_config(content: Mapping[str, Any]) -> Eagle3Config:
    """Understand the content of a config.json.  Raises ModelError that names what a head cannot be built from."""
    nested = NESTED in content
    layer = _layer_config(content[NESTED] if nested else content)
    # Some flat configs have their fields in `eagle_config`.
    extra = dict(content.get("eagle_config") or {})
    own = extra | dict(content)
    flags = {name: bool(content.get(name) or extra.get(name)) for name in FLAGS}
    _check_layer(layer, own)
    _check_flags(flags)
    ids = own.get("eagle_aux_hidden_state_layer_ids")
    verifier = (content.get("speculators_config") or {}).get("verifier") or {}
    config = Eagle3Config(
        vocab_size=layer.vocab_size,
        target_hidden_size=own.get("target_hidden_size") or layer.hidden_size,
        hidden_size=layer.hidden_size,
        heads=layer.num_attention_heads,
        kv_heads=layer.num_key_value_heads,
        head_dim=layer.head_dim,
        intermediate_size=layer.intermediate_size,
        window=_window(layer, is_nested=nested),
        recipe=_recipe(layer, flags),
        tap_ids=tuple(ids) if ids else None,
        is_nested=nested,
        draft_vocab_size=own.get("draft_vocab_size") or layer.vocab_size,
        ties_embeddings=bool(own.get("tie_word_embeddings")),
        verifier=str(verifier.get("name_or_path") or ""),
        verifier_architectures=tuple(verifier.get("architectures") or ()),
    )
    _check_sizes(config)
    return config


def _recipe(layer: Any, flags: Mapping[str, bool]) -> HeadRecipe:
    tap_norm = TapNorm.EACH if flags["fc_norm"] else TapNorm.NONE
    return HeadRecipe(
        tap_norm=TapNorm.JOINED if flags["norm_before_fc"] else tap_norm,
        norm_before_residual=flags["norm_before_residual"],
        norm_output=flags["norm_output"],
        query_key_norm=layer.model_type == "qwen3",
        attention_bias=bool(layer.attention_bias),
        mlp_bias=bool(getattr(layer, "mlp_bias", False)),
        activation=layer.hidden_act,
        epsilon=layer.rms_norm_eps,
        rope=layer.rope_parameters,
    )


def _layer_config(content: Mapping[str, Any]) -> Any:
    """Return transformers' config of the head's layer."""
    model_type = content.get("model_type", "llama")
    if model_type not in LAYER_TYPES:
        raise ModelError(f"the head's layer is of type '{model_type}': known are {' and '.join(LAYER_TYPES)}")
    settings = {name: value for name, value in content.items() if name not in {"model_type", "torch_dtype", "dtype"}}
    try:
        return AutoConfig.for_model(model_type, **settings)
    except Exception as error:  # transformers' checks raise errors of several kinds
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"the head's config cannot be read: {first_line}") from None


def _check_layer(layer: Any, own: Mapping[str, Any]) -> None:
    """Raise ModelError for layers that are computed in another way than here."""
    if layer.num_hidden_layers != 1:
        raise ModelError(f"the head has {layer.num_hidden_layers} layers: only heads of one layer are read")
    if own.get("use_aux_hidden_state") is False:
        raise ModelError("the head reads the model's last state alone, as EAGLE's first version did: it is no EAGLE-3")
    rope = layer.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ModelError(f"the head's rotary embedding is of type '{kind}': known are {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("the head rotates a part of its keys' values: only whole ones are computed here")


def _check_flags(flags: Mapping[str, bool]) -> None:
    if flags["norm_before_fc"] and flags["fc_norm"]:
        raise ModelError("the head's config has norm_before_fc and fc_norm, which exclude each other")


def _window(layer: Any, *, is_nested: bool) -> int:
    """Return how many rows a row attends to: all, up to a limit, unless the layer has a window of its own.

    Flat configs may keep the target's `sliding_window`; their layer has none.
    """
    kinds = getattr(layer, "layer_types", None) or ()
    slides = is_nested and "sliding_attention" in kinds and getattr(layer, "sliding_window", None)
    return min(LONGEST_WINDOW, int(layer.sliding_window) if slides else int(layer.max_position_embeddings))


def _check_sizes(config: Eagle3Config) -> None:
    sizes = (
        config.vocab_size, config.target_hidden_size, config.hidden_size, config.heads, config.kv_heads,
        config.head_dim, config.intermediate_size, config.window, config.draft_vocab_size,
    )  # fmt: skip
    valid = all(isinstance(size, int) and 0 < size <= LARGEST_SIZE for size in sizes)
    valid &= all(isinstance(tap, int) and tap >= 0 for tap in config.tap_ids or ()) and config.taps <= 16
    if not valid or config.heads % config.kv_heads or config.head_dim % 2:
        raise ModelError("the head's config describes no head that can be built: download it again")

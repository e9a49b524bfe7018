"""Find what layers of some families take besides activations and positions: inputs per layer, from tokens.

Gemma 4 and Gemma 3n give every layer an input of its own, computed from the token alone.  Every node of a chain knows
the tokens of its rows, so a span that begins later computes these inputs again, with the embeddings that they need.
"""

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from treeswarm.protocol.spans import Span
from treeswarm_node.model.families.blocks import DecoderBlocks, find_blocks

# Modules of the model that inputs per layer are computed with.
MODULES = ("embed_tokens", "embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm")
# Modules that make several rows of activations of a token's embedding, and one again of the last layer's.
OF_STREAMS = ("altup_projections", "altup_unembed_projections")


class ExtraInputs:
    """Knows which extra inputs a model's layers take, by the names of their arguments."""

    def __init__(self, skeleton: PreTrainedModel, blocks: DecoderBlocks) -> None:
        self._base: Any = skeleton.get_submodule(blocks.path.rpartition(".")[0])
        config: Any = skeleton.config.get_text_config(decoder=True)
        self.streams = int(getattr(config, "altup_num_inputs", 1))
        """Number of rows of activations per token that layers pass on (AltUp in Gemma 3n); 1 in all other families."""
        names = inspect.signature(type(blocks.layers[0]).forward).parameters
        self.per_layer = "per_layer_input" in names and bool(getattr(config, "hidden_size_per_layer_input", None))
        """Whether layers take inputs that are computed from tokens."""

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Modules besides the blocks that every span needs for them."""
        names = (*(MODULES if self.per_layer else ()), *(OF_STREAMS if self.streams > 1 else ()))
        return [getattr(self._base, name) for name in names]

    def to_state(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return rows of activations [n, streams · dim] as layers take them: [1, n, dim], or [streams, 1, n, dim]."""
        if self.streams == 1:
            return hidden[None]
        return hidden.view(len(hidden), self.streams, -1).transpose(0, 1)[:, None]

    def to_rows(self, state: torch.Tensor) -> torch.Tensor:
        """Return what layers pass on as rows of activations [n, streams · dim]."""
        return state[0] if self.streams == 1 else state[:, 0].transpose(0, 1).flatten(1)


def embeds(skeleton: PreTrainedModel, span: Span) -> bool:
    """Return whether a span needs the embedding of tokens."""
    inputs = ExtraInputs(skeleton, find_blocks(skeleton)).modules
    return span.start == 0 or skeleton.get_input_embeddings() in inputs

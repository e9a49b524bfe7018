"""Compute what layers of some families take besides activations and positions: inputs per layer, and shared KV.

Gemma 4 and Gemma 3n give every layer an input of its own, computed from the token alone.  Every node of a chain knows
the tokens of its rows, so a span that begins later computes these inputs again, with the embeddings that they need.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel
from transformers.cache_utils import KVSharingDict

# Modules of the model that inputs per layer are computed with.
MODULES = ("embed_tokens", "embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm")
# Modules that make several rows of activations of a token's embedding, and one again of the last layer's.
OF_STREAMS = ("altup_projections", "altup_unembed_projections")


@dataclass(frozen=True, eq=False)
class RowInputs:
    """Holds the extra inputs of one forward."""

    shared_kv: KVSharingDict | None
    """Keys and values that layers hand on to later ones, or None if layers take none."""
    per_layer: torch.Tensor | None
    """Inputs of each layer [1, ΣT, layers, dim], or None if layers take none."""

    def of_block(self, block: int) -> dict[str, Any]:
        """Return the keyword arguments of one layer."""
        inputs: dict[str, Any] = {}
        if self.shared_kv is not None:
            inputs["shared_kv_states"] = self.shared_kv
        if self.per_layer is not None:
            inputs["per_layer_input"] = self.per_layer[:, :, block]
        return inputs


class ExtraInputs:
    """Knows which extra inputs a model's layers take, by the names of their arguments."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._base: Any = base
        self.streams = int(getattr(base.config, "altup_num_inputs", 1))
        """Number of rows of activations per token that layers pass on (AltUp in Gemma 3n); 1 in all other families."""
        names = inspect.signature(self._base.layers[0].forward).parameters
        self._shares_kv = "shared_kv_states" in names
        self._has_per_layer = "per_layer_input" in names and bool(base.config.hidden_size_per_layer_input)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Modules besides the blocks that every span needs for them."""
        names = (*(MODULES if self._has_per_layer else ()), *(OF_STREAMS if self.streams > 1 else ()))
        return [getattr(self._base, name) for name in names]

    def to_state(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return rows of activations [n, streams · dim] as layers take them: [1, n, dim], or [streams, 1, n, dim]."""
        if self.streams == 1:
            return hidden[None]
        return hidden.view(len(hidden), self.streams, -1).transpose(0, 1)[:, None]

    def to_rows(self, state: torch.Tensor) -> torch.Tensor:
        """Return what layers pass on as rows of activations [n, streams · dim]."""
        return state[0] if self.streams == 1 else state[:, 0].transpose(0, 1).flatten(1)

    def of_rows(self, tokens: NDArray[np.int64]) -> RowInputs:
        """Return the inputs of rows with these tokens, int64 [ΣT]."""
        per_layer = None
        if self._has_per_layer:
            ids = torch.from_numpy(tokens)[None].to(self._base.embed_tokens.weight.device)
            embedded = self._base.embed_tokens(ids)
            of_tokens = self._base.get_per_layer_inputs(ids)
            per_layer = self._base.project_per_layer_inputs(embedded, of_tokens)
        return RowInputs(KVSharingDict() if self._shares_kv else None, per_layer)

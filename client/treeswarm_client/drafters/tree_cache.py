"""The draft model's own tree-shaped KV cache, behind transformers' attention interface.

Rows 0 to `trunk` are the text; a round's nodes follow.  An accepted path's rows move up to the end of the trunk, in
place, so that no token is ever computed twice.
"""

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

IMPLEMENTATION = "treeswarm-draft"
FIRST_ROWS = 512


@dataclass(eq=False)
class TreeCache:
    """K and V per layer, [kv_heads, rows, dim], doubled when full."""

    trunk: int = 0
    used: int = 0
    """Rows in use: trunk and crown."""
    mask: torch.Tensor | None = None
    """Of the forward under way: bool [new rows, used]; None where every row sees all before it (one row)."""
    _layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the forward's rows ([kv_heads, new, dim]) at the end; returns views of all rows in use."""
        start, end = self.used - key.shape[1], self.used
        keys, values = self._room(layer, key, value, end)
        keys[:, start:end], values[:, start:end] = key, value
        return keys[:, :end], values[:, :end]

    @torch.inference_mode()
    def keep(self, rows: NDArray[np.int64]) -> None:
        """Make these crown rows, in order, the trunk's next; drop the rest of the crown."""
        if len(rows):
            source = torch.from_numpy(rows)
            end = self.trunk + len(rows)
            for pair in self._layers.values():
                for pool in pair:
                    pool[:, self.trunk : end] = pool[:, source.to(pool.device)]
            self.trunk = end
        self.used = self.trunk

    def cut(self, length: int) -> None:
        """Forget all rows past the first `length` of the trunk."""
        self.trunk = self.used = min(self.trunk, length)

    def _room(self, layer: int, key: torch.Tensor, value: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self._layers.get(layer)
        if pair is None or pair[0].shape[1] < rows:
            size = FIRST_ROWS
            while size < rows:
                size *= 2
            grown = (
                key.new_zeros(key.shape[0], size, key.shape[2]),
                value.new_zeros(value.shape[0], size, value.shape[2]),
            )
            for old, new in zip(pair or (), grown, strict=False):
                new[:, : old.shape[1]] = old
            self._layers[layer] = pair = grown
        return pair


def register() -> None:
    """Make transformers know the implementation; doing so again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    treeswarm_cache: TreeCache | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Windows and soft caps of the draft are passed over: they can cost guesses, never exactness."""
    assert treeswarm_cache is not None
    keys, values = treeswarm_cache.write(int(cast(int, module.layer_idx)), key[0], value[0])
    output = torch.nn.functional.scaled_dot_product_attention(
        query,
        keys[None],
        values[None],
        attn_mask=treeswarm_cache.mask,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[0],
    )
    return output.transpose(1, 2), None

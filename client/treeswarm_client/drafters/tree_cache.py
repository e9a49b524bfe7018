"""The draft model's own tree-shaped KV cache, behind transformers' attention interface.

Rows 0 to `trunk` are the text; the rows of the nodes drafted below it follow.  When a path is walked, its rows and
those below it move up in place, so that no token is computed twice.
"""

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from treeswarm.errors import UnsupportedModel

IMPLEMENTATION = "treeswarm-draft"
FIRST_ROWS = 512


@dataclass(eq=False)
class TreeCache:
    """The K and V of each layer, [kv_heads, rows, dim] each; their room doubles when it is full."""

    trunk: int = 0
    """Number of rows of the text."""
    used: int = 0
    """Number of rows in use, trunk and crown."""
    mask: torch.Tensor | None = None
    """Mask of the present forward, bool [new rows, used], or None for a single row that sees all rows before it."""
    device: torch.device = torch.device("cpu")
    _layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def add_trunk(self, count: int) -> None:
        """Prepare a forward that continues the text by `count` tokens, each of which sees those before it."""
        assert self.used == self.trunk, "the crown was neither kept nor dropped"
        before = self.trunk
        self.used = self.trunk = before + count
        causal = torch.ones(count, self.used, dtype=torch.bool, device=self.device).tril(before)
        self.mask = causal if count > 1 else None

    def add_crown(self, visible: NDArray[np.bool_]) -> None:
        """Prepare a forward that adds crown rows.

        `visible`, bool [new, crown rows], says which crown rows each of them sees; it sees the whole trunk too.
        """
        new, rows = visible.shape
        self.used = self.trunk + rows
        mask = np.ones((new, self.used), np.bool_)
        mask[:, self.trunk :] = visible
        self.mask = torch.from_numpy(mask).to(self.device)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the forward's rows, [kv_heads, new, dim] each, at the end.  Returns views of all rows in use."""
        start, end = self.used - key.shape[1], self.used
        keys, values = self._room(layer, key, value, end)
        keys[:, start:end], values[:, start:end] = key, value
        return keys[:, :end], values[:, :end]

    @torch.inference_mode()
    def keep(self, rows: NDArray[np.int64], below: NDArray[np.int64]) -> None:
        """Append the crown rows `rows`, in order, to the trunk, and make `below`, in order, the whole crown.

        Both are numbers of crown rows; 0 is the first row of the crown.
        """
        count = len(rows) + len(below)
        if count:
            source = torch.from_numpy(self.trunk + np.concatenate([rows, below]))
            for pair in self._layers.values():
                for pool in pair:
                    pool[:, self.trunk : self.trunk + count] = pool[:, source.to(pool.device)]
        self.trunk += len(rows)
        self.used = self.trunk + len(below)

    def cut(self, length: int) -> None:
        """Forget all rows after the first `length` of the trunk."""
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
    """Register the attention implementation with transformers; calling this again changes nothing."""
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
    """Compute attention for transformers' layers.

    Sliding windows and soft caps of the draft model are ignored: that can cost guesses, but never exactness.
    """
    if treeswarm_cache is None:
        raise UnsupportedModel("its layers do not pass keyword arguments to attention")
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

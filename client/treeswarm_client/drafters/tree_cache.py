"""The draft model's own tree-shaped KV cache, behind transformers' attention interface.

Rows 0 to `trunk` are the text; a round's nodes follow.  An accepted path's rows move up to the end of the trunk, in
place, so that no token is ever computed twice.
"""

from dataclasses import dataclass, field
from typing import Any, Self, cast

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
    """K and V per layer, [kv_heads, rows, dim], doubled when full."""

    trunk: int = 0
    used: int = 0
    """Rows in use: trunk and crown."""
    mask: torch.Tensor | None = None
    """Of the forward under way: bool [new rows, used]; None where every row sees all before it (one row)."""
    device: torch.device = torch.device("cpu")
    _layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def add_trunk(self, count: int) -> None:
        """The next forward continues the text by `count` tokens, each seeing those before it."""
        assert self.used == self.trunk, "the crown was neither kept nor dropped"
        before = self.trunk
        self.used = self.trunk = before + count
        causal = torch.ones(count, self.used, dtype=torch.bool, device=self.device).tril(before)
        self.mask = causal if count > 1 else None

    def add_crown(self, visible: NDArray[np.bool_]) -> None:
        """The next forward adds crown rows, `visible` [new, crown rows] to each; each sees the whole trunk too."""
        new, rows = visible.shape
        self.used = self.trunk + rows
        mask = np.ones((new, self.used), np.bool_)
        mask[:, self.trunk :] = visible
        self.mask = torch.from_numpy(mask).to(self.device)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the forward's rows ([kv_heads, new, dim]) at the end; returns views of all rows in use."""
        start, end = self.used - key.shape[1], self.used
        keys, values = self._room(layer, key, value, end)
        keys[:, start:end], values[:, start:end] = key, value
        return keys[:, :end], values[:, :end]

    @torch.inference_mode()
    def keep(self, rows: NDArray[np.int64]) -> None:
        """Make these crown rows (0 is the crown's first), in order, the trunk's next; drop the rest of the crown."""
        if len(rows):
            source = torch.from_numpy(self.trunk + rows)
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


@dataclass(eq=False)
class CrownRows:
    """Which node of the tree under way has which crown row, and who is above whom."""

    count: int
    _row: NDArray[np.int64]
    """By node number; -1 where a node has none."""
    _above: NDArray[np.bool_]
    """[rows, rows]: ancestors and self."""

    @classmethod
    def empty(cls) -> Self:
        """No node has a row yet."""
        return cls(0, np.empty(0, np.int64), np.empty((0, 0), np.bool_))

    def add(self, nodes: NDArray[np.int64], parents: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Give nodes (numbers) the next rows, below parents that have one (-1: the root, which is trunk).

        Returns bool [new, rows]: the crown rows each of them sees, itself included.
        """
        old, self.count = self.count, self.count + len(nodes)
        self._make_room(int(nodes.max()) + 1)
        above = self._above[old : self.count, : self.count]
        below_root = parents < 0
        above[:, :old] = self._above[self._row[np.where(below_root, 0, parents)], :old]
        above[below_root] = False
        above[np.arange(len(nodes)), np.arange(old, self.count)] = True
        self._row[nodes] = np.arange(old, self.count)
        return above

    def of(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of each node, -1 where it has none."""
        known = nodes < len(self._row)
        return np.where(known, self._row[np.where(known, nodes, 0)], -1) if len(self._row) else np.full(len(nodes), -1)

    def _make_room(self, numbers: int) -> None:
        if numbers > len(self._row):
            more = np.full(2 * numbers - len(self._row), -1)
            self._row = np.concatenate([self._row, more])
        if self.count > len(self._above):
            grown = np.zeros((2 * self.count, 2 * self.count), np.bool_)
            grown[: len(self._above), : len(self._above)] = self._above
            self._above = grown


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
    if treeswarm_cache is None:
        raise UnsupportedModel("its layers do not pass keyword arguments on to attention")
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

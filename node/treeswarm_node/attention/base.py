"""Define what an attention adapter is: its `attend` computes one layer for the whole batch.

Transformers' layers reach it through `attention/interface.py`.  A batch has one segment for each step in the
forward.  In shapes, T is the number of new rows of a segment, ΣT that of the batch, and C a number of keys.

Every live crown node sees the whole trunk.  Attention is therefore an unmasked part over the trunk, read in place,
and a masked part over the crown, under one softmax in float32.  Only a sliding window masks a part of the trunk too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from treeswarm_node.attention.metadata import Batch, SegmentMetadata, Window
from treeswarm_node.attention.padded import PaddedBatch

# Largest number of scores that are computed at once: 256 MiB of float32.  DeepSeek-V3's 128 heads have 16 times as many
# for a prefill of 512 rows at position 16,000.
MAX_SCORES = 1 << 26

AttentionPart = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Keys and values [kv_heads, C, dim], and a bool mask [T, C] of the keys that are seen, or None if all are."""


@dataclass(frozen=True, eq=False)
class QueryRows:
    """Holds one segment's rows in one layer, and all keys that they may attend to."""

    query: torch.Tensor
    """Queries [heads, T, dim], not scaled."""
    trunk: list[AttentionPart]
    """Parts of the trunk, in order; may be empty."""
    crown: AttentionPart
    """The crown's part.  Every row sees itself in it."""
    scaling: float
    """Factor that the scores are multiplied by."""
    softcap: float | None
    """Bound of the scores, or None if they are not capped."""
    sinks: torch.Tensor | None
    """Score of each head's attention sink [heads], or None if the model has none."""

    def select(self, rows: slice) -> "QueryRows":
        """Return some of the rows, with all keys."""
        trunk, crown = [_select(part, rows) for part in self.trunk], _select(self.crown, rows)
        return replace(self, query=self.query[:, rows], trunk=trunk, crown=crown)

    def fold_heads(self) -> torch.Tensor:
        """Return queries [kv_heads, heads / kv_heads · T, dim]: a KV head's query heads are rows of one product."""
        return self.query.reshape(self.crown[0].shape[0], -1, self.query.shape[-1])

    def unfold_heads(self, output: torch.Tensor) -> torch.Tensor:
        """Return the output of the folded rows as [T, heads, value_dim], which is the layout that `attend` returns."""
        return output.reshape(*self.query.shape[:2], -1).transpose(0, 1)


def _select(part: AttentionPart, rows: slice) -> AttentionPart:
    key, value, mask = part
    return key, value, None if mask is None else mask[rows]


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """Holds one layer's attention inputs for a batch whose K and V are in the pool."""

    query: torch.Tensor
    """Queries of the batch [heads, ΣT, dim]."""
    key: torch.Tensor
    """Keys of the batch's own rows [kv_heads, ΣT, dim]."""
    value: torch.Tensor
    """Values of the batch's own rows [kv_heads, ΣT, dim]."""
    keys: torch.Tensor
    """Keys of the layer's whole pool [kv_heads, pool, dim]."""
    values: torch.Tensor
    """Values of the layer's whole pool [kv_heads, pool, dim]."""
    batch: Batch
    """Metadata of the forward."""
    scaling: float
    """Factor that the scores are multiplied by."""
    window: Window = None
    """Number of positions in the layer's sliding window, or its chunk, or None if it sees everything."""
    softcap: float | None = None
    """Bound of the scores, or None if they are not capped."""
    sinks: torch.Tensor | None = None
    """Score of each head's attention sink [heads], or None if the model has none."""

    @classmethod
    def with_kv_written(
        cls, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch, **options: Any
    ) -> "LayerInputs":
        """Write the batch's K and V to its rows of the layer with index `layer`, then return the layer's inputs.

        All are written first, because a row may see rows of an earlier segment of the same session.  A layer that
        reads another layer's rows writes none.
        """
        pool = batch.store.layers[layer]
        if batch.store.keeps_rows_of(layer):
            pool.write(batch.kv_rows, key, value)
        return cls(query, key, value, pool.keys, pool.values, batch, **options)

    def attend_segments(
        self,
        attend_rows: Callable[[QueryRows], torch.Tensor],
        unbatched: Sequence[SegmentMetadata],
        padded: Sequence[PaddedBatch] = (),
    ) -> torch.Tensor:
        """Return what `Attention.attend` returns.

        `attend_rows` computes the `unbatched` segments one after the other; each `padded` batch is computed at once.
        """
        output = self.query.new_empty(self.query.shape[1], self.query.shape[0], self.value.shape[-1])
        for group in padded:
            attended = group.attend(
                self.query, self.keys, self.values, scaling=self.scaling, softcap=self.softcap, sinks=self.sinks
            )
            output[group.batch_rows] = attended.to(output.dtype)
        for segment in unbatched:
            # A segment without rows only commits, or all its rows died while they waited.
            if segment.rows.start < segment.rows.stop:
                output[segment.rows] = attend_rows(self._query_rows(segment)).to(output.dtype)
        return output

    def _query_rows(self, segment: SegmentMetadata) -> QueryRows:
        visible = segment.visible_keys(self.window)
        trunk = [
            (self.keys[:, first : first + count], self.values[:, first : first + count], mask)
            for first, count, mask in visible.runs
        ]
        if segment.local_rows is None:
            crown = (self.key[:, segment.rows], self.value[:, segment.rows], visible.local_mask)
        else:
            crown = (self.keys[:, segment.local_rows], self.values[:, segment.local_rows], visible.local_mask)
        return QueryRows(self.query[:, segment.rows], trunk, crown, self.scaling, self.softcap, self.sinks)


class Attention(Protocol):
    """An adapter computes one layer's attention for the whole batch."""

    name: str
    """Name of the adapter, as nodes announce it."""

    def attend(self, layer: LayerInputs) -> torch.Tensor:
        """Return the attention output [ΣT, heads, value_dim] in the query's dtype."""
        ...


class TorchReference:
    """Computes attention in plain torch, which is correct on every device and fast enough on a CPU.

    Short sessions of similar size are computed together, all others one after the other.
    """

    name = "torch-reference"

    def attend(self, layer: LayerInputs) -> torch.Tensor:
        groups = layer.batch.groups(layer.window)
        return layer.attend_segments(attend_reference, groups.unbatched, groups.padded)


def attend_reference(rows: QueryRows) -> torch.Tensor:
    """Return the attention output float32 [T, heads, value_dim], from all scores of a row under one softmax."""
    keys = sum(part[0].shape[1] for part in (*rows.trunk, rows.crown))
    limit = max(1, MAX_SCORES // (rows.query.shape[0] * max(1, keys)))
    if rows.query.shape[1] <= limit:
        return _attend_at_once(rows)
    starts = range(0, rows.query.shape[1], limit)
    return torch.cat([_attend_at_once(rows.select(slice(start, start + limit))) for start in starts])


def _attend_at_once(rows: QueryRows) -> torch.Tensor:
    parts = [*rows.trunk, rows.crown]
    scores = compute_scores(rows, parts)
    counts = [part[0].shape[1] for part in parts]
    if rows.sinks is not None:
        # A sink takes probability and contributes no value: it is one more key with its score and value zero.
        sink_scores = rows.sinks.float().view(len(scores), -1, 1).expand(-1, -1, rows.query.shape[1])
        scores, counts = torch.cat([scores, sink_scores.reshape(len(scores), -1, 1)], -1), [*counts, 1]
    return rows.unfold_heads(sum_values(torch.split(scores.softmax(-1), counts, -1), parts))


def compute_scores(rows: QueryRows, parts: Sequence[AttentionPart]) -> torch.Tensor:
    """Return scores float32 [kv_heads, folded rows, keys of all parts]; -inf where a row does not see a key."""
    folded = rows.fold_heads().float() * rows.scaling
    scores = torch.cat([torch.bmm(folded, key.float().transpose(1, 2)) for key, _, _ in parts], -1)
    if rows.softcap is not None:
        scores = torch.tanh(scores / rows.softcap) * rows.softcap
    by_row = scores.view(len(scores), -1, rows.query.shape[1], scores.shape[-1])
    counts = [part[0].shape[1] for part in parts]
    for part_scores, (_, _, mask) in zip(torch.split(by_row, counts, -1), parts, strict=True):
        if mask is not None:
            part_scores.masked_fill_(~mask, -torch.inf)
    return scores


def sum_values(weights: Sequence[torch.Tensor], parts: Sequence[AttentionPart]) -> torch.Tensor:
    """Return the weighted sum of the values, float32 [kv_heads, folded rows, value_dim].

    `weights` has one tensor [kv_heads, folded rows, C] per part, and perhaps one more, of sinks, which have no value.
    """
    total = torch.bmm(weights[0], parts[0][1].float())
    for weight, (_, value, _) in zip(weights[1:], parts[1:], strict=False):
        total = torch.baddbmm(total, weight, value.float())
    return total

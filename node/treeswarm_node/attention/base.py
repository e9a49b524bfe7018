"""The attention seam: transformers' layers call `attend` once a layer for the whole batch.

Every live crown node sees the whole trunk, so attention is an unmasked part over the trunk, in place, and a masked
part over the crown, under one softmax in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from treeswarm.errors import UnsupportedModel
from treeswarm_node.attention.metadata import Batch, SegmentMetadata
from treeswarm_node.attention.padded import PaddedBatch

IMPLEMENTATION = "treeswarm"
# What layers pass along that says nothing about which keys are seen or how scores are formed.
IGNORED_ARGUMENTS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "dropout",
    "is_causal",
    "position_embeddings",
}


# Keys and values [kv_heads, C, dim], and a bool mask [T, C] of those that are seen; None: all are.
AttentionPart = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, eq=False)
class QueryRows:
    """One segment's rows in one layer, and all that they may attend to."""

    query: torch.Tensor
    """[heads, T, dim], not scaled."""
    trunk: list[AttentionPart]
    crown: AttentionPart
    """Every row sees itself in it."""
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None

    def fold_heads(self) -> torch.Tensor:
        """A KV head's query heads become rows of one product: [kv_heads, heads / kv_heads · T, dim]."""
        return self.query.reshape(self.crown[0].shape[0], -1, self.query.shape[-1])

    def unfold_heads(self, output: torch.Tensor) -> torch.Tensor:
        """What was computed for the folded rows, as `attend` returns it."""
        return output.reshape(*self.query.shape[:2], -1).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """One layer's attention for a batch whose K and V are in the pool."""

    query: torch.Tensor
    """[heads, ΣT, dim]."""
    key: torch.Tensor
    value: torch.Tensor
    """The batch's own, [kv_heads, ΣT, dim]."""
    keys: torch.Tensor
    values: torch.Tensor
    """The block's whole pool, [kv_heads, pool, dim]."""
    batch: Batch
    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @classmethod
    def with_kv_written(
        cls, block: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch, **how: Any
    ) -> "LayerInputs":
        """Of a block of the store.  K and V go to the batch's rows first: a row may see those of an earlier segment."""
        keys, values = batch.store.keys[block], batch.store.values[block]
        keys[:, batch.written] = key
        values[:, batch.written] = value
        return cls(query, key, value, keys, values, batch, **how)

    def attend_segments(
        self,
        attend_rows: Callable[[QueryRows], torch.Tensor],
        unbatched: Sequence[SegmentMetadata],
        padded: Sequence[PaddedBatch] = (),
    ) -> torch.Tensor:
        """What `Attention.attend` returns: segments in turn, and crowds each at once."""
        output = self.query.new_empty(self.query.shape[1], self.query.shape[0], self.value.shape[-1])
        for crowd in padded:
            attend_segments = crowd.attend(
                self.query, self.keys, self.values, scaling=self.scaling, softcap=self.softcap, sinks=self.sinks
            )
            output[crowd.into] = attend_segments.to(output.dtype)
        for segment in unbatched:
            if segment.rows.start < segment.rows.stop:  # else it only commits, or all its rows died while they waited
                output[segment.rows] = attend_rows(self._rows(segment)).to(output.dtype)
        return output

    def _rows(self, segment: SegmentMetadata) -> QueryRows:
        visible_keys = segment.visible_keys(self.window)
        trunk = [
            (self.keys[:, at : at + count], self.values[:, at : at + count], mask)
            for at, count, mask in visible_keys.runs
        ]
        if segment.local_rows is None:
            crown = (self.key[:, segment.rows], self.value[:, segment.rows], visible_keys.local)
        else:
            crown = (self.keys[:, segment.local_rows], self.values[:, segment.local_rows], visible_keys.local)
        return QueryRows(self.query[:, segment.rows], trunk, crown, self.scaling, self.softcap, self.sinks)


class Attention(Protocol):
    """An adapter: computes one layer's attention for the whole batch."""

    name: str
    """For people, as nodes announce it."""

    def attend(self, layer: LayerInputs) -> torch.Tensor:
        """[ΣT, heads, value_dim] in the query's dtype."""
        ...


class TorchReference:
    """Plain torch: short sessions of like size together, others in turn.  Correct everywhere, quick enough on a CPU."""

    name = "torch-reference"

    def attend(self, layer: LayerInputs) -> torch.Tensor:
        split = layer.batch.groups(layer.window)
        return layer.attend_segments(attend_reference, split.unbatched, split.padded)


def attend_reference(rows: QueryRows) -> torch.Tensor:
    """float32 [T, heads, value_dim]: all scores at once, one softmax."""
    parts = [*rows.trunk, rows.crown]
    scores = compute_scores(rows, parts)
    counts = [part[0].shape[1] for part in parts]
    if rows.sinks is not None:
        # A sink takes probability and gives nothing: one more key of that score and value zero.
        level = rows.sinks.float().view(len(scores), -1, 1).expand(-1, -1, rows.query.shape[1])
        scores, counts = torch.cat([scores, level.reshape(len(scores), -1, 1)], -1), [*counts, 1]
    return rows.unfold_heads(sum_values(torch.split(scores.softmax(-1), counts, -1), parts))


def compute_scores(rows: QueryRows, parts: Sequence[AttentionPart]) -> torch.Tensor:
    """float32 [kv_heads, folded rows, keys of all parts]; -inf where a key is not seen."""
    folded = rows.fold_heads().float() * rows.scaling
    scores = torch.cat([torch.bmm(folded, key.float().transpose(1, 2)) for key, _, _ in parts], -1)
    if rows.softcap is not None:
        scores = torch.tanh(scores / rows.softcap) * rows.softcap
    by_row = scores.view(len(scores), -1, rows.query.shape[1], scores.shape[-1])
    for seen, (_, _, mask) in zip(torch.split(by_row, [part[0].shape[1] for part in parts], -1), parts, strict=True):
        if mask is not None:
            seen.masked_fill_(~mask, -torch.inf)
    return scores


def sum_values(weights: Sequence[torch.Tensor], parts: Sequence[AttentionPart]) -> torch.Tensor:
    """float32 [kv_heads, folded rows, value_dim]: the values' sum.  Weights past the last part are of no value."""
    total = torch.bmm(weights[0], parts[0][1].float())
    for weight, (_, value, _) in zip(weights[1:], parts[1:], strict=False):
        total = torch.baddbmm(total, weight, value.float())
    return total


def _from_layer(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    treeswarm: "tuple[Attention, Batch] | None" = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls, with tensors [1, heads, ΣT, dim]."""
    strange = sorted(name for name, value in others.items() if name not in IGNORED_ARGUMENTS and value is not None)
    if strange or attention_mask is not None:
        raise UnsupportedModel(
            f"its attention takes {', '.join(strange) or 'a mask of its own'}, which is not honoured here"
        )
    if treeswarm is None:
        raise UnsupportedModel("its layers do not pass extra arguments on to attention")
    attention, batch = treeswarm
    layer = LayerInputs.with_kv_written(
        int(cast(int, module.layer_idx)) - batch.first_block,
        query[0],
        key[0],
        value[0],
        batch,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return attention.attend(layer)[None], None


def register() -> None:
    """Make transformers know the implementation; doing so again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, _from_layer)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)

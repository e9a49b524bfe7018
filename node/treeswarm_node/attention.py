"""The attention seam: transformers' layers call `attend` once a layer for the whole batch.

Every live crown node sees the whole trunk, so attention is an unmasked part over the trunk, in place, and a masked
part over the crown, under one softmax in float32.
"""

from typing import Any, Protocol, cast

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from treeswarm.errors import UnsupportedModel
from treeswarm_node.batch import Batch, SegmentMeta

IMPLEMENTATION = "treeswarm"
# What layers pass along that says nothing about which keys are seen or how scores are formed.
HARMLESS = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "dropout",
    "is_causal",
    "position_embeddings",
}


class Attention(Protocol):
    """An adapter: computes one layer's attention for the whole batch."""

    name: str

    def attend(
        self,
        block: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        batch: Batch,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """`query` [heads, ΣT, dim], `key` and `value` [kv_heads, ΣT, dim], `block` the store's.  First writes K and V
        to the batch's rows, then attends.  Returns [ΣT, heads, value_dim] in the query's dtype."""
        ...


class TorchReference:
    """Plain torch, segment by segment: correct everywhere, quick enough on a CPU."""

    name = "torch-reference"

    def attend(
        self,
        block: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        batch: Batch,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        keys, values = batch.store.keys[block], batch.store.values[block]
        keys[:, batch.written] = key
        values[:, batch.written] = value
        outputs = []
        for segment in batch.segments:
            if segment.rows.start == segment.rows.stop:
                continue  # it only commits, or all its rows died while they waited
            own = slice(segment.rows.start, segment.rows.stop)
            local_key, local_value = (
                (key[:, own], value[:, own])
                if segment.local_rows is None
                else (keys[:, segment.local_rows], values[:, segment.local_rows])
            )
            outputs.append(
                _attend_segment(
                    query[:, own] * scaling, keys, values, local_key, local_value, segment, window, softcap, sinks
                )
            )
        return torch.cat(outputs or [query.transpose(0, 1)]).to(query.dtype)


def _attend_segment(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    local_key: torch.Tensor,
    local_value: torch.Tensor,
    segment: SegmentMeta,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    heads, rows, dim = query.shape
    kv_heads = keys.shape[0]
    # A KV head's query heads become rows of one product: [kv_heads, heads / kv_heads · T, dim].
    folded = query.reshape(kv_heads, -1, dim).float()
    reach = segment.reach(window)
    parts = [(keys[:, at : at + count], values[:, at : at + count], mask) for at, count, mask in reach.runs]
    parts.append((local_key, local_value, reach.local))
    counts = [part[0].shape[1] for part in parts]
    scores = torch.cat([torch.bmm(folded, key.float().transpose(1, 2)) for key, _, _ in parts], -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    by_row = scores.view(kv_heads, -1, rows, scores.shape[-1])
    for seen, (_, _, mask) in zip(torch.split(by_row, counts, -1), parts, strict=True):
        if mask is not None:
            seen.masked_fill_(~mask, -torch.inf)
    if sinks is not None:
        # A sink takes probability and gives nothing: one more key of that score and value zero.
        level = sinks.float().view(kv_heads, -1, 1).expand(-1, -1, rows).reshape(kv_heads, -1, 1)
        scores, counts = torch.cat([scores, level], -1), [*counts, 1]
    weights = torch.split(scores.softmax(-1), counts, -1)
    merged = torch.bmm(weights[0], parts[0][1].float())
    for weight, (_, value, _) in zip(weights[1:], parts[1:], strict=False):  # a sink has no value
        merged = torch.baddbmm(merged, weight, value.float())
    return merged.view(heads, rows, -1).transpose(0, 1)


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
    strange = sorted(name for name, value in others.items() if name not in HARMLESS and value is not None)
    if strange or attention_mask is not None:
        raise UnsupportedModel(
            f"its attention takes {', '.join(strange) or 'a mask of its own'}, which is not honoured here"
        )
    if treeswarm is None:
        raise UnsupportedModel("its layers do not pass extra arguments on to attention")
    attention, batch = treeswarm
    output = attention.attend(
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
    return output[None], None


def register() -> None:
    """Make transformers know the implementation; doing so again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, _from_layer)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)

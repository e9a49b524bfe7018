"""Compute attention on a CPU by torch's fused kernel: one call per session, over trunk and crown side by side.

The reference computes scores, softmax and sums in a dozen operations, and in 16 bits it converts the whole trunk to
float32 in every layer.  This adapter copies the keys and values of trunk and crown side by side, as they are stored,
and the kernel does the rest; its sums are in float32.
"""

import torch

from treeswarm_node.attention.base import LayerInputs, attend_reference
from treeswarm_node.attention.metadata import SegmentMetadata

# Largest number of keys that are copied side by side in float32, where the reference reads them in place.
MAX_COPIED_FLOAT32 = 1024


class SdpaAttention:
    """Computes what torch's kernel for CPUs supports, and everything else as the reference does."""

    name = "torch-sdpa"

    def attend(self, layer: LayerInputs) -> torch.Tensor:
        groups = layer.batch.groups(layer.window)
        if not _is_supported(layer):
            return layer.attend_segments(attend_reference, groups.unbatched, groups.padded)
        if len(groups.unbatched) == 1 and not groups.padded:
            segment = groups.unbatched[0]
            if segment.rows == slice(0, layer.query.shape[1]) and self._is_short(layer, segment):
                return self._attend(layer, segment)
        short = [segment for segment in groups.unbatched if self._is_short(layer, segment)]
        long = [segment for segment in groups.unbatched if not self._is_short(layer, segment)]
        output = layer.attend_segments(attend_reference, long, groups.padded)
        for segment in short:
            output[segment.rows] = self._attend(layer, segment)
        return output

    def _is_short(self, layer: LayerInputs, segment: SegmentMetadata) -> bool:
        """Return whether copying the keys costs less than computing with them in place."""
        if layer.keys.dtype != torch.float32:
            return True
        return sum(count for _, count, _ in segment.visible_keys(layer.window).runs) <= MAX_COPIED_FLOAT32

    def _attend(self, layer: LayerInputs, segment: SegmentMetadata) -> torch.Tensor:
        """Return the attention output [T, heads, dim] of a segment's rows."""
        keys, values = (_side_by_side(layer, segment, pool, new) for pool, new in _pools(layer))
        query = layer.query[None, :, segment.rows]
        mask = segment.visible_keys(layer.window).additive_mask(query.dtype)
        output: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=mask, scale=layer.scaling
        )[0]
        return output[0].transpose(0, 1)


def _is_supported(layer: LayerInputs) -> bool:
    dtypes = {layer.query.dtype, layer.keys.dtype, layer.key.dtype, layer.value.dtype}
    same_size = layer.keys.shape[-1] == layer.values.shape[-1]
    return len(dtypes) == 1 and same_size and layer.softcap is None and layer.sinks is None


def _pools(layer: LayerInputs) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    return (layer.keys, layer.key), (layer.values, layer.value)


def _side_by_side(layer: LayerInputs, segment: SegmentMetadata, pool: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return the rows [1, kv_heads, keys, dim] that a segment sees, trunk first."""
    parts = [pool.narrow(1, first, count) for first, count, _ in segment.visible_keys(layer.window).runs]
    local = new[:, segment.rows] if segment.local_rows is None else pool.index_select(1, segment.local_rows)
    return torch.cat([*parts, local], 1)[None] if parts else local[None]

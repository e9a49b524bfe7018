"""Compute attention of many short sessions at once: gather their keys into one product, padded to the longest.

Segment by segment, a layer needs a dozen small operations for each session.  Sixteen sessions of one token spend more
time on those than on all the weights.  Gathering reads and writes every key once more, so long texts are computed
one by one.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Rows that a segment may have: with more of them its own products fill a core.
MAX_ROWS = 16


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """Holds S segments of similar size, with at most R rows and L keys each."""

    rows: torch.Tensor
    """Rows of the batch, int64 [S, R]; padding repeats a segment's first row."""
    keys: torch.Tensor
    """Rows of the pool, int64 [S, L]; padding repeats a segment's last key."""
    visible: torch.Tensor
    """Mask of the keys that each row sees, bool [1, S, 1, R, L]."""
    unpadded: torch.Tensor
    """Indices among the S · R rows of those that are not padding, int64 [ΣT]."""
    batch_rows: torch.Tensor
    """Rows of the batch that `unpadded` are, int64 [ΣT]."""

    @classmethod
    def of(cls, members: Sequence[tuple[slice, torch.Tensor, torch.Tensor]]) -> "PaddedBatch":
        """Pad segments to one size.

        Each member is a segment's rows in the batch, the pool rows that it may see, int64 [C], and their mask.  The
        mask says which row sees which pool row, bool [T, C].
        """
        max_rows = max(len(visible) for _, _, visible in members)
        max_keys = max(len(keys) for _, keys, _ in members)
        device = members[0][1].device
        rows = torch.empty(len(members), max_rows, dtype=torch.int64, device=device)
        keys = torch.empty(len(members), max_keys, dtype=torch.int64, device=device)
        mask = torch.zeros(len(members), max_rows, max_keys, dtype=torch.bool, device=device)
        unpadded = []
        for i, (own_rows, pool_rows, visible) in enumerate(members):
            count, width = visible.shape
            rows[i, :count] = torch.arange(own_rows.start, own_rows.stop, device=device)
            rows[i, count:] = own_rows.start
            keys[i, :width], keys[i, width:] = pool_rows, pool_rows[-1]
            mask[i, :count, :width], mask[i, count:, :width] = visible, visible[0]
            unpadded.append(torch.arange(i * max_rows, i * max_rows + count, device=device))
        indices = torch.cat(unpadded)
        return cls(rows, keys, mask[None, :, None], indices, rows.flatten()[indices])

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scaling: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the attention output float32 [ΣT, heads, value_dim] of the rows `batch_rows`.

        `query` is [heads, rows of the whole batch, dim], `keys` and `values` are [kv_heads, pool, dim].
        """
        (heads, _, dim), (kv_heads, *_) = query.shape, keys.shape
        count, rows = self.rows.shape
        shape = (kv_heads, count, heads // kv_heads, rows)
        # `index_select` copies whole rows: nine times as fast here as indexing.
        folded = query.index_select(1, self.rows.flatten()).view(kv_heads, -1, count, rows, dim).transpose(1, 2)
        scaled = folded.reshape(kv_heads, count, -1, dim).float() * scaling
        scores = scaled @ self._gather(keys).transpose(-1, -2)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.view(*shape, -1).masked_fill_(~self.visible, -torch.inf)
        if sinks is not None:
            # A sink takes probability and contributes no value.
            sink_scores = sinks.float().view(kv_heads, 1, -1, 1, 1).expand(*shape, 1)
            scores = torch.cat([scores, sink_scores], -1)
        weights = scores.softmax(-1)[..., : self.keys.shape[1]]
        output = weights.reshape(kv_heads, count, -1, self.keys.shape[1]) @ self._gather(values)
        by_row = output.view(*shape, -1).permute(1, 3, 0, 2, 4).reshape(count * rows, heads, -1)
        return by_row[self.unpadded]

    def _gather(self, pool: torch.Tensor) -> torch.Tensor:
        """Return the rows `keys` of a pool [kv_heads, pool, dim] as float32 [kv_heads, S, L, dim]."""
        rows = pool.index_select(1, self.keys.flatten())
        return rows.view(len(pool), *self.keys.shape, pool.shape[-1]).float()


def group_by_size(sizes: Sequence[tuple[int, int]], max_keys: int) -> list[list[int]]:
    """Return groups of segments, as indices into `sizes`, that are worth computing together.

    This function is pure.  `sizes` are (rows, keys).  Each grouped segment has at most `MAX_ROWS` rows and `max_keys`
    keys.  Within a group no segment has twice the rows or twice the keys of another, so that padding at most quadruples
    the work.
    """
    by_size: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (rows, keys) in enumerate(sizes):
        if 0 < rows <= MAX_ROWS and keys <= max_keys:
            by_size[rows.bit_length(), keys.bit_length()].append(i)
    return [group for group in by_size.values() if len(group) > 1]

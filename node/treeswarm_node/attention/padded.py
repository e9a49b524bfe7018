"""Attention of many short sessions at once: their keys gathered into one product, padded to the longest.

Segment by segment, a layer takes a dozen small operations for each session; sixteen sessions of one token spend more
time on those than on all the weights.  Gathering reads and writes every key once more, so long texts go alone.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Rows that a segment may have: beyond these its own products fill a core.
MAX_ROWS = 16


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """S segments of like size, with at most R rows and L keys each."""

    rows: torch.Tensor
    """int64 [S, R] of the batch; padding repeats a segment's first."""
    keys: torch.Tensor
    """int64 [S, L] of the pool; padding repeats a segment's last."""
    seen: torch.Tensor
    """bool [1, S, 1, R, L]."""
    real: torch.Tensor
    """int64 [ΣT]: which of the S · R are no padding."""
    into: torch.Tensor
    """int64 [ΣT]: and where those lie in the batch."""

    @classmethod
    def of(cls, members: Sequence[tuple[slice, torch.Tensor, torch.Tensor]]) -> "PaddedBatch":
        """From each segment's rows in the batch, the pool rows it may see, [C], and which sees which, bool [T, C]."""
        most_rows = max(len(seen) for _, _, seen in members)
        most_keys = max(len(keys) for _, keys, _ in members)
        device = members[0][1].device
        rows = torch.empty(len(members), most_rows, dtype=torch.int64, device=device)
        keys = torch.empty(len(members), most_keys, dtype=torch.int64, device=device)
        sees = torch.zeros(len(members), most_rows, most_keys, dtype=torch.bool, device=device)
        real = []
        for i, (own, pool_rows, seen) in enumerate(members):
            count, width = seen.shape
            rows[i, :count] = torch.arange(own.start, own.stop, device=device)
            rows[i, count:] = own.start
            keys[i, :width], keys[i, width:] = pool_rows, pool_rows[-1]
            sees[i, :count, :width], sees[i, count:, :width] = seen, seen[0]
            real.append(torch.arange(i * most_rows, i * most_rows + count, device=device))
        no_padding = torch.cat(real)
        return cls(rows, keys, sees[None, :, None], no_padding, rows.flatten()[no_padding])

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
        """float32 [ΣT, heads, value_dim] for the rows `into` of `query` [heads, the batch's rows, dim], over `keys` and
        `values` [kv_heads, pool, dim]."""
        (heads, _, dim), (kv_heads, *_) = query.shape, keys.shape
        count, rows = self.rows.shape
        shape = (kv_heads, count, heads // kv_heads, rows)
        # `index_select` copies whole rows: nine times as fast here as indexing.
        folded = query.index_select(1, self.rows.flatten()).view(kv_heads, -1, count, rows, dim).transpose(1, 2)
        asked = folded.reshape(kv_heads, count, -1, dim).float() * scaling
        scores = asked @ self._gathered(keys).transpose(-1, -2)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.view(*shape, -1).masked_fill_(~self.seen, -torch.inf)
        if sinks is not None:
            # A sink takes probability and gives nothing.
            level = sinks.float().view(kv_heads, 1, -1, 1, 1).expand(*shape, 1)
            scores = torch.cat([scores, level], -1)
        weights = scores.softmax(-1)[..., : self.keys.shape[1]]
        output = weights.reshape(kv_heads, count, -1, self.keys.shape[1]) @ self._gathered(values)
        by_row = output.view(*shape, -1).permute(1, 3, 0, 2, 4).reshape(count * rows, heads, -1)
        return by_row[self.real]

    def _gathered(self, pool: torch.Tensor) -> torch.Tensor:
        """float32 [kv_heads, S, L, dim]."""
        rows = pool.index_select(1, self.keys.flatten())
        return rows.view(len(pool), *self.keys.shape, pool.shape[-1]).float()


def group_by_size(sizes: Sequence[tuple[int, int]], most_keys: int) -> list[list[int]]:
    """Which segments, given by (rows, keys), are worth computing together: some of at most `most_keys` keys each, of
    which none has twice another's rows or keys, so that padding at most quadruples the work.  Pure."""
    found: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (rows, keys) in enumerate(sizes):
        if 0 < rows <= MAX_ROWS and keys <= most_keys:
            found[rows.bit_length(), keys.bit_length()].append(i)
    return [group for group in found.values() if len(group) > 1]

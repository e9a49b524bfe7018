"""Compute the attention metadata of a forward once, for use by every layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.protocol.spans import Span
from treeswarm.session.steps import Step
from treeswarm_node.attention.padded import PaddedBatch, group_by_size
from treeswarm_node.engine.step_rules import StepRules
from treeswarm_node.kv_cache.kv_store import KVStore, SessionKV


@dataclass(frozen=True)
class Chunk:
    """Describes attention within chunks of the text: a row sees the keys of its own chunk up to itself."""

    size: int


Window = int | Chunk | None
"""Number of positions in a layer's sliding window, or its chunk, or None if rows see their whole path."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Identifies one step of one session within a forward."""

    kv: SessionKV
    step: Step
    span: Span
    """Blocks to run: all hosted blocks, or a part of them."""
    speculates: bool = False
    """Whether the states of the step's rows are kept for a speculator."""
    sums_from: int | None = None
    """Position in the text from which rows get sums of taps for the next node, or None if none is sent on."""
    rules: StepRules | None = None
    """Rules for the logits of the answered rows, or None for none."""


@dataclass(frozen=True, eq=False)
class VisibleKeys:
    """Lists the keys that a segment's rows see under one sliding window."""

    runs: list[tuple[int, int, torch.Tensor | None]]
    """Runs of the trunk as (first pool row, rows, mask); the mask is bool [T, rows], or None if all rows are seen."""
    local_mask: torch.Tensor
    """Mask of the local rows, bool [T, C]."""
    _additive: dict[torch.dtype, torch.Tensor | None] = field(default_factory=dict)

    def additive_mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Return what is added to scores of trunk and local rows [1, 1, T, keys], or None if all keys are seen."""
        if dtype not in self._additive:
            masks = [self.local_mask.new_ones(len(self.local_mask), n) if m is None else m for _, n, m in self.runs]
            seen = torch.cat([*masks, self.local_mask], -1)
            added = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
            self._additive[dtype] = None if bool(seen.all()) else added[None, None]
        return self._additive[dtype]


@dataclass(eq=False)
class SegmentMetadata:
    """Describes a segment to attention: T new rows, and C local rows that they may see besides the trunk."""

    rows: slice
    """Rows of the batch that are the segment's."""
    positions: torch.Tensor
    """Positions of the new rows in the text, int64 [T]."""
    trunk_runs: list[tuple[int, int]]
    """Contiguous runs of the trunk in the pool, as (first pool row, rows)."""
    local_rows: torch.Tensor | None
    """Pool rows of the crown, int64 [C], or None if the local rows are the segment's own rows (C = T)."""
    local_positions: torch.Tensor
    """Positions of the local rows in the text, int64 [C]."""
    visible: torch.Tensor
    """Mask of the local rows that each new row sees, bool [T, C]."""
    room: int = 0
    """Number of tokens that the session may grow to."""
    _visible_keys: dict[Window, VisibleKeys] = field(default_factory=dict)

    def visible_keys(self, window: Window) -> VisibleKeys:
        """Return what a layer with this window attends to; in a sliding one, position p sees keys past p - window."""
        if window not in self._visible_keys:
            self._visible_keys[window] = self._keys_in_window(window) if window else self._all_keys()
        return self._visible_keys[window]

    def oldest_seen(self, window: int | Chunk) -> torch.Tensor:
        """Return the lowest position that each new row sees in a window, int64 [T]."""
        if isinstance(window, Chunk):
            return self.positions // window.size * window.size
        return self.positions - window + 1

    def _all_keys(self) -> VisibleKeys:
        return VisibleKeys([(first, count, None) for first, count in self.trunk_runs], self.visible)

    def _keys_in_window(self, window: int | Chunk) -> VisibleKeys:
        oldest = self.oldest_seen(window)
        lowest, highest = (int(oldest.min()), int(oldest.max())) if len(oldest) else (0, 0)
        runs: list[tuple[int, int, torch.Tensor | None]] = []
        start = 0
        for first, count in self.trunk_runs:
            skipped = min(max(lowest - start, 0), count)
            # Rows of a tree have several depths: only the keys between their windows' beginnings need a mask.
            masked_end = min(max(highest - start, skipped), count)
            if skipped < masked_end:
                keys = torch.arange(start + skipped, start + masked_end, device=self.positions.device)
                runs.append((first + skipped, masked_end - skipped, keys >= oldest[:, None]))
            if masked_end < count:
                runs.append((first + masked_end, count - masked_end, None))
            start += count
        return VisibleKeys(runs, self.visible & (self.local_positions >= oldest[:, None]))


@dataclass(frozen=True, eq=False)
class BatchGroups:
    """Divides a batch's segments as layers of one kind compute them.  Segments without rows are in neither list."""

    padded: list[PaddedBatch]
    """Groups of segments that are computed together."""
    unbatched: list[SegmentMetadata]
    """Segments that are computed one after the other."""


@dataclass(frozen=True, eq=False)
class GatheredKeys:
    """Lists the keys of all segments of a batch, and which row sees which."""

    rows: torch.Tensor
    """Pool rows, int64 [C]."""
    positions: torch.Tensor
    """Positions of the keys in their texts, int64 [C]."""
    visible: torch.Tensor
    """Mask of the keys that each row of the batch sees, bool [ΣT, C]."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Holds the metadata of a forward."""

    store: KVStore
    segments: list[SegmentMetadata]
    kv_rows: torch.Tensor
    """Pool rows that the batch's K and V are written to, int64 [ΣT]."""
    positions: torch.Tensor
    """Positions of the batch's rows in their texts, int64 [1, ΣT]."""
    _groups: dict[Window, BatchGroups] = field(default_factory=dict)
    _gathered: dict[Window, GatheredKeys] = field(default_factory=dict)

    def groups(self, window: Window) -> BatchGroups:
        """Return which segments layers with this sliding window compute together."""
        if window not in self._groups:
            self._groups[window] = self._group_segments(window)
        return self._groups[window]

    def gathered(self, window: Window) -> GatheredKeys:
        """Return the keys of all segments for attention that computes them at once, with this window."""
        if window not in self._gathered:
            self._gathered[window] = self._gather_keys(window)
        return self._gathered[window]

    def _gather_keys(self, window: Window) -> GatheredKeys:
        device = self.kv_rows.device
        rows, positions, masks = [], [], []
        for segment in self.segments:
            count = sum(count for _, count in segment.trunk_runs)
            trunk = torch.arange(count, device=device)
            keys = torch.cat([trunk, segment.local_positions])
            seen = torch.cat(
                [torch.ones(len(segment.visible), count, dtype=torch.bool, device=device), segment.visible], -1
            )
            if window:
                seen = seen & (keys >= segment.oldest_seen(window)[:, None])
            runs = [torch.arange(first, first + length, device=device) for first, length in segment.trunk_runs]
            local = self.kv_rows[segment.rows] if segment.local_rows is None else segment.local_rows
            rows.append(torch.cat([*runs, local]))
            positions.append(keys)
            masks.append(seen)
        # Newest first: attention that masks by a key's place instead of by the mask must fail its check.
        visible = torch.block_diag(*masks).bool().flip(-1)  # type: ignore[no-untyped-call]
        return GatheredKeys(torch.cat(rows).flip(0), torch.cat(positions).flip(0), visible)

    def _group_segments(self, window: Window) -> BatchGroups:
        visible = [segment.visible_keys(window) for segment in self.segments]
        sizes = [
            (
                segment.rows.stop - segment.rows.start,
                sum(count for _, count, _ in keys.runs) + keys.local_mask.shape[1],
            )
            for segment, keys in zip(self.segments, visible, strict=True)
        ]
        groups = group_by_size(sizes, self.store.max_gathered_rows)
        grouped = {i for group in groups for i in group}
        padded = [
            PaddedBatch.of([self._padded_member(self.segments[i], visible[i]) for i in group]) for group in groups
        ]
        unbatched = [
            segment
            for i, (segment, (rows, _)) in enumerate(zip(self.segments, sizes, strict=True))
            if rows and i not in grouped
        ]
        return BatchGroups(padded, unbatched)

    def _padded_member(
        self, segment: SegmentMetadata, visible: VisibleKeys
    ) -> tuple[slice, torch.Tensor, torch.Tensor]:
        """Return a segment as `PaddedBatch.of` takes it."""
        device = self.kv_rows.device
        local = self.kv_rows[segment.rows] if segment.local_rows is None else segment.local_rows
        trunk = [torch.arange(first, first + count, device=device) for first, count, _ in visible.runs]
        masks = [
            torch.ones(len(visible.local_mask), count, dtype=torch.bool, device=device) if mask is None else mask
            for _, count, mask in visible.runs
        ]
        return segment.rows, torch.cat([*trunk, local]), torch.cat([*masks, visible.local_mask], -1)


def make_batch(segments: Sequence[Segment], store: KVStore, device: torch.device) -> Batch:
    """Return the metadata of a forward.  Every segment's commit must have happened before."""
    metadata, start = [], 0
    for segment in segments:
        metadata.append(_segment_metadata(segment, start, device))
        start += segment.step.rows
    kv_rows = np.concatenate([segment.kv.new_rows(segment.step) for segment in segments])
    positions = np.concatenate([segment.step.positions for segment in segments])
    return Batch(store, metadata, _to_tensor(kv_rows, device), _to_tensor(positions, device)[None])


def _segment_metadata(segment: Segment, start: int, device: torch.device) -> SegmentMetadata:
    step, kv = segment.step, segment.kv
    slots = step.visible.shape[1]
    only_own = step.append.prefill or (slots == step.rows and np.array_equal(step.slots, np.arange(slots)))
    # A slot that no row sees may never have been written: its content may be NaN, and NaN times zero is NaN.
    seen = np.flatnonzero(step.visible.any(axis=0))
    return SegmentMetadata(
        rows=slice(start, start + step.rows),
        positions=_to_tensor(step.positions, device),
        trunk_runs=kv.trunk_runs(step.trunk_length),
        local_rows=None if only_own else _to_tensor(kv.crown_rows(seen), device),
        local_positions=_to_tensor(step.positions if only_own else kv.crown_positions[seen], device),
        visible=_to_tensor(step.visible if only_own else step.visible[:, seen], device),
        room=kv.trunk_room,
    )


def _to_tensor(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)

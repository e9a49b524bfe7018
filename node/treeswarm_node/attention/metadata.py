"""What attention must know of a forward, worked out once and used by every layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.protocol.spans import Span
from treeswarm.session.steps import Step
from treeswarm_node.attention.padded import PaddedBatch, group_by_size
from treeswarm_node.kv_cache.kv_store import KVStore, SessionKV


@dataclass(frozen=True, eq=False)
class Segment:
    """One step of one session within a forward."""

    kv: SessionKV
    step: Step
    span: Span
    """Blocks to run: all of what is hosted, or a part."""


@dataclass(frozen=True, eq=False)
class VisibleKeys:
    """What a segment's rows see of the trunk under one sliding window.

    `runs` are (first pool row, rows) with an optional bool mask [T, rows] each; `local` is a bool mask [T, C].
    """

    runs: list[tuple[int, int, torch.Tensor | None]]
    local: torch.Tensor


@dataclass(eq=False)
class SegmentMetadata:
    """A segment as attention sees it: T new rows, and C local rows they may see besides the trunk."""

    rows: slice
    """Where the segment lies in the batch."""
    positions: torch.Tensor
    """int64 [T]."""
    trunk_runs: list[tuple[int, int]]
    local_rows: torch.Tensor | None
    """Pool rows of the crown, int64 [C]; None where the segment's own rows are all there is (C = T)."""
    local_positions: torch.Tensor
    visible: torch.Tensor
    """bool [T, C]."""
    _visible_keys: dict[int | None, VisibleKeys] = field(default_factory=dict)

    def visible_keys(self, window: int | None) -> VisibleKeys:
        """What a layer with this sliding window attends to; a row at p sees keys past p - window."""
        if window not in self._visible_keys:
            self._visible_keys[window] = self._windowed(window) if window else self._whole()
        return self._visible_keys[window]

    def _whole(self) -> VisibleKeys:
        return VisibleKeys([(first, count, None) for first, count in self.trunk_runs], self.visible)

    def _windowed(self, window: int) -> VisibleKeys:
        oldest = self.positions - window + 1
        lowest, highest = (int(oldest.min()), int(oldest.max())) if len(oldest) else (0, 0)
        runs: list[tuple[int, int, torch.Tensor | None]] = []
        start = 0
        for first, count in self.trunk_runs:
            skipped = min(max(lowest - start, 0), count)
            # Rows of a tree lie at several depths: only the keys between their windows' beginnings need a mask.
            cut = min(max(highest - start, skipped), count)
            if skipped < cut:
                keys = torch.arange(start + skipped, start + cut, device=self.positions.device)
                runs.append((first + skipped, cut - skipped, keys >= oldest[:, None]))
            if cut < count:
                runs.append((first + cut, count - cut, None))
            start += count
        return VisibleKeys(runs, self.visible & (self.local_positions >= oldest[:, None]))


@dataclass(frozen=True, eq=False)
class BatchGroups:
    """A batch's segments as one layer kind computes them; those without rows are in neither."""

    padded: list[PaddedBatch]
    unbatched: list[SegmentMetadata]


@dataclass(frozen=True, eq=False)
class Batch:
    """A forward's metadata.  Layer i of the model has its rows in block `i - first_block` of the store."""

    store: KVStore
    first_block: int
    segments: list[SegmentMetadata]
    written: torch.Tensor
    """Pool rows that the batch's K and V go to, int64 [ΣT]."""
    positions: torch.Tensor
    """int64 [1, ΣT]."""
    _groups: dict[int | None, BatchGroups] = field(default_factory=dict)

    def groups(self, window: int | None) -> BatchGroups:
        """Which segments layers with this sliding window take together."""
        if window not in self._groups:
            self._groups[window] = self._group_segments(window)
        return self._groups[window]

    def _group_segments(self, window: int | None) -> BatchGroups:
        reaches = [segment.visible_keys(window) for segment in self.segments]
        sizes = [
            (
                segment.rows.stop - segment.rows.start,
                sum(count for _, count, _ in visible_keys.runs) + visible_keys.local.shape[1],
            )
            for segment, visible_keys in zip(self.segments, reaches, strict=True)
        ]
        groups = group_by_size(sizes, self.store.max_gathered_rows)
        together = {i for group in groups for i in group}
        padded = [PaddedBatch.of([self._member(self.segments[i], reaches[i]) for i in group]) for group in groups]
        unbatched = [
            segment
            for i, (segment, (rows, _)) in enumerate(zip(self.segments, sizes, strict=True))
            if rows and i not in together
        ]
        return BatchGroups(padded, unbatched)

    def _member(self, segment: SegmentMetadata, visible_keys: VisibleKeys) -> tuple[slice, torch.Tensor, torch.Tensor]:
        """Of a crowd."""
        device = self.written.device
        own = self.written[segment.rows] if segment.local_rows is None else segment.local_rows
        trunk = [torch.arange(at, at + count, device=device) for at, count, _ in visible_keys.runs]
        seen = [
            torch.ones(len(visible_keys.local), count, dtype=torch.bool, device=device) if mask is None else mask
            for _, count, mask in visible_keys.runs
        ]
        return segment.rows, torch.cat([*trunk, own]), torch.cat([*seen, visible_keys.local], -1)


def make_batch(segments: Sequence[Segment], store: KVStore, first_block: int, device: torch.device) -> Batch:
    """After every segment's commit."""
    metas, start = [], 0
    for segment in segments:
        metas.append(_segment_metadata(segment, start, device))
        start += segment.step.rows
    written = np.concatenate([segment.kv.new_rows(segment.step) for segment in segments])
    positions = np.concatenate([segment.step.positions for segment in segments])
    return Batch(store, first_block, metas, _tensor(written, device), _tensor(positions, device)[None])


def _segment_metadata(segment: Segment, start: int, device: torch.device) -> SegmentMetadata:
    step, kv = segment.step, segment.kv
    slots = step.visible.shape[1]
    own = step.append.prefill or (slots == step.rows and np.array_equal(step.slots, np.arange(slots)))
    # A slot that nobody sees may never have been written, and what lies there, times nothing, may be no number.
    seen = np.flatnonzero(step.visible.any(axis=0))
    return SegmentMetadata(
        rows=slice(start, start + step.rows),
        positions=_tensor(step.positions, device),
        trunk_runs=kv.trunk_runs(step.trunk_length),
        local_rows=None if own else _tensor(kv.crown_rows(seen), device),
        local_positions=_tensor(step.positions if own else kv.crown_positions[seen], device),
        visible=_tensor(step.visible if own else step.visible[:, seen], device),
    )


def _tensor(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)

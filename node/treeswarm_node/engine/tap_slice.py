"""A node's own part of a head's first matrix, by which it adds its taps to the sums that travel beside the rows.

A head's first matrix is linear in the results of the blocks that it taps, so that the columns of one tap need the
result of that block alone.  Sums travel in 8 bits per value: only guesses depend on them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import linear, rms_norm

from treeswarm.protocol.numerics import int8_row_bytes
from treeswarm.protocol.tap_sums import HEAD_DIGEST_BYTES, TapSums
from treeswarm.session.steps import Step
from treeswarm_node.engine.activation_codec import Int8BlockCodec

# Number of rows of a tree that have sums.  A tree's rows come best first, so that most walks stay among these; the head
# goes on below them by itself, as it does below its guesses.  Measured: docs/decisions/077-taps-on-several-nodes.md.
ROWS_WITH_SUMS = 16


@dataclass(frozen=True, eq=False)
class TapSlice:
    """The columns of a head's first matrix for the taps that this node hosts."""

    head: str
    """Digest of the whole matrix and of what it taps: sums of other heads are not added to."""
    taps: tuple[int, ...]
    """All blocks that the head taps, rising."""
    columns: Mapping[int, torch.Tensor]
    """Columns of each tapped block that is hosted here, [size, hidden] each."""
    size: int
    """Number of values of a sum."""
    window: int
    """Number of rows before the end of the text that the head reads at most."""
    epsilon: float | None = None
    """Epsilon of the norm that each tap has to itself, or None if taps are not normed."""

    def blocks_in(self, start: int, end: int) -> tuple[int, ...]:
        """Return the tapped blocks from `start` up to, not including, `end`, rising."""
        return tuple(tap for tap in self.taps if start <= tap < end)

    def contribution(self, states: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
        """Return what blocks add to the sums, [n, size], of their results side by side, [n, blocks · hidden]."""
        total = states.new_zeros(len(states), self.size, dtype=torch.float32)
        for block, state in zip(blocks, states.chunk(max(1, len(blocks)), -1), strict=False):
            total += fused_part(self.columns[block], state, self.epsilon).float()
        return total


def fused_part(columns: torch.Tensor, state: torch.Tensor, epsilon: float | None) -> torch.Tensor:
    """Return the part [n, size] that one tap's results [n, hidden] have in what a head reads.

    `columns` [size, hidden] are those of the tap.
    """
    state = state.to(columns.dtype)
    return linear(state if epsilon is None else rms_norm(state, state.shape[-1:], eps=epsilon), columns)


def head_digest(matrix: torch.Tensor, taps: Sequence[int], epsilon: float | None) -> str:
    """Return the digest of a head's first matrix and of what it reads: nodes with the same one may add to one sum."""
    digest = sha256(f"{tuple(taps)} {epsilon} {tuple(matrix.shape)} {matrix.dtype}".encode())
    digest.update(matrix.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[: 2 * HEAD_DIGEST_BYTES]


def rows_with_sums(step: Step, first_position: int) -> NDArray[np.bool_]:
    """Return the rows of a step for which sums begin, bool [rows].

    Of a text's rows these are the ones from `first_position` on, because a head reads no earlier ones.  Of a tree's
    rows they are the first ones.
    """
    if step.append.prefill:
        return np.asarray(step.positions >= first_position)
    return np.arange(step.rows) < ROWS_WITH_SUMS


def add_taps(
    part: TapSlice, step: Step, states: torch.Tensor, blocks: Sequence[int], first_position: int
) -> TapSums | None:
    """Return the sums of a step's rows, with what these blocks add, or None if no row has one.

    `states` are the results of the blocks side by side, [rows, blocks · hidden].  `first_position` is for a node where
    sums begin, as for `rows_with_sums`; any other one adds to what came, and to nothing if it came from other blocks
    than those before its own.
    """
    before = tuple(tap for tap in part.taps if not blocks or tap < blocks[0])
    came = step.append.tap_sums
    if came is None and blocks and blocks[0] == part.taps[0]:
        rows = rows_with_sums(step, first_position)
        total = part.contribution(states[torch.from_numpy(rows)], blocks)
    elif came is not None and (came.blocks == before or not blocks):
        sums, rows = read_sums(part, step)
        total = sums[torch.from_numpy(rows)].to(states.device)
        total = total + part.contribution(states[torch.from_numpy(rows)], blocks)
    else:
        return None
    if not rows.any():
        return None
    summed = np.zeros(step.append.rows, np.bool_)
    summed[np.flatnonzero(step.computed)[rows]] = True
    blocks_of_sums = (*(came.blocks if came is not None else ()), *blocks)
    return TapSums(summed, blocks_of_sums, Int8BlockCodec(part.size).encode(total))


def read_sums(part: TapSlice, step: Step) -> tuple[torch.Tensor, NDArray[np.bool_]]:
    """Return the sums that came with a step, float32 [rows, size], and which of its rows have one, bool [rows].

    The others are 0.  Sums of another size than the head's, or that are not finite, count as missing: guesses alone
    depend on them.
    """
    values, known = torch.zeros(step.rows, part.size), np.zeros(step.rows, np.bool_)
    came = step.append.tap_sums
    if came is None or len(came.data) != came.count * int8_row_bytes(part.size):
        return values, known
    decoded = Int8BlockCodec(part.size).decode(came.data, torch.float32)
    finite = decoded.isfinite().all(-1).numpy()
    sent = np.flatnonzero(step.computed)
    place = (np.cumsum(came.rows) - 1)[sent]
    known = came.rows[sent] & finite[place]
    values[torch.from_numpy(known)] = decoded[torch.from_numpy(place[known])]
    return values, known

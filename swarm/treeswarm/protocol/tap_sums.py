"""Taps that lie on several nodes: what a node is asked to add, and the sums that travel beside the rows.

A head reads the results of several blocks, its taps, through one matrix.  That matrix is linear, so each node with a
tapped block adds its own part to one vector per row.  The tail adds the last part and has what the head reads.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# Heads of today tap 1 to 9 blocks.
MAX_TAPS = 16
HEAD_DIGEST_BYTES = 8


@dataclass(frozen=True)
class TapRequest:
    """What the client asks of a node that is not the tail."""

    head: str
    """Digest of the tail's head, 16 hex digits: a node with another one adds nothing and sends no sums."""
    prompt_rows: int = 0
    """Number of tokens of the prompt: only its last rows need sums.  0 if it is not known."""


@dataclass(frozen=True, eq=False)
class TapSums:
    """What the taps of some blocks add up to, for some rows of an append."""

    rows: NDArray[np.bool_]
    """Rows of the append that have a sum, bool [rows]; at least one, and none that is skipped."""
    blocks: tuple[int, ...]
    """Blocks whose taps are added, rising; at least one."""
    data: bytes = field(repr=False)
    """One sum per such row, in 8 bits per value, as 8-bit activations are encoded."""

    @property
    def count(self) -> int:
        """Number of rows that have a sum."""
        return int(self.rows.sum())
